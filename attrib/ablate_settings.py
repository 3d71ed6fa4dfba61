"""Options of jobs.ablate: variants of the method and its controls, all scored on the same queries."""

from typing import Literal

from pydantic import Field, model_validator

from attrib.evaluate_settings import TruthSettings
from attrib.model_settings import FeatureSettings, HeadSettings
from attrib.settings import BackboneSettings, CollectionSettings, JobSettings, Positive, Settings, Share, Uri
from attrib.train_settings import AlignmentSettings, DisentanglementSettings, FineTuneSettings, OptimiserSettings
from attrib.view_settings import Kind, ViewSettings


class VariantSettings(Settings):
    """One row of the table.

    learns_from: nothing (a control whose projections are fitted to the sources); views of the sources; queries (projections of each domain
    are fitted apart: unpaired) or pairs (the supervised baseline), both always those of the other folds.
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
    max_failed_share: Share = 0.0
    seed: int = 0

    @model_validator(mode="after")
    def _names_known(self):
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"variants share a name: {sorted({name for name in names if names.count(name) > 1})}")
        for variant in self.variants:
            if variant.features not in self.feature_sets:
                raise ValueError(f"variant {variant.name!r}: no feature set {variant.features!r}")
            if variant.views not in self.view_sets:
                raise ValueError(f"variant {variant.name!r}: no set of views {variant.views!r}")
            variant.head.check(self.feature_sets[variant.features])
        for name in (*self.theory, *([self.reference] if self.reference else [])):
            if name not in names:
                raise ValueError(f"{name!r} is no variant; the variants are {', '.join(names)}")
        return self
