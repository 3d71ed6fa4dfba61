"""Scores of queries in each gallery, leave-one-out scores of the references, and families of generators.

A gallery holds the references of all generators under one degradation. The degradation of a query is unknown, so it is
scored in the galleries of a small grid of degradations, and the highest score decides gallery and generator.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

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
        return self._fitted()

    def _fitted(self, without: int = -1) -> list[tuple[list[int], Scorer | None]]:
        """(generators with references, their scorer) per gallery. without: index of the reference to leave out."""
        fitted = []
        for gallery in range(self.num_degradations):
            rows = {}
            for g, group in enumerate(self.references):
                kept = np.isfinite(group[gallery]).all(axis=1) & (np.arange(group.shape[1]) != without)
                if kept.any():
                    rows[g] = group[gallery][kept]
            fitted.append((list(rows), self.method.fit(list(rows.values())) if rows else None))
        return fitted

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Leave-one-out scores float32 [degradations, R, galleries, G] of the references; their generators int64 [R].

        A reference is left out of all galleries, and the i-th references of all generators at the same time. nan where
        the image is too small once degraded.
        """
        owner, rows, found = self._flat()
        place = np.concatenate([np.arange(group.shape[1]) for group in self.references])
        for left_out in range(place.max() + 1):
            _fill(found, rows, np.flatnonzero(place == left_out), self._fitted(left_out))
        return found, owner

    def as_unregistered(self, family: np.ndarray) -> np.ndarray:
        """float32 [degradations, R, galleries, G]: scores of each reference as if its family were not registered.

        Columns of its family are nan. family: int64 [G].
        """
        owner, rows, found = self._flat()
        for label in np.unique(family):
            others = np.flatnonzero(family != label)
            without = Galleries(self.method, [self.references[g] for g in others])
            if len(others):
                fitted = [(others[there].tolist(), scorer) for there, scorer in without._scorers]
                _fill(found, rows, np.flatnonzero(family[owner] == label), fitted)
        return found

    def _flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Generators int64 [R] of all references, their rows float32 [degradations, R, d], and scores of nan."""
        owner = np.repeat(np.arange(len(self.references)), [group.shape[1] for group in self.references])
        rows = np.concatenate(self.references, axis=1)
        shape = (*rows.shape[:2], self.num_degradations, len(self.references))
        return owner, rows, np.full(shape, np.nan, np.float32)


def _fill(found: np.ndarray, rows: np.ndarray, at: np.ndarray, fitted: list[tuple[list[int], Scorer | None]]) -> None:
    """Write the scores of the rows with indices `at` into found [degradations, R, galleries, G]; skip rows of nan."""
    for gallery, (columns, scorer) in enumerate(fitted):
        for of_degradation, scores in zip(rows, found[:, :, gallery]):
            mine = at[np.isfinite(of_degradation[at]).all(axis=1)]
            if scorer and len(mine):
                scores[np.ix_(mine, columns)] = scorer(of_degradation[mine])


def compare(left_out: np.ndarray, owner: np.ndarray, a: int, b: int, accuracy: float) -> tuple[float, float]:
    """Share of the references of generators a and b that score higher for their own generator, and its p-value.

    left_out: float [R, G], leave-one-out scores in one gallery; ties count as wrong. The p-value is the probability of
    a share at least as high if each reference is right with the given accuracy.
    """
    of_a, of_b = left_out[owner == a], left_out[owner == b]
    num_right = int(np.count_nonzero(of_a[:, a] > of_a[:, b]) + np.count_nonzero(of_b[:, b] > of_b[:, a]))
    num_images = len(of_a) + len(of_b)
    return num_right / num_images, float(stats.binom.sf(num_right - 1, num_images, accuracy))


def families(left_out: np.ndarray, owner: np.ndarray, accuracy: float, level: float) -> np.ndarray:
    """int64 [G]: family of each generator, the index of its first one.

    Generators that `compare` does not tell apart at `level`, directly or through others, are one family.
    """
    label = np.arange(left_out.shape[1])
    for a, b in combinations(range(len(label)), 2):
        if compare(left_out, owner, a, b, accuracy)[1] > level:
            joined = (label == label[a]) | (label == label[b])
            label[joined] = label[joined].min()
    return label
