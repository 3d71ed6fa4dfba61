"""TIFFs whose JPEG or fax data end early, which libtiff does not report."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image
from support.decoding import decoded, refusal
from support.hostile import encode, picture

PICTURE = np.asarray(picture(160, 128))
LAYOUTS = {"strips": {"rowsperstrip": 16}, "one strip": {"rowsperstrip": 128}, "tiles": {"tile": (32, 32)}}


def jpeg_tiff(layout: str, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, PICTURE, compression="jpeg", metadata=None, **LAYOUTS[layout], **options)
    return file.getvalue()


def shortened(data: bytes, strip: int, share: float, zeros: bool) -> bytes:
    """The last part of a strip or tile is missing, by its size in the tags or because it is zero."""
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        page = opened.pages[0]
        start, num_bytes = page.dataoffsets[strip], page.databytecounts[strip]
        tag = page.tags.get(279) or page.tags[325]
        width = {3: 2, 4: 4}[int(tag.dtype)]
        at = tag.valueoffset + strip * width
    kept = int(num_bytes * share)
    changed = bytearray(data)
    if zeros:
        changed[start + kept : start + num_bytes] = bytes(num_bytes - kept)
    else:
        changed[at : at + width] = kept.to_bytes(width, "little")
    return bytes(changed)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jpeg_data_that_end_early(layout, photometric, zeros):
    data = jpeg_tiff(layout, photometric=photometric)
    np.testing.assert_array_equal(decoded(data), tifffile.imread(io.BytesIO(data)))
    for strip in (0, len(tifffile.TiffFile(io.BytesIO(data)).pages[0].dataoffsets) - 1):
        for share in (0.5, 0.9, 0.98):
            assert refusal(shortened(data, strip, share, zeros)).startswith("damaged JPEG: truncated")


def test_shared_tables_of_jpeg_data():
    data = encode(Image.fromarray(PICTURE), "TIFF", compression="jpeg", quality=95)
    np.testing.assert_array_equal(decoded(data), tifffile.imread(io.BytesIO(data)))
    assert refusal(shortened(data, 0, 0.9, zeros=False)).startswith("damaged JPEG: truncated")


@pytest.mark.parametrize("reversed_bits", [False, True])
@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_fax_data_that_end_early(compression, reversed_bits):
    image = Image.fromarray(PICTURE[..., 0] > 128)
    tags = {266: 2} if reversed_bits else {}
    data = encode(image, "TIFF", compression=compression, tiffinfo=tags)
    np.testing.assert_array_equal(decoded(data)[..., 0], np.asarray(image) * 255)
    for share in (0, 0.5, 0.9, 0.98):
        for zeros in (False, True):
            reason = f"damaged TIFF: truncated, its {compression} data end early"
            assert refusal(shortened(data, 0, share, zeros)) == reason


def tiff_of(strip: bytes, compression: int, width: int, height: int) -> bytes:
    """A TIFF with one strip of YCbCr samples."""
    entries = [(256, 4, width), (257, 4, height), (258, 4, 0), (259, 3, compression), (262, 3, 6), (273, 4, 0)]
    entries += [(277, 3, 3), (278, 4, height), (279, 4, len(strip)), (530, 3, 0x20002)]
    bits_at = 8 + 2 + 12 * len(entries) + 4
    values = {258: bits_at, 273: bits_at + 6}
    data = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, value in entries:
        count, kind = {258: (3, 3), 530: (2, 3)}.get(tag, (1, kind))
        data += struct.pack("<HHII", tag, kind, count, values.get(tag, value))
    return data + struct.pack("<IHHH", 0, 8, 8, 8) + strip


def test_scans_of_a_jpeg_inside_are_bounded():
    jpeg = encode(Image.fromarray(PICTURE), "JPEG", progressive=True)
    assert decoded(tiff_of(jpeg, 7, 160, 128)).shape == (128, 160, 3)
    start = jpeg.rindex(b"\xff\xda")
    bomb = jpeg[:-2] + jpeg[start:-2] * 100 + jpeg[-2:]
    assert refusal(tiff_of(bomb, 7, 160, 128)) == "not supported: JPEG with more than 64 scans"


def test_a_jpeg_larger_than_its_strip_is_refused():
    jpeg = encode(Image.fromarray(PICTURE), "JPEG")
    assert refusal(tiff_of(jpeg, 7, 160, 64)).startswith("damaged TIFF: a JPEG of 160x128 pixels")


def test_compressions_that_are_not_supported():
    jpeg = encode(Image.fromarray(PICTURE), "JPEG")
    assert refusal(tiff_of(jpeg, 6, 160, 128)) == "not supported: TIFF with compression 6"
    file = io.BytesIO()
    tifffile.imwrite(file, PICTURE, compression="webp", photometric="rgb", metadata=None)
    assert refusal(file.getvalue()) == "not supported: TIFF with compression 50001"
    file = io.BytesIO()
    tifffile.imwrite(file, PICTURE, bigtiff=True, byteorder=">", photometric="rgb", metadata=None)
    assert refusal(file.getvalue()) == "not supported: BigTIFF in big-endian byte order"
