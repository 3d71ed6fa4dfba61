"""Measures of how well generators are told apart: functions of scores, and intervals over generators.

Ties count against a method. An image is not identified if another generator has the same highest score. In an area
under a curve, equal scores count half. A threshold accepts only higher scores. So a method that gives the same score to
every image has accuracy 0 and an area of one half.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from attrib.common.errors import AttribError
from attrib.evaluate.scores import BOOTSTRAP_DRAWS, Interval
from attrib.generators.evaluation.settings import LOSS_DEGRADATION

MIN_RESAMPLED = 10  # families; the bootstrap interval of fewer families is too narrow
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


def recalls(right: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Recall of each generator, float64 [G]. right: bool [n], which images are identified; truth: int [n] in 0..G-1."""
    return np.bincount(truth, weights=right) / np.bincount(truth)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve: share of (positive, negative) pairs in which the positive scores higher.

    Ties count half; nan without pairs.
    """
    return oscr(positive, np.ones(len(positive), bool), negative)


def oscr(known: np.ndarray, correct: np.ndarray, unknown: np.ndarray) -> float:
    """Area under the open-set classification rate curve (Dhamija et al., NeurIPS 2018).

    The curve is correct identification against false acceptance over all thresholds. Its area is the share of (known,
    unknown) pairs of images in which the known image is correctly identified and scores higher. Ties count half; nan
    without pairs. known, unknown: float [n] and [m], highest score of each image of known and of unknown generators;
    correct: bool [n], whether the known image is identified.
    """
    if not len(known) or not len(unknown):
        return float("nan")
    ascending = np.sort(unknown)
    below = np.searchsorted(ascending, known, side="left")
    reached = np.searchsorted(ascending, known, side="right")
    return float(np.mean(np.where(correct, below + reached, 0)) / (2 * len(unknown)))


def threshold_at(negative: np.ndarray, false_positive_rate: float) -> float:
    """Lowest score of a negative, or -inf, such that at most this share of the negatives is higher.

    Raises AttribError without negatives.
    """
    if not len(negative):
        raise AttribError("a threshold needs scores of negatives, and there are none; add generators to the set")
    num_allowed = int(np.floor(false_positive_rate * len(negative) + 1e-9))
    if num_allowed >= len(negative):
        return -np.inf
    place = len(negative) - 1 - num_allowed
    return float(np.partition(negative, place)[place])


def verification(similarity: np.ndarray, generator: np.ndarray, false_positive_rate: float) -> dict[str, list[float]]:
    """{verification_auc, true_positive_rate, false_positive_rate: one value per generator}.

    Positive pairs are two images of the generator; negative pairs are one of its images and one of another generator.
    The threshold has the given false positive rate on pairs of two *other* generators. similarity: float [n, n].
    generator: int [n], each of 0..G-1. Raises AttribError for fewer than three generators.
    """
    numbers = generator.astype(np.min_scalar_type(int(generator.max())))  # one byte each, for millions of pairs
    apart = np.triu(numbers[:, None] != numbers, k=1)
    mixed = similarity[apart]
    first, second = (np.broadcast_to(side, apart.shape)[apart] for side in (numbers[:, None], numbers))
    found: dict[str, list[float]] = {"verification_auc": [], "true_positive_rate": [], "false_positive_rate": []}
    for g in range(int(generator.max()) + 1):
        own = generator == g
        within = similarity[np.ix_(own, own)]
        positive, negative = within[np.triu_indices(len(within), k=1)], similarity[np.ix_(own, ~own)].ravel()
        threshold = threshold_at(mixed[(first != g) & (second != g)], false_positive_rate)
        found["verification_auc"].append(auc(positive, negative))
        found["true_positive_rate"].append(float(np.mean(positive > threshold)))
        found["false_positive_rate"].append(float(np.mean(negative > threshold)))
    return found


def adjusted_rand(table: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie, J. Classification 2, 1985). table: counts [clusters, generators]."""
    clusters, truth = np.repeat(np.indices(table.shape).reshape(2, -1), table.ravel(), axis=1)
    return float(adjusted_rand_score(truth, clusters))


