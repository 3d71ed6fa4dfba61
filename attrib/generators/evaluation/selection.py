"""Select the fingerprint method to ship and give the reason. It must use the trace, and a registry must support it."""

import numpy as np

from attrib.generators.evaluation.measures import VALUES, as_array, difference_interval, family_numbers, loss
from attrib.generators.evaluation.settings import LOSS_DEGRADATION
from attrib.generators.evaluation.verdict_rates import verdict_scores

DECIDING = ("identification", "rejection_auroc")  # on the judged generator sets
CANDIDATE = "extractor"  # the names of its variants (untrained, or with another scoring) start with this
MAX_LOSS = 0.10  # of identification at LOSS_DEGRADATION, with references degraded in the same way
CRITERION = (
    "the trained extractor is shipped if it beats every control that uses the trace, in identification and in "
    "rejection AUROC, on every judged generator set; otherwise the method with the highest mean of these, among those "
    "that use the trace and that a registry can hold; among the scorings of the extractor whose verdicts are "
    "measured, the one whose verdicts are right most often replaces the other"
)


def choose(
    tiers: dict[str, dict], looks_at_trace: dict[str, bool], registered_as: dict[str, str | None]
) -> dict | None:
    """The shipped method by the CRITERION; None if no set is judged or no method can ship.

    Of equal methods, the first in the table is shipped. Arguments: as for `summarise`. Variants of the extractor are
    not controls, but each of its parts alone is one.

    Returns {method, registered_as, reason, criterion,
    scores: {method: mean of the deciding values},
    verdict_scores: {method: mean of `verdict_scores` on judged sets, if measured on all},
    replaced: {method, score, difference} of the leader before verdicts, if another is shipped, else None,
    ahead: {method, difference} of the best method if no registry can hold it, else None,
    variants: [{method, difference}], score of the shipped extractor minus that of each variant,
    comparisons: [{tier, value, versus, mean, low, high}] with every other method that uses the trace, paired over
    generators,
    losses: [{tier, loss, family_loss: None without families}] with a matched gallery}.
    """
    judged = [name for name, tier in tiers.items() if tier["judged"]]
    traces = [method for method, looks in looks_at_trace.items() if looks]
    can_ship = [method for method in traces if registered_as[method] is not None]
    if not judged or not can_ship:
        return None
    places = [(name, value) for name in judged for value in DECIDING]
    values = {
        method: [as_array(tiers[name]["methods"][method]["values"][value]) for name, value in places]
        for method in traces
    }
    means = {method: [float(np.nanmean(found)) for found in of_places] for method, of_places in values.items()}
    scores = {method: float(np.mean(of_places)) for method, of_places in means.items()}
    lost = _lost(means, places)
    wins = CANDIDATE in can_ship and not lost
    leader = CANDIDATE if wins else max(can_ship, key=lambda method: scores[method])
    rates = _verdict_scores(tiers, judged, can_ship)
    shipped, replaced = leader, None
    if leader in rates:
        shipped = max(rates, key=lambda method: (rates[method].mean(), method == leader))
        if shipped != leader:
            families = family_numbers([f"{name} {family}" for name in judged for family in tiers[name]["families"]])
            difference = difference_interval(rates[shipped], rates[leader], families)
            replaced = {"method": leader, "score": float(rates[leader].mean()), "difference": difference}
    best = max(traces, key=lambda method: scores[method])
    ahead = None
    if registered_as[best] is None and scores[best] > scores[shipped]:
        ahead = {"method": best, "difference": scores[best] - scores[shipped]}
    families_of = {name: family_numbers(tiers[name]["families"]) for name in judged}
    losses = []
    for name in judged:
        measured = tiers[name]["methods"][shipped]
        of_family = loss(measured, families_of[name], "family_identification")
        losses.append({"tier": name, "loss": loss(measured, families_of[name]), "family_loss": of_family})
    subject = "it" if leader == shipped else leader
    reasons = [*_reasons(subject, scores[leader], lost, wins, replaced, ahead), *map(_loss_reason, losses)]
    return {
        "method": shipped,
        "verdict_scores": {method: float(found.mean()) for method, found in rates.items()},
        "replaced": replaced,
        "registered_as": registered_as[shipped],
        "reason": "; ".join(reasons),
        "criterion": CRITERION,
        "scores": scores,
        "ahead": ahead,
        "variants": [
            {"method": other, "difference": scores[shipped] - scores[other]}
            for other in traces
            if other != shipped and shipped.startswith(CANDIDATE) and other.startswith(CANDIDATE)
        ],
        "comparisons": [
            {"tier": name, "value": value, "versus": other} | found
            for i, (name, value) in enumerate(places)
            for other in traces
            if other != shipped
            and (found := difference_interval(values[shipped][i], values[other][i], families_of[name]))
        ],
        "losses": losses,
    }


