"""Verdicts on sets of images, such as all images of one account. They are much more powerful than single-image tests.

The images of a set are assumed to have one origin; copies count once. The score of an image is centred: its mean over
all families in the gallery is subtracted. The test statistic is the mean centred score over the set, for the best
generator. It is compared with the statistic of equally many negatives in the same galleries. For photographs, and with
`unit: image`, this is a permutation test; with `unit: source`, the negatives of one comparison come from one source. As
for single images, the largest p-value over the origins of the negatives is used.

If the best generator belongs to a family, the verdict names those members whose references do not score significantly
higher than the set (permutation test).
"""

import math
from dataclasses import dataclass

import numpy as np

from attrib.generators.identify.calibration import ORIGINS, PHOTOGRAPHS, Calibration, first_in, gallery_of
from attrib.generators.identify.conformal import column_means, permutation_p_value, source_p_value
from attrib.generators.identify.settings import PrevalenceSettings
from attrib.generators.identify.verdicts import FAMILY, FAMILY_SEPARATOR, KNOWN, UNASSESSABLE, UNKNOWN, Judge

MIN_COMPARED = 20  # negatives of one origin in a gallery
COPY_COSINE = 0.9999  # fingerprints above it are copies of one image; they are stored as float16


@dataclass(frozen=True)
class SetVerdict:
    """The verdict on one set, a row of sets.parquet.

    num_distinct: number of tested images, copies counted once. generator: None unless known or family. floor: smallest
    possible p-value.
    """

    name: str
    num_images: int
    num_distinct: int
    verdict: str
    generator: str | None
    nearest: str
    score: float
    margin: float | None
    p_value: float
    own_p_value: float
    floor: float
    reason: str | None


@dataclass(frozen=True, eq=False)
class SetStratum:
    """The images of the set and the negatives that are assigned to one gallery.

    own, others: float64 [m, G] and [n, G], centred scores of both, nan where a negative has no score. scores: float64
    [m, G], of the set, not centred. origin, source: int64 [n], of the negatives.
    """

    gallery: int
    own: np.ndarray
    others: np.ndarray
    scores: np.ndarray
    origin: np.ndarray
    source: np.ndarray


def judge_set(name: str, vectors: np.ndarray, judge: Judge, settings: PrevalenceSettings) -> SetVerdict:
    """Verdict on one set. vectors: its fingerprints, unit rows float32 [m, d]."""
    calibration = judge.calibration
    generator = np.random.default_rng(settings.seed)
    distinct = vectors[_distinct(vectors)]
    strata = _strata(judge.galleries.scores(distinct), calibration)
    best = int(column_means(np.concatenate([stratum.own for stratum in strata])).argmax())
    p_value, floor = _against_negatives(strata, calibration, settings, generator)
    members = np.flatnonzero(calibration.family == calibration.family[best]).tolist()
    own = {}  # p-value of the hypothesis that references of generator g do not score higher than the set
    for g in members:
        pools = [(-stratum.scores[:, [g]], -calibration.own_scores(stratum.gallery, g)[:, None]) for stratum in strata]
        own[g] = permutation_p_value(pools, settings.num_permutations, generator)
    kept = [calibration.names[g] for g in members if own[g] > judge.settings.false_rejection_rate]
    means = column_means(np.concatenate([stratum.scores for stratum in strata]))
    others = means[calibration.family != calibration.family[best]]
    rate = judge.settings.false_attribution_rate
    nearest, attributed = calibration.names[best], None
    if floor > rate + 1e-12:
        verdict = UNASSESSABLE
        reason = (
            f"the negatives allow no p-value below {floor:.6g} for this set, and false_attribution_rate is {rate:g}; "
            "register more negatives"
        )
    elif p_value > rate + 1e-12:
        verdict = UNKNOWN
        reason = f"the nearest generator is {nearest}, but sets of other origin score as high (p {p_value:.3g})"
    elif not kept:
        verdict = UNKNOWN
        reason = f"the nearest generator is {nearest}, but its own references score higher (p {own[best]:.3g})"
    else:
        verdict, attributed = (KNOWN if len(kept) == 1 else FAMILY), FAMILY_SEPARATOR.join(kept)
        reason = None if len(kept) == 1 else "the set is consistent with several generators of one family"
    score, margin = float(means[best]), float(means[best] - others.max()) if len(others) else None
    counts, p_values = (len(vectors), len(distinct)), (p_value, own[best], floor)
    return SetVerdict(name, *counts, verdict, attributed, nearest, score, margin, *p_values, reason)


