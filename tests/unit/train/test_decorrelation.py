"""Decorrelation losses, compared with NumPy loops over their formulas and with their theory."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from attrib.common.errors import AttribError
from attrib.train.losses.decorrelation import RunningCovariance, cca_ssg, cor_infomax, gaussian_infomax

pytestmark = pytest.mark.usefixtures("one_thread")

NUM, DIM = 12, 4
EPS = 1e-3


def running(dim: int = DIM) -> RunningCovariance:
    return RunningCovariance(dim, momentum=0.8)


def fresh_cor_infomax(real, synthetic):
    return cor_infomax(real, synthetic, running(real.shape[1]), alpha=3.0, eps=EPS)


TERMS = {
    "gaussian_infomax": partial(gaussian_infomax, eps=EPS),
    "cor_infomax": fresh_cor_infomax,
    "cca_ssg": partial(cca_ssg, decorrelation_weight=0.1),
}
PAIRED = sorted(set(TERMS) - {"gaussian_infomax"})


def mixed(seed: int, num: int = NUM, dim: int = DIM) -> np.ndarray:
    """Return correlated dimensions of unequal scale, not centred."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(num, dim)) @ generator.normal(size=(dim, dim)) + generator.normal(size=dim)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    real = mixed(1)
    synthetic = 0.7 * real + 0.5 * mixed(2)
    return torch.from_numpy(real).requires_grad_(), torch.from_numpy(synthetic).requires_grad_()


# The reference: one entry at a time, determinants by NumPy's LU.


def naive_covariance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    covariance = np.zeros((x.shape[1], y.shape[1]))
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            mean_x, mean_y = sum(x[:, i]) / len(x), sum(y[:, j]) / len(y)
            covariance[i, j] = sum((a - mean_x) * (b - mean_y) for a, b in zip(x[:, i], y[:, j])) / len(x)
    return covariance


def naive_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    deviation_x = np.sqrt(np.diag(naive_covariance(x, x)))
    deviation_y = np.sqrt(np.diag(naive_covariance(y, y)))
    return naive_covariance(x, y) / np.outer(deviation_x, deviation_y)


def naive_log_det(matrix: np.ndarray, eps: float) -> float:
    return math.log(np.linalg.det(matrix + eps * np.eye(len(matrix))))


def naive_gaussian_infomax(x, y):
    return -0.5 * naive_log_det(naive_correlation(x, x), EPS) - 0.5 * naive_log_det(naive_correlation(y, y), EPS)


def naive_cor_infomax(x, y):
    log_dets = [naive_log_det(0.8 * np.eye(x.shape[1]) + 0.2 * naive_covariance(z, z), EPS) for z in (x, y)]
    return -sum(log_dets) / x.shape[1] + 3.0 * sum((a - b) ** 2 for a, b in zip(x.flat, y.flat)) / x.size


def naive_cca_ssg(x, y):
    value = -np.trace(naive_correlation(x, y))
    for z in (x, y):
        difference = np.eye(z.shape[1]) - naive_correlation(z, z)
        value += 0.1 * sum(entry**2 for entry in difference.flat)
    return value


NAIVE = {
    "gaussian_infomax": naive_gaussian_infomax,
    "cor_infomax": naive_cor_infomax,
    "cca_ssg": naive_cca_ssg,
}


@pytest.mark.parametrize("name", TERMS)
def test_term_equals_the_formula(name, pair):
    # One dimension of small variance.
    scale = torch.tensor([1.0, 1.0, 0.1, 1.0], dtype=torch.float64)
    real, synthetic = (z * scale for z in pair)
    expected = NAIVE[name](real.detach().numpy(), synthetic.detach().numpy())
    assert TERMS[name](real, synthetic).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_gradient(name, pair):
    assert torch.autograd.gradcheck(TERMS[name], pair)