def loss_line(row: dict) -> str:
    """A row of `losses` as text, with a comparison to MAX_LOSS."""
    if row["loss"] is None:
        return f"{row['tier']}: not measured at {LOSS_DEGRADATION}, which makes its images too small"
    mean, of_family = row["loss"]["mean"], row["family_loss"]
    family = f"; {of_family['mean']:.3f} of family identification" if of_family else ""
    bound = f"{'less' if mean < MAX_LOSS else 'NOT less'} than {MAX_LOSS:.2f}"
    return f"{row['tier']}: loses {mean:.3f} at {LOSS_DEGRADATION}, {bound}{family}"


def _lost(means: dict[str, list[float]], places: list[tuple[str, str]]) -> list[str]:
    """The values in which a control is as good as the extractor or better, as text."""
    return [
        f"{other} in {VALUES[value]} on {name} ({rivals[i]:.3f} against {means[CANDIDATE][i]:.3f})"
        for i, (name, value) in enumerate(places)
        for other, rivals in means.items()
        if CANDIDATE in means and not other.startswith(CANDIDATE) and not means[CANDIDATE][i] > rivals[i]
    ]


def _verdict_scores(tiers: dict[str, dict], judged: list[str], can_ship: list[str]) -> dict[str, np.ndarray]:
    """{method: `verdict_scores`, float64 [generators of all judged sets]}, of methods with verdicts on all of them."""
    found = {method: [tiers[name]["methods"][method].get("verdicts") for name in judged] for method in can_ship}
    return {method: np.concatenate(list(map(verdict_scores, sets))) for method, sets in found.items() if all(sets)}


def _reasons(
    subject: str, score: float, lost: list[str], wins: bool, replaced: dict | None, ahead: dict | None
) -> list[str]:
    found = []
    if replaced:
        difference = replaced["difference"]
        beyond = "beyond" if difference["low"] > 0 else "not beyond"
        found.append(
            f"it replaces {replaced['method']}, whose verdicts are right less often ({replaced['score']:.3f}; the "
            f"difference is {difference['mean']:.3f}, {difference['low']:.3f} to {difference['high']:.3f}, {beyond} "
            "chance)"
        )
    if wins:
        found.append(
            f"{subject} beats every control that uses the trace in identification and in rejection on every judged "
            "generator set"
        )
    else:
        found.append(
            f"of the methods that use the trace and that a registry can hold, {subject} has the highest mean of "
            f"identification and rejection over the judged generator sets ({score:.3f})"
        )
        found += [f"the extractor does not beat {', '.join(lost)}"] if lost else []
    if ahead:
        found.append(
            f"{ahead['method']} is ahead of it by {ahead['difference']:.3f} in that mean, but no registry can hold it"
        )
    return found


def _loss_reason(row: dict) -> str:
    if row["loss"] is None:
        return f"its loss at {LOSS_DEGRADATION} is not known on {row['tier']}"
    lost = f"it loses {row['loss']['mean']:.3f} of identification on {row['tier']}"
    return f"at {LOSS_DEGRADATION}, references degraded alike, {lost}"
