"""Amounts that grow faster than the images themselves, or that one place must bear: the stages of a plan and its limits share them."""

from attrib.capacity.layout import Cut, Layout
from attrib.capacity.settings import ScaleSettings

SEARCH_ROWS = 131_072  # queries that a search task holds at a time (attrib.attribute.job)


def unit_argument_bytes(settings: ScaleSettings, cut: Cut) -> float:
    """Pickled with the manifest's tasks: each is given the listings of its own slices."""
    return cut.num_slices * settings.constants.argument_bytes_per_unit.value


def partition_argument_bytes(settings: ScaleSettings, cut: Cut, num_tasks: int) -> float:
    """Pickled with tasks that are given the manifest, or the embeddings, with the sizes of all partitions."""
    return num_tasks * cut.num_partitions * settings.constants.argument_bytes_per_partition.value


def shard_argument_bytes(settings: ScaleSettings, layout: Layout, num_tasks: int) -> float:
    """Pickled with the attribution's tasks: each is given the record of every shard."""
    return num_tasks * layout.num_shards * settings.constants.argument_bytes_per_shard.value


def sidecar_bytes(settings: ScaleSettings, cut: Cut) -> float:
    """Read by the manifest's tasks: each scans the whole metadata table for its own images."""
    return cut.num_partitions * cut.num_images * settings.target.sidecar_row_bytes


def found_rows(layout: Layout) -> float:
    """Candidates in all partial files."""
    return float(layout.queries.num_images * layout.num_shards * min(layout.num_candidates, layout.shard_vectors))


def coarse_seconds(settings: ScaleSettings, layout: Layout, num_queries: float) -> float:
    """Core seconds of comparing the queries with all centroids."""
    products = num_queries * layout.num_lists * settings.target.dimension
    return products * settings.constants.block_product_seconds.value


def search_seconds(settings: ScaleSettings, layout: Layout, num_queries: int) -> float:
    """Core seconds of a search of all shards, as attrib.index.cost_model reckons them, in batches of SEARCH_ROWS queries."""
    target, constants = settings.target, settings.constants
    vectors, dimension, lists = layout.sources.num_images, target.dimension, layout.num_lists
    batches = -(-num_queries // SEARCH_ROWS)
    if not lists:
        products = float(num_queries) * vectors * dimension * constants.block_product_seconds.value
        return products + batches * vectors * dimension * constants.value_seconds.value
    probed = min(1.0, target.nprobe / lists)
    visited = 1 - (1 - probed) ** (num_queries / batches)  # of the lists, by any query of a batch
    visits = layout.num_shards * lists * visited * constants.list_visit_seconds.value
    widened = vectors * dimension * visited * constants.value_seconds.value
    products = num_queries * probed * vectors * dimension * constants.list_product_seconds.value
    return coarse_seconds(settings, layout, num_queries) + batches * (visits + widened) + products
