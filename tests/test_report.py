"""The report of small runs made by the library's own functions: figures against sums taken row by row, and hostile text."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shards import make_plan

from attrib.attribution import RunStamp, attribution_rows, block_name
from attrib.corpus import LOCATION_FIELDS
from attrib.errors import AttribError
from attrib.identity import image_ids
from attrib.manifest import part_name
from attrib.report import count_histogram, gallery_positions, roll_up, similarity_histogram, source_sums, write_report
from attrib.search import Candidates
from attrib.settings import ReportSettings, SharesSettings, StorageSettings
from attrib.storage import Storage, join

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}.png"
STORAGE = Storage(StorageSettings())
ENCODER = {"name": "tiny<b>", "model_digest": "d" * 64, "preprocessing": {"crop_px": 8}, "dimension": 4}
TOP_K = 3
CLEAR = 0.85


def encoded(colour: int, size: tuple[int, int] = (300, 200)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour % 256, 80, 160)).save(buffer, "PNG")
    return buffer.getvalue()


class Collection:
    """A manifest of `keys` with its embeddings record; the images are files, or rows of one Parquet file."""

    def __init__(self, root, name: str, keys: list[str], metadata: dict[str, pa.Array], in_parquet: bool = False):
        self.root, self.keys = f"{root}/{name}", keys
        self.manifest, self.embeddings = f"{self.root}/manifest", f"{self.root}/embeddings"
        self.ids = image_ids(name, keys)
        count = len(keys)
        self.uris = [f"{self.root}/image-{i}.png" for i in range(count)]
        place: dict = {}
        settings = {"name": name, "uri": self.root}
        if in_parquet:
            shard = f"{self.root}/images.parquet"
            table = pa.table({"name": keys, "data": [encoded(40 * i) for i in range(count)]})
            STORAGE.write_table(shard, table, row_group_rows=2)
            self.uris = [shard] * count
            place = {"row_group": [i // 2 for i in range(count)], "row": [i % 2 for i in range(count)]}
            settings |= {"format": "parquet", "key_column": "name", "bytes_column": "data"}
        else:
            for i, uri in enumerate(self.uris):
                STORAGE.write_bytes(uri, encoded(40 * i))
        columns = {"id": self.ids, "key": keys, "uri": self.uris} | place
        arrays = [pa.array(columns.get(field.name, [None] * count), field.type) for field in LOCATION_FIELDS]
        fields = [*LOCATION_FIELDS, *(pa.field(column, array.type) for column, array in metadata.items())]
        self.rows = pa.table([*arrays, *metadata.values()], schema=pa.schema(fields))
        STORAGE.write_table(join(self.manifest, part_name(0)), self.rows)
        record = {
            "settings": {"collection": settings},
            "digest": "m",
            "order_digest": "o",
            "rows_digest": "r",
            "num_rows": [count],
        }
        STORAGE.write_json(join(self.manifest, "manifest.json"), record | {"metadata_columns": list(metadata)})
        record = {"settings": {"manifest": self.manifest, "max_megapixels": 1.0}, "encoder": ENCODER, "digest": "e"}
        STORAGE.write_json(
            join(self.embeddings, "embeddings.json"), record | {"num_rows": [count], "num_embedded": [count]}
        )

    def sources(self) -> pa.Table:
        names = [name for name in self.rows.schema.names if name not in ("offset", "num_bytes", "row_group", "row")]
        return self.rows.select(names).sort_by("id").combine_chunks()


class SmallRun:
    """An attribution run of two blocks on disk. similarity: float32 [queries, sources]; failed: {query position: (stage, reason)}."""

    def __init__(self, root, sources: Collection, queries: Collection, similarity: np.ndarray, failed: dict):
        self.sources, self.queries, self.uri = sources, queries, f"{root}/run"
        index = f"{root}/index"
        STORAGE.write_table(join(index, "shard-00000", "sources.parquet"), sources.sources())
        STORAGE.write_json(
            join(index, "index.json"),
            {
                "settings": {"embeddings": sources.embeddings, "rerank_factor": 8},
                "plan": make_plan("ivf_flat").to_dict(),
                "template_sha256": "t",
                "vectors_fit": True,
                "rates": {},
                "is_compressed": False,
                "shards": [{"num_vectors": len(sources.ids)}],
                "digest": "i" * 64,
                "encoder": ENCODER,
                "nprobe": 5,
                "recall": {"k": 10, "recall": 0.9912, "target": 0.99, "met": True, "num_held_out": 1000},
                "metadata_columns": [
                    name for name in sources.sources().schema.names if name not in ("id", "key", "uri")
                ],
            },
        )
        blocks = np.array_split(np.argsort(queries.ids), 2)
        self.rows = []
        for block, places in enumerate(blocks):
            self._write_block(block, places, similarity, failed)
        record = {
            "run_id": "run-1",
            "written_at": "2026-01-02T03:04:05+00:00",
            "versions": {"python": "3"},
            "inputs": {"index": "i", "queries": "e"},
            "settings": {"queries": queries.embeddings, "index": index, "top_k": TOP_K},
            "num_queries": len(queries.ids),
            "num_attributed": len(queries.ids) - len(failed),
            "num_failed": len(failed),
            "num_rows": len(self.rows),
            "num_blocks": len(blocks),
            "nprobe": 5,
            "num_candidates": 24,
            "model": ENCODER,
            "index_digest": "i" * 64,
            "index_recall": {"k": 10, "recall": 0.9912, "target": 0.99, "met": True, "num_held_out": 1000},
            "batch_recall": {"k": 3, "recall": 0.95, "num_queries": 64},
        }
        STORAGE.write_json(join(self.uri, "attributions.json"), record)

    def _write_block(self, block: int, places: np.ndarray, similarity: np.ndarray, failed: dict) -> None:
        kept = [(row, place) for row, place in enumerate(places) if place not in failed]
        order = np.argsort(-similarity, axis=1)[:, :TOP_K]
        query = np.array([row for row, _ in kept for _ in range(TOP_K)], np.int64)
        source = np.array([s for _, place in kept for s in order[place]], np.int64)
        score = np.array([similarity[place, s] for _, place in kept for s in order[place]], np.float32)
        table = self.queries.rows.take(pa.array(places)).drop_columns(["offset", "num_bytes", "row_group", "row"])
        for at, name in enumerate(("stage", "reason")):
            column = [failed[place][at] if place in failed else None for place in places]
            table = table.append_column(name, pa.array(column, pa.string()))
        best = Candidates(query, self.sources.ids[source], score, score)
        attributions, outcomes = attribution_rows(
            best, table.combine_chunks(), self.sources.sources(), TOP_K, SharesSettings(), RunStamp("run-1", "d", "i")
        )
        STORAGE.write_table(join(self.uri, "attributions", block_name(block)), attributions)
        STORAGE.write_table(join(self.uri, "outcomes", block_name(block)), outcomes)
        self.rows += attributions.to_pylist()

    def scan(self):
        uris = [join(self.uri, "attributions", block_name(block)) for block in range(2)]
        return STORAGE.dataset(uris, format="parquet")

    def report(self, root, **settings) -> tuple[dict, str]:
        values = {"attributions": self.uri, "output": f"{root}/report.html", "clear_similarity": CLEAR} | settings
        summary = write_report(ReportSettings(**values))
        return summary, STORAGE.read_bytes(summary["output"]).decode()


@pytest.fixture
def run(tmp_path) -> SmallRun:
    sources = Collection(
        tmp_path,
        "sources",
        [HOSTILE, *(f"painting-{i}.png" for i in range(7))],
        {
            "artist": pa.array([HOSTILE, None, "Ada", "Ada", "", "Bo", None, "Bo"]),
            "licence <i>": pa.array(["cc0", "cc0", "by", "by", "by", "by", "nd", "nd"]).dictionary_encode(),
            "year": pa.array([1900, 1901, 1900, None, 1902, 1902, 1900, 1903], pa.int32()),
            "tags": pa.array([["a"], [], None, ["b", "c"], [], [], [], []]),
        },
        in_parquet=True,
    )
    prompts = [HOSTILE, None, *(f"prompt {i}" for i in range(10))]
    # A column whose name, with the prefix of the rows, ends like one of theirs.
    metadata = {"prompt": pa.array(prompts), "status": pa.array(["draft"] * 12)}
    queries = Collection(tmp_path, "queries", [HOSTILE, *(f"q{i}" for i in range(11))], metadata)
    similarity = np.random.default_rng(0).uniform(0.3, 0.9, (12, 8)).astype(np.float32)
    failed = {3: ("decode", "damaged PNG " + HOSTILE), 7: ("read", "the file is gone"), 9: ("read", "the file is gone")}
    return SmallRun(tmp_path, sources, queries, similarity, failed)


class Page(HTMLParser):
    """Everything that a browser would see as an element, an attribute or text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def images(self) -> list[str]:
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


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
    assert "nprobe 5 · recall@10 0.991 on 1,000 held-out sources · recall@3 0.950 on 64 queries of this batch" in text
    assert "below the index's target of 0.99" in text
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


