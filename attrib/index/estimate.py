"""What the index and attribute jobs will need. The peaks are counted in the order in which the code below holds its arrays.

n: vectors of the largest shard; d: dimension; q: queries of a block. Bytes per row are those of attrib/index/index.py, search.py and attribution.py.
"""

from dataclasses import dataclass
from enum import StrEnum

from attrib.data.estimate import RowBytes
from attrib.embed.estimate import embedding_row_bytes
from attrib.index import search, shard
from attrib.index.planning import IndexPlan
from attrib.index.quantizer import KMEANS_ITERATIONS, MAX_POINTS_PER_CENTROID
from attrib.runtime.estimate import READER_BYTES, WRITER_BYTES, Estimate
from attrib.runtime.machine import MachineRates

DESCRIBED_AT_ONCE = 4  # parts of all shards, at least: each goes through its shard's whole table
READ_ROWS = 16_384  # queries that are read together, at least: their files' row groups
FILLED_SHARE = 0.75  # of the workers, in the last round of a phase's tasks
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

# What a job takes beside its work, on a local disk and a warm cluster of today: rough, for jobs of seconds, which are little else.
START_SECONDS = 0.3  # records, rates, admission
PHASE_SECONDS = 0.02  # until the first task of a phase runs, and from its last to the next
TASK_SECONDS = 0.004  # of Ray
FILE_SECONDS = 0.0015  # to open and close one, or to publish it, beside its bytes
RATES_SECONDS = 0.3  # of attrib/index/cost_model.py
LIST_SECONDS = 7e-5  # of a visited list, beside its products; measured and stored with an index once it is there
ORDER_SECONDS = 1.2e-7  # of a list that is put in order for a held-out image
RECALL_PASSES = 2  # searches until nprobe is found: one where the true neighbours' lists told it at once


class IndexTask(StrEnum):
    """Kinds of Ray tasks of the index job, as `num_tasks` of its record counts them."""

    SAMPLE = "sample"  # one partition of the embeddings
    TRAIN = "train"
    BUILD = "build"  # one shard
    RECALL = "recall"  # one search of a shard for the held-out images
    RATES = "rates"


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


def shard_parts(num_shards: int, num_workers: int) -> list[int]:
    """In how many parts the work of each shard is cut, so that workers end together: shards that fill whole rounds in one, the rest in several.

    Not all: queries that are cut apart visit the same lists again, and each part opens the shard.
    """
    rest, parts = num_shards % num_workers, 1
    while rest * parts < FILLED_SHARE * num_workers * -(-rest * parts // num_workers):
        parts += 1
    return [1] * (num_shards - rest) + [parts] * rest


def describe_parts(num_shards: int) -> int:
    """In how many parts the metadata of each shard's sources is looked up: of few shards in several. Not by the workers that there are, since parts
    are files, which a restart on another cluster must find."""
    return max(1, -(-DESCRIBED_AT_ONCE // num_shards))


def probe_groups(num_blocks: int, num_queries: int, num_workers: int) -> int:
    """Tasks that read the blocks before the search: about READ_ROWS queries in each, and as many for every worker."""
    return min(num_blocks, num_workers * max(1, -(-num_queries // (num_workers * READ_ROWS))))


def estimate_index(
    sizes: ShardSizes,
    training_rows: int,
    held_out_rows: int,
    baseline_bytes: int,
    rates: MachineRates,
    num_workers: int,
    training_threads: int,
) -> Estimate:
    """training_rows: 0 for kind flat, and where the template of an earlier start is there; training_threads: of the task that trains."""
    n, d = sizes.shard_vectors, sizes.dimension
    training_rows = min(training_rows, sizes.num_vectors) if sizes.num_lists else 0
    num_partitions = -(-sizes.num_vectors // sizes.partition_rows)
    building = build_bytes(sizes)
    # float16 as it arrives, float32, and the squares of its norms
    training = training_rows * (2 + 4 + 4) * d + (2 * sizes.template_bytes if training_rows else 0)
    return Estimate(
        num_workers=min(num_workers, sizes.num_shards),
        worker_bytes=baseline_bytes + max(building, training),
        driver_bytes=baseline_bytes + 3 * 2 * d * (training_rows + held_out_rows),
        mapped_bytes=2 * d * n + sizes.mapped_bytes,  # as they arrive, and in order
        scratch_bytes=2 * d * n + sizes.mapped_bytes,
        output_bytes=sizes.disk_bytes,
        seconds=_index_seconds(sizes, training_rows, held_out_rows, rates, num_workers, training_threads),
        num_writes=sizes.num_shards * 7 + 3,
        num_reads=sizes.num_shards * 4 * 6 + 2 * num_partitions,
    )


def _index_seconds(
    sizes: ShardSizes, training_rows: int, held_out_rows: int, rates: MachineRates, num_workers: int, threads: int
) -> float:
    n, d, lists, shards = sizes.num_vectors, sizes.dimension, sizes.num_lists, sizes.num_shards
    # Of the largest shard, relative to a worker's even share: who has it ends last.
    filling = max(1.0, sizes.shard_vectors * min(num_workers, shards) / n)
    num_partitions, files = -(-n // sizes.partition_rows), n * sizes.file_bytes_per_vector
    reading = n * embedding_row_bytes(d) / rates.decoded_bytes_per_second + num_partitions * (
        TASK_SECONDS + FILE_SECONDS
    )
    # All that is drawn is joined and put in order by one process.
    sampling = 3 * 2 * d * (training_rows + held_out_rows) / rates.decoded_bytes_per_second
    points = min(training_rows, MAX_POINTS_PER_CENTROID * lists)
    training = KMEANS_ITERATIONS * 2 * points * lists * d / rates.flops_per_second / threads
    assigning = 2 * n * lists * d / rates.flops_per_second
    publishing = files * (2 / rates.written_bytes_per_second + 1 / rates.hashed_bytes_per_second)
    # Rows of sources are read, sorted and written.
    listing = 3 * n * sizes.source.in_memory / rates.decoded_bytes_per_second
    exact = 2 * held_out_rows * n * d / rates.flops_per_second + files / rates.hashed_bytes_per_second
    visits = RECALL_PASSES * (shards * min(lists, held_out_rows) * LIST_SECONDS) if lists else 0.0
    ordering = held_out_rows * lists * ORDER_SECONDS
    spread = assigning + reading + publishing + listing + exact + visits
    phases = START_SECONDS + (3 + RECALL_PASSES) * PHASE_SECONDS + RATES_SECONDS
    return phases + reading / num_workers + sampling + training + filling * spread / min(num_workers, shards) + ordering


def build_bytes(sizes: ShardSizes) -> int:
    """Held by a worker that builds one shard, beyond its libraries; what it maps is not counted."""
    n, d = sizes.shard_vectors, sizes.dimension
    rows = min(n, sizes.partition_rows)
    sources = SOURCES_COPIES * n * sizes.source.in_memory
    reading = READ_COPIES * 2 * d * rows
    blocks = 2 * min(4 * d * rows, shard.BLOCK_BYTES)  # as float32, and the squares of their norms
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
    read_rows = min(max(block_rows, READ_ROWS) if block_rows else num_queries, num_queries)
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
