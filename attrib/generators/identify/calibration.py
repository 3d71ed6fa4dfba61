"""Background cohort and z-norm: p-values for open-set identification.

The hypothesis that is tested is "no registered generator made this image". Its p-value is computed against the
background cohort (the negatives) of each origin, and the largest one counts, so it holds for every origin. Photographs
never stand in for generated images, because they resemble a generator less. With `unit: image`, synthetic models are an
origin of their own, because they are many and would outweigh the few other generators, which resemble each other more.
With `unit: source`, a new source is one of all sources that generated. Without generated negatives nothing is
attributed.

The degradation of the query is unknown. The query is assigned to the gallery of its highest score, and

    p = (m + #{(negative, degradation): same gallery, z-norm score >= that of the query}) / (n + 1)

(conformal p-value, Vovk et al., Algorithmic Learning in a Random World, 2005). m is the mean number of degradations
under which a negative that is assigned to the gallery is assigned to it, since the query would be, too. (The maximum in
place of the mean would make the rate certain and needs up to twice as many negatives; in simulations the mean holds the
rate.) Each of the D galleries gets the share 1 / D of the rate, so the rate holds for an image whose degradation is
drawn from the grid. Negatives that are never assigned to a gallery count in n.

The z-norm score is (score - mean) / deviation over the negatives in the gallery (Auckenthaler, Carey and Lloyd-Thomas,
Digital Signal Processing 10, 2000), minus the number of deviations by which the score lies below the mean of the
generator's own references. Thus a generator that many images resemble needs a higher score. The deviation of few
references is pooled with that of all generators. Mean and deviation of the negatives include the query itself, because
exact p-values need the same treatment for it and for them.

Negatives are the registered ones and the references of each generator, scored without the generator and its family, as
images of an unregistered generator are. Such a reference has fewer generators to resemble, so it is weighted by the
number of generators in the gallery over the number of those that scored it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from attrib.common.storage import Storage
from attrib.generators.fingerprints.base import Method
from attrib.generators.identify.conformal import conformal_p_values
from attrib.generators.registry.galleries import Galleries, families
from attrib.generators.registry.registry import Registry
from attrib.generators.registry.settings import Role, VerdictSettings

SMALLEST_DEVIATION = 1e-6  # of scores


@dataclass(frozen=True, eq=False)
class Stratum:
    """Scores of the negatives assigned to one gallery, one row per (negative, degradation).

    scores: float64 [k, G], nan where the generator or its family made the negative. image: int64 [k], index of the
    negative. factor: float64 [k], generators in the gallery over generators with a score for the negative. itself: mean
    number of rows of the negatives in it, 1 if there are none.
    """

    scores: np.ndarray
    image: np.ndarray
    factor: np.ndarray
    itself: float


def best_of(scores: np.ndarray) -> np.ndarray:
    """int64 [m]: column of the highest score in each row of [m, G]; nan is ignored, ties go to the first."""
    return np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1)


def gallery_of(scores: np.ndarray) -> np.ndarray:
    """int64 [...]: gallery of the highest score in [..., D, G], ties to the first; -1 without any score."""
    filled = np.where(np.isnan(scores), -np.inf, scores).max(axis=-1)
    return np.where(np.isinf(filled).all(axis=-1), -1, filled.argmax(axis=-1))


def first_in(chosen: np.ndarray, gallery: int) -> np.ndarray:
    """int64 [n]: a degradation under which the image is assigned to this gallery, preferably the gallery's own; -1 for
    none.

    chosen: int64 [D, n], the gallery of each image under each degradation.
    """
    here = chosen == gallery
    return np.where(here[gallery], gallery, np.where(here.any(axis=0), here.argmax(axis=0), -1))


def standing(
    scores: np.ndarray, mean: np.ndarray, deviation: np.ndarray, own: np.ndarray, own_deviation: np.ndarray
) -> np.ndarray:
    """z-norm scores: deviations above the negatives' mean, minus deviations below the mean `own` of the generator's
    references.

    nan where `own` is nan, because no reference can be left out. Smaller deviations count as SMALLEST_DEVIATION: below
    it scores differ by rounding only.
    """
    above = (scores - mean) / np.maximum(deviation, SMALLEST_DEVIATION)
    below = np.maximum(0.0, own - scores) / np.maximum(own_deviation, SMALLEST_DEVIATION)
    return above - below


KINDS = ("photographs", "generators", "synthetic")
KIND_OF = {"generator": 1, "other-generator": 1, "photographs": 0, "synthetic": 2}
ORIGINS = (
    "photographs",
    "generated images",
    "synthetic images",
)  # of negatives; each origin is a null distribution of its own
PHOTOGRAPHS, GENERATED = 0, 1
CHUNK_ROWS = 64  # queries that are compared with all negatives at a time
PRIOR_REFERENCES = 5.0  # weight of the deviation over all generators, in references, when pooled with a generator's own
SMALLEST_WEIGHT = 1e-6  # avoids a division by zero where no negative has a score


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of the background cohort and leave-one-out scores of the references.

    names: of the G generators. family: int64 [G], equal for the generators of one family. negatives: float32 [D, n, D,
    G] by degradation, image, gallery and generator; nan for an image that is too small once degraded, and for the
    generator that made it and its family. kind, source: int64 [n]; the source of a generator's reference is its family,
    a label that no other kind uses. own: float32 [D, R, D, G], leave-one-out scores of the references. owner: int64
    [R], their generators.
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
        return self._counts(np.arange(len(self.kind))) if self.settings.unit == "image" else self.num_sources

    @cached_property
    def num_sources(self) -> dict[str, int]:
        """{kind: number of sources (families, photographs, models of a pool)}. Images of one source are dependent."""
        return self._counts(self.source)

    def _counts(self, ids: np.ndarray) -> dict[str, int]:
        counts = {name: len(np.unique(ids[self.kind == kind])) for kind, name in enumerate(KINDS)}
        return {name: count for name, count in counts.items() if count}

    @cached_property
    def weights(self) -> np.ndarray:
        """float64 [n]: weight of each negative; with `unit: source` the weights of one source sum to 1."""
        if self.settings.unit == "image" or not len(self.source):
            return np.ones(len(self.source))
        return 1.0 / np.bincount(self.source)[self.source]

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
        """float64 [D]: smallest possible p-value in each gallery, by the smallest origin; 1 without generated
        negatives.

        Photographs may be missing: the rate is then not promised for them.
        """
        units = self.origin_units
        fewest = units[units > 0].min() if self.is_generated else 0.0
        return np.array([min(1.0, stratum.itself / (fewest + 1)) for stratum in self.strata])

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
            itself = float(np.bincount(image)[image].mean()) if len(image) else 1.0
            found.append(Stratum(scores, image, factor, itself))
        return found

    @cached_property
    def own_scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float64 [D, G], of the leave-one-out scores of a generator's references in the
        gallery of their own degradation; the mean is nan without references.
        """
        shape = len(self.degradations), len(self.names)
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
        every = range(len(self.degradations)), range(len(self.names))
        return np.array([[1 / (1 + len(self.own_scores(gallery, g))) for g in every[1]] for gallery in every[0]])

    def without(self, label: int) -> tuple["Calibration", np.ndarray]:
        """The calibration without one family, and the scores of that family's references in it, float32 [D, r, D,
        generators left].

        Other negatives keep the scores that they got with the family registered.
        """
        left, mine = self.family != label, (self.kind == KIND_OF["generator"]) & (self.source == label)
        kept, negatives = left[self.owner], self.negatives[..., left]
        usable = ~mine & ~np.isnan(negatives).all(axis=(0, 2, 3))
        rest = replace(
            self,
            names=[name for name, stays in zip(self.names, left) if stays],
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

        exclude: int64 [m], for rows that are negatives: their own index. It, or with `unit: source` its whole source,
        is left out.
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
            ids = np.arange(len(self.kind)) if self.settings.unit == "image" else self.source
            weights = weights * (ids[None, :] != ids[exclude][:, None])
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
        observed = standing(scores[at, best], mean[at, best], deviation[at, best], own_mean[best], own_deviation[best])
        values = filled[np.arange(len(top)), top]
        values = standing(values, mean[:, top], deviation[:, top], own_mean[top], own_deviation[top])
        largest = np.zeros(len(scores))
        for one in np.flatnonzero(self.origin_units):
            mine = self.origins[stratum.image] == one
            total = weights[:, self.origins == one].sum(axis=1)
            reached = kept[:, mine] * stratum.factor[mine]
            p_value = conformal_p_values(values[:, mine], reached, observed, total, stratum.itself)
            largest = np.maximum(largest, p_value)
        return np.where(np.isfinite(observed), largest, 1.0)  # without a z-norm score nothing is attributed

    def own_p_values(
        self, scores: np.ndarray, gallery: np.ndarray, generator: np.ndarray, exclude: np.ndarray | None = None
    ) -> np.ndarray:
        """float64 [m]: p-value of a score [m] among the leave-one-out scores of the generator's own references in the
        gallery.

        Small values mean that the image is unlike the references: (1 + references with a score as low) / (references +
        1). The image was assigned to its best gallery and the references were not, so fewer own images get small values
        than stated. exclude: int64 [m], for rows that are references: their own index.
        """
        found = np.ones(len(scores))
        for one, g in {(int(a), int(b)) for a, b in zip(gallery, generator)}:
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
    """Images that are never attributed.

    rows: float32 [D, n, d], nan where an image is too small once degraded. source_sizes: images of each source, in
    order.
    """

    rows: np.ndarray
    role: Role
    source_sizes: Sequence[int]


def calibrate(
    registry: Registry, method: Method, settings: VerdictSettings, storage: Storage
) -> tuple[Galleries, Calibration]:
    """Galleries and calibration of a registry with at least one generator. Raises MismatchError for another method."""
    registry.check_method(method)
    galleries = Galleries(method, [registry.read(entry, storage) for entry in registry.generators])
    negatives = [
        Negatives(registry.read(entry, storage), entry.role, entry.source_sizes) for entry in registry.negatives
    ]
    names = [entry.name for entry in registry.generators]
    return galleries, calibrated(galleries, names, negatives, registry.degradations, settings)


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
    return Calibration(
        names=names,
        degradations=degradations,
        family=family,
        negatives=found[:, usable],
        kind=kind[usable],
        source=source[usable],
        own=own,
        owner=owner,
        settings=settings,
    )
