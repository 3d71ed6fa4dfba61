"""Heads: map the feature blocks of a backbone to one vector, a concatenation of parts of unit length.

A part on layout blocks finds sources of content, a part on statistics finds sources of style. All parts have unit
length, so the cosine of two vectors is the mean of the cosines of their parts, and one search finds sources of both
roles.
"""

import torch
import torch.nn.functional as F
from torch import nn

from attrib.models.settings import HeadSettings, PartSettings


class HeadPart(nn.Module):
    """One part of a head: blocks, each projected and L2-normalised, followed by a net.

    `project` is fitted (attrib/train/whitening.py), `net` is trained.
    """

    def __init__(self, settings: PartSettings, sizes: dict[str, tuple[int, int]], head: HeadSettings):
        """sizes: {block: (size before, size after projection)}."""
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
        """Return the input of the net, float32 [n, num_inputs]."""
        return torch.cat([F.normalize(self.project[name](blocks[name]), dim=1) for name in self.blocks], dim=1)


class Head(nn.Module):
    """Maps concatenated feature blocks float32 [n, D] to embeddings float32 [n, d]."""

    def __init__(self, block_sizes: dict[str, int], projected_sizes: dict[str, int], settings: HeadSettings):
        super().__init__()
        self.block_sizes, self.projected_sizes = block_sizes, projected_sizes
        sizes = {block: (size, projected_sizes.get(block, size)) for block, size in block_sizes.items()}
        self.parts = nn.ModuleDict({name: HeadPart(part, sizes, settings) for name, part in settings.parts.items()})

    @property
    def dimension(self) -> int:
        return sum(part.dimension for part in self.parts.values())

    def inputs(self, features: torch.Tensor) -> torch.Tensor:
        """Return the inputs of all nets, independent of trained weights: float32 [n, D] -> [n, sum of num_inputs]."""
        blocks = dict(zip(self.block_sizes, features.split(list(self.block_sizes.values()), dim=1)))
        return torch.cat([part.inputs(blocks) for part in self.parts.values()], dim=1)

    def part_outputs(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of each part, float32 [n, d_part], not normalised."""
        pieces = inputs.split([part.num_inputs for part in self.parts.values()], dim=1)
        return [part.net(piece) for part, piece in zip(self.parts.values(), pieces)]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return join_parts(self.part_outputs(self.inputs(features)))


def join_parts(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return embeddings float32 [n, d]: the L2-normalised parts, concatenated."""
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


def _net(num_inputs: int, num_outputs: int, settings: HeadSettings) -> nn.Module:
    """Return a new net. Linear nets start as the identity, so training starts from the whitening control."""
    if settings.net == "none":
        return nn.Identity()
    linear = nn.Linear(num_inputs, num_outputs)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear if settings.net == "linear" else ResidualMlp(linear, settings.hidden)


class ResidualMlp(nn.Module):
    """Computes linear(x) + outer(gelu(inner(x))); `outer` is initialised with zeros."""

    def __init__(self, linear: nn.Linear, num_hidden: int):
        super().__init__()
        self.linear = linear
        self.inner = nn.Linear(linear.in_features, num_hidden)
        self.outer = nn.Linear(num_hidden, linear.out_features)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.outer(F.gelu(self.inner(x)))
