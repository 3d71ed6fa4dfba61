"""Traces of a generator's decoder independent of content: the high-pass residual, its spectrum and its polyphase means.

Images are never resized, because resampling destroys an upsampler's trace, a pattern of single pixels. Patches are cut
at full resolution. The residual is the image minus a small blur, which removes most content without a trained denoiser.

A power spectrum does not show where a pattern lies. A decoder doubles its maps a few times, and each doubling treats
neighbouring pixels differently: kernels overlap unevenly, biases repeat. So the mean residual at one place of a lattice
is not zero and is specific to the generator (Marra et al., arXiv 1812.11842). Three doublings have a period of
PERIOD_PX, as have JPEG blocks; means over blocks survive JPEG best, because rounding errors differ from block to block.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.generators.settings import PERIOD_PX

MAGNITUDE_FLOOR = 1.1e-3  # magnitude in a bin of 8-bit rounding alone: 1 / 255 / sqrt(12)
MEAN_POWER_FLOOR = 1e-7  # lower, because a mean over windows has less noise
ENERGY_FLOOR = 0.01  # root mean square of a block's residual, of 1: below it rounding to 8 bits counts


def patches(image: Tensor, patch_px: int, max_patches: int) -> Tensor:
    """uint8 [3, h, w] -> uint8 [p, 3, patch_px, patch_px], 1 <= p <= max_patches: patches on an even grid.

    The largest grid that fits, of equal ones the closest to the image's aspect ratio. Patches start at multiples of
    PERIOD_PX, so all have the same position on the lattice of the decoder and of JPEG; if patch_px is a multiple of it,
    none overlap. Raises AttribError if a side is shorter than patch_px.
    """
    height, width = image.shape[1:]
    if min(height, width) < patch_px:
        raise AttribError(
            f"the image has {width} x {height} pixels and the fingerprint needs {patch_px} on each side; leave it out, "
            "or use an extractor with a smaller patch_px (enlarging the image would replace its trace)"
        )
    most_rows = min(height // patch_px, max_patches)
    grids = ((rows, min(width // patch_px, max_patches // rows)) for rows in range(1, most_rows + 1))
    rows, columns = max(grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] * width - grid[1] * height)))
    tops, lefts = _starts(height - patch_px, rows), _starts(width - patch_px, columns)
    return torch.stack([image[:, top : top + patch_px, left : left + patch_px] for top in tops for left in lefts])


def _starts(spare: int, count: int) -> list[int]:
    even = [spare // 2] if count == 1 else [i * spare // (count - 1) for i in range(count)]
    return [start // PERIOD_PX * PERIOD_PX for start in even]


def residual(pixels: Tensor) -> Tensor:
    """float32 [n, 3, h, w] in 0..1 -> same shape: image minus a 3x3 binomial blur, reflected at the edges."""
    blurred = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    blurred = (blurred[..., :-2, :] + 2 * blurred[..., 1:-1, :] + blurred[..., 2:, :]) / 4
    blurred = (blurred[..., :-2] + 2 * blurred[..., 1:-1] + blurred[..., 2:]) / 4
    return pixels - blurred


def log_spectrum(residuals: Tensor) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, 3, s, s // 2 + 1]: log magnitude of rfft2 after a Hann window.

    White noise of standard deviation x has a root mean square magnitude of x in every bin, for any s. MAGNITUDE_FLOOR
    is added in power.
    """
    return (_power(residuals) + MAGNITUDE_FLOOR**2).log() / 2


def colour_spectrum(residuals: Tensor, window_px: int) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, 2, 6, w, w // 2 + 1], w = window_px <= s: half log power of small windows.

    Windows overlap by half and are averaged (Welch's method): first the logarithm of the mean, which edges dominate,
    then the mean of the logarithms, where all windows weigh the same. The channels are red, green, blue and their
    differences, in which a photograph has little content and a decoder's mixing of features into colours shows.
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

    Averaged over directions and channels; the spectrum of `log_spectrum` without floor and logarithm. A bin belongs to
    the nearest whole radius. Corners beyond s // 2 cycles, which lack some directions, are left out.
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
    """float32 [n, 3, h, w] -> float32 [n, 3, PERIOD_PX, PERIOD_PX]: mean residual at each lattice place.

    Over whole blocks from the upper left corner; h and w >= PERIOD_PX. Each block is divided by its own scale, because
    residuals at edges are many times larger.
    """
    blocks = lattice_blocks(residuals, PERIOD_PX)
    energy = blocks.square().mean(dim=(1, 3, 5), keepdim=True)
    return (blocks / (energy + ENERGY_FLOOR**2).sqrt()).mean(dim=(2, 4))


def lattice_blocks(maps: Tensor, period: int) -> Tensor:
    """float32 [n, c, h, w] -> [n, c, h // period, period, w // period, period]: blocks from the upper left corner."""
    rows, columns = (side // period for side in maps.shape[2:])
    whole = maps[:, :, : rows * period, : columns * period]
    return whole.unflatten(3, (columns, period)).unflatten(2, (rows, period))
