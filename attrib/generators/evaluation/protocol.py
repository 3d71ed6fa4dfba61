"""One method asked about one tier of generators: identification, verification, rejection, clusters, and how it holds up.

Vectors are made once for each condition (as the images are, then degraded); everything else is arithmetic on them. What is measured has a
value per generator, so that intervals can be taken over generators. Both sides of every comparison are encoded alike.
"""

import numpy as np

from attrib.common.errors import AttribError
from attrib.generators.evaluation import measures
from attrib.generators.evaluation.generator_sets import Question, Tier, divisions
from attrib.generators.evaluation.settings import LOSS_DEGRADATION, EvaluateGeneratorsSettings, FolderTierSettings
from attrib.generators.fingerprints.base import Method
from attrib.generators.fingerprints.scoring import Scorer, identified
from attrib.generators.identify.candidates import average_linkage, reference_cut
from attrib.generators.signals.degradations import NONE, parse
from attrib.generators.signals.samples import Sample, recoded

EMBEDDED_AT_ONCE = 256  # degraded images that are in memory at a time
MIN_QUERIES = 5  # of each generator: below it a point of a curve is left out
CURVE_DEGRADATIONS = (NONE.name, LOSS_DEGRADATION)  # of both sides


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


class Embedded:
    """A tier's vectors under each degradation, made once for all methods that embed alike."""

    def __init__(self, method: Method, tier: Tier):
        self.method, self.tier = method, tier
        self._made: dict[tuple[tuple[str, ...], bool], np.ndarray | None] = {}

    def under(self, *degradations: str, real: bool = False) -> np.ndarray | None:
        """float32 [n, d]: of the tier's samples, or of its real images, after one or more degradations; None if one becomes too small.

        Raises AttribError if the method returns something else than finite numbers.
        """
        if (degradations, real) not in self._made:
            self._made[degradations, real] = self._embed(degradations, self.tier.real if real else self.tier.samples)
        return self._made[degradations, real]

    def _embed(self, degradations: tuple[str, ...], images: list[Sample]) -> np.ndarray | None:
        made = []
        for start in range(0, len(images), EMBEDDED_AT_ONCE):
            samples = images[start : start + EMBEDDED_AT_ONCE]
            for name in degradations:
                samples = [recoded(sample, parse(name)) for sample in samples]
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
    references: {degradation of both sides: {number of references: identification}};
    sets: {degradation of both sides: {images per set: identification of sets}};
    degradations: {name: {clean, matched: {identification, family_identification where there are families, rejection_auroc}}};
    min_side_px: of the method.

    What is under a degradation is None where an image becomes too small for the method. Raises AttribError if a generator has too few
    images, or an image is too small for the method as it is.
    """
    tier = embedded.tier
    _check_counts(tier, settings)
    clean = embedded.under(NONE.name)
    if clean is None:
        raise AttribError(
            f"tier {tier.name!r} has images below the {method.min_side_px} px that {method.name} needs; leave the tier or the method out"
        )
    questions = list(divisions(tier, settings.num_references, settings.seed))
    gallery = Gallery(method, clean, questions)
    scores = gallery.answers(clean)
    found: dict = {
        "values": _identification(tier, scores, questions)
        | _verification(tier, clean, settings.false_positive_rate)
        | _rejection(tier, gallery),
        "confusion": _confusion(tier, scores, questions),
        "clusters": measures.contingency(average_linkage(clean, cut), tier.generator),
        "references": {},
        "sets": {},
        "degradations": {},
        "min_side_px": method.min_side_px,
    }
    if tier.real:
        found["values"]["real_auroc"] = _real_rejection(method, embedded, questions, settings.real_degradation)
    grid = asked_degradations(tier, settings)
    for name in dict.fromkeys([*grid, *CURVE_DEGRADATIONS]):
        degraded = embedded.under(name)
        there = degraded is not None
        matched = Gallery(method, degraded, questions) if there and name != NONE.name else gallery
        if name in CURVE_DEGRADATIONS:
            found["references"][name] = reference_curve(method, tier, degraded, settings) if there else None
            found["sets"][name] = set_curve(matched.answers(degraded), questions, settings.set_sizes) if there else None
        if name in grid:
            found["degradations"][name] = held_up(gallery, matched, degraded, tier) if there else None
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


def _identification(tier: Tier, scores: list[np.ndarray], questions: list[Question]) -> dict:
    """scores: float [queries, G] for each question."""
    f1 = [
        measures.f1_scores(identified(found, question.truth), question.truth, tier.num_generators)
        for found, question in zip(scores, questions)
    ]
    values = {"identification": identification(scores, questions), "f1": np.mean(f1, axis=0)}
    if tier.has_families:
        values["family_identification"] = identification(scores, questions, tier.family_numbers)
    return values


def _confusion(tier: Tier, scores: list[np.ndarray], questions: list[Question]) -> np.ndarray:
    counts = np.zeros((tier.num_generators, tier.num_generators))
    for found, question in zip(scores, questions):
        np.add.at(counts, (question.truth, identified(found, question.truth)), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def _verification(tier: Tier, vectors: np.ndarray, false_positive_rate: float) -> dict:
    """Two images of one generator against two of different ones, by the cosine of their vectors."""
    similarity, generator = vectors @ vectors.T, tier.generator
    cross_pairs = measures.CrossPairs(similarity, generator)
    found: dict = {"verification_auc": [], "true_positive_rate": [], "false_positive_rate": []}
    for g in range(tier.num_generators):
        positive, negative = measures.pair_scores(similarity, generator, g)
        rates = measures.transferred_rates(positive, negative, cross_pairs.without(g), false_positive_rate)
        found["verification_auc"].append(measures.auc(positive, negative))
        found["true_positive_rate"].append(rates.true_positive)
        found["false_positive_rate"].append(rates.false_positive)
    return found


def _rejection(tier: Tier, gallery: Gallery) -> dict:
    """Each generator in turn is unknown: its references are taken away, then those of its whole family, where it has one."""
    alone = gallery.rejections(gallery.vectors, np.eye(tier.num_generators, dtype=bool))
    found = {"rejection_auroc": alone[:, 0], "oscr": alone[:, 1]}
    if tier.has_families:
        kin = tier.family_numbers[:, None] == tier.family_numbers
        found["family_rejection_auroc"] = gallery.rejections(gallery.vectors, kin)[:, 0]
    return found


def _real_rejection(
    method: Method, embedded: Embedded, questions: list[Question], degradation: str
) -> np.ndarray | None:
    """AUROC of each generator's queries against real images, all of them and the references degraded alike; None if too small for that.

    Where the tier says what its real images went through before, the generated ones go through that first.
    """
    given = embedded.tier.settings
    history = [given.real_history] if isinstance(given, FolderTierSettings) and given.real_history else []
    generated, real = embedded.under(*history, degradation), embedded.under(degradation, real=True)
    if generated is None or real is None:
        return None
    found = []
    for question in questions:
        asked = np.concatenate([generated[question.queries], real])
        scores = method.scores([generated[rows] for rows in question.references], asked).max(axis=1)
        known, unknown = np.split(scores, [len(question.queries)])
        own = [known[question.truth == g] for g in range(len(question.references))]
        found.append([measures.auc(of_one, unknown) for of_one in own])
    return np.mean(found, axis=0)


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
