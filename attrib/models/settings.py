"""Options of a model: backbone, feature blocks and head. A checkpoint contains the last two."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from attrib.common.settings import Positive, Settings, absolute_uri

Level = Annotated[int, Field(ge=0)]
# Part names are keys of an nn.ModuleDict, which refuses the names of its own attributes.
PartName = Annotated[str, Field(pattern=r"^part_[a-z0-9_]+$|^(all|content|style)$")]
Role = Literal["content", "style"]
Domain = Literal["real", "synthetic"]


class FeatureSettings(Settings):
    """Statistics of backbone levels (attrib/models/features.py). The default is only the output of the backbone."""

    pooled: bool = True  # the output of the network
    moment_levels: tuple[Level, ...] = ()  # channel means and deviations: style
    covariance_levels: tuple[Level, ...] = ()  # finer style, c (c + 1) / 2 values per level, so use shallow levels
    layout_levels: tuple[Level, ...] = ()  # instance-normalised maps on a grid: content and its position
    layout_grid: Positive = 7
    whole_image: bool = False  # squash the image to the square input, instead of a centre crop

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(sorted({*self.moment_levels, *self.covariance_levels, *self.layout_levels}))

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, in the order of FeatureExtractor.blocks."""
        named = [("pooled", self.pooled), ("moments", self.moment_levels), ("covariance", self.covariance_levels)]
        return tuple(name for name, used in named if used) + tuple(f"layout_{level}" for level in self.layout_levels)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        for name in ("moment_levels", "covariance_levels", "layout_levels"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"features.{name} contains a level twice: {list(getattr(self, name))}")
        if not self.block_names:
            raise ValueError("features are empty; set pooled, moment_levels, covariance_levels or layout_levels")
        return self


class PartSettings(Settings):
    """One part of the embedding: its blocks, and the role of the sources that it finds. Every part has unit length."""

    blocks: tuple[str, ...] = Field(min_length=1)
    role: Role | None = None  # None: both
    dimension: Positive | None = None  # of the output of a trained net; None: that of its input


class HeadSettings(Settings):
    """The head: blocks are projected, each part applies a net to its blocks, and the parts are concatenated.

    projection, which is not trained but fitted: identity; centre; standardise; whiten (centred, rotated to uncorrelated
    directions, each divided by sqrt(variance + shrinkage * largest variance)); standardise_whiten. PCA and ZCA
    whitening differ by a rotation, which does not change cosines. num_directions: keep only the directions of largest
    variance.
    """

    projection: Literal["identity", "centre", "standardise", "whiten", "standardise_whiten"] = "standardise_whiten"
    shrinkage: float = Field(default=0.05, gt=0, le=1)
    num_directions: Positive | None = None
    net: Literal["none", "linear", "mlp"] = "linear"
    hidden: Positive = 512  # of an MLP
    separate_domains: bool = False  # one head for real and one for synthetic images, as in AbC
    parts: dict[PartName, PartSettings] = Field(default={"all": PartSettings(blocks=("pooled",))}, min_length=1)

    @model_validator(mode="after")
    def _same_directions(self) -> Self:
        if self.separate_domains and self.net == "none" and self.num_directions:
            raise ValueError(
                "remove head.num_directions: with head.separate_domains and head.net 'none', each domain is whitened "
                "separately and keeps all directions"
            )
        return self

    def check(self, features: FeatureSettings) -> None:
        """Raise ValueError if a part names a block that the features do not have."""
        for name, part in self.parts.items():
            for block in part.blocks:
                if block not in features.block_names:
                    raise ValueError(
                        f"head.parts.{name} uses block {block!r}, which the features do not have; use one of "
                        f"{', '.join(features.block_names)}, or add the block to features"
                    )


class BackboneSettings(Settings):
    """A timm network as an image encoder.

    weights: "hub" (timm's pretrained weights), "random" (untrained, seeded; a control), or the URI of a .safetensors
    file: plain timm weights, or an attrib checkpoint with network name and preprocessing.
    """

    name: str = Field(min_length=1)
    weights: str = "hub"
    seed: int = 0  # for weights: random
    domain: Domain = "real"  # the head, if a checkpoint has two; jobs.pipeline uses "synthetic" for generated images

    @model_validator(mode="after")
    def _weights_known(self) -> Self:
        if self.weights not in ("hub", "random"):
            if not self.weights.endswith(".safetensors"):
                raise ValueError(
                    f"backbone.weights {self.weights!r} is neither 'hub', 'random' nor a .safetensors file; convert "
                    "the weights to .safetensors, because other formats can execute code when loaded"
                )
            object.__setattr__(self, "weights", absolute_uri(self.weights))
        return self
