"""Discriminants against the generalised eigenproblem, logistic scores against a simple Newton minimiser."""

import numpy as np
import pytest
from support.generators import STORAGE

from attrib.common.errors import AttribError
from attrib.generators.fingerprints.discriminant import fit_discriminant as fit_from_statistics
from attrib.generators.fingerprints.discriminant import (
    fit_whitening,
    ledoit_wolf,
    load_discriminant,
    model_statistics,
    save_discriminant,
)
from attrib.generators.fingerprints.scoring import logistic_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def groups(num_groups: int, num_rows: int, dimension: int, seed: int = 0) -> list[np.ndarray]:
    """Gaussians of one covariance around different means, of unequal counts."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((dimension, dimension))
    means = random.standard_normal((num_groups, dimension))
    return [mean + random.standard_normal((num_rows + g, dimension)) @ mixing for g, mean in enumerate(means)]


def fit_discriminant(parts, shrinkage, num_directions):
    return fit_from_statistics(model_statistics(parts), shrinkage, num_directions)


def within_covariance(parts: list[np.ndarray], shrinkage: float) -> np.ndarray:
    total = 0.0
    for rows in parts:
        for row in rows:
            total = total + np.outer(row - rows.mean(axis=0), row - rows.mean(axis=0))
    covariance = total / (sum(map(len, parts)) - len(parts))
    identity = np.eye(len(covariance))
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * identity


def test_ledoit_wolf_is_the_sum_of_its_definition():
    rows = np.random.default_rng(0).standard_normal((30, 5)) * [1, 2, 3, 1, 1]
    rows -= rows.mean(axis=0)
    covariance = rows.T @ rows / 30
    mean_variance = sum(covariance[i, i] for i in range(5)) / 5
    distance = sum((covariance[i, j] - mean_variance * (i == j)) ** 2 for i in range(5) for j in range(5))
    error = sum(((np.outer(row, row) - covariance) ** 2).sum() for row in rows) / 30**2
    fourth = sum((row @ row) ** 2 for row in rows)
    assert ledoit_wolf(covariance, fourth, 30) == pytest.approx(error / distance, rel=1e-12)
    assert ledoit_wolf(np.eye(5), fourth, 30) == 1


def test_two_gaussians_are_separated_along_the_closed_form():
    parts = groups(2, 40, 6)
    found = fit_discriminant(parts, 0.2, None)
    expected = np.linalg.solve(within_covariance(parts, 0.2), parts[1].mean(axis=0) - parts[0].mean(axis=0))
    assert found.projection.shape == (6, 1)
    cosine = found.projection[:, 0] @ expected / np.linalg.norm(found.projection) / np.linalg.norm(expected)
    assert abs(cosine) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(found.mean, (parts[0].mean(axis=0) + parts[1].mean(axis=0)) / 2)


@pytest.mark.parametrize("shrinkage", [0.05, 1.0])
def test_directions_solve_the_generalised_eigenproblem(shrinkage):
    parts = groups(5, 30, 8)
    found = fit_discriminant(iter(parts), shrinkage, None)
    within = within_covariance(parts, shrinkage)
    means = np.stack([rows.mean(axis=0) for rows in parts])
    between = np.cov(means.T, bias=True) * len(means)
    values, vectors = np.linalg.eig(np.linalg.solve(within, between))
    order = np.argsort(-values.real)[:4]
    assert found.projection.shape == (8, 4)
    for k, j in enumerate(order):
        vector = vectors[:, j].real
        cosine = vector @ found.projection[:, k] / np.linalg.norm(vector) / np.linalg.norm(found.projection[:, k])
        assert abs(cosine) == pytest.approx(1, abs=1e-7)
    np.testing.assert_allclose(found.projection.T @ within @ found.projection, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(fit_discriminant(parts, shrinkage, 2).projection, found.projection[:, :2])


def test_the_shrinkage_is_estimated_from_all_centred_rows():
    parts = groups(3, 20, 4)
    centred = np.concatenate([rows - rows.mean(axis=0) for rows in parts])
    expected = ledoit_wolf(centred.T @ centred / len(centred), sum((row @ row) ** 2 for row in centred), len(centred))
    assert 0 < expected < 1
    found = fit_discriminant(parts, "ledoit_wolf", None)
    assert found.shrinkage == pytest.approx(expected)
    np.testing.assert_allclose(found.projection, fit_discriminant(parts, expected, None).projection)


def test_fewer_images_than_dimensions_are_enough():
    found = fit_discriminant(groups(4, 3, 50), "ledoit_wolf", None)
    assert found.projection.shape == (50, 3) and np.isfinite(found.projection).all()


def test_a_whitening_removes_the_level_and_whitens_the_rest():
    parts = groups(4, 30, 7)
    statistics = model_statistics(parts)
    found = fit_whitening(statistics.means.mean(axis=0), statistics.covariance, 0.2, without_level=True)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(found(rows + 3.0), found(rows), atol=1e-9)
    levelled = [part - part.mean(axis=1, keepdims=True) for part in parts]
    expected = np.linalg.inv(within_covariance(levelled, 0.2))
    without_level = np.eye(7) - 1 / 7
    np.testing.assert_allclose(found.projection @ found.projection.T, without_level @ expected @ without_level)
    np.testing.assert_allclose(found.mean, np.mean([part.mean(axis=0) for part in parts], axis=0))
    whole = fit_whitening(statistics.means.mean(axis=0), statistics.covariance, 0.2, without_level=False)
    np.testing.assert_allclose(
        whole.projection.T @ within_covariance(parts, 0.2) @ whole.projection, np.eye(7), atol=1e-9
    )


def test_a_pool_that_cannot_be_fitted_is_refused():
    with pytest.raises(AttribError, match="2 models or more, and the pool has 1"):
        fit_discriminant(groups(1, 5, 3), 0.1, None)
    with pytest.raises(AttribError, match="model 1 of the pool has 1 images"):
        fit_discriminant([np.zeros((2, 3)), np.zeros((1, 3))], 0.1, None)
    with pytest.raises(AttribError, match="all images of each model are equal"):
        fit_discriminant([np.zeros((2, 3)), np.ones((2, 3))], 0.1, None)


def test_a_discriminant_is_the_same_after_its_file(tmp_path):
    fitted = fit_discriminant(groups(4, 30, 7), 0.1, None)
    uri = str(tmp_path / "lda.safetensors")
    save_discriminant(fitted, {"pool": "abc"}, uri, STORAGE)
    found, declared = load_discriminant(uri, STORAGE)
    assert declared == {"pool": "abc"} and found.shrinkage == 0.1
    assert np.array_equal(found.mean, fitted.mean) and np.array_equal(found.projection, fitted.projection)
    rows = groups(1, 5, 7, seed=3)[0]
    expected = [[(row - fitted.mean) @ column for column in fitted.projection.T] for row in rows]
    np.testing.assert_allclose(found(rows), expected)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "lda.safetensors").write_bytes(content)
    with pytest.raises(AttribError, match=r"is not readable .*; run jobs.fingerprint again"):
        load_discriminant(str(tmp_path / "lda.safetensors"), STORAGE)
    with pytest.raises(AttribError, match="absent does not exist; run jobs"):
        load_discriminant(str(tmp_path / "absent"), STORAGE)


def slow_logistic(rows, labels, num_classes, strength):
    """The minimum by Newton's method on all numbers at once."""
    num_rows, dimension = rows.shape
    extended = np.column_stack([rows, np.ones(num_rows)])
    targets = np.eye(num_classes)[labels]
    share = num_rows / num_classes / targets.sum(axis=0)[labels]
    penalty = np.tile(np.append(np.full(dimension, strength), 1e-9), (num_classes, 1)).ravel()
    weights = np.zeros(num_classes * (dimension + 1))
    for _ in range(60):
        logits = extended @ weights.reshape(num_classes, -1).T
        probability = np.exp(logits - logits.max(axis=1, keepdims=True))
        probability /= probability.sum(axis=1, keepdims=True)
        gradient = ((probability - targets) * share[:, None]).T @ extended
        hessian = np.diag(penalty)
        for p, w, x in zip(probability, share, extended):
            hessian += w * np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x))
        weights = weights - np.linalg.solve(hessian, gradient.ravel() + penalty * weights)
    weights = weights.reshape(num_classes, -1)
    return weights[:, :-1].T, weights[:, -1] - weights[:, -1].mean()


