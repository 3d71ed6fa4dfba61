"""Find compressed strips and tiles of a TIFF whose data end early, where libtiff fills the rest without an error.

libtiff reports this for other compressions. JPEG and fax data are repaired, as if they were on paper.
"""

import io
import re
from collections.abc import Iterator

from PIL import Image, TiffImagePlugin

from attrib.common.errors import ImageError
from attrib.data.jpeg import check_scans, decode_jpeg

JPEG_TABLES, FILL_ORDER = 347, 266
# Tags of the positions and sizes in the file, and of width and height.
STRIPS, TILES = (273, 279, 256, 278), (324, 325, 322, 323)
REVERSED_BITS = 2
LINE_END = "000000000001"  # bits of fax data
END_OF_BLOCK = re.compile(f"{LINE_END}{LINE_END}0*$")


def check_strips(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    """Raise ImageError if JPEG or fax data of the selected page are damaged or end early."""
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