def purity(table: np.ndarray) -> float:
    """Share of images of the most frequent generator of their cluster. table: counts [clusters, generators]."""
    return float(table.max(axis=1).sum() / table.sum())


def mean_interval(
    values: np.ndarray, families: np.ndarray | None = None, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> Interval:
    """Mean over generators, and its 95 % interval over families.

    Families and not generators are resampled, because generators of one family are not independent. With MIN_RESAMPLED
    families or more, the interval is a bootstrap interval, otherwise that of Student's t on the families' sums. For a
    single family both ends are the mean. values: float64 [G], nan if not measured. families: int [G]; None: each
    generator is a family. bounds: limits of the interval.
    """
    measured = ~np.isnan(values)
    if not measured.any():
        return Interval(float("nan"), float("nan"), float("nan"))
    numbers = np.arange(len(values)) if families is None else families
    _, places = np.unique(numbers[measured], return_inverse=True)
    counts = np.bincount(places)
    sums = np.bincount(places, weights=values[measured])
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
    """A measure of a table [clusters, G] and its 95 % interval by the jackknife over families, with fixed clusters.

    It is not a bootstrap, because bootstrap draws contain fewer generators, and clusters of fewer generators are purer.
    families, bounds: as in `mean_interval`. For a single family both ends are the value.
    """
    numbers = np.arange(table.shape[1]) if families is None else families
    value, distinct = measure(table), np.unique(numbers)
    count = len(distinct)
    if count == 1:
        return Interval(value, value, value)
    without = np.array([measure(table[:, numbers != family]) for family in distinct])
    reach = _quantile(count) * np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return Interval(value, float(max(value - reach, bounds[0])), float(min(value + reach, bounds[1])))


def resampled(num_families: int) -> np.ndarray:
    """int64 [BOOTSTRAP_DRAWS, num_families]: draws with replacement, the same for all methods and values."""
    return np.random.default_rng(0).integers(0, num_families, size=(BOOTSTRAP_DRAWS, num_families))


def _quantile(num_families: int) -> float:
    """97.5 % quantile of Student's t with num_families - 1 degrees of freedom; 0 for a single family."""
    return float(stats.t.ppf(0.975, num_families - 1)) if num_families > 1 else 0.0


def family_numbers(families: list[str]) -> np.ndarray:
    """int64 [G] of the families of a generator set."""
    return np.unique(families, return_inverse=True)[1]


def as_array(values: list | None) -> np.ndarray:
    """float64 [G], nan for None."""
    return np.array([np.nan] if values is None else values, np.float64)


def share_interval(values: list | None, families: np.ndarray) -> dict | None:
    """{mean, low, high} of values in 0..1; None if nothing was measured."""
    return _interval(as_array(values), families, (0.0, 1.0))


def difference_interval(values: np.ndarray, others: np.ndarray, families: np.ndarray) -> dict | None:
    """{mean, low, high} of values minus others, paired over generators; None if nothing was measured."""
    return _interval(values - others, families, (-1.0, 1.0))


def _interval(values: np.ndarray, families: np.ndarray, bounds: tuple[float, float]) -> dict | None:
    return None if np.isnan(values).all() else mean_interval(values, families, bounds)._asdict()


def loss(measured: dict, families: np.ndarray, value: str = "identification") -> dict | None:
    """Decrease of identification, or family_identification, if references and queries have LOSS_DEGRADATION.

    None if degraded images are too small, or there are no families.
    """
    degraded = measured["degradations"][LOSS_DEGRADATION]
    if degraded is None or value not in measured["values"]:
        return None
    return difference_interval(as_array(measured["values"][value]), as_array(degraded["matched"][value]), families)
