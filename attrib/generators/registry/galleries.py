"""Scores against references under each degradation, leave-one-out scores of the references, and generator families.

The degradation of a query is unknown. Each generator keeps its references under every degradation of a small grid (a
gallery per degradation), and a query is scored against all of them: the highest score gives gallery and generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from attrib.generators.fingerprints.base import Method
from attrib.generators.fingerprints.scoring import Scorer


@dataclass(frozen=True, eq=False)
class Galleries:
    """References of each generator, float32 [degradations, r_g, d], nan where an image is too small once degraded."""

    method: Method
    references: list[np.ndarray]

    @property
    def num_degradations(self) -> int:
        return self.references[0].shape[0]

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """float32 [n, galleries, G]: scores of the queries; nan where a generator has no reference in a gallery."""
        found = np.full((len(queries), self.num_degradations, len(self.references)), np.nan, np.float32)
        for gallery, (there, scorer) in enumerate(self._scorers):
            if there:
                found[:, gallery, there] = scorer(queries)
        return found

    @cached_property
    def _scorers(self) -> list[tuple[list[int], Scorer | None]]:
        return [self._fitted(gallery) for gallery in range(self.num_degradations)]

    def _fitted(self, gallery: int, without: int | None = None) -> tuple[list[int], Scorer | None]:
        """Generators with references in a gallery, and their scorer. without: index of the reference to leave out of
        each
        generator.
        """
        rows = [_present(group[gallery], without) for group in self.references]
        there = [g for g, group in enumerate(rows) if len(group)]
        return there, self.method.fit([rows[g] for g in there]) if there else None

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Leave-one-out scores of the references, float32 [degradations, R, galleries, G], and their generators, int64
        [R].

        A reference under every degradation is scored without it in any gallery; nan where it is too small once
        degraded. The i-th references of all generators are left out together.
        """
        owner, place, rows = self._flat()
        found = np.full((*rows.shape[:2], self.num_degradations, len(self.references)), np.nan, np.float32)
        for left_out in range(place.max() + 1):
            at = np.flatnonzero(place == left_out)
            for gallery in range(self.num_degradations):
                there, scorer = self._fitted(gallery, left_out)
                if there:
                    _fill(found[:, :, gallery], rows, at, there, scorer)
        return found, owner

    def as_unregistered(self, family: np.ndarray) -> np.ndarray:
        """float32 [degradations, R, galleries, G]: scores of each reference without its family, whose columns are nan.

        This is what an image of an unregistered generator gets. family: int64 [G].
        """
        owner, _, rows = self._flat()
        found = np.full((*rows.shape[:2], self.num_degradations, len(self.references)), np.nan, np.float32)
        for label in np.unique(family):
            others = np.flatnonzero(family != label)
            if not len(others):
                continue
            without = Galleries(self.method, [self.references[g] for g in others])
            at = np.flatnonzero(family[owner] == label)
            for gallery, (there, scorer) in enumerate(without._scorers):
                if there:
                    _fill(found[:, :, gallery], rows, at, others[there], scorer)
        return found

    def _flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [R] generator of each reference; int64 [R] its index there; float32 [degradations, R, d] all
        references.
        """
        sizes = [group.shape[1] for group in self.references]
        place = np.concatenate([np.arange(size) for size in sizes])
        return np.repeat(np.arange(len(sizes)), sizes), place, np.concatenate(self.references, axis=1)


def _fill(
    found: np.ndarray, rows: np.ndarray, at: np.ndarray, columns: Sequence[int] | np.ndarray, scorer: Scorer
) -> None:
    """Scores of rows float32 [degradations, R, d] at these places, written into found [degradations, R, G]; nan rows
    are
    skipped.
    """
    for of_degradation, scores in zip(rows, found):
        mine = at[np.isfinite(of_degradation[at]).all(axis=1)]
        if len(mine):
            scores[np.ix_(mine, columns)] = scorer(of_degradation[mine])


def _present(rows: np.ndarray, without: int | None) -> np.ndarray:
    kept = np.isfinite(rows).all(axis=1)
    if without is not None and without < len(rows):
        kept[without] = False
    return rows[kept]


@dataclass(frozen=True)
class Pair:
    """Leave-one-out comparison of two generators.

    num_right: of num_images references, those that score higher for their own generator. p_value: probability of at
    least that many if each is right with the given accuracy.
    """

    num_right: int
    num_images: int
    p_value: float


def compare(left_out: np.ndarray, owner: np.ndarray, a: int, b: int, accuracy: float) -> Pair:
    """Comparison of generators a and b. left_out: float [R, G], `Galleries.leave_one_out` in one gallery. Ties count as
    wrong.
    """
    right = np.concatenate(
        [left_out[owner == own, own] > left_out[owner == own, other] for own, other in ((a, b), (b, a))]
    )
    num_right = int(np.count_nonzero(right))
    return Pair(num_right, len(right), float(stats.binom.sf(num_right - 1, len(right), accuracy)))


def families(left_out: np.ndarray, owner: np.ndarray, accuracy: float, level: float) -> np.ndarray:
    """int64 [G]: family label of each generator, the index of the family's first generator.

    Generators that `compare` does not tell apart at `level` are one family, also through a chain of others.
    """
    num_generators = left_out.shape[1]
    label = np.arange(num_generators)
    for a in range(num_generators):
        for b in range(a + 1, num_generators):
            if compare(left_out, owner, a, b, accuracy).p_value > level:
                joined = (label == label[a]) | (label == label[b])
                label[joined] = label[joined].min()
    return label
