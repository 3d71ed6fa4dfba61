"""Index building: this library, and FAISS in one process. Vectors: float16 [n, d] in random order, one id per row.

Keys of a job: folder, name (of the data set), vectors (path), num_vectors, embeddings (URI), template, output,
faiss_index.
"""

import os
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from attrib.benchmark.dataset import row_ids, write_dataset
from attrib.benchmark.harness import Clock
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.index.normalize import unit_rows
from attrib.index.planning import IndexPlan, plan_index, training_rows
from attrib.index.quantizer import read_quantizer, train_quantizer, write_quantizer
from attrib.index.settings import IndexSettings
from attrib.index.shard import build_shard

STORAGE = Storage(StorageSettings())


def ivf_plan(num_vectors: int, dimension: int) -> tuple[IndexPlan, int]:
    """The plan of an IVF index of `num_vectors`, and the number of its training vectors."""
    settings = IndexSettings(embeddings="benchmark", output="benchmark", kind="ivf_flat", worker_memory_gib=1e6)
    plan = plan_index(settings, num_vectors, [num_vectors], dimension)
    return plan, min(num_vectors, training_rows(settings, plan))


def load_vectors(job: dict) -> np.ndarray:
    """float16 [n, d], memory-mapped."""
    return np.load(job["vectors"], mmap_mode="r")[: job["num_vectors"]]


def prepare(job: dict, clock: Clock) -> dict:
    """Write embeddings, and float32 vectors for autofaiss if job["float32"] names a folder."""
    vectors = np.asarray(load_vectors(job))
    write_dataset(job["folder"], job["name"], vectors)
    if job["float32"]:
        os.makedirs(job["float32"], exist_ok=True)
        np.save(os.path.join(job["float32"], "vectors.npy"), unit_rows(vectors))
    return {}


def train_and_build(job: dict, clock: Clock) -> dict:
    """This library: laps "train", "build" and both together."""
    vectors = load_vectors(job)
    shutil.rmtree(job["output"], ignore_errors=True)
    with clock.lap("train and build"):
        with clock.lap("train"):
            plan, num_training = ivf_plan(*vectors.shape)
            quantizer = train_quantizer(unit_rows(vectors[:num_training]), plan, seed=0)
            write_quantizer(quantizer, job["template"], STORAGE)
        with clock.lap("build"):
            _build(job)
    folders = {"bytes_per_vector": job["output"], "embedding_bytes_per_vector": job["embeddings"]}
    sizes = {name: sum(p.stat().st_size for p in Path(d).rglob("*") if p.is_file()) for name, d in folders.items()}
    return {name: size / job["num_vectors"] for name, size in sizes.items()} | {"num_lists": plan.num_lists}


def build(job: dict, clock: Clock) -> dict:
    """This library with a trained quantizer: embeddings in Parquet to a published shard."""
    shutil.rmtree(job["output"], ignore_errors=True)
    with clock.lap("build"):
        _build(job)
    return {}


def _build(job: dict) -> None:
    embeddings = open_embeddings(job["embeddings"], STORAGE)
    manifest = open_manifest(embeddings.manifest_uri, STORAGE)
    partitions = list(range(len(embeddings.num_rows)))
    parts = [STORAGE.read_table(manifest.partition_uri(p), columns=["id", "key", "uri"]) for p in partitions]
    sources = pa.concat_tables(parts).sort_by("id").combine_chunks()
    build_shard(job["output"], embeddings, partitions, read_quantizer(job["template"], STORAGE), sources, STORAGE)


def faiss_train_and_build(job: dict, clock: Clock) -> dict:
    """faiss.index_factory with its defaults (10 iterations of k-means), on the same training sample."""
    vectors = load_vectors(job)
    plan, num_training = ivf_plan(*vectors.shape)
    with clock.lap("train and build"):
        index = faiss.index_factory(vectors.shape[1], f"IVF{plan.num_lists},Flat")
        with clock.lap("train"):
            index.train(unit_rows(np.asarray(vectors[:num_training])))
        with clock.lap("build"):
            _fill(index, job)
    return {}


def faiss_build(job: dict, clock: Clock) -> dict:
    """FAISS with the same centroids: from the same Parquet files to an index file."""
    with clock.lap("build"):
        _fill(faiss.read_index(job["template"]), job)
    return {}


def faiss_add(job: dict, clock: Clock) -> dict:
    """FAISS with the same centroids and all vectors in memory as float32: a lower bound."""
    index = faiss.read_index(job["template"])
    vectors, ids = unit_rows(np.asarray(load_vectors(job))), row_ids(job["name"], job["num_vectors"])
    index.add_with_ids(vectors[:64], ids[:64])
    index.reset()
    with clock.lap("build"):
        index.add_with_ids(vectors, ids)
    return {}


def _fill(index: faiss.Index, job: dict) -> None:
    embeddings = open_embeddings(job["embeddings"], STORAGE)
    for partition in range(len(embeddings.num_rows)):
        ids, vectors = read_vectors(embeddings, partition, STORAGE)
        index.add_with_ids(unit_rows(vectors), ids)
    faiss.write_index(index, job["faiss_index"])
