"""The figures of the report (sums, roll-ups, histograms), compared with a naive loop, and its errors."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.report import CLEAR, STORAGE, Collection, Page, SmallRun, small_run

from attrib.attribute.report import (
    count_histogram,
    gallery_positions,
    roll_up,
    similarity_histogram,
    source_sums,
    write_report,
)
from attrib.attribute.settings import ReportSettings
from attrib.common.errors import AttribError


@pytest.fixture
def run(tmp_path) -> SmallRun:
    return small_run(tmp_path)


def test_figures_agree_with_the_rows(run, tmp_path):
    summary, page = run.report(tmp_path)
    top = sorted(row["similarity"] for row in run.rows if row["rank"] == 1)
    assert summary["num_queries"] == 12 and summary["num_attributed"] == 9 and summary["num_failed"] == 3
    assert summary["num_clear"] == sum(value >= CLEAR for value in top)
    assert summary["median_top_similarity"] == pytest.approx(top[4])
    assert summary["num_sources_named"] == len({row["source_id"] for row in run.rows if row["share"] > 0})
    assert summary["num_missing_images"] == 0
    text = " ".join(" ".join(Page(page).texts).split())
    assert "12 generated images against 8 source images" in text
    assert "nprobe 5 · recall@10 0.991 on 1,000 held-out sources · recall@3 0.950 on 64 queries of this run" in text
    assert "below the target of the index, 0.99" in text
    assert "evenly spaced in the order of top similarity" in text and "not proof" in text


def test_source_sums_equal_sums_over_rows(run):
    expected: dict[int, list] = {}
    for row in run.rows:
        if row["share"] > 0:
            clear = row["similarity"] >= CLEAR
            sums = expected.setdefault(row["source_id"], [0.0, 0.0, 0, 0, 0, -1.0])
            for i, value in enumerate((row["share"], row["share"] * clear, row["rank"] == 1, clear, 1)):
                sums[i] += value
            sums[5] = max(sums[5], row["similarity"])
    names = ("share", "clear_share", "num_first", "num_clear", "num_queries", "best_similarity")
    found = {row["key"]: [row[name] for name in names] for row in source_sums(run.scan(), CLEAR).to_pylist()}
    assert found.keys() == expected.keys()
    for source_id, sums in expected.items():
        assert found[source_id] == pytest.approx(sums, abs=1e-6)
    assert sum(sums[0] for sums in found.values()) == pytest.approx(9, abs=1e-5)


@pytest.mark.parametrize("name", ["artist", "licence <i>", "year"])
def test_roll_up_keeps_nulls_and_loses_no_share(run, name):
    expected: dict = {}
    for row in run.rows:
        value = row[f"source_{name}"]
        value = None if value is None else str(value)
        expected[value] = expected.get(value, 0.0) + row["share"]
    found = roll_up(run.scan(), name, CLEAR)
    values = {row["key"]: row["share"] for row in found["values"]}
    assert values == pytest.approx({key: share for key, share in expected.items() if share > 0}, abs=1e-6)
    assert list(values.values()) == sorted(values.values(), reverse=True)
    assert found["num_values"] == len(values)


def test_long_roll_up_is_cut_to_its_first_values(tmp_path):
    table = pa.table(
        {
            "similarity": pa.array([0.7] * 60, pa.float32()),
            "share": 1.0 + np.arange(60),
            "source_group": [f"g{i:02d}" for i in range(60)],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    found = roll_up(STORAGE.dataset([str(tmp_path / "rows.parquet")], format="parquet"), "group", 0.5)
    assert found["num_values"] == 60
    assert [row["key"] for row in found["values"]] == [f"g{i:02d}" for i in range(59, 39, -1)]


def test_roll_up_columns_can_be_chosen(run, tmp_path):
    _, text = run.report(tmp_path, roll_up=("artist",))
    headings = re.findall(r'<h3>(\S+) <span class="soft">', text)
    assert headings == ["artist"]
    _, text = run.report(tmp_path)
    assert len(re.findall(r'<h3>(.+?) <span class="soft">', text)) == 3  # lists cannot be summed by value
    for name in ("tags", "owner"):
        with pytest.raises(AttribError, match=f"{name}.*artist, licence <i>, year"):
            run.report(tmp_path, roll_up=(name,))


def test_metadata_of_any_type_is_shown_or_left_out(tmp_path):
    """Bytes, lists and what Python or Arrow cannot write as text never end a report, which comes after all stages."""
    digests = pa.array([b"\xff" * 20, b"\xfe" * 20, None])
    odd = {
        "sha": digests.cast(pa.binary(20)),
        "thumb": digests.cast(pa.large_binary()),
        "view": digests.cast(pa.binary()),
        "same": digests.dictionary_encode(),
        "uuid": pa.array([b"\xff" * 16] * 3, pa.uuid()),
        "far": pa.array([2**62, None, 0], pa.timestamp("ms")),
        "mars": pa.array([0, 1, None], pa.timestamp("us", tz="Mars/X")),
        "list": pa.array([[b"\xff"], [], None]),
        "struct": pa.array([{"b": b"\xff"}, None, None]),
        "owner": pa.array(["Ann", "Bo", None]),
        "big": pa.array([2**53 + 1, None, 1]),
        "nothing": pa.nulls(3),
    }
    sources = Collection(tmp_path, "sources", ["a.png", "b.png", "d.png"], odd)
    queries = Collection(tmp_path, "queries", ["c.png"], {name: array.slice(0, 1) for name, array in odd.items()})
    similarity = np.array([[0.9, 0.8, 0.7]], np.float32)
    run = SmallRun(tmp_path, sources, queries, similarity, {})
    _, text = run.report(tmp_path)
    headings = set(re.findall(r'<h3>(\S+) <span class="soft">', text))
    assert headings == {"far", "owner", "big", "nothing"}
    assert "20 bytes" in text and "9007199254740993" in text and "Ann" in text
    for name in ("sha", "thumb", "same", "uuid", "mars", "list"):
        with pytest.raises(AttribError, match=rf"no column '{name}' of single values; choose from .*owner"):
            run.report(tmp_path, roll_up=(name,))


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(AttribError, match=r"attributions\.json is not there: run jobs\.attribute"):
        write_report(ReportSettings(attributions=str(tmp_path), output=str(tmp_path / "report.html")))


def test_gallery_spans_the_run():
    assert gallery_positions(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert gallery_positions(3, 24).tolist() == [0, 1, 2]
    assert gallery_positions(10, 1).tolist() == [0]
    assert gallery_positions(0, 24).tolist() == []


@pytest.mark.parametrize("clear", [-1.0, 0.0, 0.5, 0.613, 1.0])
def test_similarity_histogram_splits_exactly_at_the_threshold(clear):
    values = np.append(np.random.default_rng(1).uniform(-0.2, 1.0, 500), clear).astype(np.float32)
    threshold = float(np.float32(clear))
    edges, counts = similarity_histogram(values, threshold)
    assert len(counts) == len(edges) - 1 <= 42 and counts.sum() == 501
    assert threshold in edges
    assert counts[edges[:-1] >= threshold].sum() == np.count_nonzero(values >= threshold)


def test_count_histogram_covers_every_value():
    edges, counts = count_histogram(np.array([1, 1, 3, 2048]))
    assert counts.sum() == 4 and len(counts) == len(edges) - 1 <= 40
    edges, counts = count_histogram(np.array([1, 1, 3]))
    assert edges.tolist() == [0.5, 1.5, 2.5, 3.5] and counts.tolist() == [2, 0, 1]
