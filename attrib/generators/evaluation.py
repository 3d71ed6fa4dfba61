"""One method asked about one tier of generators: identification, verification, rejection, clusters, and how each holds up.

Vectors are made once for each condition (as the images are, then degraded); everything else is arithmetic on them. What is measured has a
value per generator, so that intervals can be taken over generators. Both sides of every comparison are encoded alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attrib.errors import AttribError
from attrib.generators import measures
from attrib.generators.candidates import average_linkage, reference_cut
from attrib.generators.degradations import NONE, parse
from attrib.generators.evaluation_settings import EvaluateGeneratorsSettings
from attrib.generators.methods import Method
from attrib.generators.samples import Sample, recoded
from attrib.generators.tiers import Tier

MIN_QUERIES = 5  # of each generator: below it a point of a curve is left out
EMBEDDED_AT_ONCE = 256  # degraded images that are in memory at a time


@dataclass(frozen=True, eq=False)
class Question:
    """Rows of the tier for one division of the images: references of each generator, then queries with their generator."""

    references: list[np.ndarray]
    queries: np.ndarray
    truth: np.ndarray


class Embedded:
    """A tier's vectors under each degradation, made once for all methods that embed alike."""

    def __init__(self, method: Method, tier: Tier):
        self.method, self.tier = method, tier
        self._made: dict[tuple[str, bool], np.ndarray | None] = {}

    def under(self, degradation: str, real: bool = False) -> np.ndarray | None:
        """float32 [n, d]: of the tier's samples, or of its real images; None if one becomes too small for the method.

        Raises AttribError if the method returns something else than finite numbers.
        """
        if (degradation, real) not in self._made:
            self._made[degradation, real] = self._embed(degradation, self.tier.real if real else self.tier.samples)
        return self._made[degradation, real]

    def _embed(self, degradation: str, images: list[Sample]) -> np.ndarray | None:
        made = []
        for start in range(0, len(images), EMBEDDED_AT_ONCE):
            samples = [recoded(image, parse(degradation)) for image in images[start : start + EMBEDDED_AT_ONCE]]
            if min(sample.side_px for sample in samples) < self.method.min_side_px:
                return None
            made.append(self.method.embed(samples))
        vectors = np.concatenate(made)
        if not np.isfinite(vectors).all():
            raise AttribError(
                f"{self.method.name} gave vectors that are not finite on tier {self.tier.name!r}; train or fit it again"
            )
        return vectors


def evaluate_tier(method: Method, embedded: Embedded, cut: float, settings: EvaluateGeneratorsSettings) -> dict:
    """Plain values for JSON, None where there is nothing to measure. Lists have one entry per generator of the tier, in its order.

    cut: the cosine below which clusters stay apart, from other generators than these.

    values: {identification, f1, family_identification, verification_auc, true_positive_rate, false_positive_rate, rejection_auroc, oscr,
        family_rejection_auroc, real_auroc: list};
    confusion: [G, G], shares of each generator's queries by what they are identified as;
    clusters: [clusters, G], images by cluster and generator;
    references: {number of references: identification}; sets: {images per set: identification of sets};
    degradations: {name: {clean, matched: {identification, rejection_auroc}}, or None where an image becomes too small for the method}.

    Raises AttribError if a generator has too few images, or an image is too small for the method as it is.
    """
    tier = embedded.tier
    _check_counts(tier, settings)
    clean = embedded.under(NONE.name)
    if clean is None:
        raise AttribError(
            f"tier {tier.name!r} has images below the {method.min_side_px} px that {method.name} needs; leave the tier or the method out"
        )
    questions = list(divisions(tier, settings.num_references, settings.seed))
    scores = [_scores(method, clean, clean, question) for question in questions]
    found: dict = {
        "values": _identification(tier, scores, questions)
        | _verification(tier, clean, settings.false_positive_rate)
        | _rejection(method, tier, clean, questions),
        "confusion": _confusion(tier, scores, questions),
        "clusters": measures.contingency(average_linkage(clean, cut), tier.generator),
        "references": _reference_curve(method, tier, clean, settings),
        "sets": _set_curve(tier, scores, questions, settings.set_sizes),
        "degradations": {},
    }
    if tier.real:
        found["values"]["real_auroc"] = _real_rejection(method, embedded, questions, settings.real_degradation)
    if tier.settings.judged:
        for name in settings.degradations:
            degraded = embedded.under(name)
            galleries = {} if degraded is None else {"clean": clean, "matched": degraded}
            held_up = {kind: _held_up(method, tier, rows, degraded, questions) for kind, rows in galleries.items()}
            found["degradations"][name] = held_up or None
    return _plain(found)


