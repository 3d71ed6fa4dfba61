"""Fit the calibrator of AbC on known pairs, make such pairs from sources alone, and measure how well it works.

The calibrator is two numbers that turn similarities into shares (attrib/shares/shares.py; Wang et al., ICCV 2023, arXiv
2306.09345). "Calibrated" means that a share equals the rate at which the candidate is a true source. The target of a
query is uniform: 1 / (number of its true candidates) for each true candidate and 0 for the others.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from attrib.common.errors import AttribError
from attrib.shares.settings import SharesSettings

SOFTPLUS_BETA = 100.0  # as AbC: with relu, a true source of share 0 has no gradient and an infinite cross-entropy
# Cosine gaps below 1e-4 are rounding errors. The fit stops here if a higher value is always better.
INVERSE_TEMPERATURE_RANGE = (0.1, 1e4)
LEAST_OFFSET = -999.0
START_QUERIES = 4096  # the sample that starting points are chosen on
NUM_STARTS = 4
PRECISION = {"ftol": 1e-15, "gtol": 1e-9}
QUERY_BLOCK_CELLS = 1 << 24  # float64 cosines in memory at a time


@dataclass(frozen=True)
class Bin:
    """Candidates with a share in (low, high], or of exactly 0 if low = high = 0. observed_share: their mean target."""

    low: float
    high: float
    mean_share: float
    observed_share: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """Calibration of shares. Queries without a true candidate (num_without_truth of them) count, with target 0.

    expected_calibration_error: mean over candidates of the gap between share and target of their bin. Candidates of
    share 0 dilute it. misplaced_share: the same gaps summed per query and halved, in 0 .. 1. brier: mean over queries
    of the sum of (share - target)^2, in 0 .. 2 (Brier, 1950). true_mass: mean share of all true sources of a query.
    """

    num_queries: int
    num_without_truth: int
    bins: list[Bin]
    expected_calibration_error: float
    misplaced_share: float
    brier: float
    true_mass: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_shares(similarity: np.ndarray, is_true: np.ndarray) -> SharesSettings:
    """Return the calibrator of least cross-entropy between the targets and the shares.

    similarity: float [n, k], cosine, -inf where a query has fewer candidates; is_true: bool [n, k]. Queries without a
    true candidate are ignored. softplus(beta = 100) replaces the relu of the shares, as in AbC. It leaves log(2) / 100
    to a candidate of weight 0 at offset 0, so the fit prefers a negative offset where candidates are many.

    The objective has several minima, so L-BFGS-B starts from the best points of a coarse grid. The result is
    deterministic, rounded to 6 digits. Raises AttribError if no query has both a true candidate and a choice.
    """
    similarity, target = _usable(similarity, is_true)
    if not (np.isfinite(similarity).sum(axis=1) > 1).any():
        raise AttribError("every query has only one candidate, so its share is always 1; give more source images")
    sample = slice(None, None, -(-len(similarity) // START_QUERIES))
    low, high = np.log(INVERSE_TEMPERATURE_RANGE)
    grid = product(low + (high - low) * expit(np.linspace(-4, 4, 17)), expit(np.linspace(-7, 3, 6)))
    starts = sorted(grid, key=lambda position: _loss(position, similarity[sample], target[sample])[0])[:NUM_STARTS]
    known = {"args": (similarity, target), "jac": True, "bounds": [(low, high), (0.0, 1.0)]}
    found = [minimize(_loss, start, method="L-BFGS-B", options=PRECISION, **known) for start in starts]
    best = min(found, key=lambda result: result.fun).x
    inverse_temperature, offset = (float(f"{value:.6g}") for value in (math.exp(best[0]), LEAST_OFFSET * best[1] + 0.0))
    return SharesSettings(inverse_temperature=inverse_temperature, offset=offset)


def _loss(position: Sequence[float], similarity: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy in nats and its gradient float64 [2] by `position`.

    position: (log inverse_temperature, offset / LEAST_OFFSET), both of order 1.
    """
    inverse_temperature, offset = math.exp(position[0]), LEAST_OFFSET * position[1]
    present = np.isfinite(similarity)
    gap = np.where(present, similarity - similarity.max(axis=1, keepdims=True), 0)
    weight = np.exp(gap * inverse_temperature)
    above = SOFTPLUS_BETA * (weight + 0.001 * offset)
    kept = np.logaddexp(0, above) / SOFTPLUS_BETA
    total = np.where(present, kept, 0).sum(axis=1, keepdims=True)
    slope = np.where(present, 1 / total - target / kept, 0) * expit(above)
    gradient = np.array([(slope * gap * weight).sum(), 0.001 * slope.sum()]) / len(similarity)
    loss = float((target * (np.log(total) - np.log(kept))).sum() / len(similarity))
    return loss, gradient * np.array([inverse_temperature, LEAST_OFFSET])


