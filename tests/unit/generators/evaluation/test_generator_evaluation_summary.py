"""Selection of the shipped method and its reason, the table, and the page of an evaluation."""

import dataclasses
import json
import re

import numpy as np
import pytest
from support.evaluation import coloured_set, settings

from attrib.generators.evaluation import measures
from attrib.generators.evaluation import page as evaluation_page
from attrib.generators.evaluation.page import render_page
from attrib.generators.evaluation.selection import choose
from attrib.generators.evaluation.summary import format_table, summarise
from attrib.generators.evaluation.verdict_rates import OUTCOMES

pytestmark = pytest.mark.usefixtures("one_thread")


def sets_of(values: dict[str, dict[str, tuple[float, float]]], judged=("first", "second")) -> dict:
    """{set: {method: (identification, rejection)}} in the form of the job, equal for three generators."""
    return {
        name: {
            "generators": ["a", "b", "c"],
            "families": ["a", "b", "c"],
            "judged": name in judged,
            "note": "<i>what to know</i>",
            "same_content": False,
            "num_images": 48,
            "num_real": 8,
            "real_history": None,
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
                    "references": {
                        "none": {"1": [identification / 2] * 3, "10": [identification] * 3},
                        "jpeg-85": {"1": [identification / 4] * 3, "10": [identification / 2] * 3},
                    },
                    "sets": {"none": {"1": [identification] * 3}, "jpeg-85": {"1": [identification / 2] * 3}},
                    "degradations": {
                        "jpeg-85": {
                            "clean": {"identification": [identification - 0.3] * 3, "rejection_auroc": [0.5] * 3},
                            "matched": {"identification": [identification - 0.05] * 3, "rejection_auroc": [0.6] * 3},
                        },
                        "resize-0.5": None,
                    },
                    "min_side_px": 32,
                }
                for method, (identification, rejection) in methods.items()
            },
        }
        for name, methods in values.items()
    }


NOTHING = {outcome: [0.0] * 3 for outcome in OUTCOMES}
LOOKS = {"extractor": True, "lda": True, "spectrum": True, "content-only": False}


def held(looks: dict[str, bool], *not_held: str) -> dict[str, str | None]:
    """The registry name of each method that uses the trace."""
    return {name: f"name: {name}" if looks[name] and name not in not_held else None for name in looks}


def summary_of(sets: dict) -> dict:
    """The summary of sets whose methods can all be registered."""
    methods = next(iter(sets.values()))["methods"]
    return summarise(sets, dict.fromkeys(methods, True), {name: name for name in methods})


def page_of(summary: dict, generators=None, title: str = "page", **options) -> str:
    record = {"settings": settings(**options).model_dump(mode="json"), "versions": {}}
    return render_page(summary, [generators or coloured_set()], title, record)


def chosen(values, looks=None, not_held=(), **options):
    looks = looks or {name: name != "content-only" for name in next(iter(values.values()))}
    return choose(sets_of(values, **options), looks, held(looks, *not_held))


def test_an_extractor_that_beats_every_control_is_shipped():
    winning = {"extractor": (0.9, 0.8), "lda": (0.8, 0.7), "spectrum": (0.85, 0.75), "content-only": (1.0, 1.0)}
    found = chosen({"first": winning, "second": winning})
    assert found["method"] == "extractor" and "beats every control" in found["reason"]
    assert found["registered_as"] == "name: extractor" and found["ahead"] is None and found["variants"] == []
    assert [row["loss"]["mean"] for row in found["losses"]] == pytest.approx([0.05, 0.05]), "of the matched gallery"
    assert "at jpeg-85, references degraded alike, it loses 0.050 of identification on second" in found["reason"]
    versus = {(row["tier"], row["value"], row["versus"]): row["mean"] for row in found["comparisons"]}
    assert versus["first", "identification", "lda"] == pytest.approx(0.1)
    assert len(versus) == 2 * 2 * 2, "leak controls are not compared"


