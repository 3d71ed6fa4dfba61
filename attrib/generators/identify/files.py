"""Verdicts and the summary of an identify run on disk.

<output>/verdicts/part-00000.parquet ...   one per manifest partition, rows by ascending id (`schema`)
<output>/sets.parquet                      one row per set, where a set_column is given
<output>/candidates.parquet                one row per image of a candidate generator: its name and the image's id
<output>/share_draws.npy                   float64 [draws, families + 1], which a later run compares its shares with
<output>/generators.json                   written last: shares, changes, candidates, settings, versions

This module does not import torch, because loading it takes a worker seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import MismatchError
from attrib.common.seal import sealed_sha256
from attrib.common.storage import Storage, join
from attrib.common.verified import verify
from attrib.data.chunks import publish_partition
from attrib.data.manifest import Manifest, Slice, part_name

RECORD = "generators.json"
VERDICTS = "verdicts"
SETS = "sets.parquet"
CANDIDATES = "candidates.parquet"
SHARE_DRAWS = "share_draws.npy"
SUMMARY = (
    *("digest", "verdicts", "shares", "changes", "candidates", "families", "recognised", "negatives", "floor"),
    *("abstains", "warnings", "unassessable_reasons", "sets"),
)

VERDICT_FIELDS = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("verdict", pa.string(), nullable=False),  # known, family, unknown or unassessable
    pa.field("generator", pa.string()),  # that the image is consistent with; of a family, all names joined by |
    pa.field("nearest", pa.string()),  # the best generator, whatever the verdict
    pa.field("score", pa.float32()),
    pa.field("margin", pa.float32()),  # above the best generator of another family
    pa.field("p_value", pa.float64()),  # of the score among the negatives
    pa.field("own_p_value", pa.float64()),  # of the score among the references of the nearest generator
    pa.field("gallery", pa.string()),  # the degradation whose references are nearest
    pa.field("reason", pa.string()),  # null where known
    pa.field("stage", pa.string()),  # read or decode, where the image could not be used
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("codec", pa.string()),
]


def schema(dimension: int) -> pa.Schema:
    """Columns of a verdict part; fingerprint: float16 [dimension], null where the image has none."""
    return pa.schema([*VERDICT_FIELDS, pa.field("fingerprint", pa.list_(pa.float16(), dimension))])


@dataclass(frozen=True)
class Identified:
    """A finished identify run."""

    uri: str
    record: dict

    @property
    def digest(self) -> str:
        return self.record["digest"]

    @property
    def summary(self) -> dict:
        """What a report shows of the image set."""
        return {name: self.record[name] for name in SUMMARY}

    def checked_uri(self, partition: int, storage: Storage) -> str:
        """URI of a verdict part. Raises AttribError if it is not the file that jobs.identify wrote."""
        sha256 = self.record["sha256"][partition] if "sha256" in self.record else None
        return verify(self.part_uri(partition), sha256, "jobs.identify", storage)

    def part_uri(self, partition: int) -> str:
        return join(self.uri, VERDICTS, part_name(partition))


def finish_part(output: str, partition: int, num_rows: int, chunk_rows: int, storage: Storage) -> str:
    """Publish a verdict part unless it is there; return its SHA-256."""
    uri = Identified(output, {}).part_uri(partition)
    publish_partition(uri, output, partition, num_rows, chunk_rows, storage)
    return sealed_sha256(storage.read_bytes(uri), uri)  # it may be of a run that did not end


def failures(output: str, num_parts: int, storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield key, stage and reason of the images that could not be read or decoded."""
    for partition in range(num_parts):
        uri = Identified(output, {}).part_uri(partition)
        yield from storage.read_table(uri, ["key", "stage", "reason"], pc.field("stage").is_valid()).to_pylist()


def open_identified(uri: str, storage: Storage) -> Identified:
    return Identified(uri, storage.require(join(uri, RECORD), "jobs.identify"))


def check_same_images(identified: Identified, manifest: Manifest) -> None:
    """Raises MismatchError unless the verdicts are of the manifest's images, in its order."""
    record = identified.record
    if (record["manifest_digest"], record["order_digest"]) != (manifest.digest, manifest.order_digest):
        raise MismatchError(
            f"{identified.uri} holds verdicts on other images than those of {manifest.uri}; run jobs.identify on this "
            "manifest"
        )


def block_verdicts(identified: Identified, block: list[Slice], storage: Storage) -> pa.Table:
    """VERDICT_FIELDS of the images of some slices of parts, by ascending id."""
    names = [field.name for field in VERDICT_FIELDS]
    parts = [storage.read_rows(identified.checked_uri(s.table, storage), s.start, s.stop, names) for s in block]
    return pa.concat_tables(parts).sort_by("id").combine_chunks()


def read_fingerprints(part: pa.Table) -> np.ndarray:
    """Fingerprints of a verdict part, unit rows float32 [n, d]. All rows must have one."""
    column = part["fingerprint"].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = values.reshape(len(part), column.type.list_size)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
