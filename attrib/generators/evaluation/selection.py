"""What an evaluation ships, and why: one method, of those that look at the trace of a generator and that a registry can hold."""

import numpy as np

from attrib.generators.evaluation.measures import VALUES, as_array, difference_interval, family_numbers, loss
from attrib.generators.evaluation.settings import LOSS_DEGRADATION
from attrib.generators.evaluation.verdict_rates import verdict_scores

DECIDING = ("identification", "rejection_auroc")  # on the judged tiers
CANDIDATE = "extractor"  # and its variants, untrained or scored in another way, are the rows whose names start so
MAX_LOSS = 0.10  # of identification at LOSS_DEGRADATION, with a gallery degraded alike
CRITERION = (
    "the trained extractor is shipped if it beats every control that looks at the trace, in identification and in rejection AUROC, on every "
    "judged tier; if not, then what has the highest mean of these, of the methods that look at the trace and that a registry can hold; of the ways "
    "to score by the extractor whose verdicts are measured, the one whose verdicts are right most often takes the place of the other"
)


def choose(
    tiers: dict[str, dict], looks_at_trace: dict[str, bool], registered_as: dict[str, str | None]
) -> dict | None:
    """What is shipped by the CRITERION, the earlier in the table of two equals; None where no tier is judged or nothing can be shipped.

    tiers, looks_at_trace, registered_as: of `summarise`. A variant of the extractor is no control, but each of its parts alone is one: together they must
    beat it.

    Returns {method, verdict_scores: {method: mean of `verdict_scores` over the generators of judged tiers, where measured on all}, replaced: {method,
    score, difference} of what had the place before verdicts were looked at, or None, registered_as, reason, criterion, scores: {method: mean of the deciding values}, ahead: {method, difference} of the
    best method where no registry can hold it, variants: [{method, difference}] of the shipped method's score from those of its variants,
    comparisons: [{tier, value, versus, mean, low, high}] with every other method that looks at the trace, paired over generators,
    losses: [{tier, loss, family_loss: None without families}] of matched JPEGs}.
    """
    judged = [name for name, tier in tiers.items() if tier["judged"]]
    traces = [method for method, looks in looks_at_trace.items() if looks]
    can_ship = [method for method in traces if registered_as[method] is not None]
    if not judged or not can_ship:
        return None
    places = [(tier, value) for tier in judged for value in DECIDING]
    values = {
        method: [as_array(tiers[tier]["methods"][method]["values"][value]) for tier, value in places]
        for method in traces
    }
    scores = {
        method: float(np.mean([np.nanmean(found) for found in of_places])) for method, of_places in values.items()
    }
    lost = _lost(values, places)
    wins = CANDIDATE in can_ship and not lost
    shipped = leader = CANDIDATE if wins else max(can_ship, key=lambda method: scores[method])
    judgements = _judgements(tiers, judged, can_ship)
    replaced = None
    if shipped in judgements:
        shipped = max(judgements, key=lambda method: (judgements[method].mean(), method == leader))
        if shipped != leader:
            families = np.concatenate([[f"{tier} {family}" for family in tiers[tier]["families"]] for tier in judged])
            numbers = np.unique(families, return_inverse=True)[1]
            difference = difference_interval(judgements[shipped], judgements[leader], numbers)
            replaced = {"method": leader, "score": float(judgements[leader].mean()), "difference": difference}
    best = max(traces, key=lambda method: scores[method])
    ahead = None
    if registered_as[best] is None and scores[best] > scores[shipped]:
        ahead = {"method": best, "difference": scores[best] - scores[shipped]}
    losses = [
        {"tier": tier}
        | {
            name: loss(tiers[tier]["methods"][shipped], family_numbers(tiers[tier]), value)
            for name, value in (("loss", "identification"), ("family_loss", "family_identification"))
        }
        for tier in judged
    ]
    return {
        "method": shipped,
        "verdict_scores": {method: float(found.mean()) for method, found in judgements.items()},
        "replaced": replaced,
        "registered_as": registered_as[shipped],
        "reason": "; ".join(
            [
                *([_said_replaced(replaced)] if replaced else []),
                *_reasons("it" if leader == shipped else leader, scores[leader], lost, wins, ahead),
                *map(_said_loss, losses),
            ]
        ),
        "criterion": CRITERION,
        "scores": scores,
        "ahead": ahead,
        "variants": [
            {"method": other, "difference": scores[shipped] - scores[other]}
            for other in traces
            if other != shipped and shipped.startswith(CANDIDATE) and other.startswith(CANDIDATE)
        ],
        "comparisons": [
            {"tier": tier, "value": value, "versus": other} | found
            for i, (tier, value) in enumerate(places)
            for other in traces
            if other != shipped
            and (found := difference_interval(values[shipped][i], values[other][i], family_numbers(tiers[tier])))
        ],
        "losses": losses,
    }


