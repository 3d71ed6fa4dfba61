"""Options of jobs.synthesize: which decoders, on which photographs, trained how far."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Share, Uri
from attrib.data.settings import CollectionSettings

Upsampler = Literal["bilinear", "nearest", "transposed", "bicubic", "pixel_shuffle"]
Activation = Literal["none", "relu", "sigmoid", "tanh", "silu"]
Norm = Literal["none", "batch", "instance", "group"]
Order = Literal["conv_norm_act", "norm_act_conv"]
Width = Annotated[int, Field(ge=4, multiple_of=4)]  # channels; group norm takes four groups


class GridSettings(Settings):
    """Every combination of these is one decoder. A family that is to stay unseen is left out of `upsamplers`."""

    num_blocks: tuple[Literal[1, 2, 3], ...] = Field(default=(1, 2), min_length=1)
    convs_per_block: tuple[Literal[1, 2], ...] = Field(default=(1, 2), min_length=1)
    upsamplers: tuple[Upsampler, ...] = Field(
        default=("bilinear", "nearest", "transposed", "bicubic", "pixel_shuffle"), min_length=1
    )
    activations: tuple[Activation, ...] = Field(default=("none", "relu", "sigmoid", "tanh", "silu"), min_length=1)
    norms: tuple[Norm, ...] = Field(default=("none", "batch", "instance", "group"), min_length=1)
    orders: tuple[Order, ...] = Field(default=("conv_norm_act", "norm_act_conv"), min_length=1)
    residual: tuple[bool, ...] = Field(default=(False, True), min_length=1)

    @model_validator(mode="after")
    def _distinct(self):
        for name in type(self).model_fields:
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
        return self


# Model Synthesis (arXiv 2307.15977): 288 architectures. The default grid above adds what decoders in use have beside.
PAPER_GRID = GridSettings(
    upsamplers=("bilinear", "nearest", "transposed"),
    activations=("none", "relu", "sigmoid", "tanh"),
    norms=("none", "batch", "instance"),
    residual=(False,),
)


class AutoencoderSettings(Settings):
    """How far each synthetic model is trained: to one fidelity, so that models are told apart by their traces and not by their quality.

    Some decoders, such as those of two blocks with instance norm, do not get there in max_steps; the pool's record says how many did.
    """

    target_mse: float = Field(default=0.004, gt=0)  # on held-out photographs, pixels in 0..1; the paper has 0.005
    max_steps: Positive = 500  # for those that do not get there
    check_steps: Positive = 20  # between looks at the held-out photographs
    batch_size: Positive = 16
    crop_px: Positive = 32  # of training crops; decoders know no size, and small crops cost less
    learning_rate: float = Field(default=4e-3, gt=0)


class RealGeneratorSettings(Settings):
    """Images of real generators to hold the pool against; the first folder of an image's key names its generator."""

    collection: CollectionSettings
    left_out: tuple[str, ...] = ()  # folders that hold no generator's images


class SynthesizeSettings(JobSettings):
    """jobs.synthesize: a pool of small synthetic generators, and what each makes of the same photographs."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {
        "photographs",
        "device",
        "gpu_share",
        "models_per_task",
        "real_generators",
    }

    photographs: CollectionSettings
    output: Uri
    px: Annotated[int, Field(ge=16, multiple_of=8)] = 64  # of photographs and samples
    num_photographs: Positive = 128  # that every model renders; no model is trained on them
    first_photograph: int = Field(
        default=0, ge=0
    )  # pools of one collection with disjoint ranges show no picture in common
    num_training_photographs: Positive = 384
    max_megapixels: float = Field(default=100.0, gt=0)
    num_models: Positive = 200
    seeds_per_architecture: Annotated[int, Field(ge=1, le=1000)] = 2  # models that differ in nothing else
    first_architecture: int = Field(default=0, ge=0)  # pools of one seed with disjoint ranges share no architecture
    width: Width = 16  # channels; the paper has 32
    grid: GridSettings = GridSettings()
    training: AutoencoderSettings = AutoencoderSettings()
    seed: Annotated[int, Field(ge=0)] = 0
    real_generators: RealGeneratorSettings | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu_share: Annotated[Share, Field(gt=0)] = 0.125  # of a GPU per worker: one small model does not fill it
    models_per_task: Positive = 4  # that a killed worker may lose the last of

    @model_validator(mode="after")
    def _sizes_fit(self):
        deepest, crop_px = max(self.grid.num_blocks), self.training.crop_px
        if crop_px > self.px:
            raise ValueError(f"crop_px {crop_px} exceeds px {self.px}; crops are cut from photographs of px pixels")
        if self.px % 2**deepest or crop_px % 2**deepest:
            raise ValueError(
                f"px {self.px} and crop_px {crop_px} must be multiples of {2**deepest}: they are halved {deepest} times"
            )
        if self.num_models % self.seeds_per_architecture:
            raise ValueError(
                f"num_models {self.num_models} is no multiple of seeds_per_architecture {self.seeds_per_architecture}"
            )
        return self
