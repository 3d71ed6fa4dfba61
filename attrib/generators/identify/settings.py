"""Options of jobs.identify."""

from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field

from attrib.common.settings import JobSettings, Positive, RescanSettings, Settings, Share, Uri
from attrib.generators.registry.settings import MIN_REFERENCES, VerdictSettings


class PrevalenceSettings(Settings):
    """Estimates over the whole image set: prevalence of the generators, sets of one account, candidate generators."""

    num_draws: Annotated[int, Field(ge=100)] = 1_000  # random draws of the shares, for their 95 % intervals
    set_column: str | None = None  # metadata column of the manifest; images with the same value (account) are one set
    min_set_images: Annotated[int, Field(ge=2)] = 5
    max_set_images: Positive = 200  # per set, chosen by a hash of their ids
    num_permutations: Annotated[int, Field(ge=99)] = 999
    max_clustered: Positive = 2_000  # distinct unknown images that are clustered; the others join the clusters
    min_candidate_images: Positive = MIN_REFERENCES  # distinct images that make a cluster a candidate generator
    num_exemplars: Positive = 12
    seed: int = 0


class IdentifySettings(RescanSettings):
    """jobs.identify: which registered generator each image of a manifest is consistent with."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {
        "registry",
        "previous",
        "device",
        "io_threads",
    }
    made: ClassVar[tuple[str, ...]] = (
        *(r"verdicts/part-\d{5,}\.parquet", "_chunks", r"sets\.parquet", r"candidates\.parquet", r"share_draws\.npy"),
    )
    old_keys: ClassVar[dict[str, str]] = {"dump": "prevalence"}

    manifest: Uri
    registry: Uri
    output: Uri
    previous: Uri | None = None  # output of an earlier run, to report the change of the shares
    max_failed_share: Share = 0.05  # of images that cannot be read or decoded
    verdicts: VerdictSettings = VerdictSettings()
    # Records and output keep the old key, so that a finished run is found again.
    prevalence: PrevalenceSettings = Field(
        default=PrevalenceSettings(), validation_alias=AliasChoices("prevalence", "dump"), serialization_alias="dump"
    )
    chunk_rows: Positive = 256  # images that are committed together
    io_threads: Positive = 8
    max_megapixels: float = Field(default=100.0, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
