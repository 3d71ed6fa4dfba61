"""What verdicts are measured by: the scores of negatives and of the generators' own references, degraded in every way of the grid.

The claim that is tested is "some registered generator made this". An image that none made is a photograph, or some other generator made it;
a p-value is computed against the negatives of each origin, and the largest counts: it holds whichever it was. Photographs never stand for
generated images: they resemble a generator less, and a rate that holds for them says nothing of a generator that nobody registered. Nor do
synthetic models where images are the unit: they are so many that they would drown the few generators, which are more like each other. Where
sources are, a new source is one among all that generated, synthetic or not. Without generated negatives nothing can be attributed.

Nobody says how the image was degraded either. It goes to the gallery of its highest score, and its p-value is

    (m + how often negatives, under any degradation of the grid, come to that gallery and stand there as high) / (1 + negatives),

m being how often a negative that comes there does so under the degradations of the grid, in the mean over all that come: the image itself
would, too. (The most of any negative would make the rate certain, and asks for up to twice as many negatives; in simulations it holds with
the mean.) A gallery gets the share 1 / D of the rate, so that the rate holds for an image that is degraded in a way drawn from the grid; and
for each way alone, as far as images that are degraded alike go to one gallery. Negatives that never come to a gallery count as well as those
that score low there.

Where an image stands is by how many standard deviations its score for the generator lies above the mean of what the negatives in the gallery
score for it (the z-norm of speaker verification: Auckenthaler, Carey and Lloyd-Thomas, Digital Signal Processing 10, 2000), less by how many it
lies below the mean of what the generator's own references do. So a generator that everything resembles, or some things do, asks for more; one whose images vary asks
for less, but what is like such a generator stands no higher than an image of any other does; and what is unlike all negatives is not yet like a
generator. The deviation of few references counts together with that of all generators'. Mean and deviation of the negatives include the
image itself: it and they are treated alike, as exact p-values need (attrib/generators/identify/conformal.py).

Negatives are what was registered as such, and the references of each generator, scored without it and its family: images of a generator
that is not registered. Such a reference has fewer generators to be like than an image that none of them made; so it counts, where it stands
as high, for the generators in the gallery over those that it was scored by.
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


KINDS = ("photographs", "generators", "synthetic")
KIND_OF = {"generator": 1, "other-generator": 1, "photographs": 0, "synthetic": 2}
ORIGINS = ("photographs", "generated images", "synthetic images")  # of negatives, each a null of its own
PHOTOGRAPHS, GENERATED = 0, 1
CHUNK_ROWS = 64  # queries that are compared with all negatives at a time
PRIOR_REFERENCES = 5.0  # that the deviation over all generators weighs beside a generator's own
SMALLEST_WEIGHT = 1e-6  # of all that a mean is taken of, where there is nothing


@dataclass(frozen=True, eq=False)
class Calibration:
    """names, family: of the G generators; family: int64, a label that is the same for all generators of one.

    negatives: float32 [D, n, D, G], by degradation, image, gallery and generator, nan for an image too small once degraded, and where the
    generator, or its family, made it. kind, source: int64 [n]; the source of a registered generator's reference is its family's label, which
    no other kind of negative has. own: float32 [D, R, D, G], references left out in turn; owner: int64 [R], their generator.
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
        """Of each kind that there is: the number of images, or with unit "source" of sources."""
        return self._counts(np.arange(len(self.kind))) if self.settings.unit == "image" else self.num_sources

    @cached_property
    def num_sources(self) -> dict[str, int]:
        """Of each kind that there is: families, photographs, models of a pool. Images of one are not independent."""
        return self._counts(self.source)

    def _counts(self, ids: np.ndarray) -> dict[str, int]:
        counts = {name: len(np.unique(ids[self.kind == kind])) for kind, name in enumerate(KINDS)}
        return {name: count for name, count in counts.items() if count}

    @cached_property
    def weights(self) -> np.ndarray:
        """float64 [n]: what each negative counts for, so that the units of a kind sum to their number."""
        if self.settings.unit == "image" or not len(self.source):
            return np.ones(len(self.source))
        return 1.0 / np.bincount(self.source)[self.source]

    @cached_property
    def origins(self) -> np.ndarray:
        """int64 [n]: the place among ORIGINS of each negative; with unit "source" synthetic images are generated ones."""
        return self.kind if self.settings.unit == "image" else np.minimum(self.kind, GENERATED)

    @property
    def is_generated(self) -> bool:
        """Whether anything generated is among the negatives."""
        return bool(self.origin_units[GENERATED:].any())

    @cached_property
    def origin_units(self) -> np.ndarray:
        """float64 [3]: images, or with unit "source" sources, of each of ORIGINS."""
        return np.bincount(self.origins, self.weights, minlength=len(ORIGINS))

    @cached_property
    def floors(self) -> np.ndarray:
        """float64 [D]: the least p-value that an image can get in each gallery, of the origin with fewest units; 1 without generated negatives.

        Photographs may be missing: then the rate is not promised for them.
        """
        units = self.origin_units
        fewest = units[units > 0].min() if self.is_generated else 0.0
        return np.array([min(1.0, stratum.itself / (fewest + 1)) for stratum in self.strata])

    @property
    def floor(self) -> float:
        """The least p-value that an image can get in any gallery."""
        return float(self.floors.min())

    @cached_property
    def strata(self) -> list[Stratum]:
        """Of each gallery."""
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
        """Mean and standard deviation, float64 [D, G], of what a generator's references, left out in turn, score in the gallery degraded as they are;
        mean nan where it has none."""
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
        """float64 [r]: of a generator's references, left out in turn, in the gallery degraded as they are."""
        values = self.own[gallery, self.owner == generator, gallery, generator].astype(np.float64)
        return values[~np.isnan(values)]

    @cached_property
    def own_floors(self) -> np.ndarray:
        """float64 [D, G]: the least p-value that an image can get against a generator's own references in each gallery; 1 where there are none."""
        every = range(len(self.degradations)), range(len(self.names))
        return np.array([[1 / (1 + len(self.own_scores(gallery, g))) for g in every[1]] for gallery in every[0]])

    def without(self, label: int) -> tuple["Calibration", np.ndarray]:
        """As if a family were not registered; and how its references would then be scored: float32 [D, r, D, the generators left].

        Other negatives keep the scores that they got beside the family.
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
        """float64 [m]: of the best generator of each row of scores [m, G] in a gallery, int64 [m].

        exclude: int64 [m], for rows that are negatives themselves, their own place among them: it, or with unit "source" all of its source,
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
        return np.where(np.isfinite(observed), largest, 1.0)  # what cannot be placed never stands high

    def own_p_values(
        self, scores: np.ndarray, gallery: np.ndarray, generator: np.ndarray, exclude: np.ndarray | None = None
    ) -> np.ndarray:
        """float64 [m]: how usual a score [m] of a generator in a gallery is among the generator's own references there, left out in turn.

        Low: unlike them. (1 + references that score as low) / (references + 1). The image chose its best gallery and the references did not, so
        that fewer of a generator's own images come out low than is said. exclude: int64 [m], for rows that are references themselves, their place.
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
            low = np.broadcast_to(-values, weights.shape)  # low scores are what is looked for
            found[rows] = conformal_p_values(low, weights, -scores[rows].astype(np.float64))
        return found


@dataclass(frozen=True, eq=False)
class Negatives:
    """Images that are never attributed. rows: float32 [D, n, d], nan where one is too small once degraded; source_sizes: images of each source,
    in order."""

    rows: np.ndarray
    role: Role
    source_sizes: Sequence[int]


def calibrate(
    registry: Registry, method: Method, settings: VerdictSettings, storage: Storage
) -> tuple[Galleries, Calibration]:
    """Raises MismatchError if the registry was made by another method. The registry has one generator or more."""
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
    """Of generators with their references in galleries, by degradation, beside what serves as negatives."""
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
