"""Ranking of known true sources against a slow oracle, and against the scorer of the data folder if it exists."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.pairs import drawn_case, evaluate_by_job, in_memory, write_case, write_method

from attrib.common.config import validate
from attrib.common.errors import AttribError, MismatchError
from attrib.evaluate.collection import Collection
from attrib.evaluate.mappers import LinearMapper, Mappers
from attrib.evaluate.protocol import evaluate, score_truth
from attrib.evaluate.scores import format_table, intervals, paired_difference, summarise
from attrib.evaluate.settings import EvaluateSettings

VALUES = ("ap", "recall_at_1", "recall_at_10")
METHOD = {"name": "a", "sources": "s", "queries": "q"}
TRUTH = {"uri": "t.tsv", "key_column": "query"}
ABC = {"test_cases": {"c": "c.json"}}


def oracle(sources, queries, truth) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """AP, recall@1 and recall@10 of each truth row, by counting, without sorting."""
    cells: dict = {}
    vector_of = {f"q/{key}": np.float16(vector).astype(np.float64) for key, _, vector in queries}
    method_of = {f"q/{key}": method for key, method, _ in queries}
    for query, role, group in truth:
        others = {g for q, _, g in truth if q == query} - {group}
        pool = [(g == group, np.float16(v).astype(np.float64)) for _, g, v in sources if g not in others]
        asked = vector_of[query] / np.linalg.norm(vector_of[query])
        scores = [(relevant, float(v @ asked / np.linalg.norm(v))) for relevant, v in pool]
        found = []
        for relevant, score in scores:
            if relevant:
                found.append((score, sum(not r and s >= score - 1e-12 for r, s in scores)))
        found.sort(reverse=True)
        ranks = [i + 1 + worse for i, (_, worse) in enumerate(found)]
        precision = np.mean([(i + 1) / rank for i, rank in enumerate(ranks)])
        cells.setdefault((role, method_of[query]), []).append(
            (precision, float(ranks[0] == 1), np.mean([rank <= 10 for rank in ranks]))
        )
    return cells


@pytest.mark.parametrize("seed", range(3))
def test_cells_equal_those_of_an_oracle_that_counts(seed, tmp_path, local):
    sources, queries, truth = drawn_case(seed)
    scores = evaluate(write_case(tmp_path, local, sources, queries, truth), local)["one"]
    expected = oracle(sources, queries, truth)
    cells = scores.rows_of_cells()
    assert cells.keys() == expected.keys() and len(cells) == 4
    for name, rows in cells.items():
        found = np.stack([scores.values[value][rows] for value in VALUES], axis=1)
        assert np.allclose(found, expected[name], rtol=0, atol=1e-12)
    large = [np.mean([precision for precision, *_ in rows]) for rows in expected.values() if len(rows) >= 30]
    assert 0 < len(large) < 4
    mean, low, high = intervals(scores)[None]["ap"]
    assert mean == pytest.approx(np.mean(large)) and low < mean < high
    # true_keys is the whole group, top_keys the best of the pool.
    group_of = {key: group for key, group, _ in sources}
    for row, (_, _, group) in enumerate(truth):
        assert {group_of[key] for key in scores.true_keys[row]} == {group}
        assert len(scores.true_keys[row]) == sum(g == group for g in group_of.values())
        assert scores.top_similarity[row] == sorted(scores.top_similarity[row], reverse=True)
        if scores.values["recall_at_1"][row]:
            assert scores.top_keys[row][0] in scores.true_keys[row]


def test_arrays_in_memory_score_as_files_do(tmp_path, local):
    found = score_truth(*in_memory(0, lambda vectors, _: vectors.astype(np.float16)))
    filed = evaluate(write_case(tmp_path, local, *drawn_case(0)), local)["one"]
    assert found.asked() == filed.asked() and found.top_keys == filed.top_keys
    assert all(np.array_equal(found.values[value], filed.values[value]) for value in VALUES)


def test_mappers_act_on_their_own_domain():
    rng = np.random.default_rng(5)
    layers = {name: LinearMapper(rng.standard_normal((7, 12)), rng.standard_normal(7)) for name in ("real", "synth")}
    mapped = score_truth(*in_memory(1), Mappers(**layers))
    before = score_truth(*in_memory(1, lambda v, domain: v @ layers[domain].weight.T + layers[domain].bias))
    assert np.allclose(mapped.values["ap"], before.values["ap"])
    assert not np.allclose(mapped.values["ap"], score_truth(*in_memory(1)).values["ap"])


def test_vectors_of_different_models_cannot_be_compared():
    sources, queries, truth = in_memory(0)
    with pytest.raises(
        MismatchError, match="have 12 numbers and query vectors 9; embed sources and queries with the same model"
    ):
        score_truth(sources, Collection(queries.keys, queries.vectors[:, :9], queries.metadata), truth)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s, q, t: t.append(("q/absent.jpg", "content", "g1")), "query 'absent.jpg' has no vector"),
        (lambda s, q, t: t.append(("q/1.jpg", "content", "g99")), "source group 'g99' has no vector"),
        (lambda s, q, t: q.__setitem__(1, ("1.jpg", "a", np.full(12, np.nan))), "query '1.jpg' has no vector"),
        (lambda s, q, t: t.clear(), "truth.tsv has no rows"),
    ],
)
def test_the_error_names_a_truth_row_without_vectors(change, expected, tmp_path, local):
    sources, queries, truth = drawn_case(0)
    change(sources, queries, truth)
    with pytest.raises(AttribError, match=expected):
        evaluate(write_case(tmp_path, local, sources, queries, truth), local)


@pytest.mark.parametrize("key", ["role_column", "group_column", "source_group_column", "query_method_column"])
def test_the_error_names_an_absent_column(key, tmp_path, local):
    settings = write_case(tmp_path, local, *drawn_case(0))
    settings = settings.model_copy(update={"truth": settings.truth.model_copy(update={key: "nope"})})
    with pytest.raises(AttribError, match="column 'nope'; it has "):
        evaluate(settings, local)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"methods": []}, "methods"),
        ({"methods": [METHOD, METHOD]}, "two methods are named 'a'"),
        ({"reference": "z"}, "reference 'z' is not a method; choose one of a"),
        ({"truth": None}, "exactly one of truth"),
        ({"abc": ABC}, "exactly one of truth"),
        ({"methods": [METHOD | {"distractors": "d.npy"}]}, "only abc uses distractors"),
        ({"truth": None, "abc": ABC}, "'a' needs distractors from exactly one place"),
        ({"truth": None, "abc": ABC | {"distractors": "d.npy"}}, "one path of a source per line"),
        ({"methods": [METHOD | {"distractors": "d.txt"}]}, "set abc.distractors to it instead"),
        ({"methods": [METHOD | {"distractors": "s"}]}, "exemplars would be distractors too"),
    ],
)
def test_errors_name_inconsistent_settings(values, expected):
    given = {"methods": [METHOD], "truth": TRUTH, "output": "o"} | values
    with pytest.raises(AttribError, match=expected):
        validate(EvaluateSettings, {key: value for key, value in given.items() if value is not None}, "here")


def test_the_job_prints_a_table_and_writes_strict_json(tmp_path, local):
    sources, queries, truth = drawn_case(0)
    settings = write_case(tmp_path, local, sources, queries, truth[:20])
    printed, written = evaluate_by_job(settings)
    out = tmp_path / "out"
    summary = summarise(evaluate(settings, local))
    assert written["methods"] == summary["methods"] and written["cells"] == summary["cells"]
    assert written["methods"]["one"]["macro"] is None  # no cell has 30 rows
    assert written["inputs"] == {"one": {kind: f"digest of {kind}" for kind in ("sources", "queries")}}
    assert written["settings"] == settings.model_dump(mode="json") and "numpy" in written["versions"]
    table = format_table(summary)
    assert printed.startswith(table) and (out / "table.txt").read_text() == f"{table}\n" and "no macro mean" in printed
    assert sum(cell["num_rows"] for cell in written["cells"]) == 20
    assert pq.read_table(out / "queries.parquet").num_rows == 20
    assert "Ties rank the irrelevant first" in (out / "comparison.html").read_text()


def test_cells_and_differences_equal_those_of_the_independent_scorer(data_folder, tmp_path, local):
    scorer = data_folder / "score.py"
    if not scorer.exists():
        pytest.skip(f"no scorer under {data_folder}")
    tables = {}
    for name in ("sources", "queries", "truth"):
        with open(data_folder / "dev" / f"{name}.tsv", newline="", encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file, delimiter="\t"))
    truth = [(r["query"], r["role"], r["source_group"]) for r in tables["truth"]]
    # Vectors carry a little of the truth, so that ranks are neither all first nor random; copies tie exactly.
    rng = np.random.default_rng(0)
    groups = {row["group"]: rng.standard_normal(32) for row in tables["sources"]}
    wanted: dict = {}
    for row in tables["truth"]:
        wanted[row["query"]] = wanted.get(row["query"], 0) + groups[row["source_group"]]

    def method(noise: float):
        sources = [(r["file"].removeprefix("sources/"), r["group"], groups[r["group"]]) for r in tables["sources"]]
        sources = [(k, group, v if i % 2 else v + rng.standard_normal(32)) for i, (k, group, v) in enumerate(sources)]
        queries = [
            (
                r["file"].removeprefix("queries/"),
                r["method"],
                wanted.get(r["file"], 0) + noise * rng.standard_normal(32),
            )
            for r in tables["queries"]
        ]
        return sources, queries

    def save(name: str, sources, queries):
        arrays = {}
        for kind, rows in (("sources", sources), ("queries", queries)):
            arrays[f"{'source' if kind == 'sources' else 'query'}_files"] = np.array(
                [f"{kind}/{key}" for key, *_ in rows]
            )
            arrays[kind] = np.stack([vector for *_, vector in rows]).astype(np.float16)
        np.savez(tmp_path / name, **arrays)

    one, other = method(2.0), method(2.5)
    save("one.npz", *one)
    save("other.npz", *other)
    others = [write_method(tmp_path, local, *other, name="other")]
    results = evaluate(write_case(tmp_path, local, *one, truth, prefix="queries/", others=others), local)
    summary = summarise(results, reference="other")

    paths = ["one.npz", "--versus", "other.npz", "--json", "theirs.json"]
    command = [sys.executable, scorer, data_folder / "dev", *paths]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path)
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    macro = summary["methods"]["one"]["macro"]["ap"]
    assert macro["mean"] == pytest.approx(theirs["macro_map"], abs=1e-6) and 0.1 < macro["mean"] < 0.99
    assert paired_difference(results["one"], results["other"]) == pytest.approx(theirs["versus"], abs=1e-6)
    assert list(summary["methods"]["one"]["minus_reference"]["ap"].values()) == pytest.approx(theirs["versus"])
    labels = [f"{cell['role']}/{cell['generator']}" for cell in summary["cells"]]
    assert set(labels) == theirs.keys() - {"macro_map", "versus"}
    for label, cell, values in zip(labels, summary["cells"], summary["methods"]["one"]["cells"]):
        expected = theirs[label]
        assert (cell["num_rows"], cell["num_units"]) == (expected["n"], expected["groups"])
        for ours, key in zip(VALUES, ("map", "recall_at_1", "recall_at_10")):
            assert values[ours]["mean"] == pytest.approx(expected[key], abs=1e-6)
