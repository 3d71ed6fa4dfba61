"""Contrastive losses, compared with loops over their formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attrib.common.errors import AttribError
from attrib.train.losses.contrastive import MomentumQueue, info_nce, moco, momentum_update, supervised_contrastive

TEMPERATURE = 0.2
# Views: both roles; no style; style without an anchor; content without an anchor; one source in both roles; no source;
# no source with an anchor.
VIEW_SOURCES = torch.tensor([[0, 1], [1, -1], [2, 77], [77, 0], [3, 3], [-1, -1], [78, 79]])
# Source 0 has three anchors; source 5 belongs to no view; two slots are empty.
ANCHOR_IDS = torch.tensor([0, 1, 2, 3, 0, 5, -1, 0, -1])
NUM_PAIRS = 2 + 1 + 1 + 1 + 2


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def views():
    return randn(1, len(VIEW_SOURCES), 6).requires_grad_()


@pytest.fixture
def anchors():
    return randn(2, len(ANCHOR_IDS), 6).requires_grad_()


def naive_info_nce(views, anchors, view_sources, anchor_ids, temperature) -> list[list[float]]:
    """Return the losses of the pairs of each role."""
    view_sources, anchor_ids = view_sources.tolist(), anchor_ids.tolist()
    losses = [[] for _ in view_sources[0]]
    for view, sources in zip(views.tolist(), view_sources):
        for role, source in enumerate(sources):
            positive = pool = 0.0
            for anchor, anchor_id in zip(anchors.tolist(), anchor_ids):
                cosine = sum(a * b for a, b in zip(view, anchor)) / (math.hypot(*view) * math.hypot(*anchor) or 1)
                if anchor_id == -1 or (anchor_id in sources and anchor_id != source):
                    continue
                pool += math.exp(cosine / temperature)
                if anchor_id == source:
                    positive += math.exp(cosine / temperature)
            if source != -1 and positive:
                losses[role].append(-math.log(positive / pool))
    return losses


def mean(values) -> float:
    return sum(values) / len(values)


def test_info_nce_equals_the_formula(views, anchors):
    loss = info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE)
    content, style = naive_info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE)
    assert len(content + style) == NUM_PAIRS
    assert loss.item() == pytest.approx(mean(content + style), rel=1e-12)
    weighted = info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE, torch.tensor([3.0, 0.5]))
    assert weighted.item() == pytest.approx((3 * mean(content) + 0.5 * mean(style)) / 3.5, rel=1e-12)
    only_content = info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE, torch.tensor([2.0, 0.0]))
    assert only_content.item() == pytest.approx(mean(content), rel=1e-12)


def test_info_nce_gradient(views, anchors):
    def loss(views, anchors):
        return info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE)

    assert torch.autograd.gradcheck(loss, (views, anchors))
    from_views, from_anchors = torch.autograd.grad(loss(views, anchors), (views, anchors))
    # The last two views have no anchor; two anchors are empty slots.
    assert (from_views[:5].norm(dim=1) > 0).all() and (from_views[5:] == 0).all()
    assert torch.equal(from_anchors.norm(dim=1) > 0, ANCHOR_IDS >= 0)


def test_info_nce_of_one_source_per_view_is_cross_entropy(views):
    """One role and one anchor per source give SimCLR's loss in one direction, for any scale of the rows."""
    anchors = randn(3, len(views), 6)
    ids = torch.arange(len(views)) + 100
    loss = info_nce(1e-3 * views, 1e3 * anchors, ids[:, None], ids, TEMPERATURE)
    cosine = nn.functional.cosine_similarity(views[:, None], anchors[None], dim=2)
    expected = nn.functional.cross_entropy(cosine / TEMPERATURE, torch.arange(len(views)))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_other_true_source_is_not_a_negative():
    """A view equal to both of its sources has loss 0; an unrelated source that is as near costs log 2."""
    view = torch.ones(1, 4, requires_grad=True)
    sources = torch.tensor([[0, 1]])
    assert info_nce(view, torch.ones(2, 4), sources, torch.tensor([0, 1]), 0.1).item() == 0
    assert info_nce(view, torch.ones(3, 4), sources, torch.tensor([0, 1, 2]), 0.1).item() == pytest.approx(math.log(2))
    assert info_nce(view, torch.ones(4, 4), sources, torch.tensor([0, 1, -1, 1]), 0.1).item() == 0


def test_info_nce_at_a_small_temperature_is_finite(views, anchors):
    loss = info_nce(views.float(), anchors.float(), VIEW_SOURCES, ANCHOR_IDS, 1e-3)
    loss.backward()
    assert loss.isfinite() and views.grad.isfinite().all() and anchors.grad.isfinite().all()


@pytest.mark.parametrize("weights", [None, torch.ones(2)])
@pytest.mark.parametrize(
    "sources, ids",
    [
        (torch.full((2, 2), -1), torch.tensor([0, 1])),
        (torch.tensor([[4, -1], [-1, 5]]), torch.tensor([0, 1])),
        (torch.tensor([[4, -1], [-1, 5]]), torch.tensor([-1, -1])),
        (torch.empty(0, 2, dtype=torch.int64), torch.tensor([0, 1])),
    ],
)
def test_a_batch_without_pairs_is_an_error(sources, ids, weights):
    rows, anchors = torch.ones(len(sources), 3), torch.ones(2, 3)
    with pytest.raises(AttribError, match="no view"):
        info_nce(rows, anchors, sources, ids, TEMPERATURE, weights)
    queue = MomentumQueue(capacity=2, dim=3)
    queue.enqueue(torch.ones(1, 3), torch.tensor([99]))
    with pytest.raises(AttribError, match="no view"):
        moco(rows, anchors, sources, ids, queue, TEMPERATURE, weights)


