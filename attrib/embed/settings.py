"""Options of jobs.embed."""

from typing import ClassVar, Literal

from pydantic import Field

from attrib.common.settings import JobSettings, Positive, RescanSettings, Share, Uri
from attrib.models.settings import BackboneSettings


class EmbedSettings(RescanSettings):
    """jobs.embed: one vector per image of a manifest."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {
        "device",
        "num_workers",
        "io_threads",
        "retry_failed",
    }
    made: ClassVar[tuple[str, ...]] = (r"part-\d{5,}\.parquet", r"failures\.parquet", "_chunks")

    manifest: Uri
    output: Uri
    max_failed_share: Share = 0.05  # if more images fail, the job fails; finished vectors are kept
    backbone: BackboneSettings
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: Positive | None = None  # None: one per GPU, or one per CPU where there is no GPU
    chunk_rows: Positive = 128  # images per commit; an interruption loses at most one chunk per worker
    device_batch_size: Positive | None = None  # None: 16 on a CPU, 128 on a GPU
    io_threads: Positive = 8  # concurrent reads per chunk; object stores have high latency
    max_megapixels: float = Field(default=100.0, gt=0)
    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side stays at least jpeg_margin times the size
    # that preprocessing resizes it to. Lowest cosine between MobileNetV2 vectors of scaled and full decoding, for
    # photographs that are sharp at pixel level: 0.9991 at 3, 0.998 at 2.2. None: always at full size, as timm does.
    jpeg_margin: float | None = Field(default=3.0, ge=1)
    retry_failed: bool = False  # embed only the images that failed in an earlier run
