"""What one method is asked about a tier: whose is an image, and is it any of these, for random divisions into references and queries."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attrib.generators.evaluation import measures
from attrib.generators.evaluation.generator_sets import Tier
from attrib.generators.fingerprints.base import Method
from attrib.generators.fingerprints.scoring import Scorer, identified


@dataclass(frozen=True, eq=False)
class Question:
    """Rows of the tier for one division of the images: references of each generator, then queries with their generator."""

    references: list[np.ndarray]
    queries: np.ndarray
    truth: np.ndarray


def divisions(tier: Tier, num_references: int, seed: int) -> Iterator[Question]:
    """The tier's random divisions, the same for every method. Where all generators show the same, all are divided at the same pictures."""
    for number in range(tier.settings.num_splits):
        rng = np.random.default_rng([seed, number])
        rows = [tier.rows_of(g) for g in range(tier.num_generators)]
        if tier.same_content:
            order = rng.permutation(min(map(len, rows)))
            shuffled = [own[order] for own in rows]
        else:
            shuffled = [rng.permutation(own) for own in rows]
        yield Question(
            [own[:num_references] for own in shuffled],
            np.concatenate([own[num_references:] for own in shuffled]),
            np.repeat(np.arange(len(shuffled)), [len(own) - num_references for own in shuffled]),
        )


class Gallery:
    """References of one method under one condition, fitted once for each division and each set of generators, however often they are asked."""

    def __init__(self, method: Method, vectors: np.ndarray, questions: list[Question]):
        """vectors: float32 [n, d], of all images of the tier."""
        self.method, self.vectors, self.questions = method, vectors, questions
        self._fitted: dict[tuple[int, bytes], Scorer] = {}

    def scores(self, number: int, present: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """float32 [queries, present generators] by the references of one question. present: int [P], which generators have any."""
        key = number, present.tobytes()
        if key not in self._fitted:
            references = self.questions[number].references
            self._fitted[key] = self.method.fit([self.vectors[references[g]] for g in present])
        return self._fitted[key](queries)

    def answers(self, vectors: np.ndarray) -> list[np.ndarray]:
        """Scores float32 [queries, G] for each question; queries are rows of the vectors, float32 [n, d]."""
        return [
            self.scores(number, np.arange(len(question.references)), vectors[question.queries])
            for number, question in enumerate(self.questions)
        ]

    def rejections(self, vectors: np.ndarray, absent: np.ndarray) -> np.ndarray:
        """AUROC and OSCR of each generator's rejection, float64 [G, 2]. absent: bool [G, G], whose references are taken away for whom."""
        found = [
            [self._left_out(number, vectors, g, row) for number in range(len(self.questions))]
            for g, row in enumerate(absent)
        ]
        return np.mean(found, axis=1)

    def _left_out(self, number: int, vectors: np.ndarray, unknown: int, absent: np.ndarray) -> tuple[float, float]:
        """AUROC and OSCR of the queries of the present generators against those of the unknown one. absent: bool [G]."""
        present = np.flatnonzero(~absent)
        if not len(present):
            return float("nan"), float("nan")
        question = self.questions[number]
        is_known = ~absent[question.truth]
        asked = np.concatenate([question.queries[is_known], question.queries[question.truth == unknown]])
        known, other = np.split(self.scores(number, present, vectors[asked]), [is_known.sum()])
        truth = np.searchsorted(present, question.truth[is_known])
        correct = identified(known, truth) == truth
        highest = known.max(axis=1), other.max(axis=1)
        return measures.auc(*highest), measures.oscr(highest[0], correct, highest[1])


def identification(
    scores: list[np.ndarray], questions: list[Question], families: np.ndarray | None = None
) -> np.ndarray:
    """float64 [G]: of each generator's queries the share that is identified, the mean over questions. scores: of `Gallery.answers`.

    families: int64 [G]; with them a query counts as identified where its family is.
    """
    found = []
    for of_queries, question in zip(scores, questions):
        num_generators = len(question.references)
        kin = np.arange(num_generators) if families is None else families
        right = kin[identified(of_queries, question.truth)] == kin[question.truth]
        found.append([right[question.truth == g].mean() for g in range(num_generators)])
    return np.mean(found, axis=0)
