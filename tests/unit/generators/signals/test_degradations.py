"""Degradations against Pillow's codecs and against formulas."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from attrib.common.errors import AttribError
from attrib.generators.signals.degradations import (
    GRID,
    NONE,
    TRAINING,
    Degradation,
    degrade,
    parse,
    random_degradation,
    to_pillow,
)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    coarse = torch.randint(0, 256, (3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return coarse.repeat_interleave(5, dim=1).repeat_interleave(5, dim=2)


def test_names_are_read_back():
    assert [parse(degradation.name) for degradation in GRID] == list(GRID)
    assert [degradation.name for degradation in GRID][:2] == ["none", "jpeg-95"]
    assert parse("resize-0.75") == Degradation("resize", 0.75) and GRID[0] == NONE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpeg", "give a quality from 1 to 100"),
        ("jpeg-0", "give a quality from 1 to 100"),
        ("webp-85.5", "choose a whole number"),
        ("jpeg-high", "is no degradation; write for example"),
        ("smear-2", "choose one of none, jpeg"),
        ("resize-nan", "a factor"),
        ("none-1", "give a strength from 0 to 0"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(AttribError, match=message):
        parse(name)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_codecs_are_the_real_ones(image, codec):
    file = io.BytesIO()
    to_pillow(image).save(file, codec, quality=60)
    expected = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)
    found = degrade(image, Degradation(codec, 60))
    assert found.dtype == torch.uint8 and np.array_equal(found, expected)
    assert not torch.equal(found, image)


def test_a_crop_keeps_the_middle_and_a_resize_all(image):
    assert torch.equal(degrade(image, Degradation("crop", 0.8)), image[:, 4:40, 6:54])
    assert torch.equal(degrade(image, Degradation("crop", 1.0)), image)
    smaller = degrade(image, Degradation("resize", 0.5))
    expected = np.asarray(to_pillow(image).resize((30, 22), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(smaller, expected)
    assert torch.equal(degrade(image, NONE), image)


def test_blur_is_gaussian():
    point = torch.zeros(3, 21, 21, dtype=torch.uint8)
    point[:, 10, 10] = 255
    found = degrade(point, Degradation("blur", 1.0))
    weights = np.array([math.exp(-(offset**2) / 2) for offset in range(-3, 4)])
    expected = np.zeros((21, 21))
    expected[7:14, 7:14] = 255 * np.outer(weights, weights) / weights.sum() ** 2
    for channel in found:
        assert np.array_equal(channel, np.rint(expected))
    flat = torch.full((3, 2, 3), 77, dtype=torch.uint8)
    assert torch.equal(degrade(flat, Degradation("blur", 2.0)), flat)


def test_random_draws_follow_their_shares_and_the_seed():
    def draws(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return [random_degradation(generator, **options) for _ in range(2000)]

    found = draws(0)
    assert found == draws(0) and found != draws(1)
    counts = Counter(degradation.kind for degradation in found)
    for kind, (share, low, high) in TRAINING.items():
        assert abs(counts[kind] / 2000 - share) < 0.04
        assert all(low <= degradation.strength <= high for degradation in found if degradation.kind == kind)


def test_random_draws_leave_room_for_a_patch():
    generator = torch.Generator().manual_seed(0)
    found = [random_degradation(generator, smallest_scale=0.8) for _ in range(500)]
    shrinking = [degradation.strength for degradation in found if degradation.kind in ("resize", "crop")]
    assert shrinking and min(shrinking) >= 0.8
    kinds = {random_degradation(generator, smallest_scale=1.0).kind for _ in range(300)}
    assert kinds == {"none", "jpeg", "webp", "blur"}
