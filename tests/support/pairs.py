"""Collections with known pairs and their truth tables, in memory and in the files of the jobs; pages of comparisons."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from attrib.common.storage import Storage, join
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.ids import image_ids
from attrib.data.manifest import part_name
from attrib.embed.embeddings import RESULT_FIELDS
from attrib.evaluate import job as evaluate_job
from attrib.evaluate.collection import Collection
from attrib.evaluate.protocol import TruthRow
from attrib.evaluate.settings import EvaluateSettings

METADATA = {"sources": "group", "queries": "method"}


class Page(HTMLParser):
    """A parsed page: elements with attributes, and text without styles."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self._within = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._within.append(tag)

    def handle_endtag(self, tag):
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._within:
            self.text += data


def unit(vectors) -> np.ndarray:
    """Unit vectors float64 of one vector or of rows."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def write_collection(
    folder, name: str, keys: list[str], vectors: np.ndarray, storage: Storage, images: dict | None = None, **metadata
) -> str:
    """Write a manifest and embeddings in partitions of 100 rows; returns the URI of the embeddings.

    vectors: a row of NaN is a failed image. images: encoded, by key.
    """
    root = str(folder / name)
    ids, num_rows, num_embedded = image_ids(name, keys), [], []
    for key, data in (images or {}).items():
        storage.write_bytes(join(root, "images", key), data)
    for part, start in enumerate(range(0, len(keys), 100)):
        rows = slice(start, start + 100)
        order = np.argsort(ids[rows])
        num_rows.append(len(order))
        columns = {"id": ids[rows], "key": keys[rows], "uri": [join(root, "images", key) for key in keys[rows]]}
        arrays = {f.name: pa.array(columns.get(f.name, [None] * len(order)), f.type) for f in LOCATION_FIELDS}
        columns = {column: list(values[rows]) for column, values in metadata.items()}
        storage.write_table(join(root, "manifest", part_name(part)), pa.table(arrays | columns))
        made = np.asarray(vectors[rows])[order].astype(np.float16)
        absent = np.isnan(made).any(axis=1)
        num_embedded.append(int((~absent).sum()))
        nulls = {field.name: pa.nulls(len(order), field.type) for field in RESULT_FIELDS[1:]}
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(made.ravel()), made.shape[1], mask=pa.array(absent))
        table = pa.table({"id": ids[rows][order], **nulls, "embedding": embedding})
        storage.write_table(join(root, "embeddings", part_name(part)), table)
    settings = {"collection": {"name": name, "uri": root}, "manifest": join(root, "manifest"), "max_megapixels": 1.0}
    record = {
        "settings": settings, "digest": f"digest of {name}", "order_digest": "", "rows_digest": "",
        "encoder": {"dimension": vectors.shape[1]}, "num_rows": num_rows, "num_embedded": num_embedded,
        "metadata_columns": list(metadata),
    }  # fmt: skip
    storage.write_json(join(root, "manifest", "manifest.json"), record)
    storage.write_json(join(root, "embeddings", "embeddings.json"), record)
    return join(root, "embeddings")


def write_method(folder, storage, sources, queries, name="one") -> dict:
    """Settings of a method. sources: [(key, group, vector)]; queries: [(key, method, vector)]."""
    places = {}
    for kind, rows in (("sources", sources), ("queries", queries)):
        keys, values, vectors = zip(*rows)
        columns = {METADATA[kind]: values}
        places[kind] = write_collection(folder / name, kind, list(keys), np.stack(vectors), storage, **columns)
    return {"name": name, **places}


def write_case(folder, storage, sources, queries, truth, prefix="q/", others=()) -> EvaluateSettings:
    """truth: [(query, role, group)]; others: settings of further methods."""
    method = write_method(folder, storage, sources, queries)
    with open(folder / "truth.tsv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("query", "role", "source_group"), *truth])
    table = {"uri": str(folder / "truth.tsv"), "key_column": "query", "key_prefix": prefix}
    return EvaluateSettings(methods=[method, *others], truth=table, output=str(folder / "out"))


def evaluate_by_job(settings: EvaluateSettings) -> tuple[str, dict]:
    """Output and evaluation.json (must be strict JSON) of the evaluate job."""
    printed = evaluate_job.run(settings)
    text = (Path(settings.output) / "evaluation.json").read_text()
    return printed, json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def drawn_case(seed: int):
    """40 sources in groups, some of them exact copies, and 90 queries near one or two groups."""
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


def in_memory(seed: int = 0, change=lambda vectors, domain: vectors) -> tuple[Collection, Collection, list[TruthRow]]:
    """`drawn_case` without files. change: of the vectors of the domain "real" or "synth"."""
    sources, queries, truth = drawn_case(seed)
    made = [
        Collection(
            [k for k, *_ in rows], change(np.stack([v for *_, v in rows]), name), {column: [c for _, c, _ in rows]}
        )
        for name, rows, column in (("real", sources, "group"), ("synth", queries, "method"))
    ]
    return *made, [TruthRow(query.removeprefix("q/"), role, group) for query, role, group in truth]
