"""The evaluation of fingerprint methods: measures against methods of which every answer is known and loops over the definitions, then what is
shipped by them, and the page."""

import json
import re

import numpy as np
import pytest
from evaluation_samples import NUM_IMAGES, Blind, MeanColour, Noise, coloured_tier, settings

from attrib.errors import AttribError
from attrib.generators import measures
from attrib.generators.evaluation import Embedded, cluster_cut, divisions, evaluate_tier
from attrib.generators.evaluation_charts import Steps, step_chart
from attrib.generators.evaluation_page import render_page
from attrib.generators.evaluation_summary import choose, format_table, summarise

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(method, tier, cut=0.9, **changes) -> dict:
    return evaluate_tier(method, Embedded(method, tier), cut, settings(**changes))


def test_a_method_that_knows_has_everything_right():
    found = measured(MeanColour(), coloured_tier())
    assert max(found["values"].pop("false_positive_rate")) < 0.05
    for name, values in found["values"].items():
        assert values == pytest.approx([1.0] * 3), name
    assert found["confusion"] == np.eye(3).tolist()
    assert sorted(found["clusters"]) == sorted((NUM_IMAGES * np.eye(3, dtype=int)).tolist())
    assert found["references"] == {"1": [1.0] * 3, "6": [1.0] * 3}, "50 references leave no queries"
    assert found["sets"] == {"1": [1.0] * 3, "3": [1.0] * 3}, "no generator has 20 queries"
    assert found["degradations"]["jpeg-85"]["clean"] == {"identification": [1.0] * 3, "rejection_auroc": [1.0] * 3}
    assert found["degradations"]["resize-0.5"] is None, "16 px are too small for the method"


def test_a_blind_method_identifies_nothing_and_rejects_by_chance():
    found = measured(Blind(), coloured_tier())
    assert found["values"]["identification"] == [0.0] * 3
    assert found["values"]["verification_auc"] == found["values"]["rejection_auroc"] == [0.5] * 3
    assert found["values"]["oscr"] == found["values"]["true_positive_rate"] == [0.0] * 3
    assert np.shape(found["clusters"]) == (1, 3)


def test_measures_are_those_of_loops_over_the_divisions():
    tier, method = coloured_tier(), Noise()
    vectors = method.embed(tier.samples)
    found = measured(method, tier)["values"]
    identified, rejection, oscr = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3))
    for number, question in enumerate(divisions(tier, 6, seed=0)):
        means = [vectors[rows].mean(axis=0) for rows in question.references]
        means = np.stack([mean / np.linalg.norm(mean) for mean in means])
        scores = vectors[question.queries] @ means.T
        right = scores.argmax(axis=1) == question.truth
        identified[number] = [right[question.truth == g].mean() for g in range(3)]
        for unknown in range(3):
            known = [g for g in range(3) if g != unknown]
            is_known = question.truth != unknown
            others = scores[:, known]
            correct = np.array(known)[others.argmax(axis=1)] == question.truth
            highest = others.max(axis=1)
            rejection[number, unknown] = measures.auc(highest[is_known], highest[~is_known])
            oscr[number, unknown] = measures.oscr(highest[is_known], correct[is_known], highest[~is_known])
    assert found["identification"] == pytest.approx(identified.mean(axis=0).tolist(), abs=1e-6)
    assert 0 < np.mean(found["identification"]) < 1, "the test asks something"
    assert found["rejection_auroc"] == pytest.approx(rejection.mean(axis=0).tolist(), abs=1e-6)
    assert found["oscr"] == pytest.approx(oscr.mean(axis=0).tolist(), abs=1e-6)


def test_divisions_use_every_image_once_and_differ():
    tier = coloured_tier()
    seen = []
    for question in divisions(tier, 6, seed=0):
        assert [len(rows) for rows in question.references] == [6, 6, 6]
        for g, rows in enumerate(question.references):
            queries = question.queries[question.truth == g]
            assert sorted([*rows, *queries]) == tier.rows_of(g).tolist()
        seen.append(question.queries.tolist())
    assert len({tuple(queries) for queries in seen}) == 3
    assert [q.queries.tolist() for q in divisions(tier, 6, seed=0)] == seen
    assert [q.queries.tolist() for q in divisions(tier, 6, seed=1)] != seen


