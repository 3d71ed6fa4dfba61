"""Search by this library, FAISS, faiss.contrib.big_batch_search and AbC's loop. All vectors are unit vectors.

Keys of a job: vectors, num_vectors, queries (paths), name, template, shard, faiss_index, truth (path), top_k,
nprobe, batches; for slow contenders timed_queries. Laps are named by the batch size.
"""

import hashlib
import os

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

from attrib.benchmark.dataset import row_ids
from attrib.benchmark.harness import Clock
from attrib.benchmark.index_build import STORAGE, load_vectors
from attrib.index.normalize import unit_rows
from attrib.index.quantizer import read_quantizer
from attrib.index.recall import recall, recall_by_nprobe
from attrib.index.search import Candidates, ranks, search_shard
from attrib.index.shard import open_shard

WARM_UP_QUERIES = 16


def prepare(job: dict, clock: Clock) -> dict:
    """Exact neighbours of some queries, and the smallest nprobe whose lists hold the wanted share of them."""
    units, ids = unit_rows(np.asarray(load_vectors(job))), row_ids(job["name"], job["num_vectors"])
    some = load_queries(job)[: job["timed_queries"]]
    _, found = faiss.knn(some, units, job["top_k"], metric=faiss.METRIC_INNER_PRODUCT)
    np.save(job["truth"], ids[found])
    quantizer = faiss.read_index(job["template"])
    lists = quantizer.quantizer.search(units[found.ravel()], 1)[1].reshape(found.shape)
    by_nprobe = recall_by_nprobe(quantizer, some, lists)
    nprobe = min(int(np.searchsorted(by_nprobe, job["recall_target"])) + 1, quantizer.nlist)
    return {"nprobe": nprobe, "num_lists": quantizer.nlist}


def load_queries(job: dict) -> np.ndarray:
    """float32 [m, d], L2-normalised."""
    return unit_rows(np.load(job["queries"])[: job["batches"][-1]])


def batch_search(job: dict, clock: Clock) -> dict:
    """This library."""
    record = STORAGE.read_json(os.path.join(job["shard"], "shard.json"))
    shard = open_shard(job["shard"], record, STORAGE, job["shard"], read_quantizer(job["template"], STORAGE))
    queries, k = load_queries(job), job["top_k"]

    def search(some: np.ndarray) -> Candidates:
        return search_shard(shard, some, k, k, job["nprobe"], compressed=False)

    search(queries[:WARM_UP_QUERIES])
    for batch in job["batches"]:
        with clock.lap(str(batch)):
            found = search(queries[:batch])
    table = np.full((len(queries), k), -1, np.int64)
    table[found.query, ranks(found.query)] = found.id
    answers = hashlib.sha256(table.tobytes() + found.score.tobytes()).hexdigest()
    return {"recall": _recall(job, table), "answers": answers}


def faiss_search(job: dict, clock: Clock) -> dict:
    """index.search of FAISS with the same lists and nprobe."""
    return _time_faiss(job, clock, lambda index, some: index.search(some, job["top_k"]))


def faiss_big_batch(job: dict, clock: Clock) -> dict:
    """big_batch_search of faiss.contrib: it also groups the queries by list, with one faiss.knn per list."""
    # verbose=1, because its default prints a line per list, which costs more than a small list.
    return _time_faiss(job, clock, lambda index, some: big_batch_search(index, some, job["top_k"], verbose=1))


def _time_faiss(job: dict, clock: Clock, search) -> dict:
    index = faiss.read_index(job["faiss_index"])
    index.nprobe = job["nprobe"]
    return _time_search(job, clock, lambda some: search(index, some)[1])


def argsort_loop(job: dict, clock: Clock) -> dict:
    """One query at a time against all vectors, with all scores sorted, as in the evaluation of AbC."""
    units, ids = unit_rows(np.asarray(load_vectors(job))), row_ids(job["name"], job["num_vectors"])

    def search(some: np.ndarray) -> np.ndarray:
        return ids[np.stack([np.argsort(-(units @ query))[: job["top_k"]] for query in some])]

    return _time_search(job, clock, search)


def _time_search(job: dict, clock: Clock, search) -> dict:
    """Time every batch. Batches above timed_queries are timed on that many queries, once, and scaled."""
    queries = load_queries(job)
    limit = job.get("timed_queries", len(queries))
    search(queries[: min(WARM_UP_QUERIES, limit)])
    found, lap = None, {}
    for batch in job["batches"]:
        size = min(batch, limit)
        if found is not None and len(found) == size:
            seconds, cpu = lap["seconds"] / lap["scale"], lap["cpu_seconds"] / lap["scale"]
            clock.note(str(batch), seconds, cpu, scale=batch / size)
            continue
        with clock.lap(str(batch), scale=batch / size):
            found = search(queries[:size])
        lap = clock.laps[str(batch)]
    return {"recall": _recall(job, found)}


def _recall(job: dict, found: np.ndarray) -> float:
    """Recall of exact search on the queries that both have. found: int64 [n, k] ids."""
    truth = np.load(job["truth"])
    both = min(len(truth), len(found))
    return recall(found[:both], truth[:both])
