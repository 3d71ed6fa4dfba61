"""Interface of all fingerprint methods: embed images as vectors, and score queries against references."""

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
    "logistic": logistic_scores(1.0),  # for features that are scaled to a mean variance of one
}


class Method(ABC):
    """A fingerprint method. It is not trained on the generators to identify, but gets their references when it scores.

    name: unique in a results table. digest: of everything that determines a vector; vectors of different digests must
    not be compared. looks_at_trace: False for leak controls (attrib/generators/signals/samples.py), which cannot be
    registered. needs_colour: whether grey images are refused.
    """

    name: str
    digest: str
    looks_at_trace: bool = True
    min_side_px: int = 1
    needs_colour: bool = False
    scoring: ScoringName = "cosine"

    @property
    def registered_as(self) -> str | None:
        """The registry's option `method` that gives these scores, as text; None if no registry can hold it."""
        return f"name: {self.name}, scoring: {self.scoring}" if self.looks_at_trace else None

    @abstractmethod
    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """Unit rows float32 [n, d], independent of each other. Raises AttribError for an image below min_side_px."""

    def fit(self, references: References) -> Scorer:
        """The scorer fitted on references. Raises AttribError without generators, or for one without references."""
        return SCORINGS[self.scoring](references)

    def scores(self, references: References, queries: np.ndarray) -> np.ndarray:
        """float32 [n, G] from unit rows float32 [n, d]; higher means more like generator g."""
        return self.fit(references)(queries)


class Rescored(Method):
    """The vectors of one method with another scoring."""

    def __init__(self, method: Method, scoring: ScoringName):
        self.method, self.scoring, self.name = method, scoring, f"{method.name}-{scoring}"
        self.digest, self.looks_at_trace, self.min_side_px = method.digest, method.looks_at_trace, method.min_side_px
        self.needs_colour = method.needs_colour

    @property
    def registered_as(self) -> str | None:
        return f"name: {self.method.name}, scoring: {self.scoring}" if self.looks_at_trace else None

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        return self.method.embed(samples)


def with_scoring(method: Method, scoring: ScoringName | None) -> Method:
    """The method with this scoring and "-<scoring>" added to its name; unchanged for its own scoring or None."""
    return method if scoring in (None, method.scoring) else Rescored(method, scoring)


def check_sides(samples: Sequence[Sample], method: Method) -> None:
    """Raises AttribError for the first image below the method's min_side_px."""
    small = next((sample for sample in samples if sample.side_px < method.min_side_px), None)
    if small is not None:
        height, width = small.image.shape[1:]
        raise AttribError(
            f"an image of {width}x{height} pixels is too small for {method.name}, which needs {method.min_side_px} on "
            "the shorter side; leave it out"
        )
