"""Networks of three kinds of generators in use, as small as they still draw something: a DCGAN, a VAE and the U-Net of a diffusion model.

They differ from the synthetic models (attrib/generators/synthesis/architectures.py) as generators in the wild do: they draw from noise, each by its own
upsampling, and none is an autoencoder of an image. Pixels are -1..1 here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_SIZE = 64  # of the DCGAN and the VAE
NUM_HALVINGS = 3  # between an image and what a generator starts from


class DcganGenerator(nn.Sequential):
    """float32 [n, LATENT_SIZE] -> [n, 3, px, px]: transposed 4x4 convolutions with batch norm (arXiv 1511.06434)."""

    def __init__(self, px: int, width: int):
        start = px // 2**NUM_HALVINGS
        layers: list[nn.Module] = [
            nn.Unflatten(1, (LATENT_SIZE, 1, 1)),
            nn.ConvTranspose2d(LATENT_SIZE, 4 * width, start, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
        ]
        for channels in (4 * width, 2 * width):
            layers += [
                nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels // 2),
                nn.ReLU(),
            ]
        super().__init__(*layers, nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1), nn.Tanh())
        self.apply(_dcgan_start)


class DcganDiscriminator(nn.Sequential):
    """float32 [n, 3, px, px] -> [n], the log-odds that an image is a photograph."""

    def __init__(self, px: int, width: int):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for channels in (width, 2 * width):
            layers += [
                nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(2 * channels),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, px // 2**NUM_HALVINGS), nn.Flatten(0))
        self.apply(_dcgan_start)


def _dcgan_start(module: nn.Module) -> None:
    """As the paper starts them; from the usual larger weights, training at this size collapses more often."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Vae(nn.Module):
    """A variational autoencoder (arXiv 1312.6114) whose decoder doubles by repeated pixels and convolutions."""

    def __init__(self, px: int, width: int):
        super().__init__()
        start = px // 2**NUM_HALVINGS
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * start**2, 2 * LATENT_SIZE))
        layers = [nn.Linear(LATENT_SIZE, 4 * width * start**2), nn.Unflatten(1, (4 * width, start, start)), nn.SiLU()]
        for before, after in ((4 * width, 2 * width), (2 * width, width), (width, width)):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), nn.SiLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of each image's latents, float32 [n, LATENT_SIZE] each."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 12)


class UNet(nn.Module):
    """What a diffusion model predicts of a noisy image: float32 [n, 3, px, px] and times float32 [n] in 0..1 -> [n, 3, px, px]."""

    def __init__(self, width: int):
        super().__init__()
        widths = (width // 2, width, 2 * width)
        self.time_size = 4 * width
        self.time = nn.Sequential(nn.Linear(self.time_size, self.time_size), nn.SiLU())
        self.enter = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(UNetBlock(n, n, self.time_size) for n in widths[:2])
        self.halved = nn.ModuleList(nn.Conv2d(n, m, 3, stride=2, padding=1) for n, m in zip(widths, widths[1:]))
        self.middle = nn.ModuleList(UNetBlock(widths[2], widths[2], self.time_size) for _ in range(2))
        self.doubled = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1) for n, m in zip(widths, widths[1:]))
        self.up = nn.ModuleList(UNetBlock(2 * n, n, self.time_size) for n in widths[:2])
        self.leave = nn.Sequential(nn.GroupNorm(4, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        time = self.time(_waves(times, self.time_size))
        maps, kept = self.enter(images), []
        for block, halve in zip(self.down, self.halved):
            maps = block(maps, time)
            kept.append(maps)
            maps = halve(maps)
        for block in self.middle:
            maps = block(maps, time)
        for level in reversed(range(len(kept))):
            maps = self.doubled[level](F.interpolate(maps, scale_factor=2))
            maps = self.up[level](torch.cat([maps, kept[level]], dim=1), time)
        return self.leave(maps)


class UNetBlock(nn.Module):
    """Two convolutions around a skip, shifted by the time."""

    def __init__(self, num_in: int, num_out: int, time_size: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, num_in), nn.SiLU(), nn.Conv2d(num_in, num_out, 3, padding=1))
        self.shift = nn.Linear(time_size, num_out)
        self.second = nn.Sequential(nn.GroupNorm(4, num_out), nn.SiLU(), nn.Conv2d(num_out, num_out, 3, padding=1))
        self.skip = nn.Identity() if num_in == num_out else nn.Conv2d(num_in, num_out, 1)

    def forward(self, maps: Tensor, time: Tensor) -> Tensor:
        return self.skip(maps) + self.second(self.first(maps) + self.shift(time)[:, :, None, None])


def _waves(times: Tensor, size: int) -> Tensor:
    """float32 [n] in 0..1 -> [n, size]: sines and cosines of times at rates from 1 to 1,000."""
    rates = torch.exp(torch.linspace(0.0, math.log(1000.0), size // 2, device=times.device))
    angles = times[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
