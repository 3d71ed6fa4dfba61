"""Estimate of the attribute job: memory, bytes and time."""

from dataclasses import dataclass
from enum import StrEnum

from attrib.data.estimate import RowBytes
from attrib.index.estimate import CANDIDATE_BYTES, ShardSizes, describe_parts, search_bytes, shard_parts
from attrib.runtime.estimate import READER_BYTES, TABLE_COPIES, WRITER_BYTES, Estimate
from attrib.runtime.machine import AnswerRates

# Copies and bytes per row, fitted to peaks of memory and to files on 2026-11-21.
MERGE_COPIES = 8  # of the candidates of a block
SCAN_READAHEAD_ROWS = 1 << 20  # of sources.parquet that Arrow decodes ahead
ROW_BYTES = 40 + 160  # of an attribution in memory: numbers; run id and digests
CANDIDATE_BYTES_ON_DISK = 16  # source ids and scores do not compress, query ids repeat
ROW_BYTES_ON_DISK = 12  # id and similarity of a source; shares and query columns compress well
OUTCOME_BYTES_ON_DISK = 24

# Overheads on a local disk and a warm cluster, measured on 2026-11-21. They dominate short jobs.
START_SECONDS = 0.42  # records, rates, admission, phases
FILE_SECONDS = 0.0015  # to open and close a file, or to publish it


class AttributeTask(StrEnum):
    """Kinds of Ray tasks of the attribute job, as `num_tasks` of its record counts them."""

    PROBE = "probe"  # a group of query blocks
    SEARCH = "search"  # a shard, or a part of the queries against it
    MERGE = "merge"  # a block
    DESCRIBE = "describe"  # a part of a shard's metadata
    WRITE = "write"  # a block


@dataclass(frozen=True)
class AttributionWork:
    """Work of an attribute job.

    queries_together: in one pass over a shard; num_candidates: per query and shard (top_k if vectors are scanned);
    nprobe: 0 for exact search; query: a manifest row of the queries; search_seconds, check_seconds: the planner's time
    of one worker for all queries, and for those of the recall check.
    """

    num_queries: int
    queries_together: int
    block_rows: int
    top_k: int
    num_candidates: int
    nprobe: int
    query: RowBytes
    search_seconds: float
    check_seconds: float

    @property
    def num_blocks(self) -> int:
        return -(-self.num_queries // self.block_rows)

    def num_rows(self, sizes: ShardSizes) -> int:
        """Return the number of rows of the result."""
        return self.num_queries * min(self.top_k, sizes.num_vectors)

    def num_pairs(self, sizes: ShardSizes) -> int:
        """Return the number of (query, source) candidates of all shards."""
        return self.num_queries * min(self.num_candidates, sizes.shard_vectors) * sizes.num_shards


def results_bytes(sizes: ShardSizes, work: AttributionWork) -> int:
    """Return the memory of a worker that merges candidates, looks up sources, or writes rows."""
    block_rows, source = work.block_rows, sizes.source.in_memory
    # The table of a shard, its columns and the kept candidates, joined and sorted.
    merging = block_rows * min(work.num_candidates, sizes.shard_vectors) * MERGE_COPIES * CANDIDATE_BYTES
    wanted = work.num_queries * work.top_k / sizes.num_shards
    scanned = min(SCAN_READAHEAD_ROWS, sizes.shard_vectors)
    describing = 3 * 8 * wanted + (scanned + TABLE_COPIES * min(wanted, sizes.shard_vectors)) * source
    rows = block_rows * min(work.top_k, sizes.num_vectors)
    found = TABLE_COPIES * (min(rows, sizes.num_vectors) * source + block_rows * work.query.in_memory)
    writing = CANDIDATE_BYTES * rows + found + 2 * rows * (ROW_BYTES + source + work.query.in_memory)
    return round(READER_BYTES + WRITER_BYTES + max(merging, describing, writing))


def estimate_attribute(
    sizes: ShardSizes,
    work: AttributionWork,
    baseline_bytes: int,
    rates: AnswerRates,
    num_workers: int,
    copies_shards: bool,
    on_gpus: bool = False,
) -> Estimate:
    """Return the estimate. copies_shards: shards are copied from an object store to the local disk."""
    num_blocks, rows = work.num_blocks, work.num_rows(sizes)
    together = min(work.queries_together, work.num_queries)
    searching = search_bytes(sizes, together, work.nprobe, work.num_candidates, work.block_rows)
    outcomes = work.num_queries * (2 * work.query.on_disk + OUTCOME_BYTES_ON_DISK)
    candidates = (work.num_pairs(sizes) + rows) * CANDIDATE_BYTES_ON_DISK
    return Estimate(
        num_workers=num_workers,
        worker_bytes=baseline_bytes + max(searching, results_bytes(sizes, work)),
        driver_bytes=baseline_bytes,
        mapped_bytes=sizes.mapped_bytes,
        scratch_bytes=sizes.mapped_bytes if copies_shards else 0,
        output_bytes=round(rows * (ROW_BYTES_ON_DISK + sizes.source.on_disk) + outcomes),
        temporary_bytes=round(candidates + rows * sizes.source.on_disk),
        seconds=_attribute_seconds(sizes, work, rates, num_workers),
        num_writes=num_blocks * (2 * sizes.num_shards + 4) + sizes.num_shards + 2,
        num_reads=sizes.num_shards * (6 + 6 * num_blocks) + 8 * num_blocks,
        on_gpus=on_gpus,
    )


def _attribute_seconds(sizes: ShardSizes, work: AttributionWork, rates: AnswerRates, num_workers: int) -> float:
    num_queries, num_blocks, shards = work.num_queries, work.num_blocks, sizes.num_shards
    pairs, parts = work.num_pairs(sizes), shard_parts(shards, num_workers)
    opening = sizes.num_vectors * sizes.file_bytes_per_vector / rates.hashed_bytes_per_second
    reading = (1 + shards) * num_queries * 2 * sizes.dimension / rates.table_bytes_per_second
    scoring = pairs * 2 * sizes.dimension / rates.scored_bytes_per_second
    searching = work.search_seconds + work.check_seconds + opening + reading + scoring
    # The worker with the largest shard finishes last.
    searching *= max(1 / num_workers, sizes.shard_vectors / sizes.num_vectors / parts[0])
    row_bytes = ROW_BYTES + sizes.source.in_memory + work.query.in_memory
    sources_bytes = sizes.num_vectors * sizes.source.in_memory
    table_bytes = 3 * pairs * CANDIDATE_BYTES + sources_bytes + work.num_rows(sizes) * row_bytes
    # Lists, candidates, merged and wanted rows, sources and results are written, and most are read again.
    files = num_blocks * (13 + (5 + 2 * describe_parts(shards)) * shards)
    writing = table_bytes / rates.table_bytes_per_second + files * FILE_SECONDS
    return START_SECONDS + searching + writing / num_workers
