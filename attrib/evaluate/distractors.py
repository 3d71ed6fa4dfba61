"""Distractors: images in AbC's pool that are not a source of any query, a million in the released benchmark.

They are read in blocks: listed rows of the source collection, a separate embed run, or a .npy file.

`scan_distractors` counts exactly, in one pass, how many of them reach each threshold of a query. The products of 10,000
queries and a million vectors of 768 numbers take 15 TFLOP in float32, and their matrix is never in memory. A float32
product of two unit vectors has an error of at most (d + 2) * 2^-24 (Higham, "Accuracy and Stability of Numerical
Algorithms", 2nd ed., eq. 3.5; the sum of |x_i y_i| is at most 1, and 2 more for rounding the vectors). Pairs within
this margin of a threshold are multiplied again in float64, so the counts are those of float64.

At that size, with 12 exemplars per query, the scan took 4.3 minutes on two shared CPU cores and at most 2.3 GB, 1.5 GB
of them pages of the memory-mapped file (tests/unit/evaluate/test_abc_protocol.py).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import AttribError, first_line
from attrib.common.scratch import scratch_folder
from attrib.common.storage import Storage, is_remote
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.evaluate.collection import Collection, unit_rows
from attrib.evaluate.scores import TIE, TOP_SOURCES

BLOCK_ROWS = 16_384  # 100 MB in float64 with 768 numbers each
QUERY_ROWS = 1024  # 64 MB of float32 scores with one block of distractors
PREFIX = "distractor: "  # before the key of a distractor that is not a source, because keys may be equal


class ArrayDistractors:
    """Rows of a float array [n, d], which may be a memory map. rows: int64 [m], the rows to use; None: all."""

    def __init__(self, vectors: np.ndarray, keys: list[str] | None = None, rows=None, origin: str = "the distractors"):
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise AttribError(
                f"{origin}: give a float matrix with one row per image, not {vectors.dtype} {list(vectors.shape)}"
            )
        self.origin = origin
        self._vectors, self._keys = vectors, keys
        self._rows = np.arange(len(vectors)) if rows is None else rows
        self._is_whole = rows is None

    def blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            yield self._vectors[block if self._is_whole else self._rows[block]]  # a slice of a memory map is no copy

    def source_keys(self) -> set[str]:
        """Keys of the distractors that are sources as well."""
        return {self._keys[i] for i in self._rows.tolist()} if self._keys else set()

    def keys_of(self, rows: np.ndarray) -> list[str]:
        return [self._keys[i] if self._keys else f"{PREFIX}row {i}" for i in self._rows[rows].tolist()]


class EmbeddedDistractors:
    """The images of an embed run that have a vector, one partition in memory at a time."""

    def __init__(self, uri: str, storage: Storage):
        self.origin = uri
        self._embeddings, self._storage = open_embeddings(uri, storage), storage
        self._ids: list[np.ndarray] = []

    def source_keys(self) -> set[str]:
        """The empty set: another collection has other keys."""
        return set()

    def blocks(self) -> Iterator[np.ndarray]:
        self._ids = []  # 8 bytes an image; without them, `keys_of` would read the vectors again
        for partition in range(len(self._embeddings.num_rows)):
            ids, vectors = read_vectors(self._embeddings, partition, self._storage)
            self._ids.append(ids)
            for start in range(0, len(vectors), BLOCK_ROWS):
                yield vectors[start : start + BLOCK_ROWS]

    def keys_of(self, rows: np.ndarray) -> list[str]:
        """Keys of rows of the last scan."""
        ids = np.concatenate(self._ids)[rows]
        manifest = open_manifest(self._embeddings.manifest_uri, self._storage)
        uris = [
            manifest.checked_uri(partition, self._storage)
            for partition, num_rows in enumerate(manifest.num_rows)
            if num_rows
        ]
        images = self._storage.dataset(uris, format="parquet")
        found = images.to_table(columns=["id", "key"], filter=pc.field("id").isin(pa.array(np.unique(ids))))
        key_of = dict(zip(found["id"].to_pylist(), found["key"].to_pylist()))
        if set(ids.tolist()) - key_of.keys():
            raise AttribError(f"{manifest.uri} changed after {self.origin} was embedded; embed it again")
        return [PREFIX + key_of[i] for i in ids.tolist()]


Distractors = ArrayDistractors | EmbeddedDistractors


def listed_distractors(uri: str, prefix: str, sources: Collection, storage: Storage) -> ArrayDistractors:
    """Sources listed in a text file, one path per line. prefix: the part of the paths in front of the sources' keys.

    Raises AttribError if the file cannot be read or an image has no vector.
    """
    if not storage.exists(uri):
        raise AttribError(f"the list of distractors {uri} does not exist; correct abc.distractors")
    try:
        paths = [line for line in storage.read_bytes(uri).decode().splitlines() if line]
    except UnicodeDecodeError as error:
        raise AttribError(f"the list of distractors {uri} is not UTF-8 text; save it as UTF-8") from error
    row_of = {key: i for i, key in enumerate(sources.keys)}
    keys = [path.removeprefix(prefix) for path in paths]
    absent = [path for path, key in zip(paths, keys) if key not in row_of]
    if absent:
        raise AttribError(
            f"{uri}: {absent[0]!r} ({len(absent)} of {len(paths)}) has no vector among the sources; embed it, remove "
            f"it from the list, or correct abc.exemplar_prefix {prefix!r}"
        )
    if len(set(keys)) < len(keys):
        raise AttribError(f"{uri} lists {Counter(keys).most_common(1)[0][0]!r} twice; keep one line per image")
    rows = np.array([row_of[key] for key in keys], dtype=np.int64)
    return ArrayDistractors(sources.vectors, sources.keys, rows, origin=uri)


@contextmanager
def open_distractors(uri: str, storage: Storage) -> Iterator[Distractors]:
    """Open the distractors of an embed folder or a .npy file; a remote .npy is on the scratch disk while open."""
    if not uri.endswith(".npy"):
        yield EmbeddedDistractors(uri, storage)
        return
    if not storage.exists(uri):
        raise AttribError(f"the distractors {uri} do not exist; correct methods[].distractors")
    with scratch_folder() as folder:
        path = storage.localise(uri, folder) if is_remote(uri) else uri
        try:
            # Without pickles: an .npy of objects could run code when loaded.
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise AttribError(f"{uri} is not a .npy file of numbers: {first_line(error)}") from error
        yield ArrayDistractors(vectors, origin=uri)


class DistractorScan:
    """Scan of the distractors for q queries with t thresholds each.

    num_at_or_above: int64 [q, t]. The best distractors, best first: top_rows, int64 [q, TOP_SOURCES], padded with -1,
    and top_similarity, float64, padded with -inf.
    """

    def __init__(self, queries: np.ndarray, thresholds: np.ndarray):
        num_queries, dimension = queries.shape
        self.num_at_or_above = np.zeros(thresholds.shape, np.int64)
        self.top_rows = np.full((num_queries, TOP_SOURCES), -1, np.int64)
        self.top_similarity = np.full((num_queries, TOP_SOURCES), -np.inf)
        self._queries, self._thresholds = queries, thresholds
        self._queries32 = queries.astype(np.float32)
        # d + 8 instead of d + 2, for second-order terms and for rounding the limits below to float32.
        self._margin = (dimension + 8) * 2.0**-24
        self._lower = (thresholds - TIE - self._margin).astype(np.float32)
        self._upper = (thresholds + self._margin).astype(np.float32)
        self._floors = np.full(num_queries, -np.inf, np.float32)  # the least score that can change a result

    def add_block(self, rows: np.ndarray, start: int) -> None:
        """Add unit vectors float64 [b, d], the distractors from number `start`."""
        rows32 = rows.astype(np.float32)
        for first in range(0, len(self._queries), QUERY_ROWS):
            scores = self._queries32[first : first + QUERY_ROWS] @ rows32.T
            for i in np.flatnonzero(scores.max(axis=1) >= self._floors[first : first + QUERY_ROWS]):
                self._add(first + i, scores[i], rows, start)

    def _add(self, i: int, scores: np.ndarray, rows: np.ndarray, start: int) -> None:
        """Add a block to query i. scores: its float32 products [b]."""
        at = np.flatnonzero(scores >= self._floors[i])
        found = scores[at]
        ascending = np.sort(found)
        certain = len(found) - np.searchsorted(ascending, self._upper[i], side="right")
        possible = len(found) - np.searchsorted(ascending, self._lower[i], side="left")
        self.num_at_or_above[i] += certain
        for j in np.flatnonzero(possible > certain):
            near = at[(found >= self._lower[i, j]) & (found <= self._upper[i, j])]
            exact = rows[near] @ self._queries[i]
            self.num_at_or_above[i, j] += np.count_nonzero(exact >= self._thresholds[i, j] - TIE)

        worst_kept = self.top_similarity[i, -1]
        if len(found) > TOP_SOURCES:
            # The exact fifth best may be one margin below the fifth best in float32.
            worst_kept = max(worst_kept, np.partition(found, -TOP_SOURCES)[-TOP_SOURCES] - self._margin)
        better = at[found >= worst_kept - self._margin]
        if len(better):
            similarity = np.concatenate([self.top_similarity[i], rows[better] @ self._queries[i]])
            numbers = np.concatenate([self.top_rows[i], better + start])
            order = np.lexsort((numbers, -similarity))[:TOP_SOURCES]
            self.top_similarity[i], self.top_rows[i] = similarity[order], numbers[order]
            lowest = self._lower[i].min(initial=np.inf)
            self._floors[i] = min(lowest, similarity[order[-1]] - self._margin)


def scan_distractors(
    queries: np.ndarray, thresholds: np.ndarray, distractors: Distractors, mapper=None
) -> DistractorScan:
    """Count the distractors that reach each threshold, and keep the best, reading each block once.

    queries: unit vectors float64 [q, d]; thresholds: float64 [q, t], padded with +inf; mapper: that of real images.
    Peak memory beside the arguments: 0.6 GB for d = 768 and 5 MB per thousand queries. Raises AttribError if a
    distractor is not finite or dimensions differ.
    """
    scan = DistractorScan(queries, thresholds)
    start = 0
    for block in distractors.blocks():
        if mapper is None and block.shape[1] != queries.shape[1]:
            raise AttribError(
                f"{distractors.origin} has vectors of {block.shape[1]} numbers and the queries have "
                f"{queries.shape[1]}; embed both with the same model"
            )
        scan.add_block(unit_rows(block, mapper, f"{distractors.origin}, rows from {start:,}"), start)
        start += len(block)
    return scan
