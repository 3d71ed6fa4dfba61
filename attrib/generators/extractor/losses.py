"""How the extractor is taught: which images meet in a batch, and the losses on their embeddings.

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


def supervised_contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The loss L_out of Khosla et al. (arXiv 2004.11362, equation 2), averaged over the rows that have a positive; 0 if none has.

    embeddings: float32 [n, d] of length one; labels: int64 [n]. With several workers both are those of the global batch (attrib.train.all_gather).
    """
    similarity = embeddings @ embeddings.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~itself
    log_share = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
    num_positives = positive.sum(dim=1)
    of_row = -(log_share * positive).sum(dim=1) / num_positives.clamp(min=1)
    has_positive = num_positives > 0
    return (of_row * has_positive).sum() / has_positive.sum().clamp(min=1)


def classification(embeddings: Tensor, prototypes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Cross-entropy of scaled cosines. embeddings: float32 [n, d] of length one; prototypes: float32 [m, d]; labels: int64 [n] below m."""
    return F.cross_entropy(scale * embeddings @ F.normalize(prototypes, dim=1).T, labels)
