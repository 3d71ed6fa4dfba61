"""Candidates to final rows: merge the shards per block, read metadata of sources per shard, write rows per block."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from attrib.attribute.blocks import block_name, block_rows, partial_table, partial_uri, partials, read_partial
from attrib.attribute.estimate import AttributeTask
from attrib.attribute.rows import RESULT_FOLDERS, RunStamp, attribution_rows, block_queries, read_sources
from attrib.attribute.run import AttributionJob
from attrib.common.progress import Progress
from attrib.common.seal import sealed_sha256
from attrib.common.storage import Storage, bytes_sha256, join, unsealed
from attrib.generators.identify.files import block_verdicts
from attrib.index.estimate import describe_parts
from attrib.index.search import Candidates, keep_candidates, merge
from attrib.runtime.tasks import run_all, run_units

# In the folder of a block: the best candidates of all shards, and the sources of these by shard and id.
MERGED, WANTED = "merged.parquet", "wanted.parquet"


def merge_blocks(job: AttributionJob, storage: Storage) -> None:
    pending = job.pending_blocks(storage)
    job.num_tasks[AttributeTask.MERGE] = len(pending)
    if not pending:
        return
    counts = [block_rows(job.blocks[block]) for block in pending]
    num_merged = sum(job.queries.num_rows) - sum(counts)
    run_all(_merge_task, [(job, block, storage) for block in pending], "merge", "queries", counts, num_merged)


def _merge_task(job: AttributionJob, block: int, storage: Storage) -> None:
    """Write the best candidates of all shards for one block, and the ids of their sources by shard.

    It reads one shard at a time, so that memory does not grow with the number of shards.
    """
    folder, num_shards = partials(job.settings.output, block), len(job.index.shards)
    if storage.exists(join(folder, WANTED)):
        return
    job.use_threads()
    query_ids = job.block_ids(block, storage)
    num_candidates = job.num_candidates if job.scans_codes else None
    uris = [partial_uri(job.settings.output, block, shard) for shard in range(num_shards)]
    best: list[Candidates] = []
    for uri in uris:
        best.append(read_partial(storage.read_sealed(uri), query_ids))
        best = [keep_candidates(best, num_candidates) if num_candidates else merge(best, job.settings.top_k)]
    kept = merge(best, job.settings.top_k, num_candidates)
    shards = np.zeros(len(kept.id), np.int32)
    for shard, uri in enumerate(uris[1:], start=1):
        shards[np.isin(kept.id, storage.read_table(uri, columns=["source_id"])["source_id"].to_numpy())] = shard
    storage.write_table(join(folder, MERGED), partial_table(kept, query_ids))
    # Written last: it marks the block as merged. Small row groups let a shard read its own rows only.
    storage.write_table(join(folder, WANTED), wanted_table(kept.id, shards), row_group_rows=4096)


def wanted_table(source_ids: np.ndarray, shards: np.ndarray) -> pa.Table:
    """Return the distinct (shard, source_id), sorted. source_ids, shards: int [m], sources and their shards."""
    ids, first = np.unique(source_ids, return_index=True)
    order = np.argsort(shards[first], kind="stable")
    return pa.table({"shard": shards[first][order].astype(np.int32), "source_id": ids[order]})


def describe_sources(job: AttributionJob, storage: Storage) -> None:
    pending = job.pending_blocks(storage)
    num_shards, num_parts = len(job.index.shards) if pending else 0, describe_parts(len(job.index.shards))
    units = [(job, pending, *place, num_parts, storage) for place in np.ndindex(num_shards, num_parts)]
    job.num_tasks[AttributeTask.DESCRIBE] = len(units)
    if units:
        run_all(_describe_task, units, "sources", "parts of shards", [1] * len(units))


def _describe_task(
    job: AttributionJob, blocks: list[int], shard: int, part: int, num_parts: int, storage: Storage
) -> None:
    """Write the metadata of the sources of one shard, for all blocks, in one pass.

    The sources are cut into `num_parts` ranges of ids; this task reads the range `part`.
    """
    job.use_threads()
    folders = [partials(job.settings.output, block) for block in blocks]
    mine = pc.field("shard") == shard
    wanted = [
        storage.read_table(join(f, WANTED), filter=mine, check_footer=True)["source_id"].to_numpy() for f in folders
    ]
    ids = np.array_split(np.unique(np.concatenate(wanted)), num_parts)[part]
    if not len(ids):
        return
    sources = read_sources(job.index, ids, storage, [shard])
    for folder, block_ids in zip(folders, wanted):
        block_ids = block_ids[(block_ids >= ids[0]) & (block_ids <= ids[-1])]
        if len(block_ids):
            rows = sources.take(pa.array(np.searchsorted(sources["id"].to_numpy(), block_ids)))
            storage.write_table(join(folder, f"sources-{shard:05d}-{part:03d}.parquet"), rows)


def write_blocks(job: AttributionJob, stamp: RunStamp, storage: Storage) -> dict[str, Any]:
    """Write the rows of all blocks; return the sums of num_queries, num_failed and num_rows, and sha256.

    sha256: the checksums of the files of all blocks, by folder.
    """
    job.num_tasks[AttributeTask.WRITE] = len(job.blocks)
    progress = Progress("write", sum(job.queries.num_rows), "queries")
    totals = {"num_queries": 0, "num_failed": 0, "num_rows": 0}
    sha256: dict[str, list[str]] = {folder: [""] * len(job.blocks) for folder in RESULT_FOLDERS}
    for block, counts in run_units(_write_task, ((job, block, stamp, storage) for block in range(len(job.blocks)))):
        for folder in RESULT_FOLDERS:
            sha256[folder][block] = counts[folder]
        progress.update(counts["num_queries"], counts["num_failed"])
        totals = {name: total + counts[name] for name, total in totals.items()}
    progress.close()
    return totals | {"sha256": sha256}


def _write_task(job: AttributionJob, block: int, stamp: RunStamp, storage: Storage) -> dict[str, Any]:
    output = job.settings.output
    rows_uri, outcomes_uri = (join(output, folder, block_name(block)) for folder in RESULT_FOLDERS)
    if not storage.exists(outcomes_uri):
        job.use_threads()
        queries = block_queries(job.queries, job.manifest, job.blocks[block], storage)
        best = read_partial(storage.read_sealed(join(partials(output, block), MERGED)), queries["id"].to_numpy())
        sources = _described(job, block, storage)
        verdicts = block_verdicts(job.identified, job.blocks[block], storage) if job.identified else None
        attributions, outcomes = attribution_rows(
            best, queries, sources, job.settings.top_k, job.settings.shares, stamp, verdicts
        )
        storage.write_table(rows_uri, attributions)
        # Written last: this file marks the block as finished.
        storage.write_table(outcomes_uri, outcomes)
    # The block may be of a run that did not end, so both files are verified by their seals.
    rows, outcomes = storage.read_bytes(rows_uri), storage.read_bytes(outcomes_uri)
    status = unsealed(outcomes, outcomes_uri, ["status"])["status"]
    counts = {"num_queries": len(status), "num_failed": status.to_pylist().count("failed")}
    counts["num_rows"] = pa.parquet.read_metadata(pa.BufferReader(rows)).num_rows
    return counts | dict(zip(RESULT_FOLDERS, [sealed_sha256(rows, rows_uri), bytes_sha256(outcomes)]))


def _described(job: AttributionJob, block: int, storage: Storage) -> pa.Table:
    """Return id, key, uri and metadata of the sources of a block, by ascending id."""
    folder = partials(job.settings.output, block)
    names = [name for name in storage.names(folder, suffix=".parquet") if name.startswith("sources-")]
    if not names:
        return read_sources(job.index, np.empty(0, np.int64), storage)
    return pa.concat_tables([storage.read_sealed(join(folder, n)) for n in names]).sort_by("id").combine_chunks()
