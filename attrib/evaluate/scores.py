"""Scores of methods on known pairs, with bootstrap intervals and paired differences.

Queries of one source group (or of one customised model, in AbC) succeed and fail together, so resampling queries would
give intervals that are too narrow. The bootstrap resamples these units instead, within each cell. All methods share the
resamples, so their differences are paired.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.formats import text_table

MACRO_MIN_ROWS = 30  # smaller cells are too noisy for the macro mean
BOOTSTRAP_DRAWS = 2000
TOP_SOURCES = 5
TIE = 1e-12  # similarities that differ by less are equal: float64 products of 4,000 numbers are exact to about that

Cell = tuple[str, str]


class Interval(NamedTuple):
    """A mean and its 95 % interval. The interval of a cell with a single unit has no width."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class QueryScores:
    """Scores of one method, one row per ranking; all sequences have n entries.

    queries: keys of generated images. cells: (role, generator) or (test case, prompts). units: the source groups or
    customised models that the bootstrap resamples. values: float64 [n] by name, including "ap". true_keys: the relevant
    sources. top_keys, top_similarity: the first TOP_SOURCES of the ranking. ceilings: float64 [n] by name, the highest
    possible values. shared_units: cells with the same first name have the same units and share the resamples (AbC's
    prompt types share the models).
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
        """{cell: int64 rows}, in the order of names."""
        rows: dict[Cell, list[int]] = defaultdict(list)
        for row, cell in enumerate(self.cells):
            rows[cell].append(row)
        return {cell: np.array(rows[cell]) for cell in sorted(rows)}

    def macro_cells(self) -> list[Cell]:
        return [cell for cell, rows in self.rows_of_cells().items() if len(rows) >= MACRO_MIN_ROWS]

    def asked(self) -> list[tuple]:
        """The query, cell and unit of each row, which must be equal for methods to be compared."""
        return list(zip(self.queries, self.cells, self.units))


def average_precision(ranks: np.ndarray) -> float:
    """Mean of (number of relevant so far) / rank. ranks: of the relevant, ascending from 1."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def ranks_of_relevant(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks int64 [m] of the relevant, ascending from 1; ties (within TIE) rank the irrelevant first."""
    found = np.sort(similarity[relevant])[::-1]
    return np.arange(1, len(found) + 1) + num_at_or_above(np.sort(similarity[~relevant]), found)


def num_at_or_above(ascending: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Number of values in an ascending array that reach each threshold, ties included: int64 [m]."""
    return len(ascending) - np.searchsorted(ascending, thresholds - TIE, side="left")


def bootstrap(scores: QueryScores) -> dict[Cell, dict[str, np.ndarray]]:
    """Means of resampled cells: {cell: {value: float64 [BOOTSTRAP_DRAWS]}}, nan where a resample has no row of a cell.

    The cells of the macro mean are drawn first, by name, from one random stream. This gives the same numbers as
    `score.py --versus`, the scorer beside the development images.
    """
    rows_of, generator = scores.rows_of_cells(), np.random.default_rng(0)
    macro = set(scores.macro_cells())
    strata = defaultdict(list)  # cells that share resamples
    for cell in sorted(rows_of, key=lambda cell: (cell not in macro, cell)):
        strata[cell[0] if scores.shared_units else cell].append(cell)
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


def intervals(scores: QueryScores) -> dict[Cell | None, dict[str, Interval]]:
    """{cell: {value: Interval}}; key None: the macro mean over cells of at least MACRO_MIN_ROWS rows, if any."""
    draws, rows_of, macro = bootstrap(scores), scores.rows_of_cells(), scores.macro_cells()
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


def paired_difference(a: QueryScores, b: QueryScores, value: str = "ap") -> Interval | None:
    """Macro mean of a minus that of b, over the same resamples; None if no cell has MACRO_MIN_ROWS rows.

    The mean is taken over the resamples, as in `score.py --versus`. Raises AttribError if the rows differ.
    """
    check_same_rows({"the first": a, "the second": b})
    macro = a.macro_cells()
    if not macro:
        return None
    differences = _macro(bootstrap(a), macro, value) - _macro(bootstrap(b), macro, value)
    return _interval(float(np.nanmean(differences)), differences)


def check_same_rows(results: dict[str, QueryScores]) -> None:
    """Raise AttribError unless all methods have the same rows in the same order, and the same values."""
    (first, expected), *others = results.items()
    for name, scores in others:
        if scores.asked() != expected.asked() or scores.values.keys() != expected.values.keys():
            raise AttribError(
                f"methods {first!r} and {name!r} were not scored on the same queries ({len(expected.queries)} and "
                f"{len(scores.queries)} rows); score both on the images that both have"
            )


def summarise(results: dict[str, QueryScores], reference: str | None = None) -> dict:
    """Summary for JSON: the macro mean of each method, its difference from the reference, and every cell."""
    check_same_rows(results)
    reference = reference or next(iter(results))
    if reference not in results:
        raise AttribError(f"the reference {reference!r} is not a method; choose one of {', '.join(results)}")
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
        found = {cell: {v: x._asdict() for v, x in values.items()} for cell, values in intervals(scores).items()}
        versus = None
        if name != reference and None in found:
            versus = {v: paired_difference(scores, any_scores, v)._asdict() for v in scores.values}
        methods[name] = {
            "macro": found.get(None),
            "minus_reference": versus,
            "cells": [found[cell] for cell in rows_of],
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
    """Format the summary as text: cells by method, then macro means with intervals and differences."""
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
    columns |= {value_name(value).replace("whole pool ", "pool "): "right" for value in summary["values"]}
    table = text_table(columns, rows)
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


def value_name(value: str) -> str:
    """Display name of a value: "mAP" for "ap", "recall@5" for "recall_at_5"."""
    name = value.replace("_at_", "@").replace("_", " ")
    return f"{name[:-2]}mAP" if name.endswith("ap") else name
