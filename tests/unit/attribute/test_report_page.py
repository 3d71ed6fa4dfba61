"""The report's page as a browser reads it: it fetches nothing, hostile text stays text, missing images are named."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from support.report import HOSTILE, STORAGE, Page, SmallRun, encoded, small_run

from attrib.common.storage import join


@pytest.fixture
def run(tmp_path) -> SmallRun:
    return small_run(tmp_path)


def test_page_is_self_contained_and_hostile_text_stays_text(run, tmp_path):
    summary, text = run.report(tmp_path, title=HOSTILE)
    page = Page(text)
    assert not page.open
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & set(tags)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"href", "srcset"} & set(attributes), tag
        # Charts refer to their own marks only.
        assert attributes.get("xlink:href", "#").startswith("#")
    assert not re.findall(r"url\((?!#)", text)
    assert len(page.images()) > 9 and all(src.startswith("data:image/jpeg;base64,") for src in page.images())
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    shown = "".join(page.texts)
    # Title (twice), a source, a query, its prompt, an artist and a reason.
    assert shown.count(HOSTILE) >= 6
    assert "prompt 6" in shown and "draft" in shown
    assert summary["num_bytes"] == len(text.encode()) < 1_000_000


def test_thumbnails_are_small(run, tmp_path):
    _, text = run.report(tmp_path, thumbnail_px=48)
    for source in Page(text).images():
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        assert image.format == "JPEG" and image.size == (48, 32)


def test_gone_and_broken_originals_leave_a_placeholder(run, tmp_path):
    attributed = [row["query_uri"] for row in run.rows if row["rank"] == 1]
    STORAGE.resolve(attributed[0])[0].delete_file(attributed[0])
    STORAGE.write_bytes(attributed[1], b"not an image")
    STORAGE.write_bytes(attributed[2], encoded(0, (2000, 1000)))
    summary, text = run.report(tmp_path)
    assert summary["num_missing_images"] == 3
    shown = "".join(Page(text).texts)
    assert "the file is gone since it was listed" in shown and "not an image in a supported format" in shown
    assert "exceed the limit of 1.0 megapixels" in shown

    STORAGE.delete_folder(run.sources.root)
    summary, text = run.report(tmp_path)
    assert summary["num_missing_images"] > 3 and "no image: the manifest is gone" in "".join(Page(text).texts)
    assert "painting-" in text


def test_sources_without_a_vector_are_counted_and_where_there_are_none_nothing_is_said(run, tmp_path):
    summary, text = run.report(tmp_path)
    assert summary["num_unread_sources"] == 0 and "cannot be found" not in text
    uri = join(run.sources.embeddings, "embeddings.json")
    record = STORAGE.read_json(uri)
    STORAGE.write_json(uri, record | {"num_rows": [record["num_rows"][0] + 1_200]})
    summary, text = run.report(tmp_path)
    shown = " ".join("".join(Page(text).texts).split())
    assert summary["num_unread_sources"] == 1_200
    listed = f"{record['num_rows'][0] + 1_200:,} listed sources could not be read and cannot be found"
    assert f"1,200 of {listed}" in shown and join(run.sources.embeddings, "failures.parquet") in shown


def generators_of(run: SmallRun, **values) -> dict:
    """What jobs.identify says of a dump, put into the record of a run."""
    shares = [
        {
            "name": name,
            "num_images": count,
            "share": share,
            "low": share / 2,
            "high": share * 1.5,
            "of_all_low": 0.0,
            "of_all_high": 1.0,
        }
        for name, count, share in (
            ("gan-a", 5, 0.5),
            ("gan-b|gan-c", 1, 0.125),
            ("(no registered generator)", 3, 0.375),
        )
    ]
    none = {"change": None, "low": None, "high": None, "changed": False}
    changes = [
        {"name": "gan-a", "change": 0.2, "low": 0.1, "high": 0.3, "changed": True, "note": None},
        {"name": "gan-b|gan-c", "note": "new"} | none,
        {"name": "(no registered generator)", "note": "another registry"} | none,
        {"name": "gone " + HOSTILE, "note": "vanished"} | none,
    ]
    candidate = {
        "name": "candidate-01",
        "num_images": 1100,
        "num_distinct": 11,
        "cohesion": 0.8,
        "cut": 0.5,
        "nearest": "gan-a",
        "nearest_score": 0.3,
    }
    first = next(row for row in run.rows if row["rank"] == 1)
    exemplars = [{"id": first["query_id"], "key": HOSTILE, "uri": "u"}, {"id": 1, "key": HOSTILE, "uri": "u"}]
    said = {
        "verdicts": {"known": 5, "family": 1, "unknown": 3, "unassessable": 3},
        "shares": shares,
        "changes": changes,
        "candidates": [candidate | {"exemplars": exemplars}],
        "negatives": {"photographs": 30},
        "floor": 1 / 31,
        "abstains": None,
        "warnings": ["all are " + HOSTILE],
        "unassessable_reasons": [{"reason": "decode", "count": 3, "example": "decode: " + HOSTILE}],
        "families": ["gan-b|gan-c"],
        "recognised": {"gan-a": 0.8, "gan-b|gan-c": 0.625},
        "sets": {
            "num_sets": 30,
            "num_too_small": 1,
            "verdicts": {"known": 15, "unknown": 15},
            "listed": [
                {
                    "name": f"{HOSTILE} {i}",
                    "num_images": 40 + i,
                    "verdict": "known" if i else "unknown",
                    "nearest": "gan-c",
                }
                | {"generator": "gan-b|gan-c" if i else None, "p_value": 0.0125}
                for i in range(30)
            ],
        },
    }
    identified = join(run.uri, "generators")
    rates = {"false_attribution_rate": 0.025, "false_rejection_rate": 0.05, "unit": "source"}
    STORAGE.write_json(
        join(identified, "generators.json"), {"settings": {"verdicts": rates}, "left_out_rates": {"gan-a": 0.125}}
    )
    record = STORAGE.read_json(join(run.uri, "attributions.json"))
    record["settings"] |= {"generators": identified}
    STORAGE.write_json(join(run.uri, "attributions.json"), record | {"generators": said | values})
    return said


def test_generators_are_shown_with_intervals_and_careful_words(run, tmp_path):
    _, without = run.report(tmp_path)
    assert "generators the images are consistent with" not in without
    generators_of(run)
    _, text = run.report(tmp_path)
    page = Page(text)
    shown = " ".join("".join(page.texts).split())
    assert not page.open and "script" not in [tag for tag, _ in page.tags]
    assert "5 images are consistent with a registered generator and 1 with a family" in shown
    assert "No verdict proves" in shown
    assert "25.0 to 75.0 %" in shown and "+20.0 (+10.0 to +30.0) *" in shown and "new" in shown
    assert "background cohort of 30 photographs; the smallest possible p-value is 0.0323" in shown
    assert "at most 2.5 % of images of other origin, counted by source" in shown and "30 sets were tested" in shown
    assert "name was given: 12 % (gan-a)." in shown
    assert "one family each: gan-b or gan-c." in shown and "80 %" in shown and "62 %" in shown
    assert "1,100 (11 distinct)" in shown and "another registry" in shown
    assert "In the last run but not in this one: gone" in shown
    for cell in ("consistent with gan-b or gan-c", "gan-c", "0.0125", "59", "and 10 more with higher p-values"):
        assert f">{cell}</td>" in text
    before = " ".join("".join(Page(without).texts).split())
    # A warning, a name that vanished, two exemplars, 20 sets and a reason.
    assert shown.count(HOSTILE) == before.count(HOSTILE) + 25 and "made by" not in shown
    section = text[text.index("that look like one generator") : text.index("sets were tested")]
    assert section.count("<img ") == 1 and "no image: not in the manifest" in section
    assert "50.0 (25.0 to 75.0)" in shown and "37.5 (18.8 to 56.2)" in shown, "the chart"


def test_a_run_of_an_earlier_version_whose_identify_run_is_gone_is_shown(run, tmp_path):
    said = generators_of(run)
    candidate = {name: value for name, value in said["candidates"][0].items() if name != "num_distinct"}
    changes = [{name: value for name, value in said["changes"][0].items() if name != "note"}]
    generators_of(
        run,
        candidates=[candidate],
        changes=changes,
        sets={"num_sets": 2, "num_too_small": 1, "verdicts": {"known": 2}},
        recognised=None,
        unassessable_reasons=[{"reason": "decode: empty", "count": 3}],
    )
    STORAGE.delete_folder(join(run.uri, "generators"))
    _, text = run.report(tmp_path)
    assert not Page(text).open and "+20.0 (+10.0 to +30.0) *" in text and "decode: empty" in text
    assert "at most 2.5 %" not in text and "distinct)" not in text and ">recognised</th>" not in text


def test_abstention_is_shown_in_place_of_shares(run, tmp_path):
    generators_of(
        run,
        abstains="the rate 0.01 is below the floor",
        shares=None,
        changes=None,
        candidates=[],
        sets=None,
        negatives={},
    )
    _, text = run.report(tmp_path)
    assert "Nothing was attributed: the rate 0.01 is below the floor." in text
    assert "Estimated shares" not in text and "cohort of\nno images" in text and not Page(text).open


def test_failures_are_counted_and_listed(run, tmp_path):
    _, text = run.report(tmp_path)
    shown = "".join(Page(text).texts)
    assert "3 queries have no attribution" in shown
    assert re.search(r'<td class="number">2</td><td><bdi>read</bdi></td><td><bdi>the file is gone</bdi>', text)
    assert "q6" in shown and "q8" in shown and "q2" in shown


def test_run_in_which_every_query_failed(run, tmp_path):
    everything = dict.fromkeys(range(12), ("decode", "empty file"))
    failed = SmallRun(tmp_path / "failed", run.sources, run.queries, np.zeros((12, 8), np.float32), everything)
    summary, text = failed.report(tmp_path)
    assert summary["num_attributed"] == summary["num_sources_named"] == 0 and summary["median_top_similarity"] is None
    assert not Page(text).open and "empty file" in text


def test_same_run_gives_the_same_page(run, tmp_path):
    assert run.report(tmp_path)[1] == run.report(tmp_path)[1]
