"""The training loop: the criterion, early stopping, the learning rate, learning, and resumed runs."""

import copy
import io
import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.training import train_settings
from torch import nn

from attrib.common.errors import AttribError
from attrib.data.ids import image_ids
from attrib.models.heads import Head
from attrib.models.settings import HeadSettings
from attrib.train import loop
from attrib.train.batches import InputBatches, Inputs
from attrib.train.loop import TrainRun, mean_reciprocal_rank, rate
from attrib.train.settings import AlignmentSettings, DisentanglementSettings, TrainSettings
from attrib.train.student import HeadTrunk, Student, trained_groups

CPU = torch.device("cpu")
SIGNAL, NUISANCE = 4, 8  # dimensions that a view shares with its content, and those that it does not
DIM = SIGNAL + NUISANCE
NUM_IMAGES, VIEWS_EACH = 120, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(aligned: dict | None = None, disentangled: dict | None = None, **optimiser) -> TrainSettings:
    return train_settings(
        alignment={"temperature": 0.1, "queue_rows": 128, "momentum": 0.9} | (aligned or {}),
        disentanglement={"weight": 0.1} | (disentangled or {}),
        optimiser={"num_epochs": 6, "batch_size": 32, "learning_rate": 0.02, "validation_share": 0.2} | optimiser,
    )


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Return views near their content in a few directions, and far from it in directions of larger variance."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.from_numpy(np.sort(image_ids("c", [str(i) for i in range(NUM_IMAGES)])))
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    anchors = torch.randn(NUM_IMAGES, DIM, generator=generator)
    content = torch.arange(NUM_IMAGES).repeat_interleave(VIEWS_EACH)
    views = torch.randn(len(content), DIM, generator=generator)
    views[:, :SIGNAL] = anchors[content, :SIGNAL] + 0.1 * views[:, :SIGNAL]
    for rows in (anchors, views):
        rows[:, SIGNAL:] *= 3
    sources = torch.stack([ids[content], torch.full_like(content, -1)], dim=1)
    return Inputs((anchors @ rotation).half(), ids, (views @ rotation).half(), sources)


def student_of(seed: int = 0) -> Student:
    head = Head({"pooled": DIM}, {}, HeadSettings(projection="identity"))
    if seed:  # the net starts as the identity
        torch.manual_seed(seed)
        nn.init.normal_(head.parts["all"].net.weight)
    return Student(HeadTrunk(nn.ModuleDict({"real": head})), head)


def run_of(settings: TrainSettings, num_steps: int, seed: int = 0) -> TrainRun:
    student = student_of(seed)
    optimiser = torch.optim.AdamW(trained_groups(student, settings), weight_decay=settings.optimiser.weight_decay)
    return TrainRun(student, settings, optimiser, num_steps, CPU)


def batches_of(inputs: Inputs, settings: TrainSettings) -> InputBatches:
    return InputBatches(inputs, settings.optimiser, seed=0, rank=0, num_workers=1)


def train(inputs: Inputs, settings: TrainSettings) -> TrainRun:
    batches = batches_of(inputs, settings)
    run = run_of(settings, batches.num_steps)
    run.train(batches, on_epoch=lambda _: None)
    return run


class Scripted:
    """Batches of fixed inputs with a given criterion per epoch; records the weights at each criterion."""

    num_steps = 2

    def __init__(self, inputs: Inputs, settings: TrainSettings, criteria: list[float]):
        self.batches = batches_of(inputs, settings)
        self.criteria, self.judged, self.epochs = criteria, [], []

    def epoch(self, epoch):
        self.epochs.append(epoch)
        steps = self.batches.epoch(epoch)
        return (next(steps) for _ in range(self.num_steps))

    def criterion(self, student):
        self.judged.append(copy.deepcopy(student.state_dict()))
        return self.criteria[len(self.judged) - 1]


