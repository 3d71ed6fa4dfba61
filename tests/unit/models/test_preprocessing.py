"""Preprocessing, compared with timm's transform, also for panoramas and for scaled JPEGs."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.hostile import encode, hostile_images, picture
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from attrib.data.decoding import decode_image
from attrib.models.preprocessing import Preprocessing

HOSTILE = hostile_images()
TIMM_CONFIG = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}

SIZES = [
    (640, 480),
    (480, 641),
    (341, 512),
    (224, 224),
    (97, 333),
    (1000, 101),
    (1, 1),
    (2, 7),
    (1, 400),
    (1600, 100),
    (100, 1600),
]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_equals_timm(size, crop_pct, interpolation):
    config = TIMM_CONFIG | {"crop_pct": crop_pct, "interpolation": interpolation}
    width, height = size
    smooth = picture(max(width, 8), max(height, 8)).resize(size)
    noise = np.random.default_rng(width * height).integers(-30, 31, (height, width, 3))
    image = Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))
    transform = create_transform(**config, is_training=False, normalize=False)
    expected = transform(image).to(torch.int16)
    found = Preprocessing.from_timm(config).resize_and_crop(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert found.dtype == torch.uint8 and found.shape == (3, 224, 224)
    difference = (found.to(torch.int16) - expected).abs()
    assert difference.max() <= 2 and difference.float().mean() <= 0.02


def test_tall_panorama_stays_close_to_timm():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4000, 300, 3), dtype=np.uint8))
    expected = create_transform(**TIMM_CONFIG, is_training=False, normalize=False)(image).to(torch.int16)
    found = Preprocessing.from_timm(TIMM_CONFIG).resize_and_crop(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    difference = (found.to(torch.int16) - expected).abs()
    assert difference.max() <= 20 and difference.float().mean() <= 0.4


def test_preprocessing_equals_timm_on_real_images(real_images):
    transform = create_transform(**TIMM_CONFIG, is_training=False, normalize=False)
    preprocessing = Preprocessing.from_timm(TIMM_CONFIG)
    for data in real_images:
        expected = transform(Image.open(io.BytesIO(data)).convert("RGB")).to(torch.int16)
        difference = (
            preprocessing.resize_and_crop(decode_image(data, max_megapixels=100.0).pixels).to(torch.int16) - expected
        ).abs()
        assert difference.max() <= 2 and difference.float().mean() <= 0.02


@pytest.mark.parametrize("name", ["panorama_wide.png", "panorama_tall.jpg"])
def test_panorama_is_resized_under_the_crop_only(name):
    pixels = decode_image(HOSTILE[name][0], max_megapixels=1.0).pixels
    found = Preprocessing.from_timm(TIMM_CONFIG).resize_and_crop(pixels)
    middle = (
        pixels.flatten(1)[:, 2500 - 1 : 2500 + 1].float().mean(1)
    )  # the crop shows less than one of the 5,000 pixels
    assert (found.float().mean((1, 2)) - middle).abs().max() <= 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [*SIZES, (5000, 1), (1, 5000)])
def test_squash_resizes_both_sides(size, interpolation):
    config = TIMM_CONFIG | {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": interpolation}
    image = picture(max(size[0], 8), max(size[1], 8)).resize(size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = Preprocessing.from_timm(config).resize_and_crop(pixels)
    assert torch.equal(found, functional.resize(pixels, [224, 224], InterpolationMode(interpolation), antialias=True))
    expected = create_transform(**config, is_training=False, normalize=False)(image).to(torch.int16)
    difference = (found.to(torch.int16) - expected).abs()
    assert difference.max() <= 20 and difference.float().mean() <= 0.4  # Pillow filters tall images in the other order
    part = Preprocessing.from_timm(config | {"crop_pct": 0.875}).resize_and_crop(pixels)
    whole = functional.resize(pixels, [256, 256], InterpolationMode(interpolation), antialias=True)
    assert torch.equal(part, whole[:, 16:240, 16:240])


@pytest.mark.parametrize("size", [(640, 480), (97, 333), (1600, 100), (100, 1600)])
def test_squash_keeps_the_whole_image(size):
    width, height = size
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    across, down = width // 20, height // 20  # margins that a centre crop of most of these would lose
    pixels[0, :, :across], pixels[1, :, -across:], pixels[2, :down] = 255, 255, 255
    found = Preprocessing.from_timm(TIMM_CONFIG | {"crop_mode": "squash", "crop_pct": 1.0}).resize_and_crop(pixels)
    for part, channel in ((found[:, :, :8], 0), (found[:, :, -8:], 1), (found[:, :8], 2)):
        assert part[channel].float().mean() > 240
    assert (found[:, 100:, 100:124] == 0).all()


def waves(width: int, height: int, period_px: tuple[float, float]) -> bytes:
    """Sines in both directions, so that a shift changes every pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    wave = np.sin(2 * np.pi * x / period_px[0]) + np.sin(2 * np.pi * y / period_px[1] + 1)
    return encode(Image.fromarray(np.rint(128 + 60 * wave).astype(np.uint8)), "JPEG", quality=100)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (641, 483), (487, 645), (1290, 965), (4111, 321)])
