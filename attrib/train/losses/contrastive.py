"""Alignment: a picture's embedding is drawn to those of the sources that it was made from, without (synthetic, source) pairs.

A view is an augmented or re-rendered picture made of up to r source images; `view_sources` int64 [m, r] names them: column 0 the
content, column 1 the donor of style or texture, -1 for none. An anchor is a source image, named by `anchor_ids` int64 [n]; several
anchors may show the same source. Every (view, role) with a source among the anchors counts as one pair, and the others are skipped.

With several workers all arguments are those of the global batch (attrib.train.all_gather). Call the losses outside autocast: in bfloat16 a
cosine divided by a temperature is wrong in its second digit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError


def info_nce(
    views: Tensor,
    anchors: Tensor,
    view_sources: Tensor,
    anchor_ids: Tensor,
    temperature: float,
    role_weights: Tensor | None = None,
) -> Tensor:
    """Every view must find its source of each role among the anchors by cosine: SimCLR (arXiv 2002.05709).

    views: float [m, d] and anchors: float [n, d], normalised here; view_sources: int64 [m, r]; anchor_ids: int64 [n], -1 for an empty
    slot, which is left out. For one pair, with s = cosine / temperature,

        loss = -log(sum over positives of exp s / sum over positives and negatives of exp s).

    Positives are the anchors that show the source of that role. The anchors of the view's other sources are neither: they are true
    too, and the evaluation's pool leaves out a query's other truths in the same way.

    Returns the mean over pairs or, with role_weights float [r], the weighted mean over roles of the mean over the role's pairs; a
    role without a pair, or of weight zero, does not count. Raises AttribError if no pair is left.
    """
    logits = F.normalize(views, dim=1) @ F.normalize(anchors, dim=1).T / temperature
    shown = _shown(view_sources, anchor_ids)
    true = shown.any(dim=0)
    losses = []
    for positive in shown:
        used = positive.any(dim=1)
        left_out = (true & ~positive) | (anchor_ids < 0)
        found = logits[used].masked_fill(~positive[used], -torch.inf).logsumexp(dim=1)
        pool = logits[used].masked_fill(left_out[used], -torch.inf).logsumexp(dim=1)
        losses.append(pool - found)
    return _mean_over_pairs(losses, role_weights)


class MomentumQueue(nn.Module):
    """The last keys of the momentum encoder, as further anchors (MoCo, arXiv 1911.05722).

    Buffers: keys float [capacity, d]; ids int64 [capacity], -1 where empty; position int64 [], the slot that is written next.
    """

    def __init__(self, capacity: int, dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(capacity, dim))
        self.register_buffer("ids", torch.full((capacity,), -1))
        self.register_buffer("position", torch.tensor(0))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Replaces the oldest slots by keys float [b, d] of the sources ids int64 [b].

        With several workers give the gathered keys, so that every rank holds the same queue. Raises AttribError if the keys are more
        than the capacity or are not as many as the ids.
        """
        if len(keys) != len(ids) or len(keys) > len(self.ids):
            raise AttribError(
                f"{len(keys)} keys with {len(ids)} ids do not fit a queue of {len(self.ids)} slots; "
                "give an id for each key and raise the capacity to at least one global batch"
            )
        slots = (self.position + torch.arange(len(ids), device=self.ids.device)) % len(self.ids)
        self.keys[slots] = keys.to(self.keys.dtype)
        self.ids[slots] = ids
        self.position.copy_((self.position + len(ids)) % len(self.ids))


def moco(
    views: Tensor,
    keys: Tensor,
    view_sources: Tensor,
    key_ids: Tensor,
    queue: MomentumQueue,
    temperature: float,
    role_weights: Tensor | None = None,
) -> Tensor:
    """`info_nce` against the momentum encoder's keys float [n, d] of this batch and those of the queue (MoCo, arXiv 1911.05722).

    Keys get no gradient; empty slots are left out. Enqueue the batch's keys afterwards, or they count twice. A queued key of the
    view's own source is a positive, if an old one. Raises what info_nce raises.
    """
    anchors = torch.cat([keys.detach(), queue.keys])
    return info_nce(views, anchors, view_sources, torch.cat([key_ids, queue.ids]), temperature, role_weights)


@torch.no_grad()
def momentum_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """In place, parameter by parameter: target = momentum * target + (1 - momentum) * online. Buffers are left alone, as in MoCo."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


def _shown(view_sources: Tensor, anchor_ids: Tensor) -> Tensor:
    """bool [r, m, n]: whether the anchor shows the view's source of that role."""
    return (view_sources.T[:, :, None] == anchor_ids) & (anchor_ids >= 0)


def _mean_over_pairs(losses: list[Tensor], role_weights: Tensor | None) -> Tensor:
    """losses: for each role the losses of its pairs."""
    if role_weights is None:
        pairs = torch.cat(losses)
        if len(pairs):
            return pairs.mean()
    else:
        if len(role_weights) != len(losses):
            raise AttribError(
                f"{len(role_weights)} role weights for {len(losses)} roles; give one for each column of view_sources"
            )
        present = [(weight, loss.mean()) for weight, loss in zip(role_weights, losses) if len(loss) and weight > 0]
        if present:
            return sum(weight * mean for weight, mean in present) / sum(weight for weight, _ in present)
    raise AttribError(
        "no view of the batch has its source among the anchors; look at view_sources, anchor_ids and role_weights"
    )
