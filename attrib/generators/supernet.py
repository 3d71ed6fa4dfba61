"""One decoder that holds many: the supernet of OFA (AAAI 2026), the alternative to a pool of models trained one by one.

At every step a path is drawn: how deep the code lies, and per level an upsampler and one or two sub-blocks of convolution, norm and
activation in some order. All paths share the weights of what they pass. A virtual model is one path, fixed: it costs no training of its own,
and differs from the others by its architecture alone.
"""

import copy
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from attrib.errors import AttribError
from attrib.generators.architectures import activation, norm, to_rgb, upsampler
from attrib.generators.synthesis import draw_batches, one_thread
from attrib.generators.synthesis_settings import Activation, GridSettings, Norm, SupernetSettings, Upsampler
from attrib.settings import Settings

Parts = Literal["cna", "can", "nca", "nac", "acn", "anc"]  # in which order convolution, norm and activation come
PARTS: tuple[Parts, ...] = ("cna", "can", "nca", "nac", "acn", "anc")
MAX_SUB_BLOCKS = 2
MAX_GRADIENT_NORM = 1.0  # a path drawn for the first time can have a gradient many times the usual
CALIBRATION_BATCHES = 16
MAX_DRAWS_PER_PATH = 100


class SubBlock(Settings):
    parts: Parts
    activation: Activation
    norm: Norm


class LevelPath(Settings):
    upsampler: Upsampler
    sub_blocks: tuple[SubBlock, ...] = Field(min_length=1, max_length=MAX_SUB_BLOCKS)


class DecoderPath(Settings):
    """A virtual model's way through the supernet; levels: from the code to the image, each doubles the size."""

    levels: tuple[LevelPath, ...] = Field(min_length=1)

    @property
    def name(self) -> str:
        """Distinct for distinct paths."""
        return "_".join(
            "-".join([level.upsampler, *(f"{b.parts}.{b.activation}.{b.norm}" for b in level.sub_blocks)])
            for level in self.levels
        )


class Supernet(nn.Module):
    """width: channels of every level. Encoder and decoder take one way out of many at each call."""

    def __init__(self, width: int, num_levels: int):
        super().__init__()
        widths = [3, *[width] * num_levels]
        self.encoder = nn.ModuleList(_halve(before, after) for before, after in zip(widths, widths[1:]))
        self.code = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(num_levels))
        self.decoder = nn.ModuleList(SupernetLevel(width) for _ in range(num_levels))
        self.to_rgb = to_rgb(width)

    def forward(self, images: Tensor, path: DecoderPath) -> Tensor:
        """float32 [n, 3, h, w] in 0..1 -> the same shape, not clamped; h and w are multiples of 2 ** len(path.levels)."""
        depth = len(path.levels)
        codes = images
        for halve in self.encoder[:depth]:
            codes = halve(codes)
        codes = self.code[depth - 1](codes)
        for level, chosen in zip(self.decoder[len(self.decoder) - depth :], path.levels):
            codes = level(codes, chosen)
        return self.to_rgb(codes)

    @staticmethod
    def sizes_of(state: dict[str, Tensor], prefix: str = "") -> tuple[int, int]:
        """width and num_levels of the supernet that has this state."""
        num_levels = len({name for name in state if name.startswith(f"{prefix}code.") and name.endswith(".weight")})
        return state[f"{prefix}to_rgb.weight"].shape[1], num_levels


def _halve(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())


