"""What verdicts come to: registries that each lack one family of a tier, asked about images of generators that they hold and that they lack.

Half of each generator's images are its references, kept under the degradations of a new registry; the others are asked about. Negatives are the
references of the other generators, the tier's real images and synthetic models.
"""

from collections.abc import Sequence

import numpy as np

from attrib.generators.evaluation.generator_sets import Tier
from attrib.generators.evaluation.settings import LOSS_DEGRADATION
from attrib.generators.fingerprints.base import Method
from attrib.generators.identify.calibration import Negatives, calibrated
from attrib.generators.identify.verdicts import FAMILY_SEPARATOR, UNASSESSABLE, UNKNOWN, Judge, Verdict
from attrib.generators.registry.galleries import Galleries
from attrib.generators.registry.registry import embed_degraded
from attrib.generators.registry.settings import RegistrySettings, VerdictSettings
from attrib.generators.signals.degradations import NONE

DEGRADATIONS: tuple[str, ...] = RegistrySettings.model_fields["degradations"].default
ASKED = (NONE.name, LOSS_DEGRADATION)  # the images that are asked about
METHODS = ("extractor", "extractor-cosine")  # that verdicts are measured for; each takes minutes
MIN_FAMILIES = 3  # of a tier: without one, two are left
OUTCOMES = ("right", "wrong", "unknown", "unassessable")


def verdict_rates(methods: Sequence[Method], tier: Tier, synthetic: Tier, seed: int) -> dict[str, dict]:
    """{method: {degradation of the image: {"registered", "left_out": {outcome: shares by generator, list}}}}.

    right: the image's own generator, or a family with it; wrong: another, as is all that is attributed of a generator that was left out with
    its family. Methods embed alike. The tier has MIN_FAMILIES or more.
    """
    rows = embed_degraded(methods[0], tier.samples, DEGRADATIONS)
    negatives = [
        Negatives(
            embed_degraded(methods[0], synthetic.samples, DEGRADATIONS), "synthetic", np.bincount(synthetic.generator)
        )
    ]
    if tier.real:
        negatives.append(
            Negatives(embed_degraded(methods[0], tier.real, DEGRADATIONS), "photographs", [1] * len(tier.real))
        )
    drawn = [
        np.random.default_rng([seed, 0 if tier.same_content else g]).permutation(tier.rows_of(g))
        for g in range(tier.num_generators)
    ]
    references = [rows[:, np.sort(places[: len(places) // 2])] for places in drawn]
    asked = [rows[:, np.sort(places[len(places) // 2 :])] for places in drawn]
    found = {}
    for method in methods:
        outcomes: dict = {name: {"registered": {}, "left_out": {}} for name in ASKED}
        for family in np.unique(tier.family_numbers):
            held = np.flatnonzero(tier.family_numbers != family)
            galleries = Galleries(method, [references[g] for g in held])
            names = [tier.names[g] for g in held]
            judge = Judge(galleries, calibrated(galleries, names, negatives, DEGRADATIONS, VerdictSettings()))
            for name in ASKED:
                for g in range(tier.num_generators):
                    vectors = asked[g][DEGRADATIONS.index(name)]
                    there = np.isfinite(vectors).all(axis=1)  # others are too small once degraded, or blank
                    verdicts = [*judge.verdicts(vectors[there]), *[Verdict(UNASSESSABLE)] * int((~there).sum())]
                    side = "registered" if g in held else "left_out"
                    outcomes[name][side].setdefault(g, []).append(_shares(verdicts, tier.names[g]))
        found[method.name] = {
            name: {side: _by_outcome(of_generators) for side, of_generators in sides.items()}
            for name, sides in outcomes.items()
        }
    return found


def _shares(verdicts: Sequence[Verdict], generator: str) -> list[float]:
    """In the order of OUTCOMES."""
    right = [v.generator is not None and generator in v.generator.split(FAMILY_SEPARATOR) for v in verdicts]
    wrong = [v.generator is not None and not own for v, own in zip(verdicts, right)]
    kinds = [v.kind for v in verdicts]
    counts = [sum(right), sum(wrong), kinds.count(UNKNOWN), kinds.count(UNASSESSABLE)]
    return [count / len(verdicts) for count in counts]


def _by_outcome(of_generators: dict[int, list[list[float]]]) -> dict[str, list[float]]:
    """Means over the registries that a generator was in, or lacking from."""
    means = np.stack([np.mean(of_generators[g], axis=0) for g in sorted(of_generators)])
    return {outcome: means[:, i].tolist() for i, outcome in enumerate(OUTCOMES)}


def verdict_scores(found: dict) -> np.ndarray:
    """float64 [G], of what `verdict_rates` found of one method on a tier: the mean, over degradations, of the share that is right while a generator
    is registered and unknown while it is left out."""
    sides = (("registered", "right"), ("left_out", "unknown"))
    return np.mean([found[name][side][outcome] for name in ASKED for side, outcome in sides], axis=0)
