"""What breaks first: everything that grows with the number of sources, beside the limit that it meets, and the size at which it does.

Each amount is computed by the formulas of the plan; the size at which it reaches its limit is found by bisection on the number of sources, all
else as in the target.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attrib.capacity.amounts import (
    found_rows,
    partition_argument_bytes,
    shard_argument_bytes,
    sidecar_bytes,
)
from attrib.capacity.layout import EMBED_BLOCKS, Layout, file_counts, lay_out
from attrib.capacity.settings import ScaleSettings
from attrib.capacity.work import FOUND_BYTES, GIB

MAX_SOURCES = 10**15
HOUR = 3600.0


@dataclass(frozen=True)
class Growth:
    """Something that grows. order: how, in the number of sources; amount: of a layout, in unit; limit: what it must not exceed, and why."""

    name: str
    order: str
    unit: str
    amount: Callable[[Layout], float]
    limit: float
    limited_by: str
    remedy: str


@dataclass(frozen=True)
class Break:
    """A growth at the target, and the smallest number of sources at which it passes its limit (None: never below MAX_SOURCES)."""

    growth: Growth
    at_target: float
    num_sources: int | None


def breaks(settings: ScaleSettings) -> list[Break]:
    """Every growth, what breaks first in front."""
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
        "ids of all images in the driver while collisions settle",
        "linear",
        "bytes",
        lambda layout: layout.sources.num_images * constants.driver_bytes_per_image.value,
        driver,
        "driver's memory",
        "settle ids by ranges of their values, one task each",
    )
    yield Growth(
        "list of pending chunks in the driver",
        "linear",
        "bytes",
        lambda layout: layout.sources.num_chunks * constants.driver_bytes_per_chunk.value,
        driver,
        "driver's memory",
        "plan chunks partition by partition while the job runs; raise chunk_rows",
    )
    yield Growth(
        "failures of all partitions gathered in the driver",
        "linear",
        "bytes",
        lambda layout: layout.sources.num_images * target.failed_share * constants.driver_bytes_per_failure.value,
        driver,
        "driver's memory",
        "write failures per partition",
    )
    yield Growth(
        "finds of held-out images, of every shard at once, in the driver",
        "linear",
        "bytes",
        lambda layout: layout.num_shards * target.held_out_rows * (layout.num_candidates + 1.0) * FOUND_BYTES,
        driver,
        "driver's memory",
        "merge shard by shard; larger shards",
    )
    yield Growth(
        "sizes of all partitions, pickled with every task that takes the manifest or the embeddings",
        "quadratic",
        "bytes",
        lambda layout: partition_argument_bytes(settings, layout.sources, 3 * layout.sources.num_partitions),
        pickle_rate * build / 10,
        "a tenth of the build's time, in the driver",
        "put the manifest into Ray's object store once",
    )
    yield Growth(
        "records of all shards, pickled with every search and merge task",
        "quadratic",
        "bytes",
        lambda layout: shard_argument_bytes(settings, layout, layout.num_shards + layout.num_blocks),
        pickle_rate * night / 10,
        "a tenth of the night, in the driver",
        "put the index's record into Ray's object store once",
    )
    if target.sidecar_row_bytes:
        yield Growth(
            "metadata table, scanned whole for every manifest partition",
            "quadratic",
            "core seconds",
            lambda layout: sidecar_bytes(settings, layout.sources) / constants.scan_bytes_per_second.value,
            embed.num_cpus * build,
            "one machine for the whole build",
            "hash the table into buckets by key once, and join each partition with its own",
        )
    yield Growth(
        "a listing request per partition, one after another, before the first image is embedded",
        "linear",
        "seconds",
        lambda layout: layout.sources.num_partitions * constants.request_seconds.value,
        build / 10,
        "a tenth of the build's time",
        "list the folder of chunks once, recursively",
    )
    yield Growth(
        "images read one by one",
        "linear",
        "requests",
        lambda layout: layout.sources.num_images * constants.requests_per_image.value,
        constants.reads_per_prefix_second.value * build,
        "object store's reads below one prefix",
        "read a chunk's images by one range of their tar; spread over prefixes",
    )
    yield Growth(
        "chunk files written, and read and deleted when partitions are assembled",
        "linear",
        "requests",
        lambda layout: (1 + constants.requests_per_write.value) * layout.sources.num_chunks,
        constants.writes_per_prefix_second.value * build,
        "object store's writes below one prefix",
        "raise chunk_rows",
    )
    yield Growth(
        "blocks of chunks for Ray Data beside the images that each must hold together",
        "linear",
        "images per block",
        lambda layout: layout.sources.num_images / min(layout.sources.num_chunks, EMBED_BLOCKS),
        build / 20 * constants.embed_efficiency.value / _seconds_per_image(settings),
        "a twentieth of the build's time for one block, or the last wave idles",
        "let the number of blocks grow with the workers",
    )
    yield Growth(
        "candidates of every query from every shard, in partial files",
        "linear",
        "bytes",
        lambda layout: (
            file_counts(layout, target, constants)["attributions/_partials/block-#/shard-#.parquet"].num_bytes
        ),
        network * 8 * night / 10,
        "8 machines' network for a tenth of the night",
        "merge shards on the way (a tree of merges); fewer, larger shards",
    )
    yield Growth(
        "query vectors, read again for every shard",
        "linear",
        "bytes",
        lambda layout: layout.num_shards * target.num_queries * 2.0 * target.dimension,
        network * 8 * night / 10,
        "8 machines' network for a tenth of the night",
        "keep shards open on a worker, or hand several shards to a task",
    )
    yield Growth(
        "partial files, one per shard and block of queries",
        "linear",
        "requests",
        lambda layout: (1 + constants.requests_per_write.value) * layout.num_shards * layout.num_blocks,
        constants.writes_per_prefix_second.value * night / 10,
        "object store's writes below one prefix, a tenth of the night",
        "larger shards; larger blocks",
    )
    yield Growth(
        "all candidates of a block merged in one task",
        "linear",
        "seconds",
        lambda layout: found_rows(layout) / layout.num_blocks / constants.merge_rows_per_second.value,
        night / 4,
        "a quarter of the night for one task",
        "lower query_block_rows",
    )


def _seconds_per_image(settings: ScaleSettings) -> float:
    constants = settings.constants
    seconds = 1 / constants.decode_images_per_second.value
    if not settings.machines[settings.target.embed_on].num_gpus:
        seconds += 1 / constants.forward_images_per_core_second.value
    return seconds
