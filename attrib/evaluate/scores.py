"""What methods score on known pairs: values per query, intervals that resample what queries have in common, and
differences.

Queries of one source group (or of one customised model, in AbC) succeed and fail together, so a bootstrap of queries
would promise too much: units are resampled instead, within each cell. All methods are resampled alike, which makes
differences paired.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.tables import text_table

MACRO_MIN_ROWS = 30  # smaller cells are printed, but would add more noise than knowledge to the macro mean
BOOTSTRAP_DRAWS = 2000
TOP_SOURCES = 5
TIE = 1e-12  # similarities that differ by less are equal: float64 products of 4,000 numbers are exact to about that

Cell = tuple[str, str]


class Interval(NamedTuple):
    """A mean and its 95 % interval. A cell of one group has nothing to resample, so that its interval is the mean
    alone."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class QueryScores:
    """One method's scores, one row per question about a query; all sequences have n entries.

    queries: keys of generated images; cells: (role, generator) or (test case, prompts); units: what is resampled, a
    source group or a customised model. values: float64 [n] by name, "ap" among them. true_keys: the relevant sources;
    top_keys, top_similarity: the first TOP_SOURCES of the ranking. ceilings: float64 [n] by name, the most that any
    method can reach. shared_units: cells with the same first name are about the same units, which are then drawn
    together (AbC's prompt types share the models).
    """

    queries: list[str]
    cells: list[Cell]
    units: list[str]
    values: dict[str, np.ndarray]
    true_keys: list[list[str]]
    top_keys: list[list[str]]
    top_similarity: list[list[float]]
    ceilings: dict[str, np.ndarray] = field(default_factory=dict)
    cell_names: tuple[str, str] = ("role", "generator")
    shared_units: bool = False

    def rows_of_cells(self) -> dict[Cell, np.ndarray]:
        """{cell: its rows, int64}, by name."""
        rows: dict[Cell, list[int]] = {}
        for row, cell in enumerate(self.cells):
            rows.setdefault(cell, []).append(row)
        return {cell: np.array(rows[cell]) for cell in sorted(rows)}

    def macro_cells(self) -> list[Cell]:
        return [cell for cell, rows in self.rows_of_cells().items() if len(rows) >= MACRO_MIN_ROWS]

    def asked(self) -> list[tuple]:
        """What each row is about: two methods can be compared if they agree on it."""
        return list(zip(self.queries, self.cells, self.units))


def average_precision(ranks: np.ndarray) -> float:
    """Mean over the relevant of (relevant at or above it) / rank; ranks ascend from 1."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def ranks_of_relevant(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks int64 [m], ascending from 1, of the relevant among all; ties (within TIE) rank the irrelevant first, so
    that a tie never helps."""
    found = np.sort(similarity[relevant])[::-1]
    return np.arange(1, len(found) + 1) + num_at_or_above(np.sort(similarity[~relevant]), found)


