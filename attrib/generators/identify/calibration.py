"""P-values for open-set identification, from z-norm scores of a background cohort.

The null hypothesis is "no registered generator made this image". The background cohort (the negatives) has three
origins: photographs, other generators and synthetic models. There is one p-value per origin, and the largest one is
used, so that the error rate holds for every origin. A common p-value would be too small for images of other generators:
photographs resemble a generator less than generated images do, and there are many more synthetic models than other
generators. With `unit: source`, all sources of generated images are one origin. Without generated negatives nothing is
attributed.

The degradation of a query is unknown. The query is assigned to the gallery of its highest score, and

    p = (m + #{(negative, degradation): same gallery, z-norm score >= that of the query}) / (n + 1)

(conformal p-value, Vovk et al., Algorithmic Learning in a Random World, 2005). n is the number of negatives. A negative
can be assigned to the same gallery under several degradations, and so could the query; m is the mean number of such
degradations over the negatives in the gallery. With the maximum in place of the mean, the rate would be guaranteed, but
up to twice as many negatives would be needed; in simulations the rate holds with the mean. It holds for an image whose
degradation is drawn from the grid.

The z-norm score is (score - mean) / deviation over the negatives in the gallery (Auckenthaler, Carey and Lloyd-Thomas,
Digital Signal Processing 10, 2000). So a generator that many images resemble needs a higher score. A second term is
subtracted: the number of deviations by which the score is below the mean score of the generator's own references. Mean
and deviation over the negatives include the query, because a conformal p-value is exact only if the query and the
negatives are treated in the same way.

The references of each generator are negatives, too. They are scored as if the generator and its family were not
registered. As fewer generators could give them a high score, they get a weight: the number of generators in the gallery
divided by the number of those that scored the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from attrib.generators.identify.conformal import conformal_p_values
from attrib.generators.registry.galleries import Galleries, families
from attrib.generators.registry.settings import Role, VerdictSettings

KINDS = ("photographs", "generators", "synthetic")
KIND_OF = {"generator": 1, "other-generator": 1, "photographs": 0, "synthetic": 2}
ORIGINS = ("photographs", "generated images", "synthetic images")  # each has its own null distribution
PHOTOGRAPHS, GENERATED = 0, 1
CHUNK_ROWS = 64  # queries that are compared with all negatives at a time
PRIOR_REFERENCES = 5.0  # a generator's deviation is pooled with that of all generators, which counts as this many
SMALLEST_DEVIATION = 1e-6  # of scores; below it they differ only by rounding
SMALLEST_WEIGHT = 1e-6  # avoids a division by zero where no negative has a score


@dataclass(frozen=True, eq=False)
class Stratum:
    """Scores of the negatives assigned to one gallery, one row per (negative, degradation).

    scores: float64 [k, G], nan for the negative's own family. image: int64 [k], index of the negative. factor: float64
    [k], number of generators in the gallery divided by the number of those with a score. rows_per_negative: the mean (m
    in the module docstring), 1 without rows.
    """

    scores: np.ndarray
    image: np.ndarray
    factor: np.ndarray
    rows_per_negative: float


def best_of(scores: np.ndarray) -> np.ndarray:
    """int64 [m]: column of the highest score in each row of [m, G]; nan is ignored, ties go to the first."""
    return np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1)


def gallery_of(scores: np.ndarray) -> np.ndarray:
    """int64 [...]: gallery of the highest score in [..., D, G], ties to the first; -1 without any score."""
    filled = np.where(np.isnan(scores), -np.inf, scores).max(axis=-1)
    return np.where(np.isinf(filled).all(axis=-1), -1, filled.argmax(axis=-1))


def first_in(chosen: np.ndarray, gallery: int) -> np.ndarray:
    """int64 [n]: a degradation under which the image is assigned to this gallery, -1 for none.

    It is the degradation of the gallery if possible, otherwise the first one.

    chosen: int64 [D, n], the gallery of each image under each degradation.
    """
    here = chosen == gallery
    return np.where(here[gallery], gallery, np.where(here.any(axis=0), here.argmax(axis=0), -1))


def z_norm(
    scores: np.ndarray, mean: np.ndarray, deviation: np.ndarray, own: np.ndarray, own_deviation: np.ndarray
) -> np.ndarray:
    """Number of deviations above the negatives' mean, minus the number below the mean of the generator's references.

    own: that mean. The result is nan where it is nan, because the generator then has no leave-one-out score.
    """
    above = (scores - mean) / np.maximum(deviation, SMALLEST_DEVIATION)
    below = np.maximum(0.0, own - scores) / np.maximum(own_deviation, SMALLEST_DEVIATION)
    return above - below


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of the background cohort and leave-one-out scores of the references.

    family: int64 [G]. negatives: scores float32 [D, n, D, G] by degradation, image, gallery and generator; nan for an
    image that is too small once degraded, and for its own family. kind: int64 [n], index into KINDS. source: int64 [n];
    the source of a generator's reference is its family, a label that no other kind uses. own: leave-one-out scores of
    the references, float32 [D, R, D, G]. owner: int64 [R], the generators of the references.
    """

    names: list[str]
    degradations: tuple[str, ...]
    family: np.ndarray
    negatives: np.ndarray
    kind: np.ndarray
    source: np.ndarray
    own: np.ndarray
    owner: np.ndarray
    settings: VerdictSettings

    def units(self) -> dict[str, int]:
        """{kind: number of images, or of sources with `unit: source`}, without empty kinds."""
        counts = {name: len(np.unique(self.unit_ids[self.kind == kind])) for kind, name in enumerate(KINDS)}
        return {name: count for name, count in counts.items() if count}

    @property
    def unit_ids(self) -> np.ndarray:
        """int64 [n]: index of each negative, or its source with `unit: source`."""
        return np.arange(len(self.kind)) if self.settings.unit == "image" else self.source

    @cached_property
    def weights(self) -> np.ndarray:
        """float64 [n]: weight of each negative, 1; with `unit: source` the weights of one source add to 1."""
        return 1.0 / np.bincount(self.unit_ids)[self.unit_ids] if len(self.kind) else np.ones(0)

    @cached_property
    def origins(self) -> np.ndarray:
        """int64 [n]: index into ORIGINS; with `unit: source` synthetic images count as generated ones."""
        return self.kind if self.settings.unit == "image" else np.minimum(self.kind, GENERATED)

    @property
    def is_generated(self) -> bool:
        """Whether any negative was generated."""
        return bool(self.origin_units[GENERATED:].any())

    @cached_property
    def origin_units(self) -> np.ndarray:
        """float64 [3]: number of images, or of sources with `unit: source`, of each of ORIGINS."""
        return np.bincount(self.origins, self.weights, minlength=len(ORIGINS))

    @cached_property
    def floors(self) -> np.ndarray:
        """float64 [D]: smallest possible p-value in each gallery; 1 without generated negatives.

        The origin with the fewest negatives decides.
        """
        units = self.origin_units
        fewest = units[units > 0].min() if self.is_generated else 0.0
        return np.array([min(1.0, stratum.rows_per_negative / (fewest + 1)) for stratum in self.strata])

    @property
    def floor(self) -> float:
        """Smallest possible p-value over all galleries."""
        return float(self.floors.min())

    @cached_property
    def strata(self) -> list[Stratum]:
        """One stratum per gallery."""
        chosen, found = gallery_of(self.negatives), []
        for gallery in range(len(self.degradations)):
            degradation, image = np.nonzero(chosen == gallery)
            scores = self.negatives[degradation, image, gallery].astype(np.float64)
            present = ~np.isnan(scores)
            factor = present.any(axis=0).sum() / np.maximum(present.sum(axis=1), 1)
            rows_per_negative = float(np.bincount(image)[image].mean()) if len(image) else 1.0
            found.append(Stratum(scores, image, factor, rows_per_negative))
        return found

    @cached_property
    def own_scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float64 [D, G], of `own_scores`; the mean is nan without references."""
        shape = self.own_floors.shape
        means, squares, freedom = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape)
        for place in np.ndindex(shape):
            values = self.own_scores(*place)
            if len(values):
                means[place] = values.mean()
                squares[place], freedom[place] = np.square(values - means[place]).sum(), len(values) - 1
        of_all = squares.sum(axis=1, keepdims=True) / np.maximum(1, freedom.sum(axis=1, keepdims=True))
        return means, np.sqrt((squares + PRIOR_REFERENCES * of_all) / (freedom + PRIOR_REFERENCES))

    def own_scores(self, gallery: int, generator: int) -> np.ndarray:
        """float64 [r]: leave-one-out scores of a generator's references in the gallery of their own degradation."""
        values = self.own[gallery, self.owner == generator, gallery, generator].astype(np.float64)
        return values[~np.isnan(values)]

    @cached_property
    def own_floors(self) -> np.ndarray:
        """float64 [D, G]: smallest possible p-value against a generator's own references; 1 without references."""
        shape = len(self.degradations), len(self.names)
        return np.array([1 / (1 + len(self.own_scores(*place))) for place in np.ndindex(shape)]).reshape(shape)

    def without(self, label: int) -> tuple["Calibration", np.ndarray]:
        """The calibration without one family, and its scores of the family's references, float32 [D, r, D, G - size].

        Other negatives keep the scores that they had with the family registered.
        """
        left, mine = self.family != label, (self.kind == KIND_OF["generator"]) & (self.source == label)
        kept, negatives = left[self.owner], self.negatives[..., left]
        usable = ~mine & ~np.isnan(negatives).all(axis=(0, 2, 3))
        rest = replace(
            self,
            names=[self.names[g] for g in np.flatnonzero(left)],
            family=self.family[left],
            negatives=negatives[:, usable],
            kind=self.kind[usable],
            source=self.source[usable],
            own=self.own[:, kept][..., left],
            owner=(np.cumsum(left) - 1)[self.owner[kept]],
        )
        return rest, negatives[:, mine]

    def p_values(self, scores: np.ndarray, gallery: np.ndarray, exclude: np.ndarray | None = None) -> np.ndarray:
        """float64 [m]: p-value of the best generator of each row of scores [m, G] in its gallery, int64 [m].

        exclude: int64 [m], for rows that are negatives their indices. The negative, or with `unit: source` its source,
        is left out of the cohort.
        """
        found = np.ones(len(scores))
        for one in np.unique(gallery):
            rows = np.flatnonzero(gallery == one)
            for start in range(0, len(rows), CHUNK_ROWS):
                some = rows[start : start + CHUNK_ROWS]
                excluded = None if exclude is None else exclude[some]
                found[some] = self._p_values(scores[some].astype(np.float64), int(one), excluded)
        return found

    def _p_values(self, scores: np.ndarray, gallery: int, exclude: np.ndarray | None) -> np.ndarray:
        if not self.is_generated:
            return np.ones(len(scores))
        stratum = self.strata[gallery]
        weights = np.broadcast_to(self.weights, (len(scores), len(self.weights)))
        if exclude is not None:
            weights = weights * (self.unit_ids[None, :] != self.unit_ids[exclude][:, None])
        kept = weights[:, stratum.image]
        present = ~np.isnan(stratum.scores)
        filled = np.where(present, stratum.scores, 0.0)
        known = np.isfinite(scores)
        own = np.where(known, scores, 0.0)
        count = np.maximum(kept @ present + known, SMALLEST_WEIGHT)
        mean = (kept @ filled + own) / count
        deviation = np.sqrt(np.maximum(0.0, (kept @ filled**2 + own**2) / count - mean**2))
        own_mean, own_deviation = (of_gallery[gallery] for of_gallery in self.own_scales)
        at, best, top = np.arange(len(scores)), best_of(scores), best_of(stratum.scores)
        observed = z_norm(scores[at, best], mean[at, best], deviation[at, best], own_mean[best], own_deviation[best])
        values = filled[np.arange(len(top)), top]
        values = z_norm(values, mean[:, top], deviation[:, top], own_mean[top], own_deviation[top])
        largest = np.zeros(len(scores))
        for one in np.flatnonzero(self.origin_units):
            mine = self.origins[stratum.image] == one
            total = weights[:, self.origins == one].sum(axis=1)
            reached = kept[:, mine] * stratum.factor[mine]
            p_value = conformal_p_values(values[:, mine], reached, observed, total, stratum.rows_per_negative)
            largest = np.maximum(largest, p_value)
        return np.where(np.isfinite(observed), largest, 1.0)  # without a z-norm score nothing is attributed

    def own_p_values(
        self, scores: np.ndarray, gallery: np.ndarray, generator: np.ndarray, exclude: np.ndarray | None = None
    ) -> np.ndarray:
        """float64 [m]: p-value of each score [m] among the leave-one-out scores of the generator's references.

        It is (1 + number of references with a score at least as low) / (number of references + 1). The test is
        conservative, because the image has the score of its best gallery, and the references have the score of a given
        one. exclude: int64 [m], for rows that are references their indices, to leave them out.
        """
        found = np.ones(len(scores))
        for one, g in set(zip(gallery.tolist(), generator.tolist())):
            rows = np.flatnonzero((gallery == one) & (generator == g))
            places = np.flatnonzero(self.owner == g)
            values = self.own[one, places, one, g].astype(np.float64)
            places, values = places[~np.isnan(values)], values[~np.isnan(values)]
            weights = np.ones((len(rows), len(values)))
            if exclude is not None:
                weights[places[None, :] == exclude[rows][:, None]] = 0
            low = np.broadcast_to(-values, weights.shape)  # the test looks for low scores
            found[rows] = conformal_p_values(low, weights, -scores[rows].astype(np.float64))
        return found