def test_page_is_self_contained_and_hostile_text_stays_text(run, tmp_path):
    summary, text = run.report(tmp_path, title=HOSTILE)
    page = Page(text)
    assert not page.open
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & set(tags)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"href", "srcset", "xlink:href"} & set(attributes), tag
    assert len(page.images()) > 9 and all(src.startswith("data:image/jpeg;base64,") for src in page.images())
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    shown = "".join(page.texts)
    # Title (twice), a source, a query, its prompt, an artist and a reason.
    assert shown.count(HOSTILE) >= 6
    assert "prompt 6" in shown and "draft" in shown
    assert summary["num_bytes"] == len(text.encode()) < 1_000_000


def test_thumbnails_are_small(run, tmp_path):
    import base64

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
    change = {"name": "gan-a", "change": 0.2, "low": 0.1, "high": 0.3, "changed": True}
    candidate = {
        "name": "candidate-01",
        "num_images": 11,
        "cohesion": 0.8,
        "cut": 0.5,
        "nearest": "gan-a",
        "nearest_score": 0.3,
    }
    said = {
        "verdicts": {"known": 5, "family": 1, "unknown": 3, "unassessable": 3},
        "shares": shares,
        "changes": [change],
        "candidates": [candidate | {"exemplars": [{"id": 1, "key": HOSTILE, "uri": "u"}]}],
        "negatives": {"photographs": 30},
        "floor": 1 / 31,
        "abstains": None,
        "warnings": ["all are " + HOSTILE],
        "unassessable_reasons": [{"reason": "decode: " + HOSTILE, "count": 3}],
        "sets": {"num_sets": 2, "num_too_small": 1, "verdicts": {"known": 1, "unknown": 1}},
    }
    record = STORAGE.read_json(join(run.uri, "attributions.json"))
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
    assert "5 consistent with a registered generator, 1 with a family" in shown and "No verdict proves" in shown
    assert "25.0 to 75.0 %" in shown and "+20.0 (+10.0 to +30.0) *" in shown and "new" in shown
    assert "calibrated on 30 photographs" in shown and "is 0.0323" in shown and "2 sets were tested" in shown
    before = " ".join("".join(Page(without).texts).split())
    assert shown.count(HOSTILE) == before.count(HOSTILE) + 3 and "made by" not in shown
    bars = [attributes for tag, attributes in page.tags if tag == "line" and attributes.get("class") == "whisker"]
    assert len(bars) == 3 and float(bars[0]["x1"]) == pytest.approx(150 + 220 / 3, abs=0.01)
    assert float(bars[0]["x2"]) == pytest.approx(370)


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
    assert "Estimated shares" not in text and "no negatives" in text and not Page(text).open


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


