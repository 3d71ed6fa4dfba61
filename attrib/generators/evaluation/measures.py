"""How well generators are told apart: pure functions of scores, each equal to a count over pairs or images that a test can make by hand.

No tie ever helps by accident: an image whose own generator shares the highest score with another is not identified, an area under a
curve counts equal scores half, and a threshold accepts only what lies above it. So a method that gives everything one score has accuracy
0 and an area of one half.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import adjusted_rand_score, f1_score, recall_score
from sklearn.metrics.cluster import contingency_matrix

from attrib.common.errors import AttribError
from attrib.evaluate.scores import BOOTSTRAP_DRAWS, Interval
from attrib.generators.evaluation.settings import LOSS_DEGRADATION

MIN_RESAMPLED = 10  # units; percentiles of resamples of fewer are too close together
VALUES = {
    "identification": "identified",
    "f1": "macro-F1",
    "family_identification": "family identified",
    "verification_auc": "verification AUC",
    "true_positive_rate": "TPR",
    "false_positive_rate": "FPR",
    "rejection_auroc": "rejection AUROC",
    "oscr": "OSCR",
    "family_rejection_auroc": "family rejection",
    "real_auroc": "real AUROC",
    "adjusted_rand": "ARI",
    "purity": "purity",
}


class TransferredRates(NamedTuple):
    """Of a threshold that was set without a generator: the share of its pairs accepted, and of pairs of it with others."""

    true_positive: float
    false_positive: float


def recalls(predicted: np.ndarray, truth: np.ndarray, num_generators: int) -> np.ndarray:
    """float64 [G]: of each generator's images the share that is identified; nan for one without images. Their mean is the accuracy."""
    return recall_score(truth, predicted, labels=range(num_generators), average=None, zero_division=np.nan)


def f1_scores(predicted: np.ndarray, truth: np.ndarray, num_generators: int) -> np.ndarray:
    """float64 [G]: 2 TP / (2 TP + FP + FN) of each generator, nan for one that is neither true nor predicted; their mean is the macro-F1."""
    return f1_score(truth, predicted, labels=range(num_generators), average=None, zero_division=np.nan)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher, equal scores counted half; nan without pairs."""
    return oscr(positive, np.ones(len(positive), bool), negative)


def oscr(known: np.ndarray, correct: np.ndarray, unknown: np.ndarray) -> float:
    """Area under the curve of correct identification against false acceptance, over all thresholds (Dhamija et al., NeurIPS 2018).

    known: float [n], highest score of each image of a known generator; correct: bool [n], whether it was identified; unknown: float [m],
    highest score of each image of none. A step at which several scores are equal is a straight line, so the area is the share of pairs
    in which the known image is identified and scores higher, equal scores counted half. nan without pairs.
    """
    if not len(known) or not len(unknown):
        return float("nan")
    ascending = np.sort(unknown)
    below = np.searchsorted(ascending, known, side="left")
    reached = np.searchsorted(ascending, known, side="right")
    return float(np.mean(np.where(correct, below + reached, 0)) / (2 * len(unknown)))


def threshold_at(negative: np.ndarray, false_positive_rate: float) -> float:
    """The least of the negatives (or -inf) such that at most this share of them lies above it; what lies above is accepted.

    Raises AttribError without negatives, from which no threshold can be had.
    """
    if not len(negative):
        raise AttribError("a threshold needs scores of negatives, and there are none; give more generators")
    num_allowed = int(np.floor(false_positive_rate * len(negative) + 1e-9))
    if num_allowed >= len(negative):
        return -np.inf
    place = len(negative) - 1 - num_allowed
    return float(np.partition(negative, place)[place])


def pair_scores(similarity: np.ndarray, generator: np.ndarray, which: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of the pairs within one generator, and of its images with those of others. similarity: float [n, n]; generator: int [n]."""
    own = generator == which
    within = similarity[np.ix_(own, own)]
    return within[np.triu_indices(len(within), k=1)], similarity[np.ix_(own, ~own)].ravel()


class CrossPairs:
    """Pairs of images of two different generators, cut out once for all that a threshold is set without."""

    def __init__(self, similarity: np.ndarray, generator: np.ndarray):
        """similarity: float [n, n]; generator: int [n] from 0."""
        numbers = generator.astype(np.min_scalar_type(int(generator.max())))  # a byte each, of millions of pairs
        apart = np.triu(numbers[:, None] != numbers, k=1)
        self.scores = similarity[apart]
        self._of = [np.broadcast_to(side, apart.shape)[apart] for side in (numbers[:, None], numbers)]

    def without(self, which: int) -> np.ndarray:
        """Float [p]: scores of the pairs that no image of this generator is in."""
        return self.scores[(self._of[0] != which) & (self._of[1] != which)]


def transferred_rates(
    positive: np.ndarray, negative: np.ndarray, others: np.ndarray, false_positive_rate: float
) -> TransferredRates:
    """Verification of one generator's pairs by a threshold that pairs of two *other* generators set at false_positive_rate.

    Scores of pairs within the generator, of its images with those of others, and of the pairs without it. nan with fewer than three
    generators, where there is no such pair.
    """
    if not len(others):
        return TransferredRates(float("nan"), float("nan"))
    threshold = threshold_at(others, false_positive_rate)
    return TransferredRates(_share_above(positive, threshold), _share_above(negative, threshold))


