"""Outcomes of an ablation's variants on disk, so that a killed run continues and a larger one adds to what is there."""

import io
import json

import numpy as np

from attrib.common.storage import Storage, join
from attrib.evaluate.ablation.variants import Outcome
from attrib.evaluate.scores import QueryScores

ARRAYS = "outcome.npz"
RECORD = "outcome.json"  # written last


def write_outcome(folder: str, outcome: Outcome, storage: Storage) -> None:
    scores = outcome.scores
    _write_arrays(
        join(folder, ARRAYS), {"sources": outcome.sources, "queries": outcome.queries, **scores.values}, storage
    )
    record = {
        "history": outcome.history,
        "values": list(scores.values),
        "queries": scores.queries,
        "cells": scores.cells,
        "units": scores.units,
        "true_keys": scores.true_keys,
        "top_keys": scores.top_keys,
        "top_similarity": scores.top_similarity,
    }
    storage.write_json(join(folder, RECORD), json.loads(json.dumps(record, default=float)))


def read_outcome(folder: str, storage: Storage) -> Outcome | None:
    """None if it is not there."""
    if not storage.exists(join(folder, RECORD)):
        return None
    record = storage.read_json(join(folder, RECORD))
    with np.load(io.BytesIO(storage.read_bytes(join(folder, ARRAYS))), allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in record["values"]}
        sources, queries = arrays["sources"], arrays["queries"]
    scores = QueryScores(
        queries=record["queries"],
        cells=[tuple(cell) for cell in record["cells"]],
        units=record["units"],
        values=values,
        true_keys=record["true_keys"],
        top_keys=record["top_keys"],
        top_similarity=record["top_similarity"],
    )
    return Outcome(scores, sources, queries, record["history"])


def write_vectors(uri: str, files: list[list[str]], outcome: Outcome, storage: Storage) -> None:
    """An .npz of source_files, sources float32 [n, d], query_files, queries float32 [m, d]."""
    source_files, query_files = (np.array(names) for names in files)
    arrays = {"source_files": source_files, "query_files": query_files}
    _write_arrays(uri, arrays | {"sources": outcome.sources, "queries": outcome.queries}, storage)


def _write_arrays(uri: str, arrays: dict[str, np.ndarray], storage: Storage) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(uri, buffer.getvalue())