def test_role_weights(views, anchors):
    with pytest.raises(AttribError, match="3 role weights for 2 roles"):
        info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE, torch.ones(3))
    with pytest.raises(AttribError, match="no view"):
        info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE, torch.zeros(2))
    # A role without a pair does not scale the loss of the other.
    content_only = VIEW_SOURCES.clone()
    content_only[:, 1] = -1
    weighted = info_nce(views, anchors, content_only, ANCHOR_IDS, TEMPERATURE, torch.tensor([0.3, 0.7]))
    plain = info_nce(views, anchors, content_only, ANCHOR_IDS, TEMPERATURE)
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=0)


def test_queue_wraps_around():
    queue = MomentumQueue(capacity=5, dim=3).double()
    keys, ids = randn(4, 9, 3), torch.arange(9)
    held = {}
    for step in range(3):
        queue.enqueue(keys[3 * step : 3 * step + 3].requires_grad_(), ids[3 * step : 3 * step + 3])
        held |= {(3 * step + i) % 5: 3 * step + i for i in range(3)}
        assert queue.ids.tolist() == [held.get(slot, -1) for slot in range(5)]
        assert queue.position.item() == (3 * step + 3) % 5
    assert torch.equal(queue.keys, keys[queue.ids]) and not queue.keys.requires_grad
    queue.enqueue(keys[:5], ids[:5])
    assert sorted(queue.ids.tolist()) == [0, 1, 2, 3, 4] and queue.position.item() == 4
    copied = MomentumQueue(capacity=5, dim=3).double()
    copied.load_state_dict(queue.state_dict())
    assert torch.equal(copied.ids, queue.ids) and copied.position.item() == 4


@pytest.mark.parametrize("num_keys, num_ids", [(6, 6), (3, 2)])
def test_too_many_keys_for_the_queue_are_an_error(num_keys, num_ids):
    queue = MomentumQueue(capacity=5, dim=3)
    with pytest.raises(AttribError, match=f"queue of 5 rows cannot take {num_keys} keys with {num_ids} ids"):
        queue.enqueue(torch.zeros(num_keys, 3), torch.zeros(num_ids, dtype=torch.int64))
    assert (queue.ids == -1).all()


def test_moco_is_info_nce_over_keys_and_queue(views, anchors):
    queue = MomentumQueue(capacity=6, dim=6).double()
    arguments = (VIEW_SOURCES, ANCHOR_IDS, queue, TEMPERATURE)
    plain = info_nce(views, anchors, VIEW_SOURCES, ANCHOR_IDS, TEMPERATURE)
    # Empty slots change nothing.
    assert moco(views, anchors, *arguments).item() == pytest.approx(plain.item(), rel=1e-12)
    old, old_ids = randn(5, 4, 6), torch.tensor([1, 9, 0, 78])
    queue.enqueue(old, old_ids)
    loss = moco(views, anchors, *arguments)
    # Changing the queue before backward must not change the gradient.
    queue.enqueue(randn(6, 6, 6), torch.arange(6))
    loss.backward()
    gradient = views.grad.clone()
    everything, ids = torch.cat([anchors.detach(), old]), torch.cat([ANCHOR_IDS, old_ids])
    losses = naive_info_nce(views, everything, VIEW_SOURCES, ids, TEMPERATURE)
    assert len(losses[0]) + len(losses[1]) == NUM_PAIRS + 1
    assert loss.item() == pytest.approx(mean(losses[0] + losses[1]), rel=1e-12)
    (expected,) = torch.autograd.grad(info_nce(views, everything, VIEW_SOURCES, ids, TEMPERATURE), views)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert anchors.grad is None


def test_momentum_update():
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    target = copy.deepcopy(online)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
        online[1].running_mean.add_(1.0)
    before = [parameter.detach().clone() for parameter in target.parameters()]
    momentum_update(target, online, 0.75)
    for slow, old in zip(target.parameters(), before):
        torch.testing.assert_close(slow.detach(), old + 0.25)
        assert slow.grad is None and slow.grad_fn is None
    assert (target[1].running_mean == 0).all()
    with pytest.raises(ValueError):
        momentum_update(target, online[0], 0.75)


def unit_vectors(count: int, dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dimension, dtype=torch.float64, generator=generator), dim=1)


def contrastive_as_loops(embeddings, labels, temperature) -> float:
    rows = []
    for i, own in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        total = sum(math.exp(float(embeddings[i] @ embeddings[j]) / temperature) for j in others)
        terms = [
            -math.log(math.exp(float(embeddings[i] @ embeddings[j]) / temperature) / total)
            for j in others
            if labels[j] == own
        ]
        if terms:
            rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_supervised_contrastive_equals_its_definition(temperature):
    embeddings, labels = unit_vectors(8, 5, 1), [0, 0, 1, 2, 1, 0, 3, 1]  # 2 and 3 have no positive
    found = supervised_contrastive(embeddings, torch.tensor(labels), temperature)
    assert float(found) == pytest.approx(contrastive_as_loops(embeddings, labels, temperature), rel=1e-9)


def test_supervised_contrastive_has_no_gradient_without_positives():
    embeddings = unit_vectors(6, 4, 2).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda rows: supervised_contrastive(rows, labels, 0.2), (embeddings,))
    loss = supervised_contrastive(embeddings, torch.arange(6), 0.2)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert loss == 0 and not gradient.isnan().any()
