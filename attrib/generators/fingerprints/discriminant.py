"""Shrunk linear discriminants and whitenings of log spectra, fitted on the synthetic models.

Both use the shrunk covariance within models, the variation of content. A whitening divides by it and keeps all
directions, so a direction that no synthetic model uses can still identify a real generator. Linear discriminants are
the principal directions of the whitened model means. The generators to identify take no part: one fit serves a pool.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage, scratch_folder
from attrib.generators.settings import Shrinkage

FILE_KEY = "attrib.discriminant"
MIN_VARIANCE_RATIO = 1e-9  # of a direction between the models to the largest: the rest is rounding


@dataclass(frozen=True, eq=False)
class Discriminant:
    """x -> (x - mean) @ projection, which maps the shrunk covariance within models to the identity.

    mean: float64 [d], of the models' means. projection: float64 [d, k], by falling variance between models.
    """

    mean: np.ndarray
    projection: np.ndarray
    shrinkage: float

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[n, d] -> float64 [n, k]."""
        return (rows - self.mean) @ self.projection


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """Means float64 [G, d] of the models, covariance float64 [d, d] within them, and its estimated shrinkage."""

    means: np.ndarray
    covariance: np.ndarray
    ledoit_wolf: float


def model_statistics(groups: Iterable[np.ndarray]) -> ModelStatistics:
    """Moments of groups [n_g, d], one per model with at least two rows; read once, one model in memory at a time.

    The covariance is pooled, with n - G degrees of freedom. Raises AttribError with fewer than two models.
    """
    # Streamed moments: LedoitWolf and LinearDiscriminantAnalysis of scikit-learn need all rows in memory at once.
    means, num_rows, scatter, fourth = [], 0, 0.0, 0.0
    for rows in groups:
        rows = rows.astype(np.float64)
        if len(rows) < 2:
            raise AttribError(
                f"model {len(means)} of the pool has {len(rows)} images, and a discriminant needs 2 or more of each; "
                "synthesize a pool with more photographs"
            )
        means.append(rows.mean(axis=0))
        num_rows += len(rows)
        rows -= means[-1]
        scatter = scatter + rows.T @ rows
        fourth += np.square(np.square(rows).sum(axis=1)).sum()
    if len(means) < 2:
        raise AttribError(f"a discriminant needs 2 models or more, and the pool has {len(means)}; raise num_models")
    if not scatter.any():
        raise AttribError(
            "all images of each model are equal, so no covariance can be estimated; synthesize the pool from different "
            "photographs"
        )
    shrinkage = ledoit_wolf(scatter / num_rows, fourth, num_rows)
    return ModelStatistics(np.stack(means), scatter / (num_rows - len(means)), shrinkage)


def fit_discriminant(
    statistics: ModelStatistics, shrinkage: Shrinkage, num_directions: int | None = None
) -> Discriminant:
    """Linear discriminants of the shrunk covariance.

    With S the covariance, S' = (1 - a) S + a * trace(S) / d * I, L L' = S' and B the whitened means L^-1 (m_g - mean)
    as columns, the directions are L'^-1 U of B = U s V'. num_directions: only the first; None: one less than models.
    """
    shrinkage = statistics.ledoit_wolf if shrinkage == "ledoit_wolf" else shrinkage
    lower = torch.linalg.cholesky(torch.from_numpy(_shrunk(statistics.covariance, shrinkage)))
    mean = statistics.means.mean(axis=0)
    whitened = torch.linalg.solve_triangular(lower, torch.from_numpy((statistics.means - mean).T), upper=False)
    directions, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
    num_kept = min(len(statistics.means) - 1, int((singular**2 > MIN_VARIANCE_RATIO * singular[0] ** 2).sum()))
    kept = directions[:, : min(num_kept, num_directions or num_kept)]
    kept = kept * torch.where(kept.sum(dim=0, keepdim=True) < 0, -1.0, 1.0)  # the sign of a direction is arbitrary
    projection = torch.linalg.solve_triangular(lower.T, kept, upper=True)
    return Discriminant(mean, projection.numpy(), float(shrinkage))


def fit_whitening(mean: np.ndarray, covariance: np.ndarray, shrinkage: float, without_level: bool) -> Discriminant:
    """Whitening L'^-1 with L L' = S', shrunk as in `fit_discriminant`. mean: float64 [d]. covariance: float64 [d, d].

    without_level: P L'^-1, where P subtracts a row's mean and S = P covariance P. The mean of a log spectrum is the
    contrast of the image, which varies most.
    """
    if without_level:
        covariance = covariance - covariance.mean(axis=0)
        covariance -= covariance.mean(axis=1, keepdims=True)
    lower = torch.linalg.cholesky(torch.from_numpy(_shrunk(covariance, shrinkage)))
    projection = torch.linalg.solve_triangular(lower.T, torch.eye(len(lower), dtype=torch.float64), upper=True).numpy()
    if without_level:
        projection = projection - projection.mean(axis=0)
    return Discriminant(mean, projection, shrinkage)


def _shrunk(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    shrunk = (1 - shrinkage) * covariance
    # Fewer rows than dimensions leave directions without variance, which rounding may make negative.
    shrunk[np.diag_indices(len(shrunk))] += max(shrinkage, MIN_VARIANCE_RATIO) * np.trace(covariance) / len(covariance)
    return shrunk


def ledoit_wolf(covariance: np.ndarray, fourth: float, num_rows: int) -> float:
    """Shrinkage of least expected squared error (Ledoit and Wolf, J. Multivariate Anal. 88, 2004, lemma 3.2 f.).

    covariance: X'X / n of centred rows, float64 [d, d]. fourth: sum of the fourth powers of the rows' lengths.
    """
    dimension = len(covariance)
    squares = np.square(covariance).sum()
    distance = squares - np.trace(covariance) ** 2 / dimension
    error = (fourth / num_rows - squares) / num_rows
    return float(np.clip(error / distance, 0, 1)) if distance > 0 else 1.0


def save_discriminant(discriminant: Discriminant, declared: dict, uri: str, storage: Storage) -> None:
    """Writes a safetensors file. declared: JSON-like metadata that `load_discriminant` returns."""
    arrays = {"mean": discriminant.mean, "projection": np.ascontiguousarray(discriminant.projection)}
    metadata = {FILE_KEY: json.dumps({"shrinkage": discriminant.shrinkage, "declared": declared})}
    storage.write_bytes(uri, save(arrays, metadata=metadata))


def load_discriminant(uri: str, storage: Storage) -> tuple[Discriminant, dict]:
    """The discriminant and its declared metadata. Raises AttribError if the file is missing or of another kind."""
    if not storage.exists(uri):
        raise AttribError(f"{uri} does not exist; run jobs.fingerprint first, or correct the path")
    with scratch_folder() as folder:
        try:
            with safe_open(storage.localise(uri, folder), framework="numpy") as file:
                held = json.loads(file.metadata()[FILE_KEY])
                found = Discriminant(file.get_tensor("mean"), file.get_tensor("projection"), held["shrinkage"])
            if found.projection.ndim != 2 or found.mean.shape != found.projection.shape[:1]:
                raise ValueError(f"mean {found.mean.shape} does not fit projection {found.projection.shape}")
            return found, held["declared"]
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise AttribError(f"{uri} is not readable ({first_line(error)}); run jobs.fingerprint again") from error
