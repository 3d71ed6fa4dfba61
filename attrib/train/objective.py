"""The training loss of the global batch, alignment plus weighted decorrelation, with its state between steps."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attrib.train.all_gather import gather, gather_fixed
from attrib.train.losses import contrastive, decorrelation
from attrib.train.settings import AlignmentSettings, DisentanglementSettings
from attrib.train.student import Student

EMPTY_SLOT = -1  # id of an anchor to ignore


@dataclass(frozen=True)
class TrainBatch:
    """One worker's part of a batch, of the same size on every worker.

    anchors: inputs of n source images; anchor_ids: int64 [n], EMPTY_SLOT for an ignored slot; views: inputs of m views;
    view_sources: int64 [m, 2], ids of content and style donor (-1: none).
    """

    anchors: Tensor
    anchor_ids: Tensor
    views: Tensor
    view_sources: Tensor

    def to(self, device: torch.device) -> "TrainBatch":
        return TrainBatch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


class Objective(nn.Module):
    """Loss of a batch for a student; its state holds the momentum encoder, the queue and the running covariances."""

    def __init__(self, student: Student, aligned: AlignmentSettings, disentangled: DisentanglementSettings):
        super().__init__()
        self.aligned, self.disentangled = aligned, disentangled
        self.slow = None
        if aligned.kind == "moco":
            self.slow = copy.deepcopy(student).requires_grad_(False)
            self.queue = contrastive.MomentumQueue(aligned.queue_rows, sum(student.part_sizes))
        if disentangled.kind == "cor_infomax":
            self.running = nn.ModuleList(decorrelation.RunningCovariance(size) for size in student.part_sizes)

    def forward(self, student: Student, wrapped: nn.Module, batch: TrainBatch) -> Tensor:
        """Return the loss, the same on every worker. wrapped: the student, or DistributedDataParallel around it."""
        anchors, views = (gather(outputs) for outputs in wrapped(batch.anchors, batch.views))
        ids, sources = only_first(gather_fixed(batch.anchor_ids)), gather_fixed(batch.view_sources)
        loss = self._alignment(student, batch, anchors, views, ids, sources)
        if self.disentangled.kind != "none" and self.disentangled.weight:
            loss = loss + self.disentangled.weight * self._disentanglement(student, anchors, views, ids, sources)
        return loss

    def _alignment(self, student: Student, batch: TrainBatch, anchors, views, ids, sources) -> Tensor:
        temperature, roles = self.aligned.temperature, views.new_tensor([1.0, self.aligned.style_weight])
        found = student.embedding(views)
        if self.slow is None:
            return contrastive.info_nce(found, student.embedding(anchors), sources, ids, temperature, roles)
        with torch.no_grad():
            keys = student.embedding(gather_fixed(self.slow.encode(batch.anchors, "real")))
        loss = contrastive.moco(found, keys, sources, ids, self.queue, temperature, roles)
        self.queue.enqueue(keys, ids)
        return loss

    def _disentanglement(self, student: Student, anchors, views, ids, sources) -> Tensor:
        place = {image_id: position for position, image_id in enumerate(ids.tolist()) if image_id != EMPTY_SLOT}
        total = views.new_zeros(())
        for i, (real, synthetic, role) in enumerate(zip(student.parts(anchors), student.parts(views), student.roles)):
            wanted = sources[:, 1 if role == "style" else 0].tolist()
            rows = [(row, place[image_id]) for row, image_id in enumerate(wanted) if image_id in place]
            if rows:  # else no view of the batch has a style donor
                view_rows, anchor_rows = torch.tensor(rows, device=views.device).T
                total = total + self._term(i, real[anchor_rows], synthetic[view_rows])
        return total / len(student.part_sizes)

    def _term(self, part: int, real: Tensor, synthetic: Tensor) -> Tensor:
        """Return the loss per dimension, so that a weight means the same for parts of any size."""
        kind, eps, dim = self.disentangled.kind, self.disentangled.eps, real.shape[1]
        if kind == "gaussian_infomax":
            return decorrelation.gaussian_infomax(real, synthetic, eps) / dim
        if kind == "cor_infomax":
            return decorrelation.cor_infomax(real, synthetic, self.running[part], alpha=1.0, eps=eps)
        return decorrelation.cca_ssg(real, synthetic) / dim

    def after_step(self, student: Student) -> None:
        if self.slow is not None:
            contrastive.momentum_update(self.slow, student, self.aligned.momentum)


def only_first(ids: Tensor) -> Tensor:
    """Return ids int64 [n] with every repetition replaced by EMPTY_SLOT, so that an image is one anchor only."""
    seen: set[int] = set()
    return ids.new_tensor([EMPTY_SLOT if i in seen or seen.add(i) else i for i in ids.tolist()])
