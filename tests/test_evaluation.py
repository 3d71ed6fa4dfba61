"""Ranking of known true sources, against a slow oracle and, where it is at hand, against the data folder's own scorer."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from attrib.errors import AttribError
from attrib.evaluation import average_precision, evaluate, format_table, macro_map, ranks_of_relevant, summarise
from attrib.identity import image_ids
from attrib.manifest import part_name
from attrib.settings import EvaluateSettings
from attrib.storage import Storage, join
from attrib.vectors import OUTCOME_FIELDS

METADATA = {"sources": "group", "queries": "method"}


def write_collection(folder, name: str, keys: list[str], vectors: np.ndarray, column: str, values, storage: Storage):
    """A manifest and embeddings as the jobs leave them, in partitions of 100; a row of NaN is an image that failed."""
    root = str(folder / name)
    ids, num_rows = image_ids(name, keys), []
    for part, start in enumerate(range(0, len(keys), 100)):
        rows = slice(start, start + 100)
        order = np.argsort(ids[rows])
        num_rows.append(len(order))
        table = pa.table({"id": ids[rows], "key": keys[rows], "uri": keys[rows], column: list(values[rows])})
        storage.write_table(join(root, "manifest", part_name(part)), table)
        made = vectors[rows][order].astype(np.float16)
        absent = np.isnan(made).any(axis=1)
        nulls = {field.name: pa.nulls(len(order), field.type) for field in OUTCOME_FIELDS[1:]}
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(made.ravel()), made.shape[1], mask=pa.array(absent))
        storage.write_table(
            join(root, "embeddings", part_name(part)),
            pa.table({"id": ids[rows][order], **nulls, "embedding": embedding}),
        )
    record = {
        "settings": {"collection": {"name": name, "uri": root}, "manifest": join(root, "manifest")},
        "digest": "", "order_digest": "", "rows_digest": "", "encoder": {"dimension": vectors.shape[1]},
        "num_rows": num_rows, "num_embedded": num_rows, "metadata_columns": [column],
    }  # fmt: skip
    storage.write_json(join(root, "manifest", "manifest.json"), record)
    storage.write_json(join(root, "embeddings", "embeddings.json"), record)
    return join(root, "embeddings")


def write_case(folder, storage, sources, queries, truth, prefix="q/") -> EvaluateSettings:
    """sources: [(key, group, vector)]; queries: [(key, method, vector)]; truth: [(query, role, group)]."""
    places = {}
    for name, rows in (("sources", sources), ("queries", queries)):
        keys, values, vectors = zip(*rows)
        places[name] = write_collection(folder, name, list(keys), np.stack(vectors), METADATA[name], values, storage)
    with open(folder / "truth.tsv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("query", "role", "source_group"), *truth])
    table = {"uri": str(folder / "truth.tsv"), "key_column": "query", "key_prefix": prefix}
    return EvaluateSettings(**places, truth=table, output=str(folder / "out.json"))


def drawn_case(seed: int):
    """40 sources in groups of one to three, of which copies are exact, and 90 queries near one or two groups."""
    rng = np.random.default_rng(seed)
    group_vectors = rng.standard_normal((20, 12))
    sources = []
    for i in range(40):
        group = int(rng.integers(20))
        vector = group_vectors[group] + (0 if i % 3 else rng.standard_normal(12))
        sources.append((f"s{i}.jpg", f"g{group}", vector))
    present = sorted({group for _, group, _ in sources})
    queries, truth = [], []
    for i in range(90):
        content, style = rng.choice(present, 2, replace=False)
        vector = sum(group_vectors[int(g[1:])] for g in (content, style)) + 2 * rng.standard_normal(12)
        queries.append((f"{i}.jpg", "a" if i % 3 else "b", vector))
        truth.append((f"q/{i}.jpg", "content", content))
        if i % 4:
            truth.append((f"q/{i}.jpg", "style", style))
    return sources, queries, truth


def oracle(sources, queries, truth) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """Per truth row AP, recall at 1 and at 10, by counting, without sorting."""
    cells: dict = {}
    vector_of = {f"q/{key}": np.float16(vector).astype(np.float64) for key, _, vector in queries}
    method_of = {f"q/{key}": method for key, method, _ in queries}
    for query, role, group in truth:
        others = {g for q, _, g in truth if q == query} - {group}
        pool = [(g == group, np.float16(v).astype(np.float64)) for _, g, v in sources if g not in others]
        scores = [(relevant, float(v @ vector_of[query] / np.linalg.norm(v))) for relevant, v in pool]
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
    case = drawn_case(seed)
    cells = evaluate(write_case(tmp_path, local, *case), local)
    expected = oracle(*case)
    assert cells.keys() == expected.keys() and len(cells) == 4
    for name, cell in cells.items():
        found = np.stack([cell.average_precision, cell.recall_at_1, cell.recall_at_10], axis=1)
        assert np.allclose(found, expected[name], atol=1e-12)
    large = [np.mean([precision for precision, *_ in rows]) for rows in expected.values() if len(rows) >= 30]
    assert 0 < len(large) < 4
    mean, low, high = macro_map(cells)
    assert mean == pytest.approx(np.mean(large)) and low < mean < high


def test_average_precision_by_hand():
    assert average_precision(np.array([1])) == 1.0
    assert average_precision(np.array([2, 4])) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_a_tie_never_helps():
    similarity = np.array([0.5, 0.9, 0.5, 0.5, 0.1])
    relevant = np.array([True, False, False, True, False])
    assert ranks_of_relevant(similarity, relevant).tolist() == [3, 4]
    assert ranks_of_relevant(np.zeros(4), np.array([True, False, False, False])).tolist() == [4]


def test_the_interval_resamples_groups_and_not_rows(tmp_path, local):
    """When all rows of a group agree, as many rows again say nothing new, so the interval stays as wide."""
    from attrib.evaluation import Cell

    precision = np.random.default_rng(0).random(40)
    names = [f"g{i}" for i in range(40)]
    once = macro_map({("r", "m"): Cell(names, precision, precision, precision)})
    often = macro_map(
        {("r", "m"): Cell(names * 9, np.tile(precision, 9), np.tile(precision, 9), np.tile(precision, 9))}
    )
    assert once == pytest.approx(often)
    assert once[2] - once[1] == pytest.approx(2 * 1.96 * precision.std() / np.sqrt(40), rel=0.1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda s, q, t: t.append(("q/absent.jpg", "content", "g1")),
            "query 'q/absent.jpg' or source group 'g1' has no vector",
        ),
        (lambda s, q, t: t.append(("q/1.jpg", "content", "g99")), "source group 'g99' has no vector"),
        (lambda s, q, t: q.__setitem__(1, ("1.jpg", "a", np.full(12, np.nan))), "query 'q/1.jpg' .* has no vector"),
        (lambda s, q, t: t.clear(), "truth.tsv has no rows"),
    ],
)
def test_a_truth_without_vectors_is_named(change, expected, tmp_path, local):
    sources, queries, truth = drawn_case(0)
    change(sources, queries, truth)
    with pytest.raises(AttribError, match=expected):
        evaluate(write_case(tmp_path, local, sources, queries, truth), local)


@pytest.mark.parametrize("key", ["truth_role_column", "truth_group_column", "group_column", "method_column"])
def test_an_absent_column_is_named(key, tmp_path, local):
    settings = write_case(tmp_path, local, *drawn_case(0)).model_copy(update={key: "nope"})
    with pytest.raises(AttribError, match="column 'nope'; it has "):
        evaluate(settings, local)


def test_the_job_prints_a_table_and_writes_strict_json(start_job, tmp_path, local):
    sources, queries, truth = drawn_case(0)
    settings = write_case(tmp_path, local, sources, queries, truth[:20])
    job = start_job("evaluate", settings.model_dump(mode="json"), tmp_path)
    said, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    written = json.loads(
        (tmp_path / "out.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    summary = summarise(evaluate(settings, local))
    assert written["cells"] == summary["cells"] and written["macro_map"] is None  # no cell has 30 rows
    assert said.strip() == format_table(summary) and "no macro mAP" in said
    assert sum(cell["num_rows"] for cell in written["cells"]) == 20


def test_cells_equal_those_of_the_independent_scorer(data_folder, tmp_path, local):
    scorer = data_folder / "score.py"
    if not scorer.exists():
        pytest.skip(f"no scorer under {data_folder}")
    tables = {}
    for name in ("sources", "queries", "truth"):
        with open(data_folder / "dev" / f"{name}.tsv", newline="", encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file, delimiter="\t"))
    # Vectors that know a little of the truth, so that ranks are neither all first nor all by chance; copies tie exactly.
    rng = np.random.default_rng(0)
    groups = {row["group"]: rng.standard_normal(32) for row in tables["sources"]}
    sources = [(r["file"].removeprefix("sources/"), r["group"], groups[r["group"]]) for r in tables["sources"]]
    sources = [(key, group, v if i % 2 else v + rng.standard_normal(32)) for i, (key, group, v) in enumerate(sources)]
    wanted: dict = {}
    for row in tables["truth"]:
        wanted[row["query"]] = wanted.get(row["query"], 0) + groups[row["source_group"]]
    queries = [
        (r["file"].removeprefix("queries/"), r["method"], wanted.get(r["file"], 0) + 2 * rng.standard_normal(32))
        for r in tables["queries"]
    ]
    truth = [(r["query"], r["role"], r["source_group"]) for r in tables["truth"]]
    summary = summarise(evaluate(write_case(tmp_path, local, sources, queries, truth, prefix="queries/"), local))

    arrays = {}
    for name, rows in (("source", sources), ("query", queries)):
        folder = "sources" if name == "source" else "queries"
        arrays[f"{name}_files"] = np.array([f"{folder}/{key}" for key, _, _ in rows])
        arrays[folder] = np.stack([vector for _, _, vector in rows]).astype(np.float16)
    np.savez(tmp_path / "vectors.npz", **arrays)
    command = [
        sys.executable,
        scorer,
        data_folder / "dev",
        tmp_path / "vectors.npz",
        "--json",
        tmp_path / "theirs.json",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    assert summary["macro_map"] == pytest.approx(theirs["macro_map"], abs=1e-6) and 0.1 < summary["macro_map"] < 0.99
    assert {f"{cell['role']}/{cell['method']}" for cell in summary["cells"]} == theirs.keys() - {"macro_map"}
    for cell in summary["cells"]:
        expected = theirs[f"{cell['role']}/{cell['method']}"]
        assert (cell["num_rows"], cell["num_groups"]) == (expected["n"], expected["groups"])
        for key in ("map", "recall_at_1", "recall_at_10"):
            assert cell[key] == pytest.approx(expected[key], abs=1e-6)
