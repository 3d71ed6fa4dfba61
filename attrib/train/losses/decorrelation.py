"""Decorrelation losses: they decorrelate the dimensions of an embedding and spread its variance over all of them.

Every term takes the head's outputs before L2 normalisation, real float [n, d] and synthetic float [n, d], and returns a
float64 scalar. Row i of the second is a view of row i of the first; only `gaussian_infomax` takes unpaired rows. With
several workers the rows are those of the global batch (attrib.train.all_gather), because a covariance is not the mean
of the covariances of its parts.

Notation: Z is centred unless stated otherwise, C = Z'Z / n its covariance, R its correlation matrix. All statistics are
in float64: float32 loses the log-determinant of a nearly singular matrix, and autocast leaves float64 alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError

VARIANCE_FLOOR = 1e-12  # gives a constant dimension correlation zero with everything, instead of a division by zero


def gaussian_infomax(real: Tensor, synthetic: Tensor, eps: float = 1e-6) -> Tensor:
    """Return -1/2 logdet(R + eps I), summed over the domains: the total correlation of a Gaussian.

    Linsker, Neural Computation 4:691, 1992. It is zero, up to eps, if every domain is decorrelated: for a linear head
    with outputs of unit variance, that is whitening. With n <= d only eps keeps it finite. Raises AttribError if an
    output is not finite.
    """
    total = real.new_zeros((), dtype=torch.float64)
    for z in (real, synthetic):
        rows = _standardised(z) / len(z) ** 0.5
        num, dim = rows.shape
        if num >= dim:
            log_det = _log_det(rows.T @ rows, eps)
        else:  # Sylvester's identity: the determinant of a smaller matrix
            log_det = _log_det(rows @ rows.T, eps) + (dim - num) * math.log(eps)
        total = total - log_det / 2
    return total


class RunningCovariance(nn.Module):
    """Exponential moving averages of the covariances of both domains, starting at the identity; for `cor_infomax`.

    Buffers: real and synthetic, float64 [d, d]. momentum: the share of the average that a step keeps.
    """

    def __init__(self, dim: int, momentum: float = 0.99):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("real", torch.eye(dim, dtype=torch.float64))
        self.register_buffer("synthetic", torch.eye(dim, dtype=torch.float64))

    def update(self, real: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
        """Return the averages with this batch; the gradient flows through the batch only. Stored in training mode."""
        averages = []
        for buffer, z in ((self.real, real), (self.synthetic, synthetic)):
            average = self.momentum * buffer + (1 - self.momentum) * _covariance(z)
            if self.training:
                buffer.copy_(average.detach())
            averages.append(average)
        return averages[0], averages[1]


def cor_infomax(real: Tensor, synthetic: Tensor, running: RunningCovariance, alpha: float, eps: float = 1e-6) -> Tensor:
    """Return -(logdet(C1 + eps I) + logdet(C2 + eps I)) / d + alpha * mse(z1, z2): CorInfoMax (arXiv 2209.07999).

    C1 and C2 are the averages of `running`, which this call updates. Unlike the published code, this centres on the
    mean of the batch and does not L2-normalise; alpha must be positive, because only its term limits the scale. Raises
    AttribError if an output is not finite.
    """
    _check_paired(real, synthetic)
    log_dets = [_log_det(covariance, eps) for covariance in running.update(real, synthetic)]
    return -sum(log_dets) / real.shape[1] + alpha * F.mse_loss(real.double(), synthetic.double())


def cca_ssg(real: Tensor, synthetic: Tensor, decorrelation_weight: float = 1e-3) -> Tensor:
    """Return -tr(Z1'Z2 / n) + decorrelation_weight * (norm(I - R1)^2 + norm(I - R2)^2), Z of unit variance: CCA-SSG.

    arXiv 2106.12484. The trace aligns the domains and needs pairs; the other terms whiten each domain.
    """
    _check_paired(real, synthetic)
    first, second = _standardised(real), _standardised(synthetic)
    identity = torch.eye(real.shape[1], dtype=first.dtype, device=first.device)
    decorrelation = sum((identity - _covariance(z)).square().sum() for z in (first, second))
    return -(first * second).sum() / len(first) + decorrelation_weight * decorrelation


def _check_paired(real: Tensor, synthetic: Tensor) -> None:
    if real.shape != synthetic.shape:
        raise AttribError(
            f"real outputs {list(real.shape)} and synthetic ones {list(synthetic.shape)} are not paired; "
            "this term needs a synthetic view of each real image, in the same order"
        )


def _standardised(z: Tensor) -> Tensor:
    variance, mean = torch.var_mean(z.double(), dim=0, correction=0)
    return (z - mean) * variance.clamp(min=VARIANCE_FLOOR).rsqrt()


def _covariance(z: Tensor) -> Tensor:
    return torch.cov(z.double().T, correction=0)


def _log_det(matrix: Tensor, eps: float) -> Tensor:
    """Return logdet(matrix + eps I) of a symmetric positive semidefinite matrix, by Cholesky."""
    ridge = eps * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, failure = torch.linalg.cholesky_ex(matrix + ridge)
    log_det = 2 * factor.diagonal().log().sum()
    if failure or not log_det.isfinite():
        raise AttribError(
            "training diverged: the outputs are NaN or infinite, or all nearly equal; lower optimiser.learning_rate, "
            f"or raise disentanglement.eps ({eps:g})"
        )
    return log_det
