"""Training and building: the library, FAISS in one process, autofaiss. Vectors: float16 [n, d] in random order, ids by row.

A job's keys: vectors (path), num_vectors, name (of the data set), embeddings (URI), template, output, lists.
"""

import os
import shutil

import faiss
import numpy as np

from attrib.benchmark import ours
from attrib.benchmark.contender import Clock
from attrib.benchmark.dataset import row_ids, write_dataset
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.index.normalize import unit_rows


def load_vectors(job: dict) -> np.ndarray:
    return np.load(job["vectors"], mmap_mode="r")[: job["num_vectors"]]


def prepare(job: dict, clock: Clock) -> dict:
    """Embeddings on disk, and float32 vectors for autofaiss."""
    vectors = load_vectors(job)
    write_dataset(job["folder"], job["name"], np.asarray(vectors))
    if job["float32"]:
        os.makedirs(job["float32"], exist_ok=True)
        np.save(os.path.join(job["float32"], "vectors.npy"), unit_rows(np.asarray(vectors)))
    return {}


def train_and_build(job: dict, clock: Clock) -> dict:
    vectors = load_vectors(job)
    _emptied(job["output"])
    with clock.lap("train and build"):
        with clock.lap("train"):
            lists = ours.train(vectors, job["template"])
        with clock.lap("build"):
            ours.build(job["embeddings"], job["template"], job["output"])
    return {
        "num_lists": lists,
        "bytes_per_vector": _bytes_below(job["output"]) / job["num_vectors"],
        "embedding_bytes_per_vector": _bytes_below(job["embeddings"]) / job["num_vectors"],
    }


def faiss_train_and_build(job: dict, clock: Clock) -> dict:
    """faiss.index_factory with its own defaults (10 iterations of k-means), from the same sample."""
    vectors = load_vectors(job)
    plan, num_training = ours.ivf_plan(*vectors.shape)
    with clock.lap("train and build"):
        index = faiss.index_factory(vectors.shape[1], f"IVF{plan.num_lists},Flat")
        with clock.lap("train"):
            index.train(unit_rows(np.asarray(vectors[:num_training])))
        with clock.lap("build"):
            _fill(index, job)
    return {}


def build(job: dict, clock: Clock) -> dict:
    _emptied(job["output"])
    with clock.lap("build"):
        ours.build(job["embeddings"], job["template"], job["output"])
    return {}


def faiss_add(job: dict, clock: Clock) -> dict:
    """The same centroids, all vectors in memory as float32: the least that a build can do."""
    index = faiss.read_index(job["template"])
    vectors, ids = unit_rows(np.asarray(load_vectors(job))), row_ids(job["name"], job["num_vectors"])
    index.add_with_ids(vectors[:64], ids[:64])
    index.reset()
    with clock.lap("build"):
        index.add_with_ids(vectors, ids)
    return {}


def faiss_build(job: dict, clock: Clock) -> dict:
    """From the same files to a file, as a script would."""
    with clock.lap("build"):
        index = faiss.read_index(job["template"])
        _fill(index, job)
    return {}


def _fill(index: faiss.Index, job: dict) -> None:
    embeddings = open_embeddings(job["embeddings"], ours.STORAGE)
    for partition in range(len(embeddings.num_rows)):
        ids, vectors = read_vectors(embeddings, partition, ours.STORAGE)
        index.add_with_ids(unit_rows(vectors), ids)
    faiss.write_index(index, job["faiss_index"])


def _emptied(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _bytes_below(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(folder) for name in names)
