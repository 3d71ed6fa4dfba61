"""Distractors: images of AbC's pool that are no exemplar of any model, a million in the released benchmark.

They are read in blocks from one of three places: rows of the collection of sources (a list of paths), a separate embed
run, or a .npy file of features.

`scan_distractors` counts in one pass, exactly, how many of them reach each threshold of a query. Only counts are kept,
never a matrix of queries x distractors: a million x 768 and 10,000 queries are 15 TFLOP in float32. A float32 product
of two unit vectors has an error of at most (d + 2) * 2^-24 in any order of additions (Higham, "Accuracy and Stability
of Numerical Algorithms", 2nd ed., eq. 3.5, with the sum of |x_i y_i| at most 1; 2 more for rounding the vectors). Pairs
farther from a threshold than this are counted as they are; the few nearer pairs are multiplied again in float64. The
counts are therefore those of float64.

Measured for that size with 12 exemplars per query on two shared CPU cores (tests/unit/evaluate/test_abc_protocol.py):
4.3 minutes and at most 2.3 GB in the process, 1.5 GB of them pages of the memory-mapped file.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage, is_remote, scratch_folder
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.evaluate.collection import Collection, unit_rows
from attrib.evaluate.scores import TIE, TOP_SOURCES

BLOCK_ROWS = 16_384  # with 768 numbers each, 100 MB in float64
PREFIX = "distractor: "  # before the key of a distractor that is not one of the sources, whose keys may be the same
QUERY_ROWS = 1024  # float32 scores of these with one block of 16,384 distractors: 64 MB


class ArrayDistractors:
    """Rows of an array: vectors [n, d] of any float type, also a memory map; of all its rows or those of `rows` (int64
    [m])."""

    def __init__(self, vectors: np.ndarray, keys: list[str] | None = None, rows=None, origin: str = "the distractors"):
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise AttribError(
                f"{origin}: distractors are a matrix of floats, one row each, not {vectors.dtype} {list(vectors.shape)}"
            )
        self.origin = origin
        self.num_rows = len(vectors) if rows is None else len(rows)
        self.dimension = vectors.shape[1]
        self._vectors, self._keys, self._rows = vectors, keys, rows

    def blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.num_rows, BLOCK_ROWS):
            at = slice(start, start + BLOCK_ROWS)
            yield self._vectors[at if self._rows is None else self._rows[at]]

    def known_keys(self) -> set[str]:
        """Keys that are keys of sources as well."""
        return set() if self._keys is None else {self._keys[i] for i in self._places(slice(None)).tolist()}

    def keys_of(self, rows: np.ndarray) -> list[str]:
        return [self._keys[i] if self._keys else f"{PREFIX}row {i}" for i in self._places(rows).tolist()]

    def _places(self, rows) -> np.ndarray:
        return np.arange(self.num_rows)[rows] if self._rows is None else np.asarray(self._rows)[rows]


class EmbeddedDistractors:
    """The images of an embed run that have a vector, one partition in memory at a time."""

    def __init__(self, uri: str, storage: Storage):
        self.origin = uri
        self._embeddings, self._storage = open_embeddings(uri, storage), storage
        self.num_rows, self.dimension = sum(self._embeddings.num_embedded), self._embeddings.dimension
        self._ids: list[np.ndarray] = []

    def known_keys(self) -> set[str]:
        """None: the keys of another collection say nothing about the sources."""
        return set()

    def blocks(self) -> Iterator[np.ndarray]:
        self._ids = []  # 8 bytes an image, kept so that the few that are named need no second reading of the vectors
        for partition in range(len(self._embeddings.num_rows)):
            ids, vectors = read_vectors(self._embeddings, partition, self._storage)
            self._ids.append(ids)
            for start in range(0, len(vectors), BLOCK_ROWS):
                yield vectors[start : start + BLOCK_ROWS]

    def keys_of(self, rows: np.ndarray) -> list[str]:
        """Keys of rows that the last scan went over."""
        ids = np.concatenate(self._ids)[rows]
        manifest = open_manifest(self._embeddings.manifest_uri, self._storage)
        uris = [manifest.partition_uri(partition) for partition, num_rows in enumerate(manifest.num_rows) if num_rows]
        images = self._storage.dataset(uris, format="parquet")
        found = images.to_table(columns=["id", "key"], filter=pc.field("id").isin(pa.array(np.unique(ids))))
        key_of = dict(zip(found["id"].to_pylist(), found["key"].to_pylist()))
        absent = set(ids.tolist()) - key_of.keys()
        if absent:
            raise AttribError(f"{manifest.uri} was made anew since {self.origin} was embedded; embed it again")
        return [PREFIX + key_of[i] for i in ids.tolist()]


Distractors = ArrayDistractors | EmbeddedDistractors


def listed_distractors(uri: str, prefix: str, sources: Collection, storage: Storage) -> ArrayDistractors:
    """Sources that a text file lists, one path per line, `prefix` in front of their keys. Raises AttribError if one has
    no vector."""
    if not storage.exists(uri):
        raise AttribError(f"the list of distractors {uri} does not exist")
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except UnicodeDecodeError as error:
        raise AttribError(f"the list of distractors {uri} is not UTF-8 text; save it as UTF-8") from error
    paths = [line for line in lines if line]
    row_of = {key: i for i, key in enumerate(sources.keys)}
    keys = [path.removeprefix(prefix) for path in paths]
    absent = [path for path, key in zip(paths, keys) if key not in row_of]
    if absent:
        raise AttribError(
            f"{uri}: {absent[0]!r} ({len(absent)} of {len(paths)}) has no vector among the sources; embed it, take "
            "it from the list, or "
            f"correct abc.exemplar_prefix {prefix!r}"
        )
    if len(set(keys)) < len(keys):
        twice, _ = Counter(keys).most_common(1)[0]
        raise AttribError(f"{uri} lists {twice!r} twice; keep one line per image")
    rows = np.array([row_of[key] for key in keys], dtype=np.int64)
    return ArrayDistractors(sources.vectors, sources.keys, rows, origin=uri)


@contextmanager
def open_distractors(uri: str, storage: Storage) -> Iterator[Distractors]:
    """Distractors of an embed folder or a .npy; a .npy of an object store lies on the scratch disk while they are
    open."""
    if not uri.endswith(".npy"):
        yield EmbeddedDistractors(uri, storage)
        return
    if not storage.exists(uri):
        raise AttribError(f"the distractors {uri} do not exist")
    with scratch_folder() as folder:
        path = storage.localise(uri, folder) if is_remote(uri) else uri
        try:
            # Without pickles: an .npy of objects would run code when loaded.
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise AttribError(f"{uri} is not a .npy file of numbers: {first_line(error)}") from error
        yield ArrayDistractors(vectors, origin=uri)


@dataclass(frozen=True)
class DistractorScan:
    """num_at_or_above: int64 [q, t]; top_rows int64 [q, TOP_SOURCES] and top_similarity float64: the best distractors,
    best first, padded with -1 and -inf."""

    num_at_or_above: np.ndarray
    top_rows: np.ndarray
    top_similarity: np.ndarray


def scan_distractors(
    queries: np.ndarray, thresholds: np.ndarray, distractors: Distractors, mapper=None
) -> DistractorScan:
    """Counts for unit vectors float64 [q, d] and thresholds float64 [q, t], padded with +inf; mapper: that of real
    images.

    Peak memory beside the arguments: 0.6 GB for d = 768 (a block in float64, twice when mapped, and in float32;
    scores), and 5 MB per thousand queries. Each block is read once. Raises AttribError if a distractor is not finite or
    dimensions differ.
    """
    state = _ScanState(queries, thresholds)
    start = 0
    for block in distractors.blocks():
        if mapper is None and block.shape[1] != queries.shape[1]:
            raise AttribError(
                f"{distractors.origin} has vectors of {block.shape[1]} numbers and the queries have "
                f"{queries.shape[1]}; make both with "
                "the same model"
            )
        rows = unit_rows(block, mapper, f"{distractors.origin}, rows from {start:,}")
        rows32 = rows.astype(np.float32)
        for first in range(0, len(queries), QUERY_ROWS):
            scores = state.queries32[first : first + QUERY_ROWS] @ rows32.T
            reached = np.flatnonzero(scores.max(axis=1) >= state.floors[first : first + QUERY_ROWS])
            for i in reached:
                state.add(first + i, scores[i], rows, start)
        start += len(block)
    return DistractorScan(state.counts, state.top_rows, state.top_similarity)


class _ScanState:
    """Counts and best distractors so far, and the score that can change either."""

    def __init__(self, queries: np.ndarray, thresholds: np.ndarray):
        num_queries, dimension = queries.shape
        self.queries, self.thresholds = queries, thresholds
        self.queries32 = queries.astype(np.float32)
        # 8 instead of 2: second-order terms, and the rounding of the limits themselves to float32.
        self.margin = (dimension + 8) * 2.0**-24
        self.lower = (thresholds - TIE - self.margin).astype(np.float32)
        self.upper = (thresholds + self.margin).astype(np.float32)
        self.lowest = self.lower.min(axis=1, initial=np.inf)
        self.counts = np.zeros(thresholds.shape, np.int64)
        self.top_rows = np.full((num_queries, TOP_SOURCES), -1, np.int64)
        self.top_similarity = np.full((num_queries, TOP_SOURCES), -np.inf)
        self.floors = np.full(num_queries, -np.inf, np.float32)

    def add(self, i: int, scores: np.ndarray, rows: np.ndarray, start: int) -> None:
        """Count a block for query i: its float32 scores [b], the block's unit vectors float64 [b, d], and its first
        row's number."""
        at = np.flatnonzero(scores >= self.floors[i])
        found = scores[at]
        self._count(i, at, found, rows)
        self._keep_best(i, at, found, rows, start)

    def _count(self, i: int, at: np.ndarray, found: np.ndarray, rows: np.ndarray) -> None:
        ascending = np.sort(found)
        surely = len(found) - np.searchsorted(ascending, self.upper[i], side="right")
        perhaps = len(found) - np.searchsorted(ascending, self.lower[i], side="left")
        self.counts[i] += surely
        for j in np.flatnonzero(perhaps > surely):
            near = at[(found >= self.lower[i, j]) & (found <= self.upper[i, j])]
            exact = rows[near] @ self.queries[i]
            self.counts[i, j] += np.count_nonzero(exact >= self.thresholds[i, j] - TIE)

    def _keep_best(self, i: int, at: np.ndarray, found: np.ndarray, rows: np.ndarray, start: int) -> None:
        worst_kept = self.top_similarity[i, -1]
        if len(found) > TOP_SOURCES:
            # The exact fifth best is at most a margin below the fifth best in float32, which itself is off by at most
            # one.
            worst_kept = max(worst_kept, np.partition(found, -TOP_SOURCES)[-TOP_SOURCES] - self.margin)
        better = at[found >= worst_kept - self.margin]
        if not len(better):
            return
        similarity = np.concatenate([self.top_similarity[i], rows[better] @ self.queries[i]])
        numbers = np.concatenate([self.top_rows[i], better + start])
        order = np.lexsort((numbers, -similarity))[:TOP_SOURCES]
        self.top_similarity[i], self.top_rows[i] = similarity[order], numbers[order]
        self.floors[i] = min(self.lowest[i], similarity[order[-1]] - self.margin)
