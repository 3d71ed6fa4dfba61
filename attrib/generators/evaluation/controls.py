"""All methods of one table, made from one config: what is trained, what it must beat, and what measures leaks."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from attrib.common.config import digest
from attrib.common.storage import Storage, join
from attrib.data.decoding import FORMATS
from attrib.generators.extractor.network import PARTS, Extractor, ExtractorPart, untrained
from attrib.generators.fingerprints.backbone import BackboneFeatures
from attrib.generators.fingerprints.base import Method, asked
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

COLOUR_FOLDER = "colour"  # below what is fitted on the pool
THUMBNAIL_PX = 8
FREQUENCIES = 2.0 ** np.arange(-3, 5)  # cycles per doubling of a size: from any size at all to 4 % of one


class ContentOnly(Method):
    """An 8 x 8 thumbnail and the colours: averages of whole areas, in which no pattern of single pixels is left."""

    name = "content-only"
    looks_at_trace = False
    scoring = "logistic"

    def __init__(self):
        self.digest = digest([self.name, THUMBNAIL_PX])

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        rows = np.stack([_content(sample.image) for sample in samples])
        # One constant beside the others: a row's length, its contrast, is then not lost when it is made 1.
        return unit_or_zero(np.column_stack([rows, np.ones(len(rows))])).astype(np.float32)


def _content(image: torch.Tensor) -> np.ndarray:
    """float64 [3 * 64 + 6]: thumbnail around mid-grey, then mean and deviation of each channel of a 4 times larger one."""
    pixels = image[None].float() / 255 - 0.5
    thumbnail = F.adaptive_avg_pool2d(pixels, THUMBNAIL_PX)
    deviation, mean = torch.std_mean(F.adaptive_avg_pool2d(pixels, 2 * THUMBNAIL_PX), dim=(2, 3), correction=0)
    return torch.cat([thumbnail.flatten(), mean[0], deviation[0]]).double().numpy()


class CodecAndSize(Method):
    """The file's format, its bytes and the image's sides, and no pixel.

    Each size is a set of cosines and sines of its logarithm, so that rows of length one keep it, and the cosine of two rows falls with the
    ratio of their sizes.
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
    device: str = "cpu",
) -> list[Method]:
    """The methods in the order of the table, leak controls last. Methods of one digest embed alike: embed once for all of them.

    extractor: the trained one, first if there; folder: where what is fitted on the pool is kept, see `fitted_maps`.
    """
    methods: list[Method] = []
    if extractor:
        methods += [asked(extractor, scoring) for scoring in ("adapted", "cosine", "logistic")]
        methods += [asked(untrained(extractor), scoring) for scoring in ("adapted", "cosine", "logistic")]
        methods += [ExtractorPart(extractor, name) for name in PARTS]
    maps = fitted_maps(
        pool, settings.colour_spectrum, settings.colour_discriminant, storage, folder and join(folder, COLOUR_FOLDER)
    )
    methods += _spectrum_methods(maps, settings.colour_spectrum)
    maps = fitted_maps(pool, settings.spectrum, settings.discriminant, storage, folder)
    methods += [*_spectrum_methods(maps, settings.spectrum), SpectrumWhitened(maps[WHITENING], settings.spectrum)]
    if settings.backbone:
        features = BackboneFeatures(settings.backbone, storage, device)
        methods += [asked(features, scoring) for scoring in ("nearest", "knn", "logistic")]
    return [*methods, ContentOnly(), CodecAndSize()]


def _spectrum_methods(maps: dict[str, Discriminant], spectrum: SpectrumSettings) -> list[Method]:
    discriminant = SpectrumDiscriminant(maps[DISCRIMINANT], spectrum)
    plain = LogSpectrum(maps[DISCRIMINANT].mean, spectrum)
    methods = [asked(discriminant, scoring) for scoring in ("cosine", "adapted")]
    return methods + [asked(plain, scoring) for scoring in ("cosine", "adapted", "logistic")]