def test_the_same_pictures_are_never_on_both_sides():
    tier = coloured_tier(same_content=True)
    for question in divisions(tier, 6, seed=0):
        shown = {row % NUM_IMAGES for rows in question.references for row in rows}
        assert len(shown) == 6 and not shown & {row % NUM_IMAGES for row in question.queries}


def test_a_twin_counts_for_the_family_and_is_taken_away_with_it():
    """Red and green become one family whose members a method cannot tell apart."""
    tier = coloured_tier(families=("warm", "warm", "cold"))

    class Warm(MeanColour):
        def embed(self, samples):
            return super().embed(samples) @ np.array([[1, 0], [1, 0], [0, 1]], np.float32)

    values = measured(Warm(), tier)["values"]
    assert np.mean(values["identification"][:2]) < 0.8
    assert values["family_identification"] == [1.0] * 3
    assert max(values["rejection_auroc"][:2]) < 0.9, "its twin is still registered"
    assert values["family_rejection_auroc"] == pytest.approx([1.0] * 3, abs=1e-6)
    assert values["family_rejection_auroc"][2] == values["rejection_auroc"][2]


def test_only_judged_tiers_go_through_the_grid():
    assert measured(MeanColour(), coloured_tier(judged=False, real=False))["degradations"] == {}
    assert "real_auroc" not in measured(MeanColour(), coloured_tier(real=False))["values"]


def test_what_cannot_be_measured_is_an_error_with_a_remedy():
    with pytest.raises(AttribError, match=r"red of tier 'colours' has 10 images.*lower num_references"):
        measured(MeanColour(), coloured_tier(num_images=10))

    class Broken(MeanColour):
        def embed(self, samples):
            return np.full((len(samples), 2), np.nan, np.float32)

    with pytest.raises(AttribError, match="not finite on tier 'colours'"):
        measured(Broken(), coloured_tier())

    class Large(MeanColour):
        min_side_px = 64

    with pytest.raises(AttribError, match="below the 64 px that mean-colour needs"):
        measured(Large(), coloured_tier())


def test_vectors_are_made_once_for_methods_that_embed_alike():
    calls = []

    class Counted(MeanColour):
        def embed(self, samples):
            calls.append(len(samples))
            return super().embed(samples)

    embedded = Embedded(Counted(), coloured_tier())
    for _ in range(2):
        evaluate_tier(embedded.method, embedded, 0.9, settings())
    assert sum(calls) == 2 * 3 * NUM_IMAGES + 8, "untouched and JPEG once each, the real images once"


def test_the_cut_separates_generators_of_another_tier():
    assert 0.3 < cluster_cut(Embedded(MeanColour(), coloured_tier())) < 1.0


# What is shipped, and the page.


def tiers_of(values: dict[str, dict[str, tuple[float, float]]], judged=("first", "second")) -> dict:
    """{tier: {method: (identification, rejection)}} as the job has it, each value the same for three generators."""
    return {
        tier: {
            "generators": ["a", "b", "c"],
            "families": ["a", "b", "c"],
            "judged": tier in judged,
            "note": "<i>what to know</i>",
            "same_content": False,
            "num_images": 48,
            "num_real": 8,
            "formats": {"generated": "PNG", "real": "JPEG"},
            "methods": {
                method: {
                    "values": {
                        "identification": [identification] * 3,
                        "rejection_auroc": [rejection] * 3,
                        "real_auroc": None,
                    },
                    "confusion": np.eye(3).tolist(),
                    "clusters": [[8, 0, 0], [0, 8, 8]],
                    "references": {"1": [identification / 2] * 3, "10": [identification] * 3},
                    "sets": {"1": [identification] * 3},
                    "degradations": {
                        "jpeg-85": {
                            kind: {"identification": [identification - 0.05] * 3, "rejection_auroc": [0.6] * 3}
                            for kind in ("clean", "matched")
                        },
                        "resize-0.5": None,
                    },
                }
                for method, (identification, rejection) in methods.items()
            },
        }
        for tier, methods in values.items()
    }


LOOKS = {"extractor": True, "lda": True, "spectrum": True, "content-only": False}


