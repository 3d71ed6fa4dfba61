"""Batches of precomputed inputs: the views and anchors of each step, the same global batch for any number of
workers."""

from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Inputs:
    """Inputs of the nets of a head. anchors: float [n, p] of source images with ids int64 [n], ascending; views: float
    [m, p] with view_sources int64 [m, 2], ids of content and donor (-1: none)."""

    anchors: Tensor
    anchor_ids: Tensor
    views: Tensor
    view_sources: Tensor


def is_validation(image_ids: np.ndarray, share: float) -> np.ndarray:
    """bool [n]: a random share of the images, by id alone, whose views validate the model and never train it."""
    return sampling_rank(image_ids) < np.uint64(share * 2**63) * np.uint64(2)


class InputBatches:
    """Batches shuffled by seed and epoch. Views of validation images, or with such a donor, are not trained on."""

    def __init__(self, inputs: Inputs, settings: OptimiserSettings, seed: int, rank: int, num_workers: int):
        """Raises AttribError for too few views for one batch, or a batch size that the workers do not divide evenly."""
        self.inputs, self.settings, self.seed, self.rank, self.num_workers = inputs, settings, seed, rank, num_workers
        if settings.batch_size % num_workers:
            raise AttribError(
                f"optimiser.batch_size {settings.batch_size} does not divide among {num_workers} workers; choose a "
                "multiple"
            )
        sources = inputs.view_sources.numpy()
        held_out = is_validation(sources, settings.validation_share) & (sources >= 0)
        self.training_rows = torch.from_numpy(np.flatnonzero(~held_out.any(axis=1)))
        self.validation_rows = torch.from_numpy(np.flatnonzero(held_out[:, 0]))
        if len(self.training_rows) < settings.batch_size or not len(self.validation_rows):
            raise AttribError(
                f"{len(self.training_rows):,} views to train on and {len(self.validation_rows):,} to validate are "
                "too few for batches "
                f"of {settings.batch_size}; lower optimiser.batch_size, raise views_per_image, or give more images"
            )

    @property
    def num_steps(self) -> int:
        return len(self.training_rows) // self.settings.batch_size

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        generator = torch.Generator().manual_seed(view_seed(self.seed, epoch, 0))
        shuffled = self.training_rows[torch.randperm(len(self.training_rows), generator=generator)]
        size, mine = self.settings.batch_size, self.settings.batch_size // self.num_workers
        for step in range(self.num_steps):
            yield self._batch(shuffled[step * size + self.rank * mine :][:mine])

    def _batch(self, rows: Tensor) -> TrainBatch:
        sources = self.inputs.view_sources[rows]
        ids = sources.T.flatten()  # contents, then donors: two slots per view, so that all workers gather as many
        places = torch.searchsorted(self.inputs.anchor_ids, ids.clamp_min(0)).clamp_max(len(self.inputs.anchor_ids) - 1)
        known = self.inputs.anchor_ids[places] == ids
        return TrainBatch(
            self.inputs.anchors[places].float(),
            torch.where(known, ids, EMPTY_SLOT),
            self.inputs.views[rows].float(),
            sources,
        )

    @torch.no_grad()
    def criterion(self, student: Student) -> float:
        """Mean reciprocal rank of the validation views. Every worker computes all of it, so that all stop together."""
        views, anchors = self.validation_embeddings(student)
        device = views.device
        sources, ids = self.inputs.view_sources[self.validation_rows].to(device), self.inputs.anchor_ids.to(device)
        return mean_reciprocal_rank(views, anchors, sources, ids)

    @torch.no_grad()
    def validation_embeddings(self, student: Student) -> tuple[Tensor, Tensor]:
        """float32 [m, d] of the held-out views and [n, d] of all anchors, on the student's device."""
        device = next(student.parameters()).device
        views = student.encode(self.inputs.views[self.validation_rows].float().to(device), "synthetic")
        anchors = student.encode(self.inputs.anchors.float().to(device), "real")
        return student.embedding(views), student.embedding(anchors)


def shares_of_views(student: Student, batches: InputBatches, top_k: int = TOP_K) -> dict:
    """{"inverse_temperature", "offset", "held_out": Reliability as a dict, "construction"}.

    Fitted on all views of held-out images against all source images; its reliability is that of a calibrator fitted on
    the views of one half of these images and measured on those of the other, each way.
    """
    inputs, rows = batches.inputs, batches.validation_rows
    views, anchors = (vectors.cpu().numpy() for vectors in batches.validation_embeddings(student))
    sources = inputs.view_sources[rows].numpy()
    similarity, is_true = pairs_from_corpus(views, anchors, sources, inputs.anchor_ids.numpy(), top_k)
    half = np.array([view_seed(0, int(image_id), 0) % 2 == 0 for image_id in sources[:, 0]])
    shares = np.zeros(similarity.shape)
    for mine in (half, ~half):
        if mine.any() and is_true[~mine].any():
            shares[mine] = soft_shares(similarity[mine], fit_shares(similarity[~mine], is_true[~mine]))
    fitted = fit_shares(similarity, is_true)
    return fitted.model_dump() | {
        "construction": f"{len(rows)} views of {len(np.unique(sources[:, 0]))} held-out images, top "
        f"{similarity.shape[1]}",
        "held_out": reliability(shares, is_true).to_dict(),
    }
