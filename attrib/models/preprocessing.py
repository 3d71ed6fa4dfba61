"""From canonical pixels to the input of a backbone: which part of a picture it sees, how large, and on which scale its values lie."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from attrib.data.decoding import DecodedImage, decode_image

# Above this ratio of the sides, resizing all of the image before the crop wastes most of the work (1x5000 would pass through 983 MB).
PANORAMA_RATIO = 8
Interpolation = Literal["bicubic", "bilinear"]
CropMode = Literal["center", "squash"]  # as timm names them


@dataclass(frozen=True)
class Preprocessing:
    """A backbone's input: the shorter side resized to resize_px, the centre crop_px x crop_px cut out, then (x / 255 - mean) / std.

    mean and std: per RGB channel, on the scale of 0 to 1. With crop_mode "squash" both sides are resized to resize_px, so that with a
    crop_px as large nothing of the picture is lost. jpeg_margin: a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size that
    leaves its shorter side jpeg_margin times resize_px; None: always at its full size. Raises ValueError that names the invalid value.
    """

    resize_px: int
    crop_px: int
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: CropMode = "center"
    jpeg_margin: float | None = None

    def __post_init__(self):
        if self.crop_mode not in get_args(CropMode):
            raise ValueError(f"crop_mode {self.crop_mode!r} is not supported; use one of {get_args(CropMode)}")
        if not 1 <= self.crop_px <= self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} must lie between 1 and resize_px {self.resize_px}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation {self.interpolation!r} is not supported; use one of {get_args(Interpolation)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must have three values each, those of std above 0")
        if self.jpeg_margin is not None and not self.jpeg_margin >= 1:
            raise ValueError(
                f"jpeg_margin {self.jpeg_margin} must be 1 or more: below it the picture would be enlarged"
            )

    @classmethod
    def from_timm(cls, data_config: dict) -> "Preprocessing":
        """From timm's data config (`timm.data.resolve_model_data_config`). Raises ValueError for what is not supported."""
        channels, height, width = data_config["input_size"]
        if channels != 3 or height != width:
            raise ValueError(
                f"input_size {data_config['input_size']} is not supported; choose a backbone with a square RGB input"
            )
        return cls(
            resize_px=math.floor(height / data_config["crop_pct"]),
            crop_px=height,
            interpolation=data_config["interpolation"],
            mean=tuple(map(float, data_config["mean"])),
            std=tuple(map(float, data_config["std"])),
            crop_mode=data_config["crop_mode"],
        )

    def to_dict(self) -> dict:
        """JSON-like; the record beside every output."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> "Preprocessing":
        """The inverse of to_dict. Raises TypeError for missing or unknown keys and ValueError for invalid values."""
        return cls(**(values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])}))

    def decode(self, data: bytes, *, max_megapixels: float) -> DecodedImage:
        """As decode_image, with the scaling that these settings allow."""
        min_side_px = math.inf if self.jpeg_margin is None else self.jpeg_margin * self.resize_px
        return decode_image(data, max_megapixels=max_megapixels, min_side_px=min_side_px)

    def resize_and_crop(self, image: DecodedImage | torch.Tensor) -> torch.Tensor:
        """An image, or uint8 [3, h, w] -> uint8 [3, crop_px, crop_px], as timm's evaluation transform gives for a Pillow image.

        On photographs at most 2 grey levels apart, 0.003 in the mean, where the decoder did not scale. Pillow filters some tall panoramas in
        the other order of the axes, which is up to 20 grey levels apart at single pixels of white noise, 0.4 in the mean.
        """
        if isinstance(image, torch.Tensor):
            image = DecodedImage(image, image.shape[2], image.shape[1], "")
        shorter = min(image.height, image.width)
        if self.crop_mode == "squash":
            size = [self.resize_px, self.resize_px]
        else:
            size = [self.resize_px * image.height // shorter, self.resize_px * image.width // shorter]
            if max(image.height, image.width) > PANORAMA_RATIO * shorter:
                return self._resize_the_centre(image, *size)
        if image.shrink == 1:
            mode = InterpolationMode(self.interpolation)
            resized = functional.resize(image.pixels, size, interpolation=mode, antialias=True)
        else:
            resized = self._resize_what_is_filled(image, *size)
        return functional.center_crop(resized, [self.crop_px, self.crop_px])

    def _resize_what_is_filled(self, image: DecodedImage, height: int, width: int) -> torch.Tensor:
        """The same grid over the picture as without scaling: whole pixels would move it by up to half of one, which costs ten times the accuracy."""
        scales = [size * image.shrink / full for size, full in ((height, image.height), (width, image.width))]
        # Rounded down by torch to the size of the result: a hair more than a whole number, never a hair less.
        scales = [scale * (1 + 1e-9) for scale in scales]
        resized = torch.nn.functional.interpolate(
            image.pixels[None], scale_factor=scales, mode=self.interpolation, antialias=True
        )
        return resized[0, :, :height, :width]

    def _resize_the_centre(self, image: DecodedImage, resized_height: int, resized_width: int) -> torch.Tensor:
        """The same result where only the source pixels under the crop (and the filter's reach around it) are touched."""
        top, left = round((resized_height - self.crop_px) / 2), round((resized_width - self.crop_px) / 2)
        x, y = image.width / image.shrink / resized_width, image.height / image.shrink / resized_height
        filter = Image.Resampling[self.interpolation.upper()]
        picture = Image.fromarray(np.ascontiguousarray(image.pixels.permute(1, 2, 0).numpy()))
        # One axis at a time: given both, Pillow picks the order by the shape of the crop, and the rounding between the two would differ.
        size, box = (self.crop_px, picture.height), (left * x, 0, (left + self.crop_px) * x, picture.height)
        picture = picture.resize(size, filter, box=box)
        size, box = (self.crop_px, self.crop_px), (0, top * y, self.crop_px, (top + self.crop_px) * y)
        return torch.from_numpy(np.array(picture.resize(size, filter, box=box))).permute(2, 0, 1)

    def normalise(self, batch: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> dtype [n, 3, h, w] on device; bytes travel, as floats would be four times as many."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=device).view(3, 1, 1)
        return batch.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std).to(dtype)
