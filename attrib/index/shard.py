"""One shard of an index: built from embeddings, verified, and memory-mapped for the search."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import faiss
import numpy as np
import pyarrow as pa

from attrib.common.errors import AttribError, MismatchError
from attrib.common.storage import Storage, file_sha256, join, scratch_folder
from attrib.embed.embeddings import Embeddings, read_vectors
from attrib.index.normalize import inverse_norms, to_float32
from attrib.index.quantizer import centroids, encode, nearest_lists

SHARD_RECORD = "shard.json"


BLOCK_BYTES = 1 << 24  # of vectors that are float32 at a time while a shard is built


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def build_shard(
    uri: str,
    embeddings: Embeddings,
    partitions: list[int],
    quantizer: faiss.IndexIVF | None,
    sources: pa.Table,
    storage: Storage,
    device: str = "cpu",
) -> dict:
    """Publish one shard from some embedding partitions and return its record. quantizer: None for kind flat; device: finds each vector's list.

    sources: id, key, uri and metadata of (at least) the shard's images, by ascending id. Vectors pass through files on the local disk, twice
    their own size of it, so that memory holds ids and a block of vectors. Raises MismatchError if an image is not among the sources.
    """
    with scratch_folder() as folder:
        arrived = os.path.join(folder, "arrived.npy")
        ids, lists, norms = _receive(arrived, embeddings, partitions, _assigner(quantizer, device), sources, storage)
        order = np.lexsort((ids, lists))
        ids, lists, norms = ids[order], lists[order], norms[order]
        arrays = {"ids.npy": ids, "inverse_norms.npy": norms}
        if quantizer is not None:
            arrays["offsets.npy"] = np.searchsorted(lists, np.arange(quantizer.nlist + 1))
        for name, array in arrays.items():
            np.save(os.path.join(folder, name), array)
        names = [*arrays, *_put_in_order(folder, np.load(arrived, mmap_mode="r"), order, lists, norms, quantizer)]
        os.unlink(arrived)
        files = {}
        for name in names:
            path = os.path.join(folder, name)
            files[name] = {"sha256": file_sha256(path), "num_bytes": os.path.getsize(path)}
            storage.publish(path, join(uri, name))
    ids.sort()
    storage.write_table(
        join(uri, "sources.parquet"), sources.take(pa.array(np.searchsorted(sources["id"].to_numpy(), ids)))
    )
    record = {"num_vectors": len(ids), "partitions": partitions, "files": files}
    storage.write_json(join(uri, SHARD_RECORD), record)
    return record


def _assigner(quantizer: faiss.IndexIVF | None, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """From unit vectors float32 [n, d] to their lists int64 [n]."""
    if quantizer is None:
        return lambda units: np.zeros(len(units), np.int64)
    if device == "cuda":
        from attrib.index.kmeans import nearest_centroids  # not above: CPU workers do without torch

        return nearest_centroids(centroids(quantizer), device)
    return lambda units: nearest_lists(quantizer, units, 1)[:, 0]


def _receive(
    path: str,
    embeddings: Embeddings,
    partitions: list[int],
    lists_of: Callable[[np.ndarray], np.ndarray],
    sources: pa.Table,
    storage: Storage,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int64 [n], list numbers int64 [n] and inverse norms float32 [n] as they come, and their vectors in a new file.

    Each partition is read once.
    """
    num_vectors = sum(embeddings.num_embedded[p] for p in partitions)
    ids, lists = np.empty(num_vectors, np.int64), np.empty(num_vectors, np.int64)
    norms = np.empty(num_vectors, np.float32)
    source_ids = sources["id"].to_numpy()
    start = 0
    with _array_file(path, np.float16, (num_vectors, embeddings.dimension)) as file:
        for partition in partitions:
            part_ids, part = read_vectors(embeddings, partition, storage)
            at = np.searchsorted(source_ids, part_ids)
            absent = part_ids[np.append(source_ids, -1)[at] != part_ids]
            if len(absent):
                raise MismatchError(
                    f"{embeddings.uri} holds {len(absent):,} images that {embeddings.manifest_uri} does not list, such as id {absent[0]}; "
                    "embed the manifest again"
                )
            part.tofile(file)
            ids[start : start + len(part)] = part_ids
            for rows in _blocks(0, *part.shape):
                units = to_float32(part[rows])
                there = slice(start + rows.start, start + rows.stop)
                norms[there] = inverse_norms(units)
                units *= norms[there, None]
                lists[there] = lists_of(units)
            start += len(part)
    return ids, lists, norms


