"""How near a pool of synthetic generators comes to real ones, and how far its models lie apart.

Fidelity is the Frechet Frequency Distance of Model Synthesis (arXiv 2307.15977): each generator becomes one vector, the azimuthal mean of the
power spectrum of its images' residuals; Gaussians are fitted to the vectors of the real and of the synthetic generators; the Frechet distance
of the two is the measure. Ours takes the decimal logarithm of the power, so that each frequency counts alike (the raw power falls by orders of
magnitude, and a few bins would decide), and our own residual: compare it only with itself.

Diversity has no published definition. Ours looks at the log spectra of all models on the same photographs. The mean over models of one
photograph's spectrum is its content; what is left of each spectrum is the model's trace in it. `separation` is the mean distance of two models' mean traces in
units of the root mean square deviation of single images' traces from their model's mean; at 1 a single image is as far from its own model's mean as
two models are from each other. `effective_models` is exp(entropy) of the normalised eigenvalues of the covariance of the mean traces: how many
directions the models spread over evenly, at most one less than there are models.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.decoding import decode_image
from attrib.data.ids import sampling_rank
from attrib.data.manifest import Manifest
from attrib.data.reading import read_all
from attrib.generators.signals.spectrum import azimuthal_power, log_spectrum, patches, residual
from attrib.generators.synthesis.pool import Pool, stack_samples

PATCH_PX = 32  # of both sides of the Frechet distance: the smallest images of real generators have 32 px
PATCHES_PER_IMAGE = 4
IMAGES_PER_GENERATOR = 100
IO_THREADS = 8
# The spectra of so many images are held in memory at once (about 0.2 GiB at 64 px).
DIVERSITY_MODELS = 200
DIVERSITY_PHOTOGRAPHS = 32
MIN_POWER = 1e-12


@dataclass(frozen=True)
class Diversity:
    """separation: in standard deviations of single images; effective_models: at most num_models - 1."""

    separation: float
    effective_models: float
    num_models: int
    num_photographs: int


def diversity(samples: np.ndarray) -> Diversity:
    """samples: uint8 [g, n, 3, px, px], photograph i at place i of every model. Raises AttribError for fewer than two models or photographs."""
    if min(samples.shape[:2]) < 2:
        raise AttribError(
            f"diversity needs two models and two photographs, there are {samples.shape[0]} and {samples.shape[1]}"
        )
    spectra = torch.stack([_log_spectra(torch.from_numpy(own)) for own in samples]).flatten(2)
    traces = spectra.sub_(spectra.mean(dim=0))
    means = traces.mean(dim=1)
    within = (traces - means[:, None]).square().sum(dim=2).mean().sqrt()
    apart = torch.pdist(means).mean()
    eigenvalues = torch.linalg.svdvals((means - means.mean(dim=0)).double()).square()
    shares = eigenvalues / eigenvalues.sum()
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    return Diversity(float(apart / within), float(entropy.exp()), *samples.shape[:2])


def _log_spectra(images: Tensor) -> Tensor:
    return log_spectrum(residual(images.float() / 255))


def frequency_profile(images: Sequence[Tensor]) -> np.ndarray:
    """float64 [PATCH_PX // 2]: decimal logarithm of the azimuthal residual power, mean over images (uint8 [3, h, w], PATCH_PX or more each side)."""
    cut = torch.cat([patches(image, PATCH_PX, PATCHES_PER_IMAGE) for image in images])
    power = azimuthal_power(residual(cut.float() / 255)).double().mean(dim=0)
    return power.clamp_min(MIN_POWER).log10().numpy()


def pool_profiles(pool: Pool, storage: Storage) -> np.ndarray:
    """float64 [g, PATCH_PX // 2]: of every model, in the pool's order."""
    return np.stack(
        [frequency_profile(pool.samples(model.model_id, storage)[:IMAGES_PER_GENERATOR]) for model in pool.models]
    )


def real_profiles(
    manifest: Manifest, left_out: Sequence[str], max_megapixels: float, storage: Storage
) -> dict[str, np.ndarray]:
    """Frequency profiles of real generators; the first folder of an image's key names its generator.

    IMAGES_PER_GENERATOR images of each are taken, the same ones always. Raises AttribError if a name in left_out is not there, or a generator
    has no image of PATCH_PX or more.
    """
    parts = [storage.read_table(manifest.partition_uri(p)) for p in range(len(manifest.num_rows))]
    table = pa.concat_tables(parts).select([field.name for field in LOCATION_FIELDS])
    rows = table.take(pa.array(np.argsort(sampling_rank(table["id"].to_numpy())))).to_pylist()
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["key"].partition("/")[0], []).append(row)
    for name in left_out:
        if name not in by_name:
            raise AttribError(f"left_out names {name!r}, the generators are {', '.join(sorted(by_name))}")
    profiles = {}
    for name in sorted(by_name.keys() - set(left_out)):
        images = _readable(by_name[name][:IMAGES_PER_GENERATOR], manifest, max_megapixels, storage)
        if not images:
            raise AttribError(
                f"{manifest.collection.uri}: {name!r} has no image of {PATCH_PX} px or more; put it into left_out"
            )
        profiles[name] = frequency_profile(images)
    return profiles


def _readable(rows: list[dict], manifest: Manifest, max_megapixels: float, storage: Storage) -> list[Tensor]:
    images = []
    for data in read_all(rows, manifest, IO_THREADS, storage):
        try:
            if not isinstance(data, ImageError):
                images.append(decode_image(data, max_megapixels=max_megapixels).pixels)
        except ImageError:
            continue
    return [image for image in images if min(image.shape[1:]) >= PATCH_PX]


def frechet_frequency_distance(synthetic: np.ndarray, real: np.ndarray) -> float:
    """Of frequency profiles [g, d] and [k, d], two or more each: squared, in units of log10 power summed over frequencies."""
    if min(len(synthetic), len(real)) < 2:
        raise AttribError(
            f"a Gaussian is fitted to two generators or more, there are {len(synthetic)} synthetic and {len(real)} real"
        )
    moments = [(profiles.mean(axis=0), np.cov(profiles, rowvar=False)) for profiles in (synthetic, real)]
    return frechet_distance(*moments[0], *moments[1])


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two Gaussians; means [d], covariances [d, d], of any rank."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # C C' has the eigenvalues of the symmetric C^(1/2) C' C^(1/2).
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    shift = np.square(mean - other_mean).sum()
    return float(shift + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def measure_pool(pool: Pool, real: dict[str, np.ndarray], storage: Storage) -> dict:
    """JSON-like: diversity, and with the profiles of real generators (name: [PATCH_PX // 2]) the Frechet Frequency Distance.

    The models measured for diversity are the pool's first DIVERSITY_MODELS, in which families take turns. As a scale for the distance stands
    that of the photographs themselves, taken for what every model makes: a pool that adds nothing to them.
    """
    measured = stack_samples(pool, pool.models[:DIVERSITY_MODELS], DIVERSITY_PHOTOGRAPHS, storage)
    found: dict = {"diversity": asdict(diversity(measured))}
    if real:
        profiles = pool_profiles(pool, storage)
        known = np.stack(list(real.values()))
        shown = frequency_profile(pool.photographs(storage)[:IMAGES_PER_GENERATOR])
        found["frechet_frequency_distance"] = {
            "pool": frechet_frequency_distance(profiles, known),
            "photographs_alone": frechet_frequency_distance(np.stack([shown, shown]), known),
            "real_generators": sorted(real),
        }
    return found
