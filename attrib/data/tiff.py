"""Choose the page of a TIFF, check that Pillow decodes its layout right, and correct what it reads wrong.

Pillow has a table of the layouts that it knows, but ignores some tags and mistakes some layouts for others.
"""

import io
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin

from attrib.common.errors import ImageError
from attrib.data.jpeg import check_scans, decode_jpeg

# Pillow's own reader of uncompressed data takes the planes of 16-bit samples for 8-bit ones.
TiffImagePlugin.READ_LIBTIFF = True
# Its table has these for the other photometric interpretation or byte order alone.
TiffImagePlugin.OPEN_INFO[TiffImagePlugin.II, 0, (1,), 1, (12,), ()] = ("I;16", "I;12")
TiffImagePlugin.OPEN_INFO[TiffImagePlugin.MM, 0, (1,), 1, (16,), ()] = ("I;16", "I;16")

MAX_PAGES = 64  # that are looked at
NEW_SUBFILE_TYPE, SUB_IFDS, INK_SET, COLOUR_MAP = 254, 330, 332, 320
REDUCED, MASK = 1, 4  # bits of NEW_SUBFILE_TYPE
MIN_IS_WHITE, CIELAB, CMYK = 0, 8, 5
FAX = ("tiff_ccitt", "group3", "group4")
INTEGER, SIGNED = 1, 2
# Our libtiff has no WebP, and old JPEG (6) is defined too loosely to see that its data end early.
UNREADABLE = ("tiff_jpeg", "webp")
JPEG_TABLES, FILL_ORDER = 347, 266
# Tags of the positions and sizes in the file, and of width and height.
STRIPS, TILES = (273, 279, 256, 278), (324, 325, 322, 323)
REVERSED_BITS = 2
LINE_END = "000000000001"  # bits of fax data
END_OF_BLOCK = re.compile(f"{LINE_END}{LINE_END}0*$")


def select_page(image: TiffImagePlugin.TiffImageFile) -> None:
    """Seek to the first page that is neither a reduced version of another image nor a mask.

    Raises ImageError if all pages are, but the file has images that are no pages (as raw files of cameras do).
    """
    for page in range(MAX_PAGES):
        try:
            image.seek(page)
        except EOFError:
            break
        if not image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & (REDUCED | MASK):
            return
    image.seek(0)
    if SUB_IFDS in image.tag_v2:
        raise ImageError("decode", "not supported: TIFF whose only page is a thumbnail (a camera's raw file?)")


def check_layout(image: TiffImagePlugin.TiffImageFile) -> None:
    """Prepare the decoding of the selected page. Raises ImageError for a layout that is not decoded right."""
    tags = image.tag_v2
    bits, sample_format = tags.get(258, (1,)), tags.get(339, (INTEGER,))[0]
    photometric, planes = tags.get(262), tags.get(284, 1)
    problem = None
    if photometric is None and image.info["compression"] not in FAX:
        problem = "no PhotometricInterpretation"
    elif image.info["compression"] in UNREADABLE:
        problem = f"compression {tags[259]}"
    elif photometric == CIELAB:
        problem = "CIE L*a*b* samples"
    elif sample_format == SIGNED and bits[0] < 32:
        problem = f"signed {bits[0]}-bit samples"
    elif photometric == MIN_IS_WHITE and image.mode in ("I", "F"):
        problem = f"{bits[0]}-bit samples of which the smallest is white"
    elif photometric == CMYK and tags.get(INK_SET, 1) != 1:
        problem = "inks other than CMYK"
    elif planes == 2 and (
        image.mode in ("LA", "La", "PA")
        or raw_mode(image).startswith("RGBa")
        or (bits[0] == 16 and image.mode != "RGB")
    ):
        problem = f"{bits[0]}-bit {image.mode} in separate planes"
    if problem:
        raise ImageError("decode", f"not supported: TIFF with {problem}")
    # libtiff returns samples in the byte order of the machine, not of the file.
    native = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;32B": "I;32N"}.get(raw_mode(image))
    if native:
        set_raw_mode(image, native)
    if image.mode in ("P", "PA") and max(tags[COLOUR_MAP]) < 256:  # written by programs that took it for 8 bits
        image.palette = ImagePalette.raw("RGB;L", bytes(tags[COLOUR_MAP]))


