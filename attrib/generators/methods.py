"""What every way to tell generators apart has in common: images to vectors, and references of some generators to scores of a query."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from attrib.errors import AttribError
from attrib.generators.samples import Sample

References = Sequence[np.ndarray]  # float32 [r_g, d] of each generator, unit rows
Scores = Callable[[References, np.ndarray], np.ndarray]


class Method(ABC):
    """A fingerprint method. Nothing in it is trained on the generators that it is asked about: their references come with each question.

    name: of the method, unique in a table. digest: of all that decides a vector; methods with one digest embed alike, and vectors of
    different digests must not be compared. looks_at_trace: False for the controls of leaks, which are never shipped. min_side_px: of the
    smallest image that it can embed.
    """

    name: str
    digest: str
    looks_at_trace: bool = True
    min_side_px: int = 1

    @abstractmethod
    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [n, d], rows of length one, each independent of the others. Raises AttribError for an image below min_side_px."""

    def scores(self, references: References, queries: np.ndarray) -> np.ndarray:
        """float32 [n, G] from unit rows float32 [n, d]: the higher, the more is a query like generator g."""
        return mean_cosine(references, queries)


class Rescored(Method):
    """The vectors of one method with another way to score them."""

    def __init__(self, method: Method, name: str, scores: Scores):
        self.name, self.method, self._scores = name, method, scores
        self.digest, self.looks_at_trace, self.min_side_px = method.digest, method.looks_at_trace, method.min_side_px

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        return self.method.embed(samples)

    def scores(self, references: References, queries: np.ndarray) -> np.ndarray:
        return self._scores(references, queries)


def mean_cosine(references: References, queries: np.ndarray) -> np.ndarray:
    """float32 [n, G]: cosine with the mean of each generator's references."""
    check_references(references)
    means = np.stack([rows.mean(axis=0, dtype=np.float64) for rows in references])
    return (queries.astype(np.float64) @ unit_or_zero(means).T).astype(np.float32)


def max_cosine(references: References, queries: np.ndarray) -> np.ndarray:
    """float32 [n, G]: cosine with the nearest of each generator's references."""
    check_references(references)
    return np.stack([(queries @ rows.T).max(axis=1) for rows in references], axis=1)


def nearest_neighbours(num_neighbours: int) -> Scores:
    """Scores float32 [n, G]: how much of a query's nearest references, each weighted by its similarity, is of each generator.

    A neighbour weighs (1 + cosine) / 2, so that a query far from all references scores low everywhere. Ties in rank go to the earlier
    reference.
    """

    def scores(references: References, queries: np.ndarray) -> np.ndarray:
        check_references(references)
        rows = np.concatenate(references)
        owner = np.repeat(np.arange(len(references)), [len(group) for group in references])
        k = min(num_neighbours, len(rows))
        similarity = queries @ rows.T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        weights = (1 + np.take_along_axis(similarity, nearest, axis=1)) / 2
        found = np.zeros((len(queries), len(references)), np.float32)
        np.add.at(found, (np.arange(len(queries))[:, None], owner[nearest]), weights / k)
        return found

    return scores


def check_references(references: References) -> None:
    """Raises AttribError if there is no generator, or one without references."""
    empty = [position for position, rows in enumerate(references) if len(rows) == 0]
    if not len(references) or empty:
        which = f"generator {empty[0]} has no references" if empty else "there are no generators"
        raise AttribError(f"{which}; register each with 10 images or more")


def check_sides(samples: Sequence[Sample], method: Method) -> None:
    """Raises AttribError that names the first image below the method's min_side_px."""
    small = next((sample for sample in samples if sample.side_px < method.min_side_px), None)
    if small is not None:
        height, width = small.image.shape[1:]
        raise AttribError(
            f"an image of {width}x{height} pixels is too small for {method.name}, which needs {method.min_side_px} on its shorter side; "
            "leave it out (its verdict is unassessable)"
        )


def unit_or_zero(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, in the given type; a row of zeros, which has no direction, stays zero and is like nothing."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
