"""The template of an index: one trained coarse quantizer, and a codec where vectors are compressed, that all shards share.

It is an empty FAISS IVF index. FAISS trains it and computes its codes; which vectors lie in which list is decided here, so that every shard
and every query block agrees on it. Vectors and centroids have unit length, so that squared distance and cosine rank alike.
"""

import faiss
import numpy as np

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, bytes_sha256
from attrib.index.planning import IndexPlan

KMEANS_ITERATIONS = 20
MAX_POINTS_PER_CENTROID = 256  # FAISS's own rule; more of them change nothing
MIN_PQ_TRAINING_VECTORS = 2  # the fewest that make codes of one bit
# Search decodes whole lists and never reads FAISS's tables for PQ, which can take 2 GiB of memory that no plan accounts for.
READ_FLAGS = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def train_quantizer(training: np.ndarray, plan: IndexPlan, seed: int, device: str = "cpu") -> faiss.IndexIVF:
    """The trained, empty index. training: float32 [n, d] unit vectors; device: of k-means. Raises AttribError if they are too few."""
    num_training, dimension = training.shape
    needed = max(plan.num_lists, MIN_PQ_TRAINING_VECTORS if plan.kind == "ivf_pq" else 1)
    if num_training < needed:
        raise AttribError(
            f"{plan.kind} with {plan.num_lists:,} lists needs at least {needed:,} training vectors and there are {num_training:,}; "
            "lower num_lists, raise training_rows, or use kind flat"
        )
    quantizer = faiss.IndexFlatL2(dimension)
    quantizer.add(_centroids(training, plan.num_lists, seed, device))
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


def _centroids(training: np.ndarray, num_lists: int, seed: int, device: str) -> np.ndarray:
    if device == "cuda":
        from attrib.index.kmeans import spherical_kmeans

        most = MAX_POINTS_PER_CENTROID * num_lists
        return spherical_kmeans(training[:most], num_lists, KMEANS_ITERATIONS, seed, device)
    clustering = faiss.Kmeans(
        training.shape[1],
        num_lists,
        niter=KMEANS_ITERATIONS,
        seed=seed + 1,  # FAISS reads a seed of zero as its default
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=MAX_POINTS_PER_CENTROID,
    )
    clustering.train(training)
    return clustering.centroids


def write_quantizer(template: faiss.IndexIVF, uri: str, storage: Storage) -> None:
    storage.write_bytes(uri, faiss.serialize_index(template).tobytes())


def read_quantizer(uri: str, storage: Storage, sha256: str | None = None) -> faiss.IndexIVF:
    """Raises AttribError if sha256 is given and the file has another."""
    data = storage.read_bytes(uri)
    if sha256 and bytes_sha256(data) != sha256:
        raise AttribError(f"{uri} is damaged: its checksum is not that of the index's record; build the index again")
    return faiss.deserialize_index(np.frombuffer(data, np.uint8).copy(), READ_FLAGS)


def nearest_lists(template: faiss.IndexIVF, units: np.ndarray, count: int) -> np.ndarray:
    """int64 [n, count]: the lists whose centroids are nearest to each unit vector float32 [n, d], nearest first."""
    return template.quantizer.search(units, count)[1]


def centroids(template: faiss.IndexIVF) -> np.ndarray:
    """float32 [num_lists, d]"""
    return template.quantizer.reconstruct_n(0, template.nlist)


def encode(template: faiss.IndexIVF, units: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """uint8 [n, code_bytes]: codes of unit vectors float32 [n, d], relative to the centroids of their lists int64 [n]."""
    codes = np.empty((len(units), template.code_size), np.uint8)
    template.encode_vectors(len(units), faiss.swig_ptr(units), faiss.swig_ptr(lists), faiss.swig_ptr(codes), False)
    return codes


def decode(template: faiss.IndexIVF, codes: np.ndarray, list_number: int) -> np.ndarray:
    """float32 [n, d]: what the codes uint8 [n, code_bytes] of one list stand for."""
    lists = np.full(len(codes), list_number, np.int64)
    codes = np.ascontiguousarray(codes)
    vectors = np.empty((len(codes), template.d), np.float32)
    template.decode_vectors(len(codes), faiss.swig_ptr(codes), faiss.swig_ptr(lists), faiss.swig_ptr(vectors))
    return vectors
