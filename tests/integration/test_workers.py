"""Two workers under DistributedDataParallel learn what one process learns from the joined batch, for every objective.

DistributedDataParallel averages gradients, which is right for a mean over rows only. Two wrong ways are tested as well:
a loss of each worker's own rows, and a gather whose gradient is not summed.
"""

import copy
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attrib.train.all_gather import gather, gather_fixed
from attrib.train.losses.contrastive import MomentumQueue, info_nce, moco, momentum_update
from attrib.train.losses.decorrelation import RunningCovariance, cca_ssg, cor_infomax, gaussian_infomax

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD_SIZE = 2
NUM_STEPS = 3
# Rows per worker, more than dimensions, so that no covariance is singular.
NUM_ROWS = 8
NUM_INPUTS, DIM = 6, 5
NUM_SOURCES = 20
# Not a multiple of the global batch, so that it wraps around.
CAPACITY = 40
DTYPE = torch.float64

DISENTANGLEMENT = {"gaussian_infomax": gaussian_infomax, "cca_ssg": cca_ssg}
OBJECTIVES = ["info_nce", "moco", "cor_infomax", *DISENTANGLEMENT]
# Objectives of the wrong ways.
BATCH_STATISTICS = ["info_nce", "gaussian_infomax", "cca_ssg"]


class GatherWithoutSum(torch.autograd.Function):
    """A common error: the gradient of the own rows only."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        return gather_fixed(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.chunk(WORLD_SIZE)[dist.get_rank()]


GATHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gather": gather,
    "own rows": lambda rows: rows,
    "without sum": GatherWithoutSum.apply,
}


class State(nn.Module):
    """The state of all objectives between steps."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.teacher = copy.deepcopy(head).requires_grad_(False)
        self.queue = MomentumQueue(CAPACITY, DIM)
        self.running = RunningCovariance(DIM, momentum=0.9)


def draw(step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return this rank's part of a batch: real and synthetic [n, inputs], view_sources [n, 2], anchor_ids [n]."""
    generator = torch.Generator().manual_seed(step)
    num = WORLD_SIZE * NUM_ROWS
    real = torch.randn(num, NUM_INPUTS, dtype=DTYPE, generator=generator)
    synthetic = real + 0.5 * torch.randn(num, NUM_INPUTS, dtype=DTYPE, generator=generator)
    anchor_ids = torch.randperm(NUM_SOURCES, generator=generator)[:num]
    # The anchor of the style donor is on another worker; every third view has no donor.
    view_sources = torch.stack([anchor_ids, anchor_ids.roll(NUM_ROWS + 1)], dim=1)
    view_sources[::3, 1] = -1
    return tuple(tensor.chunk(world_size)[rank] for tensor in (real, synthetic, view_sources, anchor_ids))


def train(objective: str, gather: Callable[[Tensor], Tensor], rank: int, world_size: int) -> dict:
    """Return the gradients of every step and the state after the last."""
    torch.manual_seed(0)
    # No bias, because centring would leave it without gradient.
    last = nn.Linear(DIM, DIM, bias=False)
    head = nn.Sequential(nn.Linear(NUM_INPUTS, 8), nn.Tanh(), nn.Linear(8, DIM), nn.Tanh(), last).to(DTYPE)
    state = State(head).to(DTYPE)
    online = DistributedDataParallel(head) if world_size > 1 else head
    optimiser = torch.optim.SGD(online.parameters(), lr=0.05, momentum=0.9)
    gradients = []
    for step in range(NUM_STEPS):
        batch = draw(step, rank, world_size)
        optimiser.zero_grad()
        compute_loss(objective, online, state, batch, gather).backward()
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
        optimiser.step()
        momentum_update(state.teacher, online, 0.9)
    return {"gradients": gradients, "state": state.state_dict()}


def compute_loss(objective: str, online: nn.Module, state: State, batch: tuple, gather) -> Tensor:
    """Compute a loss like a training loop: one forward pass for both domains, gather, loss, update of the state."""
    inputs, synthetic_inputs, sources, ids = batch
    real, synthetic = map(gather, online(torch.cat([inputs, synthetic_inputs])).chunk(2))
    sources, ids = gather(sources), gather(ids)
    if objective == "info_nce":
        return info_nce(synthetic, real, sources, ids, 0.2, torch.tensor([1.0, 0.5]))
    if objective == "moco":
        keys = gather_fixed(state.teacher(inputs))
        loss = moco(synthetic, keys, sources, ids, state.queue, 0.2)
        state.queue.enqueue(keys, ids)
        return loss
    if objective == "cor_infomax":
        return cor_infomax(real, synthetic, state.running, alpha=1.0)
    return DISENTANGLEMENT[objective](real, synthetic)


def runs() -> list[tuple[str, str]]:
    """Return (objective, gather) of all runs of the workers."""
    return [(objective, "gather") for objective in OBJECTIVES] + [
        (objective, naive) for objective in BATCH_STATISTICS for naive in ("own rows", "without sum")
    ]


def train_all(rank: int) -> dict:
    return {(objective, way): train(objective, GATHERS[way], rank, WORLD_SIZE) for objective, way in runs()}


@pytest.fixture(scope="module")
def workers(gloo_pool) -> list[dict]:
    """Return the results of the two workers."""
    return gloo_pool.run(train_all)


@cache
def alone(objective: str) -> dict:
    """Return the result of one process with the joined batch, where `gather` is the identity."""
    return train(objective, gather, rank=0, world_size=1)


# The order of sums causes rounding differences only.
assert_same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_workers_learn_like_one_process(objective, workers):
    expected = alone(objective)
    for worker in workers:
        trained = worker[objective, "gather"]
        for gradients, expected_gradients in zip(trained["gradients"], expected["gradients"], strict=True):
            assert all(gradient.norm() > 1e-6 for gradient in gradients)
            assert_same(gradients, expected_gradients)
        assert_same(trained["state"], expected["state"])


def test_state_contains_three_global_batches(workers):
    """The state compared above is not empty."""
    queue = workers[0]["moco", "gather"]["state"]
    assert queue["queue.position"] == NUM_STEPS * WORLD_SIZE * NUM_ROWS - CAPACITY
    assert (queue["queue.ids"] >= 0).all() and (queue["queue.keys"].norm(dim=1) > 0).all()
    running = workers[0]["cor_infomax", "gather"]["state"]
    assert not torch.allclose(running["running.real"], torch.eye(DIM, dtype=DTYPE))
    assert not torch.allclose(running["running.real"], running["running.synthetic"])


@pytest.mark.parametrize("objective", BATCH_STATISTICS)
def test_loss_without_gathering_has_another_gradient(objective, workers):
    expected = alone(objective)["gradients"][0]
    for gradient, expected_gradient in zip(workers[0][objective, "own rows"]["gradients"][0], expected):
        assert (gradient - expected_gradient).norm() > 0.05 * expected_gradient.norm()


@pytest.mark.parametrize("objective", BATCH_STATISTICS)
def test_gather_without_sum_scales_the_gradient(objective, workers):
    """By 1 / world size. The direction is right, so the error is easy to miss."""
    expected = alone(objective)["gradients"][0]
    trained = workers[0][objective, "without sum"]["gradients"][0]
    assert_same([WORLD_SIZE * gradient for gradient in trained], expected)
