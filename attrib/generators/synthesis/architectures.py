"""The grid of synthetic generators: small autoencoders whose decoders differ as those of real generators do.

Model Synthesis (arXiv 2307.15977) varies the number of blocks and convolutions, the upsampler, the activation, the norm
and the order of these layers. This grid adds bicubic and pixel-shuffle upsampling, group norm, SiLU and residual
blocks, as in newer decoders. Every decoder ends in a 3x3 convolution to RGB, because the output of ReLU, sigmoid or
instance norm could not reach all colours.
"""

import itertools
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.common.settings import Positive, Settings
from attrib.generators.synthesis.settings import Activation, GridSettings, Norm, Order, Upsampler, Width

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU}
# Instance norm has no parameters, as in the paper.
NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "group": partial(nn.GroupNorm, 4)}
SHORT_ORDERS = {"conv_norm_act": "cna", "norm_act_conv": "nac"}


class DecoderSpec(Settings):
    """One architecture of the grid. width: output channels of the last block; each block before it doubles them."""

    num_blocks: Positive
    convs_per_block: Positive
    upsampler: Upsampler
    activation: Activation
    norm: Norm
    order: Order
    residual: bool = False
    width: Width = 16

    @property
    def name(self) -> str:
        """A distinct file name for each distinct spec."""
        parts = [f"b{self.num_blocks}c{self.convs_per_block}", self.upsampler, self.activation, self.norm]
        parts += [SHORT_ORDERS[self.order], *(["res"] if self.residual else []), f"w{self.width}"]
        return "-".join(parts)


def grid(settings: GridSettings | None = None, width: int = 16) -> list[DecoderSpec]:
    """All architectures of the grid, in a fixed order: 1,600 by default."""
    axes = (settings or GridSettings()).model_dump().values()
    # Both have the same fields in the same order, and DecoderSpec has the width after them.
    return [
        DecoderSpec(**dict(zip(DecoderSpec.model_fields, (*values, width))))
        for values in itertools.product(*map(sorted, axes))
    ]


def sample_specs(
    num: int, seed: int, *, settings: GridSettings | None = None, width: int = 16, first: int = 0
) -> list[DecoderSpec]:
    """Architectures `first` to `first + num` of a random order (by the seed) in which the upsamplers alternate.

    Disjoint ranges share no architecture, and all upsamplers occur equally often. Raises AttribError if the grid has
    too few architectures.
    """
    settings, rng, shuffled = settings or GridSettings(), np.random.default_rng(seed), []
    for family in settings.upsamplers:
        members = grid(settings.model_copy(update={"upsamplers": (family,)}), width)
        shuffled.append([members[i] for i in rng.permutation(len(members))])
    order = [spec for turn in zip(*shuffled) for spec in turn]
    if first + num > len(order):
        raise AttribError(
            f"architectures {first} to {first + num} are requested and the grid has {len(order)}; lower num_models or "
            "first_architecture, raise seeds_per_architecture, or add values to the grid"
        )
    return order[first : first + num]


class Autoencoder(nn.Module):
    """float32 [n, 3, h, w] in 0..1 -> the same shape, not clamped; h and w are multiples of 2 ** num_blocks."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.encoder = Encoder(spec.num_blocks, spec.width)
        widths = [spec.width * 2 ** max(level, 0) for level in range(spec.num_blocks - 1, -2, -1)]
        blocks = [DecoderBlock(spec, before, after) for before, after in zip(widths, widths[1:])]
        to_rgb = nn.Conv2d(spec.width, 3, 3, padding=1)
        nn.init.constant_(to_rgb.bias, 0.5)  # mid grey is a good start
        self.decoder = nn.Sequential(*blocks, to_rgb)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def build_autoencoder(spec: DecoderSpec, seed: int) -> Autoencoder:
    """An untrained autoencoder. Its weights depend on spec and seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(spec)


class Encoder(nn.Module):
    """float32 [n, 3, h, w] -> codes [n, width * 2 ** (num_blocks - 1), h / 2 ** num_blocks, w / 2 ** num_blocks].

    It is the same for all specs with the same num_blocks and width, because only decoders leave traces. With the linear
    path, decoders train in few steps. The nonlinear path (`bent`) passes the brightness to decoders that normalise
    their input; a linear code cannot.
    """

    def __init__(self, num_blocks: int, width: int):
        super().__init__()
        widths = [width * 2**level for level in range(num_blocks)]
        self.linear = nn.Sequential(
            nn.PixelUnshuffle(2**num_blocks), nn.Conv2d(3 * 4**num_blocks, widths[-1], 3, padding=1)
        )
        layers: list[nn.Module] = []
        for before, after in zip([3, *widths], widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        self.bent = nn.Sequential(*layers, nn.Conv2d(widths[-1], widths[-1], 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images) + self.bent(images)


class DecoderBlock(nn.Module):
    """float32 [n, in_channels, h, w] -> [n, out_channels, 2h, 2w]: an upsampler, then convolutions."""

    def __init__(self, spec: DecoderSpec, in_channels: int, out_channels: int):
        super().__init__()
        self.upsample = upsampler(spec.upsampler, in_channels)
        layers: list[nn.Module] = []
        for before in (in_channels, *[out_channels] * (spec.convs_per_block - 1)):
            conv = nn.Conv2d(before, out_channels, 3, padding=1)
            conv_first = spec.order == "conv_norm_act"
            rest = [NORMS[spec.norm](out_channels if conv_first else before)] if spec.norm != "none" else []
            rest += [ACTIVATIONS[spec.activation]()] if spec.activation != "none" else []
            layers += [conv, *rest] if conv_first else [*rest, conv]
        self.convs = nn.Sequential(*layers)
        self.skip = None
        if spec.residual:
            self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, codes: Tensor) -> Tensor:
        codes = self.upsample(codes)
        return self.convs(codes) if self.skip is None else self.convs(codes) + self.skip(codes)


def upsampler(kind: Upsampler, channels: int) -> nn.Module:
    """[n, channels, h, w] -> [n, channels, 2h, 2w]."""
    if kind == "transposed":
        return nn.ConvTranspose2d(channels, channels, 2, stride=2)
    if kind == "pixel_shuffle":
        # 3x3 as in ESPCN (arXiv 1609.05158); a 1x1 kernel would equal the transposed convolution above.
        return nn.Sequential(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
    return nn.Upsample(scale_factor=2, mode=kind, align_corners=None if kind == "nearest" else False)
