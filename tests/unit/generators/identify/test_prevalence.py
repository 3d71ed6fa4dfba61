"""Prevalence: the estimator against linear algebra, coverage of its intervals; clusters against brute force."""

from itertools import product

import numpy as np
import pytest
from support.generators import around, unit
from support.prevalence import CONFUSION, CoverageTests

from attrib.generators.identify.candidates import average_linkage, find_candidates, reference_cut
from attrib.generators.identify.prevalence import (
    border_ratios,
    estimate_shares,
    mixed_confusion,
    solve_shares,
)

REJECTED_FROM = 3.8415  # 95 % quantile of chi-square with one degree of freedom


def test_shares_solve_the_equations_where_they_have_a_solution():
    shares = np.array([[0.5, 0.1, 0.15, 0.25], [0.05, 0.05, 0.05, 0.85]])
    rates = shares @ CONFUSION
    found = solve_shares(rates, np.broadcast_to(CONFUSION, (2, 4, 4)))
    assert found == pytest.approx(shares, abs=2e-4)
    assert found == pytest.approx(rates @ np.linalg.inv(CONFUSION), abs=2e-4)


def test_shares_maximise_the_likelihood_where_the_equations_have_no_solution():
    """Fewer verdicts than errors alone would give: linear algebra gives a negative share, the estimate is 0."""
    rates = np.array([[0.0, 0.01, 0.02, 0.97]])
    assert (rates @ np.linalg.inv(CONFUSION)).min() < 0
    found = solve_shares(rates, CONFUSION[None])[0]

    def likelihood(shares):
        expected = shares @ CONFUSION
        return (rates[0, 1:] * np.log(expected[1:])).sum()

    grid = product(np.linspace(0, 0.1, 21), repeat=3)
    best = max(likelihood(np.array([*three, 1 - sum(three)])) for three in grid)
    assert likelihood(found) >= best - 1e-6 and found.sum() == pytest.approx(1) and found.min() >= 0


def test_border_ratios_equal_a_grid_search():
    """Twice the log likelihood ratio of share j at 0 and at 1, over a grid of shares and rates by their own EM."""
    counts, confusion = np.array([30.0, 2.0]), np.array([[18.0, 4.0], [3.0, 40.0]])

    def likelihood(shares, steps=400):
        rates = confusion / confusion.sum(axis=1, keepdims=True)
        for _ in range(steps):
            made = shares[:, None] * rates * (counts / (shares @ rates))
            rates = (confusion + made) / (confusion + made).sum(axis=1, keepdims=True)
        return counts @ np.log(shares @ rates) + (confusion * np.log(rates)).sum()

    best = max(likelihood(np.array([a, 1 - a])) for a in np.linspace(0, 1, 401))
    expected = [2 * (best - likelihood(np.array([a, 1 - a]))) for a in (0.0, 1.0)]
    at_zero, at_one = border_ratios(counts, confusion)
    assert at_zero == pytest.approx(expected, abs=1e-2) and at_one == pytest.approx(expected[::-1], abs=1e-2)
    assert at_zero[0] > REJECTED_FROM > at_one[0]


def test_shares_are_right_where_origins_are_assigned_to_different_galleries():
    """100 untouched images of a generator, 900 of unknown ones in a gallery that seldom recognises that generator."""
    confusion = np.array([[[73.0, 27], [2, 98]], [[25.0, 75], [2, 98]]])
    counts = np.array([[73.0, 27], [18, 882]])
    found, _ = estimate_shares(["a"], counts, confusion, 0, 400, 0)
    assert found[0].share == pytest.approx(0.1, abs=0.01) and found[0].low < 0.1 < found[0].high < 0.2


def test_generators_without_attributed_images_get_share_zero_where_few_are_recognised():
    """The likelihood is highest if all are of the second generator, whose references are never recognised there."""
    confusion = np.array([[[20.0, 0, 20], [0, 0, 40], [2, 2, 100]]])
    found, _ = estimate_shares(["a", "b"], np.array([[0.0, 0, 50]]), confusion, 0, 200, 0)
    assert [share.share for share in found] == [0, 0, pytest.approx(1)] and found[1].high > 0.5 and found[2].low < 0.5
    # A generator that would have been attributed keeps its estimate.
    found, _ = estimate_shares(["a", "b"], np.array([[20.0, 0, 30]]), confusion, 0, 200, 0)
    assert found[0].share > 0.4 and found[1].share == 0