class SupernetLevel(nn.Module):
    """float32 [n, width, h, w] -> [n, width, 2h, 2w] by the chosen upsampler and sub-blocks; a convolution is shared by all orders."""

    def __init__(self, width: int):
        super().__init__()
        kinds = GridSettings()
        self.upsamplers = nn.ModuleDict({kind: upsampler(kind, width) for kind in kinds.upsamplers})
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(MAX_SUB_BLOCKS))
        self.norms = nn.ModuleList(
            nn.ModuleDict({kind: nn.Sequential(*norm(kind, width)) for kind in kinds.norms})
            for _ in range(MAX_SUB_BLOCKS)
        )
        self.activations = nn.ModuleDict({kind: nn.Sequential(*activation(kind)) for kind in kinds.activations})

    def forward(self, codes: Tensor, path: LevelPath) -> Tensor:
        codes = self.upsamplers[path.upsampler](codes)
        for conv, norms, block in zip(self.convs, self.norms, path.sub_blocks):
            parts = {"c": conv, "n": norms[block.norm], "a": self.activations[block.activation]}
            for part in block.parts:
                codes = parts[part](codes)
        return codes


class PathAutoencoder(nn.Module):
    """A virtual model. float32 [n, 3, h, w] in 0..1 -> the same shape, not clamped."""

    def __init__(self, supernet: Supernet, path: DecoderPath):
        super().__init__()
        self.supernet, self.path = supernet, path

    def forward(self, images: Tensor) -> Tensor:
        return self.supernet(images, self.path)


def draw_path(grid: GridSettings, num_levels: int, rng: np.random.Generator) -> DecoderPath:
    """A path of 1 to num_levels levels. Of the grid it has the upsamplers, activations and norms."""

    def one_of(values):
        return values[rng.integers(len(values))]

    return DecoderPath(
        levels=[
            LevelPath(
                upsampler=one_of(grid.upsamplers),
                sub_blocks=[
                    SubBlock(parts=one_of(PARTS), activation=one_of(grid.activations), norm=one_of(grid.norms))
                    for _ in range(rng.integers(1, MAX_SUB_BLOCKS + 1))
                ],
            )
            for _ in range(rng.integers(1, num_levels + 1))
        ]
    )


def draw_paths(num: int, grid: GridSettings, num_levels: int, seed: int) -> list[DecoderPath]:
    """Distinct paths, the same for the same seed. Raises AttribError if the grid is too small for so many."""
    rng = np.random.default_rng(seed)
    paths: dict[DecoderPath, None] = {}
    for _ in range(num * MAX_DRAWS_PER_PATH):
        paths[draw_path(grid, num_levels, rng)] = None
        if len(paths) == num:
            return list(paths)
    raise AttribError(f"{len(paths)} distinct paths were found, {num} asked for; lower num_models or widen the grid")


def train_supernet(
    training: Tensor, grid: GridSettings, width: int, settings: SupernetSettings, seed: int, device: str = "cpu"
) -> tuple[Supernet, list[float]]:
    """A supernet on the CPU and the loss of each step; training: uint8 [m, 3, px, px]. On a CPU the same arguments give the same bits."""
    rng = np.random.default_rng(seed)
    with one_thread():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            supernet = Supernet(width, settings.num_levels)
        supernet.to(device, memory_format=torch.channels_last).train()
        batches = draw_batches(training.to(device), settings.batch_size, settings.crop_px, seed)
        optimiser = torch.optim.Adam(supernet.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.num_steps)
        losses = []
        for _ in range(settings.num_steps):
            batch = next(batches)
            loss = F.mse_loss(supernet(batch, draw_path(grid, settings.num_levels, rng)), batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(supernet.parameters(), MAX_GRADIENT_NORM)
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
    return supernet.eval().to("cpu"), torch.stack(losses).tolist()


def virtual_model(supernet: Supernet, path: DecoderPath, batches: Iterator[Tensor]) -> PathAutoencoder:
    """A model of its own, in eval mode, whose batch norms have the statistics of this path; batches: of training photographs."""
    model = PathAutoencoder(copy.deepcopy(supernet), path)
    if any(block.norm == "batch" for level in path.levels for block in level.sub_blocks):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the mean over all calibration batches
        model.train()
        with one_thread(), torch.no_grad():
            for _ in range(CALIBRATION_BATCHES):
                model(next(batches))
    return model.eval()
