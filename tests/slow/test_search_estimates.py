"""Estimates of building and searching a shard, compared with real work, at sizes not used to fit the constants."""

import numpy as np
import pytest
from support.memory import folder_bytes, measure, template
from support.shards import STORAGE, make_sources, write_embeddings

from attrib.data.estimate import RowBytes
from attrib.data.manifest import part_name
from attrib.index.estimate import ShardSizes, build_bytes, search_bytes
from attrib.index.index import QUANTIZER_FILE
from attrib.index.quantizer import write_quantizer
from attrib.index.shard import shard_name

TOLERANCE = 0.25


@pytest.mark.parametrize(
    ("num_vectors", "dimension", "num_lists", "num_queries", "k", "nprobe"),
    [(90_000, 160, 512, 12_000, 10, 16), (50_000, 320, 0, 6_000, 20, 0)],
)
def test_shard_needs_the_estimated_memory_and_bytes(
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
    """Compare memory without and with libraries. Mapped files belong to the page cache and do not count."""
    growth = found["anonymous_bytes"] - found["baseline_anonymous_bytes"]
    assert growth == pytest.approx(estimated, rel=TOLERANCE)
    baseline = found["baseline_bytes"]
    assert baseline + growth == pytest.approx(baseline + estimated, rel=TOLERANCE)
