"""All-gather with gradient, so that a loss is computed on the global batch.

InfoNCE and covariances depend on all rows of a batch together, so the mean of the losses of the local batches would be
another loss. Every rank therefore gathers the rows of all ranks and computes the same loss from them.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from attrib.common.errors import AttribError


def gather(rows: Tensor) -> Tensor:
    """Return the rows [world size * n, ...] of all ranks in rank order, with gradient, from this rank's rows [n, ...].

    The backward pass sums the gradients over the ranks and returns this rank's slice. Every rank computes the same
    loss, so this is the gradient times the world size. DistributedDataParallel averages over the ranks, which removes
    the factor (see lightly issue 1977).

    Forward and backward are collective: all ranks call them in the same order, and the rows need a gradient on all
    ranks or on none. A single rank gets its rows back unchanged. Raises AttribError on every rank if the numbers of
    rows differ.
    """
    return rows if _world_size() == 1 else _Gather.apply(rows)


def gather_fixed(rows: Tensor) -> Tensor:
    """Return what `gather` returns, without gradient: for ids and for the outputs of a momentum encoder."""
    return rows.detach() if _world_size() == 1 else _all_gather(rows.detach())


class _Gather(torch.autograd.Function):
    """Our own all-gather: torch.distributed.nn.functional.all_gather is deprecated, its successor private."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return _all_gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        # A copy, because all_reduce works in place and autograd may pass the same or an expanded gradient to others.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total.narrow(0, dist.get_rank() * ctx.num_rows, ctx.num_rows)


def _all_gather(rows: Tensor) -> Tensor:
    # Checked first: a collective of unequal sizes hangs or returns garbage, depending on the backend.
    counts = _gather_equal(torch.tensor([len(rows)], device=rows.device)).tolist()
    if len(set(counts)) > 1:
        raise AttribError(f"the workers hold {counts} rows; give each the same number, e.g. drop the last batch")
    return _gather_equal(rows)


def _gather_equal(rows: Tensor) -> Tensor:
    gathered = rows.new_empty((_world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
