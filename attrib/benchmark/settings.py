"""Options of jobs.benchmark."""

from typing import Literal

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Uri
from attrib.data.settings import CollectionSettings
from attrib.models.settings import BackboneSettings

Stage = Literal["decode", "embed", "build", "search", "attribute", "train", "ray", "resume"]
STAGES: tuple[Stage, ...] = ("decode", "embed", "build", "search", "attribute", "train", "ray", "resume")


class ImageBenchmarkSettings(Settings):
    """JPEGs made from the collection's photographs, for the stages that decode."""

    num_images: Positive = 2048
    min_megapixels: float = Field(default=0.5, gt=0)
    max_megapixels: float = Field(default=2.0, gt=0)
    quality: int = Field(default=90, ge=1, le=95)
    decode_images: Positive = 192  # of them, for the decode stage
    loader_images: Positive = 640  # of them, for the DataLoader script, which is steady after the first batches
    chunk_rows: Positive = 128  # of the embed job, as its default is

    @model_validator(mode="after")
    def _order(self):
        if self.min_megapixels > self.max_megapixels:
            raise ValueError(f"min_megapixels {self.min_megapixels:g} is above max_megapixels {self.max_megapixels:g}")
        return self


class VectorBenchmarkSettings(Settings):
    """Vectors for the stages that build and search."""

    sizes: tuple[Positive, ...] = Field(default=(10_000, 100_000, 1_000_000), min_length=1)
    dimension: Positive = 256
    map_px: Positive = 320  # side of the pictures whose feature maps are pooled over windows
    versions_per_image: Positive = 2  # augmented pictures of each image
    gaussian_size: Positive | None = 100_000  # the worst case beside them; None: left out
    batches: tuple[Positive, ...] = Field(default=(100, 10_000), min_length=1)
    top_k: Positive = 10
    recall_target: float = Field(default=0.99, gt=0, le=1)  # which sets nprobe
    more_nprobes: tuple[Positive, ...] = (32,)  # beside it: a search that misses less
    threads: tuple[Positive, ...] = Field(default=(1, 2), min_length=1)
    num_shards: Positive = 4  # that two workers share
    slow_peer_queries: int = Field(default=2_000, ge=1)  # brute force is timed on these and scaled
    argsort_queries: Positive = 100
    slow_rounds: Positive = 1  # of training and of autofaiss at the largest size
    autofaiss: bool = True

    @model_validator(mode="after")
    def _ascending(self):
        for name in ("sizes", "batches", "threads"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ValueError(f"{name} must ascend, each once: {list(getattr(self, name))}")
        return self


class TrainBenchmarkSettings(Settings):
    """A linear head on the backbone's output."""

    num_views: Positive = 16_384
    num_images: Positive = 2_048
    dimension: Positive = 256
    batch_size: Positive = 256
    num_epochs: Positive = 4


class BenchmarkSettings(JobSettings):
    """jobs.benchmark: speed as ratios, all sides measured in turn in one run."""

    collections: tuple[CollectionSettings, ...] = ()  # folders of images; none: images drawn by the project
    backbone: BackboneSettings = BackboneSettings(name="mobilenetv2_100", weights="random")
    output: Uri
    only: tuple[Stage, ...] = STAGES
    num_rounds: Positive = 3
    num_workers: Positive = 2  # processes of one thread each in jobs, and total threads of their peers
    num_drawn: Positive = 512  # images, where there is no collection
    image_px: Positive = 512  # of a drawn image
    images: ImageBenchmarkSettings = ImageBenchmarkSettings()
    vectors: VectorBenchmarkSettings = VectorBenchmarkSettings()
    train: TrainBenchmarkSettings = TrainBenchmarkSettings()
    num_ray_tasks: Positive = 256

    @model_validator(mode="after")
    def _local(self):
        for name, uri in [("output", self.output), *(("collections", c.uri) for c in self.collections)]:
            if uri.startswith("s3://"):
                raise ValueError(f"{name}: the benchmark measures local files; {uri} needs a local path")
        for collection in self.collections:
            if collection.format != "folder":
                raise ValueError(
                    f"collections: {collection.name} has format {collection.format}; give folders of images"
                )
        return self
