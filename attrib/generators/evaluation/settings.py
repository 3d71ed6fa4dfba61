"""Options of jobs.evaluate_generators: which generators are asked about, and how."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from attrib.common.settings import BudgetSettings, JobSettings, Positive, Settings, Uri
from attrib.data.settings import CollectionSettings
from attrib.generators.settings import MethodsSettings

GeneratorKind = Literal["dcgan", "vae", "diffusion"]
TRAINED_TIER = "trained on the same photographs"
# Those of attrib/generators/signals/degradations.py, which imports torch: settings are checked before that.
GRID_NAMES = ("none", "jpeg-95", "jpeg-85", "jpeg-70", "jpeg-50", "webp-85", "webp-60", "resize-0.75", "resize-0.5")
GRID_NAMES += ("blur-0.5", "blur-1", "crop-0.8")
LOSS_DEGRADATION = "jpeg-85"  # that every tier is asked under: what it costs is a column of the table
TIER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]*")


class TierSettings(Settings):
    """One set of generators that are told apart from each other.

    judged: whether what is shipped is decided on it; only such tiers go through the whole grid of degradations, others through
    LOSS_DEGRADATION alone. max_images: of each generator, the first. num_splits: random divisions of each generator's images into
    references and queries, which are averaged.
    """

    judged: bool = False
    max_images: Positive = 100
    num_splits: Positive = 10
    note: str = ""  # what a reader of the page should know of it


class FolderTierSettings(TierSettings):
    """Generators whose images lie in one folder each, published by others."""

    uri: Uri
    generators: tuple[str, ...] = Field(min_length=3)  # folders below uri
    real: str | None = None  # a folder of real images of the same subjects
    # What the real images went through before they came to us, as a degradation (jpeg-75): generated ones are put through the same before
    # both are told apart, which a trace of compression would make easy.
    real_history: str | None = None

    @model_validator(mode="after")
    def _of_real_images(self):
        if self.real_history and not self.real:
            raise ValueError(f"real_history {self.real_history!r} is of real images; name their folder under real")
        return self


class PoolTierSettings(TierSettings):
    """Synthetic models of another run of jobs.synthesize, as far as the training pool does not hold their architecture.

    unseen: "upsamplers" leaves out every model with an upsampler that any model of the training pool has.
    """

    uri: Uri
    unseen: Literal["architectures", "upsamplers"] = "architectures"
    max_models: Positive = 40
    num_splits: Positive = 3


class NumStepsSettings(Settings):
    """Optimiser steps of each kind of generator."""

    dcgan: Positive = 4000
    vae: Positive = 2000
    diffusion: Positive = 2500


class TrainedTierSettings(TierSettings):
    """Generators that the job trains itself, each kind with several seeds, all on the same photographs (attrib/generators/evaluation/trained_generators.py)."""

    photographs: CollectionSettings
    num_training_photographs: Positive = 500
    # Behind those trained on, of the photographs that stand for what is real: the training pool must not show the same ones.
    first_photograph: int = Field(default=0, ge=0)
    photograph_px: Positive = 64  # photographs are shrunk and cropped to it, then cut at random places
    px: int = Field(default=32, ge=16, multiple_of=8)  # of what is cut, and of what is generated
    kinds: tuple[GeneratorKind, ...] = ("dcgan", "vae", "diffusion")
    seeds: tuple[int, ...] = (0, 1)
    width: int = Field(default=32, ge=8, multiple_of=8)  # channels at full resolution
    batch_size: Positive = 32
    num_steps: NumStepsSettings = NumStepsSettings()
    judged: bool = True

    @model_validator(mode="after")
    def _enough(self):
        for name, values in (("kinds", self.kinds), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
        if len(self.kinds) * len(self.seeds) < 3:
            raise ValueError(
                f"kinds {list(self.kinds)} with seeds {list(self.seeds)} are fewer than three generators; add kinds or seeds"
            )
        if self.photograph_px < self.px:
            raise ValueError(f"photograph_px {self.photograph_px} is below px {self.px}; raise it")
        return self


class EvaluateGeneratorsSettings(JobSettings):
    """jobs.evaluate_generators: every method on every tier of generators, none of which any method was trained on."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {"pool", "extractor", "title"}

    output: Uri
    pool: Uri  # jobs.synthesize: what the extractor was trained on, and controls are fitted on here
    extractor: Uri | None = None  # jobs.fingerprint; None: the controls alone
    methods: MethodsSettings = MethodsSettings()
    trained: TrainedTierSettings | None = None
    folders: dict[str, FolderTierSettings] = Field(default_factory=dict)  # tiers by name
    pools: dict[str, PoolTierSettings] = Field(default_factory=dict)  # tiers by name
    num_references: Positive = 10
    reference_counts: tuple[Positive, ...] = (1, 2, 5, 10, 20, 50)  # as far as the images go
    set_sizes: tuple[Positive, ...] = (1, 2, 5, 10, 20)  # images of one origin that are judged together
    degradations: tuple[str, ...] = GRID_NAMES  # of the judged tiers; LOSS_DEGRADATION is asked about in any case
    # Real images are often JPEGs and generated ones are not, so both are compressed alike before they are told apart.
    real_degradation: str = "jpeg-85"
    false_positive_rate: float = Field(default=0.01, gt=0, lt=1)
    max_megapixels: float = Field(default=100.0, gt=0)
    seed: Annotated[int, Field(ge=0)] = 0
    title: str = "Which generator made it"

    @model_validator(mode="after")
    def _no_budget(self):
        if self.budget != BudgetSettings():
            raise ValueError("budget cannot be checked, since this job makes no estimate; leave it out")
        return self

    @model_validator(mode="after")
    def _tiers(self):
        names = [*self.folders, *self.pools]
        if not names and self.trained is None:
            raise ValueError("there is nothing to evaluate on; give trained, folders or pools")
        for name in names:
            if not TIER_NAME.fullmatch(name):
                raise ValueError(f"the tier {name!r} names files; use letters, digits, blanks and . _ -")
        if len(set(names)) < len(names) or TRAINED_TIER in names:
            raise ValueError(f"two tiers share a name: {', '.join([*names, TRAINED_TIER])}; rename one")
        return self