def num_at_or_above(ascending: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """int64 [m]: how many values of a sorted array reach each threshold, ties included."""
    return len(ascending) - np.searchsorted(ascending, thresholds - TIE, side="left")


def bootstrap(scores: QueryScores, seed: int = 0) -> dict[Cell, dict[str, np.ndarray]]:
    """{cell: {value: float64 [BOOTSTRAP_DRAWS]}}, cell means under resampled units; nan where a draw leaves a cell
    without rows.

    The cells of the macro mean are drawn first, by name, from one stream: the same numbers as `score.py --versus`
    beside the dev images.
    """
    rows_of, generator = scores.rows_of_cells(), np.random.default_rng(seed)
    macro = set(scores.macro_cells())
    strata: dict = {}  # cells that share their units
    for cell in sorted(rows_of, key=lambda cell: (cell not in macro, cell)):
        strata.setdefault(cell[0] if scores.shared_units else cell, []).append(cell)
    draws = {}
    for cells in strata.values():
        units, place = np.unique([scores.units[row] for cell in cells for row in rows_of[cell]], return_inverse=True)
        places = np.split(place, np.cumsum([len(rows_of[cell]) for cell in cells])[:-1])
        drawn = generator.integers(0, len(units), size=(BOOTSTRAP_DRAWS, len(units)))
        for cell, at in zip(cells, places):
            counts = np.bincount(at, minlength=len(units))[drawn].sum(axis=1).astype(np.float64)
            counts[counts == 0] = np.nan
            draws[cell] = {
                name: np.bincount(at, weights=values[rows_of[cell]], minlength=len(units))[drawn].sum(axis=1) / counts
                for name, values in scores.values.items()
            }
    return draws


def intervals(scores: QueryScores, seed: int = 0) -> dict[Cell | None, dict[str, Interval]]:
    """{cell: {value: Interval}}; under None the macro mean over cells of MACRO_MIN_ROWS rows or more, absent if no cell
    is that large."""
    draws, rows_of, macro = bootstrap(scores, seed), scores.rows_of_cells(), scores.macro_cells()
    found: dict = {
        cell: {name: _interval(float(values[rows].mean()), draws[cell][name]) for name, values in scores.values.items()}
        for cell, rows in rows_of.items()
    }
    if macro:
        found[None] = {
            name: _interval(float(np.mean([found[cell][name].mean for cell in macro])), _macro(draws, macro, name))
            for name in scores.values
        }
    return found


def paired_difference(a: QueryScores, b: QueryScores, value: str = "ap", seed: int = 0) -> Interval | None:
    """Macro mean of a minus that of b over the same resamples; the mean is that of the resamples, as `score.py
    --versus` has it.

    None without a cell of MACRO_MIN_ROWS rows. Raises AttribError if the two did not answer the same questions.
    """
    check_same_rows({"the first": a, "the second": b})
    macro = a.macro_cells()
    if not macro:
        return None
    differences = _macro(bootstrap(a, seed), macro, value) - _macro(bootstrap(b, seed), macro, value)
    return _interval(float(np.nanmean(differences)), differences)


def check_same_rows(results: dict[str, QueryScores]) -> None:
    """Raises AttribError unless all methods have the same rows in the same order, and the same values."""
    (first, expected), *others = results.items()
    for name, scores in others:
        if scores.asked() != expected.asked() or scores.values.keys() != expected.values.keys():
            raise AttribError(
                f"methods {first!r} and {name!r} were not scored on the same queries ({len(expected.queries)} and "
                f"{len(scores.queries)} rows); score both on what both have"
            )


def summarise(results: dict[str, QueryScores], reference: str | None = None) -> dict:
    """Plain numbers for JSON: per method the macro mean, its difference from the reference's, and every cell. null
    where there is none."""
    check_same_rows(results)
    reference = reference or next(iter(results))
    if reference not in results:
        raise AttribError(f"the reference {reference!r} is no method; the methods are {', '.join(results)}")
    any_scores = results[reference]
    rows_of, macro = any_scores.rows_of_cells(), set(any_scores.macro_cells())
    cells = [
        dict(zip(any_scores.cell_names, cell))
        | {
            "num_rows": len(rows),
            "num_units": len({any_scores.units[row] for row in rows}),
            "in_macro": cell in macro,
            "ceilings": {name: float(values[rows].mean()) for name, values in any_scores.ceilings.items()},
        }
        for cell, rows in rows_of.items()
    ]
    methods = {}
    for name, scores in results.items():
        found = intervals(scores)
        macro_values = found.pop(None, None)
        versus = None
        if name != reference and macro_values:
            versus = {v: paired_difference(scores, any_scores, v)._asdict() for v in scores.values}
        methods[name] = {
            "macro": macro_values and {value: interval._asdict() for value, interval in macro_values.items()},
            "minus_reference": versus,
            "cells": [{v: interval._asdict() for v, interval in found[cell].items()} for cell in rows_of],
        }
    return {
        "reference": reference,
        "cell_names": list(any_scores.cell_names),
        "values": list(any_scores.values),
        "macro_min_rows": MACRO_MIN_ROWS,
        "bootstrap_draws": BOOTSTRAP_DRAWS,
        "cells": cells,
        "methods": methods,
    }


def format_table(summary: dict) -> str:
    """The summary as text: cells by method, then macro means with intervals and differences."""
    names = list(summary["methods"])
    columns = {**dict.fromkeys(summary["cell_names"], "left"), "rows": "right", "units": "right", "method": "left"}
    rows = []
    for i, cell in enumerate(summary["cells"]):
        start = [*(cell[name] for name in summary["cell_names"]), str(cell["num_rows"]), str(cell["num_units"])]
        found = {name: {v: x["mean"] for v, x in summary["methods"][name]["cells"][i].items()} for name in names}
        if cell["ceilings"]:
            found["(ceiling)"] = cell["ceilings"]
        for name, values in found.items():
            rows.append([*start, name, *(f"{values[v]:.3f}" if v in values else "" for v in summary["values"])])
    table = text_table(columns | {_head(value): "right" for value in summary["values"]}, rows)
    if not any(cell["in_macro"] for cell in summary["cells"]):
        return f"{table}\nno macro mean: no cell has {summary['macro_min_rows']} or more rows"
    lines = [table, f"macro mAP over cells of {summary['macro_min_rows']} or more rows, with 95 % intervals:"]
    wide = max(map(len, names))
    for name in names:
        macro, versus = summary["methods"][name]["macro"]["ap"], summary["methods"][name]["minus_reference"]
        line = f"{name:{wide}} {macro['mean']:.4f} ({macro['low']:.4f} to {macro['high']:.4f})"
        if versus:
            x = versus["ap"]
            line += f", minus {summary['reference']} {x['mean']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})"
        lines.append(line)
    return "\n".join(lines)


def _macro(draws: dict, cells: list[Cell], value: str) -> np.ndarray:
    return np.mean([draws[cell][value] for cell in cells], axis=0)


def _interval(mean: float, draws: np.ndarray) -> Interval:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def _head(value: str) -> str:
    return value_name(value).replace("whole pool ", "pool ")


def value_name(value: str) -> str:
    """A value's name for people: "ap" is "mAP", "recall_at_5" is "recall@5"."""
    name = value.replace("_at_", "@").replace("_", " ")
    return f"{name[:-2]}mAP" if name.endswith("ap") else name
