"""Verdict rates of an evaluation, compared with registries on disk that have the same images."""

import numpy as np
import pytest
import torch
from support.generators import STORAGE, drawn_samples, spectrum_method

from attrib.generators.evaluation.generator_sets import GeneratorSet, make_set
from attrib.generators.evaluation.settings import SetSettings
from attrib.generators.evaluation.verdict_rates import (
    DEGRADATIONS,
    OUTCOMES,
    QUERY_DEGRADATIONS,
    verdict_rates,
    verdict_scores,
)
from attrib.generators.identify.verdicts import assess, judge_of
from attrib.generators.registry.registration import as_sources
from attrib.generators.registry.registry import new_registry, register
from attrib.generators.registry.settings import RegistryMethodSettings, VerdictSettings
from attrib.generators.signals.degradations import parse
from attrib.generators.signals.samples import recoded

pytestmark = pytest.mark.usefixtures("one_thread")
TRACES = ("nearest", "stripes", "checker")


@pytest.fixture(scope="module")
def sets() -> tuple[GeneratorSet, GeneratorSet]:
    """Three generators with photographs, and synthetic models."""
    torch.set_num_threads(1)
    images = {trace: drawn_samples(trace, range(24)) for trace in TRACES}
    generators = make_set("drawn", SetSettings(), images, real=drawn_samples(None, range(40)))
    models = {f"model {i}": drawn_samples("diagonal", range(30 * i, 30 * i + 20)) for i in range(2)}
    return generators, make_set("synthetic models", SetSettings(), models)


def test_rates_equal_those_of_registries_without_one_generator(sets, tmp_path):
    method, (generators, synthetic) = spectrum_method(), sets
    found = verdict_rates([method], generators, synthetic, seed=3)[method.name]
    halves = [np.random.default_rng([3, g]).permutation(generators.rows_of(g)) for g in range(3)]
    made_by, shares = RegistryMethodSettings(name="log-spectrum", uri="m"), {}
    for left_out in range(3):
        held = new_registry(str(tmp_path / str(left_out)), made_by, method, DEGRADATIONS, STORAGE)
        for g in range(3):
            if g != left_out:
                references = [generators.samples[i] for i in np.sort(halves[g][:12])]
                held, _ = register(held, TRACES[g], "generator", [references], method, STORAGE)
        models = [[synthetic.samples[i] for i in synthetic.rows_of(m)] for m in range(2)]
        held, _ = register(held, "pool", "synthetic", models, method, STORAGE)
        held, _ = register(held, "camera", "photographs", as_sources(generators.real, "photographs"), method, STORAGE)
        judge = judge_of(held, method, VerdictSettings(), STORAGE)
        for name in QUERY_DEGRADATIONS:
            for g in range(3):
                queries = [recoded(generators.samples[i], parse(name)) for i in np.sort(halves[g][12:])]
                verdicts = assess(queries, judge)[0]
                right = [v.generator == TRACES[g] for v in verdicts]
                counts = [sum(right), sum(v.generator is not None for v in verdicts) - sum(right)]
                counts += [sum(v.kind == kind for v in verdicts) for kind in ("unknown", "unassessable")]
                side = "left_out" if g == left_out else "registered"
                shares.setdefault((name, side, g), []).append(np.array(counts) / 12)
    for (name, side, g), expected in shares.items():
        of_generator = [found[name][side][outcome][g] for outcome in OUTCOMES]
        assert of_generator == pytest.approx(np.mean(expected, axis=0)), (name, side, g)
    # The comparison needs verdicts that differ.
    assert np.mean(found["none"]["registered"]["right"]) > 0.6
    assert found["none"]["left_out"]["right"] == [0, 0, 0]


def test_a_family_is_left_out_as_a_whole(sets):
    """If one twin were left out alone, an attribution to the other would count as wrong."""
    generators, synthetic = sets
    images = {trace: drawn_samples(trace, range(24)) for trace in TRACES}
    images["twin"] = drawn_samples("nearest", range(100, 124))
    families = [*TRACES, "nearest"]
    twins = make_set("twins", SetSettings(), images, generators.real, families)
    method = spectrum_method()
    found = verdict_rates([method], twins, synthetic, seed=0)[method.name]["none"]
    assert found["left_out"]["wrong"][0] == found["left_out"]["wrong"][3] == 0
    assert min(found["registered"]["right"][0], found["registered"]["right"][3]) > 0.6  # by the name of their family


def test_the_score_is_the_mean_of_right_and_unknown():
    rates = {
        "registered": {"right": [0.8, 0.6], "unknown": [0, 0]},
        "left_out": {"right": [0, 0], "unknown": [0.5, 0.1]},
    }
    halved = {side: {key: [v / 2 for v in row] for key, row in rows.items()} for side, rows in rates.items()}
    found = verdict_scores({"none": rates, "jpeg-85": halved})
    assert found == pytest.approx(np.array([(0.8 + 0.5) / 2 * 0.75, (0.6 + 0.1) / 2 * 0.75]))