def scripted(inputs, criteria: list[float], **optimiser) -> tuple[TrainRun, Scripted]:
    settings = settings_of(**optimiser)
    batches = Scripted(inputs, settings, criteria)
    run = run_of(settings, batches.num_steps)
    run.train(batches, on_epoch=lambda _: None)
    return run, batches


def same_weights(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The criterion


def slow_mean_reciprocal_rank(views, anchors, view_sources, anchor_ids) -> float:
    """Return the criterion, one pair at a time."""
    cosines_of = (F.normalize(views, dim=1) @ F.normalize(anchors, dim=1).T).tolist()
    ids = anchor_ids.tolist()
    means = []
    for role in (0, 1):
        ranks = []
        for cosine, sources in zip(cosines_of, view_sources.tolist()):
            if sources[role] not in ids or sources[role] < 0:
                continue
            shown = {i: [c for c, a in zip(cosine, ids) if a == i] for i in set(ids) - {-1}}
            best = max(shown[sources[role]])
            others = [c for i, cosines in shown.items() if i not in sources for c in cosines]
            ranks.append(1 / (1 + sum(c >= best for c in others)))
        if ranks:
            means.append(np.mean(ranks))
    return float(np.mean(means)) if means else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_criterion_equals_a_slow_oracle(seed):
    generator = torch.Generator().manual_seed(seed)
    # Unit rows with exact products, so that there are many ties. Every third image has two anchors.
    halves = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 4)
    rows = torch.cat([torch.eye(4), -torch.eye(4), halves])
    anchors, views = (rows[torch.randint(len(rows), (n,), generator=generator)] for n in (16, 40))
    anchor_ids = torch.arange(16) % 12
    anchor_ids[torch.randperm(16, generator=generator)[:3]] = -1  # empty slots
    sources = torch.randint(-1, 15, (40, 2), generator=generator)  # 12 to 14: no anchor; some with content = donor
    found = mean_reciprocal_rank(views, anchors, sources, anchor_ids)
    assert found == pytest.approx(slow_mean_reciprocal_rank(views, anchors, sources, anchor_ids), abs=1e-12)
    assert 0.05 < found < 0.95


def test_collapsed_embedding_has_the_lowest_criterion():
    same = torch.ones(20, 3)
    sources = torch.stack([torch.arange(20), torch.full((20,), -1)], dim=1)
    assert mean_reciprocal_rank(same, same, sources, torch.arange(20)) == pytest.approx(1 / 20)


def test_criterion_is_one_if_all_sources_are_found_and_zero_without_sources():
    anchors = torch.eye(6)
    sources = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6], dim=1)
    # The nearest anchor is the donor, which does not count when the content is ranked.
    views = anchors + 2 * anchors.roll(-1, 0)
    assert mean_reciprocal_rank(views, anchors, sources, torch.arange(6)) == 1.0
    assert mean_reciprocal_rank(views, anchors, torch.full((6, 2), -1), torch.arange(6)) == 0.0


