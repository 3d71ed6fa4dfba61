"""Options of jobs.evaluate_generators: the generator sets, and what is measured on them."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from attrib.common.settings import BudgetSettings, JobSettings, Positive, Settings, Uri
from attrib.data.settings import CollectionSettings
from attrib.generators.settings import GRID_NAMES, Distinct, MethodsSettings

GeneratorKind = Literal["dcgan", "vae", "diffusion"]
TRAINED_SET = "trained on the same photographs"
LOSS_DEGRADATION = "jpeg-85"  # measured on every generator set; the loss by it is a column of the table
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]*")


class SetSettings(Settings):
    """One set of generators that are told apart from each other."""

    judged: bool = False  # whether the set decides what ships; only such sets have all degradations of the grid
    max_images: Positive = 100  # of each generator, the first ones
    num_splits: Positive = 10  # random divisions into references and queries, which are averaged
    note: str = ""  # shown on the page


class FolderSetSettings(SetSettings):
    """Published images of generators, one folder each."""

    uri: Uri
    generators: tuple[str, ...] = Field(min_length=3)  # folders below uri
    real: str | None = None  # a folder of real images of the same subjects
    # How the real images were degraded before publication (jpeg-75). Generated images get this degradation before they
    # are compared with real ones; otherwise the compression alone would separate them.
    real_history: str | None = None

    @model_validator(mode="after")
    def _of_real_images(self):
        if self.real_history and not self.real:
            raise ValueError(f"real_history {self.real_history!r} needs real images; set real to their folder")
        return self


class PoolSetSettings(SetSettings):
    """Synthetic models of another run of jobs.synthesize whose architecture is not in the training pool."""

    uri: Uri
    unseen: Literal["architectures", "upsamplers"] = "architectures"  # upsamplers: no upsampler of the training pool
    max_models: Positive = 40
    num_splits: Positive = 3


class NumStepsSettings(Settings):
    """Optimiser steps of each kind of generator."""

    dcgan: Positive = 4000
    vae: Positive = 2000
    diffusion: Positive = 2500


class TrainedSetSettings(SetSettings):
    """Generators that the job trains on the same photographs (attrib/generators/evaluation/trained_generators.py)."""

    photographs: CollectionSettings
    num_training_photographs: Positive = 500
    # The first photograph that is used as a real image, counted after the training photographs. The training pool must
    # not contain the same photographs.
    first_photograph: int = Field(default=0, ge=0)
    photograph_px: Positive = 64  # photographs are shrunk and cropped to it, then cropped to px at random places
    px: int = Field(default=32, ge=16, multiple_of=8)  # of crops and of generated images
    kinds: Distinct[GeneratorKind] = ("dcgan", "vae", "diffusion")
    seeds: Distinct[int] = (0, 1)  # each kind is trained with each seed
    width: int = Field(default=32, ge=8, multiple_of=8)  # channels at full resolution
    batch_size: Positive = 32
    num_steps: NumStepsSettings = NumStepsSettings()
    judged: bool = True

    @model_validator(mode="after")
    def _enough(self):
        if len(self.kinds) * len(self.seeds) < 3:
            raise ValueError(
                f"kinds {list(self.kinds)} with seeds {list(self.seeds)} are fewer than three generators; add kinds or "
                "seeds"
            )
        if self.photograph_px < self.px:
            raise ValueError(f"photograph_px {self.photograph_px} is below px {self.px}; raise it")
        return self


class EvaluateGeneratorsSettings(JobSettings):
    """jobs.evaluate_generators: every method on every generator set. No method was trained on any of them."""

    execution_only: ClassVar[frozenset[str]] = JobSettings.execution_only | {"pool", "extractor", "title"}

    own_folders: ClassVar[tuple[str, ...]] = ("photographs",)

    output: Uri
    pool: Uri  # jobs.synthesize: the training data of the extractor and of the controls
    extractor: Uri | None = None  # jobs.fingerprint; None: the controls alone
    methods: MethodsSettings = MethodsSettings()
    trained: TrainedSetSettings | None = None
    folders: dict[str, FolderSetSettings] = Field(default_factory=dict)  # by name
    pools: dict[str, PoolSetSettings] = Field(default_factory=dict)  # by name
    num_references: Positive = 10
    reference_counts: tuple[Positive, ...] = (1, 2, 5, 10, 20, 50)  # counts with too few images left are skipped
    set_sizes: tuple[Positive, ...] = (1, 2, 5, 10, 20)  # images of one generator that are identified together
    degradations: tuple[str, ...] = GRID_NAMES  # of judged generator sets; LOSS_DEGRADATION is always measured
    # Real images are often JPEG files and generated ones are not, so both get this degradation before the comparison.
    real_degradation: str = "jpeg-85"
    false_positive_rate: float = Field(default=0.01, gt=0, lt=1)
    max_megapixels: float = Field(default=100.0, gt=0)
    seed: Annotated[int, Field(ge=0)] = 0
    title: str = "Which generator made it"

    @model_validator(mode="after")
    def _check(self):
        if self.budget != BudgetSettings():
            raise ValueError("budget cannot be checked, since this job makes no estimate; leave it out")
        names = [*self.folders, *self.pools]
        if not names and self.trained is None:
            raise ValueError("there is nothing to evaluate on; give trained, folders or pools")
        for name in names:
            if not SET_NAME.fullmatch(name):
                raise ValueError(
                    f"the name {name!r} of a generator set is used in file names; use letters, digits, blanks and . _ -"
                )
        if len(set(names)) < len(names) or TRAINED_SET in names:
            raise ValueError(f"two generator sets share a name: {', '.join([*names, TRAINED_SET])}; rename one")
        return self
