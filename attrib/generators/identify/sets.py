"""Many images of one account at once: a far stronger test than any of them alone.

The images of a set are taken to have one origin. How far each stands out for a generator, which is its score above the mean of its scores
for all families in that gallery, is averaged by generator, and the highest mean is compared with that of as many negatives in the same
galleries: by permutation where images are the unit and for photographs, by sets from one source at a time where sources are. How far an
image stands out depends on that image alone, so that a large set is not measured by itself; and a picture that is there many times counts
once. As for single images, the largest p-value over the origins of negatives counts.

Of a family, whose members single images do not tell apart, a set keeps those whose own references it is like: each is given up if a
permutation test says that the set scores lower than they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attrib.generators.identify.calibration import ORIGINS, PHOTOGRAPHS, Calibration, first_in, gallery_of
from attrib.generators.identify.conformal import column_means, permutation_p_value, source_p_value
from attrib.generators.identify.settings import PrevalenceSettings
from attrib.generators.identify.verdicts import FAMILY, FAMILY_SEPARATOR, KNOWN, UNASSESSABLE, UNKNOWN, Judge

MIN_COMPARED = 20  # negatives of one origin in a gallery
COPY_COSINE = 0.9999  # of the fingerprints of one picture, which are stored as float16


@dataclass(frozen=True)
class SetVerdict:
    """num_images: in the set; num_distinct: of them, one of each picture, which are tested; generator: None unless known or family; floor: the
    least p_value that could have come out."""

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
    """A set's images in one gallery beside the negatives there. own, others: float64 [m, G] and [n, G], how far each stands out, nan where a negative
    has no score; scores: float64 [m, G], as they are compared with references; origin, source: int64 [n], of the negatives."""

    gallery: int
    own: np.ndarray
    others: np.ndarray
    scores: np.ndarray
    origin: np.ndarray
    source: np.ndarray


def judge_set(name: str, vectors: np.ndarray, judge: Judge, settings: PrevalenceSettings) -> SetVerdict:
    """vectors: float32 [m, d], unit rows of all images that are tested. The same set gets the same p-values whatever others there are."""
    calibration = judge.calibration
    generator = np.random.default_rng(settings.seed)
    distinct = vectors[_distinct(vectors)]
    strata = _strata(judge.galleries.scores(distinct), calibration)
    best = int(column_means(np.concatenate([stratum.own for stratum in strata])).argmax())
    p_value, floor = _against_negatives(strata, calibration, settings, generator)
    members = np.flatnonzero(calibration.family == calibration.family[best]).tolist()
    own = {g: _against_own(strata, g, calibration, settings, generator) for g in members}
    kept = [calibration.names[g] for g in members if own[g] > judge.settings.false_rejection_rate]
    means = column_means(np.concatenate([stratum.scores for stratum in strata]))
    others = means[calibration.family != calibration.family[best]]
    rate = judge.settings.false_attribution_rate
    nearest, attributed = calibration.names[best], None
    if floor > rate + 1e-12:
        verdict = UNASSESSABLE
        reason = (
            f"false_attribution_rate {rate:g} is below {floor:.3g}, the least that the negatives can show for a set"
        )
    elif p_value > rate + 1e-12:
        verdict, reason = UNKNOWN, f"nearest is {nearest}, but sets of other origin score as high (p {p_value:.3g})"
    elif not kept:
        verdict = UNKNOWN
        reason = f"nearest is {nearest}, but its own references are more like each other (p {own[best]:.3g})"
    else:
        verdict, attributed = (KNOWN if len(kept) == 1 else FAMILY), FAMILY_SEPARATOR.join(kept)
        reason = None if len(kept) == 1 else "this set does not tell these generators apart"
    return SetVerdict(
        name=name,
        num_images=len(vectors),
        num_distinct=len(distinct),
        verdict=verdict,
        generator=attributed,
        nearest=nearest,
        score=float(means[best]),
        margin=float(means[best] - others.max()) if len(others) else None,
        p_value=p_value,
        own_p_value=own[best],
        floor=floor,
        reason=reason,
    )


def _distinct(vectors: np.ndarray) -> np.ndarray:
    """int64: the first of all images that show one picture, in their order."""
    kept: list[int] = []
    for i, vector in enumerate(vectors):
        if not kept or (vectors[kept] @ vector).max() <= COPY_COSINE:
            kept.append(i)
    return np.array(kept)


def _strata(scores: np.ndarray, calibration: Calibration) -> list[SetStratum]:
    """scores: float32 [m, galleries, G]."""
    chosen = gallery_of(scores)
    found = []
    for gallery in np.unique(chosen).tolist():
        mine = scores[chosen == gallery, gallery].astype(np.float64)
        negatives, image = _negatives_in(gallery, calibration)
        found.append(
            SetStratum(
                gallery=gallery,
                own=standing_out(mine, calibration.family),
                others=standing_out(negatives, calibration.family),
                scores=mine,
                origin=calibration.origins[image],
                source=calibration.source[image],
            )
        )
    return found


def standing_out(scores: np.ndarray, family: np.ndarray) -> np.ndarray:
    """float64 [m, G]: scores [m, G] above the mean over families of each row's mean for a family, nan left out; of one family, the scores."""
    heads = np.unique(family)
    if len(heads) == 1:
        return scores
    present = ~np.isnan(scores)
    of_family = (family[:, None] == heads[None, :]).astype(np.float64)
    counts = present @ of_family
    means = np.where(present, scores, 0.0) @ of_family / np.maximum(counts, 1)
    return scores - means.sum(axis=1, keepdims=True) / np.maximum((counts > 0).sum(axis=1, keepdims=True), 1)


