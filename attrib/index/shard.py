"""One shard of an index: build it from embeddings, verify its files, and memory-map them for search."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import faiss
import numpy as np
import pyarrow as pa

from attrib.common.errors import MismatchError
from attrib.common.json_records import parse_record, taking_values, with_checksum
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage, bytes_sha256, file_sha256, join, naming
from attrib.common.verified import verify_copy
from attrib.embed.embeddings import Embeddings, read_vectors
from attrib.index.normalize import inverse_norms, to_float32
from attrib.index.quantizer import encode, nearest_lists

SHARD_RECORD = "shard.json"
UNSORTED = "unsorted.npy"  # local file of a build
BLOCK_BYTES = 1 << 24  # of float32 vectors that a build holds at a time
REMAKE = "delete its shard folder and index.json, then run jobs.index again (intact shards are kept)"

Assign = Callable[[np.ndarray], np.ndarray]  # unit vectors float32 [n, d] -> numbers of their lists int64 [n]


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
) -> dict[str, Any]:
    """Build and publish one shard of the given embedding partitions; return its record.

    quantizer: None for kind flat. sources: id, key, uri and metadata of (at least) the images of the shard, by
    ascending id. device: where vectors are assigned to lists. Vectors pass through local files of twice their size, so
    memory holds a block of them. Raises MismatchError if an image is not among the sources.
    """
    assign = _assigner(quantizer, device)
    with scratch_folder() as folder:
        unsorted = os.path.join(folder, UNSORTED)
        ids, lists, norms = _copy_vectors(unsorted, embeddings, partitions, assign, sources, storage)
        order = np.lexsort((ids, lists))
        ids, lists, norms = ids[order], lists[order], norms[order]
        arrays = {"ids.npy": ids, "inverse_norms.npy": norms}
        if quantizer is not None:
            arrays["offsets.npy"] = np.searchsorted(lists, np.arange(quantizer.nlist + 1))
        for name, array in arrays.items():
            with naming(path := os.path.join(folder, name)):
                np.save(path, array)
        _write_sorted(folder, order, lists, norms, quantizer)
        os.unlink(unsorted)
        files = {}
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            files[name] = {"sha256": file_sha256(path), "num_bytes": os.path.getsize(path)}
            storage.publish(path, join(uri, name))
    rows = pa.array(np.searchsorted(sources["id"].to_numpy(), np.sort(ids)))
    sources_sha256 = storage.write_table(join(uri, "sources.parquet"), sources.take(rows))
    record = {"num_vectors": len(ids), "partitions": partitions, "files": files, "sources_sha256": sources_sha256}
    record = with_checksum(record)
    storage.write_json(join(uri, SHARD_RECORD), record)
    return record


def finished_shard(uri: str, storage: Storage) -> dict[str, Any] | None:
    """The record of a built shard; None if there is none, or if one of its files is missing or another one."""
    place = join(uri, SHARD_RECORD)
    if not storage.exists(place):
        return None
    record = parse_record(place, storage.read_bytes(place))
    sizes = {info.base_name: info.size for info in storage.list_folder(uri)}
    with taking_values(place):
        is_whole = all(sizes.get(name) == file["num_bytes"] for name, file in record["files"].items())
    if not is_whole or "sources.parquet" not in sizes:
        return None
    # Its size is in no record, and it is small. Records of earlier versions hold no checksum of it.
    expected = record.get("sources_sha256")
    found = bytes_sha256(storage.read_bytes(join(uri, "sources.parquet"))) if expected else None
    return record if found == expected else None


def _assigner(quantizer: faiss.IndexIVF | None, device: str) -> Assign:
    if quantizer is None:
        return lambda unit_vectors: np.zeros(len(unit_vectors), np.int64)
    if device == "cuda":
        from attrib.index.kmeans import nearest_centroids  # local: torch would take half a gigabyte of CPU workers

        return nearest_centroids(quantizer.quantizer.reconstruct_n(0, quantizer.nlist), device)
    return lambda unit_vectors: nearest_lists(quantizer, unit_vectors, 1)[:, 0]


def _copy_vectors(
    path: str, embeddings: Embeddings, partitions: list[int], assign: Assign, sources: pa.Table, storage: Storage
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Copy vectors to a new .npy file; return ids int64 [n], list numbers int64 [n] and inverse norms float32 [n]."""
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
                    f"{embeddings.uri} holds {len(absent):,} images that {embeddings.manifest_uri} does not list, "
                    f"e.g. id {absent[0]}; embed the manifest again"
                )
            part.tofile(file)
            ids[start : start + len(part)] = part_ids
            for rows in _blocks(*part.shape):
                unit_vectors = to_float32(part[rows])
                target = slice(start + rows.start, start + rows.stop)
                norms[target] = inverse_norms(unit_vectors)
                unit_vectors *= norms[target, None]
                lists[target] = assign(unit_vectors)
            start += len(part)
    return ids, lists, norms


