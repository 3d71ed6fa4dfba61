"""How a method holds up: when images are degraded, and with more or fewer references or images that are judged together."""

import numpy as np

from attrib.generators.evaluation import measures
from attrib.generators.evaluation.generator_sets import Tier
from attrib.generators.evaluation.protocol import Gallery, Question, divisions, identification
from attrib.generators.evaluation.settings import LOSS_DEGRADATION, EvaluateGeneratorsSettings
from attrib.generators.fingerprints.base import Method
from attrib.generators.fingerprints.scoring import identified
from attrib.generators.signals.degradations import NONE

MIN_QUERIES = 5  # of each generator: below it a point of a curve is left out
CURVE_DEGRADATIONS = (NONE.name, LOSS_DEGRADATION)  # of both sides


def asked_degradations(tier: Tier, settings: EvaluateGeneratorsSettings) -> tuple[str, ...]:
    """The whole grid for judged tiers; what the table's loss is taken from for every tier."""
    grid = settings.degradations if tier.settings.judged else ()
    return tuple(dict.fromkeys([*grid, LOSS_DEGRADATION]))


def held_up(clean: Gallery, matched: Gallery, degraded: np.ndarray, tier: Tier) -> dict[str, dict[str, np.ndarray]]:
    """{"clean", "matched": {value: float64 [G]}} of degraded queries, by what their references went through."""
    alone = np.eye(tier.num_generators, dtype=bool)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, gallery in (("clean", clean), ("matched", matched)):
        scores = gallery.answers(degraded)
        found[name] = {"identification": identification(scores, gallery.questions)}
        if tier.has_families:
            found[name]["family_identification"] = identification(scores, gallery.questions, tier.family_numbers)
        found[name]["rejection_auroc"] = gallery.rejections(degraded, alone)[:, 0]
    return found


def reference_curve(
    method: Method, tier: Tier, vectors: np.ndarray, settings: EvaluateGeneratorsSettings
) -> dict[str, np.ndarray]:
    """{number of references: identification, float64 [G]}, as far as MIN_QUERIES remain of each generator."""
    fewest = min(len(tier.rows_of(g)) for g in range(tier.num_generators))
    found = {}
    for count in settings.reference_counts:
        if count + MIN_QUERIES <= fewest:
            questions = list(divisions(tier, count, settings.seed))
            found[str(count)] = identification(Gallery(method, vectors, questions).answers(vectors), questions)
    return found


def set_curve(scores: list[np.ndarray], questions: list[Question], sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """{images per set: identification, float64 [G]}. A set is as many queries of one generator as are judged together, by the mean of
    their scores; a size is left out where a generator has no full set.

    scores: float [queries, G] for each question.
    """
    found: dict[str, list] = {}
    for of_queries, question in zip(scores, questions):
        num_generators = len(question.references)
        for size in sizes:
            means = [_set_means(of_queries[question.truth == g], size) for g in range(num_generators)]
            counts = [len(rows) for rows in means]
            if min(counts):
                truth = np.repeat(np.arange(num_generators), counts)
                predicted = identified(np.concatenate(means), truth)
                found.setdefault(str(size), []).append(measures.recalls(predicted, truth, num_generators))
    return {size: np.mean(recalls, axis=0) for size, recalls in found.items()}


def _set_means(scores: np.ndarray, size: int) -> np.ndarray:
    """float [n, G] -> [n // size, G]; what does not fill a set is left over."""
    num_sets = len(scores) // size
    return scores[: num_sets * size].reshape(num_sets, size, scores.shape[1]).mean(axis=1)
