"""Preprocess decoded 8-bit RGB pixels for a backbone: resize, crop and normalise, as timm does."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from attrib.data.decoding import DecodedImage, decode_image

# Above this ratio of the sides, only the part under the crop is resized (1x5000 pixels would otherwise need 983 MB).
PANORAMA_RATIO = 8
Interpolation = Literal["bicubic", "bilinear"]
CropMode = Literal["center", "squash"]  # as timm names them


@dataclass(frozen=True)
class Preprocessing:
    """The input of a backbone: shorter side resized to resize_px, centre crop to crop_px, then (x / 255 - mean) / std.

    mean, std: per RGB channel, on the scale of 0 to 1. crop_mode "squash": both sides are resized to resize_px.
    jpeg_margin: a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size at which its shorter side is at
    least jpeg_margin * resize_px; None: always at full size. Raises ValueError that names the invalid value.
    """

    resize_px: int
    crop_px: int
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: CropMode = "center"
    jpeg_margin: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("crop_mode", get_args(CropMode)), ("interpolation", get_args(Interpolation))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {allowed}")
        if not 1 <= self.crop_px <= self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} must lie between 1 and resize_px {self.resize_px}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must have three values each, those of std above 0")
        if self.jpeg_margin is not None and not self.jpeg_margin >= 1:
            raise ValueError(f"jpeg_margin {self.jpeg_margin} must be 1 or more, or the image would be enlarged")

    @classmethod
    def from_timm(cls, data_config: dict) -> "Preprocessing":
        """Return the preprocessing of the result of timm.data.resolve_model_data_config.

        Raises ValueError if it is not supported.
        """
        channels, height, width = data_config["input_size"]
        if channels != 3 or height != width:
            raise ValueError(f"input_size is {data_config['input_size']}, not a square RGB image")
        return cls(
            resize_px=math.floor(height / data_config["crop_pct"]),
            crop_px=height,
            interpolation=data_config["interpolation"],
            mean=tuple(map(float, data_config["mean"])),
            std=tuple(map(float, data_config["std"])),
            crop_mode=data_config["crop_mode"],
        )

    def to_dict(self) -> dict:
        """Return JSON-like values, as written to the record of every output."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> "Preprocessing":
        """Invert `to_dict`. Raises TypeError for missing or unknown keys and ValueError for invalid values."""
        return cls(**(values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])}))

    def decode(self, data: bytes, *, max_megapixels: float) -> DecodedImage:
        """Decode an image (see `decode_image`), scaled as jpeg_margin allows."""
        min_side_px = math.inf if self.jpeg_margin is None else self.jpeg_margin * self.resize_px
        return decode_image(data, max_megapixels=max_megapixels, min_side_px=min_side_px)

    def resize_and_crop(self, image: DecodedImage | torch.Tensor) -> torch.Tensor:
        """Return uint8 [3, crop_px, crop_px] of an image or of uint8 [3, h, w], as timm's evaluation transform does.

        Without scaled decoding, photographs differ from timm's result by at most 2 grey levels, 0.003 on average. For
        some tall panoramas Pillow filters the other axis first: white noise differs by up to 20 levels, 0.4 on average.
        """
        if isinstance(image, torch.Tensor):
            image = DecodedImage(image, image.shape[2], image.shape[1], "")
        shorter = min(image.height, image.width)
        if self.crop_mode == "squash":
            size = [self.resize_px, self.resize_px]
        else:
            size = [self.resize_px * image.height // shorter, self.resize_px * image.width // shorter]
            if max(image.height, image.width) > PANORAMA_RATIO * shorter:
                return self._resize_centre(image, *size)
        if image.shrink == 1:
            mode = InterpolationMode(self.interpolation)
            resized = functional.resize(image.pixels, size, interpolation=mode, antialias=True)
        else:
            resized = self._resize_covered(image, *size)
        return functional.center_crop(resized, [self.crop_px, self.crop_px])

    def _resize_covered(self, image: DecodedImage, height: int, width: int) -> torch.Tensor:
        """Resize a scaled image on the sampling grid of the full-size image.

        The grid of the scaled image would be shifted by up to half a pixel, with ten times the error.
        """
        scales = [size * image.shrink / full for size, full in ((height, image.height), (width, image.width))]
        # torch rounds the size of the result down, so the product must not be slightly below a whole number.
        scales = [scale * (1 + 1e-9) for scale in scales]
        resized = torch.nn.functional.interpolate(
            image.pixels[None], scale_factor=scales, mode=self.interpolation, antialias=True
        )
        return resized[0, :, :height, :width]

    def _resize_centre(self, image: DecodedImage, resized_height: int, resized_width: int) -> torch.Tensor:
        """Return the centre crop of the resized image, computed from the source pixels under the crop only."""
        top, left = round((resized_height - self.crop_px) / 2), round((resized_width - self.crop_px) / 2)
        x, y = image.width / image.shrink / resized_width, image.height / image.shrink / resized_height
        filter = Image.Resampling[self.interpolation.upper()]
        source = functional.to_pil_image(image.pixels)
        # One axis at a time, because Pillow chooses the order by the shape of the crop, which changes the rounding.
        size, box = (self.crop_px, source.height), (left * x, 0, (left + self.crop_px) * x, source.height)
        source = source.resize(size, filter, box=box)
        size, box = (self.crop_px, self.crop_px), (0, top * y, self.crop_px, (top + self.crop_px) * y)
        return torch.from_numpy(np.array(source.resize(size, filter, box=box))).permute(2, 0, 1)

    def normalise(self, batch: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """Return normalised images of `dtype` [n, 3, h, w] on `device`. batch: uint8 [n, 3, h, w]."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=device).view(3, 1, 1)
        return batch.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std).to(dtype)
