"""Prevalence (share) of each generator in an image set under label shift, with intervals, and its change between runs.

Counting verdicts would give biased shares, because verdicts have errors. The error rates are known from leave-one-out
verdicts of references and negatives: C[j, k] is the rate at which an image of origin j gets verdict k. If pi are the
true shares, the expected rates of the verdicts are pi C. So pi is estimated by maximum likelihood (EM).

Intervals come from random draws of the verdict rates and of the rows of C. They are drawn from Dirichlet posteriors
whose prior has the weight of one image. Many true shares are exactly 0 or 1, and draws never reach these values. So an
interval is extended to 0 or 1 if a likelihood-ratio test over pi and C together does not reject that value.

Shares are estimated for each gallery and averaged with the numbers of images as weights. With one C for all galleries,
the estimate would be wrong, because images of unregistered generators are assigned to other galleries than images of
registered ones. Images of unregistered generators are assumed to resemble the negatives. Images without a fingerprint,
and images in galleries whose references are not recognised, are left out; `of_all_low` and `of_all_high` are bounds on
the share among all images.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

PRIOR_IMAGES = 1.0  # weight of the uniform prior on the verdict rates and on each row of the confusion matrix
MAX_STEPS = 2_000  # of EM
TOLERANCE = 1e-7
LIKELIHOOD_TOLERANCE = 1e-5  # of a step of EM
INTERVAL_PERCENT = (2.5, 97.5)
BORDER_LEVEL = 0.05  # significance level of the likelihood-ratio tests whether a share is 0 or 1
DRAWS_TOGETHER = 100
OTHER = "(no registered generator)"


@dataclass(frozen=True)
class Share:
    """Corrected share of one generator among the assessed images, with a 95 % interval.

    num_images: number of verdicts, not corrected. of_all_low, of_all_high: bounds on the share among all images, if
    none or all of the images that could not be assessed are from this generator.
    """

    name: str
    num_images: int
    share: float
    low: float
    high: float
    of_all_low: float
    of_all_high: float


def estimate_shares(
    names: list[str], counts: np.ndarray, confusion: np.ndarray, num_left_out: int, num_draws: int, seed: int
) -> tuple[list[Share], np.ndarray]:
    """Shares of `names` and of OTHER, in this order, and the draws for their intervals, float64 [num_draws, J].

    J = len(names) + 1. counts: [D, J], verdicts by gallery. confusion: [D, J, J], number of leave-one-out images of
    origin j with verdict k. A gallery without images of an origin gets the rates of all galleries with the weight of
    one image. Raises ValueError without verdicts.
    """
    total = counts.sum()
    if not total:
        raise ValueError("no image of the set was assessed, so its shares are not known")
    generator = np.random.default_rng(seed)
    confusion = _filled(confusion)
    size, used = counts.shape[1], np.flatnonzero(counts.sum(axis=1))
    estimate, draws = np.zeros(size), np.zeros((num_draws, size))
    at_zero, at_one = np.zeros(size), np.zeros(size)
    for gallery in used:
        weight = counts[gallery].sum() / total
        rates = counts[gallery] + PRIOR_IMAGES * weight / size  # the prior weighs one image over all galleries together
        rows = confusion[gallery] + PRIOR_IMAGES / size
        found = solve_shares((rates / rates.sum())[None], (rows / rows.sum(axis=1, keepdims=True))[None])[0]
        ratios = border_ratios(counts[gallery], rows)
        # In a gallery that recognises few of its references, the likelihood is flat. Set a generator's share to zero if
        # no image is attributed to it and the likelihood-ratio test does not reject zero.
        unseen = np.append((counts[gallery, :-1] == 0) & (ratios[0][:-1] < stats.chi2.isf(BORDER_LEVEL, 1)), False)
        found[-1] += found[unseen].sum()
        estimate += weight * np.where(unseen, 0.0, found)
        for start in range(0, num_draws, DRAWS_TOGETHER):
            some = draws[start : start + DRAWS_TOGETHER]
            drawn_rates = _dirichlet(np.broadcast_to(rates, some.shape), generator)
            drawn_rows = _dirichlet(np.broadcast_to(rows, (len(some), size, size)), generator)
            some += weight * solve_shares(drawn_rates, drawn_rows)
        at_zero, at_one = at_zero + ratios[0], at_one + ratios[1]
    low, high = np.percentile(draws, INTERVAL_PERCENT, axis=0)
    low, high = np.minimum(low, estimate), np.maximum(high, estimate)
    rejected_from = stats.chi2.isf(BORDER_LEVEL, len(used))  # one degree of freedom per gallery
    low, high = np.where(at_zero < rejected_from, 0.0, low), np.where(at_one < rejected_from, 1.0, high)
    absent = num_left_out / (num_left_out + total)
    columns = estimate, low, high, low * (1 - absent), high * (1 - absent) + absent
    rows = zip([*names, OTHER], counts.sum(axis=0).astype(int).tolist(), *(column.tolist() for column in columns))
    return [Share(*row) for row in rows], draws


def _filled(confusion: np.ndarray) -> np.ndarray:
    """confusion [D, J, J], where rows without images get the rates of all galleries with the weight of one image."""
    pooled = confusion.sum(axis=0)
    pooled = pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1e-12)
    return np.where(confusion.sum(axis=2, keepdims=True) > 0, confusion, pooled)


def solve_shares(rates: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """float64 [b, J]: shares pi >= 0 with sum 1 that maximise sum_k rates_k log(pi C)_k, by EM from equal shares.

    rates: [b, K]; confusion: [b, J, K]; the rows of both sum to 1.
    """
    shares = np.full(confusion.shape[:2], 1.0 / confusion.shape[1])
    for _ in range(MAX_STEPS):
        expected = np.einsum("bj,bjk->bk", shares, confusion)
        ratio = rates / np.maximum(expected, 1e-300)
        moved = shares * np.einsum("bjk,bk->bj", confusion, ratio)
        change = np.abs(moved - shares).max()
        shares = moved
        if change < TOLERANCE:
            break
    return shares / shares.sum(axis=1, keepdims=True)


def border_ratios(counts: np.ndarray, confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likelihood-ratio statistics of share j = 0 and of share j = 1 against the best shares, float64 [J] each.

    The likelihood is that of both arguments. counts: [J], verdicts, J >= 2. confusion: [J, J], positive leave-one-out
    counts.
    """
    size = len(counts)
    free, borders = np.ones((1, size)), np.eye(size)
    shares = np.concatenate([free, 1 - borders, borders])  # EM keeps a share of 0
    shares = shares / shares.sum(axis=1, keepdims=True)
    rates = np.broadcast_to(confusion / confusion.sum(axis=1, keepdims=True), (len(shares), *confusion.shape))
    before = np.full(len(shares), -np.inf)
    for _ in range(MAX_STEPS):
        expected = np.maximum(np.einsum("bj,bjk->bk", shares, rates), 1e-300)
        likelihood = np.log(expected) @ counts + (confusion * np.log(rates)).sum(axis=(1, 2))
        if np.abs(likelihood - before).max() < LIKELIHOOD_TOLERANCE:
            break
        before = likelihood
        made = shares[:, :, None] * rates * (counts / expected)[:, None, :]
        shares = made.sum(axis=2) / counts.sum()
        rates = confusion + made
        rates = rates / rates.sum(axis=2, keepdims=True)
    ratios = 2 * (likelihood.max() - likelihood)
    return ratios[1 : size + 1], ratios[size + 1 :]


