"""Decode an image that Pillow has opened to 8-bit RGB: transparency, deep samples, and what Pillow reads wrong."""

import io
import sys

import numpy as np
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin

from attrib.common.errors import ImageError
from attrib.data import tiff
from attrib.data.iso_boxes import check_avif, check_jpeg2000

FULL_SCALES = (1.0, 255.0, 65535.0)
DEEP = (";16B", ";16L", ";16N")  # ends of Pillow's raw modes of 16-bit samples
PNG_BIT_DEPTH_AT = 24  # bytes from the start of the file
WEBP_FLAGS_AT, WEBP_ANIMATION = 20, 2
BMP_MASKS = 3
BMP_RAW_MODES = {1: "P;1", 4: "P;4", 8: "P"}
BAND_ROWS = 256


def load_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Return `image`, opened from `data` but not loaded, in mode RGB with its transparent parts on white.

    Raises ImageError for what is not supported, and whatever Pillow raises for damaged data.
    """
    if image.format == "GIF":
        return _load_gif(image)
    if image.format == "BMP":
        _prepare_bmp(image, data)
    if image.format == "JPEG2000":
        check_jpeg2000(data)
    if image.format == "AVIF":
        check_avif(data)
    if image.format == "WEBP" and data[12:16] == b"VP8X" and data[WEBP_FLAGS_AT] & WEBP_ANIMATION:
        # What the first frame does not cover is transparent, also where all frames are opaque.
        image._mode = image.rawmode = "RGBA"  # type: ignore[attr-defined]
    if image.format == "PNG":
        _mask_key(image, data[PNG_BIT_DEPTH_AT])
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tiff.check_layout(image)
        tiff.check_strips(image, data)
    raw_mode = tiff.raw_mode(image)
    if raw_mode.endswith(DEEP) and (
        image.mode in ("RGBA", "CMYK") or (image.mode == "RGB" and "transparency" in image.info)
    ):
        return _load_deep(image, raw_mode, data)
    if raw_mode.startswith("RGBa"):  # Pillow would divide by alpha, only to multiply again
        tiff.set_raw_mode(image, raw_mode.replace("a", "A"))
        image.load()
        samples = np.asarray(image)
        return Image.fromarray(samples[..., :3] + np.minimum(255 - samples[..., 3:], 255 - samples[..., :3]))
    is_keyed = "transparency" in image.info
    image.load()
    if image.format == "PNG" and not is_keyed:  # what follows the pixels does not hold for them
        image.info.pop("transparency", None)
    if image.format == "PNG" and image.mode in ("L", "I;16") and "transparency" in image.info:
        return _key_to_white(image, data[PNG_BIT_DEPTH_AT])
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        return image.convert("RGB")  # a reserved byte and no alpha: many programs leave it at zero
    if image.mode.startswith("I;16"):
        samples = np.asarray(image)
        # Pillow would clip at 255; for 16-bit RGB it keeps the high byte, too.
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            samples = tiff.correct_grey(samples, image.tag_v2)
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scale_to_8_bit(np.asarray(image))).convert("RGB")
    return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies


def _load_gif(image: ImageFile.ImageFile) -> Image.Image:
    """What the first frame does not cover is transparent, whatever the background colour is, as in all browsers."""
    extents = image.tile[0].extents
    image.load()
    rgb = _on_white(image)
    if extents == (0, 0, *image.size):
        return rgb
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgb.crop(extents), extents)
    return canvas


def _prepare_bmp(image: ImageFile.ImageFile, data: bytes) -> None:
    """Decode by its palette an image that Pillow takes for 1 or 8 bits per pixel because its colours are greys."""
    header_size = data[14]
    bits = data[24 if header_size == 12 else 28]
    if bits == 16 and header_size >= 56 and image.info["compression"] == BMP_MASKS and any(data[66:70]):
        raise ImageError("decode", "not supported: BMP with 16-bit pixels and alpha")
    if image.mode not in ("1", "L") or bits == {"1": 1, "L": 8}[image.mode]:
        return
    greys = (0, 255) if image.mode == "1" else range(1 << bits)
    image._mode = "P"
    image.palette = ImagePalette.raw("RGB", bytes(grey for grey in greys for _ in range(3)))
    if image.tile[0].codec_name == "raw":
        tiff.set_raw_mode(image, BMP_RAW_MODES[bits])


def _mask_key(image: Image.Image, bits: int) -> None:
    """Clear the bits above the depth in the transparent grey of a PNG, as the standard asks of decoders."""
    if isinstance(key := image.info.get("transparency"), int) and image.mode == "L":
        image.info["transparency"] = key & ((1 << bits) - 1)


def _key_to_white(image: Image.Image, bits: int) -> Image.Image:
    """Return a grey PNG with its transparent grey on white. Pillow widens samples of 2 and 4 bits, but not this one."""
    samples = np.asarray(image)
    grey = (samples >> 8 if bits == 16 else samples).astype(np.uint8)
    grey = np.where(samples == image.info["transparency"] * {2: 85, 4: 17}.get(bits, 1), np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _load_deep(image: ImageFile.ImageFile, raw_mode: str, data: bytes) -> Image.Image:
    """Return 16-bit samples with transparency, or CMYK, without rounding in between.

    Pillow keeps the high bytes alone. Decoded in the other byte order, these are the low bytes.
    """
    is_associated, key = "a" in raw_mode, image.info.get("transparency")
    again = Image.open(io.BytesIO(data), formats=(str(image.format),))
    if isinstance(again, TiffImagePlugin.TiffImageFile):
        tiff.select_page(again)
    file_order = "B" if image.format == "PNG" or sys.byteorder == "big" else "L"
    halves = []
    for order, source in ((file_order, image), ({"B": "L", "L": "B"}[file_order], again)):
        # Grey and alpha have no raw mode of the other order, but are four bytes, as 8-bit RGBA.
        tiff.set_raw_mode(source, "RGBA" if raw_mode.startswith("LA") else raw_mode.upper()[:-1] + order)
        source.load()
        halves.append(np.asarray(source))
    height, width = halves[0].shape[:2]
    rgb = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, BAND_ROWS):  # in bands: floats of a whole image would take four times its memory
        band = slice(start, start + BAND_ROWS)
        high, low = (half[band] for half in halves)
        if raw_mode.startswith("LA"):
            high, low = high[..., [0, 0, 0, 2]], high[..., [1, 1, 1, 3]]
        samples = high * np.uint16(256) + low
        share = samples / np.float32(65535)
        colour, last = share[..., :3], share[..., 3:]
        if image.mode == "CMYK":
            colour = (1 - colour) * (1 - last)
        elif key is not None:
            colour = np.where((samples == key).all(axis=2, keepdims=True), 1, colour)
        else:
            colour = (colour if is_associated else colour * last) + 1 - last
        rgb[band] = np.rint(colour.clip(0, 1) * 255)
    return Image.fromarray(rgb)


def _scale_to_8_bit(samples: np.ndarray) -> np.ndarray:
    """Scale int32 or float32 [h, w] to uint8. The files do not define white: the smallest usual value is used."""
    low, high = float(samples.min()), float(samples.max())
    for full_scale in FULL_SCALES:
        if 0 <= low and high <= full_scale:
            return np.rint(samples * (255.0 / full_scale)).astype(np.uint8)
    found = f"samples from {low:.4g} to {high:.4g}, outside the usual ranges (0 to 1, 255 or 65535)"
    raise ImageError("decode", f"not supported: {found}")
