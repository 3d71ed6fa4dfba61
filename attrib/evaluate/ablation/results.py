"""Results of variants on disk, so that a killed run continues and a later run with more variants adds to them."""

import io
import json

import numpy as np

from attrib.common.errors import AttribError
from attrib.common.json_records import parse_record, with_checksum
from attrib.common.storage import Storage, bytes_sha256, join
from attrib.evaluate.ablation.variants import VariantResult
from attrib.evaluate.scores import QueryScores

ARRAYS = "outcome.npz"
RECORD = "outcome.json"  # written last
LISTS = ("queries", "cells", "units", "true_keys", "top_keys", "top_similarity")


def write_result(folder: str, result: VariantResult, storage: Storage) -> None:
    scores = result.scores
    arrays = {"sources": result.sources, "queries": result.queries, **scores.values}
    sha256 = _write_arrays(join(folder, ARRAYS), arrays, storage)
    record = {"history": result.history, "values": list(scores.values), "arrays_sha256": sha256} | {
        name: getattr(scores, name) for name in LISTS
    }
    storage.write_json(join(folder, RECORD), with_checksum(json.loads(json.dumps(record, default=float))))


def read_result(folder: str, storage: Storage) -> VariantResult | None:
    """The result of a variant; None if it is not finished. Raises AttribError if it is damaged."""
    uri, arrays_uri = join(folder, RECORD), join(folder, ARRAYS)
    if not storage.exists(uri):
        return None
    record, data = parse_record(uri, storage.read_bytes(uri)), storage.read_bytes(arrays_uri)
    if record.get("arrays_sha256") not in (None, bytes_sha256(data)):
        raise AttribError(f"{arrays_uri} is damaged: its checksum differs from the record; delete {folder}")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in record["values"]}
        sources, queries = arrays["sources"], arrays["queries"]
    lists = {name: record[name] for name in LISTS} | {"cells": [tuple(cell) for cell in record["cells"]]}
    return VariantResult(QueryScores(values=values, **lists), sources, queries, record["history"])


def write_vectors(uri: str, files: dict[str, list[str]], result: VariantResult, storage: Storage) -> None:
    """Write an .npz of source_files, query_files, and the vectors sources float32 [n, d] and queries float32 [m, d]."""
    arrays = {name: np.array(names) for name, names in files.items()}
    _write_arrays(uri, arrays | {"sources": result.sources, "queries": result.queries}, storage)


def _write_arrays(uri: str, arrays: dict[str, np.ndarray], storage: Storage) -> str:
    """Write an .npz file; return its SHA-256."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(uri, buffer.getvalue())
    return bytes_sha256(buffer.getvalue())
