"""Conformal p-values and permutation tests, against counts by hand and in simulations with a known truth."""

import math

import numpy as np
import pytest

from attrib.generators.identify.conformal import (
    column_means,
    conformal_p_values,
    permutation_p_value,
    source_p_value,
)


def test_ties_count_against_the_image_and_the_smallest_p_value_is_reached():
    values, weights = np.array([1.0, 2, 2, 3]), np.ones(4)
    observed = np.array([0.5, 2.0, 2.5, 3.0, 4.0])
    assert conformal_p_values(values, weights, observed) == pytest.approx([1, 4 / 5, 2 / 5, 2 / 5, 1 / 5])


def test_permutation_p_values_are_uniform_for_exchangeable_rows_and_small_for_higher_ones():
    generator = np.random.default_rng(6)
    rows = [generator.exponential(size=(25, 3)) for _ in range(600)]
    found = np.array([permutation_p_value([(r[:2], r[2:10]), (r[10:13], r[13:])], 99, generator) for r in rows])
    for level in (0.05, 0.25):
        assert np.mean(found <= level + 1e-9) == pytest.approx(level, abs=4 * math.sqrt(level / 600))
    assert permutation_p_value([(rows[0][:5] + [0, 9, 0], rows[0][5:])], 999, generator) < 0.005


def test_the_rate_of_sets_from_a_new_source_holds_by_source_and_not_by_image():
    """19 sources of 10 images; each source has its own level, which the mean of five images shows almost surely."""
    generator = np.random.default_rng(7)
    by_source, by_image = [], []
    for _ in range(300):
        levels = generator.standard_normal(20)
        sets = [level + 0.3 * generator.standard_normal((10, 1)) for level in levels]
        in_strata = [[one[:6], one[6:]] for one in sets]
        by_source.append(source_p_value([sets[19][:3], sets[19][6:8]], in_strata[:19], 50, generator))
        by_image.append(permutation_p_value([(sets[19][:5], np.concatenate(sets[:19]))], 99, generator))
    assert np.mean(np.array(by_source) <= 0.1) <= 0.1 + 4 * math.sqrt(0.09 / 300)
    assert np.mean(np.array(by_image) <= 0.1) > 0.2
    assert source_p_value([np.full((5, 1), 99.0)], [[one[:2]] for one in sets[:19]], 50, generator) == pytest.approx(
        1 / 20
    )


def test_missing_scores_are_left_out_of_means():
    rows = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    assert column_means(rows).tolist() == [2, 5, -np.inf]
    # Half of the drawn rows have no first column; they must not move the mean of the others towards zero.
    others = np.array([[2.0, -1.0], [np.nan, -1.0]] * 10)
    assert permutation_p_value([(np.full((2, 2), 1.5), others)], 199, np.random.default_rng(0)) > 0.7
