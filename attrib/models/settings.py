"""What a model is made of: the features that its head sees, and the head. A checkpoint carries both."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from attrib.common.settings import Positive, Settings, absolute_uri

Level = Annotated[int, Field(ge=0)]
PartName = Annotated[
    str, Field(pattern=r"^part_[a-z0-9_]+$|^(all|content|style)$")
]  # no name that a module has already
Role = Literal["content", "style"]


class FeatureSettings(Settings):
    """Which statistics of which levels of the backbone (attrib/models/features.py). The default is what a raw backbone gives."""

    pooled: bool = True  # the network's own output
    moment_levels: tuple[Level, ...] = ()  # channel means and deviations: style
    covariance_levels: tuple[
        Level, ...
    ] = ()  # channel covariances: style, finer; c (c + 1) / 2 numbers, so shallow levels
    layout_levels: tuple[Level, ...] = ()  # instance-normalised maps on a grid: content, where it stands
    layout_grid: Positive = 7
    whole_image: bool = (
        False  # squash to the network's square, in place of its own centre crop, which loses the margins
    )

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(sorted({*self.moment_levels, *self.covariance_levels, *self.layout_levels}))

    @property
    def block_names(self) -> tuple[str, ...]:
        """In the order in which attrib/models/features.py makes them."""
        named = [("pooled", self.pooled), ("moments", self.moment_levels), ("covariance", self.covariance_levels)]
        return tuple(name for name, used in named if used) + tuple(f"layout_{level}" for level in self.layout_levels)

    @model_validator(mode="after")
    def _something(self):
        for name in ("moment_levels", "covariance_levels", "layout_levels"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"features.{name} names a level twice: {list(getattr(self, name))}")
        if not self.block_names:
            raise ValueError("features are empty: set pooled, or name levels")
        return self


class PartSettings(Settings):
    """A part of the embedding: what it is made of, and which role of a source it shall find; each part has length one."""

    blocks: tuple[str, ...] = Field(min_length=1)
    role: Role | None = None  # None: both
    dimension: Positive | None = None  # of a trained net's output; None: as many as its inputs


class HeadSettings(Settings):
    """From features to the embedding: every block is projected, every part is a net on its blocks, side by side in one vector.

    projection: identity; centre; standardise; whiten (centred and rotated to uncorrelated directions of equal variance, each divided by
    sqrt(variance + shrinkage * largest variance)); standardise_whiten. It is fitted, not trained. Whitening by PCA and by ZCA differ by a
    rotation, which cosines do not see; `num_directions` keeps those of largest variance.
    """

    projection: Literal["identity", "centre", "standardise", "whiten", "standardise_whiten"] = "standardise_whiten"
    shrinkage: float = Field(default=0.05, gt=0, le=1)
    num_directions: Positive | None = None
    net: Literal["none", "linear", "mlp"] = "linear"
    hidden: Positive = 512  # of an MLP
    separate_domains: bool = False  # one head for real and one for synthetic images (AbC's shape)
    parts: dict[PartName, PartSettings] = Field(default={"all": PartSettings(blocks=("pooled",))}, min_length=1)

    @model_validator(mode="after")
    def _domains_correspond(self):
        if self.separate_domains and self.net == "none" and self.num_directions:
            raise ValueError(
                "head.num_directions: where each domain is whitened by itself (separate_domains, net none) all directions are kept; "
                "leave num_directions out"
            )
        return self

    def check(self, features: FeatureSettings) -> None:
        """Raises ValueError if a part names a block that the features do not have."""
        for name, part in self.parts.items():
            for block in part.blocks:
                if block not in features.block_names:
                    raise ValueError(
                        f"head.parts.{name} names block {block!r}; the features have {', '.join(features.block_names)}"
                    )


Domain = Literal["real", "synthetic"]


class BackboneSettings(Settings):
    """A timm network as an image encoder.

    weights: "hub" (timm's pretrained weights), "random" (a seeded untrained control), or the URI of a .safetensors file: plain
    timm weights, or a checkpoint of ours, which names its network and preprocessing itself.
    """

    name: str = Field(min_length=1)
    weights: str = "hub"
    seed: int = 0  # for weights: random
    domain: Domain = (
        "real"  # which head, where a checkpoint has two; jobs.pipeline takes "synthetic" for generated images
    )

    @model_validator(mode="after")
    def _weights_known(self):
        if self.weights not in ("hub", "random"):
            if not self.weights.endswith(".safetensors"):
                raise ValueError(
                    f"backbone.weights {self.weights!r} is neither 'hub', 'random' nor a .safetensors file; other formats can "
                    "execute code when loaded and are refused"
                )
            object.__setattr__(self, "weights", absolute_uri(self.weights))
        return self
