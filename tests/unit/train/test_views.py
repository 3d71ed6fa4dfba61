"""Views: settings, seeds, augmentations, and the content that they keep."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from support.images import picture
from torchvision.transforms.v2 import functional

from attrib.common.errors import AttribError
from attrib.data.decoding import decode_image
from attrib.train.augment.settings import DONOR_KINDS, KINDS, KindMix, ViewSettings
from attrib.train.augment.views import draw_kind, render_view, view_generator, view_seed, view_sheet

VIEW_PX = 64
WHOLE = {
    "crop_area_share": (1, 1),
    "crop_aspect": (1, 1),
    "flip_probability": 0,
    "donor_crop_area_share": (1, 1),
    "donor_flip_probability": 0,
}
CLEAN = {"blur_probability": 0, "resize_probability": 0, "noise_probability": 0, "jpeg_probability": 0}
PLAIN = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue_probability": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(seed: int, width: int = 90, height: int = 70) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(seed, width, height))).permute(2, 0, 1).contiguous()


def view(kind="solo", index=0, content=None, donor=None, view_px=VIEW_PX, **changes) -> torch.Tensor:
    content = pixels(1) if content is None else content
    donor = pixels(2) if donor is None else donor
    return render_view(content, donor, kind, ViewSettings(**changes), view_px, view_generator(0, 5, index))


def test_view_without_augmentations_is_the_resized_content():
    content = pixels(3, 80, 80)
    expected = functional.resize(content, [VIEW_PX, VIEW_PX], functional.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(view(content=content, **WHOLE, **CLEAN, **PLAIN), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(3))
def test_a_view_depends_on_its_seed_only(kind, index):
    torch.manual_seed(1)
    first, state = view(kind, index), torch.get_rng_state()
    torch.manual_seed(2)
    again = view(kind, index)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not used
    assert first.shape == (3, VIEW_PX, VIEW_PX) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, view(kind, index + 10))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_view_and_keeps_its_inputs(kind):
    content, donor = pixels(1), pixels(2)
    before = content.clone(), donor.clone()
    changed = view(kind, content=content, donor=donor, **WHOLE, **CLEAN)
    unchanged = view(content=content, **WHOLE, **CLEAN, **PLAIN)
    assert (changed.float() - unchanged.float()).abs().mean() > 4
    assert torch.equal(content, before[0]) and torch.equal(donor, before[1])


@pytest.mark.parametrize("kind", sorted(DONOR_KINDS))
def test_kinds_with_a_donor_take_its_colours(kind):
    red, blue = (
        pixels(2) // 4 + torch.tensor(add, dtype=torch.uint8).view(3, 1, 1) for add in ([150, 0, 0], [0, 0, 150])
    )
    changes = WHOLE | CLEAN | {"keep_colour_probability": 0}
    means = [view(kind, donor=donor, **changes).float().mean((1, 2)) for donor in (red, blue)]
    assert means[0][0] > means[0][2] + 40 and means[1][2] > means[1][0] + 40


def test_texture_can_keep_the_colours_of_the_content():
    wanted = view(**WHOLE, **CLEAN, **PLAIN).float().flatten(1)
    kept = view("texture", keep_colour_probability=1, keep_colour_share=(1, 1), **WHOLE, **CLEAN).float().flatten(1)
    taken = view("texture", keep_colour_probability=0, **WHOLE, **CLEAN).float().flatten(1)
    for found, limits in ((kept, (0, 6)), (taken, (6, 255))):
        assert limits[0] <= (found.mean(1) - wanted.mean(1)).abs().max() < limits[1]


def test_only_solo_needs_no_donor():
    settings = ViewSettings()
    alone = render_view(pixels(1), None, "solo", settings, VIEW_PX, view_generator(0, 5, 0))
    assert torch.equal(alone, view("solo"))
    for kind in DONOR_KINDS:
        with pytest.raises(AttribError, match=f"'{kind}' needs a style donor"):
            render_view(pixels(1), None, kind, settings, VIEW_PX, view_generator(0, 5, 0))
    with pytest.raises(AttribError, match="'oil' of a view is unknown"):
        render_view(pixels(1), pixels(2), "oil", settings, VIEW_PX, view_generator(0, 5, 0))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 5), (3, 2), (500, 400)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_of_image_and_view(size, kind):
    odd = torch.randint(256, (3, *size), dtype=torch.uint8, generator=view_generator(0, 0, 0))
    always = {name: 1 for name in ViewSettings.model_fields if name.endswith("_probability")}
    for view_px in (1, 2, 33):
        for content, donor in ((odd, pixels(2)), (pixels(1), odd)):
            rendered = view(kind, content=content, donor=donor, view_px=view_px, **always)
            assert rendered.shape == (3, view_px, view_px) and rendered.dtype == torch.uint8


@pytest.mark.parametrize(("height", "width"), [(200, 200), (100, 250), (250, 100)])
def test_crops_stay_within_their_limits(height, width):
    """Red and green encode the position of each pixel, so the edges of a view show its crop."""
    content = torch.zeros(3, height, width, dtype=torch.uint8)
    content[0], content[1] = torch.arange(width), torch.arange(height)[:, None]
    changes = CLEAN | PLAIN | {"crop_area_share": (0.2, 0.4), "crop_aspect": (0.8, 1.25)}
    shares, aspects, mirrored, places = [], [], 0, set()
    for index in range(200):
        shown = view(content=content, index=index, view_px=224, **changes).float()
        columns, rows = shown[0].mean(0), shown[1].mean(1)
        mirrored += bool(columns[0] > columns[-1])
        # Measured between the 10th pixels from the edges, 205 pixels apart of 224.
        shown_width, shown_height = (abs(line[-10] - line[9]).item() * 224 / 205 for line in (columns, rows))
        shares.append(shown_width * shown_height / (height * width))
        aspects.append(shown_width / shown_height)
        places.add((round(columns.mean().item()), round(rows.mean().item())))
    assert 0.75 < min(aspects) < 0.85 and 1.18 < max(aspects) < 1.33
    assert 0.17 < min(shares) < 0.25 and max(shares) < 0.43
    assert 30 <= mirrored <= 90 and len(places) > 150


def test_blur_and_resize_remove_detail_and_noise_adds_it():
    noise = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=view_generator(0, 0, 0))
    flat = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    off = WHOLE | CLEAN | PLAIN
    for change in (
        {"blur_probability": 1, "blur_sigma_px": (2, 2)},
        {"resize_probability": 1, "resize_share": (0.25, 0.25)},
    ):
        softer = view(content=noise, **(off | change)).float()
        assert 0 < softer.std() < 0.25 * noise.float().std() and abs(softer.mean() - noise.float().mean()) < 2
    grainy = view(content=flat, **(off | {"noise_probability": 1, "noise_std_share": (0.1, 0.1)})).float()
    assert grainy.std().item() == pytest.approx(25.5, rel=0.05)


def test_jpeg_equals_pillow_at_the_drawn_quality():
    content, off = pixels(1, VIEW_PX, VIEW_PX), WHOLE | CLEAN | PLAIN
    compressed = view(content=content, **(off | {"jpeg_probability": 1, "jpeg_quality": (20, 20)}))
    buffer = io.BytesIO()
    Image.fromarray(content.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=20)
    expected = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert (compressed.int() - expected.int()).abs().float().mean() < 0.5


def test_kinds_are_drawn_by_their_weights():
    generator = view_generator(0, 0, 0)
    drawn = Counter(draw_kind(ViewSettings(), generator) for _ in range(4000))
    for kind, share in {"texture": 0.6, "colour": 0.1, "bands": 0.1, "solo": 0.2}.items():
        assert drawn[kind] / 4000 == pytest.approx(share, abs=0.03)
    only = ViewSettings(mix={"texture": 0, "colour": 0.5, "bands": 0, "solo": 0})
    assert {draw_kind(only, generator) for _ in range(50)} == {"colour"}


def test_view_seeds_are_stable_and_distinct():
    # Constants, because a change would change every training run.
    assert view_seed(0, 0, 0) == 3882903725285577553
    assert view_seed(7, 2**63 - 1, 3) == 2708788682804167008
    seeds = {view_seed(seed, image_id, index) for seed in (0, 1, 11) for image_id in range(50) for index in (0, 1, 11)}
    assert len(seeds) == 450 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"texture": 0, "colour": 0, "bands": 0, "solo": 0}}, "every weight of mix is 0"),
        ({"mix": {"solo": -1}}, "greater than or equal to 0"),
        ({"mix": {"texture": float("inf")}}, "finite"),
        ({"mix": {"oil": 1}}, "oil"),
        (
            {"crop_area_share": (0.9, 0.5)},
            r"crop_area_share\n.*\[0.9, 0.5\] is out of order; give the lower limit first",
        ),
        ({"crop_area_share": (0, 0.5)}, r"crop_area_share.0\n.*greater than 0"),
        ({"crop_area_share": (0.5, 1.5)}, r"crop_area_share.1\n.*less than or equal to 1"),
        ({"crop_aspect": (0, 2)}, "greater than 0"),
        ({"flip_probability": 1.01}, "less than or equal to 1"),
        ({"jpeg_probability": -0.01}, "greater than or equal to 0"),
        ({"jpeg_quality": (0, 50)}, "greater than or equal to 1"),
        ({"patch_px": (5.5, 16)}, "valid integer"),
        ({"patch_px": (1, 16)}, "greater than or equal to 2"),
        ({"hue_turns": (-0.6, 0)}, "greater than or equal to -0.5"),
        ({"contrast": (float("nan"), 1)}, "finite"),
        ({"contrast": (1,)}, "contrast"),
        ({"num_donor_patches": 0}, "greater than 0"),
        ({"blur": 1}, "blur"),
    ],
)
def test_invalid_settings_are_an_error(changes, message):
    with pytest.raises(ValidationError, match=message):
        ViewSettings(**changes)


def test_settings_round_trip_through_json():
    settings = ViewSettings(mix=KindMix(texture=0.5), patch_px=(7, 7))
    assert ViewSettings.model_validate(settings.model_dump(mode="json")) == settings
    with pytest.raises(ValidationError):
        settings.patch_px = (8, 8)


def test_sheet_shows_originals_donors_and_every_kind_in_the_mix():
    images = [pixels(1), pixels(3, 30, 90), pixels(2)]
    settings = ViewSettings(mix={"bands": 0})
    sheet = Image.open(io.BytesIO(view_sheet(images, settings, VIEW_PX)))
    pitch = VIEW_PX + 2
    assert sheet.format == "PNG" and sheet.size == (8 * pitch - 2, 20 + 3 * pitch)
    cells = np.asarray(sheet)[20 : 20 + VIEW_PX]
    squeezed = functional.resize(images[0], [VIEW_PX, VIEW_PX], antialias=True).permute(1, 2, 0).numpy()
    assert (cells[:, :VIEW_PX] == squeezed).all()
    expected = render_view(images[0], images[1], "texture", settings, VIEW_PX, view_generator(0, 0, 0))
    assert (cells[:, 2 * pitch : 2 * pitch + VIEW_PX] == expected.permute(1, 2, 0).numpy()).all()
    assert sheet.crop((0, 0, 60, 20)).convert("L").getextrema()[0] < 100  # a label


def layout(pixels: torch.Tensor) -> torch.Tensor:
    """Return the standardised luminances of 8 x 8 parts, float32 [64]."""
    grey = functional.rgb_to_grayscale(functional.resize(pixels, [8, 8], antialias=True)).float().flatten()
    return (grey - grey.mean()) / grey.std()


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_real_images_keep_the_layout_of_the_content(kind, real_images):
    """The nearest layout is that of the content, not that of the donor or another image."""
    originals = [decode_image(data, max_megapixels=100).pixels for data in real_images[:16]]
    layouts = torch.stack([layout(original) for original in originals])
    changes = ViewSettings(crop_area_share=(0.95, 1), crop_aspect=(1, 1), flip_probability=0)
    squares = [functional.resize(original, [96, 96], antialias=True) for original in originals]
    found = []
    for i, content in enumerate(squares):
        donor = squares[(i + 1) % len(squares)]
        found.append(layout(render_view(content, donor, kind, changes, 96, view_generator(0, i, 0))))
    nearest = (torch.stack(found) @ layouts.T).argmax(1)
    assert (nearest == torch.arange(len(squares))).float().mean() >= 0.9
