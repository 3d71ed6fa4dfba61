"""Coverage of prevalence intervals with many repeats; tests/unit has the same with few repeats."""

import pytest
from support.prevalence import (
    CASES,
    changes_reported,
    coverage,
    coverage_at_borders,
    coverage_over_galleries,
    least_coverage,
)

REPEATS = 120


@pytest.mark.parametrize(("shares", "num_references"), CASES)
def test_intervals_cover_the_true_shares(shares, num_references):
    held, uncorrected = coverage(shares, num_references, REPEATS)
    assert (held >= least_coverage(REPEATS)).all(), held
    assert uncorrected.min() < 0.8


@pytest.mark.parametrize(("shares", "sure"), [([0.0, 0.0, 1.0], 0.9), ([1.0, 0.0, 0.0], 0.8)])
def test_intervals_cover_shares_of_zero_and_one(shares, sure):
    """Intervals from bootstrap draws alone never reach 1."""
    held, low = coverage_at_borders(shares, REPEATS)
    assert (held >= least_coverage(REPEATS)).all(), held
    assert low > sure, "the intervals are too wide"


def test_intervals_cover_shares_estimated_over_galleries():
    held = coverage_over_galleries(REPEATS)
    assert (held >= least_coverage(REPEATS)).all(), held


def test_changes_are_reported_at_the_stated_rate():
    wrong, seen, moved, expected = changes_reported(REPEATS)
    assert wrong / REPEATS <= 1 - least_coverage(REPEATS) and seen / REPEATS >= 0.8
    assert [row["name"] for row in moved] == ["b"] and moved[0]["change"] == pytest.approx(expected)
