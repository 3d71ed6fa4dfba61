"""Options of jobs.scale: measured constants, the user's machines and prices, and the target to plan for."""

from types import SimpleNamespace
from typing import ClassVar

from pydantic import Field, model_validator

from attrib.attribute.settings import AttributeSettings
from attrib.common.settings import JobSettings, Positive, Settings, Share, Uri
from attrib.data.settings import ManifestSettings
from attrib.embed.settings import EmbedSettings
from attrib.index.settings import IndexKind, IndexSettings

# Constants in the order of attrib.index.cost_model.SearchRates.
SEARCH_RATES = ("list_visit_seconds", "value_seconds", "list_product_seconds", "block_product_seconds")


class Constant(Settings):
    """A measured or assumed value. source: the command that measured it, or who assumed it."""

    value: float = Field(gt=0, allow_inf_nan=False)
    source: str = Field(min_length=1)


def _constant(unit: str, meaning: str, default=...):
    return Field(default, title=unit, description=meaning)


class Constants(Settings):
    """Measured constants. The title of a field is its unit; `constants` of a benchmark.json must use the same unit."""

    list_images_per_second: Constant = _constant("images/s", "list images and compute their ids, one core")
    manifest_rows_per_second: Constant = _constant("rows/s", "write and hash manifest rows, one core")
    decode_images_per_second: Constant = _constant("images/s", "read, decode and resize, one core")
    forward_images_per_core_second: Constant = _constant("images/s", "forward pass of the network, one core")
    forward_images_per_gpu_second: Constant | None = _constant("images/s", "forward pass of the network, one GPU", None)
    embed_efficiency: Constant = _constant("share", "rate of the embed job divided by 1 / (decode + forward)")
    assemble_rows_per_second: Constant = _constant("rows/s", "read chunks, sort and hash, one core")
    build_vectors_per_second: Constant = _constant("vectors/s", "write a shard, lists already assigned, one core")
    gemm_gflops: Constant = _constant("GFLOP/s", "float32 matrix products, one core")
    list_visit_seconds: Constant = _constant("seconds", "search time per list that any query of a batch probes")
    value_seconds: Constant = _constant("seconds", "search time per float16 value converted to float32")
    list_product_seconds: Constant = _constant("seconds", "search time per query, vector of a list and dimension")
    block_product_seconds: Constant = _constant("seconds", "exact search time per query, vector and dimension")
    merge_rows_per_second: Constant = _constant("rows/s", "merge candidates of shards, one core")
    attribution_rows_per_second: Constant = _constant("rows/s", "compute and write attribution rows, one core")
    sources_rows_per_second: Constant = _constant("rows/s", "scan sources.parquet for ids, one core")

    image_bytes: Constant = _constant("bytes", "encoded image (mean)")
    manifest_row_bytes: Constant = _constant("bytes", "row of the manifest or of a listing")
    embedding_row_bytes: Constant = _constant("bytes", "row of the embeddings, without the vector")
    source_row_bytes: Constant = _constant("bytes", "row of sources.parquet")
    partial_row_bytes: Constant = _constant("bytes", "row of a partial file (a candidate), without the source id")
    wanted_row_bytes: Constant = _constant("bytes", "row of wanted.parquet")
    attribution_row_bytes: Constant = _constant("bytes", "row of the attributions")
    outcome_row_bytes: Constant = _constant("bytes", "row of the outcomes")
    manifest_file_bytes: Constant = _constant("bytes", "manifest file without rows: schema and footer")
    embedding_file_bytes: Constant = _constant("bytes", "embeddings file without rows: schema and footer")
    source_file_bytes: Constant = _constant("bytes", "sources.parquet without rows: schema and footer")
    partial_file_bytes: Constant = _constant("bytes", "partial file without rows: schema and footer")
    wanted_file_bytes: Constant = _constant("bytes", "wanted.parquet without rows: schema and footer")
    attribution_file_bytes: Constant = _constant("bytes", "attributions file without rows: schema and footer")
    outcome_file_bytes: Constant = _constant("bytes", "outcomes file without rows: schema and footer")

    task_seconds: Constant = _constant("seconds", "driver time per Ray task")
    pickle_bytes_per_second: Constant = _constant("bytes/s", "pickling of task arguments in the driver")
    start_seconds: Constant = _constant("seconds", "start of a job to its first row: Ray, workers, network")
    driver_bytes_per_image: Constant = _constant("bytes", "driver memory per image while id collisions are resolved")
    driver_bytes_per_chunk: Constant = _constant("bytes", "driver memory per pending chunk")
    driver_bytes_per_failure: Constant = _constant("bytes", "driver memory per failed image")
    argument_bytes_per_partition: Constant = _constant("bytes", "task argument per partition of the collection")
    argument_bytes_per_unit: Constant = _constant("bytes", "argument of a manifest task per listed unit")
    argument_bytes_per_shard: Constant = _constant("bytes", "argument of an attribution task per shard")

    scan_bytes_per_second: Constant = _constant("bytes/s", "read a metadata table, one core")
    requests_per_image: Constant = _constant("requests", "per image read: size and bytes")
    requests_per_file: Constant = _constant(
        "requests", "per Parquet file or array read: verification, size, footer, data"
    )
    requests_per_write: Constant = _constant("requests", "per small file written")
    reads_per_write: Constant = _constant("requests", "per small file written: its size is asked for afterwards")
    request_seconds: Constant = _constant("seconds", "latency of one request to the object store")
    reads_per_prefix_second: Constant = _constant("requests/s", "GET and HEAD limit of one prefix of the object store")
    writes_per_prefix_second: Constant = _constant("requests/s", "PUT, LIST and DELETE limit of one prefix")

    def values(self) -> SimpleNamespace:
        """The values without their sources."""
        return SimpleNamespace(**{name: given.value for name, given in self if given})


