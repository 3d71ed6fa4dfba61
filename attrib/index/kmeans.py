"""Spherical k-means with torch on a GPU, and the nearest centroid of each vector.

The algorithm is `faiss.contrib.torch.clustering.kmeans`, which needs the GPU functions of FAISS (see
attrib/index/gpu_kernel.py), with normalised centroids; the tests compare the two. On a CPU attrib uses `faiss.Kmeans`.
"""

from collections.abc import Callable

import numpy as np
import torch

ASSIGN_ROWS = 65_536  # training vectors per block of products with all centroids, to bound memory


def nearest_centroids(centroids: np.ndarray, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function: unit vectors float32 [n, d] -> numbers int64 [n] of their nearest centroids.

    centroids: float32 [num_lists, d]; they stay on the device.
    """
    on_device = torch.from_numpy(centroids).to(device)

    def nearest(unit_vectors: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(unit_vectors).to(device) @ on_device.T).argmax(dim=1).cpu().numpy()

    return nearest


def spherical_kmeans(training: np.ndarray, num_lists: int, iterations: int, seed: int, device: str) -> np.ndarray:
    """Return unit centroids float32 [num_lists, d]. training: unit vectors float32 [n, d], n at least num_lists.

    Lloyd's algorithm with cosine similarity, initialised with a random subset of the vectors. An empty cluster
    restarts close to the centroid of a largest one.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.from_numpy(training).to(device)
    centroids = vectors[torch.randperm(len(vectors), generator=generator)[:num_lists].to(device)].clone()
    for _ in range(iterations):
        lists = torch.cat([(part @ centroids.T).argmax(dim=1) for part in torch.split(vectors, ASSIGN_ROWS)])
        sums = torch.zeros_like(centroids).index_add_(0, lists, vectors)
        sizes = torch.bincount(lists, minlength=num_lists)
        empty = torch.nonzero(sizes == 0)[:, 0]
        largest = sizes.argsort(descending=True)[: len(empty)]
        noise = torch.randn(len(empty), sums.shape[1], generator=generator).to(device)
        sums[empty] = torch.nn.functional.normalize(sums[largest]) + noise / (100 * sums.shape[1] ** 0.5)
        centroids = torch.nn.functional.normalize(sums)
    return centroids.cpu().numpy()
