"""Heads: from the blocks of a backbone's features to one vector, made of parts of equal length.

A part that reads layout and a part that reads statistics find the content and the style of one and the same picture; side by side, each of
length one, their cosines add, so that a source in either role ranks high by one search.
"""

import torch
import torch.nn.functional as F
from torch import nn

from attrib.models.settings import HeadSettings, PartSettings


class HeadPart(nn.Module):
    """Blocks, each projected and of length one, then a net. `project` is fitted (attrib/train/whitening.py); `net` is what training changes."""

    def __init__(self, settings: PartSettings, sizes: dict[str, tuple[int, int]], head: HeadSettings):
        """sizes: numbers of a block before and after its projection."""
        super().__init__()
        self.blocks, self.role = settings.blocks, settings.role
        identity = head.projection == "identity"
        self.project = nn.ModuleDict(
            {block: nn.Identity() if identity else nn.Linear(*sizes[block]) for block in settings.blocks}
        )
        self.num_inputs = sum(sizes[block][1] for block in settings.blocks)
        self.dimension = self.num_inputs if head.net == "none" else settings.dimension or self.num_inputs
        self.net = _net(self.num_inputs, self.dimension, head)

    def inputs(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the net sees: float32 [n, num_inputs]."""
        return torch.cat([F.normalize(self.project[name](blocks[name]), dim=1) for name in self.blocks], dim=1)


class Head(nn.Module):
    """float32 [n, D], the blocks side by side -> float32 [n, d]."""

    def __init__(self, block_sizes: dict[str, int], projected_sizes: dict[str, int], settings: HeadSettings):
        super().__init__()
        self.block_sizes, self.projected_sizes = block_sizes, projected_sizes
        sizes = {block: (size, projected_sizes.get(block, size)) for block, size in block_sizes.items()}
        self.parts = nn.ModuleDict({name: HeadPart(part, sizes, settings) for name, part in settings.parts.items()})

    @property
    def dimension(self) -> int:
        return sum(part.dimension for part in self.parts.values())

    def inputs(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [n, D] -> float32 [n, sum of num_inputs]: all that does not depend on what is trained."""
        blocks = dict(zip(self.block_sizes, features.split(list(self.block_sizes.values()), dim=1)))
        return torch.cat([part.inputs(blocks) for part in self.parts.values()], dim=1)

    def part_outputs(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Of each part float32 [n, d_part], not normalised."""
        pieces = inputs.split([part.num_inputs for part in self.parts.values()], dim=1)
        return [part.net(piece) for part, piece in zip(self.parts.values(), pieces)]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return join_parts(self.part_outputs(self.inputs(features)))


def join_parts(parts: list[torch.Tensor]) -> torch.Tensor:
    """The embedding, float32 [n, d]: the parts, each of length one, side by side."""
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


def _net(num_inputs: int, num_outputs: int, settings: HeadSettings) -> nn.Module:
    """Linear nets start as the identity on the first outputs, so that training starts from the whitening control."""
    if settings.net == "none":
        return nn.Identity()
    linear = nn.Linear(num_inputs, num_outputs)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear if settings.net == "linear" else ResidualMlp(linear, settings.hidden)


class ResidualMlp(nn.Module):
    """x -> linear(x) + outer(gelu(inner(x))), the second part zero at the start."""

    def __init__(self, linear: nn.Linear, num_hidden: int):
        super().__init__()
        self.linear = linear
        self.inner = nn.Linear(linear.in_features, num_hidden)
        self.outer = nn.Linear(num_hidden, linear.out_features)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.outer(F.gelu(self.inner(x)))
