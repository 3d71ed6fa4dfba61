"""Options that all jobs share, and the base class of all settings.

Settings are frozen, reject unknown keys and are validated before any work. They import nothing heavy,
so that `--help` and config errors answer in about a second.
"""

import logging
import os
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from attrib.common.secrets import has_credentials

logger = logging.getLogger(__name__)


def absolute_uri(uri: str) -> str:
    """Local paths become absolute here, because workers run in other folders than the driver."""
    if not uri:
        raise ValueError("an empty path; give a folder, a file or an s3:// URI")
    if "\0" in uri:
        raise ValueError("a path with a NUL character; correct it")
    if has_credentials(uri):
        raise _credentials("a URI")
    if uri.startswith("s3://"):
        if not uri.removeprefix("s3://").strip("/") or uri.startswith("s3:///"):
            raise ValueError(f"{uri!r} names no bucket; write s3://bucket/prefix (is an environment variable empty?)")
        return uri.rstrip("/")
    if "://" in uri and not uri.lower().startswith("file://"):
        raise ValueError(f"unsupported scheme in {uri!r}; use a local path, file:// or s3://")
    return os.path.abspath(os.path.expanduser(local_path(uri)))


def _credentials(what: str) -> PydanticCustomError:
    return PydanticCustomError("secret", f"{what} must not hold credentials; set AWS_ACCESS_KEY_ID and so on")


def local_path(uri: str) -> str:
    """The path of a file: URI (RFC 8089: percent-encoded, with a host or without); any other text stays as it is.

    A path that is there as it is written is taken as it is. Raises ValueError for a file on another host.
    """
    scheme, path = uri[:5], uri[5:]
    if scheme.lower() != "file:" or not path.startswith("/"):
        return uri
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ValueError(
                f"{uri!r} is a file on the host {host!r}; write file:/// and the path, if it is on this one"
            )
        path = slash + path
    return path if os.path.lexists(path) else unquote(path, errors="surrogateescape")


IS_URI = AfterValidator(absolute_uri)
Uri = Annotated[str, IS_URI]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), serialize_by_alias=True)
    old_keys: ClassVar[dict[str, str]] = {}  # old key: its new name; the config reader accepts it with a warning
    retired_keys: ClassVar[dict[str, str]] = {}  # key of an earlier version: why it went; ignored with a warning

    @model_validator(mode="before")
    @classmethod
    def _drop_retired_keys(cls, values: Any) -> Any:
        for key, reason in cls.retired_keys.items():
            if isinstance(values, dict) and key in values:
                logger.warning(f"{key} is no longer used: {reason}; delete it from the config")
                values = {name: value for name, value in values.items() if name != key}
        return values


class StorageSettings(Settings):
    """Access to `s3://` URIs. Credentials come from the environment only (AWS_ACCESS_KEY_ID and so on)."""

    client: Literal["arrow", "s3fs"] = "arrow"
    endpoint: str | None = None  # for a store other than AWS, e.g. http://127.0.0.1:9000
    region: str | None = None
    local_is_shared: bool = False  # local paths lie on a disk that all nodes share and that outlives the cluster
    max_attempts: Positive = 10  # Arrow's own default of 3 is too few for long jobs
    connect_timeout_seconds: Positive = 10
    request_timeout_seconds: Positive = 60

    @model_validator(mode="after")
    def _endpoint_has_scheme(self) -> Self:
        if self.endpoint is not None and not re.match("https?://[^/:]", self.endpoint):
            raise ValueError(f"storage.endpoint {self.endpoint!r} needs http:// or https:// in front, and a host")
        return self

    @field_validator("endpoint")
    @classmethod
    def _without_credentials(cls, endpoint: str | None) -> str | None:
        if endpoint and "@" in endpoint:
            raise _credentials("an endpoint")
        return endpoint


class RaySettings(Settings):
    address: str | None = None  # None: RAY_ADDRESS if set, else a local Ray in this process tree
    num_cpus: Positive | None = None  # for a local Ray only; None: all cores
    object_store_gib: float | None = Field(default=None, gt=0)  # for a local Ray only

    @field_validator("address")
    @classmethod
    def _without_credentials(cls, address: str | None) -> str | None:
        if address and "@" in address:
            raise _credentials("an address")
        return address


class PriceSettings(Settings):
    """Prices of worker hours, storage and requests; 0 means free."""

    currency: str = "USD"
    per_cpu_worker_hour: float = Field(default=0.0, ge=0)  # per worker, not per machine
    per_gpu_worker_hour: float = Field(default=0.0, ge=0)
    storage_per_gib_month: float = Field(default=0.0, ge=0)  # the output is kept for one month
    per_million_reads: float = Field(default=0.0, ge=0)  # requests to an object store: GET and HEAD
    per_million_writes: float = Field(default=0.0, ge=0)  # PUT, LIST and DELETE


class BudgetSettings(Settings):
    """Limits on the estimate of a job: above one, it does not start. None: no limit. In a pipeline, per stage."""

    max_process_gib: float | None = Field(default=None, gt=0)  # memory of one worker, and of the driver
    max_output_gib: float | None = Field(default=None, gt=0)  # including files that are deleted at the end
    max_scratch_gib: float | None = Field(default=None, gt=0)  # local disk of one worker
    max_hours: float | None = Field(default=None, gt=0)
    max_cost: float | None = Field(default=None, gt=0)
    prices: PriceSettings | None = None

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.max_cost is not None and self.prices is None:
            raise ValueError("max_cost needs prices; without them the cost cannot be estimated")
        return self


IDENTITY = "identity"  # the context in which settings are written to be digested


def result_settings(settings: "JobSettings", context: str | None = None) -> dict[str, Any]:
    """The settings that decide what a job writes. context: IDENTITY, to digest them."""
    return settings.model_dump(mode="json", exclude=set(settings.execution_only), context=context)


class JobSettings(Settings):
    """Base class of the settings of a job."""

    if TYPE_CHECKING:
        output: str  # a field of every job that writes a record

    # Keys that do not change what a job writes, so they may differ when a killed run is restarted. Inputs are compared
    # by digest, not by path.
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
            "rescan",
        }
    )

    own_folders: ClassVar[tuple[str, ...]] = ()  # of the output, which the job makes before it knows its inputs

    storage: StorageSettings = StorageSettings()
    ray: RaySettings = RaySettings()
    budget: BudgetSettings = BudgetSettings()


class RescanSettings(JobSettings):
    """Base class of the settings of jobs whose inputs may change between two runs."""

    # What the job makes in its output, beside its record: names, or names in a folder, as regular expressions. A folder
    # of such a name is the job's with all that is in it.
    made: ClassVar[tuple[str, ...]] = ()

    rescan: bool = (
        False  # if the inputs changed since a run, its results are deleted and made again; else the job stops
    )