@pytest.mark.parametrize("name", TERMS)
def test_float32_and_autocast_keep_the_precision(name, pair):
    real, synthetic = (z.detach().float().requires_grad_() for z in pair)
    exact = TERMS[name](real.detach().double(), synthetic.detach().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = TERMS[name](real, synthetic)
    value.backward()
    assert value.dtype == torch.float64 and value.item() == pytest.approx(exact.item(), rel=1e-12)
    assert real.grad.dtype == torch.float32 and real.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(
    "hostile", ["fewer rows than dimensions", "a constant dimension", "two equal dimensions", "equal rows"]
)
def test_degenerate_outputs_stay_finite(name, hostile):
    num = 3 if hostile == "fewer rows than dimensions" else NUM
    real, synthetic = torch.from_numpy(mixed(3, num, 6)), torch.from_numpy(mixed(4, num, 6))
    if hostile == "a constant dimension":
        real[:, 2] = 0.1
    elif hostile == "two equal dimensions":
        real[:, 2] = real[:, 1]
    elif hostile == "equal rows":
        real[:] = real[0].clone()
    real.requires_grad_(), synthetic.requires_grad_()
    value = TERMS[name](real, synthetic)
    value.backward()
    assert value.isfinite() and real.grad.isfinite().all() and synthetic.grad.isfinite().all()


@pytest.mark.parametrize("name", PAIRED)
def test_unpaired_rows_are_an_error(name, pair):
    real, synthetic = pair
    with pytest.raises(AttribError, match="not paired"):
        TERMS[name](real, synthetic[:-1])
    with pytest.raises(AttribError, match="not paired"):
        TERMS[name](real, synthetic[:1])


@pytest.mark.parametrize("name", sorted(set(TERMS) - set(PAIRED)))
def test_separate_domains_need_no_pairs(name, pair):
    real, synthetic = pair
    value = TERMS[name](real, synthetic)
    torch.testing.assert_close(TERMS[name](real, synthetic.flip(0)), value, rtol=1e-10, atol=0)
    assert TERMS[name](real, synthetic[:-2]).isfinite()


@pytest.mark.parametrize("name", ["gaussian_infomax", "cor_infomax"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_an_error(name, bad, pair):
    real, synthetic = (z.detach().clone() for z in pair)
    synthetic[2, 1] = bad
    with pytest.raises(AttribError, match="training diverged"):
        TERMS[name](real, synthetic)


def whitening(z: torch.Tensor) -> torch.Tensor:
    """Return W of ZCA: (z - mean) W' has the identity as covariance."""
    values, vectors = torch.linalg.eigh(torch.cov(z.T, correction=0))
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def test_whitening_solves_gaussian_infomax():
    """Hadamard: logdet R <= 0, with equality only for decorrelated outputs and their rotations."""
    z = torch.from_numpy(mixed(5, num=200))
    weight = whitening(z)

    def term(weight):
        return gaussian_infomax(z @ weight.T, z @ weight.T, eps=0.0)

    assert term(weight).item() == pytest.approx(0, abs=1e-10)
    rotation = torch.linalg.qr(torch.from_numpy(mixed(6, DIM))).Q
    assert term(rotation @ weight).item() == pytest.approx(0, abs=1e-10)
    leaf = weight.clone().requires_grad_()
    assert torch.autograd.grad(term(leaf), leaf)[0].abs().max() < 1e-10
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        other = weight + 0.3 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
        assert term(other).item() > 1e-4


def test_gaussian_infomax_ignores_scale_and_offset(pair):
    real, synthetic = pair
    scale = torch.tensor([1e-3, 1.0, 50.0, -2.0], dtype=torch.float64)
    value = gaussian_infomax(real, synthetic)
    torch.testing.assert_close(gaussian_infomax(real * scale + 5, synthetic / scale - 3), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num", [2, 5, 6, 7])
@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_fewer_rows_than_dimensions_give_the_value_of_the_whole_matrix(num, eps):
    """For n < d the n x n determinant (Sylvester) has the value and the gradient of the d x d one."""
    dim = 6
    real, synthetic = (torch.from_numpy(mixed(seed, num, dim)).requires_grad_() for seed in (17, 18))
    value = gaussian_infomax(real, synthetic, eps)
    whole, naive = torch.zeros((), dtype=torch.float64), 0.0
    for z in (real, synthetic):
        whole = (
            whole - torch.linalg.slogdet(torch.corrcoef(z.T) + eps * torch.eye(dim, dtype=torch.float64)).logabsdet / 2
        )
        naive -= naive_log_det(naive_correlation(z.detach().numpy(), z.detach().numpy()), eps) / 2
    assert value.item() == pytest.approx(whole.item(), rel=1e-10)
    assert value.item() == pytest.approx(naive, rel=1e-8)
    found, expected = (torch.autograd.grad(loss, (real, synthetic)) for loss in (value, whole))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    # With two rows every correlation is 1 or -1, so the value is constant.
    assert num == 2 or all(gradient.abs().max() > 1e-3 for gradient in found)
    assert torch.autograd.gradcheck(partial(gaussian_infomax, eps=eps), (real, synthetic))


def test_running_covariance_averages(pair):
    """Three steps equal the sum of the series; the gradient is that of the last batch only."""
    average = running()
    batches = [torch.from_numpy(mixed(seed)) for seed in (11, 12, 13)]
    for batch in batches:
        leaf = batch.clone().requires_grad_()
        first, second = average.update(leaf, 2 * leaf)
    expected = 0.8**3 * np.eye(DIM)
    for age, batch in enumerate(reversed(batches)):
        expected += 0.2 * 0.8**age * naive_covariance(batch.numpy(), batch.numpy())
    np.testing.assert_allclose(average.real.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(
        average.synthetic.numpy(), 4 * expected - 3 * 0.8**3 * np.eye(DIM), rtol=1e-12, atol=1e-14
    )
    assert not average.real.requires_grad
    # d trace(C) / dz = 2 (z - mean) / n.
    (gradient,) = torch.autograd.grad(first.trace() + 0 * second.trace(), leaf)
    torch.testing.assert_close(gradient, 0.2 * 2 * (leaf - leaf.mean(dim=0)).detach() / NUM, rtol=1e-12, atol=1e-15)
    kept = average.real.clone()
    average.eval().update(*pair)
    assert torch.equal(average.real, kept)


def test_cor_infomax_updates_the_average_once(pair):
    average, twin = running(), running()
    cor_infomax(*pair, average, alpha=1.0).backward()
    twin.update(*pair)
    assert torch.equal(average.real, twin.real) and torch.equal(average.synthetic, twin.synthetic)
    second = cor_infomax(*pair, average, alpha=1.0)
    first = cor_infomax(*pair, twin, alpha=1.0)
    assert first.item() == second.item()


def test_cca_ssg_reaches_its_minimum():
    """For equal, white outputs: minus the number of dimensions."""
    z = torch.from_numpy(mixed(15, num=50))
    white = (z - z.mean(dim=0)) @ whitening(z).T
    assert cca_ssg(white, white).item() == pytest.approx(-DIM, rel=1e-12)
