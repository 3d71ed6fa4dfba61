"""Features of a generator's trace: the high-pass residual of an image, its power spectrum and its polyphase means.

Images are never resized, because resampling destroys the pixel pattern that an upsampler leaves. Patches are cut at
full resolution. The residual is the image minus a small blur, which removes most of the content without a trained
denoiser.

Polyphase means are the mean residuals at each position of a grid with a period of PERIOD_PX. They show the phase of a
periodic pattern, which a power spectrum does not. A decoder upsamples its feature maps by two several times, and each
step treats neighbouring pixels differently, so these means are not zero and are specific to the generator (Marra et
al., arXiv 1812.11842). Three such steps have a period of 8 px, and so have JPEG blocks. Means over many blocks survive
JPEG best, because the rounding errors of the blocks average out.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.generators.settings import PERIOD_PX

MAGNITUDE_FLOOR = 1.1e-3  # magnitude of a bin that contains only the noise of 8-bit rounding: 1 / 255 / sqrt(12)
MEAN_POWER_FLOOR = 1e-7  # of a power; lower, because a mean over windows has less noise
ENERGY_FLOOR = 0.01  # root mean square of a block's residual (pixels in 0..1); below it 8-bit rounding dominates


def patches(image: Tensor, patch_px: int, max_patches: int) -> Tensor:
    """uint8 [3, h, w] -> uint8 [p, 3, patch_px, patch_px], 1 <= p <= max_patches: patches on an even grid.

    The grid has as many patches as possible; of equally large grids, the one closest to the image's aspect ratio is
    used. Patches start at multiples of PERIOD_PX, so all have the same phase on the pixel grid of the decoder and of
    JPEG; if patch_px is such a multiple, none overlap. Raises AttribError if a side is shorter than patch_px.
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
    """The image minus its 3x3 binomial blur, reflected at the edges: float32 [n, 3, h, w] in 0..1 -> same shape."""
    blurred = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    blurred = (blurred[..., :-2, :] + 2 * blurred[..., 1:-1, :] + blurred[..., 2:, :]) / 4
    blurred = (blurred[..., :-2] + 2 * blurred[..., 1:-1] + blurred[..., 2:]) / 4
    return pixels - blurred


def log_spectrum(residuals: Tensor) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, 3, s, s // 2 + 1]: log magnitude of rfft2 after a Hann window.

    It is normalised so that white noise of standard deviation x has a root mean square magnitude of x in every bin, for
    any s. The square of MAGNITUDE_FLOOR is added to the power.
    """
    return (_power(residuals) + MAGNITUDE_FLOOR**2).log() / 2


def colour_spectrum(residuals: Tensor, window_px: int) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, 2, 6, w, w // 2 + 1], w = window_px <= s: log magnitude of small windows.

    Windows overlap by half and are averaged (Welch's method) in two ways: the logarithm of the mean power, which
    windows with edges dominate, and the mean of the logarithms, where all windows have the same weight. The six
    channels are red, green, blue and their differences. The differences contain little content of a photograph, so they
    show how a decoder mixes its features into colours.
    """
    red, green, blue = residuals.unbind(dim=1)
    channels = torch.stack([red, green, blue, red - green, blue - green, red - blue], dim=1)
    windows = channels.unfold(2, window_px, window_px // 2).unfold(3, window_px, window_px // 2).flatten(2, 3)
    power = _power(windows)  # [n, 6, windows, w, w // 2 + 1]
    of_mean = (power.mean(dim=2) + MEAN_POWER_FLOOR).log()
    mean_of = (power + MAGNITUDE_FLOOR**2).log().mean(dim=2)
    return torch.stack([of_mean, mean_of], dim=1) / 2


def patch_spectra(cut: Tensor, window_px: int | None = None) -> Tensor:
    """`log_spectrum` of the residuals of patches uint8 [p, 3, s, s], or with window_px their `colour_spectrum`."""
    residuals = residual(cut.float() / 255)
    return colour_spectrum(residuals, window_px) if window_px else log_spectrum(residuals)


def azimuthal_power(residuals: Tensor) -> Tensor:
    """float32 [n, 3, s, s] -> float32 [n, s // 2]: power at 1, 2, ..., s // 2 cycles per patch.

    It is the power of `log_spectrum` before floor and logarithm, averaged over directions and channels. Each bin counts
    for the nearest whole radius. Corners beyond s // 2 cycles, where some directions are missing, are left out.
    """
    power = _power(residuals).mean(dim=1).flatten(1)
    return power @ _ring_weights(residuals.shape[-1]).to(power)


def _power(residuals: Tensor) -> Tensor:
    # The zeros at both ends of the Hann window are dropped, because they would discard pixels.
    window = torch.hann_window(residuals.shape[-1] + 2, periodic=False, device=residuals.device)[1:-1]
    window = window[:, None] * window
    spectrum = torch.fft.rfft2(residuals * window, norm="ortho")
    return (spectrum.real**2 + spectrum.imag**2) / window.square().mean()


@lru_cache
def _ring_weights(size: int) -> Tensor:
    """Weights of the mean over each ring of the full spectrum, float32 [size * (size // 2 + 1), size // 2]."""
    down, across = torch.fft.fftfreq(size) * size, torch.fft.rfftfreq(size) * size
    ring = torch.hypot(down[:, None], across[None]).round().long().flatten()
    # rfft2 keeps one of each pair of conjugate bins; only the columns of frequency 0 and of Nyquist hold both.
    twice = torch.where((across == 0) | (across * 2 == size), 1.0, 2.0).expand(size, -1).flatten()
    weights = F.one_hot(ring, int(ring.max()) + 1)[:, 1 : size // 2 + 1] * twice[:, None]
    return weights / weights.sum(dim=0)


def polyphase_means(residuals: Tensor) -> Tensor:
    """float32 [n, 3, h, w] -> float32 [n, 3, PERIOD_PX, PERIOD_PX]: mean residual at each position in a block.

    The mean is over whole blocks from the upper left corner; h and w >= PERIOD_PX. Each block is divided by its root
    mean square, because residuals at edges are many times larger.
    """
    blocks = lattice_blocks(residuals, PERIOD_PX)
    energy = blocks.square().mean(dim=(1, 3, 5), keepdim=True)
    return (blocks / (energy + ENERGY_FLOOR**2).sqrt()).mean(dim=(2, 4))


def lattice_blocks(maps: Tensor, period: int) -> Tensor:
    """float32 [n, c, h, w] -> [n, c, h // period, period, w // period, period]: blocks from the upper left corner."""
    rows, columns = (side // period for side in maps.shape[2:])
    whole = maps[:, :, : rows * period, : columns * period]
    return whole.unflatten(3, (columns, period)).unflatten(2, (rows, period))
