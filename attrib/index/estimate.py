"""Estimate of the index job, and the memory of a search. A peak is the sum of the arrays held at one moment.

n: vectors of the largest shard; d: dimension. Bytes per row match attrib/index/{shard,search}.py.
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

# Sizes of the tasks of a search.
DESCRIBED_AT_ONCE = 4  # minimum number of parts for the lookup of the metadata of sources
READ_ROWS = 16_384  # minimum number of queries read together: the row groups of their files
FILLED_SHARE = 0.75  # of the workers, in the last round of tasks of a phase

# Copies and bytes per row, fitted to peaks of memory on 2026-11-21.
READ_COPIES = 6  # of a column that Arrow reads and indexes; its pool returns nothing to the system
SOURCES_COPIES = 3.5  # of the table of sources: read, sorted, in the order of the shard, written
COMPACTED_BYTES = 50  # of a hit (query int64, position int64, score float32) while hits are joined and sorted
CANDIDATE_BYTES = 24
SCORE_BYTES = 12  # of a (query, vector) cell: the product, and its copies during the search for a floor

START_SECONDS = 0.7  # records, rates, admission, phases; on a local disk and a warm cluster, on 2026-11-21


class IndexTask(StrEnum):
    """Kinds of Ray tasks of the index job, as `num_tasks` of its record counts them."""

    SAMPLE = "sample"  # one partition of the embeddings
    TRAIN = "train"
    BUILD = "build"  # one shard
    RECALL = "recall"  # one search of a shard for the held-out images
    RATES = "rates"


@dataclass(frozen=True)
class ShardSizes:
    """Sizes of an index.

    shard_vectors: of the largest shard; code_bytes: per vector, 0 without compression; source: a row of
    sources.parquet; partition_rows: of the largest partition.
    """

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
        """Return the bytes on disk of all shards."""
        return round(self.num_vectors * (self.file_bytes_per_vector + self.source.on_disk) + self.template_bytes)


def shard_sizes(
    dimension: int, plan: IndexPlan, num_vectors: list[int], partition_rows: int, source: RowBytes
) -> ShardSizes:
    """Return the sizes of an index. num_vectors: of each shard."""
    code_bytes = {"ivf_sq8": dimension, "ivf_pq": plan.pq_bytes}.get(plan.kind, 0)
    counts = sum(num_vectors), len(num_vectors), max(num_vectors)
    return ShardSizes(*counts, dimension, plan.num_lists, code_bytes, source, partition_rows)


def shard_parts(num_shards: int, num_workers: int) -> list[int]:
    """Return the number of parts of the work of each shard, chosen so that all workers finish together.

    Shards that fill whole rounds stay in one part, because each part opens the shard and visits the same lists again.
    """
    rest, parts = num_shards % num_workers, 1
    while rest * parts < FILLED_SHARE * num_workers * -(-rest * parts // num_workers):
        parts += 1
    return [1] * (num_shards - rest) + [parts] * rest


def describe_parts(num_shards: int) -> int:
    """Return the number of parts in which the metadata of each shard's sources is looked up.

    It does not depend on the number of workers, because a restart on another cluster must find the files of the parts.
    """
    return max(1, -(-DESCRIBED_AT_ONCE // num_shards))


def probe_groups(num_blocks: int, num_queries: int, num_workers: int) -> int:
    """Return the number of tasks that read the blocks before a search, about READ_ROWS queries each."""
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
    """Return the estimate. training_rows: 0 if the coarse quantizer exists already; training_threads: of that task."""
    n, d = sizes.shard_vectors, sizes.dimension
    training_rows = min(training_rows, sizes.num_vectors) if sizes.num_lists else 0
    # Received float16, float32, and squares for the norms.
    training = training_rows * (2 + 4 + 4) * d + (2 * sizes.template_bytes if training_rows else 0)
    on_disk = 2 * d * n + sizes.mapped_bytes  # received, and in the order of the lists
    return Estimate(
        num_workers=min(num_workers, sizes.num_shards),
        worker_bytes=baseline_bytes + max(build_bytes(sizes), training),
        driver_bytes=baseline_bytes + 3 * 2 * d * (training_rows + held_out_rows),
        mapped_bytes=on_disk,
        scratch_bytes=on_disk,
        output_bytes=sizes.disk_bytes,
        seconds=_index_seconds(sizes, training_rows, held_out_rows, rates, num_workers, training_threads),
        num_writes=sizes.num_shards * 7 + 3,
        num_reads=sizes.num_shards * 4 * 6 + 2 * -(-sizes.num_vectors // sizes.partition_rows),
    )


def _index_seconds(
    sizes: ShardSizes, training_rows: int, held_out_rows: int, rates: MachineRates, num_workers: int, threads: int
) -> float:
    n, d, lists = sizes.num_vectors, sizes.dimension, sizes.num_lists
    reading = n * embedding_row_bytes(d) / rates.decoded_bytes_per_second
    sources = 3 * n * sizes.source.in_memory / rates.decoded_bytes_per_second
    sampling = 3 * 2 * d * (training_rows + held_out_rows) / rates.decoded_bytes_per_second  # joined by one process
    points = min(training_rows, MAX_POINTS_PER_CENTROID * lists)
    training = KMEANS_ITERATIONS * 2 * points * lists * d / rates.flops_per_second / threads
    products = 2 * n * (lists + held_out_rows) * d / rates.flops_per_second  # lists, and exact neighbours
    files = n * sizes.file_bytes_per_vector * (2 / rates.written_bytes_per_second + 2 / rates.hashed_bytes_per_second)
    # The worker with the largest shard finishes last.
    share = max(1 / min(num_workers, sizes.num_shards), sizes.shard_vectors / n)
    building = share * (products + reading + files + sources)
    return START_SECONDS + reading / num_workers + sampling + training + building


def build_bytes(sizes: ShardSizes) -> int:
    """Return the memory of a worker that builds one shard, without libraries and mapped files."""
    n, d = sizes.shard_vectors, sizes.dimension
    rows = min(n, sizes.partition_rows)
    sources = SOURCES_COPIES * n * sizes.source.in_memory
    reading = READ_COPIES * 2 * d * rows
    blocks = 2 * min(4 * d * rows, shard.BLOCK_BYTES)  # float32, and squares for the norms
    ordering = (2 * 8 + 3 * 8) * n  # ids and lists, the order, and both in order
    return round(READER_BYTES + WRITER_BYTES + sources + sizes.template_bytes + reading + blocks + ordering)


def search_bytes(
    sizes: ShardSizes, num_queries: int, nprobe: int, num_candidates: int, block_rows: int | None = None
) -> int:
    """Return the memory of a worker that searches one shard for `num_queries`, without libraries and mapped shard.

    nprobe: 0 for exact search. num_candidates: per query: k if vectors are scanned, the number to re-rank for codes.
    block_rows: queries read at a time (None: all).
    """
    d, wanted = sizes.dimension, min(num_candidates, sizes.shard_vectors)
    read_rows = min(max(block_rows, READ_ROWS) if block_rows else num_queries, num_queries)
    reading = READ_COPIES * 2 * d * read_rows
    converting = read_rows * (2 * 2 * d + 2 * 4 * d)  # joined, by id, float32, and squares for the norms
    queries = (4 * d + 8) * num_queries * (2 if read_rows < num_queries else 1)  # twice while blocks are joined
    rows = min(num_queries, search.QUERY_ROWS, search.SCAN_CELLS // max(nprobe, 1))
    share = nprobe / sizes.num_lists if nprobe and sizes.num_lists else 1.0
    # Hits are compacted at four times the number kept; a short scan finds fewer.
    hits = min(max(5 * rows * wanted, 1 << 16), rows * share * sizes.shard_vectors)
    block = min(search.BLOCK_ROWS, sizes.shard_vectors)
    cells = min(search.SCORE_CELLS, rows * share * block)
    scanning = 24 * rows * nprobe + max(COMPACTED_BYTES * hits, SCORE_BYTES * cells + 2 * 4 * d * block)
    answering = 2 * 2 * CANDIDATE_BYTES * num_queries * wanted
    peak = max(converting, queries + scanning, queries + answering)
    return round(READER_BYTES + 3 * sizes.template_bytes + reading + peak)
