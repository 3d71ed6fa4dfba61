"""What breaks first: quantities that grow with the number of sources, their limits, and the sources at each limit.

The number of sources at which a quantity exceeds its limit is found by bisection; all other settings stay as in
the target.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attrib.capacity.layout import EMBED_BLOCKS, Cut, Layout, file_counts, lay_out
from attrib.capacity.settings import ScaleSettings
from attrib.common.formats import GIB

MAX_SOURCES = 10**15
HOUR = 3600.0
FOUND_BYTES = 24  # of a candidate that is returned to the driver: query, id and two scores
SEARCH_ROWS = 131_072  # queries that a search task holds at a time, as in attrib.attribute.job


@dataclass(frozen=True)
class Growth:
    """A quantity that grows with the number of sources. order: "linear" or "quadratic"; amount: in `unit`."""

    name: str
    order: str
    unit: str
    amount: Callable[[Layout], float]
    limit: float
    limited_by: str
    remedy: str


@dataclass(frozen=True)
class Break:
    """The quantity at the target, and the smallest number of sources above its limit (None: not below MAX_SOURCES)."""

    growth: Growth
    at_target: float
    num_sources: int | None


def breaks(settings: ScaleSettings) -> list[Break]:
    """All quantities; the one that exceeds its limit at the fewest sources comes first."""
    target, found = settings.target, []
    for growth in growths(settings):
        at_target = growth.amount(lay_out(target))
        found.append(Break(growth, at_target, _first_above(settings, growth)))
    return sorted(found, key=lambda b: (b.num_sources or MAX_SOURCES, -b.at_target / b.growth.limit))


def _first_above(settings: ScaleSettings, growth: Growth) -> int | None:
    def over(num_sources: int) -> bool:
        return growth.amount(lay_out(settings.target.model_copy(update={"num_sources": num_sources}))) > growth.limit

    low, high = 1, MAX_SOURCES
    if not over(high):
        return None
    while high - low > max(1, low // 1000):  # to three digits
        middle = round((low * high) ** 0.5) if high > 2 * low else (low + high) // 2
        low, high = (low, middle) if over(middle) else (middle, high)
    return high


def growths(settings: ScaleSettings) -> Iterator[Growth]:
    target, constants = settings.target, settings.constants
    embed, search = settings.machines[target.embed_on], settings.machines[target.search_on]
    driver = target.driver_memory_gib * GIB
    build, night = target.build_hours * HOUR, target.night_hours * HOUR
    pickle_rate, network = constants.pickle_bytes_per_second.value, search.network_gbit_per_second * 1e9 / 8
    yield Growth(
        "ids of all images in the driver's memory while collisions are resolved",
        "linear",
        "bytes",
        lambda layout: layout.sources.num_images * constants.driver_bytes_per_image.value,
        driver,
        "memory of the driver",
        "resolve collisions in tasks, one per range of ids",
    )
    yield Growth(
        "list of pending chunks in the driver's memory",
        "linear",
        "bytes",
        lambda layout: layout.sources.num_chunks * constants.driver_bytes_per_chunk.value,
        driver,
        "memory of the driver",
        "plan chunks partition by partition while the job runs; raise chunk_rows",
    )
    yield Growth(
        "failures of all partitions in the driver's memory",
        "linear",
        "bytes",
        lambda layout: layout.sources.num_images * target.failed_share * constants.driver_bytes_per_failure.value,
        driver,
        "memory of the driver",
        "write failures per partition",
    )
    yield Growth(
        "candidates of the held-out images from all shards in the driver's memory",
        "linear",
        "bytes",
        lambda layout: layout.num_shards * target.held_out_rows * (layout.num_candidates + 1.0) * FOUND_BYTES,
        driver,
        "memory of the driver",
        "merge shard by shard; raise shard_rows",
    )
    yield Growth(
        "sizes of all partitions, sent with every task that uses the manifest or the embeddings",
        "quadratic",
        "bytes",
        lambda layout: partition_argument_bytes(settings, layout.sources, 3 * layout.sources.num_partitions),
        pickle_rate * build / 10,
        "a tenth of build_hours, in the driver",
        "put the manifest in Ray's object store once",
    )
    yield Growth(
        "records of all shards, sent with every search and merge task",
        "quadratic",
        "bytes",
        lambda layout: shard_argument_bytes(settings, layout, layout.num_shards + layout.num_blocks),
        pickle_rate * night / 10,
        "a tenth of night_hours, in the driver",
        "put the record of the index in Ray's object store once",
    )
    if target.sidecar_row_bytes:
        yield Growth(
            "metadata table, read whole for every manifest partition",
            "quadratic",
            "core seconds",
            lambda layout: sidecar_bytes(settings, layout.sources) / constants.scan_bytes_per_second.value,
            embed.num_cpus * build,
            "one machine for build_hours",
            "divide the table by the hash of its key once, then join each partition with its own part",
        )
    yield Growth(
        "one listing request per partition, in sequence, before the first image is embedded",
        "linear",
        "seconds",
        lambda layout: layout.sources.num_partitions * constants.request_seconds.value,
        build / 10,
        "a tenth of build_hours",
        "list the folder of chunks once, recursively",
    )
    yield Growth(
        "images read one by one",
        "linear",
        "requests",
        lambda layout: layout.sources.num_images * constants.requests_per_image.value,
        constants.reads_per_prefix_second.value * build,
        "reads per second of one prefix of the object store",
        "read the images of a chunk with one range request; use several prefixes",
    )
    yield Growth(
        "chunk files, written once and deleted when partitions are assembled",
        "linear",
        "requests",
        lambda layout: (1 + constants.requests_per_write.value) * layout.sources.num_chunks,
        constants.writes_per_prefix_second.value * build,
        "writes per second of one prefix of the object store",
        "raise chunk_rows",
    )
    yield Growth(
        "images per block of Ray Data (at most 10,000 blocks)",
        "linear",
        "images per block",
        lambda layout: layout.sources.num_images / min(layout.sources.num_chunks, EMBED_BLOCKS),
        build / 20 * constants.embed_efficiency.value / _seconds_per_image(settings),
        "a twentieth of build_hours for one block; longer blocks leave workers idle at the end",
        "increase the number of blocks with the number of workers",
    )
    yield Growth(
        "candidates of every query and shard, in partial files",
        "linear",
        "bytes",
        lambda layout: (
            file_counts(layout, target, constants)["attributions/_partials/block-#/shard-#.parquet"].num_bytes
        ),
        network * 8 * night / 10,
        "network of 8 machines for a tenth of night_hours",
        "merge in several steps (tree); raise shard_rows",
    )
    yield Growth(
        "query vectors, read once per shard",
        "linear",
        "bytes",
        lambda layout: layout.num_shards * target.num_queries * 2.0 * target.dimension,
        network * 8 * night / 10,
        "network of 8 machines for a tenth of night_hours",
        "search several shards in one task",
    )
    yield Growth(
        "partial files, one per shard and query block",
        "linear",
        "requests",
        lambda layout: (1 + constants.requests_per_write.value) * layout.num_shards * layout.num_blocks,
        constants.writes_per_prefix_second.value * night / 10,
        "writes per second of one prefix, for a tenth of night_hours",
        "raise shard_rows or query_block_rows",
    )
    yield Growth(
        "candidates of one block, merged in one task",
        "linear",
        "seconds",
        lambda layout: found_rows(layout) / layout.num_blocks / constants.merge_rows_per_second.value,
        night / 4,
        "a quarter of night_hours for one task",
        "lower query_block_rows",
    )


def _seconds_per_image(settings: ScaleSettings) -> float:
    constants = settings.constants
    seconds = 1 / constants.decode_images_per_second.value
    if not settings.machines[settings.target.embed_on].num_gpus:
        seconds += 1 / constants.forward_images_per_core_second.value
    return seconds


def unit_argument_bytes(settings: ScaleSettings, cut: Cut) -> float:
    """Arguments of the manifest's tasks: each receives the listings of its own slices."""
    return cut.num_slices * settings.constants.argument_bytes_per_unit.value


