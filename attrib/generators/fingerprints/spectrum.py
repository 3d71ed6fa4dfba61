"""Fingerprints without a trained network: spectra, alone or after a linear map that is fitted on the pool."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.generators.fingerprints.base import Method, check_sides
from attrib.generators.fingerprints.discriminant import (
    Discriminant,
    fit_discriminant,
    fit_whitening,
    load_discriminant,
    model_statistics,
    save_discriminant,
)
from attrib.generators.fingerprints.scoring import unit_or_zero
from attrib.generators.settings import FINGERPRINT_VERSION, DiscriminantSettings, SpectrumSettings
from attrib.generators.signals.degradations import degrade, parse
from attrib.generators.signals.samples import Sample
from attrib.generators.signals.spectrum import patch_spectra, patches
from attrib.generators.synthesis.pool import Pool

CHUNK_IMAGES = 32  # images whose patch spectra are in memory at a time
DISCRIMINANT, WHITENING = "lda.safetensors", "whitening.safetensors"


class _SpectrumMethod(Method):
    def __init__(self, name: str, settings: SpectrumSettings, *arrays: np.ndarray):
        """arrays: everything that determines a vector besides name and settings; part of the digest."""
        self.name, self.settings = name, settings
        self.min_side_px, self.needs_colour = settings.min_side_px, settings.window_px is not None
        hashes = [bytes_sha256(np.ascontiguousarray(array).tobytes()) for array in arrays]
        self.digest = digest([FINGERPRINT_VERSION, name, settings.model_dump(mode="json"), *hashes])


class LogSpectrum(_SpectrumMethod):
    """Cosine of log spectra after two subtractions: the mean spectrum of the synthetic models, and each row's own mean.

    mean: float64 [d]; without this step all cosines are near 1. A row's mean is the contrast of the image, which
    depends on its content.
    """

    def __init__(self, mean: np.ndarray, settings: SpectrumSettings):
        super().__init__("colour-spectrum" if settings.window_px else "log-spectrum", settings, mean)
        self.mean = mean

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        check_sides(samples, self)
        rows = spectra(samples, self.settings) - self.mean
        return unit_or_zero(rows - rows.mean(axis=1, keepdims=True)).astype(np.float32)


class SpectrumDiscriminant(_SpectrumMethod):
    """Cosine of spectra after the discriminant's projection."""

    map_name = "lda"

    def __init__(self, discriminant: Discriminant, settings: SpectrumSettings):
        name = f"{'colour-' if settings.window_px else ''}spectrum-{self.map_name}"
        super().__init__(name, settings, discriminant.mean, discriminant.projection)
        self.discriminant = discriminant

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        check_sides(samples, self)
        return unit_or_zero(self.discriminant(spectra(samples, self.settings))).astype(np.float32)


class SpectrumWhitened(SpectrumDiscriminant):
    """Cosine of whitened spectra; the whitening also subtracts each row's mean."""

    map_name = "whitened"


def spectra(samples: Sequence[Sample], settings: SpectrumSettings) -> np.ndarray:
    """Flat spectra, float32 [n, settings.dimension]. Raises AttribError for an image below min_side_px."""
    found = np.empty((len(samples), settings.dimension), np.float32)
    sides = np.array([settings.patch_side(sample.side_px) for sample in samples], np.int64)
    for side in np.unique(sides):
        of_side = np.flatnonzero(sides == side)
        for start in range(0, len(of_side), CHUNK_IMAGES):
            places = of_side[start : start + CHUNK_IMAGES]
            cut = [patches(samples[place].image, int(side), settings.max_patches) for place in places]
            rows = patch_spectra(torch.cat(cut), settings.window_px).flatten(1)
            for place, own in zip(places, rows.split([len(of_image) for of_image in cut])):
                found[place] = own.mean(dim=0).numpy()
    return found


def pool_spectra(
    pool: Pool, spectrum: SpectrumSettings, settings: DiscriminantSettings, storage: Storage
) -> Iterator[np.ndarray]:
    """float32 [n, d] of each synthetic model under each degradation; each combination is a class."""
    for model in pool.models:
        images = pool.samples(model.model_id, storage)[: settings.images_per_model]
        for degradation in map(parse, settings.degradations):
            yield spectra([Sample(degrade(image, degradation), "", 0) for image in images], spectrum)


def fitted_maps(
    pool: Pool, spectrum: SpectrumSettings, settings: DiscriminantSettings, storage: Storage, folder: str | None = None
) -> dict[str, Discriminant]:
    """Discriminant and whitening fitted on the pool, {DISCRIMINANT: ..., WHITENING: ...}.

    With a folder they are saved there, and loaded if an earlier run saved the same fit. Raises AttribError if the
    folder holds another fit, or the pool has fewer than two models.
    """
    declared = {"pool": pool.digest, "spectrum": spectrum.model_dump(mode="json")}
    declared["discriminant"] = settings.model_dump(mode="json")
    uris = {name: join(folder, name) for name in (DISCRIMINANT, WHITENING)} if folder else {}
    if folder and all(map(storage.exists, uris.values())):
        kept = {name: load_discriminant(uri, storage) for name, uri in uris.items()}
        for name, (_, held) in kept.items():
            if held != declared:
                raise AttribError(
                    f"{uris[name]} was fitted on another pool or with other options; choose another folder or delete it"
                )
        return {name: found for name, (found, _) in kept.items()}
    statistics = model_statistics(pool_spectra(pool, spectrum, settings, storage))
    mean, shrinkage = statistics.means.mean(axis=0), settings.whitening_shrinkage
    fitted = {
        DISCRIMINANT: fit_discriminant(statistics, settings.shrinkage, settings.num_directions),
        WHITENING: fit_whitening(mean, statistics.covariance, shrinkage, without_level=True),
    }
    for name, uri in uris.items():
        save_discriminant(fitted[name], declared, uri, storage)
    return fitted


def load_spectrum_method(name: str, folder: str, storage: Storage) -> Method:
    """The method of this name from the files of `fitted_maps`. Raises AttribError if the folder has none."""
    file = WHITENING if name.endswith(SpectrumWhitened.map_name) else DISCRIMINANT
    found, held = load_discriminant(join(folder, file), storage)
    settings = SpectrumSettings.model_validate(held["spectrum"])
    mapped = (SpectrumWhitened if file == WHITENING else SpectrumDiscriminant)(found, settings)
    methods: dict[str, Method] = {method.name: method for method in (mapped, LogSpectrum(found.mean, settings))}
    if name not in methods:
        held_names = " and ".join(methods)
        raise AttribError(f"{folder} holds {held_names}, not {name}; correct method.name or method.uri")
    return methods[name]