def loss_line(row: dict) -> str:
    """One of `losses` as text, held against MAX_LOSS."""
    if row["loss"] is None:
        return f"{row['tier']}: not measured at {LOSS_DEGRADATION}, where its images are too small"
    mean, of_family = row["loss"]["mean"], row["family_loss"]
    of_family = f"; {of_family['mean']:.3f} of family identification" if of_family else ""
    bound = f"{'less' if mean < MAX_LOSS else 'NOT less'} than {MAX_LOSS:.2f}"
    return f"{row['tier']}: loses {mean:.3f} at {LOSS_DEGRADATION}, {bound}{of_family}"


def _lost(values: dict[str, list[np.ndarray]], places: list[tuple[str, str]]) -> list[str]:
    """Where a control is as good as the extractor, or better."""
    if CANDIDATE not in values:
        return []
    found = []
    for i, (tier, value) in enumerate(places):
        own = float(np.nanmean(values[CANDIDATE][i]))
        for other in values:
            rival = float(np.nanmean(values[other][i]))
            if not other.startswith(CANDIDATE) and not own > rival:
                found.append(f"{other} in {VALUES[value]} on {tier} ({rival:.3f} against {own:.3f})")
    return found


def _reasons(subject: str, score: float, lost: list[str], wins: bool, ahead: dict | None) -> list[str]:
    if wins:
        found = [
            f"{subject} beats every control that looks at the trace in identification and in rejection on every judged tier"
        ]
    else:
        among = "of the methods that look at the trace and that a registry can hold"
        found = [
            f"{among} {subject} has the highest mean of identification and rejection over the judged tiers ({score:.3f})"
        ]
        found += [f"the extractor does not beat {', '.join(lost)}"] if lost else []
    if ahead:
        found.append(
            f"{ahead['method']} is ahead of it by {ahead['difference']:.3f} in that mean, but no registry can hold it"
        )
    return found


def _judgements(tiers: dict[str, dict], judged: list[str], can_ship: list[str]) -> dict[str, np.ndarray]:
    """{method: float64 [generators of the judged tiers that have verdicts], `verdict_scores`}."""
    found: dict[str, list[np.ndarray]] = {}
    for method in can_ship:
        rates = [tiers[tier]["methods"][method].get("verdicts") for tier in judged]
        if all(rates):
            found[method] = [verdict_scores(of_tier) for of_tier in rates]
    return {method: np.concatenate(scores) for method, scores in found.items()}


def _said_replaced(replaced: dict) -> str:
    difference = replaced["difference"]
    beyond = "beyond" if difference["low"] > 0 else "not beyond"
    return (
        f"it takes the place of {replaced['method']}, whose verdicts are right less often ({replaced['score']:.3f}; the difference is "
        f"{difference['mean']:.3f}, {difference['low']:.3f} to {difference['high']:.3f}, {beyond} chance)"
    )


def _said_loss(row: dict) -> str:
    if row["loss"] is None:
        return f"its loss at {LOSS_DEGRADATION} is not known on {row['tier']}"
    return f"at {LOSS_DEGRADATION}, references degraded alike, it loses {row['loss']['mean']:.3f} of identification on {row['tier']}"
