"""Searching: the library's batch search, FAISS's own on the same lists, exact search, and AbC's loop. All on unit vectors.

A job's keys: vectors, num_vectors, queries (paths), name, template, shard, faiss_index, truth (path), top_k, nprobe, batches, and of slow peers
timed_queries. Laps are named by batch size.
"""

import hashlib

import faiss
import numpy as np

from attrib.benchmark import ours
from attrib.benchmark.contender import Clock
from attrib.benchmark.dataset import row_ids, write_dataset
from attrib.benchmark.index_contenders import load_vectors
from attrib.index.normalize import unit_rows
from attrib.index.recall import recall, recall_by_nprobe
from attrib.index.search import ranks

WARM_UP_QUERIES = 16


def prepare(job: dict, clock: Clock) -> dict:
    """Exact neighbours of some queries, and the least nprobe whose lists hold the wanted share of them."""
    units, ids = unit_rows(np.asarray(load_vectors(job))), row_ids(job["name"], job["num_vectors"])
    queries = load_queries(job)
    write_dataset(job["queries_folder"], "asked", np.load(job["queries"])[: job["batches"][-1]])
    some = queries[: job["timed_queries"]]
    _, found = faiss.knn(some, units, job["top_k"], metric=faiss.METRIC_INNER_PRODUCT)
    np.save(job["truth"], ids[found])
    template = faiss.read_index(job["template"])
    lists = template.quantizer.search(units[found.ravel()], 1)[1].reshape(found.shape)
    by_nprobe = recall_by_nprobe(template, some, lists)
    nprobe = min(int(np.searchsorted(by_nprobe, job["recall_target"])) + 1, template.nlist)
    return {"nprobe": nprobe, "num_lists": template.nlist}


def load_queries(job: dict) -> np.ndarray:
    return unit_rows(np.load(job["queries"])[: job["batches"][-1]])


def batch_search(job: dict, clock: Clock) -> dict:
    shard, queries = ours.open_built(job["shard"], job["template"]), load_queries(job)
    ours.search(shard, queries[:WARM_UP_QUERIES], job["top_k"], job["nprobe"])
    for batch in job["batches"]:
        with clock.lap(str(batch)):
            found = ours.search(shard, queries[:batch], job["top_k"], job["nprobe"])
    table = np.full((len(queries), job["top_k"]), -1, np.int64)
    table[found.query, ranks(found.query)] = found.id
    answers = hashlib.sha256(table.tobytes() + found.score.tobytes()).hexdigest()
    return {"recall": _recall(job, table), "answers": answers}


def faiss_search(job: dict, clock: Clock) -> dict:
    index, queries = faiss.read_index(job["faiss_index"]), load_queries(job)
    index.nprobe = job["nprobe"]
    index.search(queries[:WARM_UP_QUERIES], job["top_k"])
    found = _timed(job, clock, lambda some: index.search(some, job["top_k"])[1], queries)
    return {"recall": _recall(job, found)}


def brute_force(job: dict, clock: Clock) -> dict:
    units, queries = unit_rows(np.asarray(load_vectors(job))), load_queries(job)
    ids = row_ids(job["name"], job["num_vectors"])

    def search(some: np.ndarray) -> np.ndarray:
        return faiss.knn(some, units, job["top_k"], metric=faiss.METRIC_INNER_PRODUCT)[1]

    search(queries[:WARM_UP_QUERIES])
    return {"recall": _recall(job, ids[_timed(job, clock, search, queries)])}


def argsort_loop(job: dict, clock: Clock) -> dict:
    """One query at a time, and all scores sorted, as AbC's evaluation does."""
    units, queries = unit_rows(np.asarray(load_vectors(job))), load_queries(job)
    ids = row_ids(job["name"], job["num_vectors"])

    def search(some: np.ndarray) -> np.ndarray:
        return np.stack([np.argsort(-(units @ query))[: job["top_k"]] for query in some])

    search(queries[:1])
    return {"recall": _recall(job, ids[_timed(job, clock, search, queries)])}


def _timed(job: dict, clock: Clock, search, queries: np.ndarray) -> np.ndarray:
    """Answers of the largest batch that was timed; batches above timed_queries are timed on as many, once, and scaled."""
    limit, found, timed = job.get("timed_queries", len(queries)), np.empty((0, job["top_k"]), np.int64), ""
    for batch in job["batches"]:
        size = min(batch, limit)
        if len(found) == size:
            lap = clock.laps[timed]
            clock.note(str(batch), lap["seconds"] / lap["scale"], lap["cpu_seconds"] / lap["scale"], scale=batch / size)
            continue
        with clock.lap(str(batch), scale=batch / size):
            found = search(queries[:size])
        timed = str(batch)
    return found


def _recall(job: dict, found: np.ndarray) -> float:
    """Of exact search, on the queries that both have; found: int64 [n, k] ids."""
    truth = np.load(job["truth"])
    both = min(len(truth), len(found))
    return recall(found[:both], truth[:both])
