"""The arithmetic of the index estimate; tests/slow/test_search_estimates.py compares its peaks with real work."""

import pytest

from attrib.data.estimate import RowBytes
from attrib.index.estimate import ShardSizes, estimate_index, probe_groups, search_bytes, shard_parts
from attrib.runtime.machine import MachineRates

RATES = MachineRates(5e10, 1e9, 1e9, 5e8)


def sizes(num_vectors: int, num_shards: int) -> ShardSizes:
    return ShardSizes(num_vectors, num_shards, -(-num_vectors // num_shards), 256, 4096, 0, RowBytes(100, 40))


def test_memory_of_a_worker_depends_on_the_shard_and_not_on_the_index():
    some, more = (
        estimate_index(sizes(n, n // 10**6), 65_536, 1000, 10**8, RATES, 4, 2) for n in (4 * 10**6, 4 * 10**9)
    )
    assert some.worker_bytes == more.worker_bytes and some.scratch_bytes == more.scratch_bytes
    assert more.output_bytes == pytest.approx(1000 * some.output_bytes, rel=0.01)
    assert estimate_index(sizes(10**6, 1), 65_536, 1000, 10**8, RATES, 4, 2).num_workers == 1


def test_existing_coarse_quantizer_is_not_trained_again():
    one = sizes(10**6, 4)
    trained, found = (estimate_index(one, rows, 1000, 10**8, RATES, 2, 2) for rows in (262_144, 0))
    flops = 20 * 2 * 262_144 * 4096 * 256
    assert trained.seconds - found.seconds == pytest.approx(flops / 5e10 / 2, rel=0.05)
    assert found.driver_bytes < trained.driver_bytes and found.output_bytes == trained.output_bytes


def test_more_candidates_and_more_lists_need_more_memory():
    one = sizes(10**6, 1)
    assert search_bytes(one, 10_000, 16, 80) > search_bytes(one, 10_000, 16, 10)
    assert search_bytes(one, 10_000, 512, 10) > search_bytes(one, 10_000, 16, 10)


def test_shards_are_cut_so_that_the_last_round_fills_the_workers():
    assert [shard_parts(shards, 2) for shards in (1, 2, 3, 5)] == [[2], [1, 1], [1, 1, 2], [1, 1, 1, 1, 2]]
    assert shard_parts(5, 8) == [3] * 5 and shard_parts(9, 8) == [1] * 8 + [6]
    for shards in range(1, 40):
        for workers in range(1, 20):
            parts = shard_parts(shards, workers)
            assert len(parts) == shards and sum(parts) >= 0.75 * workers * -(-sum(parts) // workers)


def test_every_worker_reads_equally_many_queries_before_the_search():
    assert [probe_groups(10, 10_000, workers) for workers in (1, 2, 16)] == [1, 2, 10]
    assert probe_groups(100, 10**7, 8) == 100
    assert probe_groups(1000, 10**6, 8) == 64
    assert probe_groups(0, 0, 8) == 0