def test_a_set_without_assessed_images_has_no_shares():
    with pytest.raises(ValueError, match="no image of the set was assessed"):
        estimate_shares(["a"], np.zeros((1, 2)), np.eye(2)[None], 5, 100, 0)


class TestCoverage(CoverageTests):
    repeats = 30  # tests/slow has 120


def test_verdict_errors_are_corrected():
    counts = 100_000 * np.array([0.1, 0.2, 0.05, 0.65]) @ CONFUSION
    found, draws = estimate_shares(["a", "b", "c"], counts[None], 10_000 * CONFUSION[None], 0, 200, 0)
    assert [share.share for share in found] == pytest.approx([0.1, 0.2, 0.05, 0.65], abs=0.005)
    assert draws.shape == (200, 4) and draws.sum(axis=1) == pytest.approx(np.ones(200))
    again = estimate_shares(["a", "b", "c"], counts[None], 10_000 * CONFUSION[None], 0, 200, 0)
    assert again[0] == found


def test_unassessable_images_widen_the_bounds_among_all_images():
    counts, confusion = np.array([30.0, 70.0]), np.array([[50.0, 0.0], [0.0, 50.0]])
    found, _ = estimate_shares(["a"], counts[None], confusion[None], 100, 200, 0)
    assert found[0].of_all_low == pytest.approx(found[0].low / 2)
    assert found[0].of_all_high == pytest.approx(found[0].high / 2 + 0.5)


def test_confusion_is_weighted_by_the_galleries_of_the_set():
    confusion = np.array([[[10.0, 0], [1, 9]], [[3, 2], [0, 0]]])
    rates = 0.75 * np.array([[1, 0], [0.1, 0.9]]) + 0.25 * np.array([[0.6, 0.4], [0.1, 0.9]])
    assert mixed_confusion(confusion, np.array([30.0, 10.0])) == pytest.approx(10 * rates)


def linked_one_by_one(vectors: np.ndarray, cut: float) -> set[frozenset[int]]:
    """Clusters by definition: merge the pair with the highest mean cosine until it is below the cut."""
    clusters = [[i] for i in range(len(vectors))]
    similarity = (vectors @ vectors.T).astype(np.float64)
    while len(clusters) > 1:
        pairs = [
            (np.mean(similarity[np.ix_(a, b)]), i, j)
            for i, a in enumerate(clusters)
            for j, b in enumerate(clusters[:i])
        ]
        highest, i, j = max(pairs)
        if highest < cut:
            break
        clusters[j] += clusters.pop(i)
    return {frozenset(cluster) for cluster in clusters}


@pytest.mark.parametrize("cut", [-1.0, 0.0, 0.2, 0.5, 0.9, 2.0])
def test_average_linkage_equals_brute_force(cut):
    generator = np.random.default_rng(2)
    vectors = np.concatenate([around(c, 8, 0.4, generator) for c in generator.standard_normal((4, 6))])
    label = average_linkage(vectors, cut)
    found = {frozenset(np.flatnonzero(label == cluster).tolist()) for cluster in range(label.max() + 1)}
    assert found == linked_one_by_one(vectors, cut)
    assert label[0] == 0 and np.array_equal(np.unique(label), np.arange(label.max() + 1))


def test_equal_vectors_are_one_cluster_and_one_vector_is_a_cluster():
    assert average_linkage(np.eye(3, dtype=np.float32)[[0, 0, 1, 0, 1]], 0.9).tolist() == [0, 0, 1, 0, 1]
    assert average_linkage(np.ones((1, 3), np.float32), 0.5).tolist() == [0]


def batches(ids: np.ndarray, vectors: np.ndarray, count: int = 1000):
    return [(ids[i : i + count], vectors[i : i + count]) for i in range(0, len(ids), count)]