@dataclass(frozen=True, eq=False)
class Negatives:
    """Images of the background cohort with one role.

    rows: fingerprints float32 [D, n, d], nan where an image is too small once degraded. source_sizes: number of images
    of each source, in order.
    """

    rows: np.ndarray
    role: Role
    source_sizes: Sequence[int]


def calibrated(
    galleries: Galleries,
    names: list[str],
    negatives: Sequence[Negatives],
    degradations: tuple[str, ...],
    settings: VerdictSettings,
) -> Calibration:
    """Calibration of generators whose references are in `galleries`, against the given negatives."""
    own, owner = galleries.leave_one_out()
    family = families(own[0, :, 0], owner, settings.family_accuracy, settings.family_level)
    scored = [galleries.as_unregistered(family)]
    kinds, sources = [np.full(len(owner), KIND_OF["generator"])], [family[owner]]
    num_sources = len(names)
    for given in negatives:
        scores = np.full((*given.rows.shape[:2], *own.shape[2:]), np.nan, np.float32)
        for degradation, queries in enumerate(given.rows):
            present = np.isfinite(queries).all(axis=1)
            if present.any():
                scores[degradation, present] = galleries.scores(queries[present])
        scored.append(scores)
        kinds.append(np.full(scores.shape[1], KIND_OF[given.role]))
        sources.append(num_sources + np.repeat(np.arange(len(given.source_sizes)), given.source_sizes))
        num_sources += len(given.source_sizes)
    found, kind, source = np.concatenate(scored, axis=1), np.concatenate(kinds), np.concatenate(sources)
    usable = ~np.isnan(found).all(axis=(0, 2, 3))
    kept = found[:, usable], kind[usable], source[usable]
    return Calibration(names, degradations, family, *kept, own, owner, settings)
