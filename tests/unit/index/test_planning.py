"""The plan of an index: the choice of its kind, and its predicted sizes compared with files of shards."""

import functools
import operator
import os

import numpy as np
import pytest
from support.shards import KINDS, make_index

from attrib.common.errors import AttribError
from attrib.index.planning import IndexPlan, group_partitions, num_held_out, plan_index, training_rows
from attrib.index.settings import IndexSettings

MILLION = 1_000_000


def plan(num_vectors: int, dimension: int = 256, shard_sizes: list[int] | None = None, **settings) -> IndexPlan:
    settings = IndexSettings(embeddings="/embeddings", output="/index", **settings)
    return plan_index(settings, num_vectors, shard_sizes or [num_vectors], dimension)


def test_less_memory_gives_a_smaller_kind():
    """A million 256-d vectors: 488 MiB of float16, 244 MiB of bytes, 31 MiB of PQ codes; 16 MiB of centroids."""
    gibs = (8, 0.5, 0.48, 0.26, 0.25, 0.05, 0.04)
    kinds = [plan(MILLION, worker_memory_gib=gib, num_lists=16_384) for gib in gibs]
    assert [p.kind for p in kinds] == ["ivf_flat", "ivf_flat", "ivf_sq8", "ivf_sq8", "ivf_pq", "ivf_pq", "ivf_pq"]
    assert [p.template_bytes // 2**20 for p in kinds[:3]] == [16, 16, 16]
    assert ["are read from disk" in p.reason for p in kinds] == [False] * 6 + [True]


@pytest.mark.parametrize("num_vectors", [1, 2, 3, 5, 19, 30, 6_000])
def test_every_list_has_a_training_vector(num_vectors):
    """Also of a collection smaller than the lists that the config asks for."""
    settings = IndexSettings(embeddings="/embeddings", output="/index", kind="ivf_flat", num_lists=64)
    num_training = num_vectors - num_held_out(settings, num_vectors)
    num_lists = plan_index(settings, num_vectors, [num_vectors], 96).num_lists
    assert num_lists == min(64, max(1, num_training))


def test_kind_larger_than_memory_is_built_with_a_warning():
    chosen = plan(MILLION, kind="ivf_flat", worker_memory_gib=0.4)
    assert chosen.kind == "ivf_flat"
    assert (
        "its 0.48 GiB exceed worker_memory_gib = 0.4" in chosen.reason and "shard_rows (now 1,000,000)" in chosen.reason
    )


def test_centroids_larger_than_memory_are_an_error():
    limits = {"num_lists": 65_536, "worker_memory_gib": 0.06}
    with pytest.raises(
        AttribError, match=r"65,536 centroids of 256 dimensions need 0\.06 GiB .*worker_memory_gib = 0\.06"
    ):
        plan(MILLION, **limits)
    assert plan(MILLION, **limits, kind="flat").template_bytes == 0


def test_the_largest_shard_decides():
    even = plan(MILLION, shard_sizes=[500_000, 500_000], worker_memory_gib=0.4)
    uneven = plan(MILLION, shard_sizes=[50_000, 950_000], worker_memory_gib=0.4)
    assert (even.kind, uneven.kind) == ("ivf_flat", "ivf_sq8")
    assert even.num_shards == uneven.num_shards == 2


def test_few_vectors_are_searched_exactly():
    small, large = plan(50_000), plan(50_001)
    assert (small.kind, small.num_lists, small.pq_bytes) == ("flat", 0, 0)
    assert (large.kind, large.pq_bytes) == ("ivf_flat", 0)
    assert [plan(50_000, kind=kind).is_compressed for kind in KINDS] == [False, False, True, True]


def test_number_of_lists():
    expected = {1: 1, 2: 1, 39: 1, 77: 1, 78: 2, 1_000: 25, 10_000: 256, 100_000: 1_024, 999_999: 2_048}
    expected |= {MILLION: 2_048, 4 * MILLION: 4_096, 10 * MILLION: 8_192, 300 * MILLION: 65_536, 10**9: 65_536}
    for num_vectors, num_lists in expected.items():
        ample = {"kind": "ivf_flat", "worker_memory_gib": 1e6}
        assert plan(num_vectors, **ample).num_lists == num_lists
        assert plan(num_vectors, **ample | {"training_rows": 39_000}).num_lists == min(num_lists, 1_000)
        most = max(1, num_vectors - 1)  # at least one vector is held out
        assert plan(num_vectors, kind="ivf_flat", worker_memory_gib=1e6, num_lists=7).num_lists == min(7, most)


def test_training_rows_follow_the_lists_unless_given():
    given = IndexSettings(embeddings="/embeddings", output="/index", training_rows=50_000)
    by_rule = IndexSettings(embeddings="/embeddings", output="/index")
    for num_vectors, expected in {100_000: 65_536, 60_000: 65_536, 10 * MILLION: 64 * 8_192}.items():
        made = plan(num_vectors)
        assert (training_rows(by_rule, made), training_rows(given, made)) == (expected, 50_000)
    assert training_rows(given, plan(1_000)) == training_rows(by_rule, plan(1_000)) == 0


@pytest.mark.parametrize("dimension", [1, 2, 7, 8, 100, 127, 192, 384, 768, 1280, 2048])
def test_pq_bytes_divide_the_dimension(dimension):
    pq_bytes = plan(1_000, dimension, kind="ivf_pq").pq_bytes
    assert pq_bytes == max(m for m in range(1, dimension + 1) if dimension % m == 0 and (8 * m <= dimension or m == 1))
    for wanted in range(1, dimension + 2, max(1, dimension // 7)):
        if dimension % wanted == 0:
            assert plan(1_000, dimension, kind="ivf_pq", pq_bytes=wanted).pq_bytes == wanted
        else:
            with pytest.raises(AttribError, match=f"pq_bytes = {wanted} does not divide the dimension {dimension}"):
                plan(1_000, dimension, kind="ivf_pq", pq_bytes=wanted)


def test_pq_bytes_are_checked_if_memory_requires_pq():
    with pytest.raises(AttribError, match=r"pq_bytes = 30 does not divide the dimension 256; near: \[8, 16, 32\]"):
        plan(MILLION, pq_bytes=30, worker_memory_gib=0.1)
    assert plan(MILLION, pq_bytes=30).kind == "ivf_flat"


@pytest.mark.parametrize("kind", KINDS)
def test_estimated_bytes_are_those_of_built_files(kind, tmp_path):
    generator = np.random.default_rng(14)
    ids, vectors = np.arange(6_000), generator.standard_normal((6_000, 32)).astype(np.float16)
    partition_of = (np.arange(6_000) >= 4_000).astype(int)
    planned = plan(6_000, 32, shard_sizes=[4_000, 2_000], kind=kind, num_lists=32)
    make_index(tmp_path, ids, vectors, planned, partition_of)
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "shard-00000").iterdir() if f.suffix == ".npy"}
    scanned = sizes["codes.npy" if planned.is_compressed else "vectors.npy"]
    assert planned.shard_disk_bytes == pytest.approx(sum(sizes.values()), rel=0.01)
    assert planned.shard_scan_bytes == pytest.approx(scanned, rel=0.01)
    if kind != "flat":
        assert planned.template_bytes == pytest.approx(os.path.getsize(tmp_path / "template.faiss"), rel=0.05)


def test_group_partitions():
    assert group_partitions([], 10) == []
    assert group_partitions([0, 0], 10) == []
    assert group_partitions([4, 0, 6, 1, 25, 3, 3], 10) == [[0, 2], [3], [4], [5, 6]]
    generator = np.random.default_rng(15)
    for _ in range(30):
        rows = generator.integers(0, 12, 20).tolist()
        groups = group_partitions(rows, 15)
        assert functools.reduce(operator.iadd, groups, []) == [p for p, n in enumerate(rows) if n]
        sizes = [sum(rows[p] for p in group) for group in groups]
        assert all(size <= 15 for size in sizes)
        assert all(size + rows[following[0]] > 15 for size, following in zip(sizes, groups[1:]))
