"""The objective: the loss compared with one computed by hand, a step of every kind, and the roles of the parts."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError
from attrib.models.heads import Head
from attrib.models.settings import HeadSettings
from attrib.train.losses import contrastive, decorrelation
from attrib.train.objective import EMPTY_SLOT, Objective, TrainBatch, only_first
from attrib.train.settings import AlignmentSettings, DisentanglementSettings
from attrib.train.student import HeadTrunk, Student

CONTENT, STYLE = 6, 4  # numbers of each part
NUM_VIEWS = 12
PARTS = {
    "content": {"blocks": ["layout_2"], "role": "content"},
    "style": {"blocks": ["moments"], "role": "style"},
}
KINDS = {kind: get_args(cls.model_fields["kind"].annotation) for kind, cls in (
    ("alignment", AlignmentSettings), ("disentanglement", DisentanglementSettings)
)}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def student_of(net: str = "linear", separate: bool = False, parts: dict = PARTS) -> Student:
    torch.manual_seed(0)
    settings = HeadSettings(projection="identity", net=net, hidden=8, separate_domains=separate, parts=parts)
    names = ("real", "synthetic") if separate else ("real",)
    heads = nn.ModuleDict({name: Head({"layout_2": CONTENT, "moments": STYLE}, {}, settings) for name in names})
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Student(HeadTrunk(heads), heads["real"], separate)


def batch_of(seed: int = 0) -> TrainBatch:
    """Return contents, then donors, like InputBatches: images 0 to 7, some twice; every fourth view has no donor."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, CONTENT + STYLE, generator=generator)
    contents = torch.arange(NUM_VIEWS) % 8
    donors = (contents + 3) % 8
    views = torch.cat([images[contents, :CONTENT], images[donors, CONTENT:]], dim=1)
    views = views + 0.5 * torch.randn(views.shape, generator=generator)
    donor_ids = torch.where(torch.arange(NUM_VIEWS) % 4 == 0, -1, donors)
    ids = torch.cat([contents, donor_ids])
    return TrainBatch(images[ids.clamp_min(0)], ids, views, torch.stack([contents, donor_ids], dim=1))


def objective_of(student, aligned: dict | None = None, disentangled: dict | None = None) -> Objective:
    return Objective(student, AlignmentSettings(**aligned or {}), DisentanglementSettings(**disentangled or {}))


def test_loss_is_alignment_plus_weighted_mean_disentanglement():
    student, batch = student_of(), batch_of()
    aligned, disentangled = {"temperature": 0.2, "style_weight": 0.5}, {"weight": 0.7, "eps": 0.05}
    loss = objective_of(student, aligned, disentangled)(student, student, batch)

    nets = [part.net for part in student.trunk.heads["real"].parts.values()]
    anchors, views = (
        [net(piece) for net, piece in zip(nets, rows.split([CONTENT, STYLE], dim=1))]
        for rows in (batch.anchors, batch.views)
    )
    # Every image once, in the order of its first slot.
    first = [batch.anchor_ids.tolist().index(i) for i in range(8)]
    pools = [torch.cat([F.normalize(part, dim=1) for part in parts], dim=1) for parts in (anchors, views)]
    expected = contrastive.info_nce(
        pools[1], pools[0][first], batch.view_sources, torch.arange(8), 0.2, torch.tensor([1.0, 0.5])
    )
    total = 0.0
    for part, role, size in ((0, 0, CONTENT), (1, 1, STYLE)):  # the style part is paired with the donor
        rows = [(view, int(i)) for view, i in enumerate(batch.view_sources[:, role]) if i >= 0]
        real = torch.stack([anchors[part][first[i]] for _, i in rows])
        synthetic = torch.stack([views[part][view] for view, _ in rows])
        total += decorrelation.gaussian_infomax(real, synthetic, 0.05) / size
    torch.testing.assert_close(loss, expected + 0.7 * total / 2)
    assert total > 0.01 and expected > 0.01


def test_weight_zero_and_kind_none_give_alignment_only():
    student, batch = student_of(), batch_of()
    losses = [objective_of(student, None, d)(student, student, batch) for d in ({"kind": "none"}, {"weight": 0})]
    expected = contrastive.info_nce(
        student.embedding(student.encode(batch.views, "real")),
        student.embedding(student.encode(batch.anchors, "real")),
        batch.view_sources, only_first(batch.anchor_ids), AlignmentSettings().temperature, torch.tensor([1.0, 1.0]),
    )  # fmt: skip
    assert losses[0] == losses[1] and torch.equal(losses[0].float(), expected)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("disentangled", KINDS["disentanglement"])
