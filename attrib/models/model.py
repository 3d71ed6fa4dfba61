"""The whole model, which maps images to embeddings, and its checkpoint.

A model has a backbone, feature blocks, and either one head or two: one for real and one for synthetic images.

The metadata of a checkpoint contain JSON under CHECKPOINT_KEY: name (of the backbone in timm), data_config (timm's
preprocessing) and, if the model has a head, features, head and projected_sizes. Loading a checkpoint does not execute
code from it.
"""

import hashlib
import json

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import nn

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.models.features import FeatureExtractor
from attrib.models.heads import Head
from attrib.models.settings import Domain, FeatureSettings, HeadSettings

TRAINED_MODEL, TRAIN_RECORD = "model.safetensors", "train.json"  # files of jobs.train
CHECKPOINT_KEY = "attrib.backbone"


class AttributionModel(nn.Module):
    """Maps normalised images float32 [n, 3, h, w] to embeddings float32 [n, d]; `domain` selects the head."""

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
        """Return the settings that define the model beside its weights, without the domain, as JSON-like values."""
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
    """Return a model with untrained heads. Raises AttribError if the network lacks a level of the features."""
    extractor = FeatureExtractor(backbone, features, data_config["input_size"][-1])
    names = ("real", "synthetic") if head.separate_domains else ("real",)
    heads = nn.ModuleDict({name: Head(extractor.sizes, projected_sizes, head) for name in names})
    return AttributionModel(extractor, heads, data_config, head, domain)


def features_data_config(data_config: dict, features: FeatureSettings) -> dict:
    """Return timm's preprocessing of the network with the changes that the features require."""
    return data_config | ({"crop_mode": "squash", "crop_pct": 1.0} if features.whole_image else {})


def save_model(model: AttributionModel, name: str, uri: str, storage: Storage) -> None:
    declared = {"name": name, "data_config": model.data_config} | model.description()
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    storage.write_bytes(uri, save(state, metadata={CHECKPOINT_KEY: json.dumps(declared)}))


def model_from_checkpoint(
    backbone: nn.Module, declared: dict, state: dict[str, torch.Tensor], origin: str, domain: Domain
) -> AttributionModel:
    """Return the model of a checkpoint with metadata `declared` and weights `state`, read from the URI `origin`.

    Raises AttribError if the metadata are invalid or the weights do not fit them.
    """
    try:
        features = FeatureSettings.model_validate(declared["features"])
        head = HeadSettings.model_validate(declared["head"])
        head.check(features)
        model = build_model(backbone, declared["data_config"], features, head, declared["projected_sizes"], domain)
        model.load_state_dict(state, strict=True)
    except (AttributeError, LookupError, TypeError, ValidationError, ValueError, RuntimeError) as error:
        raise AttribError(
            f"{origin} is not a checkpoint that this version can read ({' '.join(str(error).split())[:400]}); download "
            "it again, or train it again with this version"
        ) from error
    return model


def model_digest(name: str, model: nn.Module) -> str:
    """Return a digest of the network name and all weights, independent of the source of the weights."""
    weights = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        weights.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        # Flattened in logical order, for any memory format; as bytes, because NumPy has no bfloat16.
        weights.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    # As JSON text, because digest() sorts keys, and the order of the parts decides the order of the dimensions.
    described = [json.dumps(model.description())] if isinstance(model, AttributionModel) else []
    return digest([name.split(".")[0], weights.hexdigest(), *described])
