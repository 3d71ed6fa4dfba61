"""Interface of all fingerprint methods: images to vectors, references to scores of a query."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from attrib.common.errors import AttribError
from attrib.generators.fingerprints.scoring import (
    References,
    Scorer,
    Scoring,
    adapted_cosine,
    logistic_scores,
    max_cosine,
    mean_cosine,
    nearest_neighbours,
)
from attrib.generators.settings import ScoringName
from attrib.generators.signals.samples import Sample

SCORINGS: dict[ScoringName, Scoring] = {
    "cosine": mean_cosine,
    "nearest": max_cosine,
    "adapted": adapted_cosine,
    "knn": nearest_neighbours(5),
    "logistic": logistic_scores(1.0),  # of features of unit variance in the mean
}


class Method(ABC):
    """A fingerprint method. It is not trained on the generators to identify: their references come with each query.

    name: unique in a table. digest: of all that decides a vector; vectors of different digests must not be compared.
    looks_at_trace: False for leak controls, which are never shipped. needs_colour: whether grey images are refused.
    """

    name: str
    digest: str
    looks_at_trace: bool = True
    min_side_px: int = 1
    needs_colour: bool = False
    scoring: ScoringName = "cosine"

    @property
    def registered_as(self) -> str | None:
        """The registry's `method` that gives these scores, as a config names it; None for controls."""
        return f"name: {self.name}, scoring: {self.scoring}" if self.looks_at_trace else None

    @abstractmethod
    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [n, d], unit rows, each independent of the others. Raises AttribError below min_side_px."""

    def fit(self, references: References) -> Scorer:
        """The scorer of these references. Raises AttribError without generators, or for one without references."""
        return SCORINGS[self.scoring](references)

    def scores(self, references: References, queries: np.ndarray) -> np.ndarray:
        """float32 [n, G] from unit rows float32 [n, d]; higher means more like generator g."""
        return self.fit(references)(queries)


class Rescored(Method):
    """The vectors of one method with another scoring."""

    registered_as = None

    def __init__(self, method: Method, name: str, scoring: Scoring):
        self.name, self.method, self._scoring = name, method, scoring
        self.digest, self.looks_at_trace, self.min_side_px = method.digest, method.looks_at_trace, method.min_side_px
        self.needs_colour = method.needs_colour

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        return self.method.embed(samples)

    def fit(self, references: References) -> Scorer:
        return self._scoring(references)


def asked(method: Method, scoring: ScoringName | None) -> Method:
    """The method with one of the scorings, named after both unless it is the method's own (None)."""
    if scoring in (None, method.scoring):
        return method
    found = Rescored(method, f"{method.name}-{scoring}", SCORINGS[scoring])
    found.registered_as = f"name: {method.name}, scoring: {scoring}" if method.looks_at_trace else None
    return found


def check_sides(samples: Sequence[Sample], method: Method) -> None:
    """Raises AttribError that names the first image below the method's min_side_px."""
    small = next((sample for sample in samples if sample.side_px < method.min_side_px), None)
    if small is not None:
        height, width = small.image.shape[1:]
        raise AttribError(
            f"an image of {width}x{height} pixels is too small for {method.name}, which needs {method.min_side_px} on "
            "the shorter side; leave it out"
        )