def test_a_better_method_that_no_registry_can_hold_is_named():
    values = {"extractor": (0.8, 0.8), "lda": (0.7, 0.7), "spectrum": (0.95, 0.85), "content-only": (1.0, 1.0)}
    found = chosen({"first": values, "second": values}, not_held=("spectrum",))
    assert found["method"] == "extractor" and "does not beat spectrum in identified on first" in found["reason"]
    assert found["ahead"] == {"method": "spectrum", "difference": pytest.approx(0.1)}
    assert "spectrum is ahead of it by 0.100 in that mean, but no registry can hold it" in found["reason"]
    assert chosen({"first": values, "second": values})["method"] == "spectrum"
    assert chosen({"first": values}, not_held=tuple(values)) is None


def test_variants_of_the_extractor_are_not_controls():
    values = {"extractor": (0.9, 0.8), "extractor-untrained": (0.95, 0.85), "lda": (0.8, 0.7)}
    found = chosen({"first": values, "second": values}, not_held=("extractor-untrained",))
    assert found["method"] == "extractor" and "beats every control" in found["reason"]
    assert found["variants"] == [{"method": "extractor-untrained", "difference": pytest.approx(-0.05)}]
    assert found["ahead"]["method"] == "extractor-untrained"
    lost = chosen({"first": values | {"lda": (0.99, 0.99)}}, judged=("first",))
    assert lost["method"] == "lda" and lost["variants"] == []


def with_verdicts(sets: dict, **right: float) -> dict:
    """Adds verdicts: the given share of right ones for registered generators, all unknown for left-out ones."""
    for own in sets.values():
        for method, share in right.items():
            sides = {
                "registered": NOTHING | {"right": [share] * 3, "unknown": [1 - share] * 3},
                "left_out": NOTHING | {"unknown": [1.0] * 3},
            }
            own["methods"][method.replace("_", "-")]["verdicts"] = {"none": sides, "jpeg-85": sides}
    return sets


def test_the_scoring_with_better_verdicts_is_shipped():
    values = {"extractor": (0.9, 0.7), "extractor-cosine": (0.9, 0.8), "lda": (0.95, 0.6)}
    looks = dict.fromkeys(values, True)

    def choice(**right):
        return choose(with_verdicts(sets_of({"first": values}, judged=("first",)), **right), looks, held(looks))

    assert choice()["method"] == "extractor-cosine" and choice()["verdict_scores"] == {}
    found = choice(extractor=0.6, extractor_cosine=0.4)
    assert found["method"] == "extractor"
    assert found["verdict_scores"] == pytest.approx({"extractor": 0.8, "extractor-cosine": 0.7})
    assert (
        "it replaces extractor-cosine, whose verdicts are right less often (0.700; the difference is 0.100"
        in found["reason"]
    )
    assert found["replaced"]["method"] == "extractor-cosine" and "beyond chance" in found["reason"]
    assert choice(extractor=0.4, extractor_cosine=0.6)["method"] == "extractor-cosine"
    equal = choice(extractor=0.5, extractor_cosine=0.5)
    assert equal["method"] == "extractor-cosine" and equal["replaced"] is None
    # Verdicts do not replace a control that wins by the deciding values.
    values["lda"] = (0.99, 0.99)
    assert choice(extractor=0.6, extractor_cosine=0.4)["method"] == "lda"


def test_verdicts_are_in_the_table_and_on_the_page():
    values = {"extractor": (0.9, 0.7), "lda": (0.8, 0.6)}
    sets = with_verdicts(sets_of({"colours": values}, judged=("colours",)), extractor=0.625)
    summary = summary_of(sets)
    lines = [line for line in format_table(summary).splitlines() if "verdicts by" in line]
    assert len(lines) == 2 and lines[0].startswith(
        "  verdicts by extractor, images as none: registered: 0.625 right, 0.000 wrong"
    )
    page = page_of(summary)
    assert page.count("Verdicts of registries that each lack one family") == 1
    assert page.count("<td>left out</td>") == page.count("<td>registered</td>") == 2 and ">0.625<" in page


