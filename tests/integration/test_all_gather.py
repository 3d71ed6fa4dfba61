"""All-gather of two gloo processes: order of the rows, gradient, and the error for unequal numbers of rows."""

import pytest
import torch
import torch.distributed as dist

from attrib.common.errors import AttribError
from attrib.train.all_gather import gather, gather_fixed

WORLD_SIZE = 2
NUM_ROWS = 3


def joined_rows() -> torch.Tensor:
    return torch.randn(WORLD_SIZE * NUM_ROWS, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def cubes(rows: torch.Tensor) -> torch.Tensor:
    """Return a loss whose gradient differs from row to row."""
    return (rows**3).sum(dim=(1, 2)) @ torch.arange(1.0, len(rows) + 1, dtype=rows.dtype)


def observe(rank: int) -> dict:
    """Return the results of one rank."""
    rows = joined_rows()[rank * NUM_ROWS : (rank + 1) * NUM_ROWS].requires_grad_()
    # Not contiguous.
    gathered = gather(rows.transpose(1, 2))
    (gradient,) = torch.autograd.grad(cubes(gathered), rows)
    # The gradient of a sum is one number, expanded.
    (ones,) = torch.autograd.grad(gather(rows).sum(), rows)
    fixed = gather_fixed(rows * 1)
    ids = gather_fixed(torch.tensor([10 * rank, 10 * rank + 1]))
    messages = []
    for function in (gather, gather_fixed):
        try:
            function(torch.zeros(2 + rank, 4))
        except AttribError as error:
            messages.append(str(error))
    empty = gather(torch.zeros(0, 4))
    return {
        "gathered": gathered.detach(),
        "gradient": gradient,
        "ones": ones,
        "fixed": fixed.detach(),
        "fixed_has_gradient": fixed.requires_grad,
        "ids": ids,
        "messages": messages,
        "empty": empty,
    }


@pytest.fixture(scope="module")
def seen(gloo_pool) -> list[dict]:
    return gloo_pool.run(observe)


def test_rows_are_in_rank_order(seen):
    rows = joined_rows()
    for rank in range(WORLD_SIZE):
        assert torch.equal(seen[rank]["gathered"], rows.transpose(1, 2))
        assert torch.equal(seen[rank]["fixed"], rows)
        assert not seen[rank]["fixed_has_gradient"]
        assert seen[rank]["ids"].dtype == torch.int64
        assert seen[rank]["ids"].tolist() == [0, 1, 10, 11]
        assert seen[rank]["empty"].shape == (0, 4)


def test_gradient_is_the_sum_over_ranks(seen):
    rows = joined_rows().requires_grad_()
    (expected,) = torch.autograd.grad(cubes(rows), rows)
    gradients = torch.cat([view["gradient"] for view in seen])
    torch.testing.assert_close(gradients, WORLD_SIZE * expected, rtol=1e-12, atol=0)
    assert all((view["ones"] == WORLD_SIZE).all() for view in seen)


def test_unequal_numbers_of_rows_are_an_error_on_every_rank(seen):
    for view in seen:
        assert len(view["messages"]) == 2
        assert all("[2, 3] rows" in message and "the same number" in message for message in view["messages"])


def test_one_process_keeps_its_rows(tmp_path):
    def check():
        rows = torch.randn(3, 2, requires_grad=True)
        assert gather(rows) is rows
        assert torch.equal(gather_fixed(rows), rows) and not gather_fixed(rows).requires_grad
        assert gather_fixed(torch.tensor([4, -1])).tolist() == [4, -1]

    check()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check()
    finally:
        dist.destroy_process_group()