def cluster_cut(embedded: Embedded) -> float:
    """The cosine that best tells pairs of images of one generator from pairs of two, on a tier that is not evaluated."""
    vectors = embedded.under(NONE.name)
    if vectors is None:
        raise AttribError(
            f"the training pool's images are below the {embedded.method.min_side_px} px that {embedded.method.name} needs; "
            "lower its patch_px"
        )
    return reference_cut([vectors[embedded.tier.rows_of(g)] for g in range(embedded.tier.num_generators)])


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


def _scores(method: Method, gallery: np.ndarray, queries: np.ndarray, question: Question) -> np.ndarray:
    return method.scores([gallery[rows] for rows in question.references], queries[question.queries])


def _identification(tier: Tier, scores: list[np.ndarray], questions: list[Question]) -> dict:
    """scores: float [queries, G] for each question."""
    families = tier.family_numbers
    recalls, f1, by_family = [], [], []
    for found, question in zip(scores, questions):
        predicted = measures.identified(found, question.truth)
        recalls.append(measures.recalls(predicted, question.truth, tier.num_generators))
        f1.append(measures.f1_scores(predicted, question.truth, tier.num_generators))
        right = families[predicted] == families[question.truth]
        by_family.append([right[question.truth == g].mean() for g in range(tier.num_generators)])
    values = {"identification": np.mean(recalls, axis=0), "f1": np.mean(f1, axis=0)}
    return values | ({"family_identification": np.mean(by_family, axis=0)} if tier.has_families else {})


