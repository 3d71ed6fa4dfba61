"""Options of jobs.fingerprint: the extractor, its batches, its losses and its optimiser."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Share, Uri
from attrib.generators.settings import PERIOD_PX
from attrib.generators.synthesis.settings import Upsampler

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class NetworkSettings(Settings):
    """The extractor (attrib/generators/extractor/network.py)."""

    patch_px: Annotated[int, Field(ge=16, multiple_of=8)] = 32
    min_side_px: Annotated[int, Field(ge=PERIOD_PX)] = 16  # of images; one below patch_px gets smaller patches
    max_patches: Positive = 16  # of one image, on an even grid
    window_px: Annotated[int, Field(ge=4, multiple_of=2)] = 8  # of the colour spectrum; windows overlap
    num_learned: Annotated[int, Field(ge=2)] = 192  # size of the learned part; 1 would leave only its sign
    width: Positive = 32  # channels of the first convolutions; the next ones have 2 and 4 times as many

    @property
    def part_sizes(self) -> tuple[int, int, int]:
        """Sizes of colour spectrum, polyphase means and learned part."""
        return 2 * 6 * self.window_px * (self.window_px // 2 + 1), 3 * PERIOD_PX**2, self.num_learned

    @model_validator(mode="after")
    def _window_fits(self):
        if not self.window_px <= self.min_side_px <= self.patch_px:
            raise ValueError(
                f"min_side_px {self.min_side_px} is not between window_px {self.window_px} and patch_px "
                f"{self.patch_px}; choose window_px <= min_side_px <= patch_px"
            )
        return self


class ContrastSettings(Settings):
    """The batches (attrib/generators/extractor/batches.py) and their loss."""

    models_per_batch: Annotated[int, Field(ge=2)] = 32  # of the global batch, over all workers
    images_per_model: Annotated[int, Field(ge=2)] = 4
    same_content_share: Share = 0.5  # share of batches in which all models show the same photographs
    temperature: float = Field(default=0.1, gt=0)
    contrast_weight: Weight = 1.0  # of the supervised contrastive loss
    classification_weight: Weight = 1.0  # of the cross-entropy over the pool's models
    class_scale: float = Field(default=24.0, gt=0)  # of the cosines in the cross-entropy

    @model_validator(mode="after")
    def _something_to_learn(self):
        if not self.contrast_weight and not self.classification_weight:
            raise ValueError("contrast_weight and classification_weight are both 0, so nothing is learned; raise one")
        return self


class ExtractorOptimiserSettings(Settings):
    num_steps: Positive = 8000
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: Weight = 0.05
    warmup_share: Share = 0.05  # of all steps; then cosine decay
    validation_steps: Positive = 500  # between two validations; each saves a checkpoint


class FingerprintSettings(JobSettings):
    """jobs.fingerprint: train a fingerprint extractor on a pool of synthetic models."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | frozenset(
        ("pool", "num_workers", "num_loaders", "device")
    )

    pool: Uri  # output of jobs.synthesize
    output: Uri
    network: NetworkSettings = NetworkSettings()
    contrast: ContrastSettings = ContrastSettings()
    optimiser: ExtractorOptimiserSettings = ExtractorOptimiserSettings()
    photographs_as_class: bool = True  # the pool's photographs are one more class
    degraded_share: Share = 0.75  # of the batches (attrib/generators/signals/degradations.py)
    # Models with this upsampler are used for validation only: validation should measure unseen generators.
    validation_upsampler: Upsampler = "bicubic"
    num_workers: Positive = 1  # of the training
    num_loaders: Positive = 1  # threads per worker that degrade and cut images
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _batches_divide(self):
        models_per_batch = self.contrast.models_per_batch
        if models_per_batch % self.num_workers:
            raise ValueError(
                f"contrast.models_per_batch {models_per_batch} is not a multiple of num_workers {self.num_workers}; "
                "change one of them, since each worker takes the same number of models"
            )
        return self
