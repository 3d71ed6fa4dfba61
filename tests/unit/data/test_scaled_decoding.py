"""JPEGs decoded at a fraction of their size, compared with block means of the full-size image."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.hostile import encode, hostile_images, oriented_jpeg, picture

from attrib.data.decoding import ImageError, decode_image

HOSTILE = hostile_images()


def large_jpeg(width: int, height: int, **options) -> bytes:
    return encode(picture(width, height), "JPEG", **{"quality": 98, "subsampling": 0} | options)


def means_of_blocks(pixels: torch.Tensor, shrink: int) -> torch.Tensor:
    """uint8 [3, h, w] -> float32 [3, h // shrink, w // shrink]: whole blocks only."""
    return torch.nn.functional.avg_pool2d(pixels.float(), shrink)


@pytest.mark.parametrize(
    ("size", "min_side_px", "shrink"),
    [
        ((640, 480), 241, 1),
        ((640, 480), 240, 2),
        ((480, 640), 121, 2),
        ((640, 480), 120, 4),
        ((643, 485), 60, 8),
        ((643, 485), 7, 8),
    ],
)
def test_jpeg_is_decoded_at_the_smallest_sufficient_scale(size, min_side_px, shrink):
    data = large_jpeg(*size)
    image = decode_image(data, max_megapixels=1.0, min_side_px=min_side_px)
    assert (image.shrink, image.width, image.height) == (shrink, *size)
    assert image.pixels.shape == (3, -(-size[1] // shrink), -(-size[0] // shrink))
    expected = means_of_blocks(decode_image(data, max_megapixels=1.0).pixels, shrink)
    _, height, width = expected.shape
    assert (image.pixels[:, :height, :width] - expected).abs().max() <= 3


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 3}])
def test_all_jpeg_variants_are_scaled(options):
    data = large_jpeg(320, 240, **options)
    image = decode_image(data, max_megapixels=1.0, min_side_px=120)
    expected = means_of_blocks(decode_image(data, max_megapixels=1.0).pixels, 2)
    assert image.shrink == 2 and (image.pixels - expected).abs().mean() < 1


@pytest.mark.parametrize("name", ["greyscale.jpg", "cmyk.jpg", "two_pictures.mpo"])
def test_rare_jpegs_are_scaled_to_the_same_colours(name):
    whole = decode_image(HOSTILE[name][0], max_megapixels=1.0)
    image = decode_image(HOSTILE[name][0], max_megapixels=1.0, min_side_px=32)
    assert (image.shrink, image.width, image.height, image.format) == (2, whole.width, whole.height, whole.format)
    assert (image.pixels - means_of_blocks(whole.pixels, 2)).abs().mean() < 3


def test_other_formats_are_decoded_at_full_size():
    for format in ("PNG", "WEBP", "TIFF"):
        image = decode_image(encode(picture(), format), max_megapixels=1.0, min_side_px=1)
        assert image.shrink == 1 and image.pixels.shape == (3, 64, 96)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_jpeg_is_scaled_if_its_size_is_divisible(orientation):
    data = oriented_jpeg(orientation)  # upright 96 x 64
    whole = decode_image(data, max_megapixels=1.0)
    image = decode_image(data, max_megapixels=1.0, min_side_px=32)
    assert (image.shrink, image.width, image.height) == (2, whole.width, whole.height)
    assert (image.pixels - means_of_blocks(whole.pixels, 2)).abs().max() <= 12
    exif = Image.Exif()
    exif[0x0112] = orientation
    uneven = decode_image(large_jpeg(97, 64, exif=exif), max_megapixels=1.0, min_side_px=32)
    assert uneven.shrink == (2 if orientation == 1 else 1)


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "greyscale.jpg", "cmyk.jpg"])
def test_damaged_jpeg_fails_equally_with_scaling(name):
    rng = np.random.default_rng(11)
    for trial in range(150):
        damaged = bytearray(HOSTILE[name][0])
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        if trial % 5 == 0:
            del damaged[rng.integers(len(damaged)) :]
        outcomes = []
        for min_side_px in (float("inf"), 1):
            try:
                image = decode_image(bytes(damaged), max_megapixels=1.0, min_side_px=min_side_px)
                outcomes.append((image.width, image.height, image.format))
            except ImageError as error:
                outcomes.append(error.reason)
        assert outcomes[0] == outcomes[1]


def test_the_size_limit_is_that_of_the_original():
    with pytest.raises(ImageError, match=r"640x480 pixels exceed the limit of 0\.3 megapixels"):
        decode_image(large_jpeg(640, 480), max_megapixels=0.3, min_side_px=60)
