"""From what is measured to a summary of means with intervals, and to a table of them as text.

<output>/evaluation.json holds, beside what `summarise` returns, under "measured" what `attrib.generators.evaluation.protocol.evaluate_tier` found.
"""

import numpy as np

from attrib.common.tables import text_table
from attrib.generators.evaluation import measures
from attrib.generators.evaluation.measures import VALUES, family_numbers, loss, share_interval
from attrib.generators.evaluation.selection import choose, loss_line
from attrib.generators.evaluation.settings import LOSS_DEGRADATION

TOO_SMALL = "too small"  # in place of a value: an image is below the method's min_side_px after the degradation


def summarise(tiers: dict[str, dict], looks_at_trace: dict[str, bool], registered_as: dict[str, str | None]) -> dict:
    """Means with 95 % intervals over families of generators, and the choice.

    tiers: {tier: {generators, families, judged, ..., methods: {method: what evaluate_tier found}}}; looks_at_trace: {method: whether it may
    be shipped}; registered_as: {method: what a registry calls it, None: no registry can hold it}. Returns {looks_at_trace, registered_as,
    value_names, tiers: {tier: {..., methods: {method: {values, num_clusters, confusion, references, sets, degradations, min_side_px, loss, family_loss, verdicts: None where they are not measured}}}},
    shipped}, with {mean, low, high} in the place of each list of values and None where nothing was measured.
    """
    found = {}
    for name, tier in tiers.items():
        families = family_numbers(tier)
        methods = {method: _summary(measured, families) for method, measured in tier["methods"].items()}
        found[name] = {key: value for key, value in tier.items() if key != "methods"} | {"methods": methods}
    return {
        "looks_at_trace": looks_at_trace,
        "registered_as": registered_as,
        "value_names": VALUES,
        "tiers": found,
        "shipped": choose(tiers, looks_at_trace, registered_as),
    }


def format_table(summary: dict) -> str:
    """The summary as text: a block per tier with a line per method, then what is shipped."""
    lines = []
    for name, tier in summary["tiers"].items():
        shown = shown_values(tier)
        judged = "judged" if tier["judged"] else "not judged"
        lines.append(f"{name}: {len(tier['generators'])} generators, {tier['num_images']:,} images, {judged}")
        losses = ["loss", "family_loss"] if has_families(tier) else ["loss"]
        heads = [*(VALUES[value] for value in shown), *(name.replace("_", " ") for name in losses)]
        rows = [
            [
                method,
                *(_cell(found["values"].get(value), value) for value in shown),
                *(_lost(found[value]) for value in losses),
                "" if summary["looks_at_trace"][method] else "leak control",
            ]
            for method, found in tier["methods"].items()
        ]
        columns = {"method": "left", **dict.fromkeys(heads, "right"), "": "left"}
        lines.append(text_table(columns, rows, indent="  "))
        lines += [line for method, found in tier["methods"].items() for line in _verdict_lines(method, found)]
        lines.append("")
    lines.append(
        f"in brackets: 95 % intervals over families of generators; loss: of identification at {LOSS_DEGRADATION}, gallery degraded alike; family "
        "loss: where generators that differ in nothing but a seed count as one"
    )
    shipped = summary["shipped"]
    if shipped:
        lines += [f"shipped: {shipped['method']} ({shipped['registered_as']}): {shipped['reason']}"]
        lines += [f"  {loss_line(row)}" for row in shipped["losses"]]
        lines += [f"  minus its variant {row['method']}: {row['difference']:+.3f}" for row in shipped["variants"]]
        lines.append(f"criterion: {shipped['criterion']}")
    return "\n".join(lines)


def _verdict_lines(method: str, found: dict) -> list[str]:
    lines = []
    for degradation, sides in (found["verdicts"] or {}).items():
        said = [
            f"{side.replace('_', ' ')}: "
            + ", ".join(f"{share['mean']:.3f} {outcome}" for outcome, share in shares.items())
            for side, shares in sides.items()
        ]
        lines.append(f"  verdicts by {method}, images as {degradation}: {'; '.join(said)}")
    return lines


def has_families(tier: dict) -> bool:
    """Whether any two of its generators differ in nothing but a seed."""
    return len(set(tier["families"])) < len(tier["families"])


def shown_values(tier: dict) -> list[str]:
    """Values that any method of the tier has."""
    return [value for value in VALUES if any(found["values"].get(value) for found in tier["methods"].values())]


def _summary(measured: dict, families: np.ndarray) -> dict:
    table = np.array(measured["clusters"], np.int64)
    values = {name: share_interval(values, families) for name, values in measured["values"].items()}
    for name, measure, lowest in (("adjusted_rand", measures.adjusted_rand, -1.0), ("purity", measures.purity, 0.0)):
        values[name] = measures.table_interval(measure, table, families, (lowest, 1.0))._asdict()
    return {
        "values": values,
        "num_clusters": len(table),
        "confusion": measured["confusion"],
        "references": {name: _curve(curve, families) for name, curve in measured["references"].items()},
        "sets": {name: _curve(curve, families) for name, curve in measured["sets"].items()},
        "degradations": {
            name: found and {gallery: _curve(held, families) for gallery, held in found.items()}
            for name, found in measured["degradations"].items()
        },
        "min_side_px": measured["min_side_px"],
        "loss": loss(measured, families),
        "family_loss": loss(measured, families, "family_identification"),
        "verdicts": _verdicts(measured.get("verdicts"), families),
    }


def _verdicts(measured: dict | None, families: np.ndarray) -> dict | None:
    """As `verdict_rates` of one method, with an interval in the place of each list."""
    return measured and {
        name: {
            side: {outcome: share_interval(shares, families) for outcome, shares in outcomes.items()}
            for side, outcomes in sides.items()
        }
        for name, sides in measured.items()
    }


def _curve(curve: dict[str, list] | None, families: np.ndarray) -> dict[str, dict | None] | None:
    return curve and {step: share_interval(values, families) for step, values in curve.items()}


def _lost(found: dict | None) -> str:
    return TOO_SMALL if found is None else f"{found['mean']:+.3f}"


def _cell(found: dict | None, value: str) -> str:
    if found is None:
        return TOO_SMALL if value == "real_auroc" else "-"  # only that value is asked under a degradation
    bounds = [f"{found[end]:.2f}".replace("0.", ".", 1) for end in ("low", "high")]
    return f"{found['mean']:.3f} ({'-'.join(bounds)})"
