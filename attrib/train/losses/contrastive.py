"""Contrastive losses: InfoNCE, MoCo and supervised contrastive learning.

- `info_nce`: views against anchors, with one or several positives per view (InfoNCE: van den Oord et al., arXiv
  1807.03748; SimCLR: Chen et al., arXiv 2002.05709). The recipe of jobs.train.
- `moco`: the same against the keys of a momentum encoder and a queue (MoCo: He et al., arXiv 1911.05722).
- `supervised_contrastive`: embeddings with class labels (SupCon: Khosla et al., arXiv 2004.11362).

A view is an augmented image made of up to r source images. `view_sources` int64 [m, r] holds their ids: column 0 the
content, column 1 the style donor, -1 for none. An anchor is a source image with an id in `anchor_ids` int64 [n], -1 for
an empty slot; several anchors may show one source. Every (view, role) whose source is among the anchors is a pair; the
others are skipped. With several workers all arguments are those of the global batch (attrib.train.all_gather). Call the
losses outside autocast: bfloat16 makes the second digit of cosine / temperature wrong.
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
    """Return the InfoNCE loss of views float [m, d] against anchors float [n, d]; both are normalised here.

    For one pair, with s = cosine / temperature:

        loss = -log(sum over positives of exp s / sum over positives and negatives of exp s).

    Positives are the anchors that show the source of the pair's role. The view's other sources are neither positives
    nor negatives, because they are true sources too; the evaluation leaves them out as well.

    Returns the mean over pairs or, with role_weights float [r], the weighted mean over roles of the mean over the pairs
    of a role; roles without pairs or with weight zero do not count. Raises AttribError if there is no pair.
    """
    logits = F.normalize(views, dim=1) @ F.normalize(anchors, dim=1).T / temperature
    shown = (view_sources.T[:, :, None] == anchor_ids) & (anchor_ids >= 0)  # [r, m, n]: the anchor shows the source
    true = shown.any(dim=0)
    losses = []  # for each role, the losses of its pairs
    for positive in shown:
        used = positive.any(dim=1)
        left_out = (true & ~positive) | (anchor_ids < 0)
        found = logits[used].masked_fill(~positive[used], -torch.inf).logsumexp(dim=1)
        pool = logits[used].masked_fill(left_out[used], -torch.inf).logsumexp(dim=1)
        losses.append(pool - found)
    weights = [len(loss) for loss in losses] if role_weights is None else role_weights
    if len(weights) != len(losses):
        raise AttribError(f"{len(weights)} role weights for {len(losses)} roles; give one per role")
    present = [(weight, loss.mean()) for weight, loss in zip(weights, losses) if len(loss) and weight > 0]
    if not present:
        raise AttribError("no view of the batch has its source among the anchors; check the ids and role_weights")
    return sum(weight * mean for weight, mean in present) / sum(weight for weight, _ in present)


class MomentumQueue(nn.Module):
    """The last keys of the momentum encoder, as further anchors (MoCo, arXiv 1911.05722).

    Buffers: keys float [capacity, d]; ids int64 [capacity], -1 if empty; position int64 [], the next slot to write.
    """

    def __init__(self, capacity: int, dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(capacity, dim))
        self.register_buffer("ids", torch.full((capacity,), -1))
        self.register_buffer("position", torch.tensor(0))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Replace the oldest slots by keys float [b, d] of the sources ids int64 [b].

        With several workers pass the gathered keys, so that every rank holds the same queue. Raises AttribError if
        there are more keys than slots, or not as many keys as ids.
        """
        if len(keys) != len(ids) or len(keys) > len(self.ids):
            raise AttribError(
                f"a queue of {len(self.ids)} rows cannot take {len(keys)} keys with {len(ids)} ids; give one id per "
                f"key, and set alignment.queue_rows to {len(keys)} or more"
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
    """Return `info_nce` against the momentum encoder's keys float [n, d] of this batch and of the queue.

    Keys get no gradient. Enqueue the keys of the batch afterwards, or they count twice. A queued key of the view's own
    source is an older positive. Raises what info_nce raises.
    """
    anchors = torch.cat([keys.detach(), queue.keys])
    return info_nce(views, anchors, view_sources, torch.cat([key_ids, queue.ids]), temperature, role_weights)


def supervised_contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the loss L_out of supervised contrastive learning (arXiv 2004.11362, equation 2).

    embeddings: float [n, d], L2-normalised; labels: int64 [n]. Every other row of the same label is a positive, every
    other row is in the denominator. The mean is over the rows that have a positive; 0 if none has.
    """
    similarity = embeddings @ embeddings.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~itself
    log_share = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
    num_positives = positive.sum(dim=1)
    losses = -(log_share * positive).sum(dim=1) / num_positives.clamp(min=1)
    has_positive = num_positives > 0
    return (losses * has_positive).sum() / has_positive.sum().clamp(min=1)


@torch.no_grad()
def momentum_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Set target = momentum * target + (1 - momentum) * online in place, for parameters; buffers stay, as in MoCo."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)
