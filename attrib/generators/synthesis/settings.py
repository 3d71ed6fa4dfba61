"""Options of jobs.synthesize: decoders, photographs and training."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Share, Uri
from attrib.data.settings import CollectionSettings
from attrib.generators.settings import Distinct

Upsampler = Literal["bilinear", "nearest", "transposed", "bicubic", "pixel_shuffle"]
Activation = Literal["none", "relu", "sigmoid", "tanh", "silu"]
Norm = Literal["none", "batch", "instance", "group"]
Order = Literal["conv_norm_act", "norm_act_conv"]
Width = Annotated[int, Field(ge=4, multiple_of=4)]  # channels; group norm has four groups


class GridSettings(Settings):
    """Every combination is one decoder. Leave out an upsampler to use it only in an evaluation, as an unseen one."""

    num_blocks: Distinct[Literal[1, 2, 3]] = (1, 2)
    convs_per_block: Distinct[Literal[1, 2]] = (1, 2)
    upsamplers: Distinct[Upsampler] = get_args(Upsampler)
    activations: Distinct[Activation] = get_args(Activation)
    norms: Distinct[Norm] = get_args(Norm)
    orders: Distinct[Order] = get_args(Order)
    residual: Distinct[bool] = (False, True)


class AutoencoderSettings(Settings):
    """Training of each model to the same error, so that models differ by their traces and not by their quality.

    Some decoders, such as two blocks with instance norm, do not reach target_mse in max_steps. The record has the share
    of models that do (share_at_target).
    """

    target_mse: float = Field(default=0.004, gt=0)  # on held-out photographs, pixels in 0..1; the paper has 0.005
    max_steps: Positive = 500  # for models that do not reach target_mse
    check_steps: Positive = 20  # between two evaluations on held-out photographs
    batch_size: Positive = 16
    crop_px: Positive = 32  # of training crops; decoders take any size, and small crops are faster
    learning_rate: float = Field(default=4e-3, gt=0)


class RealGeneratorSettings(Settings):
    """Images of real generators to compare with; the first folder of an image's key names its generator."""

    collection: CollectionSettings
    left_out: tuple[str, ...] = ()  # folders without images of a generator


class SynthesizeSettings(JobSettings):
    """jobs.synthesize: a pool of small synthetic generators that reproduce the same photographs."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | frozenset(
        ("photographs", "device", "gpu_share", "models_per_task", "real_generators")
    )

    own_folders: ClassVar[tuple[str, ...]] = ("_manifests",)

    photographs: CollectionSettings
    output: Uri
    px: Annotated[int, Field(ge=16, multiple_of=8)] = 64  # of photographs and samples
    num_photographs: Positive = 128  # reproduced by every model; no model is trained on them
    first_photograph: int = Field(default=0, ge=0)  # pools with disjoint ranges of one collection share no photograph
    num_training_photographs: Positive = 384
    max_megapixels: float = Field(default=100.0, gt=0)
    num_models: Positive = 200
    seeds_per_architecture: Annotated[int, Field(ge=1, le=1000)] = 2  # models that differ in the seed alone
    first_architecture: int = Field(default=0, ge=0)  # pools of one seed with disjoint ranges share no architecture
    width: Width = 16  # channels; the paper has 32
    grid: GridSettings = GridSettings()
    training: AutoencoderSettings = AutoencoderSettings()
    seed: Annotated[int, Field(ge=0)] = 0
    real_generators: RealGeneratorSettings | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu_share: Annotated[Share, Field(gt=0)] = 0.125  # of a GPU per worker: one small model does not fill it
    models_per_task: Positive = 4  # trained one after another

    @model_validator(mode="after")
    def _sizes_fit(self):
        deepest, crop_px = max(self.grid.num_blocks), self.training.crop_px
        if crop_px > self.px:
            raise ValueError(f"training.crop_px {crop_px} exceeds px {self.px}, the size of photographs; lower crop_px")
        if self.px % 2**deepest or crop_px % 2**deepest:
            raise ValueError(
                f"px {self.px} and crop_px {crop_px} must be multiples of {2**deepest}, because encoders halve them "
                f"{deepest} times"
            )
        if self.num_models % self.seeds_per_architecture:
            raise ValueError(
                f"num_models {self.num_models} is not a multiple of seeds_per_architecture "
                f"{self.seeds_per_architecture}; change one of them"
            )
        return self
