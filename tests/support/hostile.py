"""Hostile images, built in memory: odd and broken files that every stage must handle."""

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth RGB image without symmetry: horizontal, vertical and diagonal ramps, and a white top left corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (x + y) / 2], axis=2) * 200
    pixels[: height // 4, : width // 4] = 255
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """An RGB PNG whose header says width x height pixels, with almost no pixel data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(64))) + png_chunk(b"IEND", b"")


def rgba_picture() -> Image.Image:
    """picture() with alpha 0, 128 and 255 in three vertical bands."""
    image = picture().convert("RGBA")
    alpha = np.repeat(np.array([0, 128, 255], dtype=np.uint8), image.width // 3)
    image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    return image


def ramp_16_bit() -> np.ndarray:
    """uint16 [64, 1024]: the full 16-bit range from left to right."""
    return np.tile(np.linspace(0, 65535, 1024).astype(np.uint16), (64, 1))


def palette_with_transparency() -> Image.Image:
    """48x32 px; left half index 0 (red, transparent), right half index 1 (blue)."""
    image = Image.new("P", (48, 32), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 24, 32))
    return image


def oriented_jpeg(orientation: int) -> bytes:
    """picture() stored with an EXIF orientation; it is upright after the orientation is applied."""
    stored_by = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = picture() if orientation == 1 else picture().transpose(stored_by[orientation])
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return encode(image, "JPEG", exif=exif, quality=95, subsampling=0)


def hostile_images() -> dict[str, tuple[bytes, str | None]]:
    """{file name: (bytes, expected)}. expected: None if it must decode, else a part of the reason of its ImageError.

    Assumes that the limit on the size is between 1 and 1,000 megapixels.
    """
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    plain = picture()
    frames = [plain, plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    noise_jpeg = encode(noise, "JPEG")
    half = len(noise_jpeg) // 2
    noise_png = encode(noise, "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("inside.jpg", encode(plain, "JPEG"))
    grey_and_alpha = Image.merge("LA", (plain.convert("L"), rgba_picture().getchannel("A")))
    ramp = ramp_16_bit()

    images: dict[str, tuple[bytes, str | None]] = {
        "plain.jpg": (encode(plain, "JPEG"), None),
        "progressive.jpg": (encode(noise, "JPEG", progressive=True), None),
        "greyscale.jpg": (encode(plain.convert("L"), "JPEG"), None),
        "cmyk.jpg": (encode(plain.convert("CMYK"), "JPEG", quality=95), None),
        "two_pictures.mpo": (encode(plain, "MPO", save_all=True, append_images=frames[1:]), None),
        "trailing_bytes.jpg": (encode(plain, "JPEG") + b"appended by a phone", None),
        "damaged_exif.jpg": (encode(plain, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), None),
        "png_inside.jpg": (encode(plain, "PNG"), None),
        "no_extension": (encode(plain, "JPEG"), None),
        "rgba.png": (encode(rgba_picture(), "PNG"), None),
        "grey_alpha.png": (encode(grey_and_alpha, "PNG"), None),
        "one_bit.png": (encode(plain.convert("1"), "PNG"), None),
        "palette.png": (encode(plain.convert("P"), "PNG"), None),
        "palette_transparent.png": (encode(palette_with_transparency(), "PNG", transparency=0), None),
        "colour_key.png": (encode(plain, "PNG", transparency=(255, 255, 255)), None),
        "sixteen_bit.png": (encode(Image.fromarray(ramp), "PNG"), None),
        "animated.png": (encode(plain, "PNG", save_all=True, append_images=frames[1:]), None),
        "animated.gif": (encode(plain, "GIF", save_all=True, append_images=frames[1:]), None),
        "animated.webp": (encode(plain, "WEBP", lossless=True, save_all=True, append_images=frames[1:]), None),
        "plain.webp": (encode(plain, "WEBP"), None),
        "plain.bmp": (encode(plain, "BMP"), None),
        "plain.tif": (encode(plain, "TIFF"), None),
        "sixteen_bit.tif": (encode(Image.fromarray(ramp), "TIFF"), None),
        "float.tif": (encode(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"), None),
        "one_pixel.png": (encode(plain.crop((0, 0, 1, 1)), "PNG"), None),
        "one_pixel.jpg": (encode(plain.crop((0, 0, 1, 1)), "JPEG"), None),
        "panorama_wide.png": (encode(plain.resize((5000, 1)), "PNG"), None),
        "panorama_tall.jpg": (encode(plain.resize((1, 5000)), "JPEG"), None),
        "empty.jpg": (b"", "empty file"),
        "truncated.jpg": (noise_jpeg[:half], "truncated"),
        "truncated_header.jpg": (noise_jpeg[:100], "truncated"),
        "truncated_last_byte.jpg": (noise_jpeg[:-1], "truncated"),
        "truncated_progressive.jpg": (encode(noise, "JPEG", progressive=True)[:half], "truncated"),
        "zero_filled_tail.jpg": (noise_jpeg[:half] + bytes(half), "truncated"),
        "truncated.png": (noise_png[: len(noise_png) // 2], "truncated"),
        "truncated_header.png": (noise_png[:20], "truncated"),
        "truncated.gif": (encode(noise, "GIF")[:5000], "truncated"),
        "truncated.webp": (encode(noise, "WEBP")[:2000], "damaged WEBP"),
        "truncated.bmp": (encode(noise, "BMP")[:2000], "truncated"),
        "truncated.tif": (encode(noise, "TIFF")[:2000], "damaged TIFF"),
        "bomb.png": (png_header(60_000, 60_000), "pixels exceed the limit of"),
        "no_pixels.png": (png_header(0, 5), "damaged PNG"),
        "unknown_range.tif": (
            encode(Image.fromarray(np.full((8, 8), -3.5, dtype=np.float32)), "TIFF"),
            "samples from -3.5",
        ),
        "text.jpg": (b"This is not the picture you are looking for.\n" * 20, "not an image"),
        "page.jpg": (b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>", "not an image"),
        "drawing.svg": (
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            "not an image",
        ),
        "archive.zip": (archive.getvalue(), "not an image"),
        "random.jpg": (np.random.default_rng(1).bytes(4096), "not an image"),
    }
    images |= {f"orientation_{n}.jpg": (oriented_jpeg(n), None) for n in range(1, 9)}
    return images
