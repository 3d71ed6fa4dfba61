"""The torch kernel on a CPU, and on a GPU where there is one, against the CPU's kernel and k-means; FAISS beside it."""

import faiss
import numpy as np
import pytest
import torch
from support.shards import KINDS, exact_scores, flat_shard, make_index, make_plan, nearest, open_index_shards

from attrib.common.errors import AttribError
from attrib.index.gpu_kernel import HALF_TOLERANCE, TorchKernel
from attrib.index.kmeans import nearest_centroids, spherical_kmeans
from attrib.index.normalize import unit_rows
from attrib.index.quantizer import centroids, train_quantizer
from attrib.index.search import merge, search_shard

K = 10
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def collection():
    generator = np.random.default_rng(20)
    centres = 3 * generator.standard_normal((12, 40))
    vectors = (centres[generator.integers(0, 12, 900)] + generator.standard_normal((900, 40))).astype(np.float16)
    vectors[50:80] = vectors[50]
    return generator.choice(1 << 62, 900, replace=False), vectors


def kernel_on(device: str) -> type[TorchKernel]:
    return type("Kernel", (TorchKernel,), {"device": device})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nprobe", [0, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_cpu(kind, nprobe, device, collection, tmp_path, one_thread):
    ids, vectors = collection
    shard = open_index_shards(tmp_path, make_index(tmp_path, ids, vectors, make_plan(kind), np.zeros(900, int)))[0]
    generator = np.random.default_rng(21)
    queries = unit_rows(vectors[:70].astype(np.float32) + generator.standard_normal((70, 40)))
    compressed = kind in ("ivf_sq8", "ivf_pq") and nprobe > 0
    found, expected = (
        merge([search_shard(shard, queries, K, 2 * K, nprobe, compressed, *kernel)], K, 2 * K if compressed else None)
        for kernel in ((kernel_on(device),), ())
    )
    assert np.array_equal(found.query, expected.query) and np.array_equal(found.id, expected.id)
    assert np.array_equal(found.score, expected.score)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_half_scores_stay_within_their_tolerance(scale, device, one_thread):
    generator = np.random.default_rng(22)
    vectors = (scale * (1 + generator.standard_normal((300, 256)))).astype(np.float16)
    queries = unit_rows(vectors[:40])
    found = search_shard(flat_shard(np.arange(300), vectors), queries, 300, 300, 0, False, kernel_on(device))
    error = np.abs(found.scan_score - exact_scores(queries, vectors)[found.query, found.id]).max()
    assert 0 < error < HALF_TOLERANCE


def test_a_missing_gpu_is_an_error(collection):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ids, vectors = collection
    with pytest.raises(AttribError, match="torch sees no GPU"):
        search_shard(flat_shard(np.sort(ids), vectors), unit_rows(vectors[:2]), K, K, 0, False, TorchKernel)


@pytest.mark.parametrize("device", DEVICES)
def test_kmeans_is_as_tight_as_that_of_faiss(device, collection, one_thread):
    units = unit_rows(collection[1])
    reference = centroids(train_quantizer(units, make_plan("ivf_flat", 24), 0))
    ours = spherical_kmeans(units, 24, 20, 0, device)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    tightness = [(units @ means.T).max(axis=1).mean() for means in (ours, reference)]
    assert tightness[0] > tightness[1] - 0.01
    assert np.array_equal(ours, spherical_kmeans(units, 24, 20, 0, device))


@pytest.mark.parametrize("device", DEVICES)
def test_no_centroid_is_left_empty(device, one_thread):
    """Of copies of three vectors, more centroids than vectors: the empty ones must not become zero or not a number."""
    units = unit_rows(np.repeat(np.eye(3, 8, dtype=np.float32), 20, axis=0))
    means = spherical_kmeans(units, 6, 5, 0, device)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, atol=1e-5)
    assert (units @ means.T).max(axis=1).min() > 0.99


@pytest.mark.parametrize("device", DEVICES)
def test_nearest_centroids(device, one_thread):
    generator = np.random.default_rng(23)
    means, units = unit_rows(generator.standard_normal((30, 12))), unit_rows(generator.standard_normal((200, 12)))
    found = nearest_centroids(means, device)(units)
    assert found.dtype == np.int64
    assert np.array_equal(found, (units.astype(np.float64) @ means.T).argmax(axis=1))


def test_faiss_and_torch_work_in_one_process(collection):
    """FAISS for GPUs brings another CUDA runtime than torch; here it computes on the CPU alone."""
    units = unit_rows(collection[1])
    _, by_faiss = faiss.knn(units[80:120], units[80:], 3, metric=faiss.METRIC_INNER_PRODUCT)
    products = torch.from_numpy(units[80:120]).to(DEVICES[-1]) @ torch.from_numpy(units[80:]).to(DEVICES[-1]).T
    by_torch = products.topk(3, dim=1).indices.cpu().numpy()
    assert np.array_equal(by_faiss, by_torch)
    assert np.array_equal(by_faiss, nearest((units[80:120] @ units[80:].T).astype(np.float32), np.arange(820), 3)[0])
