"""Every measure against its definition, counted pair by pair, with ties."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics.cluster import contingency_matrix

from attrib.common.errors import AttribError
from attrib.generators.evaluation import measures
from attrib.generators.fingerprints.scoring import identified


def tied(rng, *shape) -> np.ndarray:
    """Scores of few values, so that many are equal."""
    return rng.integers(0, 6, shape) / 5.0


def half_for_ties(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_an_image_is_identified_only_above_all_other_generators(seed):
    rng = np.random.default_rng(seed)
    scores, truth = tied(rng, 60, 4), rng.integers(0, 4, 60)
    predicted = identified(scores, truth)
    for row, own, found in zip(scores, truth, predicted):
        others = np.delete(row, own)
        assert (found == own) == (row[own] > others.max())
        if found != own:
            assert row[found] == row.max()
    assert np.isfinite(scores).all(), "scores are left as they were given"


def test_equal_scores_identify_nothing():
    truth = np.array([0, 1, 2, 2])
    predicted = identified(np.ones((4, 3)), truth)
    assert (predicted != truth).all()
    assert measures.auc(np.ones(3), np.ones(5)) == 0.5
    assert measures.oscr(np.ones(3), np.zeros(3, bool), np.ones(5)) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_recalls_are_counts(seed):
    rng = np.random.default_rng(seed)
    right, truth = rng.random(40) < 0.5, rng.permutation(np.arange(40) % 5)
    for g, recall in enumerate(measures.recalls(right, truth)):
        assert recall == pytest.approx(sum(r for r, t in zip(right, truth) if t == g) / 8)


@pytest.mark.parametrize("seed", range(5))
def test_areas_are_shares_of_pairs(seed):
    rng = np.random.default_rng(seed)
    known, unknown, correct = tied(rng, 30), tied(rng, 20), rng.integers(0, 2, 30).astype(bool)
    pairs = [(c, half_for_ties(k, u)) for (k, c), u in itertools.product(zip(known, correct), unknown)]
    assert measures.auc(known, unknown) == pytest.approx(np.mean([half for _, half in pairs]))
    assert measures.oscr(known, correct, unknown) == pytest.approx(np.mean([c * half for c, half in pairs]))


@pytest.mark.parametrize("seed", range(3))
def test_oscr_is_the_area_under_its_curve(seed):
    """Correct identification against false acceptance at every threshold, joined by straight lines."""
    rng = np.random.default_rng(seed)
    known, unknown, correct = tied(rng, 50), tied(rng, 40), rng.integers(0, 2, 50).astype(bool)
    thresholds = [np.inf, *sorted({*known, *unknown}, reverse=True)]
    accepted = [np.mean(unknown >= t) for t in thresholds]
    identified = [np.mean(correct & (known >= t)) for t in thresholds]
    assert measures.oscr(known, correct, unknown) == pytest.approx(np.trapezoid(identified, accepted))


def test_an_area_without_pairs_is_nan():
    assert math.isnan(measures.auc(np.array([]), np.ones(3)))
    assert math.isnan(measures.oscr(np.ones(3), np.ones(3, bool), np.array([])))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_threshold_is_the_lowest_that_keeps_the_rate(rate, size):
    negative = tied(np.random.default_rng(size), size)
    threshold = measures.threshold_at(negative, rate)
    assert np.mean(negative > threshold) <= rate + 1e-12
    lower = [value for value in {*negative, -np.inf} if value < threshold]
    assert all(np.mean(negative > value) > rate for value in lower)


def test_a_threshold_needs_negatives():
    with pytest.raises(AttribError, match="needs scores of negatives"):
        measures.threshold_at(np.array([]), 0.01)


@pytest.mark.parametrize("seed", range(3))
def test_verification_by_thresholds_of_the_other_generators(seed):
    rng = np.random.default_rng(seed)
    generator = rng.permutation(np.repeat(np.arange(4), 6))
    similarity = tied(rng, 24, 24)
    similarity = np.maximum(similarity, similarity.T)
    found = measures.verification(similarity, generator, 0.1)
    pairs = list(itertools.combinations(range(24), 2))
    for which in range(4):
        within = [similarity[i, j] for i, j in pairs if generator[i] == generator[j] == which]
        across = [similarity[i, j] for i, j in pairs if (generator[i] == which) != (generator[j] == which)]
        others = [
            similarity[i, j]
            for i, j in pairs
            if which not in (generator[i], generator[j]) and generator[i] != generator[j]
        ]
        threshold = measures.threshold_at(np.array(others), 0.1)
        halves = [half_for_ties(w, a) for w in within for a in across]
        assert found["verification_auc"][which] == pytest.approx(np.mean(halves))
        assert found["true_positive_rate"][which] == pytest.approx(np.mean(np.array(within) > threshold))
        assert found["false_positive_rate"][which] == pytest.approx(np.mean(np.array(across) > threshold))


def test_verification_needs_a_third_generator_for_the_threshold():
    with pytest.raises(AttribError, match="add generators to the set"):
        measures.verification(np.ones((4, 4)), np.array([0, 0, 1, 1]), 0.01)


@pytest.mark.parametrize("seed", range(5))
def test_adjusted_rand_and_purity_by_counting(seed):
    rng = np.random.default_rng(seed)
    clusters, truth = rng.integers(3, 7, 40), rng.integers(0, 4, 40)
    table = contingency_matrix(clusters, truth)
    pairs = list(itertools.combinations(range(40), 2))
    same_cluster = [clusters[i] == clusters[j] for i, j in pairs]
    same_truth = [truth[i] == truth[j] for i, j in pairs]
    both = sum(a and b for a, b in zip(same_cluster, same_truth))
    expected = sum(same_cluster) * sum(same_truth) / len(pairs)
    most = (sum(same_cluster) + sum(same_truth)) / 2
    assert measures.adjusted_rand(table) == pytest.approx((both - expected) / (most - expected))
    right = sum(max(np.bincount(truth[clusters == c])) for c in set(clusters))
    assert measures.purity(table) == pytest.approx(right / 40)


def test_the_rand_index_of_trivial_partitions():
    assert measures.adjusted_rand(np.array([[5]])) == 1.0
    assert measures.adjusted_rand(np.eye(4, dtype=int)) == 1.0
    assert measures.adjusted_rand(np.array([[5, 0], [0, 3]])) == 1.0
    assert measures.adjusted_rand(np.array([[5, 5]])) == 0.0


def test_intervals_resample_whole_families():
    """Twelve families of one to three generators."""
    rng = np.random.default_rng(4)
    families = np.repeat(np.arange(12), rng.integers(1, 4, 12))
    values = rng.random(len(families))
    values[5] = np.nan
    means = [
        np.nanmean(np.concatenate([values[families == family] for family in row])) for row in measures.resampled(12)
    ]
    found = measures.mean_interval(values, families)
    assert found.mean == pytest.approx(np.nanmean(values))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    alone = measures.mean_interval(values)
    assert alone == measures.mean_interval(values, np.arange(len(values))) and alone != found


def test_intervals_of_few_families_use_students_t():
    values = np.array([0.2, 0.3, 0.9, 0.8, np.nan, 0.6])
    families = np.array([0, 0, 1, 1, 2, 3])
    found = measures.mean_interval(values[[0, 1, 2, 3]], families[[0, 1, 2, 3]])
    means = np.array([0.25, 0.85])
    assert found.mean == pytest.approx(0.55)
    assert found.high - found.mean == pytest.approx(12.706 * np.std(means, ddof=1) / np.sqrt(2), rel=1e-4)
    assert measures.mean_interval(values, families) == measures.mean_interval(
        values[[0, 1, 2, 3, 5]], families[[0, 1, 2, 3, 5]]
    )
    assert measures.mean_interval(values, families, (0.0, 1.0))[1:] == (0.0, 1.0), "no share is above one"
    assert measures.mean_interval(np.full(3, 0.4)) == pytest.approx((0.4, 0.4, 0.4))
    assert measures.mean_interval(np.array([0.2, 0.6]), np.array([7, 7])) == pytest.approx((0.4, 0.4, 0.4))
    assert all(math.isnan(x) for x in measures.mean_interval(np.full(3, np.nan)))


@pytest.mark.parametrize(("num_families", "twins"), [(3, 2), (5, 1), (20, 2)])
def test_intervals_have_about_their_nominal_coverage(num_families, twins):
    """Families whose difficulty varies; resamples of generators had 62 % coverage for three families of twins."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        found = measures.mean_interval(
            np.repeat(rng.beta(4, 1.5, num_families), twins), np.repeat(np.arange(num_families), twins)
        )
        inside += found.low <= 4 / 5.5 <= found.high
    assert 0.89 <= inside / 400 <= 0.98


