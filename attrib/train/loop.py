"""The training loop: steps, an unsupervised criterion after every epoch, early stopping, and a state to resume from.

The criterion is the mean reciprocal rank at which views of held-out source images find their content and their style
donor among all source images. It needs no generated images and no labels.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.train.objective import EMPTY_SLOT, Objective, TrainBatch
from attrib.train.settings import TrainSettings
from attrib.train.student import Student

CRITERION_ROWS = 1024  # views compared at a time, to limit memory


class TrainBatches(Protocol):
    """Source of batches: InputBatches (attrib/train/batches.py) or PixelBatches (attrib/train/pixel_batches.py)."""

    @property
    def num_steps(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[TrainBatch]: ...

    def criterion(self, student: Student) -> float: ...


class TrainRun:
    """A training run and its state. wrapped: the student within DistributedDataParallel, if used."""

    def __init__(
        self,
        student: Student,
        settings: TrainSettings,
        optimiser: torch.optim.Optimizer,
        num_steps: int,
        device: torch.device,
        wrapped: nn.Module | None = None,
    ):
        self.student, self.optimiser, self.settings, self.device = student, optimiser, settings.optimiser, device
        self.objective = Objective(student, settings.alignment, settings.disentanglement).to(device)
        self.wrapped = wrapped or student
        total = self.settings.num_epochs * num_steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: rate(step, total, self.settings.warmup_share)
        )
        self.history: list[dict] = []  # per epoch: epoch, loss, criterion
        self.best: dict[str, Tensor] = _trained_state(student)

    def train(self, batches: TrainBatches, on_epoch: Callable[["TrainRun"], None]) -> None:
        """Train to the last epoch, or until the criterion stops rising, and load the best weights.

        Calls on_epoch after every epoch and before the first. Raises AttribError if the loss is not finite.
        """
        if not self.history:
            self._note(-1, None, batches.criterion(self.student))
            on_epoch(self)
        while not self.is_finished:
            epoch = len(self.history) - 1
            total = 0.0
            for batch in batches.epoch(epoch):
                total += self._step(batch.to(self.device))
            if not math.isfinite(total):
                raise AttribError(f"the loss is not finite in epoch {epoch}; lower optimiser.learning_rate")
            self._note(epoch, total / batches.num_steps, batches.criterion(self.student))
            on_epoch(self)
        self.student.load_state_dict(self.best, strict=False)

    def _step(self, batch: TrainBatch) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.objective(self.student, self.wrapped, batch)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.objective.after_step(self.student)
        return float(loss.detach())

    def _note(self, epoch: int, loss: float | None, criterion: float) -> None:
        if criterion > max((row["criterion"] for row in self.history), default=-math.inf):
            self.best = _trained_state(self.student)
        self.history.append({"epoch": epoch, "loss": loss, "criterion": criterion})

    @property
    def is_finished(self) -> bool:
        best = max(range(len(self.history)), key=lambda i: self.history[i]["criterion"])
        since_best = len(self.history) - 1 - best
        return len(self.history) > self.settings.num_epochs or since_best >= self.settings.patience_epochs

    def progress(self) -> str:
        last, best = self.history[-1], max(row["criterion"] for row in self.history)
        epoch = f"epoch {last['epoch'] + 1} of at most {self.settings.num_epochs}"
        loss = "-" if last["loss"] is None else f"{last['loss']:.4f}"
        return f"train: {epoch}  loss {loss}  criterion {last['criterion']:.4f} (best {best:.4f})"

    def state(self) -> dict:
        """Return tensors and plain values only, so that torch.load(weights_only=True) reads the state."""
        return {
            "student": _trained_state(self.student),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "history": self.history,
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        self.student.load_state_dict(state["student"], strict=False)
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        # Not the schedule's state_dict, which would need its lambda; the learning rates are in the optimiser's state.
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.history, self.best = list(state["history"]), state["best"]


def rate(step: int, num_steps: int, warmup_share: float) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then half a cosine to zero."""
    warmup = warmup_share * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / max(1.0, num_steps - warmup))) / 2


def _trained_state(student: Student) -> dict[str, Tensor]:
    """Return the parameters that training changes; checkpoints do not repeat a frozen backbone."""
    return {name: value.detach().clone() for name, value in student.named_parameters() if value.requires_grad}


@torch.no_grad()
def mean_reciprocal_rank(views: Tensor, anchors: Tensor, view_sources: Tensor, anchor_ids: Tensor) -> float:
    """Return the mean reciprocal rank, by cosine, of the views' sources among the anchors; 0 if none has a source.

    Averaged over views, then over the roles content and donor. A view's source of the other role is not ranked. In a
    tie the true source ranks last.

    views: float [m, d]; anchors: float [n, d]; view_sources: int64 [m, 2], -1 for none; anchor_ids: int64 [n],
    EMPTY_SLOT for an ignored slot.
    """
    filled = anchor_ids != EMPTY_SLOT
    anchors, anchor_ids = F.normalize(anchors[filled], dim=1), anchor_ids[filled]
    found: list[list[Tensor]] = [[], []]
    for start in range(0, len(views), CRITERION_ROWS):
        similarity = F.normalize(views[start : start + CRITERION_ROWS], dim=1) @ anchors.T
        sources = view_sources[start : start + CRITERION_ROWS]
        shown = sources[:, :, None] == anchor_ids  # [m, 2, n]
        for role in (0, 1):
            used = shown[:, role].any(dim=1)
            mine, other = shown[used, role], shown[used, 1 - role] & ~shown[used, role]
            best = similarity[used].masked_fill(~mine, -torch.inf).amax(dim=1, keepdim=True)
            above = (similarity[used] >= best) & ~mine & ~other
            found[role].append(1 / (1 + above.sum(dim=1)).double())
    means = [torch.cat(ranks).mean() for ranks in found if sum(map(len, ranks))]
    return float(torch.stack(means).mean()) if means else 0.0
