"""Estimates of the index and attribute jobs against real work, at sizes that no constant was fitted on."""

import numpy as np
import pytest
from support.memory import folder_bytes, measure, template
from support.shards import STORAGE, make_sources, write_embeddings

from attrib.attribute.estimate import estimate_attribute, results_bytes
from attrib.data.estimate import RowBytes
from attrib.data.manifest import part_name
from attrib.index.estimate import ShardSizes, build_bytes, estimate_index, probe_groups, search_bytes, shard_parts
from attrib.index.index import QUANTIZER_FILE
from attrib.index.quantizer import write_quantizer
from attrib.index.shard import shard_name
from attrib.runtime.machine import AnswerRates, MachineRates

TOLERANCE = 0.25
RATES, ANSWER_RATES = MachineRates(5e10, 1e9, 1e9, 5e8), AnswerRates(1e9, 8e8, 2e8, 5e6)


@pytest.mark.parametrize(
    ("num_vectors", "dimension", "num_lists", "num_queries", "k", "nprobe"),
    [(90_000, 160, 512, 12_000, 10, 16), (50_000, 320, 0, 6_000, 20, 0)],
)
def test_a_shard_takes_the_memory_and_the_bytes_that_were_estimated(
    tmp_path, num_vectors, dimension, num_lists, num_queries, k, nprobe
):
    generator = np.random.default_rng(dimension)
    ids = generator.permutation(np.unique(generator.integers(0, 2**62, num_vectors)))
    partition_of = np.sort(np.arange(num_vectors) % 3)
    vectors = generator.standard_normal((num_vectors, dimension), dtype=np.float32).astype(np.float16)
    partitions = write_embeddings(tmp_path, ids, vectors, partition_of).num_rows
    for partition in range(3):
        sources = make_sources(ids[partition_of == partition])
        STORAGE.write_table(str(tmp_path / "manifest" / part_name(partition)), sources)
    if num_lists:
        write_quantizer(template(num_lists, dimension), str(tmp_path / QUANTIZER_FILE), STORAGE)
    write_embeddings(tmp_path / "queries", np.arange(num_queries), vectors[:num_queries], np.zeros(num_queries, int))
    sizes = ShardSizes(
        num_vectors, 1, num_vectors, dimension, num_lists, 0, RowBytes.of(make_sources(ids[:2000])), max(partitions)
    )

    built = measure("build", folder=str(tmp_path), dimension=dimension, num_lists=num_lists, partitions=partitions)
    on_disk = folder_bytes(tmp_path / shard_name(0)) + sizes.template_bytes
    assert on_disk == pytest.approx(sizes.disk_bytes, rel=TOLERANCE)
    _check(built, build_bytes(sizes))
    searched = measure("search", folder=str(tmp_path), num_queries=num_queries, dimension=dimension, k=k, nprobe=nprobe)
    _check(searched, search_bytes(sizes, num_queries, nprobe, k))
    most = searched["baseline_bytes"] + search_bytes(sizes, num_queries, nprobe, k) + sizes.mapped_bytes
    assert searched["peak_bytes"] <= (1 + TOLERANCE) * most


def _check(found: dict, estimated: int) -> None:
    """Beyond the libraries, and with them. Mapped files are the page cache's and not counted."""
    growth = found["anonymous_bytes"] - found["baseline_anonymous_bytes"]
    assert growth == pytest.approx(estimated, rel=TOLERANCE)
    baseline = found["baseline_bytes"]
    assert baseline + growth == pytest.approx(baseline + estimated, rel=TOLERANCE)


