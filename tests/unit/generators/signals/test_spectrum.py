"""Patches, residual and spectra against their definitions, written out as loops and sums."""

import math

import numpy as np
import pytest
import torch

from attrib.common.errors import AttribError
from attrib.generators.settings import PERIOD_PX
from attrib.generators.signals.spectrum import (
    MAGNITUDE_FLOOR,
    MEAN_POWER_FLOOR,
    azimuthal_power,
    colour_spectrum,
    log_spectrum,
    patch_spectra,
    patches,
    residual,
)


def numbered(height: int, width: int) -> torch.Tensor:
    """uint8 [3, h, w] whose first two channels are the pixel's row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows + columns]).to(torch.uint8)


def corners(cut: torch.Tensor) -> list[tuple[int, int]]:
    return [(int(patch[0, 0, 0]), int(patch[1, 0, 0])) for patch in cut]


def noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def magnitudes(residuals: torch.Tensor) -> np.ndarray:
    """float64 [n, 3, s, s]: the windowed transform as a matrix product, which keeps the deviation of white noise."""
    size = residuals.shape[-1]
    window = np.sin(np.pi * np.arange(1, size + 1) / (size + 1)) ** 2
    window = np.outer(window, window)
    transform = np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size) / math.sqrt(size)
    windowed = residuals.numpy().astype(np.float64) * window / math.sqrt((window**2).mean())
    return np.abs(np.einsum("uy,ncyx,vx->ncuv", transform, windowed, transform))


def test_an_image_that_divides_is_tiled():
    cut = patches(numbered(32, 48), 16, 100)
    assert cut.shape == (6, 3, 16, 16) and cut.dtype == torch.uint8
    assert corners(cut) == [(0, 0), (0, 16), (0, 32), (16, 0), (16, 16), (16, 32)]
    assert torch.equal(cut[4], numbered(32, 48)[:, 16:32, 16:32])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 16), (40, 100), (100, 40), (63, 95), (200, 210)])
@pytest.mark.parametrize("max_patches", [1, 2, 5, 16])
def test_patches_lie_inside_and_apart(height, width, max_patches):
    cut = patches(numbered(height, width), 16, max_patches)
    fitting = (height // 16) * (width // 16)
    assert min(fitting, max_patches) * 0.75 <= len(cut) <= max_patches
    starts = corners(cut)
    assert all(top % PERIOD_PX == left % PERIOD_PX == 0 for top, left in starts)
    assert all(0 <= top <= height - 16 and 0 <= left <= width - 16 for top, left in starts)
    for i, (top, left) in enumerate(starts):
        assert all(abs(top - other[0]) >= 16 or abs(left - other[1]) >= 16 for other in starts[:i])


def test_one_patch_is_near_the_middle_and_the_grid_follows_the_shape():
    assert corners(patches(numbered(50, 90), 16, 1)) == [(16, 32)]
    wide = corners(patches(numbered(40, 160), 16, 8))
    assert len({top for top, _ in wide}) == 1 or len({left for _, left in wide}) >= 4
    assert max(left for _, left in wide) == 144


def test_a_small_image_is_refused():
    with pytest.raises(AttribError, match="15 x 40 pixels and the fingerprint needs 16"):
        patches(numbered(40, 15), 16, 4)


def test_residual_is_the_pixel_minus_its_weighted_neighbourhood():
    pixels = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    found = residual(pixels)
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    for y in range(5):
        for x in range(6):
            blurred = (padded[..., y : y + 3, x : x + 3] * weights).sum(axis=(-2, -1))
            np.testing.assert_allclose(found[..., y, x], pixels[..., y, x] - blurred, atol=1e-6)
    assert residual(torch.full((1, 3, 4, 4), 0.3)).abs().max() < 1e-7


def test_log_spectrum_is_that_of_the_windowed_transform():
    residuals = 0.05 * noise(2, 16)
    expected = np.log(magnitudes(residuals) ** 2 + MAGNITUDE_FLOOR**2)[..., :9] / 2
    np.testing.assert_allclose(log_spectrum(residuals), expected, atol=1e-4)


def test_a_flat_residual_is_at_the_floor():
    np.testing.assert_allclose(log_spectrum(torch.zeros(1, 3, 8, 8)), math.log(MAGNITUDE_FLOOR), rtol=1e-6)


@pytest.mark.parametrize("size", [16, 32])
def test_white_noise_keeps_its_deviation_at_any_size(size):
    power = azimuthal_power(0.2 * noise(400, size)).mean(dim=0)
    torch.testing.assert_close(power, torch.full((size // 2,), 0.04), rtol=0.05, atol=0)


@pytest.mark.parametrize("size", [8, 15, 16])
def test_azimuthal_power_is_the_mean_over_rings_of_the_full_spectrum(size):
    residuals = noise(3, size, seed=2)
    power = (magnitudes(residuals) ** 2).mean(axis=1)
    rings: dict[int, list] = {}
    for u in range(size):
        for v in range(size):
            radius = math.hypot(min(u, size - u), min(v, size - v))
            rings.setdefault(round(radius), []).append(power[:, u, v])
    expected = np.stack([np.mean(rings[radius], axis=0) for radius in range(1, size // 2 + 1)], axis=1)
    np.testing.assert_allclose(azimuthal_power(residuals), expected, rtol=1e-4)


@pytest.mark.parametrize(("size", "window"), [(16, 8), (12, 6), (8, 8), (14, 4)])
def test_colour_spectrum_averages_windows_before_and_after_the_logarithm(size, window):
    residuals = 0.05 * noise(2, size, seed=4)
    red, green, blue = residuals.unbind(dim=1)
    channels = torch.stack([red, green, blue, red - green, blue - green, red - blue], dim=1)
    step, powers = window // 2, []
    for top in range(0, size - window + 1, step):
        for left in range(0, size - window + 1, step):
            cut = channels[..., top : top + window, left : left + window]
            both = [magnitudes(three) ** 2 for three in (cut[:, :3], cut[:, 3:])]
            powers.append(np.concatenate(both, axis=1)[..., : window // 2 + 1])
    of_mean = np.log(np.mean(powers, axis=0) + MEAN_POWER_FLOOR) / 2
    mean_of = np.mean([np.log(power + MAGNITUDE_FLOOR**2) / 2 for power in powers], axis=0)
    found = colour_spectrum(residuals, window)
    assert found.shape == (2, 2, 6, window, window // 2 + 1)
    np.testing.assert_allclose(found, np.stack([of_mean, mean_of], axis=1), atol=1e-4)


def test_spectra_of_patches_are_those_of_their_residuals():
    image = torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    cut = patches(image, 16, 5)
    residuals = residual(cut.float() / 255)
    torch.testing.assert_close(patch_spectra(cut), log_spectrum(residuals))
    torch.testing.assert_close(patch_spectra(cut, 8), colour_spectrum(residuals, 8))
