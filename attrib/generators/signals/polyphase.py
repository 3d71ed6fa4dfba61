"""What a decoder leaves at fixed places of its pixel grid, which no power spectrum shows, since that forgets where a pattern lies.

A decoder doubles its maps a few times, and what a doubling does differs between the pixels that it makes of one: kernels meet them unevenly,
biases repeat. So the mean residual of all pixels at one place of a lattice is not zero, and it is a generator's own (mean residuals as
fingerprints: Marra et al., arXiv 1812.11842; polyphase components are the samples at one place of a lattice). Three doublings have a period
of PERIOD_PX, and so have JPEG's blocks: a mean over blocks is what JPEG leaves best, because rounding errors differ from block to block.
"""

from torch import Tensor

from attrib.generators.settings import PERIOD_PX

ENERGY_FLOOR = 0.01  # root mean square of a block's residual, of 1: below it rounding to 8 bits counts


def polyphase_means(residuals: Tensor) -> Tensor:
    """float32 [n, 3, h, w], h and w >= PERIOD_PX -> float32 [n, 3, PERIOD_PX, PERIOD_PX]: of the whole blocks from the upper left corner.

    Each block counts by its own scale, since the residual of edges is many times that of what lies between them and says no more.
    """
    blocks = lattice_blocks(residuals, PERIOD_PX)
    energy = blocks.square().mean(dim=(1, 3, 5), keepdim=True)
    return (blocks / (energy + ENERGY_FLOOR**2).sqrt()).mean(dim=(2, 4))


def lattice_blocks(maps: Tensor, period: int) -> Tensor:
    """float32 [n, c, h, w], h and w >= period -> [n, c, h // period, period, w // period, period]: the whole blocks from the upper left corner."""
    count, channels, height, width = maps.shape
    rows, columns = height // period, width // period
    whole = maps[:, :, : rows * period, : columns * period]
    return whole.reshape(count, channels, rows, period, columns, period)
