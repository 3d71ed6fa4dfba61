"""Fit the projections of a head (centring, standardising, whitening) to unpaired images of one domain.

Whitening is the closed-form solution of the log-det Infomax objective for a linear head with outputs of unit variance
(Hadamard's inequality). These projections are the start of training and the controls that a trained model must beat.
"""

import numpy as np
import torch
from torch import nn

from attrib.common.errors import AttribError
from attrib.models.heads import HeadPart
from attrib.models.settings import HeadSettings

DEVIATION_FLOOR = 1e-6  # a feature with less deviation over the images is set to 0
RANK_TOLERANCE = 1e-9  # of the largest variance; directions below are rounding noise


def projected_sizes(block_sizes: dict[str, int], num_images: int, settings: HeadSettings) -> dict[str, int]:
    """Return the dimension of each block after its projection, limited by the rank that num_images can have."""
    if "whiten" not in settings.projection or is_symmetric(settings):
        return dict(block_sizes)
    limit = min(settings.num_directions or num_images - 1, num_images - 1)
    return {block: min(size, limit) for block, size in block_sizes.items()}


def is_symmetric(settings: HeadSettings) -> bool:
    """Whether whitening is ZCA, for domains whitened separately: their principal directions do not correspond."""
    return settings.separate_domains and settings.net == "none"


@torch.no_grad()
def fit_projections(part: HeadPart, blocks: dict[str, np.ndarray], settings: HeadSettings) -> None:
    """Fit a part's `project` layers, deterministically in float64, to blocks float [n, D_block] of images.

    Raises AttribError if there are fewer than two images.
    """
    for name, layer in part.project.items():
        if isinstance(layer, nn.Linear):
            weight, bias = (torch.from_numpy(values)[: layer.out_features] for values in affine(blocks[name], settings))
            # Zeros for directions that the images lack, so that the size of the layer depends on counts only.
            layer.weight.zero_()[: len(weight)] = weight
            layer.bias.zero_()[: len(bias)] = bias


@torch.no_grad()
def centre_projections(part: HeadPart, blocks: dict[str, np.ndarray]) -> None:
    """Move the centres of the projections to the mean of blocks float [n, D_block]."""
    for name, layer in part.project.items():
        if isinstance(layer, nn.Linear):
            mean = torch.from_numpy(blocks[name].astype(np.float64).mean(axis=0))
            layer.bias.copy_(-(layer.weight.double() @ mean))


def affine(features: np.ndarray, settings: HeadSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return weight float64 [k, D] and bias float64 [k] of x -> weight x + bias, fitted to features float [n, D].

    Raises AttribError if there are fewer than two images.
    """
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
        # Directions without variance get the scale of variance 0, so that n < d whitens like n >= d.
        floor = 1 / np.sqrt(settings.shrinkage * largest)
        whitening = directions.T @ (whitening - floor * directions) + floor * np.eye(dimension)
    weight = whitening * scale
    return weight, -weight @ mean


def principal_directions(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the PCA of centred rows float64 [n, D] of rank k: descending variance [k], directions [k, D]."""
    num, dimension = centred.shape
    if dimension <= num:
        variance, vectors = np.linalg.eigh(centred.T @ centred / num)
        variance, directions = variance[::-1], vectors[:, ::-1].T
    else:
        # With fewer images than dimensions, the smaller Gram matrix gives the same directions.
        variance, vectors = np.linalg.eigh(centred @ centred.T / num)
        variance, vectors = variance[::-1], vectors[:, ::-1]
        directions = (centred.T @ (vectors / np.sqrt(np.maximum(variance, np.finfo(float).tiny) * num))).T
    kept = variance > RANK_TOLERANCE * max(variance[0], np.finfo(float).tiny)
    return variance[kept], directions[kept]
