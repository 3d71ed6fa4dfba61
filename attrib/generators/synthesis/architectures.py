"""The grid of synthetic generators: small autoencoders whose decoders differ as those of real generators do.

Model Synthesis (arXiv 2307.15977) varies the number of blocks and convolutions, upsampler, activation, norm and their order. Every decoder
here ends in a 3x3 convolution to RGB: without it a stack that ends in ReLU, sigmoid or instance norm cannot reach all colours. Added to
the paper's grid are bicubic and pixel-shuffle upsampling, group norm, SiLU and residual blocks, which newer decoders have.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.common.settings import Positive, Settings
from attrib.generators.synthesis.settings import Activation, GridSettings, Norm, Order, Upsampler, Width

UPSAMPLERS: tuple[Upsampler, ...] = GridSettings().upsamplers
NUM_GROUPS = 4  # of group norm
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU}
SHORT_ORDERS = {"conv_norm_act": "cna", "norm_act_conv": "nac"}


class DecoderSpec(Settings):
    """One architecture of the grid. width: channels of a block's output; each block further from the image doubles its input's."""

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
        """Distinct for distinct specs, and fit for a file name."""
        parts = [f"b{self.num_blocks}c{self.convs_per_block}", self.upsampler, self.activation, self.norm]
        parts += [SHORT_ORDERS[self.order], *(["res"] if self.residual else []), f"w{self.width}"]
        return "-".join(parts)


def grid(settings: GridSettings | None = None, width: int = 16) -> list[DecoderSpec]:
    """Every combination in a fixed order; the default settings give 1,600 architectures and PAPER_GRID 288."""
    axes = (settings or GridSettings()).model_dump()
    names = ("num_blocks", "convs_per_block", "upsampler", "activation", "norm", "order", "residual")
    return [
        DecoderSpec(width=width, **dict(zip(names, values)))
        for values in itertools.product(*(sorted(axes[axis]) for axis in GridSettings.model_fields))
    ]


def sample_specs(
    num: int,
    seed: int,
    families: Sequence[Upsampler] = UPSAMPLERS,
    *,
    settings: GridSettings | None = None,
    width: int = 16,
    first: int = 0,
) -> list[DecoderSpec]:
    """Architectures `first` to `first + num` of a seeded order in which the families (upsamplers) take turns.

    So ranges that do not overlap share no architecture, and each holds its families in equal parts. Raises AttribError if the grid ends
    before.
    """
    settings = settings or GridSettings()
    families = [family for family in settings.upsamplers if family in families]
    rng = np.random.default_rng(seed)
    shuffled = []
    for family in families:
        members = grid(settings.model_copy(update={"upsamplers": (family,)}), width)
        shuffled.append([members[i] for i in rng.permutation(len(members))])
    order = [spec for turn in zip(*shuffled) for spec in turn]
    if first + num > len(order):
        raise AttribError(
            f"architectures {first} to {first + num} were asked for and the grid has {len(order)}; ask for fewer (with more "
            "seeds_per_architecture there are as many models) or widen the grid"
        )
    return order[first : first + num]


class Autoencoder(nn.Module):
    """float32 [n, 3, h, w] in 0..1 -> the same shape, not clamped; h and w are multiples of 2 ** num_blocks."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.encoder = Encoder(spec.num_blocks, spec.width)
        self.decoder = _decoder(spec)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def build_autoencoder(spec: DecoderSpec, seed: int) -> Autoencoder:
    """With `.encoder` and `.decoder`, as they start; the same weights for the same seed, whatever else draws random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(spec)


class Encoder(nn.Module):
    """float32 [n, 3, h, w] -> codes [n, width * 2 ** (num_blocks - 1), h / 2 ** num_blocks, w / 2 ** num_blocks].

    The same for all specs of one depth: only decoders leave traces. The linear part lets decoders train in few steps; the other part
    can tell those that norm their codes how bright the picture is, which no linear code can.
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


def _decoder(spec: DecoderSpec) -> nn.Sequential:
    widths = [spec.width * 2 ** max(level, 0) for level in range(spec.num_blocks - 1, -2, -1)]
    blocks = [DecoderBlock(spec, before, after) for before, after in zip(widths, widths[1:])]
    return nn.Sequential(*blocks, to_rgb(spec.width))


class DecoderBlock(nn.Module):
    """float32 [n, in_channels, h, w] -> [n, out_channels, 2h, 2w]: an upsampler, then convolutions with norm and activation."""

    def __init__(self, spec: DecoderSpec, in_channels: int, out_channels: int):
        super().__init__()
        self.upsample = upsampler(spec.upsampler, in_channels)
        layers = []
        for before in (in_channels, *[out_channels] * (spec.convs_per_block - 1)):
            conv = nn.Conv2d(before, out_channels, 3, padding=1)
            if spec.order == "conv_norm_act":
                layers += [conv, *norm(spec.norm, out_channels), *activation(spec.activation)]
            else:
                layers += [*norm(spec.norm, before), *activation(spec.activation), conv]
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
        # 3x3 as in ESPCN (arXiv 1609.05158): with 1x1 it would be the transposed convolution above.
        return nn.Sequential(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
    return nn.Upsample(scale_factor=2, mode=kind, align_corners=None if kind == "nearest" else False)


def norm(kind: Norm, channels: int) -> list[nn.Module]:
    """No module or one. Instance norm has no parameters, as in the paper; batch and group norm have."""
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "instance":
        return [nn.InstanceNorm2d(channels)]
    return [nn.GroupNorm(NUM_GROUPS, channels)] if kind == "group" else []


def activation(kind: Activation) -> list[nn.Module]:
    return [] if kind == "none" else [ACTIVATIONS[kind]()]


def to_rgb(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, 3, 3, padding=1)
    nn.init.constant_(conv.bias, 0.5)  # mid grey: training need not begin by finding it
    return conv
