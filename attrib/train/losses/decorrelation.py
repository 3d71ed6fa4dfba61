"""Decorrelation losses: they decorrelate the dimensions of an embedding and spread its variance over all of them.

Every term takes the head's outputs before L2 normalisation, real float [n, d] and synthetic float [n, d], and returns a
scalar of float64. Row i of the second is a view of row i of the first, but `gaussian_infomax` treats the domains apart
and takes unpaired rows. With several workers the rows are those of the global batch (attrib.train.all_gather), since a
covariance is no mean of the covariances of its parts.

Notation: Z is centred unless said otherwise, C = Z'Z / n its covariance, R its correlation matrix. All statistics are
in float64: the log-determinant of a nearly singular matrix is lost in float32, and autocast leaves float64 alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.common.errors import AttribError

# Keeps a constant dimension from dividing by zero: its correlation with everything, itself included, is then zero.
VARIANCE_FLOOR = 1e-12


def gaussian_infomax(real: Tensor, synthetic: Tensor, eps: float = 1e-6) -> Tensor:
    """-1/2 logdet(R + eps I), summed over the domains: the total correlation of a Gaussian (Linsker, Neural Computation
    4:691, 1992).

    Zero, up to eps, when every domain is decorrelated: for a linear head with outputs of unit variance, that is
    whitening. With n <= d eps alone bounds the term. Raises AttribError if an output is not finite.
    """
    return sum(-_log_det_of_product(_standardised(z) / len(z) ** 0.5, eps) / 2 for z in (real, synthetic))


class RunningCovariance(nn.Module):
    """Exponential moving averages of both domains' covariances, which start at the identity; for `cor_infomax`.

    Buffers: real and synthetic, float64 [d, d]. momentum: the share that a step keeps of the average.
    """

    def __init__(self, dim: int, momentum: float = 0.99):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("real", torch.eye(dim, dtype=torch.float64))
        self.register_buffer("synthetic", torch.eye(dim, dtype=torch.float64))

    def update(self, real: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
        """The averages with this batch, with a gradient through the batch's part only; kept in training mode, as by
        BatchNorm."""
        averages = []
        for buffer, z in ((self.real, real), (self.synthetic, synthetic)):
            average = self.momentum * buffer + (1 - self.momentum) * _covariance(_centred(z))
            if self.training:
                buffer.copy_(average.detach())
            averages.append(average)
        return averages[0], averages[1]


def cor_infomax(real: Tensor, synthetic: Tensor, running: RunningCovariance, alpha: float, eps: float = 1e-6) -> Tensor:
    """-(logdet(C1 + eps I) + logdet(C2 + eps I)) / d + alpha * mse(z1, z2): CorInfoMax (arXiv 2209.07999).

    C1 and C2 are the averages of `running`, which this call moves by one step. Unlike the published code, this centres
    on the batch's mean instead of a running one, and does not L2-normalise: scale costs only through alpha, so alpha
    must be positive. Raises AttribError if an output is not finite.
    """
    _check_paired(real, synthetic)
    log_dets = [_log_det(covariance, eps) for covariance in running.update(real, synthetic)]
    return -sum(log_dets) / real.shape[1] + alpha * F.mse_loss(real.double(), synthetic.double())


def cca_ssg(real: Tensor, synthetic: Tensor, decorrelation_weight: float = 1e-3) -> Tensor:
    """-tr(Z1'Z2 / n) + decorrelation_weight * (norm(I - R1)^2 + norm(I - R2)^2), Z of unit variance: CCA-SSG (arXiv
    2106.12484).

    CCA in its two halves: the trace aligns the domains and needs pairs, the constraint whitens each and needs none.
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


def _centred(z: Tensor) -> Tensor:
    z = z.double()
    return z - z.mean(dim=0)


def _standardised(z: Tensor) -> Tensor:
    centred = _centred(z)
    return centred * centred.square().mean(dim=0).clamp(min=VARIANCE_FLOOR).rsqrt()


def _covariance(centred: Tensor) -> Tensor:
    return centred.T @ centred / len(centred)


def _ridged(matrix: Tensor, eps: float) -> Tensor:
    return matrix + eps * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _log_det_of_product(rows: Tensor, eps: float) -> Tensor:
    """logdet(rows' rows + eps I) of rows [n, d]: by Sylvester's identity of an n x n matrix, where n < d."""
    num, dim = rows.shape
    if num >= dim:
        return _log_det(rows.T @ rows, eps)
    return _log_det(rows @ rows.T, eps) + (dim - num) * math.log(eps)


def _log_det(matrix: Tensor, eps: float) -> Tensor:
    """logdet(matrix + eps I) of a symmetric positive semidefinite matrix, by Cholesky."""
    factor, failure = torch.linalg.cholesky_ex(_ridged(matrix, eps))
    log_det = 2 * factor.diagonal().log().sum()
    if failure or not log_det.isfinite():
        raise AttribError(
            "a covariance of the outputs is not positive definite: they are not finite, or have collapsed beyond "
            "rounding; "
            f"lower the learning rate, or raise eps ({eps:g})"
        )
    return log_det
