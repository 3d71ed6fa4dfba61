"""Options of the augmentations (attrib/train/augment/views.py)."""

from typing import Annotated, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from attrib.common.settings import Positive, Settings, Share

Kind = Literal["texture", "colour", "bands", "solo"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DONOR_KINDS = frozenset(KINDS) - {"solo"}  # kinds that use a second image, the style donor


def _in_order(pair: tuple) -> tuple:
    if pair[0] > pair[1]:
        raise ValueError(f"{list(pair)} is out of order; give the lower limit first")
    return pair


Limit = TypeVar("Limit")
Range = Annotated[tuple[Limit, Limit], AfterValidator(_in_order)]
Weight = Annotated[FiniteFloat, Field(ge=0)]
Shares = Range[Annotated[FiniteFloat, Field(ge=0, le=1)]]
PositiveShares = Range[Annotated[FiniteFloat, Field(gt=0, le=1)]]
Factors = Range[Weight]
PositiveFactors = Range[Annotated[FiniteFloat, Field(gt=0)]]
DonorScales = Range[Annotated[FiniteFloat, Field(gt=0, le=4)]]
HueTurns = Range[Annotated[FiniteFloat, Field(ge=-0.5, le=0.5)]]
PatchSides = Range[Annotated[int, Field(ge=2, le=64)]]
JpegQualities = Range[Annotated[int, Field(ge=1, le=100)]]


class KindMix(Settings):
    """Relative weights of the kinds of views; 0 leaves a kind out."""

    texture: Weight = 6.0  # rebuilt from patches of the donor: only the layout shows the content
    colour: Weight = 1.0  # in the donor's palette
    bands: Weight = 1.0  # in the donor's palette, sharpness and grain
    solo: Weight = 2.0  # no donor; brightness, contrast, saturation and hue change

    @model_validator(mode="after")
    def _something_left(self):
        if not any(getattr(self, kind) for kind in KINDS):
            raise ValueError(f"every weight of mix is 0; give at least one of {', '.join(KINDS)} a positive weight")
        return self


class ViewSettings(Settings):
    """How views differ from their content. A network trained on them becomes invariant to these differences.

    Every pair is (lower, upper), the limits of a value drawn for each view. A `_probability` is the share of views that
    an augmentation applies to. After a colon, comments name what the network becomes invariant to.
    """

    mix: KindMix = KindMix()

    # Framing: generators keep parts of a source, rarely at the same place or in proportion.
    crop_area_share: PositiveShares = (0.45, 1.0)  # of the content that a view shows: place, size, missing parts
    crop_aspect: PositiveFactors = (0.67, 1.5)  # width / height of that part, squeezed to a square: proportions
    flip_probability: Share = 0.3  # mirrored: left and right

    # The style donor. Random crops give many styles per donor, which helps small collections.
    donor_crop_area_share: PositiveShares = (0.3, 1.0)  # which part of the donor sets the style
    donor_flip_probability: Share = 0.5  # direction of light and strokes
    donor_scale: DonorScales = (0.6, 1.2)  # side of the donor / side of the view, for texture: size of strokes

    # Kind texture: materials, and detail finer than a patch.
    patch_px: PatchSides = (5, 16)  # side of a patch: coarseness, smaller shapes
    texture_strength: Shares = (0.55, 1.0)  # weight of the patches against the recoloured content: fine detail
    texture_mean_weight: Factors = (0.5, 2.0)  # brightness against pattern when patches are matched: edges if high
    keep_colour_probability: Share = 0.2  # restores the content's palette, so that it is sometimes right
    keep_colour_share: Shares = (0.5, 1.0)  # how far
    num_donor_patches: Positive = 1500  # candidates per patch; time is about proportional

    # Kinds colour and bands.
    colour_strength: Shares = (0.7, 1.0)  # palette, light
    bands_strength: Shares = (0.6, 1.0)  # palette, light, sharpness, grain

    # Kind solo. Factors are torchvision's: 1 changes nothing.
    brightness: Factors = (0.7, 1.3)  # exposure
    contrast: Factors = (0.6, 1.4)  # haze, tone curves
    saturation: Factors = (0.2, 1.8)  # vividness; 0 is monochrome
    hue_probability: Share = 0.3
    hue_turns: HueTurns = (-0.33, 0.33)  # of the colour circle: which colour things have

    # Degradation of the finished view, each independently, in this order: uploads, thumbnails, codecs.
    blur_probability: Share = 0.1
    blur_sigma_px: PositiveFactors = (0.5, 2.0)  # focus
    resize_probability: Share = 0.25
    resize_share: PositiveShares = (0.25, 0.8)  # of the side, then enlarged again: resolution
    noise_probability: Share = 0.2
    noise_std_share: Shares = (0.01, 0.1)  # of the range from black to white: grain
    jpeg_probability: Share = 0.25
    jpeg_quality: JpegQualities = (15, 70)  # of libjpeg: block artefacts
