"""An image as fingerprint methods see it: pixels, file format and file size.

Only the leak controls use format and size. A leak control is a baseline that sees no generator trace, only content or
file properties. If it identifies generators on an evaluation set, these properties reveal (leak) the generator there.
"""

import io
from dataclasses import dataclass

import torch

from attrib.data.decoding import decode_image
from attrib.generators.signals.degradations import Degradation, degrade, to_pillow

# Pillow's default level takes four times as long, 0.2 s for a megapixel, and only one leak control uses the size.
PNG_LEVEL = 1


@dataclass(frozen=True, eq=False)
class Sample:
    """Canonical pixels uint8 [3, h, w], never resized; Pillow's name of the file format, e.g. "JPEG"; file size."""

    image: torch.Tensor
    codec: str
    num_bytes: int

    @property
    def side_px(self) -> int:
        """The shorter side."""
        return min(self.image.shape[1:])


def read_sample(data: bytes, max_megapixels: float) -> Sample:
    """The decoded sample. Raises ImageError (attrib/data/decoding.py) for an incomplete image."""
    decoded = decode_image(data, max_megapixels=max_megapixels)
    return Sample(decoded.pixels, decoded.format, len(data))


def drawn_sample(image: torch.Tensor) -> Sample:
    """A sample of pixels uint8 [3, h, w] that come from no file; format and size are those of a PNG file."""
    return Sample(image, "PNG", _file_bytes(image, "PNG", compress_level=PNG_LEVEL))


def recoded(sample: Sample, degradation: Degradation) -> Sample:
    """The sample after a degradation, stored as JPEG or WebP for these degradations and as PNG for all others.

    References and queries are recoded alike, so the file format does not tell them apart.
    """
    pixels = degrade(sample.image, degradation)
    if degradation.kind not in ("jpeg", "webp"):
        return drawn_sample(pixels)
    codec = degradation.kind.upper()
    return Sample(pixels, codec, _file_bytes(sample.image, codec, quality=round(degradation.strength)))


def _file_bytes(image: torch.Tensor, codec: str, **options) -> int:
    file = io.BytesIO()
    to_pillow(image).save(file, codec, **options)
    return file.tell()
