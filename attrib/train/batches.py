"""Batches for training a head on inputs that were computed before.

A batch consists of views and anchors. Anchors are the source images that the views are compared with. The global batch
is the same for any number of workers.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from attrib.common.errors import AttribError
from attrib.data.ids import sampling_rank
from attrib.shares.calibration import fit_shares, pairs_from_corpus, reliability
from attrib.shares.shares import soft_shares
from attrib.train.augment.views import view_seed
from attrib.train.loop import mean_reciprocal_rank
from attrib.train.objective import EMPTY_SLOT, Student, TrainBatch
from attrib.train.settings import OptimiserSettings

TOP_K = 10


class Inputs(TrainBatch):
    """Inputs of the nets of a head, float [n, p] and [m, p], for all images and views; anchor_ids ascend."""


def is_validation(image_ids: np.ndarray, share: float) -> np.ndarray:
    """Return bool [n]: a random share of the images, chosen by id, whose views validate the model only."""
    return sampling_rank(image_ids) < np.uint64(share * 2**63) * np.uint64(2)


class InputBatches:
    """Batches shuffled by seed and epoch. Views with a validation image as content or donor are not trained on.

    Raises AttribError if there are too few views for a batch, or none to validate with.
    """

    def __init__(self, inputs: Inputs, settings: OptimiserSettings, seed: int, rank: int, num_workers: int):
        self.inputs, self.settings, self.seed, self.rank, self.num_workers = inputs, settings, seed, rank, num_workers
        sources = inputs.view_sources.numpy()
        held_out = is_validation(sources, settings.validation_share) & (sources >= 0)
        self.training_rows = torch.from_numpy(np.flatnonzero(~held_out.any(axis=1)))
        self.validation_rows = torch.from_numpy(np.flatnonzero(held_out[:, 0]))
        if not len(self.validation_rows):
            raise AttribError("no image is held out for validation; raise optimiser.validation_share or add images")
        if len(self.training_rows) < settings.batch_size:
            raise AttribError(
                f"{len(self.training_rows):,} views to train on are too few for optimiser.batch_size "
                f"{settings.batch_size}; lower it, raise views_per_image, or give more images"
            )

    @property
    def num_steps(self) -> int:
        return len(self.training_rows) // self.settings.batch_size

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        generator = torch.Generator().manual_seed(view_seed(self.seed, epoch, 0))
        shuffled = self.training_rows[torch.randperm(len(self.training_rows), generator=generator)]
        size, mine = self.settings.batch_size, self.settings.batch_size // self.num_workers
        anchor_ids = self.inputs.anchor_ids
        for step in range(self.num_steps):
            rows = shuffled[step * size + self.rank * mine :][:mine]
            sources = self.inputs.view_sources[rows]
            ids = sources.T.flatten()  # contents, then donors: two slots per view, the same number on all workers
            places = torch.searchsorted(anchor_ids, ids.clamp_min(0)).clamp_max(len(anchor_ids) - 1)
            ids = torch.where(anchor_ids[places] == ids, ids, EMPTY_SLOT)
            yield TrainBatch(self.inputs.anchors[places].float(), ids, self.inputs.views[rows].float(), sources)

    @torch.no_grad()
    def criterion(self, student: Student) -> float:
        """Return the mean reciprocal rank of all validation views. Every worker gets it, so that all stop together."""
        views, anchors = self.validation_embeddings(student)
        sources, ids = self.inputs.view_sources[self.validation_rows], self.inputs.anchor_ids
        return mean_reciprocal_rank(views, anchors, sources.to(views.device), ids.to(views.device))

    @torch.no_grad()
    def validation_embeddings(self, student: Student) -> tuple[Tensor, Tensor]:
        """Return float32 [m, d] of the validation views and [n, d] of all anchors, on the student's device."""
        device = next(student.parameters()).device
        views = student.encode(self.inputs.views[self.validation_rows].float().to(device), "synthetic")
        anchors = student.encode(self.inputs.anchors.float().to(device), "real")
        return student.embedding(views), student.embedding(anchors)


def shares_of_views(student: Student, batches: InputBatches) -> dict:
    """Return a calibrator of shares fitted without pairs, on the validation views, whose sources are known.

    {"inverse_temperature", "offset", "held_out": Reliability as a dict, "construction"}. The reliability is
    cross-validated: fitted on the views of one half of the images, measured on the other half, both ways.
    """
    inputs, rows = batches.inputs, batches.validation_rows
    views, anchors = (vectors.cpu().numpy() for vectors in batches.validation_embeddings(student))
    sources = inputs.view_sources[rows].numpy()
    similarity, is_true = pairs_from_corpus(views, anchors, sources, inputs.anchor_ids.numpy(), TOP_K)
    half = np.array([view_seed(0, int(image_id), 0) % 2 == 0 for image_id in sources[:, 0]])
    shares = np.zeros(similarity.shape)
    for mine in (half, ~half):
        if mine.any() and is_true[~mine].any():
            shares[mine] = soft_shares(similarity[mine], fit_shares(similarity[~mine], is_true[~mine]))
    num_images, top_k = len(np.unique(sources[:, 0])), similarity.shape[1]
    return fit_shares(similarity, is_true).model_dump() | {
        "construction": f"{len(rows)} views of {num_images} held-out images, top {top_k}",
        "held_out": reliability(shares, is_true).to_dict(),
    }
