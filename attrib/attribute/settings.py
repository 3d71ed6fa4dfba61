"""Options of jobs.attribute and jobs.report."""

from typing import ClassVar, Literal

from pydantic import Field

from attrib.common.settings import JobSettings, Positive, RescanSettings, Share, Uri
from attrib.shares.settings import SharesSettings


class AttributeSettings(RescanSettings):
    """jobs.attribute: the sources of every generated image of a batch."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {"device", "generators"}
    made: ClassVar[tuple[str, ...]] = (
        *(r"attributions/block-\d{5,}\.parquet", r"outcomes/block-\d{5,}\.parquet", "_partials"),
    )

    queries: Uri  # embeddings of the generated images
    index: Uri
    output: Uri
    generators: Uri | None = None  # output of jobs.identify on the same images; its verdicts are joined to the outcomes
    max_failed_share: Share = 0.05
    top_k: Positive = 10
    nprobe: Positive | None = None  # None: that of the index, which met the recall target
    rerank_factor: Positive | None = None  # None: that of the index
    query_block_rows: Positive = 100_000  # maximum number of queries per block
    engine: Literal["auto", "exact", "lists", "codes"] = "auto"  # auto: the fastest, by the rates stored with the index
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the scan; exact scores are always computed on the CPU
    recall_check_queries: int = Field(default=64, ge=0)  # queries of the batch that are searched exactly as well
    shares: SharesSettings = SharesSettings()
    threads_per_task: Positive = 1
    run_id: str | None = None  # None: a digest of inputs and settings


class ReportSettings(JobSettings):
    """jobs.report: one self-contained page for an attribution run."""

    attributions: Uri
    output: Uri  # the .html file
    title: str = "Image attribution"
    clear_similarity: float = Field(default=0.5, ge=-1, le=1)  # cosine; a query at or above it has a clear source
    roll_up: tuple[str, ...] = ()  # metadata columns of the sources; empty: all of them
    num_gallery: Positive = 24
    num_sources: Positive = 20
    thumbnail_px: Positive = 112
