"""A small attribution run on disk with hostile text in every text field, and a parser of its page."""

import io
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
from PIL import Image

from attrib.attribute.blocks import block_name
from attrib.attribute.report import write_report
from attrib.attribute.rows import RunStamp, attribution_rows
from attrib.attribute.settings import ReportSettings
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.ids import image_ids
from attrib.data.manifest import part_name
from attrib.data.parquet_files import shown_rows
from attrib.index.search import Candidates
from attrib.shares.settings import SharesSettings
from support.shards import make_plan

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
    """A manifest of `keys` and a record of embeddings. The images are files, or rows of one Parquet file."""

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
        left_out = {field.name for field in LOCATION_FIELDS} - {"id", "key", "uri"}
        names = [name for name in self.rows.schema.names if name not in left_out]
        return self.rows.select(names).sort_by("id").combine_chunks()


class SmallRun:
    """An attribution run of two blocks on disk.

    similarity: float32 [queries, sources]; failed: {query position: (stage, reason)}.
    """

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
        blocks = np.array_split(np.argsort(queries.ids), min(2, len(queries.ids)))
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
        places_only = [field.name for field in LOCATION_FIELDS if field.name not in ("id", "key", "uri")]
        table = self.queries.rows.take(pa.array(places)).drop_columns(places_only)
        for at, name in enumerate(("stage", "reason")):
            column = [failed[place][at] if place in failed else None for place in places]
            table = table.append_column(name, pa.array(column, pa.string()))
        best = Candidates(query, self.sources.ids[source], score, score)
        attributions, outcomes = attribution_rows(
            best, table.combine_chunks(), self.sources.sources(), TOP_K, SharesSettings(), RunStamp("run-1", "d", "i")
        )
        STORAGE.write_table(join(self.uri, "attributions", block_name(block)), attributions)
        STORAGE.write_table(join(self.uri, "outcomes", block_name(block)), outcomes)
        self.rows += shown_rows(attributions)

    def scan(self):
        uris = [join(self.uri, "attributions", block_name(block)) for block in range(2)]
        return STORAGE.dataset(uris, format="parquet")

    def report(self, root, **settings) -> tuple[dict, str]:
        values = {"attributions": self.uri, "output": f"{root}/report.html", "clear_similarity": CLEAR} | settings
        summary = write_report(ReportSettings(**values))
        return summary, STORAGE.read_bytes(summary["output"]).decode()


def small_run(folder) -> SmallRun:
    """12 queries, 3 of them failed, and 8 sources."""
    sources = Collection(
        folder,
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
    # With the prefix of the rows, this column name ends like one of theirs.
    metadata = {"prompt": pa.array(prompts), "status": pa.array(["draft"] * 12)}
    queries = Collection(folder, "queries", [HOSTILE, *(f"q{i}" for i in range(11))], metadata)
    similarity = np.random.default_rng(0).uniform(0.3, 0.9, (12, 8)).astype(np.float32)
    failed = {3: ("decode", "damaged PNG " + HOSTILE), 7: ("read", "the file is gone"), 9: ("read", "the file is gone")}
    return SmallRun(folder, sources, queries, similarity, failed)


class Page(HTMLParser):
    """Elements, attributes and text of an HTML page."""

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
