"""Linear discriminant analysis and whitening of log spectra, fitted on the synthetic models of a pool.

Both use the shrunk covariance of the images within a model, which measures the variation of content. Whitening maps it
to the identity and keeps all directions, so a direction in which no synthetic models differ can still identify a real
generator. Linear discriminants are the principal directions of the whitened means of the models. The fit does not use
the generators to identify, so it is done once per pool.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from attrib.common.config import digest
from attrib.common.errors import AttribError, first_line
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage, bytes_sha256
from attrib.generators.settings import Shrinkage

FILE_KEY = "attrib.discriminant"
MIN_VARIANCE_RATIO = 1e-9  # variance of a direction to the largest one; directions below it are rounding errors


@dataclass(frozen=True, eq=False)
class Discriminant:
    """x -> (x - mean) @ projection, which maps the shrunk covariance within models to the identity.

    mean: float64 [d], the mean of the models' means. projection: float64 [d, k], by falling variance between models.
    """

    mean: np.ndarray
    projection: np.ndarray
    shrinkage: float

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[n, d] -> float64 [n, k]."""
        return (rows - self.mean) @ self.projection


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """Means of the models float64 [G, d], covariance within models float64 [d, d], and its Ledoit-Wolf shrinkage."""

    means: np.ndarray
    covariance: np.ndarray
    ledoit_wolf: float


def model_statistics(groups: Iterable[np.ndarray]) -> ModelStatistics:
    """Statistics of groups of rows [n_g, d], one group of two or more rows per model.

    Groups are read once, so one model is in memory at a time. The covariance is pooled, with n - G degrees of freedom.
    Raises AttribError for fewer than two models.
    """
    # LedoitWolf and LinearDiscriminantAnalysis of scikit-learn are not used: they need all rows in memory at once.
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
    """Linear discriminants for the shrunk covariance within models.

    S is the covariance within models, a the shrinkage, S_a = (1 - a) S + a * trace(S) / d * I, and L its Cholesky
    factor (L L^T = S_a). The columns of B are the whitened means L^-1 (m_g - mean). With the singular value
    decomposition B = U s V^T, the directions are L^-T U. num_directions: how many to keep; None: all, the number of
    models - 1.
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
    """Whitening by the shrunk covariance: the projection is L^-T, with L as in `fit_discriminant`.

    mean: float64 [d]. covariance: float64 [d, d]. without_level: first subtract from each row its mean over dimensions
    (projection P L^-T, covariance P S P). This mean of a log spectrum is the contrast of the image, which varies most.
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
    # With fewer rows than dimensions, some directions have no variance, and rounding may make it negative.
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
    """Write a safetensors file. declared: plain values that `load_discriminant` returns with the discriminant."""
    # Contiguous: safetensors writes the memory of an array, whatever its strides.
    arrays = {name: np.ascontiguousarray(getattr(discriminant, name)) for name in ("mean", "projection")}
    described = {"shrinkage": discriminant.shrinkage, "declared": declared, "digest": _digest(discriminant, declared)}
    storage.write_bytes(uri, save(arrays, metadata={FILE_KEY: json.dumps(described)}))


def _digest(discriminant: Discriminant, declared: dict) -> str:
    arrays = (discriminant.mean, discriminant.projection)
    values = [bytes_sha256(np.ascontiguousarray(array).tobytes()) for array in arrays]
    return digest([values, discriminant.shrinkage, declared])


def load_discriminant(uri: str, storage: Storage) -> tuple[Discriminant, dict]:
    """The discriminant and its declared metadata.

    Raises AttribError if the file is missing, damaged or of another kind. Files of earlier versions hold no digest.
    """
    if not storage.exists(uri):
        raise AttribError(f"{uri} does not exist; run jobs.fingerprint first, or correct the path")
    with scratch_folder() as folder:
        try:
            with safe_open(storage.localise(uri, folder), framework="numpy") as file:
                held = json.loads(file.metadata()[FILE_KEY])
                found = Discriminant(file.get_tensor("mean"), file.get_tensor("projection"), held["shrinkage"])
            if found.projection.ndim != 2 or found.mean.shape != found.projection.shape[:1]:
                raise ValueError(f"mean {found.mean.shape} does not fit projection {found.projection.shape}")
            if held.get("digest", made := _digest(found, held["declared"])) != made:
                raise ValueError("it is damaged: its digest is another one")
            return found, held["declared"]
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise AttribError(f"{uri} is not readable ({first_line(error)}); run jobs.fingerprint again") from error
