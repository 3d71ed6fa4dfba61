"""Options of jobs.benchmark."""

import logging
from typing import Literal, get_args

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Uri
from attrib.data.settings import CollectionSettings
from attrib.models.settings import BackboneSettings

logger = logging.getLogger(__name__)

Stage = Literal["decode", "embed", "build", "search"]
STAGES: tuple[Stage, ...] = get_args(Stage)
RETIRED_STAGES = ("attribute", "train", "ray", "resume")


class ImageBenchmarkSettings(Settings):
    """JPEGs made from the images of the collections, for the stages decode and embed."""

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

    @model_validator(mode="before")
    @classmethod
    def _drop_retired(cls, values):
        """Keys and stages of earlier versions are accepted with a warning; their results are in RESULTS.md."""
        values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
        dropped = [key for key in ("train", "num_ray_tasks") if values.pop(key, None) is not None]
        for section, key in (("vectors", "num_shards"), ("images", "chunk_rows")):
            if isinstance(values.get(section), dict) and values[section].pop(key, None) is not None:
                dropped.append(f"{section}.{key}")
        if isinstance(values.get("only"), list):
            retired = [stage for stage in values["only"] if stage in RETIRED_STAGES]
            values["only"] = [stage for stage in values["only"] if stage not in RETIRED_STAGES]
            if retired and not values["only"]:
                raise ValueError(
                    f"only = {', '.join(retired)}: no longer measured, see attrib/benchmark/RESULTS.md for the last "
                    f"results; choose from {', '.join(STAGES)}"
                )
            dropped += [f"stage {stage}" for stage in retired]
        for name in dropped:
            logger.warning(f"{name} is no longer used: that comparison was removed; delete it")
        return values

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
