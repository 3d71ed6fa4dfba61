"""The whole model: a backbone, what is read of it, and a head for each domain; and its checkpoint, one self-contained safetensors file.

A checkpoint's metadata, under CHECKPOINT_KEY, is JSON: name (timm's), data_config (timm's preprocessing), and for a model with a head
features, head and projected_sizes. Nothing in it is executed.
"""

import json

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import nn

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.models.features import FeatureExtractor
from attrib.models.heads import Head
from attrib.models.settings import Domain, FeatureSettings, HeadSettings

CHECKPOINT_KEY = "attrib.backbone"


class AttributionModel(nn.Module):
    """float32 [n, 3, h, w], normalised -> float32 [n, d]. `domain` selects the head, where there are two."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        heads: nn.ModuleDict,
        data_config: dict,
        head_settings: HeadSettings,
        domain: Domain,
    ):
        super().__init__()
        self.data_config = data_config
        self.extractor, self.heads, self.head_settings, self.domain = extractor, heads, head_settings, domain

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.domain)(self.extractor(images))

    def description(self) -> dict:
        """What, beside the weights, decides what the model computes; JSON-like. The domain is no part of it."""
        return {
            "features": self.extractor.settings.model_dump(mode="json"),
            "head": self.head_settings.model_dump(mode="json"),
            "projected_sizes": self.heads["real"].projected_sizes,
        }

    def head(self, domain: Domain) -> Head:
        return self.heads[domain if len(self.heads) > 1 else "real"]


def build_model(
    backbone: nn.Module,
    data_config: dict,
    features: FeatureSettings,
    head: HeadSettings,
    projected_sizes: dict[str, int],
    domain: Domain = "real",
) -> AttributionModel:
    """With heads as they start. Raises AttribError if the network lacks a level that the features name."""
    extractor = FeatureExtractor(backbone, features, data_config["input_size"][-1])
    names = ("real", "synthetic") if head.separate_domains else ("real",)
    heads = nn.ModuleDict({name: Head(extractor.sizes, projected_sizes, head) for name in names})
    return AttributionModel(extractor, heads, data_config, head, domain)


def features_data_config(data_config: dict, features: FeatureSettings) -> dict:
    """timm's preprocessing of the network, changed as the features ask for it."""
    return data_config | ({"crop_mode": "squash", "crop_pct": 1.0} if features.whole_image else {})


def save_model(model: AttributionModel, name: str, uri: str, storage: Storage) -> None:
    declared = {"name": name, "data_config": model.data_config} | model.description()
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    storage.write_bytes(uri, save(state, metadata={CHECKPOINT_KEY: json.dumps(declared)}))


def model_from_checkpoint(
    backbone: nn.Module, declared: dict, state: dict[str, torch.Tensor], origin: str, domain: Domain
) -> AttributionModel:
    """Raises AttribError if the file's description is not understood or its weights do not fit it."""
    try:
        features = FeatureSettings.model_validate(declared["features"])
        head = HeadSettings.model_validate(declared["head"])
        head.check(features)
        model = build_model(backbone, declared["data_config"], features, head, declared["projected_sizes"], domain)
        model.load_state_dict(state, strict=True)
    except (AttributeError, LookupError, TypeError, ValidationError, ValueError, RuntimeError) as error:
        raise AttribError(
            f"{origin} is no checkpoint that this version understands: {' '.join(str(error).split())[:400]}"
        ) from error
    return model