@pytest.mark.parametrize("num_groups", [2, 3])
@pytest.mark.parametrize("dimension", [3, 40])  # fewer and more than there are rows
def test_logistic_scores_are_those_of_the_only_minimum(dimension, num_groups):
    parts = groups(num_groups, 6, dimension)
    rows, labels = np.concatenate(parts), np.repeat(range(num_groups), [len(part) for part in parts])
    scaled = (rows - rows.mean(axis=0)) / np.sqrt(np.square(rows - rows.mean(axis=0)).mean())
    weights, bias = slow_logistic(scaled, labels, num_groups, 2.0)
    logits = scaled @ weights + bias
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logistic_scores(2.0)(parts)(rows), expected, atol=1e-4)
    assert logistic_scores(2.0)(parts[:1])(rows).tolist() == [[0.0]] * len(rows)


def test_logistic_scores_are_log_probabilities_independent_of_counts():
    parts = [rows.astype(np.float32) for rows in groups(3, 10, 5)]
    queries = np.concatenate(parts)
    scores = logistic_scores(1.0)
    found = scores(parts)(queries)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-6)
    assert (found.argmax(axis=1) == np.repeat(range(3), [10, 11, 12])).mean() > 0.8
    # The same rows written twice change nothing but the penalty's weight against the loss.
    doubled = logistic_scores(2.0)([np.concatenate([rows, rows]) for rows in parts])(queries)
    np.testing.assert_allclose(doubled, found, atol=1e-4)
    # Equal references of two generators give equal probabilities, whatever their counts.
    np.testing.assert_allclose(np.exp(scores([queries[:1], queries[:1].repeat(9, axis=0)])(queries)), 0.5, atol=1e-6)
    with pytest.raises(AttribError, match="has no references"):
        scores([parts[0], parts[1][:0]])
