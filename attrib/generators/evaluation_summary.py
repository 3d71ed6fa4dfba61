"""From values per generator to a table with intervals, and to what is shipped.

<output>/evaluation.json holds, beside what `summarise` returns, under "measured" what `attrib.generators.evaluation.evaluate_tier` found.
"""

import numpy as np

from attrib.generators import measures

VALUES = {
    "identification": "identified",
    "f1": "macro-F1",
    "family_identification": "family identified",
    "verification_auc": "verification AUC",
    "true_positive_rate": "TPR",
    "false_positive_rate": "FPR",
    "rejection_auroc": "rejection AUROC",
    "oscr": "OSCR",
    "family_rejection_auroc": "family rejection",
    "real_auroc": "real AUROC",
    "adjusted_rand": "ARI",
    "purity": "purity",
}
DECIDING = ("identification", "rejection_auroc")  # on the judged tiers, of the method that is shipped
CELL_CHARS = 18  # of the text table
CANDIDATE = "extractor"
MAX_LOSS, LOSS_DEGRADATION = 0.10, "jpeg-85"  # of identification, with a gallery degraded alike


def summarise(tiers: dict[str, dict], looks_at_trace: dict[str, bool]) -> dict:
    """Means with 95 % intervals over generators, and the choice.

    tiers: {tier: {generators, families, judged, ..., methods: {method: what evaluate_tier found}}}; looks_at_trace: {method: whether it may
    be shipped}. Returns {tiers: {tier: {..., methods: {method: {values, num_clusters, references, sets, degradations, loss}}}}, shipped}, with
    {mean, low, high} in the place of each list of values and None where nothing was measured.
    """
    found = {}
    for name, tier in tiers.items():
        methods = {method: _summary(measured) for method, measured in tier["methods"].items()}
        found[name] = {key: value for key, value in tier.items() if key != "methods"} | {"methods": methods}
    return {
        "looks_at_trace": looks_at_trace,
        "value_names": VALUES,
        "tiers": found,
        "shipped": choose(tiers, looks_at_trace),
    }


def choose(tiers: dict[str, dict], looks_at_trace: dict[str, bool]) -> dict | None:
    """What is shipped, and why: {method, reason, scores, comparisons, losses}. None where no tier is judged.

    The trained extractor, if it beats every other method that looks at the trace in every deciding value on every judged tier; else the
    method with the highest mean of those values, the earlier in the table of two equals. comparisons: the shipped method against each
    other one, [{tier, value, versus, mean, low, high}], differences paired over generators; losses: [{tier, loss}] of matched JPEGs.
    """
    judged = [name for name, tier in tiers.items() if tier["judged"]]
    candidates = [method for method, looks in looks_at_trace.items() if looks]
    if not judged or not candidates:
        return None
    places = [(tier, value) for tier in judged for value in DECIDING]
    values = {method: [_values(tiers, tier, method, value) for tier, value in places] for method in candidates}
    scores = {method: float(np.mean([np.nanmean(v) for v in found])) for method, found in values.items()}
    others = [method for method in candidates if method != CANDIDATE]
    lost = [
        f"{other} in {VALUES[value]} on {tier} ({_mean(values[other][i]):.3f} against {_mean(values[CANDIDATE][i]):.3f})"
        for i, (tier, value) in enumerate(places)
        for other in others
        if CANDIDATE in values and not _mean(values[CANDIDATE][i]) > _mean(values[other][i])
    ]
    if CANDIDATE in values and not lost:
        shipped = CANDIDATE
        reason = (
            "it beats every control that looks at the trace in identification and in rejection on every judged tier"
        )
    else:
        shipped = max(candidates, key=lambda method: scores[method])
        among = "of the methods that look at the trace it has the highest mean of identification and rejection over the judged tiers"
        behind = f"; the extractor does not beat {'; '.join(lost)}" if lost else ""
        reason = f"{among} ({scores[shipped]:.3f}){behind}"
    return {
        "method": shipped,
        "reason": reason,
        "scores": scores,
        "comparisons": [
            {"tier": tier, "value": value, "versus": other}
            | measures.mean_interval(values[shipped][i] - values[other][i])._asdict()
            for i, (tier, value) in enumerate(places)
            for other in candidates
            if other != shipped
        ],
        "losses": [{"tier": tier, "loss": _loss(tiers[tier]["methods"][shipped])} for tier in judged],
    }


