"""Images with their vectors in memory: the sources that an evaluation ranks, and its queries."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from attrib.common.errors import AttribError, MismatchError
from attrib.common.storage import Storage
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings, read_vectors

MIN_NORM = 1e-12  # as in torch.nn.functional.normalize, which AbC's code uses: a zero vector stays zero


@dataclass(frozen=True)
class Collection:
    """keys [n], vectors of any float type [n, d] (normalised where they are compared), metadata columns [n] by name."""

    keys: list[str]
    vectors: np.ndarray
    metadata: dict[str, list] = field(default_factory=dict)

    def column(self, name: str) -> list:
        """A metadata column. Raises AttribError that lists the existing columns."""
        if name not in self.metadata:
            raise AttribError(
                f"the collection has no metadata column {name!r}; it has {', '.join(self.metadata) or 'none'}"
            )
        return self.metadata[name]


def read_collection(uri: str, storage: Storage) -> Collection:
    """Read the images of an embed run that have a vector, with the keys and metadata of their manifest.

    Memory: float16 vectors, 1.5 GB for a million of 768 numbers, and the metadata. Raises AttribError if the manifest
    changed after the embed run.
    """
    embeddings = open_embeddings(uri, storage)
    manifest = open_manifest(embeddings.manifest_uri, storage)
    columns = ["key", *manifest.metadata_columns]
    rows, vectors = [], []
    for partition in range(len(embeddings.num_rows)):
        ids, found = read_vectors(embeddings, partition, storage)
        table = storage.read_table(manifest.checked_uri(partition, storage), columns=["id", *columns]).sort_by("id")
        at = np.searchsorted(table["id"].to_numpy(), ids)
        if len(at) and not np.array_equal(table["id"].to_numpy()[np.minimum(at, len(table) - 1)], ids):
            raise AttribError(f"{manifest.uri} changed after {uri} was embedded; embed it again")
        rows.append(table.take(pa.array(at)))
        vectors.append(found)
    if not any(len(found) for found in vectors):
        raise AttribError(f"{uri} holds no vector, so there is nothing to rank; see its failures.parquet")
    table = pa.concat_tables(rows)
    metadata = {name: table[name].to_pylist() for name in columns[1:]}
    return Collection(table["key"].to_pylist(), np.concatenate(vectors), metadata)


def unit_rows(vectors: np.ndarray, mapper=None, origin: str = "the vectors") -> np.ndarray:
    """Unit vectors float64 [n, d'] of vectors [n, d], after a mapper (attrib.evaluate.mappers.LinearMapper) if given.

    float64, so that copies of one image tie: the last bit of a float32 product depends on the row's place in the
    matrix. Raises AttribError that names the first row that is not finite.
    """
    rows = np.array(vectors, dtype=np.float64)
    if mapper is not None:
        rows = mapper(rows)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        row = int(np.flatnonzero(~np.isfinite(lengths[:, 0]))[0])
        raise AttribError(f"{origin}: row {row} holds a NaN or infinity; remove this row or embed its image again")
    rows /= np.maximum(lengths, MIN_NORM)
    return rows


def check_comparable(sources: np.ndarray, queries: np.ndarray) -> None:
    """Raise MismatchError if vectors [n, d] and [m, d'] differ in dimension."""
    if sources.shape[1] != queries.shape[1]:
        raise MismatchError(
            f"source vectors have {sources.shape[1]} numbers and query vectors {queries.shape[1]}; embed sources and "
            "queries with the same model, and use a mapper for both or for neither"
        )
