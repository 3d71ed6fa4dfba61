"""All methods of one table, made from one config: what is trained, what it must beat, and what measures leaks."""

from attrib.common.storage import Storage, join
from attrib.generators.evaluation.leak_controls import CodecAndSize, ContentOnly
from attrib.generators.extractor.network import PARTS, Extractor, Part, untrained
from attrib.generators.fingerprints.backbone import BackboneFeatures
from attrib.generators.fingerprints.base import Method, asked
from attrib.generators.fingerprints.discriminant import Discriminant
from attrib.generators.fingerprints.spectrum import (
    DISCRIMINANT,
    WHITENING,
    LogSpectrum,
    SpectrumDiscriminant,
    SpectrumWhitened,
    fitted_maps,
)
from attrib.generators.settings import MethodsSettings, SpectrumSettings
from attrib.generators.synthesis.pool import Pool

COLOUR_FOLDER = "colour"  # below what is fitted on the pool


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
        methods += [Part(extractor, name) for name in PARTS]
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
