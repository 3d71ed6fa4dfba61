"""What breaks first: quantities that grow with the number of sources, their limits, and the sources at each limit."""

from collections.abc import Callable
from dataclasses import dataclass

from attrib.capacity.layout import EMBED_BLOCKS, PARTIALS, Layout, file_counts, lay_out
from attrib.capacity.settings import ScaleSettings
from attrib.common.formats import GIB

MAX_SOURCES = 10**15
HOUR = 3600.0
FOUND_BYTES = 24  # of a candidate that is returned to the driver: query, id and two scores
SEARCH_ROWS = 131_072  # queries that a search task holds at a time, as in attrib.attribute.job


@dataclass(frozen=True)
class Growth:
    """A quantity, in `unit`, that grows with the number of sources. order: "linear" or "quadratic"."""

    name: str
    unit: str
    limit: float
    limited_by: str
    amount: Callable[[Layout], float]
    remedy: str
    order: str = "linear"


@dataclass(frozen=True)
class Break:
    """The quantity at the target, and the smallest number of sources above its limit (None: not below MAX_SOURCES)."""

    growth: Growth
    at_target: float
    num_sources: int | None


def breaks(settings: ScaleSettings) -> list[Break]:
    """All quantities; the one that exceeds its limit at the fewest sources comes first."""
    layout = lay_out(settings.target)
    found = [Break(growth, growth.amount(layout), _first_above(settings, growth)) for growth in growths(settings)]
    return sorted(found, key=lambda b: (b.num_sources or MAX_SOURCES, -b.at_target / b.growth.limit))