@pytest.mark.parametrize("max_clustered", [500, 60])
def test_unknown_images_become_candidates_whatever_their_order(max_clustered):
    generator = np.random.default_rng(3)
    centres = unit(generator.standard_normal((3, 32)))
    vectors = np.concatenate(
        [
            *(around(c, n, 0.08, generator) for c, n in zip(centres, (40, 60, 25))),
            unit(generator.standard_normal((30, 32))),
        ]
    )
    ids = np.unique(generator.integers(0, 2**62, 200))[: len(vectors)]
    options = {"cut": 0.5, "max_clustered": max_clustered, "min_images": 10, "num_exemplars": 4}
    found = find_candidates(lambda: batches(ids, vectors), **options)
    truth = [set(ids[40:100].tolist()), set(ids[:40].tolist()), set(ids[100:125].tolist())]
    assert [set(candidate.ids.tolist()) for candidate in found] == truth
    order = generator.permutation(len(ids))
    again = find_candidates(lambda: batches(ids[order], vectors[order], 37), **options)
    for candidate, same in zip(found, again, strict=True):
        assert np.array_equal(candidate.ids, same.ids) and np.array_equal(candidate.exemplars, same.exemplars)
        assert candidate.num_distinct == same.num_distinct == len(candidate.ids)
        members = vectors[np.isin(ids, candidate.ids)]
        cosine = members @ members.T
        assert candidate.cohesion == pytest.approx(cosine[~np.eye(len(members), dtype=bool)].mean(), abs=1e-4)
        assert len(candidate.clustered) <= max_clustered
        mean = candidate.clustered.mean(axis=0)
        best = ids[np.isin(ids, candidate.ids)][np.argsort(-(members @ mean))[:4]]
        assert set(candidate.exemplars.tolist()) == set(best.tolist())
    assert find_candidates(list, **options) == []


@pytest.mark.parametrize("max_clustered", [500, 20])
def test_copies_of_one_image_are_no_candidate_and_count_once_in_one(max_clustered):
    """Two clusters: 12 distinct images, one of them 30 times, and 9 distinct images, one of them 40 times."""
    generator = np.random.default_rng(6)
    centres = unit(generator.standard_normal((2, 32)))
    groups = [around(centre, count, 0.08, generator) for centre, count in zip(centres, (12, 9))]
    repeated = [np.repeat(group[:1], extra, axis=0) for group, extra in zip(groups, (29, 39))]
    # The last bit of some values of a copy differs where it was embedded beside other images.
    repeated[0][::3] = unit(repeated[0][::3] + 1e-4 * generator.standard_normal((10, 32)))
    vectors = np.concatenate([*groups, *repeated])
    ids = np.unique(generator.integers(0, 2**62, 200))[: len(vectors)]
    options = {"cut": 0.5, "max_clustered": max_clustered, "num_exemplars": 20}
    (found,) = find_candidates(lambda: batches(ids, vectors, 10), min_images=10, **options)
    assert found.num_distinct == 12 and len(found.ids) == 41 and len(found.exemplars) == 12
    distinct = groups[0] @ groups[0].T
    assert found.cohesion == pytest.approx(distinct[~np.eye(12, dtype=bool)].mean(), abs=1e-3)
    assert len(find_candidates(lambda: batches(ids, vectors, 10), min_images=9, **options)) == 2
    copies = np.repeat(groups[1][:1], 12, axis=0)
    assert find_candidates(lambda: batches(np.arange(12), copies), min_images=2, **options) == []


def test_the_cut_separates_pairs_of_references_best():
    generator = np.random.default_rng(4)
    groups = [around(c, 9, 0.5, generator) for c in generator.standard_normal((3, 8))]
    cut = reference_cut(groups)
    rows, owner = np.concatenate(groups), np.repeat(np.arange(3), 9)
    first, second = np.triu_indices(27, 1)
    cosine, same = (rows[first] * rows[second]).sum(axis=1), owner[first] == owner[second]

    def error(at):
        return np.mean(cosine[same] < at) + np.mean(cosine[~same] >= at)

    assert error(cut) == pytest.approx(min(error(at) for at in [*cosine, 2.0]), abs=1e-9)
    alone = reference_cut(groups[:1])
    assert np.mean((groups[0] @ groups[0].T)[np.triu_indices(9, 1)] < alone) == pytest.approx(0.05, abs=0.04)
