"""The work of every stage: core seconds, bytes and requests, independent of the machines."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from attrib.attribute.estimate import AttributeTask
from attrib.capacity.layout import (
    EMBED_BLOCKS,
    Cut,
    Files,
    Layout,
    described_sources,
    file_counts,
    num_checked,
    shard_files,
    task_counts,
)
from attrib.capacity.limits import (
    FOUND_BYTES,
    found_rows,
    partition_argument_bytes,
    search_seconds,
    shard_argument_bytes,
    sidecar_bytes,
    unit_argument_bytes,
)
from attrib.capacity.settings import ScaleSettings
from attrib.data.estimate import ManifestTask
from attrib.embed.estimate import EmbedTask
from attrib.index.estimate import READ_ROWS, IndexTask, describe_parts
from attrib.index.quantizer import KMEANS_ITERATIONS, MAX_POINTS_PER_CENTROID


@dataclass(frozen=True)
class Work:
    """The work of one stage.

    core_seconds, gpu_seconds: sum over all tasks. memory_bytes: of one task. read_bytes, written_bytes: from
    and to the object store. moved_bytes: between processes through Ray's object store, task arguments included.
    reads: GET and HEAD requests. writes: PUT, LIST and DELETE requests. serial_seconds: time in the driver
    while no task runs.
    """

    phase: str
    name: str
    machine: str
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
    tasks = task_counts(layout, settings.target, num_cpus)
    files = file_counts(layout, settings.target, settings.constants)
    return [
        *_collection_work(settings, "sources", "sources", layout.sources, files, tasks),
        *_index_work(settings, layout, files, tasks),
        *_collection_work(settings, "queries", "generated", layout.queries, files, tasks),
        *_attribution_work(settings, layout, files, tasks, num_cpus),
    ]


def _collection_work(
    settings: ScaleSettings,
    phase: str,
    role: str,
    cut: Cut,
    files: dict[str, Files],
    tasks: dict[str, dict[StrEnum, int]],
) -> Iterator[Work]:
    target, constants, on = settings.target, settings.constants, settings.target.embed_on
    images, has_gpus = cut.num_images, settings.machines[on].num_gpus > 0
    per_file, per_image = constants.requests_per_file.value, constants.requests_per_image.value
    per_write = constants.requests_per_write.value
    pickle_rate, start = constants.pickle_bytes_per_second.value, constants.start_seconds.value
    image_bytes = images * constants.image_bytes.value
    listings = files[f"{role}/manifest/_listings/unit-#.parquet"].num_bytes
    rows = files[f"{role}/manifest/part-#.parquet"].num_bytes
    chunks = files[f"{role}/embeddings/_chunks/part-#/rows-#-#.parquet"].num_bytes
    vectors = files[f"{role}/embeddings/part-#.parquet"].num_bytes
    yield Work(
        phase,
        f"list {phase}",
        on,
        tasks[f"{role}/manifest"][ManifestTask.LIST],
        images / constants.list_images_per_second.value,
        read_bytes=image_bytes if target.listing_reads_images else 0.0,
        written_bytes=listings,
        moved_bytes=8.0 * images,
        reads=cut.num_units,
        writes=cut.num_units * per_write + 2,
        serial_seconds=start,
    )
    sidecar, arguments = sidecar_bytes(settings, cut), unit_argument_bytes(settings, cut)
    yield Work(
        phase,
        f"manifest of {phase}",
        on,
        tasks[f"{role}/manifest"][ManifestTask.PARTITION],
        images / constants.manifest_rows_per_second.value + sidecar / constants.scan_bytes_per_second.value,
        read_bytes=listings + rows + sidecar,
        written_bytes=rows,
        moved_bytes=arguments,
        reads=(cut.num_slices + cut.num_partitions) * per_file,
        writes=cut.num_partitions * per_write + cut.num_units + 2,
        serial_seconds=arguments / pickle_rate,
    )
    core_seconds = images / constants.decode_images_per_second.value
    if not has_gpus:
        core_seconds += images / constants.forward_images_per_core_second.value
    efficiency = constants.embed_efficiency.value
    yield Work(
        phase,
        f"embed {phase}",
        on,
        min(tasks[f"{role}/embeddings"][EmbedTask.CHUNK], EMBED_BLOCKS),
        core_seconds / efficiency,
        images / constants.forward_images_per_gpu_second.value / efficiency if has_gpus else 0.0,
        read_bytes=image_bytes + rows,
        written_bytes=chunks,
        moved_bytes=3.0 * target.image_px**2 * images if has_gpus else 0.0,
        reads=images * per_image + cut.num_chunks * per_file,
        writes=cut.num_chunks * per_write + cut.num_partitions + 2,
        # The driver lists the folders of committed chunks one after another before the first image.
        serial_seconds=start + cut.num_partitions * constants.request_seconds.value,
    )
    num_finish = tasks[f"{role}/embeddings"][EmbedTask.PARTITION]
    arguments = partition_argument_bytes(settings, cut, num_finish)
    yield Work(
        phase,
        f"assemble {phase}",
        on,
        num_finish,
        images / constants.assemble_rows_per_second.value,
        read_bytes=chunks + vectors + rows,
        written_bytes=vectors,
        moved_bytes=arguments,
        reads=cut.num_chunks * (per_file + 1) + cut.num_partitions * (2 * per_file + 1),
        writes=cut.num_chunks + cut.num_partitions * per_write + 2,
        serial_seconds=arguments / pickle_rate,
    )


def _index_work(
    settings: ScaleSettings, layout: Layout, files: dict[str, Files], tasks: dict[str, dict[StrEnum, int]]
) -> Iterator[Work]:
    target, constants, on = settings.target, settings.constants, settings.target.search_on
    cut, shards, dimension = layout.sources, layout.num_shards, target.dimension
    per_file, per_write = constants.requests_per_file.value, constants.requests_per_write.value
    pickle_rate = constants.pickle_bytes_per_second.value
    gemm = constants.gemm_gflops.value * 1e9
    vectors = files["sources/embeddings/part-#.parquet"].num_bytes
    index = {pattern: found.num_bytes for pattern, found in files.items() if pattern.startswith("index/")}
    arrays = sum(num_bytes for pattern, num_bytes in index.items() if pattern.endswith(".npy"))
    num_sample = tasks["index"][IndexTask.SAMPLE]
    sampled = target.held_out_rows + layout.training_rows
    arguments = 2 * partition_argument_bytes(settings, cut, num_sample)
    yield Work(
        "sources",
        "sample sources",
        on,
        num_sample,
        cut.num_images / constants.assemble_rows_per_second.value,
        read_bytes=vectors,
        moved_bytes=arguments + sampled * (8.0 + 2 * dimension),
        reads=cut.num_partitions * per_file,
        serial_seconds=constants.start_seconds.value + arguments / pickle_rate,
    )
    if layout.num_lists:
        training = min(layout.training_rows, MAX_POINTS_PER_CENTROID * layout.num_lists)
        yield Work(
            "sources",
            "train lists",
            on,
            1,
            # One task uses all CPUs of a machine, so its elapsed time stands in place of core seconds.
            KMEANS_ITERATIONS * 2.0 * training * layout.num_lists * dimension / gemm / settings.machines[on].num_cpus,
            moved_bytes=2.0 * dimension * layout.training_rows,
            writes=1,
        )
    num_build = tasks["index"][IndexTask.BUILD]
    arguments = 3 * partition_argument_bytes(settings, cut, num_build)
    assignment = 2.0 * cut.num_images * layout.num_lists * dimension / gemm
    sources = files["sources/manifest/part-#.parquet"].num_bytes
    yield Work(
        "sources",
        "build shards",
        on,
        num_build,
        cut.num_images / constants.build_vectors_per_second.value + assignment,
        memory_bytes=layout.worker_memory_bytes,
        read_bytes=sources + vectors + shards * index.get("index/template.faiss", 0),
        written_bytes=sum(index.values()),
        moved_bytes=arguments,
        reads=(2 * cut.num_partitions + shards) * per_file + shards,
        writes=shards * (shard_files(layout) + 2) * per_write + 2,
        serial_seconds=arguments / pickle_rate,
    )
    passes, held_out = (target.num_recall_passes if layout.num_lists else 0), target.held_out_rows
    exact = 2.0 * dimension * held_out * cut.num_images / gemm
    finds = shards * held_out * (layout.num_candidates + 1.0) * FOUND_BYTES
    yield Work(
        "sources",
        "measure recall",
        on,
        tasks["index"][IndexTask.RECALL],
        exact + passes * search_seconds(settings, layout, held_out),
        read_bytes=(1 + passes) * arrays,
        moved_bytes=(1 + passes) * (finds + shards * held_out * 4.0 * dimension),
        reads=shards * ((1 + passes) * shard_files(layout) + 1) * per_file,
        writes=1,
        serial_seconds=(1 + passes) * finds / FOUND_BYTES / constants.merge_rows_per_second.value,
    )


def _attribution_work(
    settings: ScaleSettings,
    layout: Layout,
    files: dict[str, Files],
    tasks: dict[str, dict[StrEnum, int]],
    num_cpus: int,
) -> Iterator[Work]:
    target, constants, on = settings.target, settings.constants, settings.target.search_on
    cut, shards, blocks = layout.queries, layout.num_shards, layout.num_blocks
    per_file, per_write = constants.requests_per_file.value, constants.requests_per_write.value
    pickle_rate = constants.pickle_bytes_per_second.value
    describing = describe_parts(shards)  # number of times that the metadata of all sources is read
    arrays = sum(
        f.num_bytes for pattern, f in files.items() if pattern.startswith("index/") and pattern.endswith(".npy")
    )
    partials = files["attributions/_partials/block-#/shard-#.parquet"].num_bytes
    lists = files["attributions/_partials/block-#/lists.npy"].num_bytes if layout.shares_lists else 0.0
    results = sum(files[f"attributions/{name}/block-#.parquet"].num_bytes for name in ("attributions", "outcomes"))
    sources = files["index/shard-#/sources.parquet"].num_bytes
    query_vectors = files["generated/embeddings/part-#.parquet"].num_bytes
    num_search, num_probe = (tasks["attributions"][kind] for kind in (AttributeTask.SEARCH, AttributeTask.PROBE))
    checked = num_checked(layout, target)
    exact = sum(f.num_bytes for pattern, f in files.items() if pattern.startswith("attributions/_partials/exact/"))
    arguments = shard_argument_bytes(settings, layout, num_search + num_probe)
    # Small blocks share row groups, which are read together; the ids are read again to separate the blocks.
    block_rows = -(-cut.num_images // blocks)
    spans = min(layout.num_query_slices, 2 * (-(-cut.num_images // READ_ROWS) + cut.num_partitions))
    per_pass = (layout.num_query_slices if block_rows >= READ_ROWS else spans) * per_file
    yield Work(
        "queries",
        "search",
        on,
        num_search + num_probe,
        search_seconds(settings, layout, cut.num_images)
        + 2.0 * target.dimension * checked * layout.sources.num_images / (constants.gemm_gflops.value * 1e9),
        memory_bytes=layout.worker_memory_bytes,
        # Every shard is compared with every query. A task opens its shard once.
        read_bytes=num_search / shards * arrays + shards * (query_vectors + lists) + bool(num_probe) * query_vectors,
        written_bytes=partials + lists + exact,
        moved_bytes=arguments + shards * checked * 4.0 * target.dimension,
        reads=((shards + bool(num_probe)) * per_pass + num_search * (shard_files(layout) + 1) * per_file)
        + blocks * shards * (1 + layout.shares_lists * per_file),
        writes=(blocks * (shards + layout.shares_lists) + bool(checked) * shards) * per_write + 3,
        serial_seconds=constants.start_seconds.value + arguments / pickle_rate,
    )
    arguments = shard_argument_bytes(settings, layout, blocks)
    small = sum(files[f"attributions/_partials/block-#/{name}.parquet"].num_bytes for name in ("merged", "wanted"))
    yield Work(
        "queries",
        "merge",
        on,
        tasks["attributions"][AttributeTask.MERGE],
        found_rows(layout) / constants.merge_rows_per_second.value,
        # The id column is read twice, to find the shard of each candidate.
        read_bytes=partials * 1.5 + 8.0 * cut.num_images,
        written_bytes=small,
        moved_bytes=arguments,
        reads=(2 * blocks * shards + layout.num_query_slices) * per_file + blocks,
        writes=2 * blocks * per_write + 1,
        serial_seconds=arguments / pickle_rate,
    )
    num_describe = tasks["attributions"][AttributeTask.DESCRIBE]
    arguments = shard_argument_bytes(settings, layout, num_describe)
    pieces = files["attributions/_partials/block-#/sources-#-#.parquet"]
    yield Work(
        "queries",
        "describe sources",
        on,
        num_describe,
        describing * layout.sources.num_images / constants.sources_rows_per_second.value,
        read_bytes=describing * sources + small,
        written_bytes=pieces.num_bytes,
        moved_bytes=arguments,
        reads=num_describe * (blocks + 1) * per_file,
        writes=pieces.num_files * per_write + 1,
        serial_seconds=arguments / pickle_rate,
    )
    arguments = shard_argument_bytes(settings, layout, blocks)
    yield Work(
        "queries",
        "write rows",
        on,
        tasks["attributions"][AttributeTask.WRITE],
        (cut.num_images * target.top_k + described_sources(layout, target))
        / constants.attribution_rows_per_second.value,
        read_bytes=small + pieces.num_bytes,
        written_bytes=results,
        moved_bytes=arguments,
        # The rows of the recall check are read again. Temporary files are deleted at the end.
        reads=(pieces.num_files + 2 * layout.num_query_slices + 2 * blocks + bool(checked) * (blocks + shards))
        * per_file
        + blocks,
        writes=blocks * (2 * per_write + 1) + blocks * (shards + 2) + pieces.num_files + bool(checked) * shards,
        serial_seconds=arguments / pickle_rate,
    )
