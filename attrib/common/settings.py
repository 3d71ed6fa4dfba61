"""Most options of the jobs, in one place; those of a whole flow are in attrib/pipeline/settings.py.

Models are frozen, reject unknown keys and are validated before any work. This module imports nothing heavy, so that
a config error or `--help` answers in about a second.
"""

import os
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _absolute_uri(uri: str) -> str:
    """Workers run in other folders than the driver, so a relative local path is resolved where it was written."""
    if not uri:
        raise ValueError("an empty path; give a folder, a file or an s3:// URI")
    if uri.startswith("s3://"):
        if not uri.removeprefix("s3://").strip("/") or uri.startswith("s3:///"):
            raise ValueError(f"{uri!r} names no bucket; write s3://bucket/prefix (is an environment variable empty?)")
        return uri.rstrip("/")
    if "://" in uri and not uri.startswith("file://"):
        raise ValueError(f"unsupported scheme in {uri!r}; use a local path, file:// or s3://")
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


Uri = Annotated[str, AfterValidator(_absolute_uri)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StorageSettings(Settings):
    """How `s3://` URIs are reached. Credentials come from the environment only (AWS_ACCESS_KEY_ID and so on)."""

    client: Literal["arrow", "s3fs"] = "arrow"
    endpoint: str | None = None  # e.g. http://127.0.0.1:9000 for a store that is not AWS
    region: str | None = None
    max_attempts: Positive = 10  # Arrow's own default of 3 is too few for long jobs
    connect_timeout_seconds: Positive = 10
    request_timeout_seconds: Positive = 60

    @model_validator(mode="after")
    def _endpoint_has_scheme(self):
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"storage.endpoint {self.endpoint!r} needs http:// or https:// in front")
        return self


class RaySettings(Settings):
    address: str | None = None  # None: RAY_ADDRESS if set, else a local Ray in this process tree
    num_cpus: Positive | None = None  # for a local Ray only; None: all cores
    object_store_gib: float | None = Field(default=None, gt=0)  # for a local Ray only


class MetadataSettings(Settings):
    """A sidecar table (CSV, TSV or Parquet): one row per image key, any further columns."""

    uri: Uri
    key_column: str = "key"
    key_prefix: str = ""  # what the table's keys have in front of the collection's


class CollectionSettings(Settings):
    """One image collection: a folder tree, WebDataset tar shards, or Parquet files."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    uri: Uri
    format: Literal["folder", "webdataset", "parquet"] = "folder"
    extensions: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    key_column: str | None = None  # Parquet; None with a URI column: the URI itself is the key
    bytes_column: str | None = None  # Parquet with the encoded images inside
    uri_column: str | None = None  # Parquet that points at image files
    metadata_columns: tuple[str, ...] = ()  # Parquet columns to carry along
    metadata: MetadataSettings | None = None

    @model_validator(mode="after")
    def _parquet_columns(self):
        if self.format == "parquet":
            if (self.bytes_column is None) == (self.uri_column is None):
                raise ValueError("format 'parquet' needs exactly one of bytes_column and uri_column")
            if self.bytes_column and not self.key_column:
                raise ValueError("bytes_column needs key_column: ids are made from keys, never from row numbers")
        elif self.key_column or self.bytes_column or self.uri_column or self.metadata_columns:
            raise ValueError("key_column, bytes_column, uri_column and metadata_columns belong to format 'parquet'")
        return self


class PriceSettings(Settings):
    """What a job's worker-hours, bytes and requests cost. What is not priced is free."""

    currency: str = "USD"
    per_cpu_worker_hour: float = Field(default=0.0, ge=0)  # of one worker, not of a machine
    per_gpu_worker_hour: float = Field(default=0.0, ge=0)
    storage_per_gib_month: float = Field(default=0.0, ge=0)  # the output is counted for one month
    per_million_reads: float = Field(default=0.0, ge=0)  # requests to an object store: GET and HEAD
    per_million_writes: float = Field(default=0.0, ge=0)  # PUT, LIST and DELETE


class BudgetSettings(Settings):
    """Limits on what is estimated before a job starts; over one of them it refuses. None: no limit. In a pipeline, of each stage."""

    max_process_gib: float | None = Field(default=None, gt=0)  # memory of any one worker, and of the driver
    max_output_gib: float | None = Field(default=None, gt=0)  # what is deleted at the job's end included
    max_scratch_gib: float | None = Field(default=None, gt=0)  # local disk of any one worker
    max_hours: float | None = Field(default=None, gt=0)
    max_cost: float | None = Field(default=None, gt=0)
    prices: PriceSettings | None = None

    @model_validator(mode="after")
    def _priced(self):
        if self.max_cost is not None and self.prices is None:
            raise ValueError("max_cost needs prices: without them a cost cannot be estimated")
        return self


def result_settings(settings: "JobSettings") -> dict:
    """The part of a job's settings that decides what it writes."""
    return settings.model_dump(mode="json", exclude=set(settings.execution_only))


Domain = Literal["real", "synthetic"]


class BackboneSettings(Settings):
    """A timm network as an image encoder.

    weights: "hub" (timm's pretrained weights), "random" (a seeded untrained control), or the URI of a .safetensors file: plain
    timm weights, or a checkpoint of ours, which names its network and preprocessing itself.
    """

    name: str = Field(min_length=1)
    weights: str = "hub"
    seed: int = 0  # for weights: random
    domain: Domain = (
        "real"  # which head, where a checkpoint has two; jobs.pipeline takes "synthetic" for generated images
    )

    @model_validator(mode="after")
    def _weights_known(self):
        if self.weights not in ("hub", "random"):
            if not self.weights.endswith(".safetensors"):
                raise ValueError(
                    f"backbone.weights {self.weights!r} is neither 'hub', 'random' nor a .safetensors file; other formats can "
                    "execute code when loaded and are refused"
                )
            object.__setattr__(self, "weights", _absolute_uri(self.weights))
        return self