def pairs_from_corpus(
    views: np.ndarray, anchors: np.ndarray, view_sources: np.ndarray, anchor_ids: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of queries with known sources: similarity float64 [m, k], best first, and is_true bool [m, k].

    views: float [m, d], images derived from one or more sources, such as augmentations; view_sources: int64 [m, r], the
    ids of these sources, padded with -1; anchors: float [n, d], all source images; anchor_ids: int64 [n], equal for
    copies of one image, so that a copy is no error. k = min(top_k, n). Use images that the model was not trained on.

    Augmentations are easier than generated images, so a calibrator fitted on them is too confident: its inverse
    temperature is too high. It also never learns that a query may have no source. Raises AttribError if shapes do not
    fit or a source has no vector.
    """
    if views.ndim != 2 or anchors.ndim != 2 or views.shape[1] != anchors.shape[1] or not len(views) or not len(anchors):
        raise AttribError(
            "views and anchors must be non-empty arrays [m, d] and [n, d] of one model; got "
            f"{views.shape} and {anchors.shape}"
        )
    if view_sources.ndim != 2 or len(view_sources) != len(views) or anchor_ids.shape != (len(anchors),) or top_k < 1:
        raise AttribError(
            f"view_sources must be [{len(views)}, r], anchor_ids [{len(anchors)}] and top_k 1 or more; got "
            f"{view_sources.shape}, {anchor_ids.shape} and {top_k}"
        )
    missing = np.setdiff1d(view_sources, np.append(anchor_ids, -1))
    if len(missing) or (view_sources == -1).all(axis=1).any():
        what = f"source {missing[0]} of a view is not among the anchors" if len(missing) else "a view names no source"
        raise AttribError(f"{what}; embed all sources of the views, or leave these views out")
    unit_anchors = _unit(anchors, "anchor")
    found, block_rows = [], max(1, QUERY_BLOCK_CELLS // len(anchors))
    for start in range(0, len(views), block_rows):
        block = slice(start, start + block_rows)
        similarity = _unit(views[block], "view") @ unit_anchors.T
        # Stable, so that the order of ties does not depend on top_k.
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :top_k]
        is_true = (anchor_ids[nearest][:, :, None] == view_sources[block, None, :]).any(axis=2)
        found.append((np.take_along_axis(similarity, nearest, axis=1), is_true))
    similarity, is_true = (np.concatenate(parts) for parts in zip(*found))
    return similarity, is_true


def reliability(shares: np.ndarray, is_true: np.ndarray, num_bins: int = 10) -> Reliability:
    """Compare shares float [n, k], whose rows sum to one, with is_true bool [n, k].

    One bin holds the shares of 0, and num_bins equal bins divide (0, 1].
    """
    _check(shares, is_true)
    if num_bins < 1 or not (np.isfinite(shares).all() and shares.min() >= 0 and np.allclose(shares.sum(axis=1), 1)):
        raise AttribError(
            f"shares must be 0 or more with rows of sum 1, and num_bins 1 or more; got {shares.min():g} to "
            f"{shares.max():g}, sums {shares.sum(axis=1).min():g} to {shares.sum(axis=1).max():g}, num_bins {num_bins}"
        )
    target = is_true / np.maximum(is_true.sum(axis=1, keepdims=True), 1)
    place = np.minimum(np.ceil(shares * num_bins).astype(np.int64), num_bins).ravel()
    counts, given, observed = (
        np.bincount(place, weights, num_bins + 1) for weights in (None, shares.ravel(), target.ravel())
    )
    gap = float(np.abs(given - observed).sum())
    return Reliability(
        num_queries=len(shares),
        num_without_truth=int(np.count_nonzero(~is_true.any(axis=1))),
        bins=[
            Bin(max(i - 1, 0) / num_bins, i / num_bins, given[i] / counts[i], observed[i] / counts[i], int(counts[i]))
            for i in np.flatnonzero(counts).tolist()
        ],
        expected_calibration_error=gap / shares.size,
        misplaced_share=gap / (2 * len(shares)),
        brier=float(((shares - target) ** 2).sum(axis=1).mean()),
        true_mass=float((shares * is_true).sum(axis=1).mean()),
    )


def _check(values: np.ndarray, is_true: np.ndarray) -> None:
    if values.ndim != 2 or values.shape != is_true.shape or is_true.dtype != np.bool_ or not values.size:
        raise AttribError(
            "candidates and truth must both be non-empty [n, k] arrays, truth of type bool; got "
            f"{values.shape}, {is_true.shape}, {is_true.dtype}"
        )


def _usable(similarity: np.ndarray, is_true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """similarity and target, float64 [u, k], of the queries with a true candidate."""
    _check(similarity, is_true)
    absent = similarity == -np.inf
    if not (np.isfinite(similarity) | absent).all() or (absent & is_true).any():
        raise AttribError(
            "a similarity is NaN or +inf, or a true candidate has -inf; use -inf for absent candidates only"
        )
    keep = is_true.any(axis=1)
    if not keep.any():
        raise AttribError(
            "shares cannot be fitted: no query has a true source among its "
            f"{similarity.shape[1]} best candidates; check the ids of the true sources, or take more candidates"
        )
    kept = is_true[keep]
    return similarity[keep].astype(np.float64), kept / kept.sum(axis=1, keepdims=True)


def _unit(vectors: np.ndarray, name: str) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unusable = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(unusable):
        raise AttribError(f"{name} {unusable[0]} is zero or not finite; embed that image again or leave it out")
    return np.asarray(vectors / norms)
