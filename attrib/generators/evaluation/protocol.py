"""Evaluate a method on a generator set: identification, verification, rejection, clusters, robustness to degradation.

Vectors are computed once per condition (original images, each degradation). Every measure has one value per generator,
from which intervals are computed. References and queries are stored in the same file format.
"""

from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.metrics.cluster import contingency_matrix

from attrib.common.errors import AttribError
from attrib.generators.evaluation import measures
from attrib.generators.evaluation.generator_sets import Division, GeneratorSet, divisions
from attrib.generators.evaluation.settings import LOSS_DEGRADATION, EvaluateGeneratorsSettings
from attrib.generators.fingerprints.base import Method
from attrib.generators.fingerprints.scoring import Scorer, identified
from attrib.generators.identify.candidates import average_linkage, reference_cut
from attrib.generators.signals.degradations import NONE, parse
from attrib.generators.signals.samples import recoded

EMBEDDED_AT_ONCE = 256  # degraded images in memory
MIN_QUERIES = 5  # of each generator; points of a curve with fewer are left out
CURVE_DEGRADATIONS = (NONE.name, LOSS_DEGRADATION)  # of references and queries


class Gallery:
    """References of one division, scored by one method. The scorer is fitted once per subset of the generators."""

    def __init__(self, method: Method, vectors: np.ndarray, split: Division):
        """vectors: float32 [n, d], of all images of the generator set."""
        self.method, self.vectors, self.split = method, vectors, split
        self._fitted: dict[bytes, Scorer] = {}

    def scores(self, queries: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
        """Scores of queries for the present generators, float32 [queries, P]. present: int [P]; None: all."""
        present = np.arange(len(self.split.references)) if present is None else present
        key = present.tobytes()
        if key not in self._fitted:
            self._fitted[key] = self.method.fit([self.vectors[self.split.references[g]] for g in present])
        return self._fitted[key](queries)

    def rejection(self, vectors: np.ndarray, unknown: int, absent: np.ndarray) -> tuple[float, float]:
        """AUROC and OSCR of queries of the registered generators against those of the unknown one.

        absent: bool [G], which generators are not registered.
        """
        present, split = np.flatnonzero(~absent), self.split
        if not len(present):
            return float("nan"), float("nan")
        is_known = ~absent[split.truth]
        queries = np.concatenate([split.queries[is_known], split.queries[split.truth == unknown]])
        known, other = np.split(self.scores(vectors[queries], present), [is_known.sum()])
        truth = np.searchsorted(present, split.truth[is_known])
        correct = identified(known, truth) == truth
        highest = known.max(axis=1), other.max(axis=1)
        return measures.auc(*highest), measures.oscr(highest[0], correct, highest[1])


def rejections(galleries: list[Gallery], vectors: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """AUROC and OSCR with each generator as the unknown one, float64 [G, 2], mean over divisions.

    absent: bool [G, G]; row g marks the generators that are not registered while g is the unknown one.
    """
    found = [[own.rejection(vectors, g, row) for own in galleries] for g, row in enumerate(absent)]
    return np.mean(found, axis=1)


class Embedded:
    """Vectors of a generator set under each degradation, computed once for all methods with the same digest."""

    def __init__(self, method: Method, generators: GeneratorSet):
        self.method, self.generators = method, generators
        self._made: dict[tuple[tuple[str, ...], bool], np.ndarray | None] = {}

    def under(self, *degradations: str, real: bool = False) -> np.ndarray | None:
        """float32 [n, d] of generated or real images after some degradations; None if an image becomes too small.

        Raises AttribError if the method returns numbers that are not finite.
        """
        if (degradations, real) not in self._made:
            self._made[degradations, real] = self._embed(degradations, real)
        return self._made[degradations, real]

    def _embed(self, degradations: tuple[str, ...], real: bool) -> np.ndarray | None:
        made, images = [], self.generators.real if real else self.generators.samples
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
                f"{self.method.name} gave vectors that are not finite on generator set {self.generators.name!r}; "
                "train the method again"
            )
        return vectors


def evaluate_set(method: Method, embedded: Embedded, cut: float, settings: EvaluateGeneratorsSettings) -> dict:
    """All measures of one method as plain values for JSON. Lists have one entry per generator, in the set's order.

    cut: clusters are merged while their mean cosine is at least this.

    values: {identification, f1, family_identification, verification_auc, true_positive_rate, false_positive_rate,
        rejection_auroc, oscr, family_rejection_auroc, real_auroc: list};
    confusion: [G, G], share of each generator's queries by identified generator;
    clusters: [clusters, G], number of images by cluster and generator;
    references: {degradation of references and queries: {number of references: identification}};
    sets: {degradation of references and queries: {images per set: identification of sets}};
    degradations: {degradation of the queries: {clean, matched: {identification, rejection_auroc, and with families
        family_identification}}}; clean: references are original images, matched: they are degraded, too;
    min_side_px: of the method.

    A value is None if a degradation makes an image too small for the method. Raises AttribError if a generator has too
    few images, or an original image is too small.
    """
    generators = embedded.generators
    for g, name in enumerate(generators.names):
        count = len(generators.rows_of(g))
        if count < settings.num_references + MIN_QUERIES:
            raise AttribError(
                f"{name} of generator set {generators.name!r} has {count} images, fewer than {settings.num_references} "
                f"references and {MIN_QUERIES} queries; lower num_references, or leave the generator out"
            )
    clean = embedded.under(NONE.name)
    if clean is None:
        raise AttribError(
            f"generator set {generators.name!r} has images below the {method.min_side_px} px that {method.name} needs; "
            "leave out the set or the method"
        )
    splits = list(divisions(generators, settings.num_references, settings.seed))
    galleries = [Gallery(method, clean, split) for split in splits]
    labels = [(split.truth, identified(found, split.truth)) for found, split in zip(_scores(galleries, clean), splits)]
    confusion = sum(confusion_matrix(*pair, labels=range(generators.num_generators)) for pair in labels)
    found: dict[str, Any] = {
        "values": _values(embedded, galleries, labels, settings),
        "confusion": confusion / confusion.sum(axis=1, keepdims=True),
        "clusters": contingency_matrix(average_linkage(clean, cut), generators.generator),
        "references": {},
        "sets": {},
        "degradations": {},
        "min_side_px": method.min_side_px,
    }
    grid = [*(settings.degradations if generators.settings.judged else ()), LOSS_DEGRADATION]
    for name in dict.fromkeys([*grid, *CURVE_DEGRADATIONS]):
        degraded = embedded.under(name)
        fits = degraded is not None
        matched = galleries
        if fits and name != NONE.name:
            matched = [Gallery(method, degraded, split) for split in splits]
        if name in CURVE_DEGRADATIONS:
            found["references"][name] = reference_curve(method, generators, degraded, settings) if fits else None
            found["sets"][name] = set_curve(matched, degraded, settings.set_sizes) if fits else None
        if name in grid:
            sides = {"clean": galleries, "matched": matched}
            found["degradations"][name] = (
                {side: _robustness(own, degraded, generators) for side, own in sides.items()} if fits else None
            )
    return _plain(found)


def cluster_cut(embedded: Embedded) -> float:
    """The cut of `reference_cut`, on a set that is not part of the evaluation."""
    vectors = embedded.under(NONE.name)
    if vectors is None:
        raise AttribError(
            f"the training pool's images are below the {embedded.method.min_side_px} px that {embedded.method.name} "
            "needs; lower patch_px of the method"
        )
    return reference_cut([vectors[embedded.generators.rows_of(g)] for g in range(embedded.generators.num_generators)])


def _values(
    embedded: Embedded,
    galleries: list[Gallery],
    labels: list[tuple[np.ndarray, np.ndarray]],
    settings: EvaluateGeneratorsSettings,
) -> dict:
    """`values` of evaluate_set. labels: true and identified generator of the queries of each division."""
    generators, clean = embedded.generators, galleries[0].vectors
    kinds = range(generators.num_generators)
    f1 = [f1_score(*pair, labels=kinds, average=None, zero_division=np.nan) for pair in labels]
    alone = rejections(galleries, clean, np.eye(len(kinds), dtype=bool))
    found = _identification(galleries, clean, generators) | {
        "f1": np.mean(f1, axis=0),
        **measures.verification(clean @ clean.T, generators.generator, settings.false_positive_rate),
        "rejection_auroc": alone[:, 0],
        "oscr": alone[:, 1],
    }
    if generators.has_families:
        kin = generators.family_numbers[:, None] == generators.family_numbers
        found["family_rejection_auroc"] = rejections(galleries, clean, kin)[:, 0]
    if generators.real:
        found["real_auroc"] = _real_rejection(embedded, galleries, settings.real_degradation)
    return found


def _robustness(galleries: list[Gallery], degraded: np.ndarray, generators: GeneratorSet) -> dict[str, np.ndarray]:
    """{value: float64 [G]} of degraded queries."""
    alone = rejections(galleries, degraded, np.eye(generators.num_generators, dtype=bool))
    return _identification(galleries, degraded, generators) | {"rejection_auroc": alone[:, 0]}


def _identification(galleries: list[Gallery], vectors: np.ndarray, generators: GeneratorSet) -> dict[str, np.ndarray]:
    """{identification, and with families family_identification}: float64 [G], mean recall over divisions."""
    kinds = {"identification": np.arange(generators.num_generators)}
    if generators.has_families:
        kinds["family_identification"] = generators.family_numbers
    found: dict[str, list] = {name: [] for name in kinds}
    for scores, own in zip(_scores(galleries, vectors), galleries):
        predicted, truth = identified(scores, own.split.truth), own.split.truth
        for name, kin in kinds.items():
            found[name].append(measures.recalls(kin[predicted] == kin[truth], truth))
    return {name: np.mean(recalls, axis=0) for name, recalls in found.items()}


def _scores(galleries: list[Gallery], vectors: np.ndarray) -> list[np.ndarray]:
    """float32 [queries, G] for each division; queries are rows of the vectors, float32 [n, d]."""
    return [own.scores(vectors[own.split.queries]) for own in galleries]


def _real_rejection(embedded: Embedded, galleries: list[Gallery], degradation: str) -> np.ndarray | None:
    """AUROC of each generator's queries against real images, float64 [G]; None if an image becomes too small.

    References, queries and real images get the same degradation. Before that, generated images get the degradation that
    the published real images already have (real_history).
    """
    history = getattr(embedded.generators.settings, "real_history", None)
    generated = embedded.under(*([history] if history else []), degradation)
    real = embedded.under(degradation, real=True)
    if generated is None or real is None:
        return None
    found = []
    for own in galleries:
        split = own.split
        queries = np.concatenate([generated[split.queries], real])
        scores = Gallery(own.method, generated, split).scores(queries).max(axis=1)
        known, unknown = np.split(scores, [len(split.queries)])
        found.append([measures.auc(known[split.truth == g], unknown) for g in range(len(split.references))])
    return np.mean(found, axis=0)


def reference_curve(
    method: Method, generators: GeneratorSet, vectors: np.ndarray, settings: EvaluateGeneratorsSettings
) -> dict[str, np.ndarray]:
    """{number of references: identification, float64 [G]}, if it leaves each generator MIN_QUERIES queries."""
    found = {}
    for count in settings.reference_counts:
        if count + MIN_QUERIES <= min(np.bincount(generators.generator)):
            splits = divisions(generators, count, settings.seed)
            galleries = [Gallery(method, vectors, split) for split in splits]
            found[str(count)] = _identification(galleries, vectors, generators)["identification"]
    return found


def set_curve(galleries: list[Gallery], vectors: np.ndarray, sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """{images per set: identification of sets, float64 [G]}, if each generator has images for one set or more.

    A set is consecutive queries of one generator, identified by their mean score. vectors: float32 [n, d].
    """
    found: dict[str, list] = {}
    for scores, own in zip(_scores(galleries, vectors), galleries):
        counts = np.bincount(own.split.truth)
        of_generators = np.split(scores, np.cumsum(counts)[:-1])
        for size in sizes:
            if min(counts) >= size:
                means = [
                    rows[: len(rows) // size * size].reshape(-1, size, len(counts)).mean(1) for rows in of_generators
                ]
                truth = np.repeat(np.arange(len(counts)), counts // size)
                right = identified(np.concatenate(means), truth) == truth
                found.setdefault(str(size), []).append(measures.recalls(right, truth))
    return {size: np.mean(recalls, axis=0) for size, recalls in found.items()}


def _plain(value: Any) -> Any:
    """The value with lists in place of arrays, and None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
