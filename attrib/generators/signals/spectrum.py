"""Traces of a generator's decoder independent of content: the high-pass residual, its spectrum and its polyphase means.

Images are never resized here: an upsampler's trace is a pattern of single pixels, which resampling destroys or replaces
by its own. Patches are cut at full resolution. The residual is the image minus a small blur: it removes most content
without a trained denoiser.

A power spectrum does not show where a pattern lies. A decoder doubles its maps a few times, and a doubling treats the
pixels that it makes of one differently: kernels overlap unevenly, biases repeat. So the mean residual at one place of a
lattice is not zero and is specific to the generator (Marra et al., arXiv 1812.11842). Three doublings have a period of
PERIOD_PX, as have JPEG blocks; means over blocks survive JPEG best, because rounding errors differ from block to block.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.generators.settings import PERIOD_PX

# Magnitude that 8-bit rounding alone leaves in a bin (1 / 255 / sqrt(12)): a logarithm below it would measure that
# rounding.
MAGNITUDE_FLOOR = 1.1e-3
MEAN_POWER_FLOOR = 1e-7  # lower, because a mean over windows has less noise
ENERGY_FLOOR = 0.01  # root mean square of a block's residual, of 1: below it rounding to 8 bits counts


def patches(image: Tensor, patch_px: int, max_patches: int) -> Tensor:
    """uint8 [3, h, w] -> uint8 [p, 3, patch_px, patch_px], 1 <= p <= max_patches: patches on an even grid.

    The grid has as many patches as fit and are allowed; among grids of equal size the one closest to the image's aspect
    ratio. Patches start at multiples of PERIOD_PX, so all have the same position on the lattice of the decoder and of
    JPEG. If patch_px is a multiple of it, none overlap. Deterministic. Raises AttribError if a side is shorter than
    patch_px.
    """
    height, width = image.shape[1:]
    if min(height, width) < patch_px:
        raise AttribError(
            f"the image has {width} x {height} pixels and the fingerprint needs {patch_px} on each side; leave "
            "it out, or use "
            "an extractor with a smaller patch_px (enlarging the image would replace its trace)"
        )
    grids = (
        (rows, min(width // patch_px, max_patches // rows))
        for rows in range(1, min(height // patch_px, max_patches) + 1)
    )
    rows, columns = max(grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] * width - grid[1] * height)))
    return torch.stack(
        [
            image[:, top : top + patch_px, left : left + patch_px]
            for top in _starts(height, patch_px, rows)
            for left in _starts(width, patch_px, columns)
        ]
    )


def _starts(side: int, patch_px: int, count: int) -> list[int]:
    spare = side - patch_px
    even = [spare // 2] if count == 1 else [i * spare // (count - 1) for i in range(count)]
    return [start // PERIOD_PX * PERIOD_PX for start in even]


def residual(pixels: Tensor) -> Tensor:
    """float32 [n, 3, h, w] in 0..1 -> same shape: image minus a 3x3 binomial blur, edges reflected without the edge
    pixel.
    """
    blurred = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    blurred = (blurred[..., :-2, :] + 2 * blurred[..., 1:-1, :] + blurred[..., 2:, :]) / 4
    blurred = (blurred[..., :-2] + 2 * blurred[..., 1:-1] + blurred[..., 2:]) / 4
    return pixels - blurred


def log_spectrum(residuals: Tensor) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, 3, s, s // 2 + 1]: natural logarithm of the magnitude of rfft2 after a Hann
    window.

    White noise of standard deviation x has a root mean square magnitude of x in every bin, for any s. MAGNITUDE_FLOOR
    is added in power.
    """
    return (_power(residuals) + MAGNITUDE_FLOOR**2).log() / 2


