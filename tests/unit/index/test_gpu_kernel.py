"""TorchKernel on a CPU, and on a GPU if there is one, compared with CpuKernel; FAISS in the same process."""

import faiss
import numpy as np
import pytest
import torch
from support.shards import (
    KINDS,
    clustered_vectors,
    exact_scores,
    flat_shard,
    make_index,
    make_plan,
    nearest,
    open_index_shards,
)

from attrib.common.errors import AttribError
from attrib.index.gpu_kernel import HALF_TOLERANCE, TorchKernel
from attrib.index.normalize import unit_rows
from attrib.index.search import merge, search_shard

K = 10
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def collection():
    return clustered_vectors()


def kernel_on(device: str) -> type[TorchKernel]:
    return type("Kernel", (TorchKernel,), {"device": device})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nprobe", [0, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_results_equal_those_of_the_cpu_kernel(kind, nprobe, device, collection, tmp_path, one_thread):
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
def test_float16_scores_stay_within_their_tolerance(scale, device, one_thread):
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


def test_faiss_and_torch_work_in_one_process(collection):
    """The GPU build of FAISS contains another CUDA runtime than torch; attrib uses FAISS on the CPU only."""
    unit_vectors = unit_rows(collection[1])
    _, by_faiss = faiss.knn(unit_vectors[80:120], unit_vectors[80:], 3, metric=faiss.METRIC_INNER_PRODUCT)
    products = (
        torch.from_numpy(unit_vectors[80:120]).to(DEVICES[-1]) @ torch.from_numpy(unit_vectors[80:]).to(DEVICES[-1]).T
    )
    by_torch = products.topk(3, dim=1).indices.cpu().numpy()
    assert np.array_equal(by_faiss, by_torch)
    assert np.array_equal(
        by_faiss, nearest((unit_vectors[80:120] @ unit_vectors[80:].T).astype(np.float32), np.arange(820), 3)[0]
    )
