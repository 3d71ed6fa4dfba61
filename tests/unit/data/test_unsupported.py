"""Pages of TIFFs, text of PNGs, and refusals: what is not supported is told apart from what is damaged."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from support.bmp_gif import bmp_table
from support.decoding import decoded
from support.hostile import encode, picture, png_chunk
from support.png import write_png

from attrib.common.errors import ImageError

PICTURE = np.asarray(picture())
OTHER = PICTURE[::2, ::2, ::-1].copy()


def tiff(*pages: tuple[np.ndarray, dict]) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for pixels, options in pages:
            writer.write(pixels, metadata=None, **({"photometric": "rgb"} if pixels.ndim == 3 else {}) | options)
    return file.getvalue()


THUMBNAIL = {"subfiletype": 1}


@pytest.mark.parametrize(
    "pages",
    [
        [(PICTURE, {}), (OTHER, {})],
        [(OTHER, THUMBNAIL), (PICTURE, {})],
        [(OTHER, THUMBNAIL), (OTHER, THUMBNAIL), (PICTURE, {}), (OTHER, {})],
        [(PICTURE, THUMBNAIL)],
        [(OTHER, THUMBNAIL), (PICTURE, {"compression": "zlib", "tile": (32, 32)})],
    ],
)
def test_first_page_that_is_no_thumbnail_is_decoded(pages):
    np.testing.assert_array_equal(decoded(tiff(*pages)), PICTURE)


def test_deep_page_after_a_thumbnail():
    rgba = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 128, np.uint8)]).astype(np.uint16) * 257
    data = tiff((OTHER, THUMBNAIL), (rgba, {"extrasamples": ["unassalpha"]}))
    assert np.abs(decoded(data) - (PICTURE * (128 / 255) + 127)).max() <= 1


def test_reversed_bits_of_a_tiff():
    grey = PICTURE[..., 0].copy()
    data = encode(Image.fromarray(grey), "TIFF", tiffinfo={266: 2})
    start = data.index(grey.tobytes())
    turned = np.packbits(np.unpackbits(grey[..., None], axis=2)[..., ::-1], axis=2).tobytes()
    np.testing.assert_array_equal(decoded(data[:start] + turned + data[start + grey.size :])[..., 0], grey)


def test_colour_map_of_8_bits():
    colours = np.random.default_rng(3).integers(0, 256, (3, 256)).astype(np.uint16)
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for scale in (1, 257):
        data = tiff((indices, {"photometric": "palette", "colormap": colours * np.uint16(scale)}))
        np.testing.assert_array_equal(decoded(data), colours.T[indices])


LARGE = {
    "tEXt": lambda size: b"workflow\0" + b"x" * size,
    "zTXt": lambda size: b"workflow\0\0" + zlib.compress(b"x" * size),
    "iTXt": lambda size: b"workflow\0\1\0\0\0" + zlib.compress(b"x" * size),
    "iCCP": lambda size: b"profile\0\0" + zlib.compress(b"x" * size),
}


def png_with(kind: str, content: bytes) -> bytes:
    data = encode(picture(), "PNG")
    return data[:33] + png_chunk(kind.encode(), content) + data[33:]


@pytest.mark.parametrize("kind", LARGE)
def test_large_text_of_a_png_is_no_reason_to_refuse_it(kind):
    np.testing.assert_array_equal(decoded(png_with(kind, LARGE[kind](60_000_000))), PICTURE)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_text_of_a_png_is_bounded(kind):
    with pytest.raises(ImageError, match="not supported: PNG with more than 64 MiB of text"):
        decoded(png_with(kind, LARGE[kind](70_000_000)))


def unsupported() -> dict[str, bytes]:
    deep = (PICTURE.astype(np.uint16) * 257).astype(np.uint32)
    jpeg = bytearray(encode(picture(), "JPEG"))
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
    compression = tiff((PICTURE, {}))
    tag = compression.index(struct.pack("<HHIH", 259, 3, 1, 1))
    return {
        "32-bit RGB.tif": tiff((deep, {})),
        "float RGB.tif": tiff(((PICTURE / 255).astype(np.float32), {})),
        "signed.tif": tiff((PICTURE[..., 0].astype(np.int16), {"photometric": "minisblack"})),
        "lab.tif": tiff((PICTURE, {"photometric": "cielab"})),
        "five channels.tif": tiff(
            (np.dstack([PICTURE, PICTURE[..., :2]]), {"photometric": "minisblack", "planarconfig": "contig"})
        ),
        "compression.tif": compression[: tag + 8] + struct.pack("<H", 34892) + compression[tag + 10 :],
        "raw file.tif": tiff((OTHER, THUMBNAIL | {"subifds": 1}), (PICTURE, {})),
        "444.bmp": bmp_table()["16-bit-444-40"][0],
        "1555.bmp": bmp_table()["16-bit-1555-56"][0],
        "twelve bits.jpg": bytes(jpeg),
        "12-bit RGB.jp2": imagecodecs.jpeg2k_encode(PICTURE.astype(np.uint16) * 16, bitspersample=12),
        "range.tif": encode(Image.fromarray(np.full((8, 8), 1e6, np.float32)), "TIFF"),
    }


@pytest.mark.parametrize("name", unsupported())
def test_unsupported_is_not_called_damaged(name):
    with pytest.raises(ImageError, match=r"^decode: not supported: ") as caught:
        decoded(unsupported()[name])
    assert "damaged" not in caught.value.reason and len(caught.value.reason) <= 200


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG", "AVIF", "JPEG2000"])
def test_damaged_is_not_called_unsupported(format):
    data = encode(Image.fromarray(np.random.default_rng(4).integers(0, 256, (60, 80, 3), dtype=np.uint8)), format)
    for num_bytes in np.linspace(12, len(data) * 3 // 4, 25).astype(int):
        with pytest.raises(ImageError) as caught:
            decoded(data[:num_bytes])
        assert "not supported" not in caught.value.reason, (num_bytes, caught.value.reason)


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_bits_above_the_depth_of_a_transparent_grey_do_not_count(depth):
    samples = np.arange(16).reshape(4, 4, 1) % 2**depth
    data = write_png(samples, depth, 0, tRNS=struct.pack(">H", 2 + 2**depth))
    grey = np.where(samples == 2, 255, samples * 255 // (2**depth - 1))
    np.testing.assert_array_equal(decoded(data), np.repeat(grey, 3, axis=2))


def test_transparency_after_the_pixels_does_not_hold():
    data = encode(Image.fromarray(PICTURE), "PNG")
    end = data.index(b"IEND") - 4
    late = data[:end] + png_chunk(b"tRNS", struct.pack(">HHH", *PICTURE[0, 0])) + data[end:]
    np.testing.assert_array_equal(decoded(late), PICTURE)


@pytest.mark.parametrize("background", [b"\0\0\0\xff", b"\1\2\3\0"])
def test_what_the_first_frame_of_a_webp_does_not_cover_is_white(background):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    def number(value: int) -> bytes:
        return value.to_bytes(3, "little")

    frame = number(10) + number(8) + number(47) + number(31) + number(100) + b"\0"
    frame += encode(Image.fromarray(OTHER), "WEBP", lossless=True)[12:]
    body = b"WEBP" + chunk(b"VP8X", b"\2\0\0\0" + number(95) + number(63)) + chunk(b"ANIM", background + b"\0\0")
    body += chunk(b"ANMF", frame)
    expected = np.full((64, 96, 3), 255, np.uint8)
    expected[16:48, 20:68] = OTHER
    np.testing.assert_array_equal(decoded(b"RIFF" + struct.pack("<I", len(body)) + body), expected)


def test_a_jpeg_that_pillow_cannot_open_is_not_called_damaged():
    jpeg = encode(Image.fromarray(PICTURE), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    without_height = jpeg[:at] + b"\0\0" + jpeg[at + 2 : -2] + b"\xff\xdc\0\4\0\x40\xff\xd9"
    for data in (without_height, imagecodecs.jpegls_encode(PICTURE)):
        with pytest.raises(ImageError, match="not supported: JPEG"):
            decoded(data)
