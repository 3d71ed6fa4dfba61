"""Index building: this library, and FAISS in one process. Vectors: float16 [n, d] in random order, one id per row.

Keys of a job: name (of the data set), vectors (path), num_vectors, manifest, embeddings and shard (folders), template
(file of the trained quantizer), faiss_index (file), autofaiss (whether it runs), float32 (its folder).
This module must not load torch, which would dominate the memory of the contenders.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from attrib.benchmark.harness import Clock
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, join
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.ids import image_ids
from attrib.data.manifest import part_name
from attrib.embed.embeddings import Embeddings, read_vectors, schema
from attrib.index.normalize import unit_rows
from attrib.index.planning import IndexPlan, plan_index, training_rows
from attrib.index.quantizer import read_quantizer, train_quantizer, write_quantizer
from attrib.index.settings import IndexSettings
from attrib.index.shard import build_shard

STORAGE = Storage(StorageSettings())
PARTITION_ROWS = 16_384  # the manifest job's default


def load_vectors(job: dict) -> np.ndarray:
    """float16 [n, d], memory-mapped."""
    return np.load(job["vectors"], mmap_mode="r")[: job["num_vectors"]]


def load_unit_vectors(job: dict) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 [n, d] and their ids int64 [n], in memory."""
    ids = image_ids(job["name"], _keys(range(job["num_vectors"])))
    return unit_rows(np.asarray(load_vectors(job))), ids


def _training(job: dict) -> tuple[IndexPlan, np.ndarray]:
    """The plan of an IVF index of the vectors, and the training vectors float32 [m, d]."""
    vectors = load_vectors(job)
    settings = IndexSettings(embeddings="benchmark", output="benchmark", kind="ivf_flat", worker_memory_gib=1e6)
    plan = plan_index(settings, len(vectors), [len(vectors)], vectors.shape[1])
    return plan, unit_rows(np.asarray(vectors[: training_rows(settings, plan)]))


def _keys(rows: Iterable[int]) -> list[str]:
    return [f"{row:08d}.jpg" for row in rows]


def _embeddings(job: dict) -> Embeddings:
    """The files of `prepare` as those of a finished embed run."""
    num_rows, encoder = [len(rows) for rows in _partitions(job)], {"dimension": load_vectors(job).shape[1]}
    return Embeddings(job["embeddings"], job["manifest"], encoder, job["name"], num_rows, num_rows)


def _partitions(job: dict) -> list[np.ndarray]:
    """The rows of each partition."""
    return np.split(np.arange(job["num_vectors"]), range(PARTITION_ROWS, job["num_vectors"], PARTITION_ROWS))


def prepare(job: dict, clock: Clock) -> dict:
    """Write the partitions that the jobs read, and float32 vectors for autofaiss; return the number of lists to train.

    Rows are sorted by id within each partition. Columns that no contender reads are null.
    """
    vectors, (units, ids) = load_vectors(job), load_unit_vectors(job)
    for partition, rows in enumerate(_partitions(job)):
        rows = rows[np.argsort(ids[rows])]
        keys = _keys(rows)
        columns = {
            "id": pa.array(ids[rows]),
            "key": pa.array(keys),
            "uri": pa.array([f"/{job['name']}/{key}" for key in keys]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].ravel()), vectors.shape[1]),
        }
        for folder, fields in (("manifest", pa.schema(LOCATION_FIELDS)), ("embeddings", schema(vectors.shape[1]))):
            arrays = [columns.get(field.name, pa.nulls(len(rows), field.type)) for field in fields]
            STORAGE.write_table(join(job[folder], part_name(partition)), pa.table(arrays, schema=fields))
    if job["autofaiss"]:
        os.makedirs(job["float32"], exist_ok=True)
        np.save(os.path.join(job["float32"], "vectors.npy"), units)
    return {"num_lists": _training(job)[0].num_lists}


def train_and_build(job: dict, clock: Clock) -> dict:
    """This library: laps "train", "build" and both together."""
    with clock.lap("train and build"):
        with clock.lap("train"):
            plan, training = _training(job)
            write_quantizer(train_quantizer(training, plan, seed=0), job["template"], STORAGE)
        build(job, clock)
    return {"num_lists": plan.num_lists} | {
        name: sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / job["num_vectors"]
        for name, folder in (("bytes_per_vector", job["shard"]), ("embedding_bytes_per_vector", job["embeddings"]))
    }


def build(job: dict, clock: Clock) -> dict:
    """Lap "build": this library with a trained quantizer, embeddings in Parquet to a published shard."""
    shutil.rmtree(job["shard"], ignore_errors=True)
    with clock.lap("build"):
        embeddings, quantizer = _embeddings(job), read_quantizer(job["template"], STORAGE)
        partitions = list(range(len(embeddings.num_rows)))
        listed = [join(job["manifest"], part_name(partition)) for partition in partitions]
        parts = [STORAGE.read_table(uri, columns=["id", "key", "uri"]) for uri in listed]
        sources = pa.concat_tables(parts).sort_by("id").combine_chunks()
        build_shard(job["shard"], embeddings, partitions, quantizer, sources, STORAGE)
    return {}


def faiss_train_and_build(job: dict, clock: Clock) -> dict:
    """faiss.index_factory with its defaults (10 iterations of k-means), on the same training sample."""
    with clock.lap("train and build"):
        with clock.lap("train"):
            plan, training = _training(job)
            index = faiss.index_factory(training.shape[1], f"IVF{plan.num_lists},Flat")
            index.train(training)
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
    vectors, ids = load_unit_vectors(job)
    index.add_with_ids(vectors[:64], ids[:64])
    index.reset()
    with clock.lap("build"):
        index.add_with_ids(vectors, ids)
    return {}


def _fill(index: faiss.Index, job: dict) -> None:
    embeddings = _embeddings(job)
    for partition in range(len(embeddings.num_rows)):
        ids, vectors = read_vectors(embeddings, partition, STORAGE)
        index.add_with_ids(unit_rows(vectors), ids)
    faiss.write_index(index, job["faiss_index"])