def _confusion(tier: Tier, scores: list[np.ndarray], questions: list[Question]) -> np.ndarray:
    counts = np.zeros((tier.num_generators, tier.num_generators))
    for found, question in zip(scores, questions):
        np.add.at(counts, (question.truth, measures.identified(found, question.truth)), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def _verification(tier: Tier, vectors: np.ndarray, false_positive_rate: float) -> dict:
    """Two images of one generator against two of different ones, by the cosine of their vectors."""
    similarity, generator = vectors @ vectors.T, tier.generator
    found: dict = {"verification_auc": [], "true_positive_rate": [], "false_positive_rate": []}
    for g in range(tier.num_generators):
        rates = measures.transferred_rates(similarity, generator, g, false_positive_rate)
        found["verification_auc"].append(measures.auc(*measures.pair_scores(similarity, generator, g)))
        found["true_positive_rate"].append(rates.true_positive)
        found["false_positive_rate"].append(rates.false_positive)
    return found


def _rejection(method: Method, tier: Tier, vectors: np.ndarray, questions: list[Question]) -> dict:
    """Each generator in turn is unknown: its references are taken away, then those of its whole family, where it has one."""
    alone = _rejections(method, vectors, vectors, questions, np.eye(tier.num_generators, dtype=bool))
    found = {"rejection_auroc": alone[:, 0], "oscr": alone[:, 1]}
    if tier.has_families:
        kin = tier.family_numbers[:, None] == tier.family_numbers
        found["family_rejection_auroc"] = _rejections(method, vectors, vectors, questions, kin)[:, 0]
    return found


def _rejections(
    method: Method, gallery: np.ndarray, vectors: np.ndarray, questions: list[Question], absent: np.ndarray
) -> np.ndarray:
    """AUROC and OSCR of each generator's rejection, float64 [G, 2]. absent: bool [G, G], whose references are taken away for whom."""
    return np.array(
        [
            np.mean([_left_out(method, gallery, vectors, question, g, row) for question in questions], axis=0)
            for g, row in enumerate(absent)
        ]
    )


def _left_out(
    method: Method, gallery: np.ndarray, vectors: np.ndarray, question: Question, unknown: int, absent: np.ndarray
) -> tuple[float, float]:
    """AUROC and OSCR of the queries of the present generators against those of the unknown one. absent: bool [G]."""
    present = np.flatnonzero(~absent)
    if not len(present):
        return float("nan"), float("nan")
    is_known = ~absent[question.truth]
    is_unknown = question.truth == unknown
    references = [gallery[question.references[g]] for g in present]
    asked = np.concatenate([question.queries[is_known], question.queries[is_unknown]])
    scores = method.scores(references, vectors[asked])
    known, other = scores[: is_known.sum()], scores[is_known.sum() :]
    truth = np.searchsorted(present, question.truth[is_known])
    correct = measures.identified(known, truth) == truth
    highest = known.max(axis=1), other.max(axis=1)
    return measures.auc(*highest), measures.oscr(highest[0], correct, highest[1])


def _real_rejection(
    method: Method, embedded: Embedded, questions: list[Question], degradation: str
) -> np.ndarray | None:
    """AUROC of each generator's queries against real images, all of them and the references degraded alike; None if too small for that."""
    generated, real = embedded.under(degradation), embedded.under(degradation, real=True)
    if generated is None or real is None:
        return None
    found = []
    for question in questions:
        known = _scores(method, generated, generated, question).max(axis=1)
        unknown = method.scores([generated[rows] for rows in question.references], real).max(axis=1)
        own = [known[question.truth == g] for g in range(len(question.references))]
        found.append([measures.auc(scores, unknown) for scores in own])
    return np.mean(found, axis=0)


def _held_up(
    method: Method, tier: Tier, gallery: np.ndarray, vectors: np.ndarray, questions: list[Question]
) -> dict[str, np.ndarray]:
    scores = [_scores(method, gallery, vectors, question) for question in questions]
    return {
        "identification": _identification(tier, scores, questions)["identification"],
        "rejection_auroc": _rejections(method, gallery, vectors, questions, np.eye(tier.num_generators, dtype=bool))[
            :, 0
        ],
    }


def _reference_curve(
    method: Method, tier: Tier, vectors: np.ndarray, settings: EvaluateGeneratorsSettings
) -> dict[str, np.ndarray]:
    fewest = min(len(tier.rows_of(g)) for g in range(tier.num_generators))
    found = {}
    for count in settings.reference_counts:
        if count + MIN_QUERIES <= fewest:
            questions = list(divisions(tier, count, settings.seed))
            scores = [_scores(method, vectors, vectors, question) for question in questions]
            found[str(count)] = _identification(tier, scores, questions)["identification"]
    return found


def _set_curve(
    tier: Tier, scores: list[np.ndarray], questions: list[Question], sizes: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """A set is as many queries of one generator as are judged together, by the mean of their scores."""
    found: dict[str, list] = {}
    for of_queries, question in zip(scores, questions):
        for size in sizes:
            means = [_set_means(of_queries[question.truth == g], size) for g in range(tier.num_generators)]
            counts = [len(rows) for rows in means]
            if min(counts):
                truth = np.repeat(np.arange(len(means)), counts)
                predicted = measures.identified(np.concatenate(means), truth)
                found.setdefault(str(size), []).append(measures.recalls(predicted, truth, tier.num_generators))
    return {size: np.mean(recalls, axis=0) for size, recalls in found.items()}


def _set_means(scores: np.ndarray, size: int) -> np.ndarray:
    """float [n, G] -> [n // size, G]; what does not fill a set is left over."""
    num_sets = len(scores) // size
    return scores[: num_sets * size].reshape(num_sets, size, scores.shape[1]).mean(axis=1)


def _check_counts(tier: Tier, settings: EvaluateGeneratorsSettings) -> None:
    for g, name in enumerate(tier.names):
        count = len(tier.rows_of(g))
        if count < settings.num_references + MIN_QUERIES:
            raise AttribError(
                f"{name} of tier {tier.name!r} has {count} images, and {settings.num_references} references with {MIN_QUERIES} "
                "queries need more; lower num_references or leave it out"
            )


def _plain(value):
    """Without arrays, and None where a number is not one."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
