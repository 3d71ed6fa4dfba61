"""Spherical k-means in torch, and the nearest centroid of each vector."""

from collections.abc import Callable

import numpy as np
import torch

ASSIGN_ROWS = 65_536  # training vectors whose distances to all centroids are in memory at a time


def nearest_centroids(centroids: np.ndarray, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from unit vectors float32 [n, d] to the int64 [n] of their nearest centroids, which stay on the device."""
    on_device = torch.from_numpy(centroids).to(device)

    def nearest(units: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(units).to(device) @ on_device.T).argmax(dim=1).cpu().numpy()

    return nearest


def spherical_kmeans(training: np.ndarray, num_lists: int, iterations: int, seed: int, device: str) -> np.ndarray:
    """Centroids float32 [num_lists, d] of unit length. training: float32 [n, d], unit length, n at least num_lists.

    Lloyd's algorithm by cosine, from centroids drawn of the vectors; one that is left without a vector moves beside the largest.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.from_numpy(training).to(device)
    centroids = vectors[torch.randperm(len(vectors), generator=generator)[:num_lists].to(device)].clone()
    for _ in range(iterations):
        lists = torch.cat([(part @ centroids.T).argmax(dim=1) for part in vectors.split(ASSIGN_ROWS)])
        sums = torch.zeros_like(centroids).index_add_(0, lists, vectors)
        sizes = torch.bincount(lists, minlength=num_lists)
        empty = torch.nonzero(sizes == 0)[:, 0]
        largest = sizes.argsort(descending=True)[: len(empty)]
        noise = torch.randn(len(empty), sums.shape[1], generator=generator).to(device)
        sums[empty] = torch.nn.functional.normalize(sums[largest]) + noise / (100 * sums.shape[1] ** 0.5)
        centroids = torch.nn.functional.normalize(sums)
    return centroids.cpu().numpy()
