"""Random views of a batch of images: crop, turn, mirror, bend, colour and blur, drawn for each image on its own.

torchvision's transforms draw one set of parameters for a whole batch; here every image gets its own, in a few batched operations, and
the parameters are at hand for whoever wants to know what was done.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BEND_KNOTS = 4  # per axis, of the smooth field that bends an image
SCALARS = (
    "zoom",
    "stretch",
    "turn",
    "x",
    "y",
    "mirror",
    "hue",
    "saturation",
    "contrast",
    "brightness",
    "grey",
    "blur",
    "blur_amount",
)
NUM_PARAMETERS = len(SCALARS) + 2 * BEND_KNOTS**2


@dataclass(frozen=True)
class ViewRange:
    """Limits of the random change; every value is uniform between them."""

    zoom: tuple[float, float]  # side of the part shown, in sides of the image
    stretch: float  # largest ratio of the two axes' zooms
    turn_turns: float  # largest rotation either way
    shift: float  # largest move either way beyond the image's edge, in halves of its side
    bend: float  # largest local displacement either way, in halves of its side
    mirror_share: float
    hue_turns: float  # largest rotation of the hue either way
    saturation: tuple[float, float]
    contrast: tuple[float, float]
    brightness: float  # largest offset either way, of a range of 1
    grey_share: float
    blur_share: float


def draw_parameters(num_views: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [num_views, NUM_PARAMETERS], uniform in -1..1: where in its limits each change lies."""
    return 2 * torch.rand(num_views, NUM_PARAMETERS, generator=generator) - 1


def render_views(images: torch.Tensor, parameters: torch.Tensor, view_px: int, limits: ViewRange) -> torch.Tensor:
    """float32 [n, 3, h, w] in 0..1 and float32 [n, NUM_PARAMETERS] -> float32 [n, 3, view_px, view_px] in 0..1."""
    drawn = dict(zip(SCALARS, parameters.T))
    grid = _grid(drawn, parameters[:, len(SCALARS) :], view_px, limits)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _blur(_recolour(views, drawn, limits), drawn, limits)


def _within(values: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    low, high = limits
    return low + (high - low) * (values + 1) / 2


def _happens(values: torch.Tensor, share: float) -> torch.Tensor:
    return (values + 1) / 2 < share


def _grid(drawn: dict[str, torch.Tensor], knots: torch.Tensor, view_px: int, limits: ViewRange) -> torch.Tensor:
    num_views = len(knots)
    zoom = _within(drawn["zoom"], limits.zoom)
    stretch = torch.exp(drawn["stretch"] * math.log(limits.stretch) / 2)
    mirror = torch.where(_happens(drawn["mirror"], limits.mirror_share), -1.0, 1.0)
    angle = 2 * math.pi * limits.turn_turns * drawn["turn"]
    room = (1 - zoom).clamp(min=0) + limits.shift
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([zoom * stretch * mirror * cos, -zoom / stretch * sin, room * drawn["x"]], 1),
        torch.stack([zoom * stretch * mirror * sin, zoom / stretch * cos, room * drawn["y"]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [num_views, 3, view_px, view_px], align_corners=False)
    if not limits.bend:
        return grid
    field = knots.reshape(num_views, 2, BEND_KNOTS, BEND_KNOTS)
    return grid + limits.bend * F.interpolate(field, size=(view_px, view_px), mode="bicubic").permute(0, 2, 3, 1)


def _recolour(images: torch.Tensor, drawn: dict[str, torch.Tensor], limits: ViewRange) -> torch.Tensor:
    """Hue and saturation are one 3 x 3 matrix per image: a rotation about the grey axis and a stretch away from it."""
    angle = 2 * math.pi * limits.hue_turns * drawn["hue"]
    saturation = _within(drawn["saturation"], limits.saturation) * ~_happens(drawn["grey"], limits.grey_share)
    grey = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = (saturation * angle.cos())[:, None, None], (saturation * angle.sin())[:, None, None]
    matrices = grey + cos * (torch.eye(3) - grey) + sin * cross
    coloured = (matrices @ images.flatten(2)).view_as(images)
    contrast = _within(drawn["contrast"], limits.contrast)[:, None, None, None]
    offset = limits.brightness * drawn["brightness"][:, None, None, None]
    mean = coloured.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + contrast * (coloured - mean) + offset).clamp(0, 1)


def _blur(images: torch.Tensor, drawn: dict[str, torch.Tensor], limits: ViewRange) -> torch.Tensor:
    """A binomial filter of five pixels, mixed in by a random share, on `blur_share` of the images."""
    if not limits.blur_share:
        return images
    amount = _within(drawn["blur_amount"], (0.0, 1.0)) * _happens(drawn["blur"], limits.blur_share)
    row = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.outer(row, row).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    return torch.lerp(images, blurred, amount[:, None, None, None])