def test_intervals_of_the_summary_are_over_families():
    sets = sets_of({"first": {"extractor": (0.5, 0.5), "lda": (0.3, 0.3)}}, judged=("first",))
    sets["first"] |= {"families": ["twins", "twins", "alone"]}
    families = np.array([1, 1, 0])
    own = sets["first"]["methods"]["extractor"]
    own["values"]["identification"] = [0.5, 0.5, 0.6]
    own["clusters"] = [[80, 70, 75], [1, 2, 1]]  # an interval over generators would be narrow
    own["degradations"]["jpeg-85"]["matched"]["identification"] = [0.5, 0.5, 0.58]
    summary = summary_of(sets)
    found = summary["tiers"]["first"]["methods"]["extractor"]
    table = np.array(own["clusters"])
    against = next(row for row in summary["shipped"]["comparisons"] if row["value"] == "identification")
    for shown, expected in (
        (found["values"]["identification"], measures.mean_interval(np.array([0.5, 0.5, 0.6]), families, (0.0, 1.0))),
        (found["loss"], measures.mean_interval(np.array([0.0, 0.0, 0.02]), families)),
        ({key: against[key] for key in found["loss"]}, measures.mean_interval(np.array([0.2, 0.2, 0.3]), families)),
        (found["values"]["purity"], measures.table_interval(measures.purity, table, families, (0.0, 1.0))),
    ):
        assert shown == pytest.approx(expected._asdict()) and expected.low < expected.mean


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("value", [0, 1])
def test_with_a_tie_the_best_mean_is_shipped(place, value):
    winning = {"extractor": (0.9, 0.8), "lda": (0.6, 0.7), "spectrum": (0.5, 0.5), "content-only": (1.0, 1.0)}
    values = {"first": dict(winning), "second": dict(winning)}
    equal = list(winning["lda"])
    equal[value] = winning["extractor"][value]
    values[place]["lda"] = tuple(equal)
    found = chosen(values)
    assert found["method"] == "extractor", "it still has the highest mean"
    assert f"does not beat lda in {('identified', 'rejection AUROC')[value]} on {place}" in found["reason"]


def test_a_better_control_is_shipped():
    values = {"extractor": (0.9, 0.8), "lda": (0.95, 0.9), "spectrum": (0.5, 0.5), "content-only": (1.0, 1.0)}
    assert chosen({"first": values, "second": values})["method"] == "lda"
    assert chosen({"first": values, "second": values}, LOOKS | {"lda": False})["method"] == "extractor"


def test_sets_that_are_not_judged_decide_nothing():
    good = {"extractor": (0.9, 0.9), "lda": (0.5, 0.5), "spectrum": (0.5, 0.5), "content-only": (0.5, 0.5)}
    bad = {"extractor": (0.1, 0.1), "lda": (0.9, 0.9), "spectrum": (0.5, 0.5), "content-only": (0.5, 0.5)}
    found = chosen({"first": good, "second": bad}, judged=("first",))
    assert found["method"] == "extractor" and {row["tier"] for row in found["comparisons"]} == {"first"}
    assert chosen({"first": good}, judged=()) is None


def test_without_an_extractor_the_best_control_is_shipped():
    found = chosen({"first": {"lda": (0.7, 0.7), "content-only": (1, 1)}})
    assert found["method"] == "lda" and "does not beat" not in found["reason"]


