"""What the index and attribute jobs will need. The peaks are counted in the order in which the code below holds its arrays.

n: vectors of the largest shard; d: dimension; q: queries of a block. Bytes per row are those of attrib/index.py, search.py and attribution.py.
"""

from dataclasses import dataclass

from attrib import index, search
from attrib.estimates import READER_BYTES, TABLE_COPIES, WRITER_BYTES, Estimate, embedding_row_bytes
from attrib.planning import IndexPlan
from attrib.probing import MachineRates, RowBytes
from attrib.template import KMEANS_ITERATIONS, MAX_POINTS_PER_CENTROID

READ_COPIES = 6  # of a column while Arrow reads it and rows are picked: pages, chunks, what is picked; its pool gives none of it back
SOURCES_COPIES = 3.5  # of the sources' table: as read and sorted, in the shard's order, as written
COMPACTED_BYTES = 50  # of a hit (query int64, position int64, score float32) while hits are joined and sorted
CANDIDATE_BYTES = 24
CANDIDATE_BYTES_ON_DISK = 16  # ids of sources and scores do not compress, ids of queries repeat
MERGE_COPIES = 8  # of a block's candidates
SCORE_BYTES = 12  # of a (query, vector) cell: the products, and copies of them in which a floor is looked for
SCAN_READAHEAD_ROWS = 1 << 20  # of sources.parquet that Arrow decodes ahead
STAMP_BYTES = 160  # run id and digests of an attribution row, in memory
FIXED_ROW_BYTES = 40  # its numbers
ROW_NUMBERS_BYTES = 12  # on disk: source id and similarity; most shares are zero, and what belongs to the query repeats
OUTCOME_NUMBERS_BYTES = 24


@dataclass(frozen=True)
class ShardSizes:
    """shard_vectors: of the largest; partition_rows: of the largest partition; code_bytes: 0 for kinds that are not compressed; source: of a row of
    sources.parquet."""

    num_vectors: int
    num_shards: int
    shard_vectors: int
    dimension: int
    num_lists: int
    code_bytes: int
    source: RowBytes
    partition_rows: int = 16_384

    @property
    def file_bytes_per_vector(self) -> int:
        return 2 * self.dimension + 4 + 8 + self.code_bytes

    @property
    def mapped_bytes(self) -> int:
        return self.shard_vectors * self.file_bytes_per_vector

    @property
    def template_bytes(self) -> int:
        return 4 * self.dimension * self.num_lists

    @property
    def disk_bytes(self) -> int:
        """Of all shards."""
        vectors = self.num_vectors * (self.file_bytes_per_vector + self.source.on_disk)
        return round(vectors + self.num_shards * 8 * (self.num_lists + 1) + self.template_bytes)


def shard_sizes(
    dimension: int, plan: IndexPlan, num_vectors: list[int], partition_rows: int, source: RowBytes
) -> ShardSizes:
    """num_vectors: of each shard."""
    code_bytes = {"ivf_sq8": dimension, "ivf_pq": plan.pq_bytes}.get(plan.kind, 0)
    sizes = sum(num_vectors), len(num_vectors), max(num_vectors)
    return ShardSizes(*sizes, dimension, plan.num_lists, code_bytes, source, partition_rows)