class MachineSettings(Settings):
    """One machine type with its price."""

    num_cpus: Positive
    num_gpus: int = Field(default=0, ge=0)
    memory_gib: float = Field(gt=0)
    network_gbit_per_second: float = Field(gt=0)
    price_per_hour: float = Field(ge=0)


class StorePriceSettings(Settings):
    """Prices of the object store, in the currency of the machine prices."""

    currency: str = "USD"
    storage_per_gib_month: float = Field(ge=0)
    per_million_reads: float = Field(ge=0)  # GET and HEAD
    per_million_writes: float = Field(ge=0)  # PUT, LIST and DELETE


def _default(job: type[JobSettings], name: str):
    return job.model_fields[name].default


class TargetSettings(Settings):
    """What to plan for. Sizes of partitions, chunks, shards and blocks default to those of the jobs."""

    num_sources: Positive = 1_000_000_000
    num_queries: Positive = 10_000_000  # per night
    night_hours: float = Field(default=8.0, gt=0)  # to list, embed and attribute the queries
    build_hours: float = Field(default=168.0, gt=0)  # to list, embed and index the sources, once
    dimension: Positive = 256
    image_px: Positive = 224  # network input
    unit_rows: Positive = 10_000  # images per listed unit: a tar shard, a Parquet file or a folder
    listing_reads_images: bool = True  # tar shards are read whole to be listed
    sidecar_row_bytes: float = Field(default=0.0, ge=0)  # bytes per image of a metadata table; 0: no table
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
    nprobe: Positive = 64  # value that meets the recall target
    num_recall_passes: Positive = 4  # searches of the held-out images, without the exact one
    top_k: Positive = _default(AttributeSettings, "top_k")
    rerank_factor: Positive = _default(IndexSettings, "rerank_factor")
    recall_check_queries: int = Field(default=_default(AttributeSettings, "recall_check_queries"), ge=0)
    embed_on: str
    search_on: str
    driver_memory_gib: float = Field(default=64.0, gt=0)


class ScaleSettings(JobSettings):
    """jobs.scale: machines, hours and cost of a given number of images, and what limits it."""

    retired_keys: ClassVar[dict[str, str]] = {
        "simulation": "a test compares the predicted counts with a real run instead",
        "measure": "state the constants in the config, or set run to the output of a finished jobs.pipeline",
    }
    constants: Constants
    run: Uri | None = None  # output of a finished jobs.pipeline; its records replace constants of this config
    benchmark: Uri | None = None  # a benchmark.json; its `constants` replace those of this config
    hardware: str = Field(min_length=1)  # description of the machine on which the constants were measured
    machines: dict[str, MachineSettings] = Field(min_length=1)
    prices: StorePriceSettings
    target: TargetSettings
    output: Uri

    @model_validator(mode="after")
    def _machines_known(self):
        for key in ("embed_on", "search_on"):
            name = getattr(self.target, key)
            if name not in self.machines:
                known = ", ".join(self.machines)
                raise ValueError(f"target.{key} = {name!r} is no machine of the config; it has {known}")
        if self.machines[self.target.embed_on].num_gpus and not self.constants.forward_images_per_gpu_second:
            raise ValueError("target.embed_on has GPUs, which need constants.forward_images_per_gpu_second")
        return self
