"""Which gallery an image comes to, and where it stands there between negatives and a generator's own references."""

from dataclasses import dataclass

import numpy as np

SMALLEST_DEVIATION = 1e-6  # of scores


@dataclass(frozen=True, eq=False)
class Stratum:
    """What comes to one gallery of the negatives, each once for every degradation that leads it there.

    scores: float64 [k, G], nan where the generator, or its family, made the negative; image: int64 [k], its place; factor: float64 [k],
    generators in the gallery over those that it has a score for; itself: of those that come, how often their image does in the mean, 1 if none.
    """

    scores: np.ndarray
    image: np.ndarray
    factor: np.ndarray
    itself: float


def best_of(scores: np.ndarray) -> np.ndarray:
    """int64 [m]: the column of the highest score in [m, G], nan taking no part, the first of equals."""
    return np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1)


def gallery_of(scores: np.ndarray) -> np.ndarray:
    """int64 [...]: of scores [..., D, G] the gallery that holds the highest, the first of equals; -1 without any score."""
    filled = np.where(np.isnan(scores), -np.inf, scores).max(axis=-1)
    return np.where(np.isinf(filled).all(axis=-1), -1, filled.argmax(axis=-1))


def first_in(chosen: np.ndarray, gallery: int) -> np.ndarray:
    """int64 [n]: of the galleries chosen [D, n] by each image under each degradation, a degradation that leads to this one; -1 without one.

    Preferred is the gallery's own degradation.
    """
    here = chosen == gallery
    return np.where(here[gallery], gallery, np.where(here.any(axis=0), here.argmax(axis=0), -1))


def standing(
    scores: np.ndarray, mean: np.ndarray, deviation: np.ndarray, own: np.ndarray, own_deviation: np.ndarray
) -> np.ndarray:
    """Deviations of the negatives by which scores lie above their mean, less deviations of a generator's own references by which they lie below
    its mean, `own`; nan where that is, since no reference can be left out. Deviations count as SMALLEST_DEVIATION at least: below it nothing
    differs but for rounding."""
    above = (scores - mean) / np.maximum(deviation, SMALLEST_DEVIATION)
    below = np.maximum(0.0, own - scores) / np.maximum(own_deviation, SMALLEST_DEVIATION)
    return above - below
