"""Options of jobs.scale: measured constants, the machines and prices that a user has, the size to plan for, and the simulation that checks the plan."""

from pydantic import Field, model_validator

from attrib.attribute.settings import AttributeSettings
from attrib.common.settings import JobSettings, Positive, Settings, Share, Uri
from attrib.data.settings import ManifestSettings
from attrib.embed.settings import EmbedSettings
from attrib.index.settings import IndexKind, IndexSettings


class Constant(Settings):
    """A measured figure and where it came from: a command, or whoever assumed it."""

    value: float = Field(gt=0, allow_inf_nan=False)
    source: str = Field(min_length=1)


def _constant(unit: str, meaning: str):
    return Field(title=unit, description=meaning)


class Constants(Settings):
    """What a unit of work costs. The title of a field is its unit, in which `constants` of a benchmark.json must be as well."""

    list_images_per_second: Constant = _constant("images/s", "listed and given an id, one core")
    manifest_rows_per_second: Constant = _constant("rows/s", "written to the manifest and digested, one core")
    decode_images_per_second: Constant = _constant("images/s", "read, decoded and resized, one core")
    forward_images_per_core_second: Constant = _constant("images/s", "through the network, one core")
    forward_images_per_gpu_second: Constant | None = Field(
        default=None, title="images/s", description="through the network, one GPU"
    )
    embed_efficiency: Constant = _constant("share", "rate of the embed job over 1 / (decode + forward)")
    assemble_rows_per_second: Constant = _constant("rows/s", "gathered from chunks, sorted and digested, one core")
    build_vectors_per_second: Constant = _constant(
        "vectors/s", "written to a shard, assignment to lists apart, one core"
    )
    gemm_gflops: Constant = _constant("GFLOP/s", "float32 matrix products, one core")
    list_visit_seconds: Constant = _constant("seconds", "of a search for each list that any query of a batch probes")
    value_seconds: Constant = _constant("seconds", "of a search for each float16 value that it widens to float32")
    list_product_seconds: Constant = _constant("seconds", "per dimension of a query times a vector of a list")
    block_product_seconds: Constant = _constant("seconds", "per dimension of a query times a vector of many")
    merge_rows_per_second: Constant = _constant("rows/s", "candidates of shards merged, one core")
    attribution_rows_per_second: Constant = _constant("rows/s", "of attributions made and written, one core")
    sources_rows_per_second: Constant = _constant("rows/s", "sources.parquet scanned for ids, one core")

    image_bytes: Constant = _constant("bytes", "of an encoded image")
    manifest_row_bytes: Constant = _constant("bytes", "of a row of manifest; a listing's is the same")
    embedding_row_bytes: Constant = _constant("bytes", "of a row of embeddings, vectors apart")
    source_row_bytes: Constant = _constant("bytes", "of a row of sources.parquet")
    partial_row_bytes: Constant = _constant(
        "bytes", "of a row of partial files: a candidate, the id of its source apart"
    )
    wanted_row_bytes: Constant = _constant("bytes", "of a row of wanted.parquet: a source that a block describes")
    attribution_row_bytes: Constant = _constant("bytes", "of a row of attributions")
    outcome_row_bytes: Constant = _constant("bytes", "of a row of outcomes")
    manifest_file_bytes: Constant = _constant("bytes", "of a file of the manifest beside its rows: schema, footer")
    embedding_file_bytes: Constant = _constant("bytes", "of a file of embeddings beside its rows: schema, footer")
    source_file_bytes: Constant = _constant("bytes", "of a file of sources.parquet beside its rows: schema, footer")
    partial_file_bytes: Constant = _constant("bytes", "of a file of partials beside its rows: schema, footer")
    wanted_file_bytes: Constant = _constant("bytes", "of a file of wanted.parquet beside its rows: schema, footer")
    attribution_file_bytes: Constant = _constant("bytes", "of a file of attributions beside its rows: schema, footer")
    outcome_file_bytes: Constant = _constant("bytes", "of a file of outcomes beside its rows: schema, footer")

    task_seconds: Constant = _constant("seconds", "of the driver per Ray task")
    pickle_bytes_per_second: Constant = _constant("bytes/s", "of task arguments, by the driver")
    start_seconds: Constant = _constant("seconds", "from the start of a job to its first row: Ray, workers, network")
    driver_bytes_per_image: Constant = _constant(
        "bytes", "of the driver's memory per id while the manifest's ids settle"
    )
    driver_bytes_per_chunk: Constant = _constant("bytes", "of the driver's memory per pending chunk")
    driver_bytes_per_failure: Constant = _constant("bytes", "of the driver's memory per image without a vector")
    argument_bytes_per_partition: Constant = _constant(
        "bytes", "pickled with every task per partition of the collection"
    )
    argument_bytes_per_unit: Constant = _constant("bytes", "pickled with every manifest task per listed unit")
    argument_bytes_per_shard: Constant = _constant(
        "bytes", "pickled with every attribution task per shard of the index"
    )

    scan_bytes_per_second: Constant = _constant("bytes/s", "of a metadata table scanned for keys, one core")
    requests_per_image: Constant = _constant("requests", "to read one image: size and bytes")
    requests_per_file: Constant = _constant("requests", "to read one Parquet file or array: size, footer and data")
    requests_per_write: Constant = _constant("requests", "to write one small file")
    request_seconds: Constant = _constant("seconds", "until the object store answers one request")
    reads_per_prefix_second: Constant = _constant(
        "requests/s", "GET and HEAD that the object store takes below one prefix"
    )
    writes_per_prefix_second: Constant = _constant("requests/s", "PUT, LIST and DELETE that it takes below one prefix")


