"""What an attribution job needs: memory, bytes and time."""

from enum import StrEnum

from attrib.data.estimate import RowBytes
from attrib.index.estimate import (
    CANDIDATE_BYTES,
    CANDIDATE_BYTES_ON_DISK,
    FILE_SECONDS,
    FIXED_ROW_BYTES,
    MERGE_COPIES,
    OUTCOME_NUMBERS_BYTES,
    PHASE_SECONDS,
    ROW_NUMBERS_BYTES,
    SCAN_READAHEAD_ROWS,
    STAMP_BYTES,
    START_SECONDS,
    TASK_SECONDS,
    ShardSizes,
    describe_parts,
    probe_groups,
    search_bytes,
    shard_parts,
)
from attrib.runtime.estimate import READER_BYTES, TABLE_COPIES, WRITER_BYTES, Estimate
from attrib.runtime.machine import AnswerRates


class AttributeTask(StrEnum):
    """Kinds of Ray tasks of the attribute job, as `num_tasks` of its record counts them."""

    PROBE = "probe"  # a group of query blocks
    SEARCH = "search"  # a shard, or a part of the queries against it
    MERGE = "merge"  # a block
    DESCRIBE = "describe"  # a part of a shard's metadata
    WRITE = "write"  # a block


def results_bytes(
    sizes: ShardSizes, num_queries: int, block_rows: int, top_k: int, num_candidates: int, query: RowBytes
) -> int:
    """Held by a worker that merges the shards' candidates of a block, looks up a shard's sources for all blocks, or writes a block's rows."""
    wanted, source = min(num_candidates, sizes.shard_vectors), sizes.source.in_memory
    # A shard's table and its columns beside what is kept, both joined and put in order.
    merging = block_rows * wanted * MERGE_COPIES * CANDIDATE_BYTES
    asked = num_queries * top_k / sizes.num_shards
    scanned = min(SCAN_READAHEAD_ROWS, sizes.shard_vectors)
    describing = 3 * 8 * asked + (scanned + TABLE_COPIES * min(asked, sizes.shard_vectors)) * source
    rows = block_rows * min(top_k, sizes.num_vectors)
    row = FIXED_ROW_BYTES + STAMP_BYTES + source + query.in_memory
    found = TABLE_COPIES * (min(rows, sizes.num_vectors) * source + block_rows * query.in_memory)
    writing = CANDIDATE_BYTES * rows + found + 2 * rows * row
    return round(READER_BYTES + WRITER_BYTES + max(merging, describing, writing))


def estimate_attribute(
    sizes: ShardSizes,
    num_queries: int,
    queries_together: int,
    block_rows: int,
    top_k: int,
    num_candidates: int,
    nprobe: int,
    query: RowBytes,
    search_seconds: float,
    check_seconds: float,
    baseline_bytes: int,
    rates: AnswerRates,
    num_workers: int,
    copies_shards: bool,
    on_gpus: bool = False,
) -> Estimate:
    """queries_together: in one pass over a shard; num_candidates: per query and shard (top_k where vectors are scanned); query: a manifest row of
    the queries; search_seconds, check_seconds: of one worker, from the planner, for the batch and for the queries that are also searched exactly;
    copies_shards: from an object store to the local disk."""
    block_rows, queries_together = min(block_rows, num_queries), min(queries_together, num_queries)
    num_blocks = -(-num_queries // max(1, block_rows))
    pairs = num_queries * min(num_candidates, sizes.shard_vectors) * sizes.num_shards
    rows = num_queries * min(top_k, sizes.num_vectors)
    searching = search_bytes(sizes, queries_together, nprobe, num_candidates, block_rows)
    finishing = results_bytes(sizes, num_queries, block_rows, top_k, num_candidates, query)
    outcomes = num_queries * (2 * query.on_disk + OUTCOME_NUMBERS_BYTES)
    return Estimate(
        num_workers=num_workers,
        worker_bytes=baseline_bytes + max(searching, finishing),
        driver_bytes=baseline_bytes,
        mapped_bytes=sizes.mapped_bytes,
        scratch_bytes=sizes.mapped_bytes if copies_shards else 0,
        output_bytes=round(rows * (ROW_NUMBERS_BYTES + sizes.source.on_disk) + outcomes),
        temporary_bytes=round((pairs + rows) * CANDIDATE_BYTES_ON_DISK + rows * sizes.source.on_disk),
        seconds=_attribute_seconds(
            sizes, num_queries, num_blocks, pairs, rows, query, search_seconds, check_seconds, rates, num_workers
        ),
        num_writes=num_blocks * (2 * sizes.num_shards + 4) + sizes.num_shards + 2,
        num_reads=sizes.num_shards * (6 + 6 * num_blocks) + 8 * num_blocks,
        on_gpus=on_gpus,
    )


def _attribute_seconds(
    sizes: ShardSizes,
    num_queries: int,
    num_blocks: int,
    pairs: int,
    rows: int,
    query: RowBytes,
    search_seconds: float,
    check_seconds: float,
    rates: AnswerRates,
    num_workers: int,
) -> float:
    """pairs: (query, source) that the shards propose; rows: that are written."""
    shards, parts = sizes.num_shards, shard_parts(sizes.num_shards, num_workers)
    opening = sizes.num_vectors * sizes.file_bytes_per_vector / rates.hashed_bytes_per_second
    reading = (1 + shards) * num_queries * 2 * sizes.dimension / rates.table_bytes_per_second
    scoring = pairs * 2 * sizes.dimension / rates.scored_bytes_per_second
    searching = search_seconds + check_seconds + opening + reading + scoring
    # Who searches the largest shard ends last.
    searching = max(searching / num_workers, searching * sizes.shard_vectors / sizes.num_vectors / parts[0])
    merging = 2 * pairs / rates.ordered_pairs_per_second
    row_bytes = FIXED_ROW_BYTES + STAMP_BYTES + sizes.source.in_memory + query.in_memory
    table_bytes = 3 * pairs * CANDIDATE_BYTES + sizes.num_vectors * sizes.source.in_memory + rows * row_bytes
    # Lists, candidates, what is merged and wanted, sources and results are written; most of them are read by a task each.
    described = shards * describe_parts(shards)
    files = num_blocks * (13 + 5 * shards + 2 * described)
    tasks = probe_groups(num_blocks, num_queries, num_workers) + sum(parts) + described + 2 * num_blocks
    fixed = files * FILE_SECONDS + tasks * TASK_SECONDS
    spread = merging + table_bytes / rates.table_bytes_per_second + fixed
    return START_SECONDS + 5 * PHASE_SECONDS + searching + spread / num_workers
