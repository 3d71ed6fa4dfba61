"""Decoding and preprocessing, compared with Pillow, with arithmetic and with timm's own transform."""

import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hostile import encode, hostile_images, oriented_jpeg, palette_with_transparency, picture, ramp_16_bit, rgba_picture
from PIL import Image, ImageFile
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from attrib import images
from attrib.images import ImageError, Preprocessing, decode_image, decoder_name

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


def decoded(data: bytes) -> np.ndarray:
    """int16 [h, w, 3], so that differences do not wrap."""
    image = decode_image(data, max_megapixels=100.0)
    assert image.pixels.dtype == torch.uint8 and image.pixels.shape == (3, image.height, image.width)
    return image.pixels.permute(1, 2, 0).numpy().astype(np.int16)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(np.int16)


@pytest.fixture(params=["torchcodec", "pillow"])
def decoder(request, monkeypatch):
    """Runs a test once with each decoder of plain JPEGs."""
    if request.param == "pillow":
        monkeypatch.setattr(images, "decode_jpeg", None)
    elif images.decode_jpeg is None:
        pytest.skip("torchcodec does not load on this system")
    assert decoder_name() == request.param
    return request.param


@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_image_decodes_or_is_refused_with_its_reason(name, decoder):
    data, expected = HOSTILE[name]
    if expected is None:
        assert decoded(data).size > 0
        return
    with pytest.raises(ImageError) as caught:
        decode_image(data, max_megapixels=100.0)
    assert caught.value.stage == "decode"
    assert expected in caught.value.reason
    assert len(caught.value.reason) <= 200 and "\n" not in caught.value.reason and "0x" not in caught.value.reason


def test_torchcodec_equals_pillow_on_real_images(real_images, monkeypatch):
    if images.decode_jpeg is None:
        pytest.skip("torchcodec does not load on this system")
    for data in real_images:
        plain = images._decode_plain_jpeg(data, *Image.open(io.BytesIO(data)).size)
        assert plain is not None
        np.testing.assert_array_equal(plain.permute(1, 2, 0).numpy(), array(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation, decoder):
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


def test_an_orientation_in_xmp_counts_with_either_decoder(decoder):
    data = encode(picture(), "JPEG", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    assert decode_image(data, max_megapixels=1.0).pixels.shape == (3, 96, 64)


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "greyscale.jpg"])
def test_both_decoders_agree_on_damaged_jpegs(name, monkeypatch):
    if images.decode_jpeg is None:
        pytest.skip("torchcodec does not load on this system")
    rng = np.random.default_rng(7)
    fast = images.decode_jpeg
    for _ in range(100):
        damaged = bytearray(HOSTILE[name][0])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        outcomes = []
        for decode_jpeg in (fast, None):
            monkeypatch.setattr(images, "decode_jpeg", decode_jpeg)
            try:
                outcomes.append(decoded(bytes(damaged)).tobytes())
            except ImageError as error:
                outcomes.append(error.reason)
        assert outcomes[0] == outcomes[1]


def test_upright_size_is_reported():
    tall = decode_image(oriented_jpeg(6), max_megapixels=1.0)
    assert (tall.width, tall.height, tall.format) == (96, 64, "JPEG")


def test_cmyk_is_not_inverted(decoder):
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
def test_common_modes_equal_pillow(name, decoder):
    data = HOSTILE[name][0]
    np.testing.assert_array_equal(decoded(data), array(Image.open(io.BytesIO(data))))


def test_the_size_limit_names_the_numbers():
    data = HOSTILE["plain.bmp"][0]  # 96 x 64 = 6,144 pixels
    assert decode_image(data, max_megapixels=0.006144).width == 96
    with pytest.raises(ImageError, match=r"96x64 pixels exceed the limit of 0\.006143 megapixels"):
        decode_image(data, max_megapixels=0.006143)


def test_a_limit_above_pillows_own_is_honoured(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode_image(HOSTILE["plain.bmp"][0], max_megapixels=1.0).width == 96


def test_truncation_is_refused_even_where_another_library_allowed_it(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(HOSTILE["truncated.png"][0], max_megapixels=1.0)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), RuntimeError("first <X object at 0x7f12>\nsecond" * 99)]
)
def test_any_failure_of_a_decoder_becomes_an_image_error(error, monkeypatch):
    def fail(image):
        raise error

    monkeypatch.setattr(images, "_decode_with_pillow", fail)
    with pytest.raises(ImageError) as caught:
        decode_image(HOSTILE["plain.bmp"][0], max_megapixels=1.0)
    assert len(caught.value.reason) <= 200 and "\n" not in caught.value.reason and "0x7f12" not in caught.value.reason


