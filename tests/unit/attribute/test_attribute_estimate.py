"""The arithmetic of the attribution estimate."""

from dataclasses import replace

import pytest

from attrib.attribute.estimate import AttributionWork, estimate_attribute, results_bytes
from attrib.data.estimate import RowBytes
from attrib.index.estimate import ShardSizes
from attrib.runtime.machine import AnswerRates

RATES = AnswerRates(1e9, 8e8, 2e8)
WORK = AttributionWork(
    num_queries=10_000,
    queries_together=131_072,
    block_rows=1_000,
    top_k=10,
    num_candidates=10,
    nprobe=16,
    query=RowBytes(100, 40),
    search_seconds=100.0,
    check_seconds=0.0,
)


def sizes(num_shards: int) -> ShardSizes:
    return ShardSizes(10**6, num_shards, -(-(10**6) // num_shards), 256, 4096, 0, RowBytes(100, 40))


def seconds(num_shards: int, num_workers: int, **changes) -> float:
    work = replace(WORK, **changes)
    return estimate_attribute(sizes(num_shards), work, 10**8, RATES, num_workers, copies_shards=False).seconds


def test_memory_does_not_depend_on_the_number_of_queries():
    few, many = (
        estimate_attribute(
            sizes(1000), replace(WORK, num_queries=n, block_rows=100_000), 10**8, RATES, 2, copies_shards=True
        )
        for n in (200_000, 2_000_000)
    )
    assert few.worker_bytes == many.worker_bytes
    assert many.output_bytes == pytest.approx(10 * few.output_bytes)
    assert many.temporary_bytes == pytest.approx(10 * few.temporary_bytes)
    assert few.scratch_bytes == few.mapped_bytes > 0


def test_more_results_per_query_need_more_memory():
    whole = replace(WORK, block_rows=10_000)
    more = replace(whole, top_k=50, num_candidates=50)
    assert results_bytes(sizes(1), more) > results_bytes(sizes(1), whole)


def test_workers_share_the_seconds_of_a_search_but_not_below_the_largest_shard():
    assert 1.9 < seconds(4, 1) / seconds(4, 2) < 2
    # One round of whole shards, and one of the other six in parts.
    assert seconds(16, 10) == pytest.approx(seconds(16, 1) / 10, rel=0.2)


def test_short_job_takes_its_fixed_costs():
    assert 0.3 < seconds(1, 8, num_queries=10, search_seconds=0.0) < 1.5
    many, few = (seconds(shards, 2, num_queries=100_000, search_seconds=0.0) for shards in (200, 2))
    assert many > few + 10  # each block meets each shard in a file
