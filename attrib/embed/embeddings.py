"""Embeddings on disk: one row per image with its vector, or with the stage and reason of its failure.

<output>/part-00000.parquet ...   one per manifest partition, rows by ascending id (`schema`)
<output>/failures.parquet         images without a vector: id, key, uri, stage, reason
<output>/embeddings.json          written last: encoder, counts, digest, settings, versions
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.json_records import taking_values
from attrib.common.storage import Storage, bytes_sha256, join, unsealed
from attrib.common.verified import verify
from attrib.data.chunks import failures_of, publish_partition
from attrib.data.manifest import Manifest, part_name

EMBEDDINGS_RECORD = "embeddings.json"
FAILURES = "failures.parquet"

RESULT_FIELDS = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("content_sha256", pa.binary(32)),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("stage", pa.string()),  # of a failure: read, decode or embed
    pa.field("reason", pa.string()),
]


def schema(dimension: int) -> pa.Schema:
    """Return RESULT_FIELDS and `embedding`, float16 [dimension], which is null for failed images."""
    return pa.schema([*RESULT_FIELDS, pa.field("embedding", pa.list_(pa.float16(), dimension))])


@dataclass(frozen=True)
class Embeddings:
    """A finished embed run."""

    uri: str
    manifest_uri: str
    encoder: dict  # EncoderIdentity.to_dict()
    digest: str
    num_rows: list[int]
    num_embedded: list[int]
    sha256: list[str] | None = None  # of each part; None: not verified

    def checked_uri(self, partition: int, storage: Storage) -> str:
        """URI of a part. Raises AttribError if it is not the file that jobs.embed wrote."""
        sha256 = self.sha256[partition] if self.sha256 else None
        return verify(self.part_uri(partition), sha256, "jobs.embed", storage)

    def part_uri(self, partition: int) -> str:
        return join(self.uri, part_name(partition))

    @property
    def dimension(self) -> int:
        return self.encoder["dimension"]


def open_embeddings(uri: str, storage: Storage) -> Embeddings:
    """Read a finished embed run. Raises AttribError if there is none."""
    place = join(uri, EMBEDDINGS_RECORD)
    record = storage.require(place, "jobs.embed")
    same = ("encoder", "digest", "num_rows", "num_embedded")
    with taking_values(place):
        found = {name: record[name] for name in same}
        return Embeddings(uri, record["settings"]["manifest"], **found, sha256=record.get("sha256"))


def read_vectors(
    embeddings: Embeddings, partition: int, storage: Storage, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int64 [n], ascending, and vectors float16 [n, d] of the embedded images of a partition.

    stop: None reads the whole partition; otherwise rows [start, stop). Failed images are skipped.
    """
    uri, columns = embeddings.checked_uri(partition, storage), ["id", "embedding"]
    part = storage.read_table(uri, columns) if stop is None else storage.read_rows(uri, start, stop, columns)
    part = part.filter(pc.is_valid(part["embedding"])).combine_chunks()
    values = part["embedding"].combine_chunks().flatten() if len(part) else pa.array([], pa.float16())
    return part["id"].to_numpy(), values.to_numpy(zero_copy_only=False).reshape(len(part), embeddings.dimension)


def finish_partition(
    output: str, manifest: Manifest, partition: int, chunk_rows: int, storage: Storage
) -> tuple[int, pa.Table, str]:
    """Publish a part unless it is there; return its number of rows, its failures and its SHA-256.

    Runs as a task. It is here because this module does not import torch, whose import would take longer than the task.
    """
    uri = join(output, part_name(partition))
    publish_partition(uri, output, partition, manifest.num_rows[partition], chunk_rows, storage)
    data = storage.read_bytes(uri)
    part = unsealed(data, uri, ["id", "stage", "reason"])  # it may be of a run that did not end
    places = storage.read_table(manifest.checked_uri(partition, storage), columns=["id", "key", "uri"])
    return len(part), failures_of(part, places), bytes_sha256(data)