def test_image_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("read", "the file is gone")))
    assert (error.stage, error.reason, str(error)) == ("read", "the file is gone", "read: the file is gone")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", ["plain.jpg", "progressive.jpg", "rgba.png", "animated.gif", "plain.webp", "plain.tif", "plain.bmp"]
)
def test_damaged_bytes_never_raise_anything_else(name, decoder):
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
def test_no_cut_gives_a_partial_picture(format, decoder):
    data = encode(Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)), format)
    whole = decoded(data)
    for num_bytes in np.linspace(1, len(data) - 1, 60).astype(int):
        try:
            partial = decoded(data[:num_bytes])
        except ImageError:
            continue
        np.testing.assert_array_equal(partial, whole)  # only what follows the pixels was cut


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


def test_a_tall_panorama_that_pillow_filters_in_the_other_order_stays_close_to_timm():
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
def test_panoramas_are_cropped_without_resizing_all_of_them(name):
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
def test_squash_shows_the_whole_picture(size):
    width, height = size
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    across, down = width // 20, height // 20  # margins that a centre crop of most of these would lose
    pixels[0, :, :across], pixels[1, :, -across:], pixels[2, :down] = 255, 255, 255
    found = Preprocessing.from_timm(TIMM_CONFIG | {"crop_mode": "squash", "crop_pct": 1.0}).resize_and_crop(pixels)
    for part, channel in ((found[:, :, :8], 0), (found[:, :, -8:], 1), (found[:, :8], 2)):
        assert part[channel].float().mean() > 240
    assert (found[:, 100:, 100:124] == 0).all()


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
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_keeps_enough(size, min_side_px, shrink, decoder):
    data = large_jpeg(*size)
    image = decode_image(data, max_megapixels=1.0, min_side_px=min_side_px)
    assert (image.shrink, image.width, image.height) == (shrink, *size)
    assert image.pixels.shape == (3, -(-size[1] // shrink), -(-size[0] // shrink))
    expected = means_of_blocks(decode_image(data, max_megapixels=1.0).pixels, shrink)
    _, height, width = expected.shape
    assert (image.pixels[:, :height, :width] - expected).abs().max() <= 3


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 3}])
def test_every_kind_of_jpeg_is_scaled(options):
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
def test_a_turned_jpeg_is_scaled_where_nothing_is_left_over(orientation):
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
def test_scaling_changes_no_verdict_on_a_damaged_jpeg(name):
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


def waves(width: int, height: int, period_px: tuple[float, float]) -> bytes:
    """Sines across and down, so that a shift shows everywhere in the picture."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    wave = np.sin(2 * np.pi * x / period_px[0]) + np.sin(2 * np.pi * y / period_px[1] + 1)
    return encode(Image.fromarray(np.rint(128 + 60 * wave).astype(np.uint8)), "JPEG", quality=100)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (641, 483), (487, 645), (1290, 965), (4111, 321)])
def test_a_scaled_picture_lies_on_the_same_grid(size, crop_mode, interpolation):
    """Taken as whole, the last row and column, which the picture fills in part, would move the waves by ten grey levels and more."""
    config = TIMM_CONFIG | {"input_size": (3, 96, 96), "crop_mode": crop_mode, "interpolation": interpolation}
    preprocessing = dataclasses.replace(Preprocessing.from_timm(config), jpeg_margin=1.0)
    data = waves(*size, [20 * (side if crop_mode == "squash" else min(size)) / 96 for side in size])
    image = preprocessing.decode(data, max_megapixels=2.0)
    assert image.shrink == {480: 4, 483: 4, 487: 4, 965: 8, 321: 2}[min(size)]
    found = preprocessing.resize_and_crop(image).to(torch.int16)
    expected = preprocessing.resize_and_crop(decode_image(data, max_megapixels=2.0)).to(torch.int16)
    assert found.shape == (3, 96, 96)
    assert (found - expected).abs().max() <= 4


def test_without_a_margin_jpegs_are_decoded_as_they_are():
    preprocessing = Preprocessing.from_timm(TIMM_CONFIG)
    assert preprocessing.jpeg_margin is None
    assert preprocessing.decode(large_jpeg(2000, 1500), max_megapixels=3.0).shrink == 1
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
        ({"crop_mode": "border"}, "crop_mode 'border'"),
        ({"input_size": (3, 224, 192)}, "input_size"),
        ({"input_size": (1, 224, 224)}, "input_size"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos'"),
        ({"crop_pct": 1.5}, "crop_px 224"),
        ({"std": (0.2, 0.2, 0.0)}, "std"),
    ],
)
def test_what_preprocessing_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_timm(TIMM_CONFIG | change)
