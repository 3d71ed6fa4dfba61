"""Distractors: the images of AbC's pool that are nobody's exemplar, a million in the released benchmark, read once and in blocks.

Three places they can lie: rows of the sources' own collection (a list of paths), an embed run of their own, or a bare .npy of features.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage, is_remote, scratch_folder
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings, read_vectors
from attrib.evaluate.collection import Collection

BLOCK_ROWS = 16_384  # with 768 numbers each, 100 MB in float64
PREFIX = "distractor: "  # before the key of a distractor that is not one of the sources, whose keys may be the same


class ArrayDistractors:
    """Rows of an array: vectors [n, d] of any float type, also a memory map; of all its rows or those of `rows` (int64 [m])."""

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
    """Sources that a text file lists, one path per line, `prefix` in front of their keys. Raises AttribError if one has no vector."""
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
            f"{uri}: {absent[0]!r} ({len(absent)} of {len(paths)}) has no vector among the sources; embed it, take it from the list, or "
            f"correct abc.exemplar_prefix {prefix!r}"
        )
    if len(set(keys)) < len(keys):
        twice, _ = Counter(keys).most_common(1)[0]
        raise AttribError(f"{uri} lists {twice!r} twice; keep one line per image")
    rows = np.array([row_of[key] for key in keys], dtype=np.int64)
    return ArrayDistractors(sources.vectors, sources.keys, rows, origin=uri)


@contextmanager
def open_distractors(uri: str, storage: Storage) -> Iterator[Distractors]:
    """Distractors of an embed folder or a .npy; a .npy of an object store lies on the scratch disk while they are open."""
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
