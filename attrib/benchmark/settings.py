"""Options of jobs.benchmark."""

import logging
from typing import ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Uri
from attrib.data.settings import CollectionSettings
from attrib.models.settings import BackboneSettings

logger = logging.getLogger(__name__)

Stage = Literal["decode", "embed", "build", "search"]
STAGES: tuple[Stage, ...] = get_args(Stage)
RETIRED_STAGES = ("attribute", "train", "ray", "resume")
REMOVED = "that comparison was removed, see attrib/benchmark/RESULTS.md"


class ImageBenchmarkSettings(Settings):
    """JPEGs made from the images of the collections, for the stages decode and embed."""

    retired_keys: ClassVar = {"chunk_rows": REMOVED}
    num_images: Positive = 2048
    min_megapixels: float = Field(default=0.5, gt=0)
    max_megapixels: float = Field(default=2.0, gt=0)
    quality: int = Field(default=90, ge=1, le=95)
    decode_images: Positive = 192  # images of the stage decode
    loader_images: Positive = 640  # images of the DataLoader script; its rate is steady after the first batches

    @model_validator(mode="after")
    def _order(self):
        if self.min_megapixels > self.max_megapixels:
            raise ValueError(f"min_megapixels {self.min_megapixels:g} is above max_megapixels {self.max_megapixels:g}")
        return self


class VectorBenchmarkSettings(Settings):
    """Vectors for the stages build and search."""

    retired_keys: ClassVar = {"num_shards": REMOVED}
    sizes: tuple[Positive, ...] = Field(default=(10_000, 100_000, 1_000_000), min_length=1)
    dimension: Positive = 256
    map_px: Positive = 320  # side of the network input whose feature maps are averaged under windows
    versions_per_image: Positive = 2  # augmented versions of each image
    gaussian_size: Positive | None = 100_000  # vectors of Gaussian noise, the worst case; None: leave out
    batches: tuple[Positive, ...] = Field(default=(100, 10_000), min_length=1)  # numbers of queries
    top_k: Positive = 10
    recall_target: float = Field(default=0.99, gt=0, le=1)  # sets nprobe
    more_nprobes: tuple[Positive, ...] = (32,)  # further values of nprobe
    threads: tuple[Positive, ...] = Field(default=(1, 2), min_length=1)
    slow_peer_queries: int = Field(default=2_000, ge=1)  # queries of the ground truth and of FAISS on noise, scaled
    argsort_queries: Positive = 100  # queries of AbC's loop, scaled
    slow_rounds: Positive = 1  # rounds of training at the largest size
    autofaiss: bool = True
    autofaiss_folder: Uri | None = None  # its environment (see RESULTS.md); None: <output>/inputs/autofaiss

    @model_validator(mode="after")
    def _ascending(self):
        for name in ("sizes", "batches", "threads"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ValueError(f"{name} must ascend, each once: {list(getattr(self, name))}")
        return self


class BenchmarkSettings(JobSettings):
    """jobs.benchmark: times relative to other libraries, measured in turn in one run."""

    retired_keys: ClassVar = dict.fromkeys(("train", "num_ray_tasks"), REMOVED)
    collections: tuple[CollectionSettings, ...] = ()  # folders of images; none: images drawn by the project
    backbone: BackboneSettings = BackboneSettings(name="mobilenetv2_100", weights="random")
    output: Uri
    only: tuple[Stage, ...] = STAGES
    num_rounds: Positive = 3
    num_workers: Positive = 2  # one-thread processes of the stage embed; the script uses as many threads in all
    num_drawn: Positive = 512  # number of drawn images if there is no collection
    image_px: Positive = 512  # side of a drawn image
    images: ImageBenchmarkSettings = ImageBenchmarkSettings()
    vectors: VectorBenchmarkSettings = VectorBenchmarkSettings()

    @field_validator("only", mode="before")
    @classmethod
    def _drop_retired_stages(cls, only):
        """Stages of earlier versions are ignored with a warning, unless no other is left."""
        retired = [stage for stage in only if stage in RETIRED_STAGES] if isinstance(only, list) else []
        if retired and len(retired) == len(only):
            raise ValueError(
                f"{', '.join(retired)}: no longer measured, see attrib/benchmark/RESULTS.md for the last results; "
                f"choose from {', '.join(STAGES)}"
            )
        for stage in retired:
            logger.warning(f"stage {stage} is no longer used: {REMOVED}; delete it from the config")
        return [stage for stage in only if stage not in retired] if retired else only

    @model_validator(mode="after")
    def _local(self):
        for uri in (self.output, *(collection.uri for collection in self.collections)):
            if uri.startswith("s3://"):
                raise ValueError(f"the benchmark measures local files; {uri} needs a local path")
        for collection in self.collections:
            if collection.format != "folder":
                raise ValueError(f"collections: {collection.name} has format {collection.format}; give image folders")
        return self