def test_scaled_image_uses_the_same_sampling_grid(size, crop_mode, interpolation):
    """If the partly covered last row and column counted in full, pixels would change by ten grey levels and more."""
    config = TIMM_CONFIG | {"input_size": (3, 96, 96), "crop_mode": crop_mode, "interpolation": interpolation}
    preprocessing = dataclasses.replace(Preprocessing.from_timm(config), jpeg_margin=1.0)
    data = waves(*size, [20 * (side if crop_mode == "squash" else min(size)) / 96 for side in size])
    image = preprocessing.decode(data, max_megapixels=2.0)
    assert image.shrink == {480: 4, 483: 4, 487: 4, 965: 8, 321: 2}[min(size)]
    found = preprocessing.resize_and_crop(image).to(torch.int16)
    expected = preprocessing.resize_and_crop(decode_image(data, max_megapixels=2.0)).to(torch.int16)
    assert found.shape == (3, 96, 96)
    assert (found - expected).abs().max() <= 4


def test_jpegs_are_not_scaled_without_a_margin():
    preprocessing = Preprocessing.from_timm(TIMM_CONFIG)
    assert preprocessing.jpeg_margin is None
    assert preprocessing.decode(encode(picture(2000, 1500), "JPEG"), max_megapixels=3.0).shrink == 1
    assert dataclasses.replace(preprocessing, jpeg_margin=2.0).to_dict() != preprocessing.to_dict()
    with pytest.raises(ValueError, match=r"jpeg_margin 0\.9 must be 1 or more"):
        dataclasses.replace(preprocessing, jpeg_margin=0.9)


def test_normalise_equals_timm():
    preprocessing = Preprocessing.from_timm(TIMM_CONFIG)
    image = picture(224, 224)
    expected = create_transform(**TIMM_CONFIG | {"crop_pct": 1.0}, is_training=False)(image)
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    found = preprocessing.normalise(batch, "cpu", torch.float32)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)
    assert batch.dtype == torch.uint8 and preprocessing.normalise(batch, "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_preprocessing_survives_json():
    preprocessing = Preprocessing.from_timm(TIMM_CONFIG)
    assert preprocessing.resize_px == 256
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    with pytest.raises(TypeError):
        Preprocessing.from_dict(preprocessing.to_dict() | {"crop": "center"})
    squash = Preprocessing.from_timm(TIMM_CONFIG | {"crop_mode": "squash"})
    assert Preprocessing.from_dict(json.loads(json.dumps(squash.to_dict()))) == squash != preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode is 'border'"),
        ({"input_size": (3, 224, 192)}, "input_size"),
        ({"input_size": (1, 224, 224)}, "input_size"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos'"),
        ({"crop_pct": 1.5}, "crop_px 224"),
        ({"std": (0.2, 0.2, 0.0)}, "std"),
    ],
)
def test_errors_name_invalid_values(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_timm(TIMM_CONFIG | change)
