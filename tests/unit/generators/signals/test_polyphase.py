"""Polyphase means against loops by definition, and on patterns that have the same power spectrum."""

import math

import numpy as np
import pytest
import torch
from support.pool import smooth_images

from attrib.generators.settings import PERIOD_PX
from attrib.generators.signals.degradations import degrade, parse
from attrib.generators.signals.spectrum import ENERGY_FLOOR, patches, polyphase_means, residual


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (23, 31), (26, 26)])
def test_the_mean_is_over_whole_blocks_each_divided_by_its_own_scale(height, width):
    residuals = noise(2, height, width)
    expected = np.zeros((2, 3, 8, 8))
    for image in range(2):
        blocks = []
        for top in range(0, height - 7, 8):
            for left in range(0, width - 7, 8):
                block = residuals[image, :, top : top + 8, left : left + 8].numpy().astype(np.float64)
                blocks.append(block / math.sqrt(np.mean(block**2) + ENERGY_FLOOR**2))
        expected[image] = sum(blocks) / len(blocks)
    np.testing.assert_allclose(polyphase_means(residuals), expected, atol=1e-5)


def test_one_edge_does_not_dominate_the_mean():
    residuals = noise(1, 64, 64).clamp(-0.02, 0.02)
    with_edge = residuals.clone()
    with_edge[:, :, :8, :8] = 1.0
    plain = polyphase_means(residuals)
    assert (polyphase_means(with_edge) - plain).norm() < 0.5 * plain.norm()
    blocks = [found.view(1, 3, 8, 8, 8, 8).mean(dim=(2, 4)) for found in (residuals, with_edge)]
    assert (blocks[1] - blocks[0]).norm() > 5 * blocks[0].norm(), "it does where each counts by its size"


def test_flat_images_have_polyphase_means_of_zero():
    assert torch.equal(polyphase_means(torch.zeros(1, 3, 16, 16)), torch.zeros(1, 3, 8, 8))


def shifted_lattices() -> tuple[torch.Tensor, torch.Tensor]:
    """A periodic pattern, and the same pattern shifted by half a period: they have the same power spectrum."""
    pattern = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3))
    return pattern, pattern.roll((4, 4), dims=(1, 2))


@pytest.mark.parametrize(("degradation", "levels"), [("none", 2.0), ("jpeg-85", 5.0)])
def test_a_pattern_is_told_from_the_same_pattern_shifted_by_half_a_period(degradation, levels):
    """Only the phase of the pattern differs, which no power spectrum shows. The pattern is weaker than the content."""
    shown = smooth_images(40, 64, 0).float().clamp(16, 239)
    vectors = []
    for pattern in shifted_lattices():
        images = (shown + levels * pattern.tile(1, 8, 8)).round().clamp(0, 255).to(torch.uint8)
        degraded = torch.stack([degrade(image, parse(degradation)) for image in images])
        vectors.append(polyphase_means(residual(degraded.float() / 255)).flatten(1))
    means = [rows[:10].mean(dim=0) for rows in vectors]
    towards = means[0] - means[1]
    right = [((rows[10:] - (means[0] + means[1]) / 2) @ towards > 0) == (own == 0) for own, rows in enumerate(vectors)]
    assert torch.cat(right).float().mean() > 0.95


def test_all_patches_of_an_image_have_the_same_phase():
    pattern = shifted_lattices()[0]
    image = (128 + 20 * pattern.tile(1, 13, 17)[:, :100, :131]).round().to(torch.uint8)
    cut = patches(image, 32, 16)
    assert len(cut) == 12
    inner = cut[:, :, 8:24, 8:24]  # at a patch's border the residual's blur sees its mirror image
    assert all(torch.equal(patch, inner[0]) for patch in inner) and PERIOD_PX == 8