def contingency(clusters: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """int64 [number of clusters, number of generators]: images by cluster and generator. clusters: any int [n]; truth: int [n], each of 0..G-1."""
    return contingency_matrix(clusters, truth)


def adjusted_rand(table: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie, J. Classification 2, 1985), at most 1. table: counts [clusters, generators]."""
    clusters, truth = np.repeat(np.indices(table.shape).reshape(2, -1), table.ravel(), axis=1)
    return float(adjusted_rand_score(truth, clusters))


def purity(table: np.ndarray) -> float:
    """Share of images that are of the most frequent generator of their cluster. table: counts [clusters, generators]."""
    return float(table.max(axis=1).sum() / table.sum())


def mean_interval(
    values: np.ndarray, families: np.ndarray | None = None, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> Interval:
    """Mean over generators and its 95 % interval over families, which are drawn whole: what is hard for one is hard for its twin.

    values: float64 [G]; nan, where one has no value, is left out. families: int [G], None: each generator is its own. bounds: that no
    mean exceeds. From MIN_RESAMPLED families on it is a bootstrap; with fewer, whose bootstrap is far too narrow, Student's t of the
    families' sums (for families of one size: of their means). A single family has nothing to draw, so that its interval is the mean alone.
    """
    there = ~np.isnan(values)
    if not there.any():
        return Interval(float("nan"), float("nan"), float("nan"))
    numbers = np.arange(len(values)) if families is None else families
    _, places = np.unique(numbers[there], return_inverse=True)
    counts = np.bincount(places)
    sums = np.bincount(places, weights=values[there])
    mean, num_families = sums.sum() / counts.sum(), len(counts)
    if num_families >= MIN_RESAMPLED:
        drawn = resampled(num_families)
        low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
    else:
        spread = np.square(sums - mean * counts).sum() * num_families / max(num_families - 1, 1)
        reach = _quantile(num_families) * np.sqrt(spread) / counts.sum()
        low, high = mean - reach, mean + reach
    return Interval(float(mean), float(max(low, bounds[0])), float(min(high, bounds[1])))


def table_interval(
    measure: Callable[[np.ndarray], float],
    table: np.ndarray,
    families: np.ndarray | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """A measure of a contingency table and its 95 % interval by the jackknife: the clusters as they are, each family in turn left out.

    A bootstrap would draw tables of fewer generators, whose clusters are purer. table: [clusters, G]; families: int [G], None: each
    generator is its own. bounds: of the measure. A single family has no interval but the value.
    """
    numbers = np.arange(table.shape[1]) if families is None else families
    value, distinct = measure(table), np.unique(numbers)
    count = len(distinct)
    if count == 1:
        return Interval(value, value, value)
    without = np.array([measure(table[:, numbers != family]) for family in distinct])
    reach = _quantile(count) * np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return Interval(value, float(max(value - reach, bounds[0])), float(min(value + reach, bounds[1])))


def resampled(num_units: int, seed: int = 0) -> np.ndarray:
    """int64 [BOOTSTRAP_DRAWS, num_units]: units drawn with replacement, alike for all methods and values."""
    return np.random.default_rng(seed).integers(0, num_units, size=(BOOTSTRAP_DRAWS, num_units))


def _quantile(num_units: int) -> float:
    """97.5 % quantile of Student's t with num_units - 1 degrees of freedom; 0 for a single unit."""
    return float(stats.t.ppf(0.975, num_units - 1)) if num_units > 1 else 0.0


def _share_above(scores: np.ndarray, threshold: float) -> float:
    return float(np.mean(scores > threshold)) if len(scores) else float("nan")


def family_numbers(tier: dict) -> np.ndarray:
    """int64 [G] of a tier as the job describes it."""
    return np.unique(tier["families"], return_inverse=True)[1]


def as_array(values: list | None) -> np.ndarray:
    """float64 [G], nan where there is none."""
    return np.array([np.nan] if values is None else values, np.float64)


def share_interval(values: list | None, families: np.ndarray) -> dict | None:
    """{mean, low, high} of values in 0..1; None where nothing was measured."""
    array = as_array(values)
    return None if np.isnan(array).all() else mean_interval(array, families, (0.0, 1.0))._asdict()


def difference_interval(values: np.ndarray, others: np.ndarray, families: np.ndarray) -> dict | None:
    """The same of values minus others, paired over generators."""
    if np.isnan(values - others).all():
        return None
    return mean_interval(values - others, families, (-1.0, 1.0))._asdict()


def loss(measured: dict, families: np.ndarray, value: str = "identification") -> dict | None:
    """How much identification, or family_identification, falls from untouched images to compressed ones, whose references are compressed alike.

    None where images are too small, or there are no families.
    """
    degraded = measured["degradations"][LOSS_DEGRADATION]
    if degraded is None or value not in measured["values"]:
        return None
    return difference_interval(as_array(measured["values"][value]), as_array(degraded["matched"][value]), families)
