"""Bootstrap intervals and differences against direct resampling and closed forms."""

import dataclasses

import numpy as np
import pytest

from attrib.common.errors import AttribError
from attrib.evaluate.scores import (
    BOOTSTRAP_DRAWS,
    QueryScores,
    average_precision,
    bootstrap,
    format_table,
    intervals,
    paired_difference,
    ranks_of_relevant,
    summarise,
    value_name,
)


def scores_of(cells, units, ap, **options) -> QueryScores:
    names = [f"{i}.jpg" for i in range(len(ap))]
    lists = [[name] for name in names]
    return QueryScores(
        names, list(cells), list(units), {"ap": np.asarray(ap, float)}, lists, lists, [[1.0]] * len(ap), **options
    )


def drawn(seed: int, num_rows: int = 200, **options) -> QueryScores:
    rng = np.random.default_rng(seed)
    names = np.random.default_rng(99)  # cells and units do not depend on the seed
    cells = [
        ("ab"[names.choice(2, p=[0.65, 0.35])], "xyz"[names.choice(3, p=[0.6, 0.3, 0.1])]) for _ in range(num_rows)
    ]
    return scores_of(cells, [f"u{names.integers(25)}" for _ in cells], rng.random(num_rows), **options)


def test_average_precision_by_hand():
    assert average_precision(np.array([1])) == 1.0
    assert average_precision(np.array([2, 4])) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_a_tie_never_raises_a_score():
    similarity = np.array([0.5, 0.9, 0.5, 0.5, 0.1])
    relevant = np.array([True, False, False, True, False])
    assert ranks_of_relevant(similarity, relevant).tolist() == [3, 4]
    assert ranks_of_relevant(np.zeros(4), np.array([True, False, False, False])).tolist() == [4]
    # Values that differ only by rounding also tie.
    similarity[[0, 3]] += 1e-15
    assert ranks_of_relevant(similarity, relevant).tolist() == [3, 4]


def test_the_interval_resamples_units_and_not_rows():
    """If all rows of a unit are equal, more rows add no information, so the interval keeps its width."""
    precision = np.random.default_rng(0).random(40)
    units = [f"g{i}" for i in range(40)]
    once = intervals(scores_of([("r", "m")] * 40, units, precision))[None]["ap"]
    often = intervals(scores_of([("r", "m")] * 360, units * 9, np.tile(precision, 9)))[None]["ap"]
    assert once == pytest.approx(often)
    assert once.high - once.low == pytest.approx(2 * 1.96 * precision.std() / np.sqrt(40), rel=0.1)


@pytest.mark.parametrize("shared", [False, True])
def test_draws_equal_direct_resampling_of_rows(shared):
    """Oracle: average the rows of each drawn unit. With shared units, cells of one first name share draws."""
    scores = drawn(1, shared_units=shared)
    found, rng = bootstrap(scores), np.random.default_rng(0)
    macro = scores.macro_cells()
    cells = [*macro, *(cell for cell in sorted(set(scores.cells)) if cell not in macro)]
    assert 2 < len(macro) < len(cells)
    strata = list(dict.fromkeys(cell[0] for cell in cells)) if shared else cells
    for stratum in strata:
        members = [cell for cell in cells if (cell[0] if shared else cell) == stratum]
        units = sorted({u for u, cell in zip(scores.units, scores.cells) if cell in members})
        picks = rng.integers(0, len(units), size=(BOOTSTRAP_DRAWS, len(units)))
        for cell in members:
            rows = list(zip(scores.values["ap"], scores.units, scores.cells))
            rows_of = [[ap for ap, u, c in rows if (u, c) == (unit, cell)] for unit in units]
            for draw in (0, 7, BOOTSTRAP_DRAWS - 1):
                resampled = [ap for pick in picks[draw] for ap in rows_of[pick]]
                expected = np.mean(resampled) if resampled else np.nan
                assert found[cell]["ap"][draw] == pytest.approx(expected, nan_ok=True)


def test_a_paired_difference_is_narrower_than_its_parts():
    a = drawn(1)
    better = dataclasses.replace(a, values={"ap": a.values["ap"] + 0.05})
    mean, low, high = paired_difference(better, a)
    assert (mean, low, high) == pytest.approx((0.05, 0.05, 0.05))
    whole = intervals(a)[None]["ap"]
    assert whole.high - whole.low > 0.02
    assert paired_difference(a, better) == pytest.approx((-0.05, -0.05, -0.05))
    assert paired_difference(a, a) == (0, 0, 0)


def test_methods_with_different_rows_cannot_be_compared():
    with pytest.raises(AttribError, match=r"'a' and 'b' were not scored on the same queries \(200 and 150 rows\)"):
        summarise({"a": drawn(1), "b": drawn(1, 150)})
    with pytest.raises(AttribError, match="reference 'c' is not a method; choose one of a"):
        summarise({"a": drawn(1)}, "c")


def test_small_cells_are_excluded_from_the_macro_mean():
    cells = [("a", "x")] * 30 + [("b", "x")] * 29
    scores = scores_of(cells, [f"u{i}" for i in range(59)], [0.25] * 30 + [1.0] * 29)
    summary = summarise({"only": scores})
    assert summary["methods"]["only"]["macro"]["ap"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert [cell["in_macro"] for cell in summary["cells"]] == [True, False]
    small = scores_of(cells[30:], ["u"] * 29, [1.0] * 29)
    assert intervals(small).keys() == {("b", "x")} and paired_difference(small, small) is None
    summary = summarise({"one": small, "two": small})
    assert summary["methods"]["two"]["macro"] is None and summary["methods"]["two"]["minus_reference"] is None
    assert format_table(summary).endswith("no macro mean: no cell has 30 or more rows")


def test_the_table_has_every_method_in_every_cell():
    a, b = drawn(1), drawn(2)
    a = dataclasses.replace(a, ceilings={"ap": np.full(200, 0.9)})
    summary = summarise({"raw": a, "a longer name": b})
    lines = format_table(summary).splitlines()
    assert len(lines) == 1 + 3 * 6 + 1 + 2
    assert lines[0].split() == ["role", "generator", "rows", "units", "method", "mAP"]
    assert sum("(ceiling)" in line and line.endswith("0.900") for line in lines) == 6
    x = summary["methods"]["a longer name"]["minus_reference"]["ap"]
    assert lines[-1].endswith(f"minus raw {x['mean']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})")
    first = summary["methods"]["raw"]["cells"][0]["ap"]["mean"]
    assert first == pytest.approx(np.mean([v for v, c in zip(a.values["ap"], a.cells) if c == min(a.cells)]))


def test_display_names_of_values():
    names = {"ap": "mAP", "recall_at_5": "recall@5", "whole_pool_ap": "whole pool mAP"}
    assert {value: value_name(value) for value in names} == names
