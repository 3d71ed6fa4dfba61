"""Options of jobs.ablate: variants of the method and its controls, all scored on the same queries."""

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

CHOSEN = "chosen by folds"  # a row of the table that no variant may be named after


class VariantSettings(Settings):
    """One row of the table.

    learns_from: nothing (a control whose projections are fitted to the sources); views of the sources; queries
    (projections of each domain are fitted apart: unpaired) or pairs (the supervised baseline), both always those of the
    other folds.
    """

    name: str = Field(min_length=1)
    learns_from: Literal["nothing", "views", "queries", "pairs"] = "nothing"
    features: str = "whole"  # which of the feature sets
    head: HeadSettings = HeadSettings(net="none")
    views: str = "standard"  # which of the sets of views
    kinds: tuple[Kind, ...] = ()  # of the set's views only these; empty: all
    alignment: AlignmentSettings = AlignmentSettings()
    disentanglement: DisentanglementSettings = DisentanglementSettings(kind="none")
    optimiser: OptimiserSettings = OptimiserSettings()
    fine_tune: FineTuneSettings | None = None  # end to end, by jobs.train
    num_workers: Positive = 1  # of the fine-tuning

    @property
    def file_name(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name)

    @model_validator(mode="after")
    def _trains_something(self):
        if (self.learns_from in ("views", "pairs")) != (self.head.net != "none"):
            raise ValueError(
                f"variant {self.name!r}: a head with a net learns from views or pairs, and only such a head"
            )
        if self.fine_tune and self.learns_from != "views":
            raise ValueError(f"variant {self.name!r}: fine-tuning learns from views")
        if self.learns_from in ("queries", "pairs") and not self.head.separate_domains:
            raise ValueError(f"variant {self.name!r}: queries and pairs are for heads with separate_domains")
        if self.learns_from == "nothing" and self.head.separate_domains:
            raise ValueError(f"variant {self.name!r}: a head for each domain learns from views, queries or pairs")
        if self.kinds and (self.learns_from != "views" or self.fine_tune):
            raise ValueError(f"variant {self.name!r}: kinds choose among views whose features were computed once")
        return self


class AblateSettings(JobSettings):
    """jobs.ablate: train and score variants side by side; one command from images to the published table."""

    sources: CollectionSettings
    generated: CollectionSettings
    truth: TruthSettings
    output: Uri
    backbone: BackboneSettings
    feature_sets: dict[str, FeatureSettings] = Field(min_length=1)
    view_sets: dict[str, ViewSettings] = Field(default={"standard": ViewSettings()}, min_length=1)
    views_per_image: Positive = 12
    variants: tuple[VariantSettings, ...] = Field(min_length=1)
    reference: str | None = None  # differences are against it; None: the first variant
    theory: tuple[str, ...] = ()  # variants whose canonical correlations and whiteness are measured
    num_folds: int = Field(default=5, ge=2)
    seed: int = 0

    def training(self, variant: VariantSettings, manifest: str, output: str) -> TrainSettings:
        """A variant as jobs.train would have it. No image may be missing: every variant answers the same
        questions."""
        return TrainSettings(
            storage=self.storage,
            ray=self.ray,
            manifest=manifest,
            output=output,
            backbone=self.backbone,
            features=self.feature_sets[variant.features],
            head=variant.head,
            views=self.view_sets[variant.views],
            views_per_image=self.views_per_image,
            alignment=variant.alignment,
            disentanglement=variant.disentanglement,
            optimiser=variant.optimiser,
            fine_tune=variant.fine_tune,
            max_failed_share=0.0,
            num_workers=variant.num_workers,
            seed=self.seed,
        )

    @model_validator(mode="after")
    def _names_known(self):
        if self.sources.name == self.generated.name:
            raise ValueError(f"sources and generated share the name {self.sources.name!r}; give each its own")
        names = [variant.name for variant in self.variants]
        files = [variant.file_name for variant in self.variants]
        if len(set(files)) < len(files) or CHOSEN in names:
            twice = sorted({name for name, file in zip(names, files) if files.count(file) > 1}) or [CHOSEN]
            raise ValueError(f"variants share a name, or a file's name: {twice}")
        for variant in self.variants:
            if variant.features not in self.feature_sets:
                raise ValueError(f"variant {variant.name!r}: no feature set {variant.features!r}")
            if variant.views not in self.view_sets:
                raise ValueError(f"variant {variant.name!r}: no set of views {variant.views!r}")
            weights = self.view_sets[variant.views].mix
            for kind in variant.kinds:
                if not getattr(weights, kind):
                    raise ValueError(
                        f"variant {variant.name!r}: the set {variant.views!r} has no views of kind {kind!r}"
                    )
            self.training(variant, "/", "/")
        for name in (*self.theory, *([self.reference] if self.reference else [])):
            if name not in names:
                raise ValueError(f"{name!r} is no variant; the variants are {', '.join(names)}")
        return self