def _first_above(settings: ScaleSettings, growth: Growth) -> int | None:
    """By bisection, to three digits; all other settings stay as in the target."""

    def over(num_sources: int) -> bool:
        return growth.amount(lay_out(settings.target.model_copy(update={"num_sources": num_sources}))) > growth.limit

    low, high = 1, MAX_SOURCES
    if not over(high):
        return None
    while high - low > max(1, low // 1000):
        middle = round((low * high) ** 0.5) if high > 2 * low else (low + high) // 2
        low, high = (low, middle) if over(middle) else (middle, high)
    return high


def growths(settings: ScaleSettings) -> list[Growth]:
    target, c = settings.target, settings.constants.values()
    embed, search = settings.machines[target.embed_on], settings.machines[target.search_on]
    build, night = target.build_hours * HOUR, target.night_hours * HOUR
    image_seconds = 1 / c.decode_images_per_second
    if not embed.num_gpus:
        image_seconds += 1 / c.forward_images_per_core_second
    # Limits: unit, value, and the resource.
    memory = "bytes", target.driver_memory_gib * GIB, "memory of the driver"
    build_pickling = "bytes", c.pickle_bytes_per_second * build / 10, "a tenth of build_hours, in the driver"
    night_pickling = "bytes", c.pickle_bytes_per_second * night / 10, "a tenth of night_hours, in the driver"
    listing = "seconds", build / 10, "a tenth of build_hours"
    reads = "requests", c.reads_per_prefix_second * build, "reads per second of one prefix of the object store"
    writes = "requests", c.writes_per_prefix_second * build, "writes per second of one prefix of the object store"
    network_bytes = search.network_gbit_per_second * 1e9 / 8 * 8 * night / 10
    network = "bytes", network_bytes, "network of 8 machines for a tenth of night_hours"
    night_writes = c.writes_per_prefix_second * night / 10
    partial_writes = "requests", night_writes, "writes per second of one prefix, for a tenth of night_hours"
    merging = "seconds", night / 4, "a quarter of night_hours for one task"
    per_write = 1 + c.requests_per_write
    found = [
        Growth(
            "ids of all images in the driver's memory while collisions are resolved",
            *memory,
            lambda layout: layout.sources.num_images * c.driver_bytes_per_image,
            "resolve collisions in tasks, one per range of ids",
        ),
        Growth(
            "list of pending chunks in the driver's memory",
            *memory,
            lambda layout: layout.sources.num_chunks * c.driver_bytes_per_chunk,
            "plan chunks partition by partition while the job runs; raise chunk_rows",
        ),
        Growth(
            "failures of all partitions in the driver's memory",
            *memory,
            lambda layout: layout.sources.num_images * target.failed_share * c.driver_bytes_per_failure,
            "write failures per partition",
        ),
        Growth(
            "candidates of the held-out images from all shards in the driver's memory",
            *memory,
            lambda layout: layout.num_shards * target.held_out_rows * (layout.num_candidates + 1.0) * FOUND_BYTES,
            "merge shard by shard; raise shard_rows",
        ),
        Growth(
            "sizes of all partitions, sent with every task that uses the manifest or the embeddings",
            *build_pickling,
            lambda layout: 3 * layout.sources.num_partitions**2 * c.argument_bytes_per_partition,
            "put the manifest in Ray's object store once",
            "quadratic",
        ),
        Growth(
            "records of all shards, sent with every search and merge task",
            *night_pickling,
            lambda layout: (layout.num_shards + layout.num_blocks) * layout.num_shards * c.argument_bytes_per_shard,
            "put the record of the index in Ray's object store once",
            "quadratic",
        ),
        Growth(
            "one listing request per partition, in sequence, before the first image is embedded",
            *listing,
            lambda layout: layout.sources.num_partitions * c.request_seconds,
            "list the folder of chunks once, recursively",
        ),
        Growth(
            "images read one by one",
            *reads,
            lambda layout: layout.sources.num_images * c.requests_per_image,
            "read the images of a chunk with one range request; use several prefixes",
        ),
        Growth(
            "chunk files, written once and deleted when partitions are assembled",
            *writes,
            lambda layout: per_write * layout.sources.num_chunks,
            "raise chunk_rows",
        ),
        Growth(
            "images per block of Ray Data (at most 10,000 blocks)",
            "images per block",
            build / 20 * c.embed_efficiency / image_seconds,
            "a twentieth of build_hours for one block; longer blocks leave workers idle at the end",
            lambda layout: layout.sources.num_images / min(layout.sources.num_chunks, EMBED_BLOCKS),
            "increase the number of blocks with the number of workers",
        ),
        Growth(
            "candidates of every query and shard, in partial files",
            *network,
            lambda layout: file_counts(layout, target, settings.constants)[PARTIALS].num_bytes,
            "merge in several steps (tree); raise shard_rows",
        ),
        Growth(
            "query vectors, read once per shard",
            *network,
            lambda layout: layout.num_shards * target.num_queries * 2.0 * target.dimension,
            "search several shards in one task",
        ),
        Growth(
            "partial files, one per shard and query block",
            *partial_writes,
            lambda layout: per_write * layout.num_shards * layout.num_blocks,
            "raise shard_rows or query_block_rows",
        ),
        Growth(
            "candidates of one block, merged in one task",
            *merging,
            lambda layout: found_rows(layout) / layout.num_blocks / c.merge_rows_per_second,
            "lower query_block_rows",
        ),
    ]
    if target.sidecar_row_bytes:
        row_seconds = target.sidecar_row_bytes / c.scan_bytes_per_second
        sidecar = Growth(
            "metadata table, read whole for every manifest partition",
            "core seconds",
            embed.num_cpus * build,
            "one machine for build_hours",
            lambda layout: layout.sources.num_partitions * layout.sources.num_images * row_seconds,
            "divide the table by the hash of its key once, then join each partition with its own part",
            "quadratic",
        )
        found.append(sidecar)
    return found


def found_rows(layout: Layout) -> float:
    """Number of candidates in all partial files."""
    return float(layout.queries.num_images * layout.num_shards * min(layout.num_candidates, layout.shard_vectors))


def search_seconds(settings: ScaleSettings, layout: Layout, num_queries: int) -> float:
    """Core seconds to search all shards in batches of SEARCH_ROWS queries, as in attrib.index.cost_model."""
    c, dimension, lists = settings.constants.values(), settings.target.dimension, layout.num_lists
    values, batches = layout.sources.num_images * dimension, -(-num_queries // SEARCH_ROWS)
    if not lists:
        return num_queries * values * c.block_product_seconds + batches * values * c.value_seconds
    probed = min(1.0, settings.target.nprobe / lists)
    visited = 1 - (1 - probed) ** (num_queries / batches)  # share of the lists that any query of a batch probes
    opened = visited * (layout.num_shards * lists * c.list_visit_seconds + values * c.value_seconds)
    coarse = num_queries * lists * dimension * c.block_product_seconds
    return coarse + batches * opened + num_queries * probed * values * c.list_product_seconds
