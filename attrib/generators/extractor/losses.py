"""Composition of the extractor's batches, and its classification loss.

A batch is P models x K images: with thousands of models, a batch of random images would hold almost no two of one model. In a share of the
batches all models show the same K photographs, so that content tells none of them apart and only their traces can.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.common.errors import AttribError


@dataclass(frozen=True, eq=False)
class Draw:
    """One batch. models: int64 [P], all different; images: int64 [P, K], positions among a model's images, different within each row."""

    models: Tensor
    images: Tensor
    same_content: bool  # all rows of `images` are equal


def draw_batch(
    num_models: int,
    num_images: int,
    models_per_batch: int,
    images_per_model: int,
    same_content_share: float,
    generator: torch.Generator,
) -> Draw:
    """A batch of models_per_batch x images_per_model, of num_models models that show the same num_images photographs in the same order.

    Raises as `check_batch`.
    """
    check_batch(num_models, num_images, models_per_batch, images_per_model)
    models = torch.randperm(num_models, generator=generator)[:models_per_batch]
    same_content = bool(torch.rand((), generator=generator) < same_content_share)
    num_rows = 1 if same_content else models_per_batch
    order = torch.rand(num_rows, num_images, generator=generator).argsort(dim=1, stable=True)
    return Draw(models, order[:, :images_per_model].expand(models_per_batch, -1), same_content)


def check_batch(num_models: int, num_images: int, models_per_batch: int, images_per_model: int) -> None:
    """Raises AttribError if there are fewer models or images than one batch takes."""
    if num_models < models_per_batch or num_images < images_per_model:
        raise AttribError(
            f"a batch takes {models_per_batch} models and {images_per_model} images of each, but {num_models} and {num_images} are there; "
            "lower contrast.models_per_batch or contrast.images_per_model, or make a larger pool"
        )


def classification(embeddings: Tensor, prototypes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Cross-entropy of scaled cosines. embeddings: float32 [n, d] of length one; prototypes: float32 [m, d]; labels: int64 [n] below m."""
    return F.cross_entropy(scale * embeddings @ F.normalize(prototypes, dim=1).T, labels)
