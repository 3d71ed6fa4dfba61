"""The plan of an index: the rule that chooses it, and its numbers against files of real shards."""

import functools
import operator
import os

import numpy as np
import pytest
from shards import KINDS, make_index

from attrib.errors import AttribError
from attrib.planning import IndexPlan, group_partitions, plan_index
from attrib.settings import IndexSettings

MILLION = 1_000_000


def plan(num_vectors: int, dimension: int = 256, shard_sizes: list[int] | None = None, **settings) -> IndexPlan:
    settings = IndexSettings(embeddings="/embeddings", output="/index", **settings)
    return plan_index(settings, num_vectors, shard_sizes or [num_vectors], dimension)


def test_less_memory_means_a_smaller_kind_and_in_the_end_a_refusal():
    """At a million vectors of 256 dimensions: 1 GiB of float32, 256 MiB of bytes, 32 MiB of PQ codes, each with 32 MiB of ids and centroids."""
    kinds = {gib: plan(MILLION, worker_memory_gib=gib).kind for gib in (8, 1.1, 0.9, 0.3, 0.2, 0.07)}
    assert kinds == {8: "ivf_flat", 1.1: "ivf_flat", 0.9: "ivf_sq8", 0.3: "ivf_sq8", 0.2: "ivf_pq", 0.07: "ivf_pq"}
    with pytest.raises(
        AttribError, match=r"1,000,000 vectors as ivf_pq needs 0\.05 GiB, more than worker_memory_gib = 0\.04"
    ):
        plan(MILLION, worker_memory_gib=0.04)
    with pytest.raises(AttribError, match=r"as ivf_flat needs 0\.97 GiB.*lower shard_rows \(now 1,000,000;"):
        plan(MILLION, kind="ivf_flat", worker_memory_gib=0.9)
    for kind in KINDS:
        fitting = plan(MILLION, kind=kind)
        assert fitting.kind == kind
        gib = fitting.shard_memory_bytes / 2**30
        assert plan(MILLION, kind=kind, worker_memory_gib=gib).shard_memory_bytes == fitting.shard_memory_bytes
        with pytest.raises(AttribError, match=f"as {kind} needs"):
            plan(MILLION, kind=kind, worker_memory_gib=gib * 0.999)


def test_the_largest_shard_decides():
    even = plan(MILLION, shard_sizes=[500_000, 500_000], worker_memory_gib=0.9)
    uneven = plan(MILLION, shard_sizes=[50_000, 950_000], worker_memory_gib=0.9)
    assert (even.kind, uneven.kind) == ("ivf_flat", "ivf_sq8")
    assert even.num_shards == uneven.num_shards == 2


def test_few_vectors_are_searched_exactly():
    small, large = plan(50_000), plan(50_001)
    assert (small.kind, small.num_lists, small.pq_bytes) == ("flat", 0, 0)
    assert (large.kind, large.pq_bytes) == ("ivf_flat", 0)
    assert [plan(50_000, kind=kind).is_compressed for kind in KINDS] == [False, False, True, True]


def test_number_of_lists():
    expected = {1: 1, 2: 1, 39: 1, 77: 1, 78: 2, 1_000: 25, 10_000: 256, 100_000: 2_048, 999_999: 4_096}
    expected |= {MILLION: 16_384, 10 * MILLION - 1: 16_384, 10 * MILLION: 65_536, 300 * MILLION: 65_536}
    for num_vectors, num_lists in expected.items():
        ample = {"kind": "ivf_flat", "worker_memory_gib": 1e6, "training_rows": 10 * MILLION}
        assert plan(num_vectors, **ample).num_lists == num_lists
        assert plan(num_vectors, **ample | {"training_rows": 39_000}).num_lists == min(num_lists, 1_000)
        assert plan(num_vectors, kind="ivf_flat", worker_memory_gib=1e6, num_lists=7).num_lists == min(7, num_vectors)


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


def test_pq_bytes_are_checked_where_memory_leads_to_pq():
    with pytest.raises(AttribError, match=r"pq_bytes = 30 does not divide the dimension 256; near: \[8, 16, 32\]"):
        plan(MILLION, pq_bytes=30, worker_memory_gib=0.2)
    assert plan(MILLION, pq_bytes=30).kind == "ivf_flat"


@pytest.mark.parametrize("kind", KINDS)
def test_estimated_bytes_are_those_of_built_files(kind, tmp_path):
    generator = np.random.default_rng(14)
    ids, vectors = np.arange(6_000), generator.standard_normal((6_000, 32)).astype(np.float16)
    partition_of = (np.arange(6_000) >= 4_000).astype(int)
    planned = plan(6_000, 32, shard_sizes=[4_000, 2_000], kind=kind, num_lists=32)
    make_index(tmp_path, ids, vectors, planned, partition_of)
    size = {name: os.path.getsize(tmp_path / "shard-00000" / name) for name in ("vectors.npy", "ids.npy")}
    if kind != "flat":
        size["lists.faiss"] = os.path.getsize(tmp_path / "shard-00000" / "lists.faiss")
    on_disk = sum(size.values())
    held = on_disk if kind == "flat" else on_disk - size["vectors.npy"]
    assert planned.shard_disk_bytes == pytest.approx(on_disk, rel=0.05)
    assert planned.shard_memory_bytes == pytest.approx(held, rel=0.05)


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
