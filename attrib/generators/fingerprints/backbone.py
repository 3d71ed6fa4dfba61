"""Features of a frozen timm network as fingerprints, a usual baseline (often with CLIP)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from attrib.common.config import digest
from attrib.common.storage import Storage
from attrib.generators.fingerprints.base import Method
from attrib.generators.fingerprints.scoring import unit_or_zero
from attrib.generators.settings import BackboneFeatureSettings
from attrib.generators.signals.samples import Sample
from attrib.models.encoder import ImageEncoder, load_network, preprocessing_of
from attrib.models.features import FeatureExtractor
from attrib.models.model import features_data_config

CHUNK_IMAGES = 64  # preprocessed images in memory at a time


class BackboneFeatures(Method):
    """Cosine of backbone features with the nearest reference. The backbone's resizing removes part of the trace."""

    name = "backbone"
    scoring = "nearest"

    def __init__(self, settings: BackboneFeatureSettings, storage: Storage, device: str = "cpu"):
        """Raises AttribError if the network, its weights or one of the levels in the settings does not exist."""
        network = load_network(settings.backbone, storage)
        data_config = features_data_config(network.data_config, settings.features)
        preprocessing = preprocessing_of(replace(network, data_config=data_config), settings.backbone.name)
        extractor = FeatureExtractor(network.model, settings.features, preprocessing.crop_px)
        self.encoder = ImageEncoder(extractor, settings.backbone.name, preprocessing, device, None)
        identity = self.encoder.identity
        self.digest = digest([identity.model_digest, identity.preprocessing, settings.features.model_dump(mode="json")])

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        rows = np.empty((len(samples), self.encoder.identity.dimension), np.float32)
        for start in range(0, len(samples), CHUNK_IMAGES):
            chunk = samples[start : start + CHUNK_IMAGES]
            pixels = [self.encoder.preprocessing.resize_and_crop(sample.image) for sample in chunk]
            rows[start : start + len(chunk)] = self.encoder.encode(torch.stack(pixels).numpy())
        return unit_or_zero(rows)