class JobSettings(Settings):
    # Keys that do not decide what a job writes: they may differ between a killed run and its restart. Inputs are known by digest, not by place.
    execution_only: ClassVar[frozenset[str]] = frozenset(
        {
            "storage",
            "ray",
            "max_failed_share",
            "manifest",
            "embeddings",
            "queries",
            "index",
            "output",
            "threads_per_task",
            "budget",
        }
    )

    storage: StorageSettings = StorageSettings()
    ray: RaySettings = RaySettings()
    budget: BudgetSettings = BudgetSettings()


class ManifestSettings(JobSettings):
    """jobs.manifest: list a collection and give every image its id."""

    collection: CollectionSettings
    output: Uri
    partition_rows: Positive = 16_384  # one embeddings file, and one unit of resumption, per partition


class EmbedSettings(JobSettings):
    """jobs.embed: one vector per image of a manifest."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {
        "device",
        "num_workers",
        "io_threads",
        "retry_failed",
    }

    manifest: Uri
    output: Uri
    max_failed_share: Share = 0.05  # above it the job fails; what it made is kept
    backbone: BackboneSettings
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: Positive | None = None  # None: one per GPU, or one per CPU where there is no GPU
    chunk_rows: Positive = 128  # images that commit together; a kill loses at most one chunk per worker
    device_batch_size: Positive | None = None  # None: 16 on a CPU, 128 on a GPU
    io_threads: Positive = 8  # concurrent reads per chunk; object stores answer slowly but in parallel
    max_megapixels: float = Field(default=100.0, gt=0)
    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves its shorter side this many times what the network's preprocessing
    # resizes it to. Lowest cosine of MobileNetV2's vectors to those of full decoding, photographs sharp to the pixel: 0.9991 at 3, 0.998
    # at 2.2. None: always at full size, as timm does.
    jpeg_margin: float | None = Field(default=3.0, ge=1)
    retry_failed: bool = False  # embed again only the images that failed in an earlier run


IndexKind = Literal["auto", "flat", "ivf_flat", "ivf_sq8", "ivf_pq"]


class IndexSettings(JobSettings):
    """jobs.index: a sharded index over the embeddings of the sources."""

    embeddings: Uri
    output: Uri
    kind: IndexKind = "auto"
    shard_rows: Positive = 1_000_000
    worker_memory_gib: float = Field(default=4.0, gt=0)  # what one search worker may hold or keep cached of one shard
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of training and of filling the lists
    num_lists: Positive | None = None  # None: a rule of the vector count (attrib/index/planning.py)
    pq_bytes: Positive | None = None  # bytes per PQ code; None: one per 8 dimensions
    training_rows: Positive | None = None  # None: 64 vectors per list
    held_out_rows: Positive = 1_000
    recall_k: Positive = 10
    recall_target: float = Field(default=0.99, gt=0, le=1)
    rerank_factor: Positive = 8  # candidates per wanted neighbour that are scored again exactly
    threads_per_task: Positive = 1
    seed: int = 0


class SharesSettings(Settings):
    """AbC's soft shares (arXiv 2306.09345): t_j = relu(exp((s_j - max) * inverse_temperature) + 0.001 * offset)."""

    inverse_temperature: float = Field(default=50.0, gt=0, allow_inf_nan=False)
    offset: float = Field(default=-50.0, gt=-1000.0, le=0.0)


class AttributeSettings(JobSettings):
    """jobs.attribute: the sources of every generated image of a batch."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {"device", "generators"}

    queries: Uri  # embeddings of the generated images
    index: Uri
    output: Uri
    generators: Uri | None = (
        None  # output of jobs.identify on the same images: outcomes then say which generator each is consistent with
    )
    max_failed_share: Share = 0.05
    top_k: Positive = 10
    nprobe: Positive | None = None  # None: the one that met the recall target when the index was built
    rerank_factor: Positive | None = None  # None: the index's own
    query_block_rows: Positive = 100_000  # most that are merged and written together
    engine: Literal["auto", "exact", "lists", "codes"] = "auto"  # auto: the quickest by the rates stored with the index
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the scan; candidates are scored again on the CPU either way
    recall_check_queries: int = Field(default=64, ge=0)  # queries of this batch that are also searched exactly
    shares: SharesSettings = SharesSettings()
    threads_per_task: Positive = 1
    run_id: str | None = None  # None: derived from the inputs and these settings


class ReportSettings(JobSettings):
    """jobs.report: one self-contained page for an attribution run."""

    attributions: Uri
    output: Uri  # the .html file
    title: str = "Image attribution"
    clear_similarity: float = Field(default=0.5, ge=-1, le=1)  # at or above: the query has a clear source
    roll_up: tuple[str, ...] = ()  # metadata columns of the sources; empty: all of them
    num_gallery: Positive = 24
    num_sources: Positive = 20
    thumbnail_px: Positive = 112


class DemoSettings(JobSettings):
    """jobs.demo: the whole flow on a corpus that the project draws, with generators that are fitted to known exemplars of it."""

    output: Uri = Field(default="runs/demo", validate_default=True)
    num_sources: Annotated[int, Field(ge=100)] = 1000
    num_exemplars: Positive = 32
    samples_per_exemplar: Positive = 6
    num_epochs: Positive = 60  # of the contrastive training
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self):
        if self.output.startswith("s3://"):
            raise ValueError("the demo draws to a local folder; give output a local path")
        if self.num_exemplars > self.num_sources:
            raise ValueError(f"{self.num_exemplars} exemplars cannot be chosen from {self.num_sources} sources")
        return self
