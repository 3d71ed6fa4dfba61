"""What a manifest job needs: memory, bytes and time."""

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa
import pyarrow.parquet

from attrib.common.storage import Storage
from attrib.data.manifest import Manifest
from attrib.runtime.estimate import PLACES_BYTES, READER_BYTES, TABLE_COPIES, WRITER_BYTES, Estimate

SAMPLE_ROWS = 4_096  # of a table, to see how large its rows are


class ManifestTask(StrEnum):
    """Kinds of Ray tasks of the manifest job, as `num_tasks` of its record counts them."""

    LIST = "list"  # one listed unit of the collection
    PARTITION = "partition"  # one partition of the manifest


@dataclass(frozen=True)
class RowBytes:
    """Mean bytes of a table's row, in memory and on disk."""

    in_memory: float
    on_disk: float

    @classmethod
    def of(cls, sample: pa.Table) -> "RowBytes":
        """As write_table would write it, from some rows."""
        if not len(sample):
            return cls(0.0, 0.0)
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(sample, sink, compression="zstd")
        return cls(sample.nbytes / len(sample), sink.getvalue().size / len(sample))


def row_bytes(manifest: Manifest, storage: Storage) -> RowBytes:
    """Of id, key, uri and metadata of a collection's images by ascending id, as indexes and attributions hold them."""
    columns = ["id", "key", "uri", *manifest.metadata_columns]
    partition = max(range(len(manifest.num_rows)), key=manifest.num_rows.__getitem__)
    num_rows = min(SAMPLE_ROWS, manifest.num_rows[partition])
    return RowBytes.of(storage.read_rows(manifest.partition_uri(partition), 0, num_rows, columns).sort_by("id"))


def estimate_manifest(
    num_images: int,
    partition_rows: int,
    row: RowBytes,
    baseline_bytes: int,
    num_workers: int,
    seconds_per_image: float,
) -> Estimate:
    """Of the second half of the job, which writes partitions: what a collection costs is known once it is listed.

    row: of a listed image; seconds_per_image: of one worker's listing, which writes the same rows once.
    """
    rows = min(partition_rows, num_images)
    return Estimate(
        num_workers=num_workers,
        worker_bytes=baseline_bytes
        + READER_BYTES
        + WRITER_BYTES
        + rows * (TABLE_COPIES * row.in_memory + PLACES_BYTES),
        # By unit, joined, sorted, and once more while duplicates are looked for.
        driver_bytes=baseline_bytes + 4 * 8 * num_images,
        output_bytes=round(num_images * row.on_disk),
        temporary_bytes=round(num_images * row.on_disk),
        seconds=num_images * seconds_per_image / num_workers,
    )
