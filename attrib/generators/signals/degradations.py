"""Degradations of images after generation: recompression, resizing, blur, cropping.

The evaluation uses a fixed grid of them. Training draws random ones of the same kinds. Images are compressed by the
real JPEG and WebP codecs of Pillow. A random draw depends only on the random number generator that is passed in.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.generators.settings import GRID_NAMES

# By kind: smallest and largest strength, and its meaning.
RANGES: dict[str, tuple[float, float, str]] = {
    "none": (0, 0, "a strength"),
    "jpeg": (1, 100, "a quality"),
    "webp": (1, 100, "a quality"),
    "resize": (0.05, 4, "a factor of both sides"),
    "blur": (0.05, 10, "a standard deviation in pixels"),
    "crop": (0.05, 1, "a share of both sides"),
}
# Drawn in training: share of the draws, smallest and largest strength. Somewhat wider than GRID.
TRAINING: dict[str, tuple[float, float, float]] = {
    "none": (0.25, 0, 0),
    "jpeg": (0.3, 50, 100),
    "webp": (0.15, 50, 100),
    "resize": (0.12, 0.5, 1.0),
    "blur": (0.12, 0.3, 1.2),
    "crop": (0.06, 0.7, 1.0),
}


@dataclass(frozen=True)
class Degradation:
    """One degradation: a kind of RANGES and a strength. Raises AttribError for another kind or strength."""

    kind: str
    strength: float = 0.0

    def __post_init__(self):
        if self.kind not in RANGES:
            raise AttribError(f"unknown degradation {self.kind!r}; choose one of {', '.join(RANGES)}")
        low, high, meaning = RANGES[self.kind]
        if not low <= self.strength <= high:
            raise AttribError(
                f"{self.kind} of strength {self.strength:g} is not possible; give {meaning} from {low:g} to {high:g}"
            )
        if self.kind in ("jpeg", "webp") and self.strength != int(self.strength):
            raise AttribError(f"{self.kind} of quality {self.strength:g} is not possible; choose a whole number")

    @property
    def name(self) -> str:
        """Name that `parse` reads, e.g. "none", "jpeg-85", "resize-0.75"."""
        return self.kind if self.kind == "none" else f"{self.kind}-{self.strength:g}"


def parse(name: str) -> Degradation:
    """The degradation of this name, the inverse of `Degradation.name`. Raises AttribError for an unknown name."""
    kind, _, strength = name.partition("-")
    try:
        return Degradation(kind, float(strength or 0))
    except ValueError:
        raise AttribError(f"{name!r} is no degradation; write for example none, jpeg-85, resize-0.75") from None


NONE = Degradation("none")
GRID: tuple[Degradation, ...] = tuple(map(parse, GRID_NAMES))


def degrade(image: Tensor, degradation: Degradation) -> Tensor:
    """The degraded image, uint8 [3, h, w] -> uint8 [3, h', w'], on the CPU. A crop keeps the centre."""
    kind, strength = degradation.kind, degradation.strength
    height, width = (max(1, round(side * strength)) for side in image.shape[1:])
    if kind == "jpeg":  # 4:2:0 is what nearly every program writes
        return _coded(image, "JPEG", quality=int(strength), subsampling="4:2:0")
    if kind == "webp":
        return _coded(image, "WEBP", quality=int(strength), method=4)
    if kind == "resize":
        return _tensor(to_pillow(image).resize((width, height), Image.Resampling.BICUBIC))
    if kind == "blur":
        return _blurred(image, strength)
    if kind == "crop":
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        return image[:, top : top + height, left : left + width]
    return image


def random_degradation(generator: torch.Generator, smallest_scale: float = 0.0) -> Degradation:
    """A random degradation for training: kind drawn by the shares in TRAINING, strength uniform.

    generator: on the CPU. smallest_scale: lower limit of a resize or crop factor, so that a patch still fits into the
    image; 1 excludes resize and crop.
    """
    kinds = [kind for kind in TRAINING if smallest_scale < 1 or kind not in ("resize", "crop")]
    shares = torch.tensor([TRAINING[kind][0] for kind in kinds])
    kind = kinds[int(torch.multinomial(shares, 1, generator=generator))]
    _, low, high = TRAINING[kind]
    if kind in ("resize", "crop"):
        low = min(high, max(low, smallest_scale))
    strength = low + (high - low) * float(torch.rand((), generator=generator))
    return Degradation(kind, float(round(strength)) if kind in ("jpeg", "webp") else strength)


def _coded(image: Tensor, codec: str, **options) -> Tensor:
    buffer = io.BytesIO()
    to_pillow(image).save(buffer, codec, **options)
    return _tensor(Image.open(buffer))


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a kernel of three standard deviations; edges are repeated, so any image size works."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    pixels = F.pad(image.float()[None], (reach, reach, reach, reach), mode="replicate")
    pixels = F.conv2d(F.conv2d(pixels, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return pixels[0].round().clamp(0, 255).to(torch.uint8)


def to_pillow(image: Tensor) -> Image.Image:
    """uint8 [3, h, w] as a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
