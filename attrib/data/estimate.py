"""Estimate of the manifest job: memory, bytes and time."""

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa
import pyarrow.parquet

from attrib.common.storage import Storage
from attrib.data.manifest import Manifest
from attrib.runtime.estimate import READER_BYTES, TABLE_COPIES, WRITER_BYTES, Estimate

SAMPLE_ROWS = 4_096  # rows read to measure the size of a row
DIGEST_ROW_BYTES = 900  # Python objects per row while a manifest is digested; measured on 2026-11-21


class ManifestTask(StrEnum):
    """Kinds of Ray tasks of the manifest job, as `num_tasks` of its record counts them."""

    LIST = "list"  # one work unit of the listing
    PARTITION = "partition"  # one partition of the manifest


@dataclass(frozen=True)
class RowBytes:
    """Mean bytes of a row of a table, in memory and on disk."""

    in_memory: float
    on_disk: float

    @classmethod
    def of(cls, sample: pa.Table) -> "RowBytes":
        """Measure some rows, written like `Storage.write_table` does."""
        if not len(sample):
            return cls(0.0, 0.0)
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(sample, sink, compression="zstd")
        return cls(sample.nbytes / len(sample), sink.getvalue().size / len(sample))


def row_bytes(manifest: Manifest, storage: Storage) -> RowBytes:
    """Return the size of id, key, uri and metadata of an image, ordered by id as in indexes and attributions."""
    columns = ["id", "key", "uri", *manifest.metadata_columns]
    partition = max(range(len(manifest.num_rows)), key=manifest.num_rows.__getitem__)
    num_rows = min(SAMPLE_ROWS, manifest.num_rows[partition])
    return RowBytes.of(storage.read_rows(manifest.checked_uri(partition, storage), 0, num_rows, columns).sort_by("id"))


def estimate_manifest(
    num_images: int,
    partition_rows: int,
    row: RowBytes,
    baseline_bytes: int,
    num_workers: int,
    seconds_per_image: float,
) -> Estimate:
    """Return the estimate of writing the partitions, after the listing, because only the listing tells the sizes.

    row: of a listed image; seconds_per_image: of the listing by one worker, which writes the same rows once.
    """
    rows_bytes = min(partition_rows, num_images) * (TABLE_COPIES * row.in_memory + DIGEST_ROW_BYTES)
    written = round(num_images * row.on_disk)
    return Estimate(
        num_workers=num_workers,
        worker_bytes=baseline_bytes + READER_BYTES + WRITER_BYTES + round(rows_bytes),
        # int64 ids four times: listed, joined, sorted, and while duplicates are searched.
        driver_bytes=baseline_bytes + 4 * 8 * num_images,
        output_bytes=written,
        temporary_bytes=written,
        seconds=num_images * seconds_per_image / num_workers,
    )
