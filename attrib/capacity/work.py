"""The work of every stage: core seconds, bytes and requests, independent of the machines."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from types import SimpleNamespace

from attrib.attribute.estimate import AttributeTask
from attrib.capacity.layout import EMBED_BLOCKS, PARTIALS, TEMPORARY, Layout, file_counts, task_counts
from attrib.capacity.settings import SEARCH_RATES, ScaleSettings
from attrib.data.estimate import ManifestTask
from attrib.embed.estimate import EmbedTask
from attrib.index.cost_model import SearchRates, exact_seconds, lists_seconds
from attrib.index.estimate import CANDIDATE_BYTES, IndexTask, describe_parts
from attrib.index.quantizer import KMEANS_ITERATIONS, MAX_POINTS_PER_CENTROID
from attrib.index.search import QUERY_ROWS

Tasks = dict[str, dict[StrEnum, int]]


@dataclass
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


def describe_work(settings: ScaleSettings, layout: Layout, phase: str, num_cpus: int) -> list[Work]:
    """The stages of a phase. num_cpus: CPUs of all search machines; the number of search tasks depends on it."""
    stages, tasks = _Stages(settings, layout, phase), task_counts(layout, settings.target, num_cpus)
    _collection_work(stages, tasks)
    (_index_work if phase == "sources" else _attribution_work)(stages, tasks)
    return stages.works


class _Stages:
    """The stages of one phase. `add` begins a stage, `use` adds the files that it reads, writes and deletes."""

    def __init__(self, settings: ScaleSettings, layout: Layout, phase: str):
        self.settings, self.layout, self.phase = settings, layout, phase
        self.target, self.c = settings.target, settings.constants.values()
        self.files = file_counts(layout, settings.target, settings.constants)
        self.works: list[Work] = []

    def add(self, machine: str, name: str, num_tasks: int, core_seconds: float, arguments: float = 0.0) -> Work:
        """arguments: bytes per task, which the driver pickles for one task after another. # in a name: the phase."""
        pickled, name = num_tasks * arguments, name.replace("#", self.phase)
        self.works.append(Work(self.phase, machine, name, num_tasks, core_seconds, moved_bytes=pickled))
        self.works[-1].serial_seconds = pickled / self.c.pickle_bytes_per_second
        return self.works[-1]

    def use(self, read: dict[str, float], write: Collection[str] = (), delete: Collection[str] = ()) -> None:
        """Patterns of the paths of `file_counts`. read: how many times the files of a pattern are read."""
        work, c = self.works[-1], self.c
        for path, files in self.files.items():
            times = sum(times for pattern, times in read.items() if fnmatchcase(path, pattern))
            written, deleted = (any(fnmatchcase(path, pattern) for pattern in of) for of in (write, delete))
            work.reads += files.num_files * (times * c.requests_per_file + written * c.reads_per_write)
            work.writes += files.num_files * (written * c.requests_per_write + deleted)
            work.read_bytes += times * files.num_bytes
            work.written_bytes += written * files.num_bytes

    def search_seconds(self, num_queries: int, exact: bool = False) -> float:
        """Core seconds to compare `num_queries` with all shards, by attrib.index.cost_model. exact: without lists."""
        rates = SearchRates(*(getattr(self.c, name) for name in SEARCH_RATES))
        num_vectors, dimension, lists = self.layout.sources.num_images, self.target.dimension, self.layout.num_lists
        if exact or not lists:
            return exact_seconds(rates, num_vectors, num_queries, dimension)
        passes, probes = -(-num_queries // QUERY_ROWS), min(self.target.nprobe, lists)
        index = SimpleNamespace(num_lists=lists, num_vectors=num_vectors, shards=range(self.layout.num_shards))
        return passes * lists_seconds(rates, index, num_queries / passes, probes, probes / lists, dimension)


def _collection_work(stages: _Stages, tasks: Tasks) -> None:
    layout, target, c, machine = stages.layout, stages.target, stages.c, stages.target.embed_on
    cut, role = (layout.sources, "sources") if stages.phase == "sources" else (layout.queries, "generated")
    listed, embedded = tasks[f"{role}/manifest"], tasks[f"{role}/embeddings"]
    images, partitions, image_bytes = cut.num_images, cut.num_partitions, cut.num_images * c.image_bytes
    listings, rows = f"{role}/manifest/_listings/*", f"{role}/manifest/part-#.parquet"
    chunks, vectors = f"{role}/embeddings/_chunks/*", f"{role}/embeddings/part-#.parquet"

    work = stages.add(machine, "list #", listed[ManifestTask.LIST], images / c.list_images_per_second)
    work.reads, work.read_bytes = cut.num_units, image_bytes * target.listing_reads_images
    work.moved_bytes, work.serial_seconds = 8.0 * images, c.start_seconds
    stages.use({}, write=[listings])

    sidecar = partitions * images * target.sidecar_row_bytes  # every task reads the whole metadata table
    seconds = images / c.manifest_rows_per_second + sidecar / c.scan_bytes_per_second
    arguments = cut.num_slices / partitions * c.argument_bytes_per_unit
    work = stages.add(machine, "manifest of #", listed[ManifestTask.PARTITION], seconds, arguments)
    work.reads, work.read_bytes = (cut.num_slices - cut.num_units) * c.requests_per_file, sidecar
    stages.use({listings: 1, rows: 1}, write=[rows], delete=[listings])

    has_gpus = stages.settings.machines[machine].num_gpus > 0
    seconds = images * (1 / c.decode_images_per_second + (0.0 if has_gpus else 1 / c.forward_images_per_core_second))
    num_blocks = min(embedded[EmbedTask.CHUNK], EMBED_BLOCKS)
    work = stages.add(machine, "embed #", num_blocks, seconds / c.embed_efficiency)
    if has_gpus:
        work.gpu_seconds = images / c.forward_images_per_gpu_second / c.embed_efficiency
        work.moved_bytes = 3.0 * target.image_px**2 * images
    work.reads = images * c.requests_per_image + cut.num_chunks * c.requests_per_file
    work.read_bytes = image_bytes + stages.files[rows].num_bytes
    # The driver lists the folders of committed chunks one after another before the first image.
    work.writes, work.serial_seconds = partitions, c.start_seconds + partitions * c.request_seconds
    stages.use({}, write=[chunks])

    seconds, arguments = images / c.assemble_rows_per_second, partitions * c.argument_bytes_per_partition
    work = stages.add(machine, "assemble #", embedded[EmbedTask.PARTITION], seconds, arguments)
    work.reads = cut.num_chunks
    stages.use({chunks: 1, vectors: 1, rows: 1}, write=[vectors], delete=[chunks])


def _index_work(stages: _Stages, tasks: Tasks) -> None:
    layout, target, c, machine = stages.layout, stages.target, stages.c, stages.target.search_on
    shards, lists, images, gemm = layout.num_shards, layout.num_lists, layout.sources.num_images, c.gemm_gflops * 1e9
    vectors, template, held_out = "sources/embeddings/part-#.parquet", "index/template.faiss", target.held_out_rows
    arguments = layout.sources.num_partitions * c.argument_bytes_per_partition

    seconds = images / c.assemble_rows_per_second
    work = stages.add(machine, "sample sources", tasks["index"][IndexTask.SAMPLE], seconds, 2 * arguments)
    work.moved_bytes += (held_out + layout.training_rows) * (8.0 + 2 * target.dimension)
    work.serial_seconds += c.start_seconds
    stages.use({vectors: 1})

    if lists:
        points = min(layout.training_rows, MAX_POINTS_PER_CENTROID * lists)
        # One task uses all CPUs of a machine, so these are elapsed seconds.
        seconds = KMEANS_ITERATIONS * 2.0 * points * lists * target.dimension / gemm
        work = stages.add(machine, "train lists", 1, seconds / stages.settings.machines[machine].num_cpus)
        work.moved_bytes = 2.0 * target.dimension * layout.training_rows
        stages.use({}, write=[template])

    seconds = images / c.build_vectors_per_second + 2.0 * images * lists * target.dimension / gemm
    work = stages.add(machine, "build shards", shards, seconds, 3 * arguments)
    work.memory_bytes, work.writes = layout.worker_memory_bytes, shards  # one record per shard
    stages.use({"sources/manifest/part-#.parquet": 1, vectors: 1, template: shards}, write=["index/shard-#/*"])

    num_tasks = tasks["index"][IndexTask.RECALL]
    passes, found = num_tasks // shards, num_tasks * held_out * (layout.num_candidates + 1.0)
    seconds = stages.search_seconds(held_out, exact=True) + (passes - 1) * stages.search_seconds(held_out)
    work = stages.add(machine, "measure recall", num_tasks, seconds)
    work.moved_bytes = found * CANDIDATE_BYTES + num_tasks * held_out * 4.0 * target.dimension
    work.serial_seconds = found / c.merge_rows_per_second
    stages.use({"index/shard-#/*.npy": passes, template: shards})


def _attribution_work(stages: _Stages, tasks: Tasks) -> None:
    layout, target, c, machine = stages.layout, stages.target, stages.c, stages.target.search_on
    images, shards, blocks = layout.queries.num_images, layout.num_shards, layout.num_blocks
    block, exact = f"{TEMPORARY}/block-#", f"{TEMPORARY}/exact/*"
    lists, merged, wanted, pieces = (f"{block}/{name}*" for name in ("lists", "merged", "wanted", "sources"))
    arguments, query_reads = shards * c.argument_bytes_per_shard, layout.num_query_slices * c.requests_per_file

    tasks = tasks["attributions"]
    num_search, num_probe = tasks[AttributeTask.SEARCH], tasks[AttributeTask.PROBE]
    passes = shards + (num_probe > 0)  # every shard is compared with every query
    checked = min(target.recall_check_queries, images) if layout.num_lists else 0
    seconds = stages.search_seconds(images) + (stages.search_seconds(checked, exact=True) if checked else 0.0)
    work = stages.add(machine, "search", num_search + num_probe, seconds, arguments)
    work.memory_bytes = layout.worker_memory_bytes
    work.moved_bytes += shards * checked * 4.0 * target.dimension
    work.read_bytes = passes * stages.files["generated/embeddings/part-#.parquet"].num_bytes
    work.reads = passes * query_reads + blocks * shards
    work.serial_seconds += c.start_seconds
    opened = {"index/shard-#/*.npy": num_search / shards, "index/template.faiss": num_search}
    stages.use(opened | {lists: shards}, write=[PARTIALS, lists, exact])

    work = stages.add(machine, "merge", blocks, layout.num_found / c.merge_rows_per_second, arguments)
    # The id column is read twice, to find the shard of each candidate.
    work.reads = blocks * shards * c.requests_per_file + query_reads
    work.read_bytes = stages.files[PARTIALS].num_bytes / 2 + 8.0 * images
    stages.use({PARTIALS: 1}, write=[merged, wanted])

    num_tasks, passes = tasks[AttributeTask.DESCRIBE], describe_parts(shards)
    seconds = passes * layout.sources.num_images / c.sources_rows_per_second
    work = stages.add(machine, "describe sources", num_tasks, seconds, arguments)
    work.reads = num_tasks * blocks * c.requests_per_file
    stages.use({"index/shard-#/sources.parquet": passes, merged: 1, wanted: 1}, write=[pieces])

    seconds = 2.0 * images * target.top_k / c.attribution_rows_per_second  # every row, and the source that it names
    work = stages.add(machine, "write rows", blocks, seconds, arguments)
    work.reads = 2 * query_reads
    stages.use({merged: 1, wanted: 1, pieces: 1, exact: 1}, ["attributions/[!_]*"], delete=[f"{TEMPORARY}/*"])
