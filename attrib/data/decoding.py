"""Decode the bytes of one image to canonical RGB pixels.

Files come from untrusted sources, so the header is checked before any pixel is decoded. Pillow reads the header.
JPEGs are decoded in jpeg.py, other formats in rgb.py. An image is decoded to the pixels that its format defines or
is refused: as damaged, or as not supported where even a whole file would not be decoded right.
"""

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from attrib.common.errors import ImageError
from attrib.data import tiff
from attrib.data.iso_boxes import check_jpeg2000
from attrib.data.jpeg import check_scans, decode_jpeg
from attrib.data.rgb import load_rgb

if TYPE_CHECKING:
    import torch

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
BIG_ENDIAN_BIG_TIFF = b"MM\x00\x2b"
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
MAX_REASON_CHARS = 200
MAX_TEXT_BYTES = 64 << 20  # of a PNG, unpacked: generators store whole workflows
# Messages of Pillow about files that may be whole.
UNSUPPORTED = re.compile(
    "unsupported|not (yet )?supported|unknown (pixel|raw) mode|unknown data org|cannot handle|unable to", re.I
)


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An upright RGB image. If a size is not divisible by shrink, the image covers the last row or column in part."""

    pixels: "torch.Tensor"  # uint8 [3, ceil(height / shrink), ceil(width / shrink)]
    width: int  # of the original, in pixels
    height: int
    format: str  # Pillow's name, e.g. "JPEG"
    shrink: int = 1


def decode_image(data: bytes, *, max_megapixels: float, min_side_px: float = math.inf) -> DecodedImage:
    """Return the first frame of an encoded image as 8-bit RGB with its EXIF orientation applied.

    The content decides the format, not a file name. A JPEG is decoded, in the frequency domain, at the smallest of 1,
    1/2, 1/4 and 1/8 of its size at which its shorter side has at least min_side_px pixels.

    Transparent parts are composited on white, also what the first frame of a GIF does not cover. 16-bit samples keep
    their high byte. 32-bit integer and float samples are scaled from the smallest of 1, 255 and 65535 that is not
    exceeded. Colour profiles are not applied (nor are they in training pipelines). The first page of a TIFF that is no
    thumbnail is decoded.

    Raises ImageError("decode", reason) unless the data are a complete image of FORMATS with at most max_megapixels *
    1e6 pixels. The reason starts with "damaged", or with "not supported" if the file may be whole.
    """
    import torch  # a process that only tries images should start fast

    pixels, width, height, format, shrink = decode_pixels(data, max_megapixels=max_megapixels, min_side_px=min_side_px)
    return DecodedImage(torch.from_numpy(pixels).permute(2, 0, 1), width, height, format, shrink)


def decode_pixels(
    data: bytes, *, max_megapixels: float, min_side_px: float = math.inf
) -> tuple[np.ndarray, int, int, str, int]:
    """Return the pixels as uint8 [h, w, 3] and the other fields of a DecodedImage: see `decode_image`."""
    if not data:
        raise ImageError("decode", "empty file")
    header = _read_header(data, max_megapixels)
    width, height = header.size
    shrink = 1
    try:
        if header.format in ("JPEG", "MPO"):
            end = check_scans(data)
            shrink = _shrink(header, min_side_px)
            pixels = _decode_jpeg(header, data, end, shrink)
        else:
            pixels = np.array(_upright(header, load_rgb(header, data)))
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("decode", f"out of memory for {width}x{height} pixels") from None
    except Exception as error:
        raise ImageError("decode", _reason(str(header.format), error)) from error
    if shrink == 1:
        height, width = pixels.shape[:2]
    elif _orientation(header) in SIDEWAYS:
        width, height = height, width
    return pixels, width, height, str(header.format), shrink


def _read_header(data: bytes, max_megapixels: float) -> ImageFile.ImageFile:
    max_pixels = max_megapixels * 1e6
    # Pillow's limit must not be lower than ours, but stays: it bounds TIFF tiles and WebP canvases too.
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = math.ceil(max_pixels)
    # Another library may have set it; missing parts of an image would then be filled with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
    try:
        header = Image.open(io.BytesIO(data), formats=FORMATS)
        if isinstance(header, TiffImagePlugin.TiffImageFile):
            tiff.select_page(header)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise ImageError(
            "decode", f"{found[0] if found else 'its'} pixels exceed the limit of {max_megapixels} megapixels"
        ) from None
    except Exception as error:
        claimed = next((name for name, signature in SIGNATURES.items() if re.match(signature, data, re.DOTALL)), None)
        if claimed is None:
            raise ImageError("decode", f"not an image in a supported format ({', '.join(FORMATS)})") from None
        _check_support(claimed, data)
        raise ImageError(
            "decode", _reason(claimed, _cause(claimed, data, error), "its header is invalid or truncated")
        ) from error
    width, height = header.size
    if width < 1 or height < 1:
        raise ImageError("decode", f"{width}x{height} pixels: the image is empty")
    if width * height > max_pixels:
        raise ImageError("decode", f"{width}x{height} pixels exceed the limit of {max_megapixels} megapixels")
    return header


def _check_support(format: str, data: bytes) -> None:
    """Raise ImageError if the data may be whole although Pillow did not open them."""
    if data.startswith(BIG_ENDIAN_BIG_TIFF):
        raise ImageError("decode", "not supported: BigTIFF in big-endian byte order")
    if check := {"JPEG": check_scans, "JPEG2000": check_jpeg2000}.get(format):
        try:
            check(data)
        except ImageError as error:
            if error.reason.startswith("not supported"):
                raise


def _cause(format: str, data: bytes, error: Exception) -> Exception:
    """Return why Pillow could not open the data: Image.open() says at most that no format fits."""
    try:
        Image.OPEN[format][0](io.BytesIO(data), "")
    except Exception as cause:
        return cause
    return error


def _reason(format: str, error: Exception, problem: str = "") -> str:
    """Return one line without addresses and buffer sizes, which differ from run to run."""
    line = next(iter(str(error).splitlines()), "")
    text = re.sub(r" ?\(\d+ bytes not processed\)|( object)? at 0x[0-9a-fA-F]+", "", line).strip()
    if "text chunk" in text or "MAX_TEXT" in text:
        return f"not supported: PNG with more than {MAX_TEXT_BYTES >> 20} MiB of text"
    if format == "TIFF" and text.isdigit() and text != str(tiff.COLOUR_MAP):  # a KeyError of Pillow's table
        return f"not supported: TIFF with compression {text}"
    kind = "not supported: " if UNSUPPORTED.search(text) else "damaged "
    parts = [part for part in (problem if kind == "damaged " else "", text) if part] or [type(error).__name__]
    return f"{kind}{format}: {': '.join(parts)}"[:MAX_REASON_CHARS]


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


def _decode_jpeg(header: ImageFile.ImageFile, data: bytes, end: int, shrink: int) -> np.ndarray:
    """Return uint8 [height, width, 3], upright. `end`: position of the end-of-image marker."""
    width, height = (-(-side // shrink) for side in header.size)
    pixels = decode_jpeg(data, end, width, height, "CMYK" if header.mode == "CMYK" else "RGB")
    # Pillow knows when CMYK is inverted. For a few pixels several scales give one size, and simplejpeg takes the least.
    is_tiny = shrink > 1 and max(header.size) < 64
    if pixels is None or header.mode == "CMYK" or is_tiny or pixels.shape[:2] != (height, width):
        if shrink > 1:
            header.draft(None, (header.size[0] // shrink, header.size[1] // shrink))
        header.load()
        return np.array(_upright(header, header.convert("RGB")))
    if _orientation(header) not in TURNS:
        return pixels
    return np.array(_upright(header, Image.fromarray(pixels)))


def _upright(header: ImageFile.ImageFile, image: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(header))  # after load(), because Pillow rotates TIFF files in it
    return image if turn is None else image.transpose(turn)