def partition_argument_bytes(settings: ScaleSettings, cut: Cut, num_tasks: int) -> float:
    """Arguments of tasks that receive the manifest or the embeddings with the sizes of all partitions."""
    return num_tasks * cut.num_partitions * settings.constants.argument_bytes_per_partition.value


def shard_argument_bytes(settings: ScaleSettings, layout: Layout, num_tasks: int) -> float:
    """Arguments of the attribute job's tasks: each receives the records of all shards."""
    return num_tasks * layout.num_shards * settings.constants.argument_bytes_per_shard.value


def sidecar_bytes(settings: ScaleSettings, cut: Cut) -> float:
    """Read by the manifest's tasks: each reads the whole metadata table."""
    return cut.num_partitions * cut.num_images * settings.target.sidecar_row_bytes


def found_rows(layout: Layout) -> float:
    """Number of candidates in all partial files."""
    return float(layout.queries.num_images * layout.num_shards * min(layout.num_candidates, layout.shard_vectors))


def coarse_seconds(settings: ScaleSettings, layout: Layout, num_queries: float) -> float:
    """Core seconds to compare the queries with all centroids."""
    products = num_queries * layout.num_lists * settings.target.dimension
    return products * settings.constants.block_product_seconds.value


def search_seconds(settings: ScaleSettings, layout: Layout, num_queries: int) -> float:
    """Core seconds to search all shards in batches of SEARCH_ROWS queries, as in attrib.index.cost_model."""
    target, constants = settings.target, settings.constants
    vectors, dimension, lists = layout.sources.num_images, target.dimension, layout.num_lists
    batches = -(-num_queries // SEARCH_ROWS)
    if not lists:
        products = float(num_queries) * vectors * dimension * constants.block_product_seconds.value
        return products + batches * vectors * dimension * constants.value_seconds.value
    probed = min(1.0, target.nprobe / lists)
    visited = 1 - (1 - probed) ** (num_queries / batches)  # share of the lists that any query of a batch probes
    visits = layout.num_shards * lists * visited * constants.list_visit_seconds.value
    widened = vectors * dimension * visited * constants.value_seconds.value
    products = num_queries * probed * vectors * dimension * constants.list_product_seconds.value
    return coarse_seconds(settings, layout, num_queries) + batches * (visits + widened) + products
