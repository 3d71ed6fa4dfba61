"""The files of a comparison: numbers against their scores, images, and names that try to inject HTML."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.images import pictures
from support.pairs import Page, write_collection

from attrib.evaluate import page as comparison
from attrib.evaluate.collection import Collection
from attrib.evaluate.distractors import PREFIX
from attrib.evaluate.page import ImageFolders, image_folders, most_different, query_table, write_comparison
from attrib.evaluate.protocol import TruthRow, score_truth
from attrib.evaluate.scores import QueryScores
from attrib.evaluate.settings import EvaluateSettings
from attrib.pages.charts import Steps, forest_figure, steps_figure, svg

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}.png"
NUM_QUERIES = 36


def collections(keys: list[str], names: list[str]) -> tuple[Collection, Collection, list[TruthRow]]:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(keys), 12))
    wanted = rng.integers(0, len(keys), len(names))
    queries = Collection(
        names, vectors[wanted] + rng.standard_normal((len(names), 12)), {"method": ["gan"] * len(names)}
    )
    truth = [TruthRow(name, "content", f"g{w}") for name, w in zip(names, wanted)]
    return Collection(keys, vectors, {"group": [f"g{i}" for i in range(len(keys))]}), queries, truth


def results_of(sources: Collection, queries: Collection, truth) -> dict[str, QueryScores]:
    """Two methods: all dimensions of the vectors, and the first two."""
    few = [Collection(c.keys, c.vectors[:, :2], c.metadata) for c in (sources, queries)]
    return {"all <b>twelve</b>": score_truth(sources, queries, truth), "first two": score_truth(*few, truth)}


@pytest.fixture(scope="module")
def results():
    keys = [HOSTILE, *(f"s{i}.png" for i in range(19))]
    return results_of(*collections(keys, [f"{HOSTILE[:-4]}{i}.png" for i in range(NUM_QUERIES)]))


def test_the_rows_with_the_largest_differences_are_found(results):
    rows = most_different(results, 5)
    a, b = (scores.values["ap"] for scores in results.values())
    scores = next(iter(results.values()))
    gaps = np.abs(a - b)
    # Oracle: for each choice, look at all remaining rows again; each unit once.
    left, expected = set(range(NUM_QUERIES)), []
    while len(expected) < 5:
        best = max(sorted(left), key=lambda row: gaps[row])
        expected.append(best)
        left -= {row for row in left if scores.units[row] == scores.units[best]}
    assert rows == expected and len({scores.units[row] for row in rows}) == 5
    assert most_different({"only": scores}, 5) == [] == most_different(results, 0)


def test_every_number_is_on_the_page_and_names_are_escaped(results, tmp_path, local):
    summary = write_comparison(results, str(tmp_path), local, title=HOSTILE, reference="first two", num_shown=4)
    raw = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    page = Page(raw)
    assert not {"script", "iframe", "link"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search(r"https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", raw)) and "default-src 'none'" in raw
    assert HOSTILE in page.text and "all <b>twelve</b>" in page.text
    assert "Ties rank the irrelevant first." in page.text
    assert sum(tag == "article" for tag, _ in page.elements) == 4
    for method in summary["methods"].values():
        for values in (*method["cells"], method["macro"]):
            for interval in values.values():
                assert f"{interval['mean']:.3f}" in page.text
                assert f"{interval['low']:.3f} to {interval['high']:.3f}" in page.text
    difference = summary["methods"]["all <b>twelve</b>"]["minus_reference"]["ap"]
    assert difference["low"] > 0 and f'<b class="value">{difference["mean"]:+.3f}</b>' in raw
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(summary))


def test_figures_follow_the_forest_plot_and_captions_are_escaped(results, tmp_path, local):
    chart = svg(steps_figure([Steps(HOSTILE, ["a", "b"], {"one": [0.1, 0.2]})]), HOSTILE)
    caption = f"{HOSTILE}\nHow to read it: {HOSTILE}\nand more"
    summary = write_comparison(
        results,
        str(tmp_path),
        local,
        num_shown=0,
        figures={caption: chart, "plain": chart},
        measures={"theory": {"a": 0.5}},
    )
    raw = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    page = Page(raw)
    assert raw.count(chart) == 2
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert page.text.count(HOSTILE) == 2 + 2 and "and more" in page.text and "plain" in page.text
    assert raw.index('class="card forest"') < raw.index(chart) < raw.index("By role and generator")
    # The styles of the page must not change the colours of the charts.
    style = raw[raw.index("<style>") : raw.index("</style>")]
    assert not re.search(r"(text|path|svg \w+|^\s*g) *[{,]", style, re.MULTILINE)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(summary)) | {"theory": {"a": 0.5}}


def test_a_difference_whose_interval_includes_zero_is_not_bold(results, tmp_path, local):
    summary = write_comparison(results, str(tmp_path), local, reference="all <b>twelve</b>")
    assert summary["methods"]["first two"]["minus_reference"]["ap"]["low"] < 0
    assert '<b class="value">' not in (tmp_path / "comparison.html").read_text()


def test_the_macro_mean_can_be_computed_from_the_parquet_file(results, tmp_path, local):
    summary = write_comparison(results, str(tmp_path), local)
    table = pq.read_table(tmp_path / "queries.parquet")
    assert table.equals(query_table(results)) and table.num_rows == 2 * NUM_QUERIES
    for name, method in summary["methods"].items():
        rows = [row for row in table.to_pylist() if row["evaluated_method"] == name]
        assert [row["query"] for row in rows] == results[name].queries
        assert np.mean([row["ap"] for row in rows]) == pytest.approx(method["macro"]["ap"]["mean"])
        assert {(row["role"], row["generator"]) for row in rows} == {("content", "gan")}
        assert all(len(row["top_keys"]) == len(row["top_similarity"]) == 5 for row in rows)


def test_the_forest_plot_shows_every_macro_mean_and_the_reference(results, tmp_path, local, monkeypatch):
    drawn = {}

    def keep(rows, *labels, reference):
        drawn.update(rows=rows, reference=reference)
        return forest_figure(rows, *labels, reference=reference)

    monkeypatch.setattr(comparison, "forest_figure", keep)
    summary = write_comparison(results, str(tmp_path), local, reference="first two")
    macros = {name: method["macro"]["ap"] for name, method in summary["methods"].items()}
    assert drawn["rows"] == {name: (m["mean"], m["low"], m["high"]) for name, m in macros.items()}
    assert drawn["reference"] == macros["first two"]["mean"]


def test_the_page_reports_that_no_cell_is_large_enough(tmp_path, local):
    few = results_of(*collections([f"s{i}.png" for i in range(9)], [f"q{i}.png" for i in range(7)]))
    summary = write_comparison(few, str(tmp_path), local)
    page = Page((tmp_path / "comparison.html").read_text())
    assert summary["methods"]["first two"]["macro"] is None
    assert "No macro mean: no cell has 30 or more rows." in page.text and "svg" not in dict(page.elements)
    assert ("details", {"open": None}) in page.elements


def test_images_come_from_the_embed_runs(tmp_path, local):
    sources, queries, truth = collections([f"s{i}.png" for i in range(20)], [f"q{i}.jpg" for i in range(NUM_QUERIES)])
    found = results_of(sources, queries, truth)
    # The first sources of the second method come from a separate collection of distractors.
    other = found["first two"]
    swapped = [[PREFIX + keys[0], *keys[1:]] for keys in other.top_keys]
    found["first two"] = QueryScores(**{**vars(other), "top_keys": swapped})
    uris = {
        name: write_collection(tmp_path, name, c.keys, c.vectors, local, images=pictures(c.keys))
        for name, c in (("sources", sources), ("queries", queries), ("distractors", sources))
    }
    (tmp_path / "queries" / "images" / queries.keys[most_different(found, 3)[0]]).unlink()
    output = str(tmp_path / "out")
    folders = {"": uris["sources"], PREFIX: uris["distractors"]}
    write_comparison(found, output, local, images=ImageFolders(uris["queries"], folders, 64), num_shown=3)
    page = Page((tmp_path / "out" / "comparison.html").read_text())
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 3 * 4 - 1 and all(i["src"].startswith("data:image/jpeg;base64,") for i in images)
    assert "the file is gone since it was listed" in page.text
    assert sum(i["title"].startswith(PREFIX) for i in images) == 3
    # The page is also written without the collections.
    write_comparison(found, output, local, images=ImageFolders(str(tmp_path / "gone"), {"": str(tmp_path / "gone")}))
    assert "the manifest is gone" in (tmp_path / "out" / "comparison.html").read_text()


def test_images_come_from_the_reference_method():
    methods = [{"name": n, "sources": f"/{n}/s", "queries": f"/{n}/q", "distractors": f"/{n}/d"} for n in "ab"]
    given = {"methods": methods, "abc": {"test_cases": {"c": "/c.json"}}, "output": "/o", "thumbnail_px": 50}
    settings = EvaluateSettings.model_validate(given | {"reference": "b"})
    assert image_folders(settings) == ImageFolders("/b/q", {"": "/b/s", PREFIX: "/b/d"}, 50)
    methods[0]["distractors"] = "/a/d.npy"
    assert image_folders(EvaluateSettings.model_validate(given)).sources == {"": "/a/s"}
