"""CCA against its definition as an eigenproblem and on known correlations; alignment and whiteness against loops."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from attrib.common.errors import AttribError
from attrib.evaluate.cca import (
    alignment,
    diagonal_share,
    fit_directions,
    folds_by_group,
    plot,
    summarise,
    whiteness,
)

KNOWN = np.array([0.95, 0.8, 0.5, 0.2, 0, 0])


def known_pairs(num_pairs: int, seed: int, mixed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Pairs with the canonical correlations KNOWN; mixed: with a linear map and a mean of its own in each domain."""
    generator = np.random.default_rng(seed)
    real, noise = generator.standard_normal((2, num_pairs, 6))
    synthetic = KNOWN * real + np.sqrt(1 - KNOWN**2) * noise
    if not mixed:
        return real, synthetic
    maps = np.random.default_rng(99).standard_normal((2, 6, 6)) + 2 * np.eye(6)
    return real @ maps[0] + 3, synthetic @ maps[1] - 5


def eigen_cca(real: np.ndarray, synthetic: np.ndarray, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """Directions [d, d] of both domains by the definition, Sxx^-1 Sxy Syy^-1 Syx u = rho^2 u, without whitening."""
    x, y = real - real.mean(axis=0), synthetic - synthetic.mean(axis=0)
    sxx, syy, sxy = (a.T @ b / len(x) for a, b in ((x, x), (y, y), (x, y)))
    sxx, syy = ((1 - shrinkage) * s + shrinkage * np.mean(np.diag(s)) * np.eye(len(s)) for s in (sxx, syy))
    values, u = np.linalg.eig(np.linalg.solve(sxx, sxy) @ np.linalg.solve(syy, sxy.T))
    u = np.real(u[:, np.argsort(-np.real(values))])
    return u, np.linalg.solve(syy, sxy.T @ u)


def held_out_correlations(fit, held_out, num_components: int = 6, shrinkage: float = 0.1) -> list[float]:
    u, v = fit_directions(*fit, num_components, shrinkage)
    return [np.corrcoef(held_out[0] @ u[:, j], held_out[1] @ v[:, j])[0, 1] for j in range(u.shape[1])]


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_correlations_equal_those_of_the_eigenproblem(shrinkage):
    fit, held_out = known_pairs(300, 1), known_pairs(200, 2)
    u, v = eigen_cca(*fit, shrinkage)
    expected = [np.corrcoef(held_out[0] @ u[:, j], held_out[1] @ v[:, j])[0, 1] for j in range(6)]
    np.testing.assert_allclose(held_out_correlations(fit, held_out, 6, shrinkage), expected, atol=1e-8)


def test_shrinkage_with_fewer_pairs_than_coordinates_is_ridge_cca():
    """num_components >= n - 1 keeps all variance, so the directions equal those of the full problem with a ridge."""
    generator = np.random.default_rng(3)
    real = generator.standard_normal((20, 30))
    synthetic = real + generator.standard_normal((20, 30))
    directions = fit_directions(real, synthetic, 1000, 0.5)
    assert directions[0].shape == (30, 19)
    x, y = real - real.mean(axis=0), synthetic - synthetic.mean(axis=0)
    basis = np.linalg.svd(np.concatenate([x, y]), full_matrices=False)[2][:19]
    u, v = eigen_cca(x @ basis.T, y @ basis.T, 0.5)
    for found, projected in zip(directions, (u, v)):
        cosine = np.abs((found * (basis.T @ projected)).sum(axis=0))
        norms = np.linalg.norm(found, axis=0) * np.linalg.norm(projected, axis=0)
        np.testing.assert_allclose(cosine[:5], norms[:5], rtol=1e-6)


def test_known_correlations_are_found_on_held_out_pairs_under_any_map():
    found = held_out_correlations(known_pairs(6000, 4), known_pairs(6000, 5), shrinkage=0.0)
    np.testing.assert_allclose(found, KNOWN, atol=0.04)
    summary = summarise(*known_pairs(6000, 4), np.arange(6000), shrinkage=0.0)
    np.testing.assert_allclose(summary.canonical_correlations, KNOWN, atol=0.04)
    np.testing.assert_allclose(summary.fitted_correlations, KNOWN, atol=0.04)


def test_unrelated_pairs_correlate_in_the_fit_but_not_when_held_out():
    real, synthetic = np.random.default_rng(6).standard_normal((2, 100, 300))
    summary = summarise(real, synthetic, np.arange(100))
    assert len(summary.canonical_correlations) == 32
    assert summary.fitted_correlations[0] > 0.8
    # Each of the 32 correlations of 100 pairs has a standard deviation of 0.1.
    assert abs(np.mean(summary.canonical_correlations)) < 0.06 and np.abs(summary.canonical_correlations).max() < 0.4
    assert abs(summary.alignment) < 0.03


def test_joint_components_keep_the_correlation_of_a_white_model():
    """Every direction correlates 0.5. Components of each domain alone are arbitrary and would overlap little."""
    generator = np.random.default_rng(7)
    shared, *noise = generator.standard_normal((3, 400, 128))
    summary = summarise(shared + noise[0], shared + noise[1], np.arange(400), num_components=16)
    assert np.mean(summary.canonical_correlations) == pytest.approx(0.5, abs=0.06)
    assert summary.alignment == pytest.approx(0.5, abs=0.01)
    assert summary.variance_kept < 0.35


def test_copies_of_a_pair_stay_in_one_fold():
    """Noise in three copies: if copies were in several folds, held-out correlations would equal those of the fit."""
    real, synthetic = np.random.default_rng(8).standard_normal((2, 60, 40))
    real, synthetic, groups = (np.repeat(a, 3, axis=0) for a in (real, synthetic, np.arange(60)))
    by_group = summarise(real, synthetic, groups)
    apart = summarise(real, synthetic, np.arange(180))
    assert np.mean(by_group.canonical_correlations) < 0.15 < 0.5 < np.mean(apart.canonical_correlations)
    assert (by_group.num_groups, by_group.num_pairs, by_group.real.num_rows) == (60, 180, 60)


def test_folds_keep_groups_and_balance():
    groups = np.array([f"g{i}" for i in np.random.default_rng(9).integers(0, 40, 300)])
    folds = folds_by_group(groups, 4, seed=1)
    assert all(len(set(folds[groups == name].tolist())) == 1 for name in set(groups.tolist()))
    assert np.ptp(np.bincount(folds, minlength=4)) <= 12
    assert np.array_equal(folds, folds_by_group(groups, 4, seed=1))
    assert not np.array_equal(folds, folds_by_group(groups, 4, seed=2))


def test_alignment_equals_the_loop():
    real, synthetic = known_pairs(500, 10)
    real[:, 2] = 4.0
    rows = [np.corrcoef(real[:, j], synthetic[:, j])[0, 1] for j in range(6) if j != 2]
    mean, weighted = alignment(real, synthetic)
    assert mean == pytest.approx(sum(rows) / 6)
    sxy, sxx, syy = (
        sum(np.cov(a[:, j], b[:, j])[0, 1] for j in range(6))
        for a, b in ((real, synthetic), (real, real), (synthetic, synthetic))
    )
    assert weighted == pytest.approx(sxy / np.sqrt(sxx * syy))
    turn = np.linalg.qr(np.random.default_rng(11).standard_normal((6, 6)))[0]
    assert alignment(real @ turn, synthetic @ turn)[1] == pytest.approx(weighted)


def test_the_diagonal_share_is_unbiased_in_small_samples():
    """The plain sample estimate is far off, because each of d * d entries has noise of variance 1 / n."""
    generator = np.random.default_rng(12)
    shared, *noise = generator.standard_normal((3, 200, 300))
    real, synthetic = shared + 0.5 * noise[0], shared + 0.5 * noise[1]
    folds = folds_by_group(np.arange(200))
    plain = np.corrcoef(real, synthetic, rowvar=False)[:300, 300:] ** 2
    assert np.trace(plain) / plain.sum() < 0.5
    assert diagonal_share(real, synthetic, folds) == pytest.approx(1, abs=0.1)
    turned = np.roll(synthetic, 1, axis=1)
    assert diagonal_share(real, turned, folds) == pytest.approx(0, abs=0.05)
    # One factor in all coordinates: all entries of Rxy are equal, so the diagonal has a share of 1 / d.
    factor = generator.standard_normal((200, 1)) + 0.1 * generator.standard_normal((2, 200, 300))
    assert diagonal_share(*factor, folds) == pytest.approx(1 / 300, rel=0.05)
    large = known_pairs(20000, 13)
    plain = np.corrcoef(*large, rowvar=False)[:6, 6:] ** 2
    assert diagonal_share(*large, folds_by_group(np.arange(20000))) == pytest.approx(
        np.trace(plain) / plain.sum(), abs=0.01
    )


@pytest.mark.parametrize("shape", [(400, 12), (30, 50)])
def test_whiteness_equals_the_formulas(shape):
    generator = np.random.default_rng(14)
    vectors = generator.standard_normal(shape) @ generator.standard_normal((shape[1], shape[1])) + 2
    found = whiteness(vectors, 0.2)
    correlation = np.corrcoef(vectors, rowvar=False)
    shrunk = 0.8 * correlation + 0.2 * np.eye(shape[1])
    assert found.redundancy == pytest.approx(-np.linalg.slogdet(shrunk)[1] / shape[1])
    values = np.linalg.eigvalsh(np.cov(vectors, rowvar=False))
    part = values[values > 1e-12 * values[-1]] / values.sum()
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(part * np.log(part))) / shape[1], rel=1e-6)
    pairs = [abs(correlation[i, j]) for i in range(shape[1]) for j in range(shape[1]) if i != j]
    assert found.mean_correlation == pytest.approx(np.mean(pairs))