def unit_of(name: str) -> str:
    return Constants.model_fields[name].title


class MachineSettings(Settings):
    """A kind of machine, with the user's own price."""

    num_cpus: Positive
    num_gpus: int = Field(default=0, ge=0)
    memory_gib: float = Field(gt=0)
    network_gbit_per_second: float = Field(gt=0)
    price_per_hour: float = Field(ge=0)


class StorePriceSettings(Settings):
    """The user's own prices of an object store, in the currency of the machines' prices."""

    currency: str = "USD"
    storage_per_gib_month: float = Field(ge=0)
    per_million_reads: float = Field(ge=0)  # GET and HEAD
    per_million_writes: float = Field(ge=0)  # PUT, LIST and DELETE


def _default(job: type[JobSettings], name: str):
    return job.model_fields[name].default


class TargetSettings(Settings):
    """What to plan for. The sizes of the cut are those of the jobs' own configs."""

    num_sources: Positive = 1_000_000_000
    num_queries: Positive = 10_000_000  # a night
    night_hours: float = Field(default=8.0, gt=0)  # to list, embed and attribute the queries
    build_hours: float = Field(default=168.0, gt=0)  # to list, embed and index the sources, once
    dimension: Positive = 256
    image_px: Positive = 224  # of the network's input
    unit_rows: Positive = 10_000  # images of one listed unit: a tar shard, a Parquet file or a folder
    listing_reads_images: bool = True  # tar shards of an object store are streamed to be listed
    sidecar_row_bytes: float = Field(default=0.0, ge=0)  # of the metadata table, per image; 0: there is none
    failed_share: Share = 0.01
    partition_rows: Positive = _default(ManifestSettings, "partition_rows")
    chunk_rows: Positive = _default(EmbedSettings, "chunk_rows")
    shard_rows: Positive = _default(IndexSettings, "shard_rows")
    query_block_rows: Positive = _default(AttributeSettings, "query_block_rows")
    kind: IndexKind = "auto"
    worker_memory_gib: float = _default(IndexSettings, "worker_memory_gib")
    num_lists: Positive | None = None
    pq_bytes: Positive | None = None
    training_rows: Positive | None = _default(IndexSettings, "training_rows")
    held_out_rows: Positive = _default(IndexSettings, "held_out_rows")
    nprobe: Positive = 64  # that met the recall target
    num_recall_passes: Positive = 4  # searches of the held-out images until nprobe was found; the exact one apart
    top_k: Positive = _default(AttributeSettings, "top_k")
    rerank_factor: Positive = _default(IndexSettings, "rerank_factor")
    recall_check_queries: int = Field(default=_default(AttributeSettings, "recall_check_queries"), ge=0)
    embed_on: str
    search_on: str
    driver_memory_gib: float = Field(default=64.0, gt=0)


class SimulationSettings(Settings):
    """The jobs themselves on raylets of this machine, with images and a network that cost next to nothing."""

    num_raylets: tuple[Positive, ...] = (2, 4, 8)  # of one CPU each; empty: no simulation
    num_sources: Positive = 1_600
    num_queries: Positive = 480
    image_px: Positive = 16
    unit_rows: Positive = 100
    partition_rows: Positive = 64
    chunk_rows: Positive = 16
    shard_rows: Positive = 160
    query_block_rows: Positive = 128
    backbone: str = "test_vit"  # of timm, with random weights
    kind: IndexKind = "ivf_flat"
    num_lists: Positive = 8
    held_out_rows: Positive = 16
    recall_check_queries: Positive = 8
    timeout_seconds: Positive = 900  # of one cluster
    object_store_mib: Positive = 100  # of one raylet


class ScaleSettings(JobSettings):
    """jobs.scale: the plan of a size on paper, and how well the same formulas foretell a simulation."""

    constants: Constants
    measure: bool = False  # first measure on this machine what needs neither images nor an object store, in the place of the config's
    benchmark: Uri | None = None  # a benchmark.json whose `constants` stand in for the config's where it has them
    hardware: str = Field(min_length=1)  # that the constants were measured on, in words, for the page
    machines: dict[str, MachineSettings] = Field(min_length=1)
    prices: StorePriceSettings
    target: TargetSettings
    simulation: SimulationSettings = SimulationSettings()
    output: Uri

    @model_validator(mode="after")
    def _machines_known(self):
        for key in ("embed_on", "search_on"):
            name = getattr(self.target, key)
            if name not in self.machines:
                raise ValueError(
                    f"target.{key} = {name!r} is no machine of the config; it has {', '.join(self.machines)}"
                )
        if self.machines[self.target.embed_on].num_gpus and not self.constants.forward_images_per_gpu_second:
            raise ValueError("target.embed_on has GPUs, which need constants.forward_images_per_gpu_second")
        if self.output.startswith("s3://"):
            raise ValueError("the simulation runs on local files; give output a local path")
        return self
