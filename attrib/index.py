"""A sharded index on disk: one coarse quantizer, self-contained shards, and a record that says what it is good for.

    <output>/template.faiss            the trained, empty index that every shard is filled from (absent for kind flat)
    <output>/shard-00000/vectors.npy   float16 [n, d] as embedded, by ascending id
    <output>/shard-00000/ids.npy       int64 [n]
    <output>/shard-00000/lists.faiss   inverted lists of unit vectors or their codes (absent for kind flat)
    <output>/shard-00000/sources.parquet  id, key, uri and metadata of the images
    <output>/shard-00000/shard.json    counts and checksums; written last, it publishes the shard
    <output>/index.json                encoder, metric, shards, nprobe and measured recall; written last of all

Vectors are compared by cosine. FAISS's lists hold unit vectors under L2, which ranks alike and, unlike its inner product, is handled with
residual codes by list-major search.
"""

import os
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa

from attrib.errors import AttribError, MismatchError
from attrib.planning import IndexPlan
from attrib.storage import Storage, file_sha256, join, scratch_folder
from attrib.vectors import Embeddings, read_vectors

RECORD = "index.json"
TEMPLATE = "template.faiss"
SHARD_RECORD = "shard.json"
ADD_ROWS = 65_536  # vectors that are float32 at a time while a shard is built
KMEANS_ITERATIONS = 20
MIN_PQ_TRAINING_VECTORS = 2  # the fewest that make codes of one bit
# Search decodes whole lists and never reads FAISS's tables for PQ, which can take 2 GiB of memory that no plan accounts for.
READ_FLAGS = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """[n, d] of any float type -> float32 [n, d] of length one."""
    rows = vectors.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def train_template(training: np.ndarray, plan: IndexPlan, seed: int) -> faiss.Index:
    """The trained, empty IVF index. training: float32 [n, d] unit vectors. Raises AttribError if they are too few."""
    num_training, dimension = training.shape
    needed = max(plan.num_lists, MIN_PQ_TRAINING_VECTORS if plan.kind == "ivf_pq" else 1)
    if num_training < needed:
        raise AttribError(
            f"{plan.kind} with {plan.num_lists:,} lists needs at least {needed:,} training vectors and there are {num_training:,}; "
            "lower num_lists, raise training_rows, or use kind flat"
        )
    clustering = faiss.Kmeans(
        dimension,
        plan.num_lists,
        niter=KMEANS_ITERATIONS,
        seed=seed + 1,  # FAISS reads a seed of zero as its default
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=256,
    )
    clustering.train(training)
    quantizer = faiss.IndexFlatL2(dimension)
    quantizer.add(clustering.centroids)
    if plan.kind == "ivf_flat":
        index = faiss.IndexIVFFlat(quantizer, dimension, plan.num_lists, faiss.METRIC_L2)
    elif plan.kind == "ivf_sq8":
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, dimension, plan.num_lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2
        )
    else:
        # Fewer centroids per sub-quantizer where the sample could not fill 256.
        bits = min(8, num_training.bit_length() - 1)
        index = faiss.IndexIVFPQ(quantizer, dimension, plan.num_lists, plan.pq_bytes, bits, faiss.METRIC_L2)
        index.pq.cp.seed = seed + 1
        index.pq.cp.min_points_per_centroid = 1
    index.own_fields = True
    quantizer.this.disown()
    index.train(training)
    return index


def write_index(index: faiss.Index, uri: str, storage: Storage) -> None:
    storage.write_bytes(uri, faiss.serialize_index(index).tobytes())


def read_index(uri: str, storage: Storage) -> faiss.Index:
    return faiss.deserialize_index(np.frombuffer(storage.read_bytes(uri), np.uint8).copy(), READ_FLAGS)