def mixed_confusion(confusion: np.ndarray, gallery_counts: np.ndarray) -> np.ndarray:
    """Confusion matrix of the image set, float64 [J, J], from those of the galleries [D, J, J].

    Rates are averaged with the number of the set's images in each gallery [D] as weights, then multiplied by the
    largest count of each origin. A gallery without images of an origin gets the rates of all galleries.
    """
    totals, filled = confusion.sum(axis=2, keepdims=True), _filled(confusion)
    rates = filled / np.maximum(filled.sum(axis=2, keepdims=True), 1e-12)
    weights = gallery_counts / gallery_counts.sum()
    return np.tensordot(weights, rates, axes=1) * totals.max(axis=0)


def changes(names: list[str], draws: np.ndarray, earlier_names: list[str], earlier_draws: np.ndarray) -> list[dict]:
    """Change of the share of each name that both runs have, with a 95 % interval.

    changed: whether the interval excludes 0. draws: float64 [n, J] and [m, J'], columns in the order of the names. The
    errors of the two runs are assumed to be independent. Runs with the same registry have some errors in common, so the
    interval is then wider than necessary.
    """
    found = []
    count = min(len(draws), len(earlier_draws))
    for name in filter(earlier_names.__contains__, names):
        now, then = draws[:count, names.index(name)], earlier_draws[:count, earlier_names.index(name)]
        low, high = np.percentile(now - then, INTERVAL_PERCENT).tolist()
        change = float(np.mean(now) - np.mean(then))
        found.append({"name": name, "change": change, "low": low, "high": high, "changed": low > 0 or high < 0})
    return found


def _dirichlet(weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws from Dirichlet(weights) along the last axis."""
    drawn = np.maximum(generator.standard_gamma(weights), 1e-300)
    return drawn / drawn.sum(axis=-1, keepdims=True)