def estimate_index(
    sizes: ShardSizes,
    training_rows: int,
    held_out_rows: int,
    baseline_bytes: int,
    rates: MachineRates,
    num_workers: int,
) -> Estimate:
    """training_rows: 0 for kind flat."""
    n, d = sizes.shard_vectors, sizes.dimension
    training_rows = min(training_rows, sizes.num_vectors) if sizes.num_lists else 0
    sampled = training_rows + held_out_rows
    num_workers = min(num_workers, sizes.num_shards)
    building = build_bytes(sizes)
    # float16 as it arrives, float32, and the squares of its norms
    training = training_rows * (2 + 4 + 4) * d + 2 * sizes.template_bytes
    seconds_assigning = 2 * sizes.num_vectors * sizes.num_lists * d / rates.flops_per_second
    points = min(training_rows, MAX_POINTS_PER_CENTROID * sizes.num_lists)
    seconds_training = KMEANS_ITERATIONS * 2 * points * sizes.num_lists * d / rates.flops_per_second
    files = sizes.num_vectors * sizes.file_bytes_per_vector
    seconds_files = files * (2 / rates.written_bytes_per_second + 1 / rates.hashed_bytes_per_second)
    seconds_tables = sizes.num_vectors * embedding_row_bytes(d) / rates.read_bytes_per_second
    seconds_exact = (
        2 * held_out_rows * sizes.num_vectors * d / rates.flops_per_second + files / rates.hashed_bytes_per_second
    )
    return Estimate(
        num_workers=num_workers,
        worker_bytes=baseline_bytes + max(building, training),
        driver_bytes=baseline_bytes + 3 * 2 * d * sampled,
        mapped_bytes=2 * d * n + sizes.mapped_bytes,  # as they arrive, and in order
        scratch_bytes=2 * d * n + sizes.mapped_bytes,
        output_bytes=sizes.disk_bytes,
        seconds=seconds_training + (seconds_assigning + seconds_files + seconds_tables + seconds_exact) / num_workers,
        num_writes=sizes.num_shards * 7 + 3,
        num_reads=sizes.num_shards * 4 * 6 + 2 * -(-sizes.num_vectors // sizes.partition_rows),
    )


def build_bytes(sizes: ShardSizes) -> int:
    """Held by a worker that builds one shard, beyond its libraries; what it maps is not counted."""
    n, d = sizes.shard_vectors, sizes.dimension
    rows = min(n, sizes.partition_rows)
    sources = SOURCES_COPIES * n * sizes.source.in_memory
    reading = READ_COPIES * 2 * d * rows
    blocks = 2 * min(4 * d * rows, index.BLOCK_BYTES)  # as float32, and the squares of their norms
    ordering = (2 * 8 + 3 * 8) * n  # ids and lists; once more in order, with the order itself
    return round(READER_BYTES + WRITER_BYTES + sources + sizes.template_bytes + reading + blocks + ordering)


def search_bytes(
    sizes: ShardSizes, num_queries: int, nprobe: int, num_candidates: int, block_rows: int | None = None
) -> int:
    """Held by a worker that takes `num_queries` queries through one shard, beyond its libraries; the shard's own files are mapped and not counted.

    nprobe: 0 for exact search. num_candidates: per query; k where vectors are scanned, and what is re-ranked where codes are. block_rows: queries
    that are read at a time (None: all).
    """
    d, wanted = sizes.dimension, min(num_candidates, sizes.shard_vectors)
    read_rows = min(block_rows or num_queries, num_queries)
    reading = READ_COPIES * 2 * d * read_rows
    converting = read_rows * (2 * 2 * d + 2 * 4 * d)  # joined, by id, as float32, and the squares of their norms
    # Blocks, and all of them joined.
    queries = (4 * d + 8) * num_queries * (2 if read_rows < num_queries else 1)
    rows = min(num_queries, search.QUERY_ROWS, search.SCAN_CELLS // max(nprobe, 1))
    share = nprobe / sizes.num_lists if nprobe and sizes.num_lists else 1.0
    # Hits are compacted when there are four times as many as are kept; a short scan never finds so many.
    hits = min(max(5 * rows * wanted, 1 << 16), rows * share * sizes.shard_vectors)
    block = min(search.BLOCK_ROWS, sizes.shard_vectors)
    cells = min(search.SCORE_CELLS, rows * share * block)
    probing = 24 * rows * nprobe
    scanning = queries + probing + max(COMPACTED_BYTES * hits, SCORE_BYTES * cells + 2 * 4 * d * block)
    answering = queries + 2 * 2 * CANDIDATE_BYTES * num_queries * wanted
    return round(READER_BYTES + 3 * sizes.template_bytes + reading + max(converting, scanning, answering))


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
    baseline_bytes: int,
    rates: MachineRates,
    num_workers: int,
    copies_shards: bool,
    on_gpus: bool = False,
) -> Estimate:
    """queries_together: in one pass over a shard; num_candidates: per query and shard (top_k where vectors are scanned); query: a manifest row of
    the queries; search_seconds: of one worker, from the planner; copies_shards: from an object store to the local disk."""
    block_rows, queries_together = min(block_rows, num_queries), min(queries_together, num_queries)
    num_blocks = -(-num_queries // max(1, block_rows))
    pairs = num_queries * min(num_candidates, sizes.shard_vectors) * sizes.num_shards
    scoring = pairs * 2 * sizes.dimension / rates.scored_bytes_per_second
    opening = sizes.num_vectors * sizes.file_bytes_per_vector / rates.hashed_bytes_per_second
    rows = num_queries * min(top_k, sizes.num_vectors)
    row_bytes = FIXED_ROW_BYTES + STAMP_BYTES + sizes.source.in_memory + query.in_memory
    tables = (2 * pairs * CANDIDATE_BYTES + rows * row_bytes) / rates.table_bytes_per_second
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
        seconds=(search_seconds + scoring + opening + tables) / num_workers,
        num_writes=num_blocks * (2 * sizes.num_shards + 4) + 2,
        num_reads=sizes.num_shards * (6 + 6 * num_blocks) + 8 * num_blocks,
        on_gpus=on_gpus,
    )