def build_shard(
    uri: str,
    embeddings: Embeddings,
    partitions: list[int],
    template_uri: str | None,
    sources: pa.Table,
    storage: Storage,
) -> dict:
    """Publish one shard from some embedding partitions and return its record.

    sources: id, key, uri and metadata of (at least) the shard's images, by ascending id. Vectors pass through a file on the local disk, so that
    memory holds the lists and a block of vectors, never the shard twice. Raises MismatchError if an image is not among the sources.
    """
    ids = np.concatenate([read_vectors(embeddings, p, storage)[0] for p in partitions])
    order = np.argsort(ids)
    position = np.empty(len(ids), np.int64)
    position[order] = np.arange(len(ids))
    sources = sources.take(pa.array(_source_rows(sources, ids[order], embeddings)))
    with scratch_folder() as folder:
        vectors_path = os.path.join(folder, "vectors.npy")
        vectors = np.lib.format.open_memmap(vectors_path, "w+", np.float16, (len(ids), embeddings.dimension))
        start = 0
        for partition in partitions:
            part = read_vectors(embeddings, partition, storage)[1]
            vectors[position[start : start + len(part)]] = part
            start += len(part)
        vectors.flush()
        ids = ids[order]
        np.save(os.path.join(folder, "ids.npy"), ids)
        if template_uri:
            index = read_index(template_uri, storage)
            for start in range(0, len(ids), ADD_ROWS):
                index.add_with_ids(unit_rows(vectors[start : start + ADD_ROWS]), ids[start : start + ADD_ROWS])
            faiss.write_index(index, os.path.join(folder, "lists.faiss"))
        del vectors
        names = ["vectors.npy", "ids.npy"] + (["lists.faiss"] if template_uri else [])
        files = {}
        for name in names:
            path = os.path.join(folder, name)
            files[name] = {"sha256": file_sha256(path), "num_bytes": os.path.getsize(path)}
            storage.upload(path, join(uri, name))
    storage.write_table(join(uri, "sources.parquet"), sources)
    record = {"num_vectors": len(ids), "partitions": partitions, "files": files}
    storage.write_json(join(uri, SHARD_RECORD), record)
    return record


def _source_rows(sources: pa.Table, ids: np.ndarray, embeddings: Embeddings) -> np.ndarray:
    source_ids = sources["id"].to_numpy()
    absent = np.setdiff1d(ids, source_ids)
    if len(absent):
        raise MismatchError(
            f"{embeddings.uri} holds {len(absent):,} images that {embeddings.manifest_uri} does not list, such as id {absent[0]}; "
            "embed the manifest again"
        )
    return np.searchsorted(source_ids, ids)


@dataclass
class Shard:
    """An opened shard. ids: int64 [n] ascending; vectors: float16 [n, d], memory-mapped; lists: None for kind flat."""

    ids: np.ndarray
    vectors: np.ndarray
    lists: faiss.IndexIVF | None


def open_shard(uri: str, record: dict, storage: Storage, folder: str) -> Shard:
    """Open a shard, from `folder` if it had to be copied there. Raises AttribError if a file is not the one that was published."""
    paths = {}
    for name, expected in record["files"].items():
        paths[name] = storage.localise(join(uri, name), folder)
        if os.path.getsize(paths[name]) != expected["num_bytes"] or file_sha256(paths[name]) != expected["sha256"]:
            raise AttribError(
                f"{join(uri, name)} is damaged: its checksum is not that of the index's record; delete the shard and build it again"
            )
    vectors = np.load(paths["vectors.npy"], mmap_mode="r", allow_pickle=False)
    ids = np.load(paths["ids.npy"], allow_pickle=False)
    lists = None
    if "lists.faiss" in paths:
        lists = faiss.read_index(paths["lists.faiss"], faiss.IO_FLAG_MMAP_IFC | READ_FLAGS)
    return Shard(ids, vectors, lists)


@dataclass(frozen=True)
class Index:
    """A finished index."""

    uri: str
    digest: str
    encoder: dict
    kind: str
    is_compressed: bool
    shards: list[dict]
    nprobe: int
    rerank_factor: int
    recall: dict
    metadata_columns: list[str]
    shard_memory_bytes: int = 0  # what a search worker holds of the largest shard

    def shard_uri(self, shard: int) -> str:
        return join(self.uri, shard_name(shard))

    @property
    def num_vectors(self) -> int:
        return sum(shard["num_vectors"] for shard in self.shards)


def open_index(uri: str, storage: Storage) -> Index:
    record = storage.require(join(uri, RECORD), "jobs.index")
    return Index(
        uri=uri,
        digest=record["digest"],
        encoder=record["encoder"],
        kind=record["plan"]["kind"],
        is_compressed=record["is_compressed"],
        shards=record["shards"],
        nprobe=record["nprobe"],
        rerank_factor=record["settings"]["rerank_factor"],
        recall=record["recall"],
        metadata_columns=record["metadata_columns"],
        shard_memory_bytes=record["plan"]["shard_memory_bytes"],
    )


def check_same_encoder(index: Index, queries: Embeddings) -> None:
    """Raises MismatchError unless index and queries were embedded by the same weights with the same preprocessing."""
    for key, expected in index.encoder.items():
        found = queries.encoder.get(key)
        if found != expected:
            raise MismatchError(
                f"the queries in {queries.uri} were embedded with {key} {found!r}, the index {index.uri} with {expected!r}; "
                "embed both with the same backbone and weights"
            )