def test_criterion_does_not_depend_on_the_rows_per_step(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    views, anchors = torch.randn(50, 6, generator=generator), torch.randn(20, 6, generator=generator)
    sources = torch.randint(-1, 20, (50, 2), generator=generator)
    whole = mean_reciprocal_rank(views, anchors, sources, torch.arange(20))
    for rows in (1, 7, 50):
        monkeypatch.setattr(loop, "CRITERION_ROWS", rows)
        assert mean_reciprocal_rank(views, anchors, sources, torch.arange(20)) == pytest.approx(whole, abs=1e-12)


# Early stopping


@pytest.mark.parametrize(
    ("criteria", "num_epochs", "patience", "num_trained", "best"),
    [
        ([0.1, 0.2, 0.3, 0.4], 3, 1, 3, 3),  # all epochs
        ([0.5, 0.4, 0.4, 0.9], 3, 2, 2, 0),  # never better: the start is kept
        ([0.1, 0.3, 0.2, 0.3, 0.9], 9, 2, 3, 1),  # equal is not better
        ([0.1, 0.3, 0.2, 0.4, 0.2, 0.1, 0.9], 9, 2, 5, 3),  # patience restarts
        ([0.1, 0.3, 0.2], 2, 5, 2, 1),
    ],
)  # fmt: skip
def test_training_stops_early_and_keeps_the_best_weights(criteria, num_epochs, patience, num_trained, best, inputs):
    run, batches = scripted(inputs, criteria, num_epochs=num_epochs, patience_epochs=patience)
    assert batches.epochs == list(range(num_trained))
    assert [row["criterion"] for row in run.history] == criteria[: num_trained + 1]
    assert [row["epoch"] for row in run.history] == [-1, *range(num_trained)]
    assert run.history[0]["loss"] is None and all(row["loss"] > 0 for row in run.history[1:])
    assert not any(same_weights(a, b) for a, b in zip(batches.judged, batches.judged[1:]))
    assert same_weights(run.student.state_dict(), batches.judged[best])


def test_every_epoch_is_reported_once_in_one_line(inputs):
    settings = settings_of(num_epochs=2)
    batches = Scripted(inputs, settings, [0.1, 0.3, 0.2])
    run, lines = run_of(settings, batches.num_steps), []
    run.train(batches, on_epoch=lambda run: lines.append(run.progress()))
    assert lines[0] == "train: epoch 0 of at most 2  loss -  criterion 0.1000 (best 0.1000)"
    assert lines[2].startswith("train: epoch 2 of at most 2  loss ") and lines[2].endswith("0.2000 (best 0.3000)")
    assert len(lines) == 3


def test_loss_that_is_not_finite_is_an_error(inputs):
    broken = Inputs(inputs.anchors, inputs.anchor_ids, inputs.views * math.nan, inputs.view_sources)
    with pytest.raises(AttribError, match=r"not finite in epoch 0; lower optimiser\.learning_rate"):
        train(broken, settings_of(disentangled={"kind": "none"}))
    with pytest.raises(AttribError, match="training diverged"):
        train(broken, settings_of())


@pytest.mark.parametrize("warmup_share", [0.0, 0.1, 0.5, 1.0])
def test_rate_rises_linearly_and_falls_by_half_a_cosine(warmup_share):
    rates = [rate(step, 40, warmup_share) for step in range(40)]
    warmup = round(40 * warmup_share)
    assert rates[:warmup] == [pytest.approx((step + 1) / (warmup + 1)) for step in range(warmup)]
    for step in range(warmup, 40):
        expected = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (40 - warmup))
        assert rates[step] == pytest.approx(expected)
    assert all(0 < r <= 1 for r in rates) and rate(40, 40, warmup_share) == pytest.approx(0 if warmup < 40 else 1)


def test_optimiser_follows_the_schedule(inputs):
    settings = settings_of(num_epochs=3, warmup_share=0.25)
    batches = batches_of(inputs, settings)
    run, rates = run_of(settings, batches.num_steps), []
    step = run._step
    run._step = lambda batch: (rates.append(run.optimiser.param_groups[0]["lr"]), step(batch))[1]
    run.train(batches, on_epoch=lambda _: None)
    total = 3 * batches.num_steps
    assert rates == [pytest.approx(0.02 * rate(step, total, 0.25)) for step in range(total)]


# Learning


def test_training_raises_the_criterion(inputs):
    """Directions of large variance hide the shared ones at first; a trained view finds its content."""
    run = train(inputs, settings_of(num_epochs=12))
    criteria = [row["criterion"] for row in run.history]
    assert criteria[0] < 0.3 and max(criteria) > 0.8
    with torch.no_grad():
        weight = run.student.trunk.heads["real"].parts["all"].net.weight
        gain = (weight @ inputs_basis()).norm(dim=0)
    assert gain[:SIGNAL].min() > 1.5 * gain[SIGNAL:].max()
    assert batches_of(inputs, settings_of()).criterion(run.student) == max(criteria)


