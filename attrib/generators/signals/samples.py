"""One image as every fingerprint method gets it: its pixels, and the facts of its file that only the leak controls look at."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from attrib.data.decoding import decode_image
from attrib.generators.signals.degradations import Degradation, degrade

PNG_LEVEL = (
    1  # Pillow's default takes four times as long, 0.2 s for a megapixel, and only one control looks at the size
)


@dataclass(frozen=True, eq=False)
class Sample:
    """image: uint8 [3, h, w], canonical pixels, never resized. codec: Pillow's name of the file's format, e.g. "JPEG"; num_bytes: of the file."""

    image: torch.Tensor
    codec: str
    num_bytes: int

    @property
    def side_px(self) -> int:
        """The shorter side."""
        return min(self.image.shape[1:])


def read_sample(data: bytes, max_megapixels: float) -> Sample:
    """Raises ImageError (attrib/data/decoding.py) for what is no complete image."""
    decoded = decode_image(data, max_megapixels=max_megapixels)
    return Sample(decoded.pixels, decoded.format, len(data))


def drawn_sample(image: torch.Tensor) -> Sample:
    """Pixels uint8 [3, h, w] that were never a file, with the facts that they have as a PNG."""
    return Sample(image, "PNG", _file_bytes(image, "PNG", compress_level=PNG_LEVEL))


def recoded(sample: Sample, degradation: Degradation) -> Sample:
    """The sample after a platform has processed it: gallery and queries put through the same one have no format left that tells them apart.

    JPEG and WebP leave such a file. What a degradation of the pixels leaves is written as PNG, and so is what was not degraded at all.
    """
    pixels = degrade(sample.image, degradation)
    if degradation.kind not in ("jpeg", "webp"):
        return drawn_sample(pixels)
    codec = degradation.kind.upper()
    return Sample(pixels, codec, _file_bytes(sample.image, codec, quality=round(degradation.strength)))


def _file_bytes(image: torch.Tensor, codec: str, **options) -> int:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(file, codec, **options)
    return file.tell()