def chosen(values, looks=LOOKS, **options):
    return choose(tiers_of(values, **options), looks)


def test_the_extractor_is_shipped_if_it_beats_every_trace_based_control_everywhere():
    winning = {"extractor": (0.9, 0.8), "lda": (0.8, 0.7), "spectrum": (0.85, 0.75), "content-only": (1.0, 1.0)}
    found = chosen({"first": winning, "second": winning})
    assert found["method"] == "extractor" and "beats every control" in found["reason"]
    assert [row["loss"]["mean"] for row in found["losses"]] == pytest.approx([0.05, 0.05])
    versus = {(row["tier"], row["value"], row["versus"]): row["mean"] for row in found["comparisons"]}
    assert versus["first", "identification", "lda"] == pytest.approx(0.1)
    assert len(versus) == 2 * 2 * 2, "the leak control is no rival"


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_tie_anywhere_ships_the_best_mean(place, value):
    winning = {"extractor": (0.9, 0.8), "lda": (0.6, 0.7), "spectrum": (0.5, 0.5), "content-only": (1.0, 1.0)}
    values = {"first": dict(winning), "second": dict(winning)}
    equal = list(winning["lda"])
    equal[value] = winning["extractor"][value]
    values[place]["lda"] = tuple(equal)
    found = chosen(values)
    assert found["method"] == "extractor", "it still has the highest mean"
    assert f"does not beat lda in {('identified', 'rejection AUROC')[value]} on {place}" in found["reason"]


def test_a_control_that_is_better_on_the_whole_is_shipped():
    values = {"extractor": (0.9, 0.8), "lda": (0.95, 0.9), "spectrum": (0.5, 0.5), "content-only": (1.0, 1.0)}
    assert chosen({"first": values, "second": values})["method"] == "lda"
    assert chosen({"first": values, "second": values}, {**LOOKS, "lda": False})["method"] == "extractor"


def test_tiers_that_are_not_judged_decide_nothing():
    good = {"extractor": (0.9, 0.9), "lda": (0.5, 0.5), "spectrum": (0.5, 0.5), "content-only": (0.5, 0.5)}
    bad = {"extractor": (0.1, 0.1), "lda": (0.9, 0.9), "spectrum": (0.5, 0.5), "content-only": (0.5, 0.5)}
    found = chosen({"first": good, "second": bad}, judged=("first",))
    assert found["method"] == "extractor" and {row["tier"] for row in found["comparisons"]} == {"first"}
    assert chosen({"first": good}, judged=()) is None


def test_without_an_extractor_the_best_control_is_shipped():
    found = chosen({"first": {"lda": (0.7, 0.7), "content-only": (1, 1)}}, {"lda": True, "content-only": False})
    assert found["method"] == "lda" and "extractor" not in found["reason"]


def test_table_and_page_hold_every_method_and_say_what_is_shipped():
    values = {"extractor": (0.9, 0.8), "lda": (0.8, 0.7), "spectrum": (0.85, 0.75), "<b>content</b>": (0.4, 0.5)}
    looks = {name: not name.startswith("<") for name in values}
    summary = summarise(tiers_of({"colours": values}, judged=("colours",)), looks)
    table = format_table(summary)
    assert "shipped: extractor: it beats every control" in table
    assert "0.900 (.90-.90)" in table and "leak control" in table and "less than 0.10" in table
    assert "real AUROC" not in table, "no method has it"
    record = {"settings": settings().model_dump(mode="json"), "versions": {"python": "3"}}
    page = render_page(summary, [coloured_tier()], "Which <one>", record)
    assert "Shipped: extractor" in page and "Which &lt;one&gt;" in page and "&lt;b&gt;content&lt;/b&gt;" in page
    assert "<b>content</b>" not in page and "<i>what to know" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is fetched"
    assert page.count("data:image/png;base64,") == 3, "a strip of each generator"
    assert json.loads(json.dumps(summary)) == summary


def test_a_line_is_cut_where_nothing_was_measured():
    chart = step_chart([Steps("steps", ["a", "b", "c", "d"], {"one": [0.1, None, 0.3, 0.4]}, chance=0.2)])
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 3
    assert 'stroke-dasharray="4 4"' in chart