def raw_mode(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name for how the bytes of samples are unpacked; "" if the format has none."""
    args = image.tile[0].args if image.tile else None
    return str(args[0] if isinstance(args, tuple) else args or "")


def set_raw_mode(image: ImageFile.ImageFile, mode: str) -> None:
    """Change how the bytes of samples are unpacked, before load()."""
    tile = image.tile[0]
    image.tile = [tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)]


def correct_grey(samples: np.ndarray, tags: TiffImagePlugin.ImageFileDirectory_v2) -> np.ndarray:
    """Return uint16 [h, w] from 0 (black) to 65,535 (white) of 12- or 16-bit samples as stored."""
    if tags.get(258, (16,))[0] == 12:
        samples = samples * np.uint16(16) + samples // np.uint16(256)
    return np.uint16(65535) - samples if tags.get(262) == MIN_IS_WHITE else samples


def check_strips(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    """Raise ImageError if JPEG or fax data of the selected page are damaged or end early.

    libtiff reports this for other compressions. These it repairs without an error, as if they were on paper.
    """
    compression = image.info["compression"]
    if compression == "jpeg":
        for strip in _strips(image, data):
            _check_jpeg(image, strip)
    elif compression in ("group3", "group4"):
        _check_fax(image, list(_strips(image, data)), compression)


def _strips(image: TiffImagePlugin.TiffImageFile, data: bytes) -> Iterator[bytes]:
    offsets, sizes, *_ = _layout(image)
    for start, num_bytes in zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(sizes, ()), strict=True):
        yield data[start : start + num_bytes]


def _layout(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int, int, int]:
    return TILES if TILES[0] in image.tag_v2 else STRIPS


def _check_fax(image: TiffImagePlugin.TiffImageFile, strips: list[bytes], compression: str) -> None:
    """Group 4 data have a mark at their end, group 3 data one for each line."""
    is_reversed = image.tag_v2.get(FILL_ORDER) == REVERSED_BITS
    rows_left, rows_per_strip = image.size[1], image.tag_v2.get(_layout(image)[3], image.size[1])
    for strip in strips:
        bits = "".join(f"{byte:08b}"[:: -1 if is_reversed else 1] for byte in strip)
        num_rows = rows_per_strip if TILES[0] in image.tag_v2 else min(rows_left, rows_per_strip)
        is_whole = END_OF_BLOCK.search(bits) if compression == "group4" else bits.count(LINE_END) >= num_rows
        if not is_whole:
            raise ImageError("decode", f"damaged TIFF: truncated, its {compression} data end early")
        rows_left -= num_rows


def _check_jpeg(image: TiffImagePlugin.TiffImageFile, strip: bytes) -> None:
    tables = image.tag_v2.get(JPEG_TABLES, b"")
    jpeg = (tables.rstrip(b"\0").removesuffix(b"\xff\xd9") + strip[2:]) if tables else strip
    end = check_scans(jpeg)
    *_, width_tag, height_tag = _layout(image)
    width, height = image.tag_v2[width_tag], image.tag_v2.get(height_tag, image.tag_v2[257])
    header = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
    if header.size[0] > width or header.size[1] > height:
        raise ImageError(
            "decode", f"damaged TIFF: a JPEG of {header.size[0]}x{header.size[1]} pixels in a strip of {width}x{height}"
        )
    # All coefficients are decoded at the least scale, too.
    decode_jpeg(jpeg, end, 1, 1, "CMYK" if header.mode == "CMYK" else "RGB")
