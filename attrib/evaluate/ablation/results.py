"""Results of variants on disk, so that a killed run continues and a later run with more variants adds to them."""

import io
import json

import numpy as np

from attrib.common.json_records import parse_record, with_checksum
from attrib.common.storage import Storage, join
from attrib.evaluate.ablation.variants import VariantResult
from attrib.evaluate.scores import QueryScores

ARRAYS = "outcome.npz"  # sealed
RECORD = "outcome.json"  # written last
LISTS = ("queries", "cells", "units", "true_keys", "top_keys", "top_similarity")


def write_result(folder: str, result: VariantResult, storage: Storage) -> None:
    scores = result.scores
    arrays = {"sources": result.sources, "queries": result.queries, **scores.values}
    storage.write_sealed_bytes(join(folder, ARRAYS), _npz(arrays))
    record = {"history": result.history, "values": list(scores.values)} | {
        name: getattr(scores, name) for name in LISTS
    }
    storage.write_json(join(folder, RECORD), with_checksum(json.loads(json.dumps(record, default=float))))


def read_result(folder: str, storage: Storage) -> VariantResult | None:
    """The result of a variant; None if it is not finished. Raises AttribError if it was damaged."""
    if not storage.exists(join(folder, RECORD)):
        return None
    record = parse_record(join(folder, RECORD), storage.read_bytes(join(folder, RECORD)))
    with np.load(io.BytesIO(storage.read_sealed_bytes(join(folder, ARRAYS))), allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in record["values"]}
        sources, queries = arrays["sources"], arrays["queries"]
    lists = {name: record[name] for name in LISTS} | {"cells": [tuple(cell) for cell in record["cells"]]}
    return VariantResult(QueryScores(values=values, **lists), sources, queries, record["history"])


def write_vectors(uri: str, files: dict[str, list[str]], result: VariantResult, storage: Storage) -> None:
    """Write an .npz of source_files, query_files, and the vectors sources float32 [n, d] and queries float32 [m, d]."""
    arrays = {name: np.array(names) for name, names in files.items()}
    storage.write_bytes(uri, _npz(arrays | {"sources": result.sources, "queries": result.queries}))


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
