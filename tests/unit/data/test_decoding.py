"""Decoding, compared with Pillow and with computed values; errors of damaged files."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from support.hostile import (
    encode,
    hostile_images,
    oriented_jpeg,
    palette_with_transparency,
    picture,
    ramp_16_bit,
    rgba_picture,
)

from attrib.data import decoding
from attrib.data.decoding import ImageError, decode_image

HOSTILE = hostile_images()


def decoded(data: bytes) -> np.ndarray:
    """int16 [h, w, 3], so that differences do not wrap."""
    image = decode_image(data, max_megapixels=100.0)
    assert image.pixels.dtype == torch.uint8 and image.pixels.shape == (3, image.height, image.width)
    return image.pixels.permute(1, 2, 0).numpy().astype(np.int16)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(np.int16)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_image_decodes_or_fails_with_its_reason(name):
    data, expected = HOSTILE[name]
    if expected is None:
        assert decoded(data).size > 0
        return
    with pytest.raises(ImageError) as caught:
        decode_image(data, max_megapixels=100.0)
    assert caught.value.stage == "decode"
    assert expected in caught.value.reason
    assert len(caught.value.reason) <= 200 and "\n" not in caught.value.reason and "0x" not in caught.value.reason


def test_jpegs_equal_pillow_on_real_images(real_images):
    for data in real_images:
        np.testing.assert_array_equal(decoded(data), array(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_becomes_upright(orientation):
    difference = np.abs(decoded(oriented_jpeg(orientation)) - array(picture()))
    assert difference.max() <= 12 and difference.mean() < 1.0  # JPEG's own loss at quality 95


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_other_formats(format, orientation):
    stored = Image.open(io.BytesIO(oriented_jpeg(orientation)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored.convert("RGB"), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(data), decoded(oriented_jpeg(orientation)))


def test_xmp_orientation_applies():
    data = encode(picture(), "JPEG", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    assert decode_image(data, max_megapixels=1.0).pixels.shape == (3, 96, 64)


def test_upright_size_is_reported():
    tall = decode_image(oriented_jpeg(6), max_megapixels=1.0)
    assert (tall.width, tall.height, tall.format) == (96, 64, "JPEG")


def test_cmyk_is_not_inverted():
    original = picture()
    difference = np.abs(decoded(HOSTILE["cmyk.jpg"][0]) - array(original.convert("CMYK")))
    assert difference.max() <= 40 and difference.mean() < 2.0


@pytest.mark.parametrize("name", ["sixteen_bit.png", "sixteen_bit.tif", "float.tif"])
def test_deep_greyscale_is_scaled_not_clipped(name):
    expected = ramp_16_bit() / 257
    for channel in range(3):
        assert np.abs(decoded(HOSTILE[name][0])[..., channel] - expected).max() <= 1.0


def test_alpha_is_composited_on_white():
    rgba = np.asarray(rgba_picture()).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decoded(HOSTILE["rgba.png"][0]) - expected).max() <= 1.0
    grey = np.asarray(picture().convert("L")).astype(float)[..., None]
    assert np.abs(decoded(HOSTILE["grey_alpha.png"][0]) - (grey * alpha + 255 * (1 - alpha))).max() <= 1.0


def test_transparent_palette_entry_becomes_white():
    pixels = decoded(HOSTILE["palette_transparent.png"][0])
    assert (pixels[:, :24] == 255).all()
    assert (pixels[:, 24:] == [0, 0, 255]).all()
    opaque = decoded(encode(palette_with_transparency(), "PNG"))
    assert (opaque[:, :24] == [255, 0, 0]).all()


@pytest.mark.parametrize(
    "name", ["animated.png", "animated.webp", "plain.bmp", "plain.tif", "png_inside.jpg", "colour_key.png"]
)
def test_lossless_formats_give_the_first_frame_exactly(name):
    np.testing.assert_array_equal(decoded(HOSTILE[name][0]), array(picture()))


def test_animated_gif_gives_its_first_frame():
    assert np.abs(decoded(HOSTILE["animated.gif"][0]) - array(picture())).mean() < 4.0  # 256 colours


@pytest.mark.parametrize(
    "name", ["one_bit.png", "palette.png", "greyscale.jpg", "progressive.jpg", "two_pictures.mpo", "plain.webp"]
)
def test_common_modes_equal_pillow(name):
    data = HOSTILE[name][0]
    np.testing.assert_array_equal(decoded(data), array(Image.open(io.BytesIO(data))))


def test_the_size_limit_names_the_numbers():
    data = HOSTILE["plain.bmp"][0]  # 96 x 64 = 6,144 pixels
    assert decode_image(data, max_megapixels=0.006144).width == 96
    with pytest.raises(ImageError, match=r"96x64 pixels exceed the limit of 0\.006143 megapixels"):
        decode_image(data, max_megapixels=0.006143)


def test_size_limit_above_that_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode_image(HOSTILE["plain.bmp"][0], max_megapixels=1.0).width == 96


def test_truncated_image_fails_even_if_pillow_is_set_to_allow_it(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(HOSTILE["truncated.png"][0], max_megapixels=1.0)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), RuntimeError("first <X object at 0x7f12>\nsecond" * 99)]
)
def test_decoder_errors_become_image_errors(error, monkeypatch):
    def fail(image, data):
        raise error

    monkeypatch.setattr(decoding, "load_rgb", fail)
    with pytest.raises(ImageError) as caught:
        decode_image(HOSTILE["plain.bmp"][0], max_megapixels=1.0)
    assert len(caught.value.reason) <= 200 and "\n" not in caught.value.reason and "0x7f12" not in caught.value.reason


def test_image_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(ImageError("read", "the file is gone")))
    assert (error.stage, error.reason, str(error)) == ("read", "the file is gone", "read: the file is gone")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", ["plain.jpg", "progressive.jpg", "rgba.png", "animated.gif", "plain.webp", "plain.tif", "plain.bmp"]
)
def test_damaged_bytes_raise_image_errors_only(name):
    data = HOSTILE[name][0]
    rng = np.random.default_rng(sum(name.encode()))
    num_refused = 0
    for trial in range(300):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        if trial % 3 == 0:
            del damaged[rng.integers(len(damaged)) :]
        try:
            decode_image(bytes(damaged), max_megapixels=1.0)
        except ImageError:
            num_refused += 1
    assert num_refused >= 90  # nearly all of the 100 that are cut short, at the least


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncation_never_gives_a_partial_image(format):
    data = encode(Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)), format)
    whole = decoded(data)
    for num_bytes in np.linspace(1, len(data) - 1, 60).astype(int):
        try:
            partial = decoded(data[:num_bytes])
        except ImageError:
            continue
        np.testing.assert_array_equal(partial, whole)  # only what follows the pixels was cut