def _put_in_order(
    folder: str,
    arrived: np.ndarray,
    order: np.ndarray,
    lists: np.ndarray,
    norms: np.ndarray,
    quantizer: faiss.IndexIVF | None,
) -> list[str]:
    """Write vectors and codes in the order int64 [n] and return the files' names. lists and norms: of the rows in that order."""
    is_compressed = quantizer is not None and not isinstance(quantizer, faiss.IndexIVFFlat)
    with ExitStack() as files:
        vectors_file = files.enter_context(_array_file(os.path.join(folder, "vectors.npy"), np.float16, arrived.shape))
        if is_compressed:
            codes_shape = len(arrived), quantizer.code_size
            codes_file = files.enter_context(_array_file(os.path.join(folder, "codes.npy"), np.uint8, codes_shape))
        for rows in _blocks(0, *arrived.shape):
            vectors = arrived[order[rows]]
            vectors.tofile(vectors_file)
            if is_compressed:
                encode(quantizer, to_float32(vectors) * norms[rows, None], lists[rows]).tofile(codes_file)
    return ["vectors.npy", "codes.npy"] if is_compressed else ["vectors.npy"]


@contextmanager
def _array_file(path: str, dtype: type, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """A .npy file whose rows are then written to it: unlike those of a mapped file, they do not stay in the process's memory."""
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _blocks(start: int, stop: int, dimension: int) -> Iterator[slice]:
    rows = max(1, BLOCK_BYTES // (4 * dimension))
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


@dataclass
class Shard:
    """An opened shard, its files mapped. ids: int64 [n]; vectors: float16 [n, d]; inverse_norms: float32 [n].

    offsets: int64 [num_lists + 1] and quantizer: the shared quantizer, None for kind flat; codes: uint8 [n, code_bytes] or None.
    """

    ids: np.ndarray
    vectors: np.ndarray
    inverse_norms: np.ndarray
    offsets: np.ndarray | None = None
    codes: np.ndarray | None = None
    quantizer: faiss.IndexIVF | None = None

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [m]: the rows of some of the shard's ids int64 [m]."""
        order = np.argsort(self.ids)
        return order[np.searchsorted(self.ids[order], ids)]


_verified: set[tuple] = set()  # files whose checksum this process has seen to be right


def open_shard(uri: str, record: dict, storage: Storage, folder: str, quantizer: faiss.IndexIVF | None = None) -> Shard:
    """Open a shard, from `folder` if it had to be copied there. quantizer: None opens it for exact search alone.

    Raises AttribError if a file is not the one that was published.
    """
    arrays = {}
    for name, expected in record["files"].items():
        path = storage.localise(join(uri, name), folder)
        status = os.stat(path)
        seen = (path, status.st_size, status.st_mtime_ns, status.st_ino, expected["sha256"])
        if seen not in _verified:
            if status.st_size != expected["num_bytes"] or file_sha256(path) != expected["sha256"]:
                raise AttribError(
                    f"{join(uri, name)} is damaged: its checksum is not that of the index's record; delete the shard and build it again"
                )
            _verified.add(seen)
        # As plain arrays: each slice of a memmap costs more than a short list's product.
        arrays[name.removesuffix(".npy")] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if quantizer is None:
        arrays = {name: arrays[name] for name in ("ids", "vectors", "inverse_norms")}
    return Shard(**arrays, quantizer=quantizer)
