"""Disentanglement: terms to minimise that decorrelate the dimensions of an embedding and spread variance over all of them.

Every term takes the head's outputs before L2 normalisation, real float [n, d] and synthetic float [n, d], and returns a scalar of
float64. Row i of the second is a view of row i of the first, but `gaussian_infomax` and `coding_rate` treat the domains apart and take
unpaired rows. With several workers the rows are those of the global batch (attrib.gather), since a covariance is no mean of the
covariances of its parts.

Notation: Z is centred unless said otherwise, C = Z'Z / n its covariance, R its correlation matrix. All statistics are in float64: the
log-determinant of a nearly singular matrix is lost in float32, and autocast leaves float64 alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.errors import AttribError

# Keeps a constant dimension from dividing by zero: its correlation with everything, itself included, is then zero.
VARIANCE_FLOOR = 1e-12


def gaussian_infomax(real: Tensor, synthetic: Tensor, eps: float = 1e-6) -> Tensor:
    """-1/2 logdet(R + eps I), summed over the domains: the total correlation of a Gaussian (Linsker, Neural Computation 4:691, 1992).

    Zero, up to eps, when every domain is decorrelated: for a linear head with outputs of unit variance, that is whitening. With n <= d
    eps alone bounds the term. Raises AttribError if an output is not finite.
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
        """The averages with this batch, with a gradient through the batch's part only; kept in training mode, as by BatchNorm."""
        averages = []
        for buffer, z in ((self.real, real), (self.synthetic, synthetic)):
            average = self.momentum * buffer + (1 - self.momentum) * _covariance(_centred(z))
            if self.training:
                buffer.copy_(average.detach())
            averages.append(average)
        return averages[0], averages[1]


def cor_infomax(real: Tensor, synthetic: Tensor, running: RunningCovariance, alpha: float, eps: float = 1e-6) -> Tensor:
    """-(logdet(C1 + eps I) + logdet(C2 + eps I)) / d + alpha * mse(z1, z2): CorInfoMax (arXiv 2209.07999).

    C1 and C2 are the averages of `running`, which this call moves by one step. Unlike the published code, this centres on the batch's
    mean instead of a running one, and does not L2-normalise: scale costs only through alpha, so alpha must be positive. Raises
    AttribError if an output is not finite.
    """
    _check_paired(real, synthetic)
    log_dets = [_log_det(covariance, eps) for covariance in running.update(real, synthetic)]
    return -sum(log_dets) / real.shape[1] + alpha * F.mse_loss(real.double(), synthetic.double())


def log_det_mutual_information(real: Tensor, synthetic: Tensor, eps: float = 1e-6) -> Tensor:
    """-logdet C1 - logdet C2 + logdet C1|2 + logdet C2|1, + eps I in each: log-det mutual information (arXiv 2209.07999).

    C1|2 = C1 - C12 (C2 + eps I)^-1 C12' is the covariance of the error of the best linear prediction of domain 1 from domain 2; C2|1
    likewise. Raises AttribError if an output is not finite.
    """
    _check_paired(real, synthetic)
    first, second = _centred(real), _centred(synthetic)
    c1, c2, c12 = _covariance(first), _covariance(second), first.T @ second / len(first)
    error1 = c1 - c12 @ torch.linalg.solve(_ridged(c2, eps), c12.T)
    error2 = c2 - c12.T @ torch.linalg.solve(_ridged(c1, eps), c12)
    return _log_det(error1, eps) + _log_det(error2, eps) - _log_det(c1, eps) - _log_det(c2, eps)


def infomax_ica(weight: Tensor, outputs: Tensor) -> Tensor:
    """-(log abs(det W) + mean over rows of sum_i log g'(u_i)), g the logistic function (Neural Computation 7:1129, 1995).

    weight: W float [d, d], the head's last linear map; outputs: u float [n, d] = x W' (+ bias) of one or both domains. Minus the
    gradient times W'W is the natural gradient, [I + (1 - 2 g(u)) u'] W in the mean over rows. Raises AttribError if W is not square.
    """
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise AttribError(
            f"infomax ICA needs a square linear map, not {list(weight.shape)}; give the head as many outputs as inputs"
        )
    outputs = outputs.double()
    log_slope = F.logsigmoid(outputs) + F.logsigmoid(-outputs)
    return -(torch.linalg.slogdet(weight.double()).logabsdet + log_slope.sum(dim=1).mean())


def coding_rate(real: Tensor, synthetic: Tensor, distortion: float = 0.5) -> Tensor:
    """-1/2 logdet(I + d / (n distortion^2) Z'Z), summed over the domains: the coding rate of MCR2 (arXiv 2006.08558), maximised.

    Z has L2-normalised rows and is not centred. Raises AttribError if an output is not finite.
    """
    rates = []
    for z in (real, synthetic):
        directions = F.normalize(z.double(), dim=1)
        num, dim = directions.shape
        rates.append(_log_det_of_product((dim / num) ** 0.5 / distortion * directions, 1.0) / 2)
    return -sum(rates)


def barlow_twins(real: Tensor, synthetic: Tensor, redundancy_weight: float = 5e-3) -> Tensor:
    """sum_i (1 - c_ii)^2 + redundancy_weight * sum_{i != j} c_ij^2, c the cross-correlation of the domains (arXiv 2103.03230)."""
    _check_paired(real, synthetic)
    cross = _standardised(real).T @ _standardised(synthetic) / len(real)
    return (1 - cross.diagonal()).square().sum() + redundancy_weight * _off_diagonal_squares(cross)


def vicreg(
    real: Tensor,
    synthetic: Tensor,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """25 mse(z1, z2) + 25 mean relu(1 - sqrt(variance + eps)) + sum_{i != j} C_ij^2 / d: VICReg (arXiv 2105.04906).

    As in the published code, the variance term is a mean over both domains and the covariance term a sum; the variance is over n here.
    """
    _check_paired(real, synthetic)
    covariances = [_covariance(_centred(z)) for z in (real, synthetic)]
    invariance = F.mse_loss(real.double(), synthetic.double())
    variance = sum(F.relu(1 - (c.diagonal() + eps).sqrt()).mean() for c in covariances) / 2
    covariance = sum(_off_diagonal_squares(c) for c in covariances) / real.shape[1]
    return invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance


def cca_ssg(real: Tensor, synthetic: Tensor, decorrelation_weight: float = 1e-3) -> Tensor:
    """-tr(Z1'Z2 / n) + decorrelation_weight * (norm(I - R1)^2 + norm(I - R2)^2), Z of unit variance: CCA-SSG (arXiv 2106.12484).

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
            "this term needs a synthetic view of each real picture, in the same order"
        )


def _centred(z: Tensor) -> Tensor:
    z = z.double()
    return z - z.mean(dim=0)


def _standardised(z: Tensor) -> Tensor:
    centred = _centred(z)
    return centred * centred.square().mean(dim=0).clamp(min=VARIANCE_FLOOR).rsqrt()


def _covariance(centred: Tensor) -> Tensor:
    return centred.T @ centred / len(centred)


def _correlation(z: Tensor) -> Tensor:
    return _covariance(_standardised(z))


def _off_diagonal_squares(matrix: Tensor) -> Tensor:
    return matrix.square().sum() - matrix.diagonal().square().sum()


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
            "a covariance of the outputs is not positive definite: they are not finite, or have collapsed beyond rounding; "
            f"lower the learning rate, or raise eps ({eps:g})"
        )
    return log_det