def sizes(num_vectors: int, num_shards: int, num_lists: int = 4096) -> ShardSizes:
    return ShardSizes(num_vectors, num_shards, -(-num_vectors // num_shards), 256, num_lists, 0, RowBytes(100, 40))


def test_memory_of_a_worker_follows_the_shard_and_not_the_index():
    some, more = (
        estimate_index(sizes(n, n // 10**6), 65_536, 1000, 10**8, RATES, 4, 2) for n in (4 * 10**6, 4 * 10**9)
    )
    assert some.worker_bytes == more.worker_bytes and some.scratch_bytes == more.scratch_bytes
    assert more.output_bytes == pytest.approx(1000 * some.output_bytes, rel=0.01)
    assert estimate_index(sizes(10**6, 1), 65_536, 1000, 10**8, RATES, 4, 2).num_workers == 1


def test_a_batch_of_any_size_takes_the_memory_of_what_is_read_together():
    few, many = (
        estimate_attribute(
            sizes(10**6, 1000),
            n,
            131_072,
            100_000,
            10,
            10,
            16,
            RowBytes(100, 40),
            60.0,
            1.0,
            10**8,
            ANSWER_RATES,
            2,
            True,
        )
        for n in (200_000, 2_000_000)
    )
    assert few.worker_bytes == many.worker_bytes
    assert many.output_bytes == pytest.approx(10 * few.output_bytes)
    assert many.temporary_bytes == pytest.approx(10 * few.temporary_bytes)
    assert few.scratch_bytes == few.mapped_bytes > 0


def test_re_ranking_many_candidates_and_wide_blocks_cost_memory():
    one = sizes(10**6, 1)
    assert search_bytes(one, 10_000, 16, 80) > search_bytes(one, 10_000, 16, 10)
    assert search_bytes(one, 10_000, 512, 10) > search_bytes(one, 10_000, 16, 10)
    query = RowBytes(100, 40)
    assert results_bytes(one, 10_000, 10_000, 50, 50, query) > results_bytes(one, 10_000, 10_000, 10, 10, query)


def attribute_seconds(num_queries: int, num_shards: int, num_workers: int, search_seconds: float) -> float:
    shards, query = sizes(10**6, num_shards), RowBytes(100, 40)
    rows = (num_queries, 131_072, 1_000, 10, 10, 16, query)
    return estimate_attribute(
        shards, *rows, search_seconds, 0.0, 10**8, ANSWER_RATES, num_workers, copies_shards=False
    ).seconds


def test_a_template_that_is_there_is_not_trained_again():
    one = sizes(10**6, 4)
    trained, found = (estimate_index(one, rows, 1000, 10**8, RATES, 2, 2) for rows in (262_144, 0))
    flops = 20 * 2 * 262_144 * 4096 * 256
    assert trained.seconds - found.seconds == pytest.approx(flops / 5e10 / 2, rel=0.05)
    assert found.driver_bytes < trained.driver_bytes and found.output_bytes == trained.output_bytes


def test_seconds_of_a_search_are_shared_by_workers_and_never_less_than_its_largest_shard_takes():
    one, two = (attribute_seconds(10_000, 4, workers, 100.0) for workers in (1, 2))
    assert 1.9 < one / two < 2
    alone = attribute_seconds(10_000, 16, 10, 100.0)
    # A round of whole shards, and one of the other six in parts.
    assert alone == pytest.approx(attribute_seconds(10_000, 16, 1, 100.0) / 10, rel=0.2)


def test_a_short_job_takes_its_fixed_costs():
    assert 0.3 < attribute_seconds(10, 1, 8, 0.0) < 1.5
    many, few = (attribute_seconds(100_000, shards, 2, 0.0) for shards in (200, 2))
    assert many > few + 10  # each block meets each shard in a file


def test_shards_are_cut_so_that_the_last_round_fills_the_workers():
    assert [shard_parts(shards, 2) for shards in (1, 2, 3, 5)] == [[2], [1, 1], [1, 1, 2], [1, 1, 1, 1, 2]]
    assert shard_parts(5, 8) == [3] * 5 and shard_parts(9, 8) == [1] * 8 + [6]
    for shards in range(1, 40):
        for workers in range(1, 20):
            parts = shard_parts(shards, workers)
            assert len(parts) == shards and sum(parts) >= 0.75 * workers * -(-sum(parts) // workers)


def test_every_worker_reads_as_many_queries_before_the_search():
    assert [probe_groups(10, 10_000, workers) for workers in (1, 2, 16)] == [1, 2, 10]
    assert probe_groups(100, 10**7, 8) == 100
    assert probe_groups(1000, 10**6, 8) == 64
    assert probe_groups(0, 0, 8) == 0
