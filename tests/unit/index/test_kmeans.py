"""Spherical k-means, compared with FAISS; on a GPU too if there is one."""

import numpy as np
import pytest
import torch
from faiss.contrib import clustering
from support.shards import clustered_vectors, make_plan

from attrib.index.kmeans import nearest_centroids, spherical_kmeans
from attrib.index.normalize import unit_rows
from attrib.index.quantizer import train_quantizer

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def collection():
    """Vectors float16 [900, 40]."""
    return clustered_vectors()[1]


class SphericalAssign(clustering.DatasetAssign):
    """Training data of faiss.contrib's k-means with given initial centroids and cosine similarity."""

    def __init__(self, unit_vectors, initial):
        super().__init__(unit_vectors)
        self.initial = initial

    def get_subset(self, indices):
        return self.x[self.initial]

    def perform_search(self, centroids):
        distances, nearest = super().perform_search(unit_rows(centroids))
        assert len(np.unique(nearest)) == len(centroids)  # the two implementations restart empty clusters differently
        return distances, nearest


@pytest.mark.parametrize("device", DEVICES)
def test_kmeans_equals_that_of_faiss_from_the_same_centroids(device, one_thread):
    unit_vectors = unit_rows(np.random.default_rng(24).standard_normal((600, 20)))
    initial = torch.randperm(600, generator=torch.Generator().manual_seed(3))[:12].numpy()
    expected = clustering.kmeans(12, SphericalAssign(unit_vectors, initial), niter=6, verbose=False)
    np.testing.assert_allclose(spherical_kmeans(unit_vectors, 12, 6, 3, device), unit_rows(expected), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_kmeans_is_as_tight_as_faiss(device, collection, one_thread):
    unit_vectors = unit_rows(collection)
    trained = train_quantizer(unit_vectors, make_plan("ivf_flat", 24), 0)
    reference = trained.quantizer.reconstruct_n(0, 24)
    ours = spherical_kmeans(unit_vectors, 24, 20, 0, device)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    tightness = [(unit_vectors @ means.T).max(axis=1).mean() for means in (ours, reference)]
    assert tightness[0] > tightness[1] - 0.01
    assert np.array_equal(ours, spherical_kmeans(unit_vectors, 24, 20, 0, device))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_clusters_get_unit_centroids(device, one_thread):
    """With fewer distinct vectors than centroids, no centroid may become zero or NaN."""
    unit_vectors = unit_rows(np.repeat(np.eye(3, 8, dtype=np.float32), 20, axis=0))
    means = spherical_kmeans(unit_vectors, 6, 5, 0, device)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, atol=1e-5)
    assert (unit_vectors @ means.T).max(axis=1).min() > 0.99


@pytest.mark.parametrize("device", DEVICES)
def test_nearest_centroids(device, one_thread):
    generator = np.random.default_rng(23)
    means, unit_vectors = (
        unit_rows(generator.standard_normal((30, 12))),
        unit_rows(generator.standard_normal((200, 12))),
    )
    found = nearest_centroids(means, device)(unit_vectors)
    assert found.dtype == np.int64
    assert np.array_equal(found, (unit_vectors.astype(np.float64) @ means.T).argmax(axis=1))