def _negatives_in(gallery: int, calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [k, G] and places int64 [k] of the negatives that come to a gallery, each once; of an origin of which too few come to compare
    a set with, all, degraded as the gallery is: they score lower there, but a set of such images would not have come either."""
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
    """The p-value of the highest mean and the least that it could be; 1 and 1 where nothing generated is among the negatives, or a gallery has
    none of an origin."""
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
            least = _least_permutation_p(num_images, sum(int(mask.sum()) for mask in masks), count)
        else:
            ids = np.unique(np.concatenate([stratum.source[mask] for stratum, mask in zip(strata, masks)]))
            sources = [[_of_source(stratum, mask, source) for stratum, mask in zip(strata, masks)] for source in ids]
            p_value = source_p_value([stratum.own for stratum in strata], sources, count, generator)
            least = 1 / (len(ids) + 1)
        largest, floor = max(largest, p_value), max(floor, least)
    return largest, floor


def _of_source(stratum: SetStratum, mask: np.ndarray, source: int) -> np.ndarray:
    """float64 [n, G]: how far a source's images stand out in a gallery; all that are compared, where it has none there."""
    mine = mask & (stratum.source == source)
    return stratum.others[mine if mine.any() else mask]


def _against_own(
    strata: list[SetStratum],
    best: int,
    calibration: Calibration,
    settings: PrevalenceSettings,
    generator: np.random.Generator,
) -> float:
    """Whether a set's scores are lower than those of the generator's references in the same galleries, left out in turn."""
    own = [calibration.own_scores(stratum.gallery, best)[:, None] for stratum in strata]
    pools = [(-stratum.scores[:, best : best + 1], -values) for stratum, values in zip(strata, own)]
    return permutation_p_value(pools, settings.num_permutations, generator)


def _least_permutation_p(num_own: int, num_others: int, num_permutations: int) -> float:
    """Of a set that is higher than every other: drawing itself again counts against it."""
    ways = 1.0
    for i in range(num_own):
        ways *= (num_others + num_own - i) / (num_own - i)
        if ways > 1e12:
            break
    return 1 / (1 + num_permutations) + num_permutations / (1 + num_permutations) / ways


def describe_sets(verdicts: Sequence[SetVerdict]) -> dict[str, int]:
    """Number of sets by verdict."""
    kinds = (KNOWN, FAMILY, UNKNOWN, UNASSESSABLE)
    return {kind: sum(verdict.verdict == kind for verdict in verdicts) for kind in kinds}