def format_table(summary: dict) -> str:
    """The summary as text: a block per tier with a line per method, then what is shipped."""
    lines = []
    for name, tier in summary["tiers"].items():
        shown = _shown_values(tier)
        judged = "judged" if tier["judged"] else "not judged"
        lines.append(f"{name}: {len(tier['generators'])} generators, {tier['num_images']:,} images, {judged}")
        wide = max(len(method) for method in tier["methods"])
        heads = [VALUES[value].rjust(CELL_CHARS) for value in shown]
        lines.append(" ".join([f"  {'method':{wide}}", *heads, "loss".rjust(7)]))
        for method, found in tier["methods"].items():
            cells = [_cell(found["values"].get(value)).rjust(CELL_CHARS) for value in shown]
            loss = "-" if found["loss"] is None else f"{found['loss']['mean']:+.3f}"
            mark = "" if summary["looks_at_trace"][method] else "  leak control"
            lines.append(" ".join([f"  {method:{wide}}", *cells, loss.rjust(7)]) + mark)
        lines.append("")
    lines.append(
        f"in brackets: 95 % intervals over generators; loss: of identification at {LOSS_DEGRADATION}, gallery degraded alike"
    )
    if summary["shipped"]:
        lines.append(f"shipped: {summary['shipped']['method']}: {summary['shipped']['reason']}")
        lines += [f"  {_loss_line(row)}" for row in summary["shipped"]["losses"]]
    return "\n".join(lines)


def _loss_line(row: dict) -> str:
    if row["loss"] is None:
        return f"{row['tier']}: not measured at {LOSS_DEGRADATION}"
    mean = row["loss"]["mean"]
    return f"{row['tier']}: loses {mean:.3f} at {LOSS_DEGRADATION}, {'less' if mean < MAX_LOSS else 'NOT less'} than {MAX_LOSS:.2f}"


def _shown_values(tier: dict) -> list[str]:
    """Values that any method of the tier has."""
    return [value for value in VALUES if any(found["values"].get(value) for found in tier["methods"].values())]


def _summary(measured: dict) -> dict:
    table = np.array(measured["clusters"], np.int64)
    values = {name: _interval(values) for name, values in measured["values"].items()}
    for name, measure in (("adjusted_rand", measures.adjusted_rand), ("purity", measures.purity)):
        values[name] = measures.table_interval(measure, table)._asdict()
    return {
        "values": values,
        "num_clusters": len(table),
        "confusion": measured["confusion"],
        "references": {count: _interval(values) for count, values in measured["references"].items()},
        "sets": {size: _interval(values) for size, values in measured["sets"].items()},
        "degradations": {
            name: found and {kind: {v: _interval(x) for v, x in held.items()} for kind, held in found.items()}
            for name, found in measured["degradations"].items()
        },
        "loss": _loss(measured),
    }


def _loss(measured: dict) -> dict | None:
    """How much identification falls from untouched images to compressed ones, whose references are compressed alike."""
    degraded = measured["degradations"].get(LOSS_DEGRADATION)
    if not degraded:
        return None
    return _interval(_array(measured["values"]["identification"]) - _array(degraded["matched"]["identification"]))


def _interval(values) -> dict | None:
    array = _array(values)
    return None if values is None or np.isnan(array).all() else measures.mean_interval(array)._asdict()


def _array(values) -> np.ndarray:
    return np.array([np.nan] if values is None else values, np.float64)  # None becomes nan


def _values(tiers: dict, tier: str, method: str, value: str) -> np.ndarray:
    return _array(tiers[tier]["methods"][method]["values"][value])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values))


def _cell(found: dict | None) -> str:
    if found is None:
        return "-"
    bounds = [f"{found[end]:.2f}".replace("0.", ".", 1) for end in ("low", "high")]
    return f"{found['mean']:.3f} ({'-'.join(bounds)})"
