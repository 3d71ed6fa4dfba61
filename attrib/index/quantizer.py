"""The trained coarse quantizer of an index and, for compressed kinds, its codec. All shards share them.

They are stored as one empty FAISS IVF index. FAISS trains it and computes the codes. Vectors and centroids have unit
length, so the order by squared distance is the order by cosine.
"""

import faiss
import numpy as np

from attrib.common.errors import AttribError
from attrib.common.json_records import parse_record, taking_values, with_checksum
from attrib.common.storage import Storage, bytes_sha256
from attrib.common.swap import read_or_none
from attrib.common.verified import verify
from attrib.index.planning import IndexPlan

KMEANS_ITERATIONS = 20
MAX_POINTS_PER_CENTROID = 256  # FAISS's default; more training vectors gain nothing
# Search decodes whole lists and never uses FAISS's precomputed tables for PQ, which can take 2 GiB.
READ_FLAGS = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def train_quantizer(training: np.ndarray, plan: IndexPlan, seed: int, device: str = "cpu") -> faiss.IndexIVF:
    """Return trained coarse quantizer and codec as an empty FAISS IVF index.

    training: unit vectors float32 [n, d]. device: of k-means. Raises AttribError if there are too few vectors.
    """
    num_training, dimension = training.shape
    needed = max(plan.num_lists, 2 if plan.kind == "ivf_pq" else 1)  # codes of one bit need two
    if num_training < needed:
        raise AttribError(
            f"{plan.kind} with {plan.num_lists:,} lists needs at least {needed:,} training vectors and there are "
            f"{num_training:,}; lower num_lists, raise training_rows, or use kind flat"
        )
    coarse = faiss.IndexFlatL2(dimension)
    coarse.add(_centroids(training, plan.num_lists, seed, device))
    index: faiss.IndexIVF
    shape = coarse, dimension, plan.num_lists
    if plan.kind == "ivf_flat":
        index = faiss.IndexIVFFlat(*shape, faiss.METRIC_L2)
    elif plan.kind == "ivf_sq8":
        index = faiss.IndexIVFScalarQuantizer(*shape, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
    else:
        # Fewer bits per sub-quantizer if the sample is too small for 256 centroids.
        bits = min(8, num_training.bit_length() - 1)
        index = pq_index = faiss.IndexIVFPQ(*shape, plan.pq_bytes, bits, faiss.METRIC_L2)
        pq_index.pq.cp.seed = seed + 1
        pq_index.pq.cp.min_points_per_centroid = 1
    # The index owns the coarse quantizer; without disown(), Python would free it a second time.
    index.own_fields = True
    coarse.this.disown()  # type: ignore[attr-defined]  # added by SWIG
    index.train(training)
    return index


def _centroids(training: np.ndarray, num_lists: int, seed: int, device: str) -> np.ndarray:
    if device == "cuda":
        from attrib.index.kmeans import spherical_kmeans  # local: torch would take half a gigabyte of search workers

        most = MAX_POINTS_PER_CENTROID * num_lists
        return spherical_kmeans(training[:most], num_lists, KMEANS_ITERATIONS, seed, device)
    clustering = faiss.Kmeans(
        training.shape[1],
        num_lists,
        niter=KMEANS_ITERATIONS,
        seed=seed + 1,  # FAISS replaces seed 0 by its default
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=MAX_POINTS_PER_CENTROID,
    )
    clustering.train(training)
    return np.asarray(clustering.centroids)


def write_quantizer(quantizer: faiss.IndexIVF, uri: str, storage: Storage) -> None:
    """Write the quantizer, then its record, without which `trained_sha256` does not count it as finished."""
    data = faiss.serialize_index(quantizer).tobytes()
    storage.write_bytes(uri, data)
    storage.write_json(record_uri(uri), with_checksum({"sha256": bytes_sha256(data)}))


def record_uri(uri: str) -> str:
    return f"{uri.removesuffix('.faiss')}.json"


def trained_sha256(uri: str, storage: Storage) -> str | None:
    """Return the checksum of a finished quantizer, None if there is none. Raises AttribError if it is damaged."""
    record = read_or_none(record_uri(uri), storage)
    if record is None:
        return None
    with taking_values(record_uri(uri)):
        sha256 = str(parse_record(record_uri(uri), record)["sha256"])
    verify(uri, sha256, "jobs.index", storage)
    return sha256


def read_quantizer(uri: str, storage: Storage, sha256: str | None = None) -> faiss.IndexIVF:
    """Read coarse quantizer and codec. Raises AttribError if the file does not have the given sha256."""
    data = storage.read_bytes(verify(uri, sha256, "jobs.index", storage))
    index = faiss.deserialize_index(np.frombuffer(data, np.uint8).copy(), READ_FLAGS)
    if not isinstance(index, faiss.IndexIVF):
        raise AttribError(f"{uri} is not an IVF index; delete the index folder and run jobs.index again")
    return index


def nearest_lists(quantizer: faiss.IndexIVF, unit_vectors: np.ndarray, count: int) -> np.ndarray:
    """Return int64 [n, count]: the lists with the nearest centroids, nearest first. unit_vectors: float32 [n, d]."""
    return quantizer.quantizer.search(unit_vectors, count)[1]


def encode(quantizer: faiss.IndexIVF, unit_vectors: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Return codes uint8 [n, code_bytes] of unit vectors float32 [n, d] in the lists int64 [n]."""
    codes = np.empty((len(unit_vectors), quantizer.code_size), np.uint8)
    quantizer.encode_vectors(
        len(unit_vectors), faiss.swig_ptr(unit_vectors), faiss.swig_ptr(lists), faiss.swig_ptr(codes), False
    )
    return codes


def decode(quantizer: faiss.IndexIVF, codes: np.ndarray, list_number: int) -> np.ndarray:
    """Return the vectors float32 [n, d] that the codes uint8 [n, code_bytes] of one list represent."""
    lists = np.full(len(codes), list_number, np.int64)
    codes = np.ascontiguousarray(codes)
    vectors = np.empty((len(codes), quantizer.d), np.float32)
    quantizer.decode_vectors(len(codes), faiss.swig_ptr(codes), faiss.swig_ptr(lists), faiss.swig_ptr(vectors))
    return vectors