def test_table_and_page_show_every_method_and_the_shipped_one():
    values = {"extractor": (0.9, 0.8), "extractor-x": (0.92, 0.8), "lda": (0.8, 0.7), "<b>content</b>": (0.4, 0.5)}
    looks = {name: not name.startswith("<") for name in values}
    summary = summarise(sets_of({"colours": values}, judged=("colours",)), looks, held(looks, "extractor-x"))
    table = format_table(summary)
    assert "shipped: extractor (name: extractor): it beats every control" in table and "criterion: " in table
    assert "extractor-x is ahead of it by 0.010" in table and "minus its variant extractor-x: -0.010" in table
    assert "0.900 (.90-.90)" in table and "leak control" in table and "less than 0.10" in table
    assert "real AUROC" not in table, "no method has it"
    page = " ".join(page_of(summary, title="Which <one>").split())
    assert "Shipped: extractor" in page and "Which &lt;one&gt;" in page and "&lt;b&gt;content&lt;/b&gt;" in page
    assert "<b>content</b>" not in page and "<i>what to know" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "the page loads nothing"
    assert page.count("data:image/png;base64,") == 3, "a strip of each generator"
    assert "extractor-x, which no registry can hold, is ahead by 0.010" in page
    assert "differs from extractor-x by \N{MINUS SIGN}0.010" in page and summary["shipped"]["criterion"] in page
    assert "resize-0.5 for extractor (32 px), extractor-x (32 px)" in page, "the reason why it was not measured"
    assert json.loads(json.dumps(summary)) == summary


def test_curves_of_original_and_degraded_images_are_shown_side_by_side(monkeypatch):
    drawn = []
    steps_figure = evaluation_page.steps_figure
    monkeypatch.setattr(
        evaluation_page, "steps_figure", lambda panels, **size: drawn.append(panels) or steps_figure(panels, **size)
    )
    page = page_of(summary_of(sets_of({"colours": {"lda": (0.8, 0.7)}})), reference_counts=[1, 10, 50])
    assert "Identified, by references<" in page and "The same, both sides jpeg-85<" in page
    original, degraded = drawn[0]
    assert original.labels == degraded.labels == ["1", "10"] and original.chance == 1 / 3
    assert original.lines == {"lda": pytest.approx([0.4, 0.8])} and degraded.lines == {"lda": pytest.approx([0.2, 0.4])}
    clean, matched = drawn[1]
    assert clean.labels == ["jpeg-85", "resize-0.5"] and clean.lines == {"lda": [pytest.approx(0.5), None]}
    assert matched.lines == {"lda": [pytest.approx(0.75), None]}
    assert "Not shown: 50, which would leave a generator with fewer than 5 queries" in page
    assert "by images per set" not in page, "a curve needs two steps"


def test_losses_are_shown_with_and_without_families():
    sets = sets_of({"colours": {"extractor": (0.5, 0.5)}}, judged=("colours",))
    sets["colours"]["families"] = ["twins", "twins", "alone"]
    own = sets["colours"]["methods"]["extractor"]
    own["values"]["family_identification"] = [1.0, 1.0, 0.9]
    for held in own["degradations"]["jpeg-85"].values():
        held["family_identification"] = [0.99, 0.98, 0.9]
    own["degradations"]["jpeg-85"]["matched"]["identification"] = [0.3, 0.3, 0.3]
    summary = summary_of(sets)
    found = summary["tiers"]["colours"]["methods"]["extractor"]
    assert (found["loss"]["mean"], found["family_loss"]["mean"]) == pytest.approx((0.2, 0.01))
    table = format_table(summary)
    assert "family loss" in table and re.search(r"\+0\.200 +\+0\.010", table)
    assert "loses 0.200 at jpeg-85, NOT less than 0.10; 0.010 of family identification" in table
    twins = dataclasses.replace(coloured_set(), families=("twins", "twins", "alone"))
    page = page_of(summary, twins)
    assert (
        "differ only by a seed count as one, it loses 0.010" in page and '<th class="number">family loss</th>' in page
    )


def test_a_value_that_cannot_be_measured_is_marked():
    sets = sets_of({"colours": {"lda": (0.8, 0.7), "other": (0.8, 0.7)}})
    sets["colours"]["methods"]["lda"]["values"]["real_auroc"] = [0.9] * 3
    sets["colours"]["methods"]["other"]["degradations"]["jpeg-85"] = None
    summary = summary_of(sets)
    other = next(line for line in format_table(summary).splitlines() if line.startswith("  other"))
    assert other.count("too small") == 2, "real AUROC and loss"
    assert page_of(summary).count(">too small<") == 2
