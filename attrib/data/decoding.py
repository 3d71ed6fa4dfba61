"""Decode the bytes of one image to canonical RGB pixels.

Files come from untrusted sources, so the header is checked before any pixel is decoded. Pillow reads the header and
decodes the rare cases. TorchCodec decodes plain JPEGs, the most common format, to the same values in less time. Only
Pillow can decode a large JPEG at a fraction of its size.
"""

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from attrib.common.errors import ImageError

try:
    from torchcodec.decoders import decode_jpeg
except Exception:  # an incompatible shared library raises RuntimeError or OSError, not only ImportError
    decode_jpeg = None  # type: ignore[assignment]

# Pillow warns about defects that decode_image reports itself, and about metadata, without the file name.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# MPO (several JPEGs in one file) is opened as JPEG. Other formats of Pillow are excluded because they run other
# programs (EPS), have no signature, or do not hold photographs.
SIGNATURES = {
    "AVIF": rb".{4}ftypavi[fs]",
    "BMP": rb"BM",
    "GIF": rb"GIF8[79]a",
    "JPEG": rb"\xff\xd8\xff",
    "JPEG2000": rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51",
    "PNG": rb"\x89PNG",
    "TIFF": rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]",
    "WEBP": rb"RIFF.{4}WEBP",
}
FORMATS = tuple(SIGNATURES)
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
JPEG_SHRINKS = (8, 4, 2)  # factors of libjpeg's scaling in the frequency domain, as Pillow offers them
FULL_SCALES = (1.0, 255.0, 65535.0)
MAX_REASON_CHARS = 200


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An upright RGB image. If a size is not divisible by shrink, the image covers the last row or column in part."""

    pixels: torch.Tensor  # uint8 [3, ceil(height / shrink), ceil(width / shrink)]
    width: int  # of the original, in pixels
    height: int
    format: str  # Pillow's name, e.g. "JPEG"
    shrink: int = 1


def decoder_name() -> Literal["torchcodec", "pillow"]:
    """Return the decoder of plain JPEGs in this process."""
    return "pillow" if decode_jpeg is None else "torchcodec"


def decode_image(data: bytes, *, max_megapixels: float, min_side_px: float = math.inf) -> DecodedImage:
    """Return the first frame of an encoded image as 8-bit RGB with its EXIF orientation applied.

    The content decides the format, not a file name. A JPEG is decoded, in the frequency domain, at the smallest of 1,
    1/2, 1/4 and 1/8 of its size at which its shorter side has at least min_side_px pixels.

    Transparent parts are composited on white. 16-bit samples keep their high byte. 32-bit integer and float samples are
    scaled from the smallest of 1, 255 and 65535 that is not exceeded. Colour profiles are not applied (nor are they in
    training pipelines). A damaged JPEG that ends with an end-of-image marker is decoded as libjpeg repairs it.

    Raises ImageError("decode", reason) unless the data are a complete image of FORMATS with at most max_megapixels *
    1e6 pixels.
    """
    if not data:
        raise ImageError("decode", "empty file")
    header = _read_header(data, max_megapixels)
    width, height = header.size
    is_jpeg = header.format in ("JPEG", "MPO")
    try:
        # Pillow accepts a JPEG that ends in zeros (an interrupted download); TorchCodec does not.
        if is_jpeg and not _has_end_of_image(data):
            raise ImageError("decode", f"damaged {header.format}: truncated, it has no end-of-image marker")
        shrink = _shrink(header, min_side_px) if is_jpeg else 1
        if shrink > 1:
            header.draft(None, (width // shrink, height // shrink))
        is_plain = is_jpeg and shrink == 1 and _is_plain(header)
        pixels = _decode_plain_jpeg(data, width, height) if is_plain else None
        if pixels is None:
            pixels = _decode_with_pillow(header)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("decode", f"out of memory for {width}x{height} pixels") from None
    except Exception as error:
        raise ImageError("decode", f"damaged {header.format}: {_brief(error)}") from error
    if shrink == 1:
        height, width = pixels.shape[1:]
    elif _orientation(header) in SIDEWAYS:
        width, height = height, width
    return DecodedImage(pixels, width=width, height=height, format=str(header.format), shrink=shrink)


def _read_header(data: bytes, max_megapixels: float) -> ImageFile.ImageFile:
    max_pixels = max_megapixels * 1e6
    # Pillow's limit must not be lower than ours, but stays: it bounds TIFF tiles and WebP canvases too.
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = math.ceil(max_pixels)
    # Another library may have set it; missing parts of an image would then be filled with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        header = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise ImageError(
            "decode", f"{found[0] if found else 'its'} pixels exceed the limit of {max_megapixels} megapixels"
        ) from None
    except Exception as error:
        claimed = next((name for name, signature in SIGNATURES.items() if re.match(signature, data, re.DOTALL)), None)
        if claimed is None:
            raise ImageError("decode", f"not an image in a supported format ({', '.join(FORMATS)})") from None
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {_brief(error)}"
        raise ImageError("decode", f"damaged {claimed}, its header is invalid or truncated{detail}") from error
    width, height = header.size
    if width < 1 or height < 1:
        raise ImageError("decode", f"{width}x{height} pixels: the image is empty")
    if width * height > max_pixels:
        raise ImageError("decode", f"{width}x{height} pixels exceed the limit of {max_megapixels} megapixels")
    return header


def _brief(error: Exception) -> str:
    """Return the first line of an error without addresses and buffer sizes, which differ from run to run."""
    line = next(iter(str(error).splitlines()), "")
    text = re.sub(r" ?\(\d+ bytes not processed\)|( object)? at 0x[0-9a-fA-F]+", "", line)
    return (text.strip() or type(error).__name__)[: MAX_REASON_CHARS - 60]


def _has_end_of_image(data: bytes) -> bool:
    """Return whether an end-of-image marker follows the first scan. That of an EXIF thumbnail lies before it."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            break
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data.find(b"\xff\xd9", position) >= 0


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # the pixels are usable even if the metadata are damaged
        return 1


