"""The calibrator against data drawn from it, a grid and loops; pairs from the corpus against a search by loops."""

import math

import numpy as np
import pytest

from attrib.common.errors import AttribError
from attrib.shares import calibration
from attrib.shares.calibration import LEAST_OFFSET, Bin, fit_shares, pairs_from_corpus, reliability
from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares

TRUE = SharesSettings(inverse_temperature=18.0, offset=-120.0)


def smooth_shares(row: list[float], inverse_temperature: float, offset: float) -> list[float]:
    """Shares in AbC's training form, with softplus(beta = 100) instead of relu; absent candidates get nothing."""
    best = max(row)
    kept = []
    for s in row:
        weight = math.exp((s - best) * inverse_temperature) + 0.001 * offset
        kept.append(0.0 if s == -math.inf else math.log1p(math.exp(-abs(100 * weight))) / 100 + max(weight, 0.0))
    return [value / sum(kept) for value in kept]


def naive_cross_entropy(similarity, is_true, inverse_temperature, offset) -> float:
    losses = []
    for row, true in zip(similarity.tolist(), is_true.tolist()):
        shares = smooth_shares(row, inverse_temperature, offset)
        if any(true):
            losses.append(-sum(math.log(p) for p, t in zip(shares, true) if t) / sum(true))
    return sum(losses) / len(losses)


def cross_entropy(similarity, is_true, settings: SharesSettings) -> float:
    """Mean cross-entropy in nats that `fit_shares` minimises."""
    position = math.log(settings.inverse_temperature), settings.offset / LEAST_OFFSET
    return calibration._loss(position, *calibration._usable(similarity, is_true))[0]