def colour_spectrum(residuals: Tensor, window_px: int) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, 2, 6, w, w // 2 + 1], w = window_px <= s: half the log power in overlapping
    windows.

    One spectrum of so small a patch is mostly noise, so the power of windows that overlap by half is averaged (Welch's
    method): first the logarithm of the mean, in which edges weigh most, then the mean of the logarithms, in which
    smooth windows weigh the same.

    The six channels are red, green, blue, red - green, blue - green and red - blue. Fine detail of a photograph is
    nearly grey, so the differences hold little content, and much of how a decoder mixes its last features into colours.
    """
    red, green, blue = residuals.unbind(dim=1)
    channels = torch.stack([red, green, blue, red - green, blue - green, red - blue], dim=1)
    windows = channels.unfold(2, window_px, window_px // 2).unfold(3, window_px, window_px // 2).flatten(2, 3)
    power = _power(windows)  # [n, 6, windows, w, w // 2 + 1]
    of_mean = (power.mean(dim=2) + MEAN_POWER_FLOOR).log()
    mean_of = (power + MAGNITUDE_FLOOR**2).log().mean(dim=2)
    return torch.stack([of_mean, mean_of], dim=1) / 2


def patch_spectra(cut: Tensor, window_px: int | None = None) -> Tensor:
    """uint8 [p, 3, s, s] -> `log_spectrum` of the patches' residuals, or with window_px their `colour_spectrum`."""
    residuals = residual(cut.float() / 255)
    return colour_spectrum(residuals, window_px) if window_px else log_spectrum(residuals)


def azimuthal_power(residuals: Tensor) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, s // 2]: power at 1, 2, ..., s // 2 cycles per patch.

    Averaged over directions and channels. The spectrum is that of `log_spectrum`, without floor and logarithm. A bin
    belongs to the nearest whole radius; the corners beyond s // 2 cycles, which lack some directions, are left out.
    """
    power = _power(residuals).mean(dim=1).flatten(1)
    return power @ _ring_weights(residuals.shape[-1]).to(power)


def _power(residuals: Tensor) -> Tensor:
    # Without the zeros at both ends, which would waste pixels.
    window = torch.hann_window(residuals.shape[-1] + 2, periodic=False, device=residuals.device)[1:-1]
    window = window[:, None] * window
    spectrum = torch.fft.rfft2(residuals * window, norm="ortho")
    return (spectrum.real**2 + spectrum.imag**2) / window.square().mean()


@lru_cache
def _ring_weights(size: int) -> Tensor:
    """float32 [size * (size // 2 + 1), size // 2]: columns of sum 1, each the mean over a ring of the full spectrum."""
    down, across = torch.fft.fftfreq(size) * size, torch.fft.rfftfreq(size) * size
    ring = torch.hypot(down[:, None], across[None]).round().long().flatten()
    # rfft2 keeps one of each pair of conjugate bins; only the columns of frequency 0 and of Nyquist hold both.
    twice = torch.where((across == 0) | (across * 2 == size), 1.0, 2.0).expand(size, -1).flatten()
    weights = F.one_hot(ring, int(ring.max()) + 1)[:, 1 : size // 2 + 1] * twice[:, None]
    return weights / weights.sum(dim=0)


def polyphase_means(residuals: Tensor) -> Tensor:
    """float32 [n, 3, h, w], h and w >= PERIOD_PX -> float32 [n, 3, PERIOD_PX, PERIOD_PX]: mean residual at each lattice
    place.

    Over whole blocks from the upper left corner, each divided by its own scale, because residuals at edges are many
    times larger.
    """
    blocks = lattice_blocks(residuals, PERIOD_PX)
    energy = blocks.square().mean(dim=(1, 3, 5), keepdim=True)
    return (blocks / (energy + ENERGY_FLOOR**2).sqrt()).mean(dim=(2, 4))


def lattice_blocks(maps: Tensor, period: int) -> Tensor:
    """float32 [n, c, h, w] -> [n, c, h // period, period, w // period, period]: whole blocks from the upper left
    corner.
    """
    count, channels, height, width = maps.shape
    rows, columns = height // period, width // period
    whole = maps[:, :, : rows * period, : columns * period]
    return whole.reshape(count, channels, rows, period, columns, period)