def _shrink(header: ImageFile.ImageFile, min_side_px: float) -> int:
    width, height = header.size
    for shrink in JPEG_SHRINKS:
        # A rotation could move the partly covered last row or column to the start.
        divides = width % shrink == 0 and height % shrink == 0
        if min(width, height) >= shrink * min_side_px and (divides or _orientation(header) not in TURNS):
            return shrink
    return 1


def _is_plain(header: ImageFile.ImageFile) -> bool:
    # TorchCodec applies the orientation of EXIF but not of XMP, Pillow applies both: Pillow decodes all rotated images.
    return header.mode in ("RGB", "L") and _orientation(header) not in TURNS


def _decode_plain_jpeg(data: bytes, width: int, height: int) -> torch.Tensor | None:
    """Return uint8 [3, height, width]; None leaves it to Pillow, whose errors do not depend on TorchCodec."""
    if decode_jpeg is None:
        return None
    try:
        pixels = decode_jpeg(data, mode="RGB")
    except Exception:
        return None
    return pixels if isinstance(pixels, torch.Tensor) and pixels.shape == (3, height, width) else None


def _decode_with_pillow(image: ImageFile.ImageFile) -> torch.Tensor:
    image.load()
    turn = TURNS.get(_orientation(image))  # after load(), because Pillow rotates TIFF files in it
    upright = image if turn is None else image.transpose(turn)
    return torch.from_numpy(np.array(_to_rgb(upright))).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip at 255; for 16-bit RGB it keeps the high byte, too.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scale_to_8_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies


def _scale_to_8_bit(samples: np.ndarray) -> np.ndarray:
    """Scale int32 or float32 [h, w] to uint8. The files do not define white: the smallest usual value is used."""
    low, high = float(samples.min()), float(samples.max())
    for full_scale in FULL_SCALES:
        if 0 <= low and high <= full_scale:
            return np.rint(samples * (255.0 / full_scale)).astype(np.uint8)
    raise ImageError(
        "decode", f"samples from {low:.4g} to {high:.4g} lie outside the usual ranges (0 to 1, 255 or 65535)"
    )