def test_differences_are_paired():
    """A constant difference has an interval of zero width, however much generators differ."""
    worse = np.random.default_rng(0).random(5)
    found = measures.mean_interval((worse + 0.1) - worse)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_table_intervals_are_a_jackknife_over_families():
    table = np.array([[8, 0, 1], [2, 9, 1], [0, 1, 8]])
    found = measures.table_interval(measures.purity, table, bounds=(0.0, 1.0))
    without = [measures.purity(table[:, kept]) for kept in ([1, 2], [0, 2], [0, 1])]
    error = np.sqrt(2 / 3 * sum((value - np.mean(without)) ** 2 for value in without))
    assert found.mean == measures.purity(table)
    assert found.low == pytest.approx(found.mean - 4.303 * error, rel=1e-4)
    assert found.high == pytest.approx(min(1.0, found.mean + 4.303 * error), rel=1e-4)
    families = np.array([5, 5, 6])
    pairs = [measures.purity(table[:, 2:]), measures.purity(table[:, :2])]
    error = np.sqrt(1 / 2 * sum((value - np.mean(pairs)) ** 2 for value in pairs))
    assert measures.table_interval(measures.purity, table, families).low == pytest.approx(
        found.mean - 12.706 * error, rel=1e-4
    )
    assert measures.table_interval(measures.purity, 5 * np.eye(4, dtype=int)) == (1.0, 1.0, 1.0)
    one_cluster = measures.table_interval(measures.purity, np.full((1, 4), 7))
    assert one_cluster == pytest.approx((0.25, 0.25, 0.25))
    assert measures.table_interval(measures.purity, table, np.zeros(3)) == (found.mean,) * 3