@pytest.mark.parametrize("aligned", KINDS["alignment"])
def test_every_kind_trains_a_step(aligned, disentangled, separate):
    student = student_of(separate=separate)
    objective = objective_of(student, {"kind": aligned, "queue_rows": 64}, {"kind": disentangled, "weight": 0.5})
    optimiser = torch.optim.SGD(student.parameters(), lr=0.05)
    before = {name: value.clone() for name, value in student.named_parameters()}
    for step in range(2):
        optimiser.zero_grad()
        loss = objective(student, student, batch_of(step))
        loss.backward()
        assert loss.isfinite()
        for name, parameter in student.named_parameters():
            if separate and aligned != "info_nce" and disentangled == "none" and "heads.real" in name:
                # The momentum encoder alone encodes sources, and no disentanglement trains the student.
                assert parameter.grad is None or not parameter.grad.any()
            else:
                assert parameter.grad.isfinite().all()
                # A bias cancels if outputs are centred or standardised.
                assert parameter.grad.any() or name.endswith("bias"), name
        optimiser.step()
        objective.after_step(student)
    changed = [name for name, value in student.named_parameters() if not torch.equal(value, before[name])]
    assert any("weight" in name for name in changed)


def test_momentum_encoder_follows_without_gradient():
    student = student_of()
    objective = objective_of(student, {"kind": "moco", "momentum": 0.9, "queue_rows": 64})
    start = [p.clone() for p in student.parameters()]
    objective(student, student, batch_of()).backward()
    assert not any(p.requires_grad or p.grad is not None for p in objective.slow.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    objective.after_step(student)
    for slow, old in zip(objective.slow.parameters(), start, strict=True):
        torch.testing.assert_close(slow, old + 0.1)
    kept = objective.queue.ids[: len(batch_of().anchor_ids)]
    assert torch.equal(kept, only_first(batch_of().anchor_ids)) and (objective.queue.ids[len(kept) :] == -1).all()
    # The keys come from the momentum encoder before the step.
    with torch.no_grad():
        before = student_of()
        keys = before.embedding(before.encode(batch_of().anchors, "real"))
    torch.testing.assert_close(objective.queue.keys[: len(kept)], keys)
    assert not objective.queue.keys[len(kept) :].any()


def test_order_of_anchors_has_no_effect():
    """Two workers join contents and donors in another order than one worker."""
    student, batch = student_of(), batch_of()
    order = torch.randperm(len(batch.anchor_ids), generator=torch.Generator().manual_seed(1))
    other = TrainBatch(batch.anchors[order], batch.anchor_ids[order], batch.views, batch.view_sources)
    losses = [objective_of(student)(student, student, some) for some in (batch, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_an_image_of_several_views_is_one_anchor():
    student, batch = student_of(), batch_of()
    repeated = TrainBatch(
        torch.cat([batch.anchors, batch.anchors[:5]]), torch.cat([batch.anchor_ids, batch.anchor_ids[:5]]),
        batch.views, batch.view_sources,
    )  # fmt: skip
    losses = [objective_of(student)(student, student, some) for some in (batch, repeated)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_only_first_empties_the_slots_of_repeated_ids():
    ids = torch.tensor([5, -1, 3, 5, 3, -1, 2**62, 5])
    assert only_first(ids).tolist() == [5, -1, 3, -1, -1, -1, 2**62, -1]
    assert only_first(ids).dtype == torch.int64 and only_first(ids[:0]).tolist() == []


def gradients(student: Student, disentangled: dict, batch: TrainBatch) -> dict[str, Tensor]:
    """Return the gradients of the disentanglement only, by part."""
    objective = objective_of(student, None, disentangled)
    anchors, views = student(batch.anchors, batch.views)
    ids = only_first(batch.anchor_ids)
    term = objective._disentanglement(student, anchors, views, ids, batch.view_sources)
    parts = student.trunk.heads["real"].parts
    return {name: torch.autograd.grad(term, part.net.weight, retain_graph=True)[0] for name, part in parts.items()}


def test_style_part_does_not_depend_on_the_content():
    student, batch = student_of(), batch_of()
    shuffled = batch.view_sources.clone()
    shuffled[:, 0] = shuffled[:, 0].flip(0)
    other = TrainBatch(batch.anchors, batch.anchor_ids, batch.views, shuffled)
    first, second = (gradients(student, {"kind": "cca_ssg"}, some) for some in (batch, other))
    assert torch.equal(first["style"], second["style"])
    assert not torch.allclose(first["content"], second["content"], rtol=0.1)


def test_views_without_donors_skip_the_style_part():
    """As with solo views only, or pairs with one source each."""
    student, batch = student_of(), batch_of()
    sources = batch.view_sources.clone()
    sources[:, 1] = -1
    solo = TrainBatch(batch.anchors, batch.anchor_ids, batch.views, sources)
    loss = objective_of(student)(student, student, solo)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("kind", KINDS["alignment"])
def test_a_batch_without_sources_is_an_error(kind):
    student = student_of()
    objective = objective_of(student, {"kind": kind})
    batch = batch_of()
    without = TrainBatch(
        batch.anchors, torch.full_like(batch.anchor_ids, EMPTY_SLOT), batch.views, batch.view_sources * 0 - 1
    )
    with pytest.raises(AttribError, match="no view of the batch has its source among the anchors"):
        objective(student, student, without)
