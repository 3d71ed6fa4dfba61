"""Measure how often verdicts are right, with registries that each lack one family of a generator set.

Half of each generator's images are its references, with the default degradations of a registry; the other half are
queries. The background cohort consists of the other generators' references, the real images of the set, and synthetic
models. Queries come from all generators; those of the missing family should get the verdict unknown.
"""

from collections.abc import Sequence

import numpy as np

from attrib.generators.evaluation.generator_sets import GeneratorSet
from attrib.generators.evaluation.settings import LOSS_DEGRADATION
from attrib.generators.fingerprints.base import Method
from attrib.generators.identify.calibration import Negatives, calibrated
from attrib.generators.identify.verdicts import FAMILY_SEPARATOR, UNASSESSABLE, UNKNOWN, Judge, Verdict
from attrib.generators.registry.galleries import Galleries
from attrib.generators.registry.registry import embed_degraded
from attrib.generators.registry.settings import RegistrySettings, VerdictSettings
from attrib.generators.signals.degradations import NONE

DEGRADATIONS: tuple[str, ...] = RegistrySettings.model_fields["degradations"].default
QUERY_DEGRADATIONS = (NONE.name, LOSS_DEGRADATION)  # of the queries
METHODS = ("extractor", "extractor-cosine")  # only these, because each takes minutes
MIN_FAMILIES = 3  # of a set, so that two are registered
OUTCOMES = ("right", "wrong", "unknown", "unassessable")


def verdict_rates(
    methods: Sequence[Method], generators: GeneratorSet, synthetic: GeneratorSet, seed: int
) -> dict[str, dict]:
    """{method: {degradation of the query: {"registered", "left_out": {outcome: shares by generator, list}}}}.

    right: attributed to the query's generator or its family. wrong: attributed to another one; if the generator is left
    out, every attribution is wrong. methods: with the same vectors. generators: of MIN_FAMILIES families or more.
    """

    def embedded(samples) -> np.ndarray:
        return embed_degraded(methods[0], samples, DEGRADATIONS)

    rows = embedded(generators.samples)
    negatives = [Negatives(embedded(synthetic.samples), "synthetic", np.bincount(synthetic.generator))]
    if generators.real:
        negatives.append(Negatives(embedded(generators.real), "photographs", [1] * len(generators.real)))
    drawn = [
        np.random.default_rng([seed, 0 if generators.same_content else g]).permutation(generators.rows_of(g))
        for g in range(generators.num_generators)
    ]
    references = [rows[:, np.sort(places[: len(places) // 2])] for places in drawn]
    queries = [rows[:, np.sort(places[len(places) // 2 :])] for places in drawn]
    found: dict[str, dict] = {}
    for method in methods:
        shares: dict = {name: {"registered": {}, "left_out": {}} for name in QUERY_DEGRADATIONS}
        for family in np.unique(generators.family_numbers):
            held = np.flatnonzero(generators.family_numbers != family)
            galleries = Galleries(method, [references[g] for g in held])
            names = [generators.names[g] for g in held]
            judge = Judge(galleries, calibrated(galleries, names, negatives, DEGRADATIONS, VerdictSettings()))
            for name in QUERY_DEGRADATIONS:
                for g, generator in enumerate(generators.names):
                    vectors = queries[g][DEGRADATIONS.index(name)]
                    fits = np.isfinite(vectors).all(axis=1)  # not where the image is blank or becomes too small
                    verdicts = [*judge.verdicts(vectors[fits]), *[Verdict(UNASSESSABLE)] * int((~fits).sum())]
                    side = shares[name]["registered" if g in held else "left_out"]
                    side.setdefault(g, []).append(_shares(verdicts, generator))
        found[method.name] = {
            name: {side: _by_outcome(of_generators) for side, of_generators in sides.items()}
            for name, sides in shares.items()
        }
    return found


def _shares(verdicts: Sequence[Verdict], generator: str) -> list[float]:
    """Share of the verdicts with each outcome, in the order of OUTCOMES."""
    kinds = [verdict.kind for verdict in verdicts]
    named = [verdict.generator.split(FAMILY_SEPARATOR) for verdict in verdicts if verdict.generator is not None]
    num_right = sum(generator in names for names in named)
    counts = [num_right, len(named) - num_right, kinds.count(UNKNOWN), kinds.count(UNASSESSABLE)]
    return [count / len(verdicts) for count in counts]


def _by_outcome(of_generators: dict[int, list[list[float]]]) -> dict[str, list[float]]:
    """{outcome: shares by generator}, each the mean over registries."""
    means = [np.mean(of_generators[g], axis=0) for g in sorted(of_generators)]
    return {outcome: list(map(float, shares)) for outcome, shares in zip(OUTCOMES, zip(*means))}


def verdict_scores(found: dict) -> np.ndarray:
    """Score of each generator, float64 [G], from the verdict rates of one method.

    It is the mean of two shares, right if the generator is registered and unknown if it is left out, over the
    degradations of QUERY_DEGRADATIONS.
    """
    sides = (("registered", "right"), ("left_out", "unknown"))
    return np.mean([found[name][side][outcome] for name in QUERY_DEGRADATIONS for side, outcome in sides], axis=0)
