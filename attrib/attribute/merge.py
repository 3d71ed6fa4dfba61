"""Candidates to final rows: merge the shards per block, read metadata of sources per shard, write rows per block."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from attrib.attribute.blocks import (
    block_name,
    block_rows,
    described_uri,
    merged_uri,
    partial_table,
    partial_uri,
    read_partial,
    wanted_table,
    wanted_uri,
)
from attrib.attribute.estimate import AttributeTask
from attrib.attribute.rows import (
    RunStamp,
    attribution_rows,
    block_queries,
    read_shard_sources,
    read_sources,
)
from attrib.attribute.run import AttributionJob, pending_blocks, use_threads
from attrib.common.progress import Progress
from attrib.common.storage import Storage, join
from attrib.generators.identify.files import block_verdicts
from attrib.index.estimate import describe_parts
from attrib.index.search import Candidates, keep_candidates, merge
from attrib.runtime.tasks import run_units


def merge_blocks(job: AttributionJob, storage: Storage) -> None:
    pending = pending_blocks(job, storage)
    job.num_tasks[AttributeTask.MERGE] = len(pending)
    if not pending:
        return
    num_rows = sum(job.queries.num_rows)
    num_pending = sum(block_rows(job.blocks[block]) for block in pending)
    progress = Progress("merge", num_rows, "queries", num_rows - num_pending)
    for i, _ in run_units(_merge_task, [(job, block, storage) for block in pending]):
        progress.update(block_rows(job.blocks[pending[i]]))
    progress.close()


def _merge_task(job: AttributionJob, block: int, storage: Storage) -> None:
    """Write the best candidates of all shards for one block, and the ids of their sources by shard.

    It reads one shard at a time, so that memory does not grow with the number of shards.
    """
    output = job.settings.output
    if storage.exists(wanted_uri(output, block)):
        return
    use_threads(job)
    query_ids = job.block_ids(block, storage)
    num_candidates = job.num_candidates if job.scans_codes else None
    best: list[Candidates] = []
    for shard in range(len(job.index.shards)):
        found = read_partial(storage.read_table(partial_uri(output, block, shard)), query_ids)
        if num_candidates is None:
            best = [merge([*best, found], job.settings.top_k)]
        else:
            best = [keep_candidates([*best, found], num_candidates)]
    kept = merge(best, job.settings.top_k, num_candidates)
    shards = np.zeros(len(kept.id), np.int32)
    if len(job.index.shards) > 1:
        for shard in range(len(job.index.shards)):
            ids = storage.read_table(partial_uri(output, block, shard), columns=["source_id"])["source_id"].to_numpy()
            shards[np.isin(kept.id, ids)] = shard
    storage.write_table(merged_uri(output, block), partial_table(kept, query_ids))
    # Written last: it marks the block as merged. Small row groups let a shard read its own rows only.
    storage.write_table(wanted_uri(output, block), wanted_table(kept.id, shards), row_group_rows=4096)


def describe_sources(job: AttributionJob, storage: Storage) -> None:
    pending = pending_blocks(job, storage)
    num_shards = len(job.index.shards) if pending else 0
    num_parts = describe_parts(len(job.index.shards))
    units = [
        (job, pending, shard, part, num_parts, storage) for shard in range(num_shards) for part in range(num_parts)
    ]
    job.num_tasks[AttributeTask.DESCRIBE] = len(units)
    if not units:
        return
    progress = Progress("sources", len(units), "parts of shards")
    for _ in run_units(_describe_task, units):
        progress.update(1)
    progress.close()


def _describe_task(
    job: AttributionJob, blocks: list[int], shard: int, part: int, num_parts: int, storage: Storage
) -> None:
    """Write the metadata of the sources of one shard, for all blocks, in one pass.

    The sources are cut into `num_parts` ranges of ids; this task reads the range `part`.
    """
    output = job.settings.output
    use_threads(job)
    wanted = [
        storage.read_table(wanted_uri(output, block), filter=pc.field("shard") == shard)["source_id"].to_numpy()
        for block in blocks
    ]
    ids = np.array_split(np.unique(np.concatenate(wanted)), num_parts)[part]
    if not len(ids):
        return
    sources = read_shard_sources(job.index, shard, ids, storage)
    found = sources["id"].to_numpy()
    for block, block_ids in zip(blocks, wanted):
        mine = np.searchsorted(found, block_ids[(block_ids >= ids[0]) & (block_ids <= ids[-1])])
        if len(mine):
            storage.write_table(described_uri(output, block, shard, part), sources.take(pa.array(mine)))


def write_blocks(job: AttributionJob, stamp: RunStamp, storage: Storage) -> list[dict[str, Any]]:
    counts: list[dict[str, Any]] = [{}] * len(job.blocks)
    job.num_tasks[AttributeTask.WRITE] = len(job.blocks)
    progress = Progress("write", sum(job.queries.num_rows), "queries")
    for i, count in run_units(_write_task, ((job, b, stamp, storage) for b in range(len(job.blocks)))):
        counts[i] = count
        progress.update(count["num_queries"], count["num_failed"])
    progress.close()
    return counts


def _write_task(job: AttributionJob, block: int, stamp: RunStamp, storage: Storage) -> dict[str, Any]:
    output = job.settings.output
    rows_uri = join(output, "attributions", block_name(block))
    outcomes_uri = join(output, "outcomes", block_name(block))
    if not storage.exists(outcomes_uri):
        use_threads(job)
        queries = block_queries(job.queries, job.manifest, job.blocks[block], storage)
        best = read_partial(storage.read_table(merged_uri(output, block)), queries["id"].to_numpy())
        sources = _described(job, block, storage)
        verdicts = block_verdicts(job.identified, job.blocks[block], storage) if job.identified else None
        attributions, outcomes = attribution_rows(
            best, queries, sources, job.settings.top_k, job.settings.shares, stamp, verdicts
        )
        storage.write_table(rows_uri, attributions)
        # Written last: this file marks the block as finished.
        storage.write_table(outcomes_uri, outcomes)
    status = storage.read_table(outcomes_uri, columns=["status"])["status"]
    num_failed = int(np.sum(status.to_numpy(zero_copy_only=False) == "failed"))
    filesystem, path = storage.resolve(rows_uri)
    num_rows = pa.parquet.read_metadata(path, filesystem=filesystem).num_rows
    return {"num_queries": len(status), "num_failed": num_failed, "num_rows": num_rows}


def _described(job: AttributionJob, block: int, storage: Storage) -> pa.Table:
    """id, key, uri and metadata of the block's sources, by ascending id."""
    folder = merged_uri(job.settings.output, block).rsplit("/", 1)[0]
    names = [name for name in storage.names(folder, suffix=".parquet") if name.startswith("sources-")]
    if not names:
        return read_sources(job.index, np.empty(0, np.int64), storage)
    tables = [storage.read_table(join(folder, name)) for name in names]
    return pa.concat_tables(tables).sort_by("id").combine_chunks()
