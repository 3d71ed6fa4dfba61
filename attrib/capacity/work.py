"""The work of every stage: core seconds, bytes and requests, independent of the machines."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from attrib.attribute.estimate import AttributeTask
from attrib.capacity.layout import (
    EMBED_BLOCKS,
    PARTIALS,
    Files,
    Layout,
    described_sources,
    file_counts,
    num_checked,
    shard_files,
    task_counts,
)
from attrib.capacity.limits import FOUND_BYTES, found_rows, search_seconds
from attrib.capacity.settings import ScaleSettings
from attrib.data.estimate import ManifestTask
from attrib.embed.estimate import EmbedTask
from attrib.index.estimate import READ_ROWS, IndexTask, describe_parts
from attrib.index.quantizer import KMEANS_ITERATIONS, MAX_POINTS_PER_CENTROID

Counts = dict[str, dict[StrEnum, int]]


@dataclass(frozen=True)
class Work:
    """The work of one stage.

    core_seconds, gpu_seconds: sum over all tasks. memory_bytes: of one task. read_bytes, written_bytes: from
    and to the object store. moved_bytes: between processes through Ray's object store, task arguments included.
    reads: GET and HEAD requests. writes: PUT, LIST and DELETE requests. serial_seconds: time in the driver
    while no task runs.
    """

    phase: str
    machine: str
    name: str
    num_tasks: int
    core_seconds: float
    gpu_seconds: float = 0.0
    memory_bytes: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    moved_bytes: float = 0.0
    reads: float = 0.0
    writes: float = 0.0
    serial_seconds: float = 0.0


def describe_work(settings: ScaleSettings, layout: Layout, num_cpus: int) -> list[Work]:
    """All stages of both phases. num_cpus: CPUs of all search machines; the number of search tasks depends on it."""
    given = settings, layout, file_counts(layout, settings.target, settings.constants)
    tasks = task_counts(layout, settings.target, num_cpus)
    return [
        *_collection_work(*given, tasks, "sources", "sources"),
        *_index_work(*given, tasks["index"]),
        *_collection_work(*given, tasks, "queries", "generated"),
        *_attribution_work(*given, tasks["attributions"]),
    ]


def _collection_work(
    settings: ScaleSettings, layout: Layout, files: dict[str, Files], tasks: Counts, phase: str, role: str
) -> Iterator[Work]:
    target, c = settings.target, settings.constants.values()
    work = partial(Work, phase, target.embed_on)
    has_gpus = settings.machines[target.embed_on].num_gpus > 0
    cut = layout.sources if phase == "sources" else layout.queries
    images, partitions = cut.num_images, cut.num_partitions
    per_file, per_write, image_bytes = c.requests_per_file, c.requests_per_write, images * c.image_bytes
    patterns = (
        "manifest/_listings/unit-#",
        "manifest/part-#",
        "embeddings/_chunks/part-#/rows-#-#",
        "embeddings/part-#",
    )
    listings, rows, chunks, vectors = (files[f"{role}/{pattern}.parquet"].num_bytes for pattern in patterns)
    yield work(
        f"list {phase}",
        tasks[f"{role}/manifest"][ManifestTask.LIST],
        images / c.list_images_per_second,
        read_bytes=image_bytes if target.listing_reads_images else 0.0,
        written_bytes=listings,
        moved_bytes=8.0 * images,
        reads=cut.num_units,
        writes=cut.num_units * per_write + 2,
        serial_seconds=c.start_seconds,
    )
    sidecar = partitions * images * target.sidecar_row_bytes  # every task reads the whole metadata table
    arguments = cut.num_slices * c.argument_bytes_per_unit
    yield work(
        f"manifest of {phase}",
        tasks[f"{role}/manifest"][ManifestTask.PARTITION],
        images / c.manifest_rows_per_second + sidecar / c.scan_bytes_per_second,
        read_bytes=listings + rows + sidecar,
        written_bytes=rows,
        moved_bytes=arguments,
        reads=(cut.num_slices + partitions) * per_file,
        writes=partitions * per_write + cut.num_units + 2,
        serial_seconds=arguments / c.pickle_bytes_per_second,
    )
    forward_seconds = 0.0 if has_gpus else images / c.forward_images_per_core_second
    yield work(
        f"embed {phase}",
        min(tasks[f"{role}/embeddings"][EmbedTask.CHUNK], EMBED_BLOCKS),
        (images / c.decode_images_per_second + forward_seconds) / c.embed_efficiency,
        images / c.forward_images_per_gpu_second / c.embed_efficiency if has_gpus else 0.0,
        read_bytes=image_bytes + rows,
        written_bytes=chunks,
        moved_bytes=3.0 * target.image_px**2 * images if has_gpus else 0.0,
        reads=images * c.requests_per_image + cut.num_chunks * per_file,
        writes=cut.num_chunks * per_write + partitions + 2,
        # The driver lists the folders of committed chunks one after another before the first image.
        serial_seconds=c.start_seconds + partitions * c.request_seconds,
    )
    num_assemble = tasks[f"{role}/embeddings"][EmbedTask.PARTITION]
    arguments = num_assemble * partitions * c.argument_bytes_per_partition
    yield work(
        f"assemble {phase}",
        num_assemble,
        images / c.assemble_rows_per_second,
        read_bytes=chunks + vectors + rows,
        written_bytes=vectors,
        moved_bytes=arguments,
        reads=cut.num_chunks * (per_file + 1) + partitions * (2 * per_file + 1),
        writes=cut.num_chunks + partitions * per_write + 2,
        serial_seconds=arguments / c.pickle_bytes_per_second,
    )


def _index_work(
    settings: ScaleSettings, layout: Layout, files: dict[str, Files], tasks: dict[StrEnum, int]
) -> Iterator[Work]:
    target, c = settings.target, settings.constants.values()
    work = partial(Work, "sources", target.search_on)
    shards, dimension, lists = layout.num_shards, target.dimension, layout.num_lists
    images, partitions = layout.sources.num_images, layout.sources.num_partitions
    per_file, gemm = c.requests_per_file, c.gemm_gflops * 1e9
    vectors = files["sources/embeddings/part-#.parquet"].num_bytes
    index = {pattern: found.num_bytes for pattern, found in files.items() if pattern.startswith("index/")}
    arguments = partitions * c.argument_bytes_per_partition  # of one task that receives the embeddings
    sampled = 2 * tasks[IndexTask.SAMPLE] * arguments
    yield work(
        "sample sources",
        tasks[IndexTask.SAMPLE],
        images / c.assemble_rows_per_second,
        read_bytes=vectors,
        moved_bytes=sampled + (target.held_out_rows + layout.training_rows) * (8.0 + 2 * dimension),
        reads=partitions * per_file,
        serial_seconds=c.start_seconds + sampled / c.pickle_bytes_per_second,
    )
    if lists:
        training = min(layout.training_rows, MAX_POINTS_PER_CENTROID * lists)
        yield work(
            "train lists",
            1,
            # One task uses all CPUs of a machine, so these are elapsed seconds.
            KMEANS_ITERATIONS
            * 2.0
            * training
            * lists
            * dimension
            / gemm
            / settings.machines[target.search_on].num_cpus,
            moved_bytes=2.0 * dimension * layout.training_rows,
            writes=1,
        )
    built = 3 * tasks[IndexTask.BUILD] * arguments
    manifest = files["sources/manifest/part-#.parquet"].num_bytes
    yield work(
        "build shards",
        tasks[IndexTask.BUILD],
        images / c.build_vectors_per_second + 2.0 * images * lists * dimension / gemm,
        memory_bytes=layout.worker_memory_bytes,
        read_bytes=manifest + vectors + shards * index.get("index/template.faiss", 0),
        written_bytes=sum(index.values()),
        moved_bytes=built,
        reads=(2 * partitions + shards) * per_file + shards,
        writes=shards * (shard_files(layout) + 2) * c.requests_per_write + 2,
        serial_seconds=built / c.pickle_bytes_per_second,
    )
    held_out, passes = target.held_out_rows, target.num_recall_passes if lists else 0
    candidates = (1 + passes) * shards * held_out * (layout.num_candidates + 1.0)
    yield work(
        "measure recall",
        tasks[IndexTask.RECALL],
        2.0 * dimension * held_out * images / gemm + passes * search_seconds(settings, layout, held_out),
        read_bytes=(1 + passes) * _array_bytes(files),
        moved_bytes=candidates * FOUND_BYTES + (1 + passes) * shards * held_out * 4.0 * dimension,
        reads=shards * ((1 + passes) * shard_files(layout) + 1) * per_file,
        writes=1,
        serial_seconds=candidates / c.merge_rows_per_second,
    )


def _attribution_work(
    settings: ScaleSettings, layout: Layout, files: dict[str, Files], tasks: dict[StrEnum, int]
) -> Iterator[Work]:
    target, c = settings.target, settings.constants.values()
    work = partial(Work, "queries", target.search_on)
    images, shards, blocks = layout.queries.num_images, layout.num_shards, layout.num_blocks
    slices, per_file, per_write = layout.num_query_slices, c.requests_per_file, c.requests_per_write
    temporary = "attributions/_partials"
    partials, query_vectors = (files[name].num_bytes for name in (PARTIALS, "generated/embeddings/part-#.parquet"))
    lists = files[f"{temporary}/block-#/lists.npy"].num_bytes if layout.shares_lists else 0.0
    small = sum(files[f"{temporary}/block-#/{name}.parquet"].num_bytes for name in ("merged", "wanted"))
    pieces = files[f"{temporary}/block-#/sources-#-#.parquet"]
    results = sum(files[f"attributions/{name}/block-#.parquet"].num_bytes for name in ("attributions", "outcomes"))
    exact = sum(found.num_bytes for name, found in files.items() if name.startswith(f"{temporary}/exact/"))
    arguments = shards * c.argument_bytes_per_shard  # of one task: the records of all shards
    pickle_seconds = arguments / c.pickle_bytes_per_second
    num_search, probes = tasks[AttributeTask.SEARCH], tasks[AttributeTask.PROBE] > 0
    num_tasks, checked = num_search + tasks[AttributeTask.PROBE], num_checked(layout, target)
    # Small blocks share row groups, which are read together; the ids are read again to separate the blocks.
    spans = min(slices, 2 * (-(-images // READ_ROWS) + layout.queries.num_partitions))
    per_pass = (slices if -(-images // blocks) >= READ_ROWS else spans) * per_file
    exact_products = target.dimension * checked * layout.sources.num_images
    yield work(
        "search",
        num_tasks,
        search_seconds(settings, layout, images) + 2.0 * exact_products / (c.gemm_gflops * 1e9),
        memory_bytes=layout.worker_memory_bytes,
        # Every shard is compared with every query. A task opens its shard once.
        read_bytes=num_search / shards * _array_bytes(files) + shards * lists + (shards + probes) * query_vectors,
        written_bytes=partials + lists + exact,
        moved_bytes=num_tasks * arguments + shards * checked * 4.0 * target.dimension,
        reads=((shards + probes) * per_pass + num_search * (shard_files(layout) + 1) * per_file)
        + blocks * shards * (1 + layout.shares_lists * per_file),
        writes=(blocks * (shards + layout.shares_lists) + bool(checked) * shards) * per_write + 3,
        serial_seconds=c.start_seconds + num_tasks * pickle_seconds,
    )
    yield work(
        "merge",
        tasks[AttributeTask.MERGE],
        found_rows(layout) / c.merge_rows_per_second,
        # The id column is read twice, to find the shard of each candidate.
        read_bytes=partials * 1.5 + 8.0 * images,
        written_bytes=small,
        moved_bytes=blocks * arguments,
        reads=(2 * blocks * shards + slices) * per_file + blocks,
        writes=2 * blocks * per_write + 1,
        serial_seconds=blocks * pickle_seconds,
    )
    num_describe, passes = tasks[AttributeTask.DESCRIBE], describe_parts(shards)
    yield work(
        "describe sources",
        num_describe,
        passes * layout.sources.num_images / c.sources_rows_per_second,
        read_bytes=passes * files["index/shard-#/sources.parquet"].num_bytes + small,
        written_bytes=pieces.num_bytes,
        moved_bytes=num_describe * arguments,
        reads=num_describe * (blocks + 1) * per_file,
        writes=pieces.num_files * per_write + 1,
        serial_seconds=num_describe * pickle_seconds,
    )
    yield work(
        "write rows",
        tasks[AttributeTask.WRITE],
        (images * target.top_k + described_sources(layout, target)) / c.attribution_rows_per_second,
        read_bytes=small + pieces.num_bytes,
        written_bytes=results,
        moved_bytes=blocks * arguments,
        # The rows of the recall check are read again. Temporary files are deleted at the end.
        reads=(pieces.num_files + 2 * slices + 2 * blocks + bool(checked) * (blocks + shards)) * per_file + blocks,
        writes=blocks * (2 * per_write + 1) + blocks * (shards + 2) + pieces.num_files + bool(checked) * shards,
        serial_seconds=blocks * pickle_seconds,
    )


def _array_bytes(files: dict[str, Files]) -> float:
    """Bytes of the arrays that a search of all shards reads."""
    return sum(found.num_bytes for name, found in files.items() if name.startswith("index/") and name.endswith(".npy"))
