"""Search by this library, FAISS, faiss.contrib.big_batch_search and AbC's loop. All vectors are unit vectors.

Keys of a job: vectors, num_vectors, queries (paths), name, template, shard, faiss_index, truth (path), top_k,
nprobe, batches, kind, slow_peer_queries, argsort_queries. Laps are named by the batch size.
"""

import hashlib
import os
from collections.abc import Callable

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

from attrib.benchmark.harness import Clock
from attrib.benchmark.index_build import STORAGE, load_unit_vectors
from attrib.index.normalize import unit_rows
from attrib.index.quantizer import read_quantizer
from attrib.index.recall import recall, recall_by_nprobe
from attrib.index.search import ranks, search_shard
from attrib.index.shard import open_shard

WARM_UP_QUERIES = 16


def prepare(job: dict, clock: Clock) -> dict:
    """Exact neighbours of some queries, and the smallest nprobe whose lists hold the wanted share of them."""
    units, ids = load_unit_vectors(job)
    some = load_queries(job)[: job["slow_peer_queries"]]
    _, found = faiss.knn(some, units, job["top_k"], metric=faiss.METRIC_INNER_PRODUCT)
    STORAGE.write_array(job["truth"], ids[found])
    quantizer = faiss.read_index(job["template"])
    lists = quantizer.quantizer.search(units[found.ravel()], 1)[1].reshape(found.shape)
    by_nprobe = recall_by_nprobe(quantizer, some, lists)
    nprobe = min(int(np.searchsorted(by_nprobe, job["recall_target"])) + 1, quantizer.nlist)
    return {"nprobe": nprobe, "num_lists": quantizer.nlist}


def load_queries(job: dict) -> np.ndarray:
    """float32 [m, d], L2-normalised."""
    return unit_rows(np.load(job["queries"])[: job["batches"][-1]])


def batch_search(job: dict, clock: Clock) -> dict:
    """This library. `answers` is a digest of the ids and scores of the last batch."""
    record = STORAGE.read_json(os.path.join(job["shard"], "shard.json"))
    shard = open_shard(job["shard"], record, STORAGE, job["shard"], read_quantizer(job["template"], STORAGE))
    answers = b""

    def search(queries: np.ndarray) -> np.ndarray:
        nonlocal answers
        found = search_shard(shard, queries, job["top_k"], job["top_k"], job["nprobe"], compressed=False)
        ids = np.full((len(queries), job["top_k"]), -1, np.int64)
        ids[found.query, ranks(found.query)] = found.id
        answers = ids.tobytes() + found.score.tobytes()
        return ids

    return _time_search(job, clock, search) | {"answers": hashlib.sha256(answers).hexdigest()}


def faiss_search(job: dict, clock: Clock) -> dict:
    """index.search of FAISS with the same lists and nprobe."""
    index = _faiss_index(job)
    # It is linear in the queries; on noise, where nprobe is nearly all lists, a batch takes too long.
    limit = job["slow_peer_queries"] if job["kind"] == "Gaussian" else None
    return _time_search(job, clock, lambda queries: index.search(queries, job["top_k"])[1], limit)


def faiss_big_batch(job: dict, clock: Clock) -> dict:
    """big_batch_search of faiss.contrib: it also groups the queries by list, with one faiss.knn per list."""
    index = _faiss_index(job)
    # verbose=1, because its default prints a line per list, which costs more than a small list.
    return _time_search(job, clock, lambda queries: big_batch_search(index, queries, job["top_k"], verbose=1)[1])


def _faiss_index(job: dict) -> faiss.Index:
    index = faiss.read_index(job["faiss_index"])
    index.nprobe = job["nprobe"]
    return index


def argsort_loop(job: dict, clock: Clock) -> dict:
    """One query at a time against all vectors, with all scores sorted, as in the evaluation of AbC."""
    units, ids = load_unit_vectors(job)

    def search(queries: np.ndarray) -> np.ndarray:
        return ids[np.stack([np.argsort(-(units @ query))[: job["top_k"]] for query in queries])]

    return _time_search(job, clock, search, job["argsort_queries"])


def _time_search(job: dict, clock: Clock, search: Callable[[np.ndarray], np.ndarray], limit: int | None = None) -> dict:
    """Time every batch, and return the recall of the last one. search: queries [m, d] to ids int64 [m, k].

    limit: of the queries that are timed, for slow contenders; the times are scaled.
    """
    queries, truth = load_queries(job), STORAGE.read_array(job["truth"])
    search(queries[: min(WARM_UP_QUERIES, limit or WARM_UP_QUERIES)])
    for batch in job["batches"]:
        size = min(batch, limit or batch)
        with clock.lap(str(batch), scale=batch / size):
            found = search(queries[:size])
    both = min(len(truth), len(found))
    return {"recall": recall(found[:both], truth[:both])}
