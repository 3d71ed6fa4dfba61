"""What breaks first: quantities that grow with the number of sources, their limits, and the sources at each limit.

limits.yaml describes each quantity; `amounts` computes it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from attrib.capacity.layout import EMBED_BLOCKS, PARTIALS, Layout, file_counts, lay_out
from attrib.capacity.settings import ScaleSettings
from attrib.common.formats import GIB
from attrib.index.estimate import CANDIDATE_BYTES

MAX_SOURCES = 10**15
TEXTS = Path(__file__).with_name("limits.yaml")


@dataclass(frozen=True)
class Break:
    """A quantity, in `unit`, that grows with the number of sources. order: "linear" or "quadratic".

    num_sources: the smallest number of sources at which it exceeds its limit (None: not below MAX_SOURCES).
    """

    what: str
    num_sources: int | None
    at_target: float
    limit: float
    unit: str
    limited_by: str
    remedy: str
    order: str


def breaks(settings: ScaleSettings) -> list[Break]:
    """All quantities; the one that exceeds its limit at the fewest sources comes first."""

    @cache
    def at(num_sources: int) -> dict[str, tuple[float, float]]:
        return amounts(settings, lay_out(settings.target.model_copy(update={"num_sources": num_sources})))

    texts, found = yaml.safe_load(TEXTS.read_text(encoding="utf-8")), []
    for key, (at_target, limit) in at(settings.target.num_sources).items():
        first = bisect_left(range(MAX_SOURCES), True, lo=1, key=lambda n, key=key, limit=limit: at(n)[key][0] > limit)
        first = None if first == MAX_SOURCES else first
        found.append(Break(num_sources=first, at_target=at_target, limit=limit, **texts[key]))
    return sorted(found, key=lambda b: (b.num_sources or MAX_SOURCES, -b.at_target / b.limit))


def amounts(settings: ScaleSettings, layout: Layout) -> dict[str, tuple[float, float]]:
    """The amount and the limit of each quantity of limits.yaml."""
    target, c = settings.target, settings.constants.values()
    embed, search = settings.machines[target.embed_on], settings.machines[target.search_on]
    build, night = target.build_hours * 3600, target.night_hours * 3600
    memory, pickled = target.driver_memory_gib * GIB, c.pickle_bytes_per_second
    network = 8 * search.network_gbit_per_second * 1e9 / 8 * night / 10  # of 8 machines
    images, partitions, chunks = layout.sources.num_images, layout.sources.num_partitions, layout.sources.num_chunks
    shards, blocks, per_write = layout.num_shards, layout.num_blocks, 1 + c.requests_per_write
    image_seconds = 1 / c.decode_images_per_second + (0 if embed.num_gpus else 1 / c.forward_images_per_core_second)
    held_out = shards * target.held_out_rows * (layout.num_candidates + 1.0)
    partials = file_counts(layout, target, settings.constants)[PARTIALS].num_bytes
    found = {
        "image_ids": (images * c.driver_bytes_per_image, memory),
        "pending_chunks": (chunks * c.driver_bytes_per_chunk, memory),
        "failures": (images * target.failed_share * c.driver_bytes_per_failure, memory),
        "held_out": (held_out * CANDIDATE_BYTES, memory),
        "partition_sizes": (3 * partitions**2 * c.argument_bytes_per_partition, pickled * build / 10),
        "shard_records": ((shards + blocks) * shards * c.argument_bytes_per_shard, pickled * night / 10),
        "chunk_listings": (partitions * c.request_seconds, build / 10),
        "image_reads": (images * c.requests_per_image, c.reads_per_prefix_second * build),
        "chunk_files": (per_write * chunks, c.writes_per_prefix_second * build),
        "embed_blocks": (images / min(chunks, EMBED_BLOCKS), build / 20 * c.embed_efficiency / image_seconds),
        "candidates": (partials, network),
        "query_vectors": (shards * target.num_queries * 2.0 * target.dimension, network),
        "partial_files": (per_write * shards * blocks, c.writes_per_prefix_second * night / 10),
        "merged_block": (layout.num_found / blocks / c.merge_rows_per_second, night / 4),
    }
    if target.sidecar_row_bytes:
        scanned = partitions * images * target.sidecar_row_bytes
        found["sidecar"] = (scanned / c.scan_bytes_per_second, embed.num_cpus * build)
    return found
