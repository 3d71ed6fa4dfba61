"""All methods of one table, made from one config: what is trained, what it must beat, and what measures leaks."""

from attrib.generators.backbone_features import BackboneFeatures
from attrib.generators.extractor import Extractor, untrained
from attrib.generators.fingerprint_settings import MethodsSettings
from attrib.generators.leak_controls import CodecAndSize, ContentOnly
from attrib.generators.logistic import logistic_scores
from attrib.generators.methods import Method, Rescored, nearest_neighbours
from attrib.generators.pool import Pool
from attrib.generators.spectrum_methods import (
    DISCRIMINANT,
    WHITENING,
    LogSpectrum,
    SpectrumDiscriminant,
    SpectrumWhitened,
    fitted_maps,
)
from attrib.storage import Storage, join

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
    logistic = logistic_scores(settings.logistic_strength)
    methods: list[Method] = []
    if extractor:
        methods += [extractor, Rescored(extractor, f"{extractor.name}-logistic", logistic), untrained(extractor)]
    for spectrum, place in ((settings.colour_spectrum, COLOUR_FOLDER), (settings.spectrum, "")):
        maps = fitted_maps(pool, spectrum, settings.discriminant, storage, folder and join(folder, place))
        methods += [
            SpectrumWhitened(maps[WHITENING], spectrum),
            SpectrumDiscriminant(maps[DISCRIMINANT], spectrum),
            plain := LogSpectrum(maps[DISCRIMINANT].mean, spectrum),
            Rescored(plain, f"{plain.name}-logistic", logistic),
        ]
    if settings.backbone:
        features = BackboneFeatures(settings.backbone, storage, device)
        neighbours = nearest_neighbours(settings.backbone.num_neighbours)
        methods += [
            features,
            Rescored(features, "backbone-knn", neighbours),
            Rescored(features, "backbone-logistic", logistic),
        ]
    return [*methods, Rescored(ContentOnly(), "content-only", logistic), CodecAndSize()]
