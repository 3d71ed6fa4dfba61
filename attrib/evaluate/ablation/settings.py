"""Options of jobs.ablate: variants of the method and controls, scored on the same queries."""

from typing import Literal

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Uri
from attrib.data.settings import CollectionSettings
from attrib.evaluate.settings import TruthSettings
from attrib.models.settings import BackboneSettings, FeatureSettings, HeadSettings
from attrib.train.augment.settings import Kind, ViewSettings
from attrib.train.settings import (
    AlignmentSettings,
    DisentanglementSettings,
    FineTuneSettings,
    OptimiserSettings,
    TrainSettings,
)

CHOSEN = "chosen by folds"  # a row of the table; no variant may have this name


class VariantSettings(Settings):
    """One row of the table.

    learns_from: "nothing", a control with projections fitted to the sources; "views" of the sources; "queries", with
    projections fitted to each domain separately, without pairs; "pairs", the supervised baseline. Queries and pairs are
    those of the other folds.
    """

    name: str = Field(min_length=1)
    learns_from: Literal["nothing", "views", "queries", "pairs"] = "nothing"
    features: str = "whole"  # name of a feature set
    head: HeadSettings = HeadSettings(net="none")
    views: str = "standard"  # name of a set of views
    kinds: tuple[Kind, ...] = ()  # use only these kinds of the set's views; empty: all
    alignment: AlignmentSettings = AlignmentSettings()
    disentanglement: DisentanglementSettings = DisentanglementSettings(kind="none")
    optimiser: OptimiserSettings = OptimiserSettings()
    fine_tune: FineTuneSettings | None = None  # end to end, by jobs.train
    num_workers: Positive = 1  # for fine-tuning

    @property
    def file_name(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name)

    @model_validator(mode="after")
    def _trains_something(self):
        if (self.learns_from in ("views", "pairs")) != (self.head.net != "none"):
            raise ValueError(
                f"variant {self.name!r}: learns_from {self.learns_from!r} does not fit head.net {self.head.net!r}; a "
                "head with a net learns from 'views' or 'pairs', a head without one from 'nothing' or 'queries'"
            )
        if self.fine_tune and self.learns_from != "views":
            raise ValueError(f"variant {self.name!r}: fine_tune needs learns_from 'views', not {self.learns_from!r}")
        if self.learns_from in ("queries", "pairs") and not self.head.separate_domains:
            raise ValueError(f"variant {self.name!r}: learns_from {self.learns_from!r} needs head.separate_domains")
        if self.learns_from == "nothing" and self.head.separate_domains:
            raise ValueError(f"variant {self.name!r}: head.separate_domains needs learns_from other than 'nothing'")
        if self.kinds and (self.learns_from != "views" or self.fine_tune):
            raise ValueError(f"variant {self.name!r}: kinds need learns_from 'views' without fine_tune; remove kinds")
        return self


class AblateSettings(JobSettings):
    """jobs.ablate: train and score variants; one command from images to the published table."""

    sources: CollectionSettings
    generated: CollectionSettings
    truth: TruthSettings
    output: Uri
    backbone: BackboneSettings
    feature_sets: dict[str, FeatureSettings] = Field(min_length=1)
    view_sets: dict[str, ViewSettings] = Field(default={"standard": ViewSettings()}, min_length=1)
    views_per_image: Positive = 12
    variants: tuple[VariantSettings, ...] = Field(min_length=1)
    reference: str | None = None  # the variant that others are compared with; None: the first
    theory: tuple[str, ...] = ()  # variants to measure canonical correlations and whiteness of
    num_folds: int = Field(default=5, ge=2)
    seed: int = 0

    def training(self, variant: VariantSettings, manifest: str, output: str) -> TrainSettings:
        """Settings of jobs.train for a variant. No image may fail, so that every variant answers the same queries."""
        run = {name: getattr(self, name) for name in ("storage", "ray", "backbone", "views_per_image", "seed")}
        chosen = ("head", "alignment", "disentanglement", "optimiser", "fine_tune", "num_workers")
        return TrainSettings(
            manifest=manifest,
            output=output,
            features=self.feature_sets[variant.features],
            views=self.view_sets[variant.views],
            max_failed_share=0.0,
            **run,
            **{name: getattr(variant, name) for name in chosen},
        )

    @model_validator(mode="after")
    def _names_known(self):
        if self.sources.name == self.generated.name:
            raise ValueError(f"sources and generated share the name {self.sources.name!r}; give each its own")
        names = [variant.name for variant in self.variants]
        files = [variant.file_name for variant in self.variants]
        if len(set(files)) < len(files) or CHOSEN in names:
            twice = sorted({name for name, file in zip(names, files) if files.count(file) > 1}) or [CHOSEN]
            raise ValueError(f"rename variants {twice}: names must differ in letters or digits and not be {CHOSEN!r}")
        for variant in self.variants:
            if variant.features not in self.feature_sets:
                raise ValueError(f"variant {variant.name!r}: feature_sets have no {variant.features!r}; add it")
            if variant.views not in self.view_sets:
                raise ValueError(f"variant {variant.name!r}: view_sets have no {variant.views!r}; add it")
            for kind in variant.kinds:
                if not getattr(self.view_sets[variant.views].mix, kind):
                    raise ValueError(
                        f"variant {variant.name!r}: view_sets.{variant.views}.mix has no {kind!r}; change it or kinds"
                    )
            self.training(variant, "/", "/")
        for name in (*self.theory, *([self.reference] if self.reference else [])):
            if name not in names:
                raise ValueError(f"{name!r} is not a variant; choose one of {', '.join(names)}")
        return self
