"""Tasks of an attribution run without a cluster: reading blocks, and searching again after a restart."""

import os

import numpy as np
import pytest
from support.shards import STORAGE, make_index, make_plan, write_embeddings

from attrib.attribute import job as attribute_job
from attrib.attribute.blocks import block_rows, lists_uri, partial_uri, read_block, read_partial
from attrib.attribute.run import AttributionJob, exact_uri
from attrib.attribute.settings import AttributeSettings
from attrib.common.scratch import scratch_folder
from attrib.data.ids import sampling_rank
from attrib.data.manifest import plan_partitions
from attrib.embed.embeddings import read_vectors
from attrib.index.cost_model import SearchPlan
from attrib.index.index import Index
from attrib.index.sampling import lowest_ranked, sampling_rank_limit
from attrib.index.search import search_shard

NUM_SOURCES, NUM_QUERIES, DIMENSION, BLOCK_ROWS, TOP_K = 600, 130, 24, 17, 3


@pytest.fixture
def job(tmp_path) -> AttributionJob:
    """Two shards of eight lists; 130 queries, some failed, in three partitions and in blocks that cross partitions."""
    generator = np.random.default_rng(5)
    ids = generator.permutation(np.unique(generator.integers(0, 2**62, NUM_SOURCES)))
    vectors = generator.standard_normal((NUM_SOURCES + NUM_QUERIES, DIMENSION)).astype(np.float16)
    plan = make_plan("ivf_flat")
    shards = make_index(tmp_path / "index", ids, vectors[:NUM_SOURCES], plan, np.arange(NUM_SOURCES) % 2)
    query_ids = generator.permutation(np.unique(generator.integers(0, 2**62, NUM_QUERIES)))
    failed = generator.random(NUM_QUERIES) < 0.2
    queries = write_embeddings(
        tmp_path / "queries", query_ids, vectors[NUM_SOURCES:], np.arange(NUM_QUERIES) // 50, failed
    )
    index = Index(
        str(tmp_path / "index"), "i", {"dimension": DIMENSION}, plan, None, shards, 2, 8, {}, ["owner"], True, {}
    )
    settings = AttributeSettings(
        queries=queries.uri, index=index.uri, output=str(tmp_path / "out"), top_k=TOP_K, recall_check_queries=9
    )
    job = AttributionJob(settings, index, queries, None, SearchPlan("lists", 2, 0.0, "test"))
    job.blocks = plan_partitions(queries.num_rows, BLOCK_ROWS)
    return job


@pytest.mark.parametrize("blocks", [[0, 1, 2, 3, 4, 5, 6, 7], [2], [0, 2, 3, 7], [3, 1]])
def test_blocks_read_together_equal_blocks_read_alone(job, blocks):
    assert len(job.blocks) == 8 and len(job.blocks[2]) == 2  # it spans two partitions
    for block, (ids, units) in zip(blocks, job.read_blocks(blocks, STORAGE), strict=True):
        alone_ids, alone = read_block(job.queries, job.blocks[block], STORAGE)
        assert np.array_equal(ids, alone_ids) and np.array_equal(units, alone)
        everyone = job.block_ids(block, STORAGE)
        assert len(everyone) == block_rows(job.blocks[block]) and set(ids) < set(everyone)
        assert np.all(np.diff(everyone) > 0)


def test_joint_reads_respect_the_row_limit(job):
    assert job.together([0, 1, 2, 3], 40) == [[0, 1], [2, 3]]
    assert job.together([0, 4], 1) == [[0], [4]]
    assert job.together([], 40) == []


def test_recall_sample_is_taken_from_the_whole_batch(job):
    wanted = job.num_checked
    threshold = sampling_rank_limit(wanted, sum(job.queries.num_embedded))
    parts = [attribute_job._probe_task(job, blocks, threshold, STORAGE) for blocks in ([0, 1, 2], [3, 4, 5, 6, 7])]
    ids, _ = lowest_ranked(*(np.concatenate(columns) for columns in zip(*parts)), wanted)
    everyone = np.concatenate([read_vectors(job.queries, p, STORAGE)[0] for p in range(3)])
    assert ids.tolist() == everyone[np.argsort(sampling_rank(everyone))[:wanted]].tolist()
    lists = [STORAGE.read_array(lists_uri(job.settings.output, block)) for block in range(8)]
    assert [len(some) for some in lists] == [len(ids) for ids, _ in job.read_blocks(list(range(8)), STORAGE)]


def test_search_task_keeps_results_of_an_earlier_run(job):
    output, blocks = job.settings.output, [4, 5]
    attribute_job._probe_task(job, blocks, None, STORAGE)
    read = job.read_blocks(blocks, STORAGE)
    checked = read[0]
    attribute_job._search_task(job, 1, blocks, checked, STORAGE)
    with scratch_folder() as folder:
        shard = job.open_shard(1, STORAGE, folder)
        for block, (ids, units) in zip(blocks, read):
            found = read_partial(STORAGE.read_table(partial_uri(output, block, 1)), ids)
            _same(found, search_shard(shard, units, TOP_K, TOP_K, 2, False))
        exact = read_partial(STORAGE.read_table(exact_uri(output, 1)), checked[0])
        _same(exact, search_shard(shard, checked[1], TOP_K, TOP_K, 0, False))
    assert not STORAGE.exists(exact_uri(output, 0))
    os.unlink(partial_uri(output, 5, 1))
    kept = [partial_uri(output, 4, 1), exact_uri(output, 1)]
    written = [os.stat(uri).st_ino for uri in kept]
    attribute_job._search_task(job, 1, blocks, checked, STORAGE)
    assert [os.stat(uri).st_ino for uri in kept] == written
    assert STORAGE.exists(partial_uri(output, 5, 1))


def _same(found, expected) -> None:
    for name in ("query", "id", "score"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
