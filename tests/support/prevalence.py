"""Coverage of prevalence intervals on simulated image sets, for unit tests and (with more repeats) slow tests."""

import math

import numpy as np
import pytest

from attrib.generators.identify.prevalence import OTHER, changes, estimate_shares

CONFUSION = np.array(
    [
        [0.80, 0.05, 0.00, 0.15],
        [0.10, 0.70, 0.05, 0.15],
        [0.00, 0.02, 0.90, 0.08],
        [0.02, 0.02, 0.01, 0.95],
    ]
)


CASES = [([0.4, 0.3, 0.1, 0.2], 50), ([0.0, 0.05, 0.15, 0.8], 50), ([0.25, 0.25, 0.25, 0.25], 15)]


def least_coverage(repeats: int) -> float:
    """Lower limit for the observed coverage of a correct 95 % interval, three standard deviations below 0.95."""
    return 0.95 - 3 * math.sqrt(0.95 * 0.05 / repeats)


def simulated(shares, num_images, num_references, generator):
    """Verdict counts of an image set, and of the references of each generator."""
    truth = generator.multinomial(num_images, shares)
    counts = sum(generator.multinomial(n, row) for n, row in zip(truth, CONFUSION))
    return counts.astype(float), np.stack([generator.multinomial(num_references, row) for row in CONFUSION]).astype(
        float
    )


def coverage(shares: list[float], num_references: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the intervals of the estimate, and of shares that are not corrected for errors."""
    generator = np.random.default_rng(0)
    held, naive = np.zeros(4), np.zeros(4)
    for repeat in range(repeats):
        counts, confusion = simulated(shares, 400, num_references, generator)
        found, _ = estimate_shares(["a", "b", "c"], counts[None], confusion[None], 0, 200, repeat)
        held += [share.low - 1e-9 <= true <= share.high + 1e-9 for share, true in zip(found, shares)]
        error = 1.96 * np.sqrt(counts / 400 * (1 - counts / 400) / 400)
        naive += np.abs(counts / 400 - shares) <= error
    assert [share.name for share in found] == ["a", "b", "c", OTHER]
    return held / repeats, naive / repeats


def coverage_at_borders(shares: list[float], repeats: int) -> tuple[np.ndarray, float]:
    """Coverage for an image set of one origin with ten references per generator; mean lower bound of that origin."""
    rates = np.array([[0.9, 0.0, 0.1], [0.0, 0.9, 0.1], [0.05, 0.05, 0.9]])
    generator = np.random.default_rng(5)
    held, least = np.zeros(3), []
    for repeat in range(repeats):
        counts = generator.multinomial(1000, np.array(shares) @ rates).astype(float)
        confusion = np.stack([generator.multinomial(n, row) for n, row in zip((10, 10, 40), rates)]).astype(float)
        found, _ = estimate_shares(["a", "b"], counts[None], confusion[None], 0, 200, repeat)
        held += [share.low <= true <= share.high for share, true in zip(found, shares)]
        least.append(found[int(np.argmax(shares))].low)
    return held / repeats, float(np.mean(least))


def coverage_over_galleries(repeats: int) -> np.ndarray:
    """Coverage with three origins over three galleries; one gallery has few images and few references."""
    generator = np.random.default_rng(3)
    goes_to = np.array([[0.8, 0.15, 0.05], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1]])
    rates = np.stack([CONFUSION[np.ix_([0, 1, 3], [0, 1, 3])] + extra for extra in (0.0, 0.1, 0.5)])
    rates /= rates.sum(axis=2, keepdims=True)
    held = np.zeros(3)
    for repeat in range(repeats):
        shares = generator.dirichlet([1.0, 1.0, 1.0])
        origins = generator.multinomial(300, shares)
        galleries = [generator.multinomial(n, row) for n, row in zip(origins, goes_to)]
        counts = sum(
            np.stack([generator.multinomial(n, rates[d, j]) for d, n in enumerate(in_gallery)])
            for j, in_gallery in enumerate(galleries)
        ).astype(float)
        confusion = np.stack(
            [[generator.multinomial(n, rates[d, j]) for j, n in enumerate((40, 40, 80))] for d in range(3)]
        ).astype(float)
        confusion[2, 1] = 0  # this origin has no reference in the last gallery
        found, _ = estimate_shares(["a", "b"], counts, confusion, 0, 200, repeat)
        held += [share.low <= true <= share.high for share, true in zip(found, origins / 300)]
    return held / repeats


def changes_reported(repeats: int) -> tuple[int, int, list[dict], float]:
    """Numbers of false and true reports of a change; a comparison with a new name, and its expected value."""
    generator = np.random.default_rng(1)
    wrong, seen = 0, 0
    names = ["a", "b", "c", OTHER]
    for repeat in range(repeats):
        runs = []
        for shares in ([0.3, 0.3, 0.1, 0.3], [0.3, 0.3, 0.1, 0.3], [0.5, 0.1, 0.1, 0.3]):
            counts, confusion = simulated(shares, 400, 60, generator)
            runs.append(estimate_shares(names[:3], counts[None], confusion[None], 0, 200, len(runs) + 3 * repeat)[1])
        wrong += changes(names, runs[1], names, runs[0])[0]["changed"]
        seen += changes(names, runs[2], names, runs[0])[0]["changed"]
    moved = changes(["b", "new"], runs[2][:, [1, 0]], names, runs[0])
    return wrong, seen, moved, float(runs[2][:, 1].mean() - runs[0][:, 1].mean())


class CoverageTests:
    """Statistical tests of the intervals, run by a subclass that sets the number of repeats."""

    repeats: int

    @pytest.mark.parametrize(("shares", "num_references"), CASES)
    def test_intervals_cover_the_true_shares(self, shares, num_references):
        held, uncorrected = coverage(shares, num_references, self.repeats)
        assert (held >= least_coverage(self.repeats)).all(), held
        assert uncorrected.min() < 0.8

    @pytest.mark.parametrize(("shares", "sure"), [([0.0, 0.0, 1.0], 0.9), ([1.0, 0.0, 0.0], 0.8)])
    def test_intervals_cover_shares_of_zero_and_one(self, shares, sure):
        """Intervals from bootstrap draws alone never reach 1."""
        held, low = coverage_at_borders(shares, self.repeats)
        assert (held >= least_coverage(self.repeats)).all(), held
        assert low > sure, "the intervals are too wide"

    def test_intervals_cover_shares_estimated_over_galleries(self):
        held = coverage_over_galleries(self.repeats)
        assert (held >= least_coverage(self.repeats)).all(), held

    def test_changes_are_reported_at_the_stated_rate(self):
        wrong, seen, moved, expected = changes_reported(self.repeats)
        assert wrong / self.repeats <= 1 - least_coverage(self.repeats) and seen / self.repeats >= 0.8
        assert [row["name"] for row in moved] == ["b"] and moved[0]["change"] == pytest.approx(expected)
