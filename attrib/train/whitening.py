"""Fitting the projections of a head to features: centring, standardising and whitening, on unpaired images of one
domain.

For a linear head with outputs of unit variance the log-det Infomax objective has a closed solution, whitening
(Hadamard's inequality), so these projections are both where training starts and the controls that it must beat.
"""

import numpy as np
import torch
from torch import nn

from attrib.common.errors import AttribError
from attrib.models.heads import HeadPart
from attrib.models.settings import HeadSettings

DEVIATION_FLOOR = 1e-6  # a feature that is equal on all images carries no information and is set to 0
RANK_TOLERANCE = 1e-9  # of the largest variance: directions below are rounding


def projected_sizes(block_sizes: dict[str, int], num_images: int, settings: HeadSettings) -> dict[str, int]:
    """Dimension of each block after its projection: at most the rank that num_images can have."""
    if "whiten" not in settings.projection or is_symmetric(settings):
        return dict(block_sizes)
    limit = min(settings.num_directions or num_images - 1, num_images - 1)
    return {block: min(size, limit) for block, size in block_sizes.items()}


def is_symmetric(settings: HeadSettings) -> bool:
    """Whitening rotates back (ZCA) if each domain is whitened alone, because principal directions would not
    correspond."""
    return settings.separate_domains and settings.net == "none"


@torch.no_grad()
def fit_projections(part: HeadPart, blocks: dict[str, np.ndarray], settings: HeadSettings) -> None:
    """Fill a part's `project` layers. blocks: float [n, D_block] of the images to fit on; deterministic, in float64.

    Raises AttribError if there are fewer than two images.
    """
    for name, layer in part.project.items():
        if not isinstance(layer, nn.Linear):
            continue
        weight, bias = affine(blocks[name], settings)
        weight, bias = _padded(weight, layer.out_features), _padded(bias[:, None], layer.out_features)[:, 0]
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))


@torch.no_grad()
def centre_projections(part: HeadPart, blocks: dict[str, np.ndarray]) -> None:
    """Move the projections' centres to the mean of these images: float [n, D_block] of each block."""
    for name, layer in part.project.items():
        if isinstance(layer, nn.Linear):
            mean = torch.from_numpy(blocks[name].astype(np.float64).mean(axis=0))
            layer.bias.copy_(-(layer.weight.double() @ mean))


def affine(features: np.ndarray, settings: HeadSettings) -> tuple[np.ndarray, np.ndarray]:
    """(weight float64 [k, D], bias float64 [k]) of x -> weight x + bias, fitted to features float [n, D]."""
    if len(features) < 2:
        raise AttribError(f"{len(features)} images are too few to fit a projection; give at least two")
    features = features.astype(np.float64)
    mean, dimension = features.mean(axis=0), features.shape[1]
    scale = np.ones(dimension)
    if settings.projection.startswith("standardise"):
        deviation = features.std(axis=0)
        scale = np.divide(1, deviation, out=np.zeros(dimension), where=deviation > DEVIATION_FLOOR)
    if not settings.projection.endswith("whiten"):
        return np.diag(scale), -mean * scale
    variance, directions = principal_directions((features - mean) * scale)
    keep = min(settings.num_directions or len(variance), len(variance))
    variance, directions = variance[:keep], directions[:keep]
    largest = variance.max(initial=0)
    whitening = directions / np.sqrt(variance + settings.shrinkage * largest)[:, None]
    if is_symmetric(settings) and largest:
        # Directions without variance among the images are scaled as variance 0, so that n < d whitens as n >= d does.
        floor = 1 / np.sqrt(settings.shrinkage * largest)
        whitening = directions.T @ (whitening - floor * directions) + floor * np.eye(dimension)
    weight = whitening * scale
    return weight, -weight @ mean


def principal_directions(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PCA of centred rows float64 [n, D]: variance float64 [k] descending, orthonormal directions float64 [k, D]; k:
    rank."""
    num, dimension = centred.shape
    if dimension <= num:
        variance, vectors = np.linalg.eigh(centred.T @ centred / num)
        variance, directions = variance[::-1], vectors[:, ::-1].T
    else:
        # Fewer images than dimensions: the same directions from the smaller Gram matrix.
        variance, vectors = np.linalg.eigh(centred @ centred.T / num)
        variance, vectors = variance[::-1], vectors[:, ::-1]
        directions = (centred.T @ (vectors / np.sqrt(np.maximum(variance, np.finfo(float).tiny) * num))).T
    kept = variance > RANK_TOLERANCE * max(variance[0], np.finfo(float).tiny)
    return variance[kept], directions[kept]


def _padded(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Zeros for directions that the images do not have, so that the layer's size depends on counts alone."""
    return np.pad(rows[:num_rows], ((0, max(0, num_rows - len(rows))), (0, 0)))