def test_roll_up_columns_can_be_chosen(run, tmp_path):
    _, text = run.report(tmp_path, roll_up=("artist",))
    headings = re.findall(r'<h3>(\S+) <span class="soft">', text)
    assert headings == ["artist"]
    _, text = run.report(tmp_path)
    assert len(re.findall(r'<h3>(.+?) <span class="soft">', text)) == 3  # lists cannot be summed by value
    for name in ("tags", "owner"):
        with pytest.raises(AttribError, match=f"{name}.*artist, licence <i>, year"):
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
    histogram = similarity_histogram(values, threshold)
    assert len(histogram["bars"]) <= 42
    for bar in histogram["bars"]:
        assert bar["is_clear"] == (bar["low"] >= threshold)
    assert sum(bar["count"] for bar in histogram["bars"]) == 501
    clear_count = sum(bar["count"] for bar in histogram["bars"] if bar["is_clear"])
    assert clear_count == np.count_nonzero(values >= threshold)
    assert histogram["bars"][0]["low"] <= histogram["marker"] <= histogram["bars"][-1]["high"]


def test_count_histogram_covers_every_value():
    histogram = count_histogram(np.array([1, 1, 3, 2048]))
    assert sum(bar["count"] for bar in histogram["bars"]) == 4 and len(histogram["bars"]) <= 40
    assert [bar["count"] for bar in count_histogram(np.array([1, 1, 3]))["bars"]] == [2, 0, 1]
    assert count_histogram(np.array([], np.int64)) is None
