"""AbC's calibrator of shares fitted on known pairs, pairs from the corpus itself, and how well shares are calibrated.

The calibrator is two scalars (attrib.shares.shares; Wang et al., ICCV 2023, arXiv 2306.09345). Throughout, the truth of
a candidate is 1 / (true sources among the query's candidates) if it is one of them, else 0: the uniform target over the
exemplars.
"""

import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from attrib.common.errors import AttribError
from attrib.shares.settings import SharesSettings

SOFTPLUS_BETA = 100.0  # AbC's: relu has no gradient, and an infinite cross-entropy, where a true source gets nothing
# Cosine gaps below 1e-4 are rounding; where sharper is always better, the fit ends here.
INVERSE_TEMPERATURE_RANGE = (0.1, 1e4)
LEAST_OFFSET = -999.0
START_QUERIES = 4096  # that the starts are chosen by
NUM_STARTS = 4
QUERY_BLOCK_CELLS = 1 << 24  # float64 cosines in memory at a time


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over queries of the cross-entropy of their shares to the truth, in nats; num_left_out: queries without a
    true candidate."""

    nats: float
    num_queries: int
    num_left_out: int


@dataclass(frozen=True)
class Bin:
    """Candidates with a share in (low, high], or of exactly 0 (low = high = 0): their mean share, their mean truth,
    their number."""

    low: float
    high: float
    mean_share: float
    observed_share: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """Calibration of shares over all queries, also the num_without_truth whose candidates hold no true source, where
    truth is 0 throughout.

    expected_calibration_error: mean over candidates of the gap of their bin. It falls as top_k adds candidates of share
    0, so misplaced_share gives the same gaps per query, halved, in 0 .. 1. brier: mean over queries of the sum of
    (share - truth)^2 (Brier, 1950), in 0 .. 2. true_mass: mean over queries of what the true sources get.
    """

    num_queries: int
    num_without_truth: int
    bins: tuple[Bin, ...]
    expected_calibration_error: float
    misplaced_share: float
    brier: float
    true_mass: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return asdict(self) | {"bins": [asdict(found) for found in self.bins]}


def fit_shares(similarity: np.ndarray, is_true: np.ndarray) -> SharesSettings:
    """Cosine float [n, k] (-inf where a query has fewer candidates) and truth bool [n, k] -> the calibrator of least
    `cross_entropy`.

    Queries without a true candidate are left out (`cross_entropy` counts them). The objective has several minima: a
    coarse grid over the whole range gives the starts, L-BFGS-B refines them. Nothing is random; the result is rounded
    to 6 digits. Raises AttribError if nothing can be learned: no query with a true candidate, or none with a choice.
    """
    similarity, target = _usable(similarity, is_true)
    if not (np.isfinite(similarity).sum(axis=1) > 1).any():
        raise AttribError("every query has a single candidate, which gets all whatever the calibrator; raise top_k")
    some = slice(None, None, -(-len(similarity) // START_QUERIES))
    bounds = [tuple(np.log(INVERSE_TEMPERATURE_RANGE)), (0.0, 1.0)]
    low, high = bounds[0]
    grid = product(low + (high - low) * expit(np.linspace(-4, 4, 17)), expit(np.linspace(-7, 3, 6)))
    starts = sorted(grid, key=lambda at: _scaled_loss(np.array(at), similarity[some], target[some])[0])[:NUM_STARTS]
    found = [
        minimize(
            _scaled_loss,
            np.array(start),
            args=(similarity, target),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"ftol": 1e-15, "gtol": 1e-9},
        )
        for start in starts
    ]
    best = min(found, key=lambda result: result.fun).x
    inverse_temperature, offset = (float(f"{value:.6g}") for value in (math.exp(best[0]), LEAST_OFFSET * best[1] + 0.0))
    return SharesSettings(inverse_temperature=inverse_temperature, offset=offset)


def cross_entropy(similarity: np.ndarray, is_true: np.ndarray, settings: SharesSettings) -> CrossEntropy:
    """What `fit_shares` minimises: shares with softplus(beta = 100) in place of relu, of the queries that have a true
    candidate.

    With relu it would be infinite as soon as one true source is cut off. softplus leaves log(2) / 100 to a candidate of
    weight 0 and offset 0, so that the fit prefers an offset below 0 where candidates are many.
    """
    usable, target = _usable(similarity, is_true)
    nats, _ = _loss(settings.inverse_temperature, settings.offset, usable, target)
    return CrossEntropy(nats, len(usable), len(similarity) - len(usable))


def _loss(
    inverse_temperature: float, offset: float, similarity: np.ndarray, target: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean cross-entropy and its gradient float64 [2] by the two scalars."""
    present = np.isfinite(similarity)
    gap = np.where(present, similarity - similarity.max(axis=1, keepdims=True), 0)
    weight = np.exp(gap * inverse_temperature)
    above = SOFTPLUS_BETA * (weight + 0.001 * offset)
    kept = np.logaddexp(0, above) / SOFTPLUS_BETA
    total = np.where(present, kept, 0).sum(axis=1, keepdims=True)
    # softplus' derivative, the logistic function, in a form that keeps its digits far below 0, where kept is as small.
    slope = np.where(present, 1 / total - target / kept, 0) * np.exp(-np.logaddexp(0, -above))
    gradient = np.array([(slope * gap * weight).sum(), 0.001 * slope.sum()]) / len(similarity)
    return float((target * (np.log(total) - np.log(kept))).sum() / len(similarity)), gradient


