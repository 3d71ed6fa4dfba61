"""Most options of the jobs, in one place; those of a whole flow are in attrib/pipeline/settings.py.

Models are frozen, reject unknown keys and are validated before any work. This module imports nothing heavy, so that
a config error or `--help` answers in about a second.
"""

import os
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def absolute_uri(uri: str) -> str:
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


Uri = Annotated[str, AfterValidator(absolute_uri)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), serialize_by_alias=True)
    old_keys: ClassVar[dict[str, str]] = {}  # old key: its new name; the config reader accepts it with a warning


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