def drawn(num_queries: int, seed: int, hard: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Queries with one true source each, drawn with the shares of TRUE as probabilities."""
    generator = np.random.default_rng(seed)
    similarity = -np.sort(-generator.uniform(0.3, 0.75, (num_queries, 8)), axis=1)
    similarity[::5, 6:] = -np.inf
    if hard:
        shares = soft_shares(similarity, TRUE)
    else:
        shares = np.array([smooth_shares(row, TRUE.inverse_temperature, TRUE.offset) for row in similarity.tolist()])
    chosen = (shares.cumsum(axis=1) < generator.random((num_queries, 1))).sum(axis=1)
    return similarity, chosen[:, None] == np.arange(8)


@pytest.fixture(scope="module")
def train():
    return drawn(8000, 1)


@pytest.fixture(scope="module")
def fitted(train):
    return fit_shares(*train)


def test_cross_entropy_equals_the_loop(train):
    similarity, is_true = train[0][:300], train[1][:300].copy()
    is_true[:40] = False
    is_true[40:80, :3] = True
    for settings in (TRUE, SharesSettings(), SharesSettings(inverse_temperature=0.5, offset=0.0)):
        expected = naive_cross_entropy(similarity, is_true, settings.inverse_temperature, settings.offset)
        assert cross_entropy(similarity, is_true, settings) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature, offset", [(0.7, -3.0), (18.0, -120.0), (70.0, -500.0), (900.0, -998.0)])
def test_the_gradient_is_that_of_the_loop(temperature, offset):
    similarity, is_true = drawn(60, 10)
    position = math.log(temperature), offset / LEAST_OFFSET
    _, gradient = calibration._loss(position, *calibration._usable(similarity, is_true))
    steps = [(1e-5 * temperature, 0.0), (0.0, 1e-5 * abs(offset))]
    # By the chain rule, from the scaled position to the two scalars.
    for found, (a, b) in zip((gradient / [temperature, LEAST_OFFSET]).tolist(), steps):
        high = naive_cross_entropy(similarity, is_true, temperature + a, offset + b)
        low = naive_cross_entropy(similarity, is_true, temperature - a, offset - b)
        assert found == pytest.approx((high - low) / (2 * (a + b)), rel=1e-4, abs=1e-7)


def test_the_fit_recovers_the_calibrator_of_the_data(fitted):
    assert fitted.inverse_temperature == pytest.approx(TRUE.inverse_temperature, rel=0.1)
    assert fitted.offset == pytest.approx(TRUE.offset, rel=0.15)


def test_the_fit_recovers_shares_drawn_with_relu():
    """softplus approximates relu, so the fitted offset differs, but the shares are the same."""
    found = fit_shares(*drawn(8000, 2, hard=True))
    similarity, _ = drawn(1000, 3)
    np.testing.assert_allclose(soft_shares(similarity, found), soft_shares(similarity, TRUE), atol=0.02)


def test_the_fit_beats_the_default_on_held_out_queries(fitted):
    held_out = drawn(3000, 3)
    nats, default, best = (cross_entropy(*held_out, s) for s in (fitted, SharesSettings(), TRUE))
    assert nats < default - 0.05
    assert nats == pytest.approx(best, abs=0.002)


def grid_minimum(similarity, is_true) -> float:
    """Least cross-entropy on a grid over both ranges, refined twice around the best, without code of the fit."""
    best = (math.inf, 0.0, 0.0)
    temperatures, offsets = np.geomspace(0.1, 1e4, 16), -np.geomspace(1e-3, 999, 10)
    for _ in range(3):
        for temperature in temperatures.tolist():
            for offset in offsets.tolist():
                best = min(best, (naive_cross_entropy(similarity, is_true, temperature, offset), temperature, offset))
        temperatures = np.clip(best[1] * np.geomspace(0.7, 1.4, 7), 0.1, 1e4)
        offsets = np.clip(best[2] * np.geomspace(0.7, 1.4, 7), -999, 0)
    return best[0]


@pytest.mark.parametrize("kind", ["drawn", "several_true", "only_the_best_is_true", "any_is_true"])
def test_no_grid_finds_a_better_calibrator(kind):
    similarity, is_true = drawn(120, 4)
    generator = np.random.default_rng(5)
    if kind == "several_true":
        is_true |= (generator.random(is_true.shape) < 0.4) & np.isfinite(similarity)
    elif kind == "only_the_best_is_true":
        # A higher temperature is always better, up to the limit of the range.
        is_true = np.arange(8) == np.zeros((120, 1))
    elif kind == "any_is_true":
        is_true = np.isfinite(similarity)
    found = fit_shares(similarity, is_true)
    assert 0 < found.inverse_temperature <= 1e4 and -1000 < found.offset <= 0
    assert cross_entropy(similarity, is_true, found) <= grid_minimum(similarity, is_true) + 1e-6


def test_the_fit_is_deterministic_and_ignores_order_shift_and_unusable_queries(train, fitted):
    similarity, is_true = train[0][:2000], train[1][:2000]
    found = fit_shares(similarity, is_true)
    assert fit_shares(similarity, is_true) == found
    untrue = np.zeros_like(is_true)
    again = fit_shares(np.concatenate([similarity, similarity]), np.concatenate([is_true, untrue]))
    assert again.inverse_temperature == pytest.approx(found.inverse_temperature, rel=1e-4)
    backwards = fit_shares(similarity[:, ::-1] - 0.2, is_true[:, ::-1])
    assert backwards.offset == pytest.approx(found.offset, rel=1e-4)


def test_fitted_shares_are_calibrated_with_relu(fitted):
    """soft_shares uses relu: exact zeros, close to the fitted smooth form, and calibrated on new data."""
    similarity, is_true = drawn(6000, 6)
    shares = soft_shares(similarity, fitted)
    smooth = [smooth_shares(row, fitted.inverse_temperature, fitted.offset) for row in similarity.tolist()]
    assert (shares == 0).any()
    np.testing.assert_allclose(shares, smooth, atol=0.02)
    measured, default = (reliability(soft_shares(similarity, s), is_true) for s in (fitted, SharesSettings()))
    assert measured.expected_calibration_error < 0.01 < default.expected_calibration_error
    assert measured.misplaced_share < default.misplaced_share and measured.brier < default.brier


def test_reliability_equals_the_loop():
    generator = np.random.default_rng(7)
    similarity = -np.sort(-generator.uniform(0.5, 0.7, (200, 6)), axis=1)
    shares, is_true = soft_shares(similarity, SharesSettings()), generator.random((200, 6)) < 0.25
    shares[0], shares[1] = [1, 0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0]
    cells, brier, mass = [], [], []
    for row, true in zip(shares.tolist(), is_true.tolist()):
        target = [t / sum(true) if t else 0.0 for t in true]
        cells += zip(row, target)
        brier.append(sum((p - t) ** 2 for p, t in zip(row, target)))
        mass.append(sum(p for p, t in zip(row, true) if t))
    edges = [(0.0, 0.0), *((b / 5, (b + 1) / 5) for b in range(5))]
    expected, gap = [], 0.0
    for low, high in edges:
        inside = [(p, t) for p, t in cells if (p == 0 if high == 0 else low < p <= high)]
        means = [sum(values) / len(inside) for values in zip(*inside)]
        expected.append(Bin(low, high, *means, len(inside)))
        gap += abs(means[0] - means[1]) * len(inside)
    measured = reliability(shares, is_true, 5)
    assert len(measured.bins) == len(expected)
    for found, wanted in zip(measured.bins, expected):
        assert (found.low, found.high, found.count) == (wanted.low, wanted.high, wanted.count)
        assert (found.mean_share, found.observed_share) == pytest.approx((wanted.mean_share, wanted.observed_share))
    assert measured.expected_calibration_error == pytest.approx(gap / len(cells))
    assert measured.misplaced_share == pytest.approx(gap / 400)
    assert (measured.brier, measured.true_mass) == pytest.approx((np.mean(brier), np.mean(mass)))
    assert measured.num_without_truth == int((~is_true.any(axis=1)).sum()) > 0


def test_perfect_and_worst_shares():
    is_true = np.array([[True, True, False], [False, True, False]])
    best = reliability(is_true / is_true.sum(axis=1, keepdims=True), is_true)
    assert (best.expected_calibration_error, best.misplaced_share, best.brier, best.true_mass) == (0, 0, 0, 1)
    worst = reliability(np.array([[0.0, 0, 1], [1.0, 0, 0]]), np.array([[False, True, False]] * 2))
    assert (worst.misplaced_share, worst.brier, worst.true_mass) == (1, 2, 0)
    # Candidates of share 0 dilute the error per candidate, but not the measures per query.
    wide = reliability(np.eye(1, 300), np.eye(1, 300, 7, dtype=bool))
    assert wide.expected_calibration_error < 0.01 and (wide.misplaced_share, wide.brier) == (1, 2)


@pytest.fixture(scope="module")
def corpus():
    """Anchors with one image twice; views near one or two of them."""
    generator = np.random.default_rng(8)
    anchors = generator.standard_normal((60, 16)).astype(np.float32) * 3
    ids = np.arange(60) + 1000
    anchors[59], ids[59] = anchors[0], ids[0]
    rows = generator.integers(0, 59, (40, 2))
    rows[20:, 1] = rows[20:, 0]
    views = anchors[rows].mean(axis=1) + generator.standard_normal((40, 16)) * 0.5
    sources = ids[rows]
    sources[20:, 1] = -1
    return views.astype(np.float16), anchors, sources, ids


@pytest.mark.parametrize("top_k", [1, 7, 500])
@pytest.mark.parametrize("cells", [60, 1 << 24])
def test_pairs_from_the_corpus_equal_a_search_by_loops(corpus, top_k, cells, monkeypatch):
    monkeypatch.setattr(calibration, "QUERY_BLOCK_CELLS", cells)
    views, anchors, sources, ids = corpus
    similarity, is_true = pairs_from_corpus(*corpus, top_k)
    assert similarity.shape == is_true.shape == (40, min(top_k, 60))
    for i, view in enumerate(views.astype(np.float64)):
        cosines = [float(view @ a / np.linalg.norm(view) / np.linalg.norm(a)) for a in anchors.astype(np.float64)]
        nearest = sorted(range(60), key=lambda j: -round(cosines[j], 12))[:top_k]
        np.testing.assert_allclose(similarity[i], [cosines[j] for j in nearest], rtol=1e-9)
        assert is_true[i].tolist() == [ids[j] in sources[i] for j in nearest]


def test_views_calibrate_shares_without_pairs(corpus):
    similarity, is_true = pairs_from_corpus(*corpus, 10)
    found = fit_shares(similarity, is_true)
    nats, default = (cross_entropy(similarity, is_true, s) for s in (found, SharesSettings()))
    assert nats < default


def test_unusable_input_is_named(corpus):
    views, anchors, sources, ids = corpus
    similarity, is_true = np.array([[0.5, 0.4]]), np.array([[True, False]])
    for call, said in [
        (lambda: fit_shares(similarity, is_true.astype(int)), "truth of type bool"),
        (lambda: fit_shares(similarity, is_true[:, :1]), r"got \(1, 2\), \(1, 1\), bool"),
        (lambda: fit_shares(similarity, ~is_true & is_true), "no query has a true source among its 2 best candidates"),
        (lambda: fit_shares(similarity[:, :1], is_true[:, :1]), "only one candidate"),
        (lambda: fit_shares(np.array([[np.nan, 0.4]]), is_true), "NaN"),
        (lambda: fit_shares(np.array([[-np.inf, 0.4]]), is_true), "-inf"),
        (lambda: reliability(np.array([[0.5, 0.4]]), is_true), r"sums 0\.9 to 0\.9"),
        (lambda: reliability(np.array([[0.5, 0.5]]), is_true, 0), r"rows of sum 1, .*num_bins 0"),
        (lambda: pairs_from_corpus(views, anchors[:, :8], sources, ids, 5), "one model"),
        (lambda: pairs_from_corpus(views, anchors, sources, ids, 0), "top_k 1 or more; got"),
        (lambda: pairs_from_corpus(views, anchors, sources + 7000, ids, 5), "source 6999 of a view"),
        (lambda: pairs_from_corpus(views, anchors, np.full((40, 2), -1), ids, 5), "names no source"),
        (lambda: pairs_from_corpus(views * 0, anchors, sources, ids, 5), "view 0 is zero"),
    ]:
        with pytest.raises(AttribError, match=said):
            call()