def _distinct(vectors: np.ndarray) -> np.ndarray:
    """Indices of the vectors without copies, int64, in order."""
    kept: list[int] = []
    for i, vector in enumerate(vectors):
        if not kept or (vectors[kept] @ vector).max() <= COPY_COSINE:
            kept.append(i)
    return np.array(kept)


def _strata(scores: np.ndarray, calibration: Calibration) -> list[SetStratum]:
    """One stratum per gallery that the set's images are assigned to. scores: float32 [m, galleries, G]."""
    chosen = gallery_of(scores)
    found = []
    for gallery in np.unique(chosen).tolist():
        mine = scores[chosen == gallery, gallery].astype(np.float64)
        negatives, image = _negatives_in(gallery, calibration)
        own, others = centred(mine, calibration.family), centred(negatives, calibration.family)
        found.append(SetStratum(gallery, own, others, mine, calibration.origins[image], calibration.source[image]))
    return found


def centred(scores: np.ndarray, family: np.ndarray) -> np.ndarray:
    """Scores [m, G] minus the mean of each row's family means, ignoring nan; unchanged if there is one family."""
    heads = np.unique(family)
    if len(heads) == 1:
        return scores
    present = ~np.isnan(scores)
    of_family = (family[:, None] == heads[None, :]).astype(np.float64)
    counts = present @ of_family
    means = np.where(present, scores, 0.0) @ of_family / np.maximum(counts, 1)
    return scores - means.sum(axis=1, keepdims=True) / np.maximum((counts > 0).sum(axis=1, keepdims=True), 1)


def _negatives_in(gallery: int, calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [k, G] and indices int64 [k] of the negatives assigned to a gallery, each once.

    If fewer than MIN_COMPARED of an origin are assigned to the gallery, all negatives of that origin are taken, under
    the degradation of the gallery. They have lower scores there than assigned ones, but a set of such images would not
    have been assigned to the gallery either.
    """
    degradation = first_in(gallery_of(calibration.negatives), gallery)
    there = ~np.isnan(calibration.negatives[gallery, :, gallery]).all(axis=1)
    for origin in range(len(ORIGINS)):
        mine = calibration.origins == origin
        if np.count_nonzero(degradation[mine] >= 0) < MIN_COMPARED:
            degradation = np.where(mine, np.where(there, gallery, -1), degradation)
    image = np.flatnonzero(degradation >= 0)
    return calibration.negatives[degradation[image], image, gallery].astype(np.float64), image


def _against_negatives(
    strata: list[SetStratum], calibration: Calibration, settings: PrevalenceSettings, generator: np.random.Generator
) -> tuple[float, float]:
    """P-value of the highest mean, and its smallest possible value; both are 1 if a gallery lacks an origin."""
    if not calibration.is_generated:
        return 1.0, 1.0
    largest, floor = 0.0, 0.0
    num_images, count = sum(len(stratum.own) for stratum in strata), settings.num_permutations
    for origin in np.flatnonzero(calibration.origin_units):
        masks = [stratum.origin == origin for stratum in strata]
        if not all(mask.any() for mask in masks):
            return 1.0, 1.0
        if calibration.settings.unit == "image" or origin == PHOTOGRAPHS:
            pools = [(stratum.own, stratum.others[mask]) for stratum, mask in zip(strata, masks)]
            p_value = permutation_p_value(pools, count, generator)
            # Expected p-value of the highest of all sets: random draws can give the set itself, and these count as
            # ties.
            again = 1 / math.comb(num_images + sum(int(mask.sum()) for mask in masks), num_images)
            least = (1 + count * again) / (1 + count)
        else:
            ids = np.unique(np.concatenate([stratum.source[mask] for stratum, mask in zip(strata, masks)]))
            sources = []
            for source in ids:
                mine = [mask & (stratum.source == source) for stratum, mask in zip(strata, masks)]
                # A source without an image in a gallery is represented there by all negatives of the origin.
                chosen = [own if own.any() else mask for own, mask in zip(mine, masks)]
                sources.append([stratum.others[own] for stratum, own in zip(strata, chosen)])
            p_value = source_p_value([stratum.own for stratum in strata], sources, count, generator)
            least = 1 / (len(ids) + 1)
        largest, floor = max(largest, p_value), max(floor, least)
    return largest, floor
