"""The summary of an evaluation: means with intervals, the selected method, and a table as text.

<output>/evaluation.json also has the results of protocol.evaluate_set, under "measured".
"""

import numpy as np

from attrib.common.formats import text_table
from attrib.generators.evaluation import measures
from attrib.generators.evaluation.measures import VALUES, family_numbers, loss, share_interval
from attrib.generators.evaluation.selection import choose, loss_line
from attrib.generators.evaluation.settings import LOSS_DEGRADATION

TOO_SMALL = "too small"  # shown if the degradation makes an image smaller than the method's min_side_px


def summarise(tiers: dict[str, dict], looks_at_trace: dict[str, bool], registered_as: dict[str, str | None]) -> dict:
    """Means with 95 % intervals over families of generators, and the selected method.

    tiers: {set name: {generators, families, judged, ..., methods: {method: result of evaluate_set}}}. looks_at_trace:
    {method: whether it may ship}. registered_as: {method: its name in a registry, None if no registry can hold it}.
    Returns {looks_at_trace, registered_as, value_names, tiers, shipped}; in tiers every list of values becomes
    {mean, low, high}, or None if not measured.
    """
    found = {}
    for name, tier in tiers.items():
        families = family_numbers(tier["families"])
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
    """The summary as text: a table per generator set, then the shipped method."""
    lines = []
    for name, tier in summary["tiers"].items():
        shown = shown_values(tier)
        judged = "judged" if tier["judged"] else "not judged"
        lines.append(f"{name}: {len(tier['generators'])} generators, {tier['num_images']:,} images, {judged}")
        losses = ["loss", "family_loss"] if len(set(tier["families"])) < len(tier["families"]) else ["loss"]
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
        for method, found in tier["methods"].items():
            for degradation, sides in (found["verdicts"] or {}).items():
                rates = "; ".join(f"{side.replace('_', ' ')}: {_rates(shares)}" for side, shares in sides.items())
                lines.append(f"  verdicts by {method}, images as {degradation}: {rates}")
        lines.append("")
    lines.append(
        f"in brackets: 95 % intervals over families of generators; loss: of identification at {LOSS_DEGRADATION}, "
        "gallery degraded alike; family loss: generators that differ only by a seed count as one"
    )
    shipped = summary["shipped"]
    if shipped:
        lines += [f"shipped: {shipped['method']} ({shipped['registered_as']}): {shipped['reason']}"]
        lines += [f"  {loss_line(row)}" for row in shipped["losses"]]
        lines += [f"  minus its variant {row['method']}: {row['difference']:+.3f}" for row in shipped["variants"]]
        lines.append(f"criterion: {shipped['criterion']}")
    return "\n".join(lines)


def _rates(shares: dict[str, dict]) -> str:
    return ", ".join(f"{share['mean']:.3f} {outcome}" for outcome, share in shares.items())


def shown_values(tier: dict) -> list[str]:
    """Names of the values that at least one method has on this generator set."""
    return [value for value in VALUES if any(found["values"].get(value) for found in tier["methods"].values())]


def _summary(measured: dict, families: np.ndarray) -> dict:
    table = np.array(measured["clusters"], np.int64)
    found = {
        name: _intervals(measured.get(name), families)
        for name in ("values", "references", "sets", "degradations", "verdicts")
    }
    for name, measure, lowest in (("adjusted_rand", measures.adjusted_rand, -1.0), ("purity", measures.purity, 0.0)):
        found["values"][name] = measures.table_interval(measure, table, families, (lowest, 1.0))._asdict()
    return found | {
        "num_clusters": len(table),
        "confusion": measured["confusion"],
        "min_side_px": measured["min_side_px"],
        "loss": loss(measured, families),
        "family_loss": loss(measured, families, "family_identification"),
    }


def _intervals(value: dict | list | None, families: np.ndarray) -> dict | None:
    """The nested dictionary with {mean, low, high} in place of each list of one value per generator."""
    if isinstance(value, dict):
        return {key: _intervals(item, families) for key, item in value.items()}
    return share_interval(value, families)


def _lost(found: dict | None) -> str:
    return TOO_SMALL if found is None else f"{found['mean']:+.3f}"


def _cell(found: dict | None, value: str) -> str:
    if found is None:
        return TOO_SMALL if value == "real_auroc" else "-"  # the only value that needs a degradation
    bounds = [f"{found[end]:.2f}".replace("0.", ".", 1) for end in ("low", "high")]
    return f"{found['mean']:.3f} ({'-'.join(bounds)})"