def _scaled_loss(position: np.ndarray, similarity: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """`_loss` and its gradient by position [2] = (log inverse temperature, offset / LEAST_OFFSET), both of order 1."""
    inverse_temperature, offset = math.exp(position[0]), LEAST_OFFSET * position[1]
    value, gradient = _loss(inverse_temperature, offset, similarity, target)
    return value, gradient * np.array([inverse_temperature, LEAST_OFFSET])


def pairs_from_corpus(
    views: np.ndarray, anchors: np.ndarray, view_sources: np.ndarray, anchor_ids: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Queries with known sources where no pairs exist -> similarity float64 [m, k], best first, and truth bool [m, k],
    k = min(top_k, n).

    views: float [m, d], vectors of images made from one or more source images by augmentation or re-rendering (crop,
    colour, blur, overlay of two); view_sources: int64 [m, r], the ids of those sources, -1 for none; anchors: float [n,
    d], vectors of the corpus, the unaltered sources included, which should be images that the model was not trained on;
    anchor_ids: int64 [n], which copies of one image may share, so that a copy does not count as an error. Every view
    has its sources by construction, as AbC's customised models have their exemplars.

    Bias: a view keeps pixels of its source, a generated image only what the generator kept. Views that stand out more
    than real queries do give an inverse temperature too high, shares that are too sure; views distorted beyond
    recognition give one too low. `hardness` compares the two without pairs: choose the strength of the distortion so
    that both agree. That every query has a source in the corpus is built in as well, so these shares never say that
    there is none. Raises AttribError for arrays that do not fit or a source without a vector.
    """
    if views.ndim != 2 or anchors.ndim != 2 or views.shape[1] != anchors.shape[1] or not len(views) or not len(anchors):
        raise AttribError(
            f"views {views.shape} and anchors {anchors.shape} must be [m, d] and [n, d] of one model, neither empty"
        )
    if view_sources.ndim != 2 or len(view_sources) != len(views) or anchor_ids.shape != (len(anchors),) or top_k < 1:
        raise AttribError(
            f"view_sources {view_sources.shape}, anchor_ids {anchor_ids.shape} and top_k {top_k} must be "
            f"[{len(views)}, r], [{len(anchors)}] and positive"
        )
    missing = np.setdiff1d(view_sources, np.append(anchor_ids, -1))
    if len(missing) or (view_sources == -1).all(axis=1).any():
        what = f"source {missing[0]} of a view is not among the anchors" if len(missing) else "a view names no source"
        raise AttribError(f"{what}; embed all sources that views were made of, and leave out views of others")
    unit = _unit(anchors, "anchor")
    found, k = [], min(top_k, len(anchors))
    for start in range(0, len(views), rows := max(1, QUERY_BLOCK_CELLS // len(anchors))):
        similarity = _unit(views[start : start + rows], "view") @ unit.T
        # Stable: ties go to the anchor that comes first, whatever their number.
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        sources = view_sources[start : start + rows, None, :]
        found.append((np.take_along_axis(similarity, nearest, 1), (anchor_ids[nearest][:, :, None] == sources).any(2)))
    similarity, is_true = (np.concatenate(parts) for parts in zip(*found))
    return similarity, is_true


def hardness(similarity: np.ndarray) -> dict[str, float]:
    """Medians over queries [n, k], best first: of the best cosine, and of its margin over the second and the
    last candidate.

    For real queries and for views of the corpus, with one k: where they differ, a calibrator that is fitted on the
    views is biased.
    """
    best = similarity[:, 0]
    gaps = {
        "above_second": best - similarity[:, min(1, similarity.shape[1] - 1)],
        "above_last": best - similarity[:, -1],
    }
    return {"best": float(np.median(best))} | {name: float(np.median(gap)) for name, gap in gaps.items()}


def reliability(shares: np.ndarray, is_true: np.ndarray, num_bins: int = 10) -> Reliability:
    """Shares float [n, k], rows of sum one, and truth bool [n, k] -> calibration in num_bins equal bins of (0, 1], and
    one of shares of 0.

    Leave out queries without a true candidate (is_true.any(axis=1)) to ask how shares are divided once a source is
    there.
    """
    _check(shares, is_true)
    if num_bins < 1 or not (np.isfinite(shares).all() and shares.min() >= 0 and np.allclose(shares.sum(axis=1), 1)):
        raise AttribError(
            f"num_bins {num_bins} must be positive, and shares as of soft_shares: 0 or more, rows of sum one"
        )
    truth = is_true / np.maximum(is_true.sum(axis=1, keepdims=True), 1)
    place = np.minimum(np.ceil(shares * num_bins).astype(np.int64), num_bins).ravel()
    counts = np.bincount(place, minlength=num_bins + 1)
    given, observed = (np.bincount(place, v.ravel(), num_bins + 1) for v in (shares, truth))
    filled = np.flatnonzero(counts)
    edges = np.maximum(filled - 1, 0) / num_bins, filled / num_bins
    columns = *edges, given[filled] / counts[filled], observed[filled] / counts[filled], counts[filled]
    bins = tuple(Bin(*row) for row in zip(*(column.tolist() for column in columns)))
    gap = float(np.abs(given - observed).sum())
    return Reliability(
        len(shares),
        int(np.count_nonzero(~is_true.any(axis=1))),
        bins,
        gap / shares.size,
        gap / (2 * len(shares)),
        float(((shares - truth) ** 2).sum(axis=1).mean()),
        float((shares * is_true).sum(axis=1).mean()),
    )


def _check(values: np.ndarray, is_true: np.ndarray) -> None:
    if values.ndim != 2 or values.shape != is_true.shape or is_true.dtype != np.bool_ or not values.size:
        raise AttribError(
            f"candidates {values.shape} and truth {is_true.shape} of {is_true.dtype} must be [n, k], filled, truth bool"
        )


def _usable(similarity: np.ndarray, is_true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """similarity float64 [u, k] and target float64 [u, k] of the queries with a true candidate."""
    _check(similarity, is_true)
    absent = similarity == -np.inf
    if not (np.isfinite(similarity) | absent).all() or (absent & is_true).any():
        raise AttribError(
            "a similarity is NaN or +inf, or a true candidate has -inf; only absent candidates may have -inf"
        )
    keep = is_true.any(axis=1)
    if not keep.any():
        raise AttribError(
            f"none of {len(similarity)} queries has a true source among its {similarity.shape[1]} candidates; raise top_k "
            "or check the ids of the truth"
        )
    kept = is_true[keep]
    return similarity[keep].astype(np.float64), kept / kept.sum(axis=1, keepdims=True)


def _unit(vectors: np.ndarray, name: str) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        row = int(np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[0])
        raise AttribError(f"{name} {row} is zero or not finite; embed that image again or leave it out")
    unit: np.ndarray = vectors / norms
    return unit