def test_whiteness_distinguishes_white_redundant_and_collapsed_vectors():
    generator = np.random.default_rng(15)
    white = generator.standard_normal((4000, 10))
    found = whiteness(white)
    assert found.redundancy == pytest.approx(0, abs=0.01) and found.effective_rank == pytest.approx(1, abs=0.01)
    copied = whiteness(np.concatenate([white, white], axis=1))
    assert copied.redundancy > 0.5 and copied.effective_rank == pytest.approx(0.5, abs=0.01)
    # Half of the coordinates have no variance: correlations do not show it, the effective rank does.
    dead = whiteness(np.concatenate([white, np.ones((4000, 10))], axis=1))
    assert dead.redundancy == pytest.approx(found.redundancy)
    assert (dead.num_constant, dead.effective_rank) == (10, pytest.approx(0.5, abs=0.01))


@pytest.fixture(scope="module")
def summary():
    return summarise(*known_pairs(300, 16), np.arange(300) // 2, num_components=4)


def test_whitening_raises_the_whiteness_of_the_summary(summary):
    white = summarise(*known_pairs(300, 16, mixed=False), np.arange(300) // 2)
    assert summary.whiteness < -0.1 and white.whiteness == pytest.approx(0, abs=0.02)


def test_the_summary_is_deterministic_and_plain_json(summary):
    assert summarise(*known_pairs(300, 16), np.arange(300) // 2, num_components=4) == summary
    read = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert (
        read["canonical_correlations"] == list(summary.canonical_correlations)
        and len(summary.canonical_correlations) == 4
    )
    assert read["real"]["redundancy"] == summary.real.redundancy and read["whiteness"] == summary.whiteness
    assert read["num_groups"] == 150


def test_errors_name_unusable_input():
    real, synthetic = known_pairs(40, 17)
    broken = real.copy()
    broken[7, 2] = np.nan
    groups = np.arange(40)
    for call, expected in [
        (lambda: summarise(real, synthetic[:, :3], groups), r"\(40, 6\) and synthetic \(40, 3\)"),
        (lambda: summarise(broken, synthetic, groups), "real vector 7"),
        (lambda: summarise(real, synthetic, groups[:9]), "9 group labels for 40 pairs"),
        (lambda: summarise(real, synthetic, groups // 20), "2 groups of pairs cannot be split into 5"),
        (lambda: summarise(real, synthetic, groups, shrinkage=1.0), "shrinkage 1"),
        (lambda: summarise(real, synthetic, groups, num_components=0), "num_components 0"),
        (lambda: summarise(real * 0, synthetic, groups), "real vectors of 32 pairs vary in fewer"),
        (lambda: whiteness(np.ones((5, 3))), "no covariance"),
        (lambda: whiteness(real[:4], 0.0), r"above 0 if .* \(here 3\) than they have coordinates \(6\)"),
        (lambda: whiteness(np.repeat(real, 2, axis=1), 0.0), r"\(here 6\) than they have coordinates \(12\)"),
        (lambda: whiteness(broken), "vector 7"),
        (lambda: plot({}), "no summary"),
    ]:
        with pytest.raises(AttribError, match=expected):
            call()


def test_the_plot_shows_the_summary_in_text(summary):
    methods = {"raw": summary, "short": replace(summary, canonical_correlations=(0.5,), alignment=-0.4)}
    text = "".join(ElementTree.fromstring(plot(methods)).itertext())
    assert f"raw: mean canonical correlation {np.mean(summary.canonical_correlations):.3f}, alignment" in text
    assert f"short: mean canonical correlation 0.500, alignment -0.400, whiteness {summary.whiteness:.3f}" in text
