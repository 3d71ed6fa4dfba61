"""All methods of an evaluation: the trained extractor, the baselines (controls) that it must beat, and leak controls.

Leak controls see no generator trace (attrib/generators/signals/samples.py). They show how much content or file
properties reveal about the generator in a set.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from attrib.common.config import digest
from attrib.common.storage import Storage, join
from attrib.data.decoding import FORMATS
from attrib.generators.extractor.network import PARTS, Extractor, ExtractorPart, untrained
from attrib.generators.fingerprints.backbone import BackboneFeatures
from attrib.generators.fingerprints.base import Method, with_scoring
from attrib.generators.fingerprints.discriminant import Discriminant
from attrib.generators.fingerprints.scoring import unit_or_zero
from attrib.generators.fingerprints.spectrum import (
    DISCRIMINANT,
    WHITENING,
    LogSpectrum,
    SpectrumDiscriminant,
    SpectrumWhitened,
    fitted_maps,
)
from attrib.generators.settings import MethodsSettings, SpectrumSettings
from attrib.generators.signals.samples import Sample
from attrib.generators.synthesis.pool import Pool

COLOUR_FOLDER = "colour"  # below the folder of fitted maps
THUMBNAIL_PX = 8
FREQUENCIES = 2.0 ** np.arange(-3, 5)  # cycles per doubling of a size; they resolve differences down to 4 %


class ContentOnly(Method):
    """Leak control: an 8 x 8 thumbnail and colour statistics, in which patterns of single pixels average out."""

    name = "content-only"
    looks_at_trace = False
    scoring = "logistic"

    def __init__(self):
        self.digest = digest([self.name, THUMBNAIL_PX])

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        rows = []
        for sample in samples:
            pixels = sample.image[None].float() / 255 - 0.5
            thumbnail, larger = (F.adaptive_avg_pool2d(pixels, side) for side in (THUMBNAIL_PX, 2 * THUMBNAIL_PX))
            deviation, mean = torch.std_mean(larger, dim=(2, 3), correction=0)
            # With the constant, the normalised row still shows the length of the row, which is the contrast.
            rows.append(torch.cat([thumbnail.flatten(), mean[0], deviation[0], torch.ones(1)]).double().numpy())
        return unit_or_zero(np.stack(rows)).astype(np.float32)


class CodecAndSize(Method):
    """Leak control: file format, file size and image size, without any pixel.

    Each size is encoded as cosines and sines of its logarithm. So L2-normalised rows keep it, and the cosine of two
    rows is smaller the more their sizes differ.
    """

    name = "codec-and-size"
    looks_at_trace = False

    def __init__(self):
        self.digest = digest([self.name, list(FORMATS), FREQUENCIES.tolist()])

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        codecs = np.array([[sample.codec == codec for codec in FORMATS] for sample in samples], np.float64)
        sizes = np.log2([[max(sample.num_bytes, 1), *sample.image.shape[1:]] for sample in samples])
        angles = (2 * np.pi * sizes[:, :, None] * FREQUENCIES).reshape(len(samples), -1)
        waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(len(FREQUENCIES))
        return unit_or_zero(np.concatenate([codecs, waves], axis=1)).astype(np.float32)


def methods_from(
    settings: MethodsSettings,
    pool: Pool,
    storage: Storage,
    extractor: Extractor | None = None,
    folder: str | None = None,
) -> list[Method]:
    """The methods in the order of the results table, leak controls last.

    Methods with the same digest have the same vectors, which need to be computed only once. extractor: the trained one.
    folder: for maps fitted on the pool, see `fitted_maps`.
    """
    methods: list[Method] = []
    if extractor:
        methods += [with_scoring(extractor, scoring) for scoring in ("adapted", "cosine", "logistic")]
        methods += [with_scoring(untrained(extractor), scoring) for scoring in ("adapted", "cosine", "logistic")]
        methods += [ExtractorPart(extractor, name) for name in PARTS]
    maps = fitted_maps(
        pool, settings.colour_spectrum, settings.colour_discriminant, storage, folder and join(folder, COLOUR_FOLDER)
    )
    methods += _spectrum_methods(maps, settings.colour_spectrum)
    maps = fitted_maps(pool, settings.spectrum, settings.discriminant, storage, folder)
    methods += [*_spectrum_methods(maps, settings.spectrum), SpectrumWhitened(maps[WHITENING], settings.spectrum)]
    if settings.backbone:
        features = BackboneFeatures(settings.backbone, storage)
        methods += [with_scoring(features, scoring) for scoring in ("nearest", "knn", "logistic")]
    return [*methods, ContentOnly(), CodecAndSize()]


def _spectrum_methods(maps: dict[str, Discriminant], spectrum: SpectrumSettings) -> list[Method]:
    discriminant = SpectrumDiscriminant(maps[DISCRIMINANT], spectrum)
    plain = LogSpectrum(maps[DISCRIMINANT].mean, spectrum)
    methods = [with_scoring(discriminant, scoring) for scoring in ("cosine", "adapted")]
    return methods + [with_scoring(plain, scoring) for scoring in ("cosine", "adapted", "logistic")]
