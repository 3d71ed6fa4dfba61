"""Fidelity and diversity of a pool against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from attrib.common.errors import AttribError
from attrib.generators.signals.spectrum import azimuthal_power, log_spectrum, residual
from attrib.generators.synthesis.measures import (
    PATCH_PX,
    diversity,
    frechet_distance,
    frechet_frequency_distance,
    frequency_profile,
)


def covariance(rng, dimension, rank=None):
    root = rng.normal(size=(dimension, rank or dimension))
    return root @ root.T


def test_frechet_distance_of_one_dimension():
    mean, other = np.array([1.0]), np.array([4.0])
    found = frechet_distance(mean, np.array([[4.0]]), other, np.array([[9.0]]))
    assert found == pytest.approx(3**2 + (2 - 3) ** 2)


def test_frechet_distance_of_covariances_that_commute():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    first, second = rng.uniform(0, 3, 5), rng.uniform(0, 3, 5)
    found = frechet_distance(np.zeros(5), turn * first @ turn.T, np.ones(5), turn * second @ turn.T)
    assert found == pytest.approx(5 + np.square(np.sqrt(first) - np.sqrt(second)).sum())


@pytest.mark.parametrize("rank", [6, 2])
def test_frechet_distance_against_the_matrix_root(rank):
    rng = np.random.default_rng(1)
    first, second = covariance(rng, 6, rank), covariance(rng, 6)
    values = np.linalg.eigvals(first @ second).real.clip(0)
    expected = np.trace(first) + np.trace(second) - 2 * np.sqrt(values).sum()
    found = frechet_distance(np.zeros(6), first, np.zeros(6), second)
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(np.ones(6), first, np.ones(6), first) == pytest.approx(0, abs=1e-6 * np.trace(first))


def test_frechet_frequency_distance_is_that_of_fitted_gaussians():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(9, 3)), 1 + rng.normal(size=(7, 3))
    moments = [
        (x.sum(axis=0) / len(x), (x - x.mean(axis=0)).T @ (x - x.mean(axis=0)) / (len(x) - 1)) for x in (first, second)
    ]
    expected = frechet_distance(*moments[0], *moments[1])
    assert frechet_frequency_distance(first, second) == pytest.approx(expected)
    with pytest.raises(AttribError, match="needs two generators or more of each kind, got 9 synthetic and 1 real"):
        frechet_frequency_distance(first, second[:1])


def test_a_profile_is_the_log_of_the_mean_power_of_all_patches():
    images = torch.randint(0, 256, (3, 3, PATCH_PX, PATCH_PX), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    power = azimuthal_power(residual(images.float() / 255)).double().mean(dim=0)
    found = frequency_profile(list(images))
    assert found.shape == (PATCH_PX // 2,)
    np.testing.assert_allclose(found, np.log10(power.numpy()), rtol=1e-6)
    grey = torch.full((1, 3, PATCH_PX, PATCH_PX), 128, dtype=torch.uint8)
    assert np.isfinite(frequency_profile(grey)).all()


def test_diversity_against_plain_loops():
    rng = np.random.default_rng(3)
    samples = rng.integers(0, 256, (4, 5, 3, 16, 16), dtype=np.uint8)
    samples[1] = samples[0] // 2  # the same content by two models
    spectra = np.array(
        [
            [log_spectrum(residual(torch.from_numpy(i)[None].float() / 255))[0].numpy().ravel() for i in own]
            for own in samples
        ]
    )
    spectra = spectra.astype(np.float64)
    for i in range(5):
        spectra[:, i] -= sum(spectra[g, i] for g in range(4)) / 4
    means = [sum(own) / 5 for own in spectra]
    within = math.sqrt(np.mean([np.square(spectra[g, i] - means[g]).sum() for g in range(4) for i in range(5)]))
    pairs = [np.linalg.norm(means[g] - means[h]) for g in range(4) for h in range(g)]
    shares = np.linalg.eigvalsh(np.cov(np.array(means).T))[-3:]
    shares = shares / shares.sum()
    found = diversity(samples)
    assert found["separation"] == pytest.approx(np.mean(pairs) / within, rel=1e-4)
    assert found["effective_models"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert (found["num_models"], found["num_photographs"]) == (4, 5)


def test_copies_of_models_and_content_add_no_diversity():
    """Two models, each twice, have as many directions as two models, whatever the photographs show."""
    rng = np.random.default_rng(4)
    photographs = rng.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    pair = [photographs, np.roll(photographs, 1, axis=2) // 2]
    assert diversity(np.stack(pair * 2))["effective_models"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(AttribError, match="two models"):
        diversity(photographs[None])