def _write_sorted(
    folder: str, order: np.ndarray, lists: np.ndarray, norms: np.ndarray, quantizer: faiss.IndexIVF | None
) -> None:
    """Write vectors and codes in the order int64 [n]. lists, norms: of the sorted rows."""
    unsorted = np.load(os.path.join(folder, UNSORTED), mmap_mode="r")
    codec = None if isinstance(quantizer, faiss.IndexIVFFlat) else quantizer
    with ExitStack() as files:
        vectors_file = files.enter_context(_array_file(os.path.join(folder, "vectors.npy"), np.float16, unsorted.shape))
        if codec is not None:
            codes_shape = len(unsorted), codec.code_size
            codes_file = files.enter_context(_array_file(os.path.join(folder, "codes.npy"), np.uint8, codes_shape))
        for rows in _blocks(*unsorted.shape):
            vectors = unsorted[order[rows]]
            vectors.tofile(vectors_file)
            if codec is not None:
                encode(codec, to_float32(vectors) * norms[rows, None], lists[rows]).tofile(codes_file)


@contextmanager
def _array_file(path: str, dtype: type, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """Open a .npy file for appending rows. Unlike pages of a memory-mapped file, written rows do not stay in memory."""
    with naming(path), open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _blocks(num_rows: int, dimension: int) -> Iterator[slice]:
    rows = max(1, BLOCK_BYTES // (4 * dimension))
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


@dataclass
class Shard:
    """An open shard with memory-mapped files. offsets and quantizer are None for kind flat."""

    ids: np.ndarray  # int64 [n]
    vectors: np.ndarray  # float16 [n, d]
    inverse_norms: np.ndarray  # float32 [n]
    offsets: np.ndarray | None = None  # int64 [num_lists + 1]
    codes: np.ndarray | None = None  # uint8 [n, code_bytes], compressed kinds only
    quantizer: faiss.IndexIVF | None = None

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows int64 [m] of ids int64 [m], all of which are in the shard."""
        order = np.argsort(self.ids)
        return order[np.searchsorted(self.ids[order], ids)]


def open_shard(
    uri: str, record: dict[str, Any], storage: Storage, folder: str, quantizer: faiss.IndexIVF | None = None
) -> Shard:
    """Open a shard; remote files are copied to `folder` first. quantizer: None opens it for exact search only.

    Raises AttribError if a file is missing or differs from the checksum in the record.
    """
    arrays = {}
    for name, expected in record["files"].items():
        path = verify_copy(join(uri, name), folder, expected["sha256"], REMAKE, storage)
        # As plain arrays: slicing a memmap takes longer than the product of a short list.
        arrays[name.removesuffix(".npy")] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if quantizer is None:
        arrays = {name: arrays[name] for name in ("ids", "vectors", "inverse_norms")}
    return Shard(**arrays, quantizer=quantizer)