def inputs_basis() -> torch.Tensor:
    """Return the directions of signal and nuisance as columns; `inputs` draws them first."""
    return torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0))).Q.T


def test_moco_raises_the_criterion(inputs):
    run = train(inputs, settings_of({"kind": "moco", "temperature": 0.2}, num_epochs=12, patience_epochs=12))
    criteria = [row["criterion"] for row in run.history]
    assert max(criteria) > criteria[0] + 0.2


def test_shuffled_sources_cannot_be_learnt(inputs):
    """The criterion measures sources, not shapes."""
    ids = inputs.anchor_ids[torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(1))]
    content = ids.repeat_interleave(VIEWS_EACH)
    sources = torch.stack([content, torch.full_like(content, -1)], dim=1)
    run = train(Inputs(inputs.anchors, inputs.anchor_ids, inputs.views, sources), settings_of(num_epochs=12))
    assert max(row["criterion"] for row in run.history) < 0.15


# Resuming

RESUMED = [(kind, "gaussian_infomax") for kind in get_args(AlignmentSettings.model_fields["kind"].annotation)] + [
    ("info_nce", kind)
    for kind in get_args(DisentanglementSettings.model_fields["kind"].annotation)
    if kind != "gaussian_infomax"
]


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [0, 1, 4])
@pytest.mark.parametrize(("aligned", "disentangled"), RESUMED)
def test_restored_run_ends_with_the_same_bits(aligned, disentangled, killed_at, inputs):
    settings = settings_of(
        {"kind": aligned}, {"kind": disentangled}, num_epochs=5, weight_decay=0.01, patience_epochs=9
    )
    batches, saved = batches_of(inputs, settings), io.BytesIO()
    undisturbed = run_of(settings, batches.num_steps)
    undisturbed.train(batches, on_epoch=lambda _: None)
    start = run_of(settings, batches.num_steps)

    def report(run: TrainRun) -> None:
        if len(run.history) == killed_at + 1:
            torch.save(run.state(), saved)
            raise Killed

    with pytest.raises(Killed):
        start.train(batches, on_epoch=report)
    # The initial weights of the new process must have no effect.
    resumed = run_of(settings, batches.num_steps, seed=1)
    saved.seek(0)
    resumed.restore(torch.load(saved, weights_only=True))
    trained: list[int] = []
    resumed.train(batches, on_epoch=lambda run: trained.append(run.history[-1]["epoch"]))
    assert trained == list(range(killed_at, 5))
    assert resumed.history == undisturbed.history
    for part in ("student", "best", "objective"):
        assert same_weights(resumed.state()[part], undisturbed.state()[part]), part
    assert same_weights(resumed.student.state_dict(), undisturbed.student.state_dict())
    assert not same_weights(start.student.state_dict(), undisturbed.student.state_dict())


def test_restored_finished_run_trains_no_further(inputs):
    settings = settings_of(num_epochs=2)
    batches = batches_of(inputs, settings)
    run, states = run_of(settings, batches.num_steps), []
    run.train(batches, on_epoch=lambda run: states.append(copy.deepcopy(run.state())))
    again = run_of(settings, batches.num_steps)
    again.restore(states[-1])
    again.train(batches, on_epoch=lambda _: pytest.fail("an epoch too many"))
    assert same_weights(again.student.state_dict(), run.student.state_dict()) and again.history == run.history


def test_states_do_not_change_with_later_training(inputs):
    """The best weights must be a copy."""
    settings = settings_of(num_epochs=3)
    batches = batches_of(inputs, settings)
    run, seen = run_of(settings, batches.num_steps), []
    run.train(
        batches, on_epoch=lambda run: seen.append((run.state()["student"], copy.deepcopy(run.state()["student"])))
    )
    assert all(same_weights(kept, copied) for kept, copied in seen)
