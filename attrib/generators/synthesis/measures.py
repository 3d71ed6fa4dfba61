"""Measure how close a pool of synthetic generators is to real generators, and how different its models are.

Closeness is the Frechet Frequency Distance of Model Synthesis (arXiv 2307.15977). Each generator, real or synthetic,
has one vector: the azimuthal mean of the power spectrum of its images' residuals. A Gaussian is fitted to the vectors
of the real generators, another one to those of the synthetic generators, and the distance is that of the two Gaussians.
Unlike in the paper, the power is in log10, so that all frequencies count, and the residual is that of
attrib/generators/signals/spectrum.py. So do not compare the values with those of the paper.

Diversity uses the trace of a model in an image: the log spectrum of the image minus the mean log spectrum of the same
photograph over all models.
separation: mean distance between the mean traces of two models, divided by the root mean square distance of the traces
    of single images from the mean trace of their model.
effective_models: exp(entropy) of the normalised eigenvalues of the covariance of the mean traces, at most the number of
    models - 1. It is the number of directions in which the models differ, if they differ equally in all of them.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.data.ids import sampling_rank
from attrib.data.manifest import Manifest, open_places
from attrib.generators.signals.spectrum import azimuthal_power, log_spectrum, patches, residual
from attrib.generators.synthesis.photographs import decoded
from attrib.generators.synthesis.pool import Pool

PATCH_PX = 32  # for the Frechet distance: the smallest images of published generators have 32 px
PATCHES_PER_IMAGE = 4
IMAGES_PER_GENERATOR = 100
DIVERSITY_MODELS, DIVERSITY_PHOTOGRAPHS = 200, 32  # their spectra take about 0.2 GiB of memory at 64 px
MIN_POWER = 1e-12


def diversity(samples: np.ndarray) -> dict:
    """{separation, effective_models, num_models, num_photographs} of samples uint8 [g, n, 3, px, px].

    Image i of every model shows photograph i. Raises AttribError for fewer than two models or photographs.
    """
    num_models, num_photographs = samples.shape[:2]
    if min(num_models, num_photographs) < 2:
        raise AttribError(
            f"diversity needs two models and two photographs or more, and this pool has {num_models} and "
            f"{num_photographs}; raise num_models or num_photographs"
        )
    spectra = torch.stack([log_spectrum(residual(torch.from_numpy(own).float() / 255)) for own in samples]).flatten(2)
    traces = spectra.sub_(spectra.mean(dim=0))
    means = traces.mean(dim=1)
    within = (traces - means[:, None]).square().sum(dim=2).mean().sqrt()
    eigenvalues = torch.linalg.svdvals((means - means.mean(dim=0)).double()).square()
    return {
        "separation": float(torch.pdist(means).mean() / within),
        "effective_models": float(torch.distributions.Categorical(eigenvalues).entropy().exp()),
        "num_models": num_models,
        "num_photographs": num_photographs,
    }


def frequency_profile(images: Sequence[Tensor]) -> np.ndarray:
    """float64 [PATCH_PX // 2]: log10 of the azimuthal residual power, mean over images uint8 [3, h, w]."""
    cut = torch.cat([patches(image, PATCH_PX, PATCHES_PER_IMAGE) for image in images])
    power = azimuthal_power(residual(cut.float() / 255)).double().mean(dim=0)
    return power.clamp_min(MIN_POWER).log10().numpy()


def real_profiles(
    manifest: Manifest, left_out: Sequence[str], max_megapixels: float, storage: Storage
) -> dict[str, np.ndarray]:
    """Frequency profiles of real generators, each of IMAGES_PER_GENERATOR images by sampling_rank.

    The first folder of an image's key names its generator. Raises AttribError if left_out has an unknown name, or a
    generator has no image of PATCH_PX or more.
    """
    uris = [manifest.checked_uri(p, storage) for p in range(len(manifest.num_rows))]
    table = open_places(uris, storage).to_table()
    rows = table.take(pa.array(np.argsort(sampling_rank(table["id"].to_numpy())))).to_pylist()
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["key"].partition("/")[0], []).append(row)
    for name in left_out:
        if name not in by_name:
            raise AttribError(
                f"left_out contains {name!r}, but the generators are {', '.join(sorted(by_name))}; correct left_out"
            )
    profiles = {}
    for name in sorted(by_name.keys() - set(left_out)):
        images = list(decoded(by_name[name][:IMAGES_PER_GENERATOR], manifest, PATCH_PX, max_megapixels, storage))
        if not images:
            raise AttribError(
                f"{manifest.collection.uri}: {name!r} has no image of {PATCH_PX} px or more; add it to left_out"
            )
        profiles[name] = frequency_profile(images)
    return profiles


def frechet_frequency_distance(synthetic: np.ndarray, real: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to profiles [g, d] and [k, d]; g and k are 2 or more."""
    if min(len(synthetic), len(real)) < 2:
        raise AttribError(
            f"the Frechet frequency distance needs two generators or more of each kind, got {len(synthetic)} synthetic "
            f"and {len(real)} real ones; synthesize more models, or add folders of real generators"
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
    """Diversity of the first DIVERSITY_MODELS, and the distance to real generators if any are given, as plain values.

    real: {name: profile [PATCH_PX // 2]}. photographs_alone: the distance of a pool that reproduces its photographs
    exactly, for comparison.
    """

    def samples(model_id: str, num_images: int) -> Tensor:
        return pool.samples(model_id, storage)[:num_images]

    measured = [samples(model.model_id, DIVERSITY_PHOTOGRAPHS).numpy() for model in pool.models[:DIVERSITY_MODELS]]
    found: dict = {"diversity": diversity(np.stack(measured))}
    if real:
        profiles = [frequency_profile(samples(model.model_id, IMAGES_PER_GENERATOR)) for model in pool.models]
        known = np.stack(list(real.values()))
        shown = frequency_profile(pool.photographs(storage)[:IMAGES_PER_GENERATOR])
        found["frechet_frequency_distance"] = {
            "pool": frechet_frequency_distance(np.stack(profiles), known),
            "photographs_alone": frechet_frequency_distance(np.stack([shown, shown]), known),
            "real_generators": sorted(real),
        }
    return found
