"""The manifest of a collection: one Parquet row per image, with a stable id, the location and the metadata.

<output>/part-00000.parquet ...   rows in reading order (LOCATION_FIELDS of attrib.data.collections, then metadata)
<output>/manifest.json            written last: counts, partitions, settings, versions
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from attrib.common.config import digest
from attrib.common.json_records import taking_values
from attrib.common.storage import Storage, join
from attrib.common.verified import verify
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.ids import sampling_rank
from attrib.data.settings import CollectionSettings
from attrib.data.sidecar import Met, join_metadata

MANIFEST_RECORD = "manifest.json"


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of one of several tables: listings, or manifest partitions. table: its position among them."""

    table: int
    start: int
    stop: int


@dataclass(frozen=True)
class Manifest:
    """A finished manifest."""

    uri: str
    collection: CollectionSettings
    digest: str  # of the set of images
    order_digest: str  # of their order, their positions within shards, and the versions of their files
    rows_digest: str  # of all rows, with locations and metadata
    num_rows: list[int]  # per partition
    metadata_columns: list[str]
    sha256: list[str] | None = None  # of each partition; None: of an earlier version

    def checked_uri(self, partition: int, storage: Storage) -> str:
        """URI of a partition. Raises AttribError if it is not the file that jobs.manifest wrote."""
        sha256 = self.sha256[partition] if self.sha256 else None
        return verify(self.partition_uri(partition), sha256, "jobs.manifest", storage)

    def partition_uri(self, partition: int) -> str:
        return join(self.uri, part_name(partition))

    @property
    def num_images(self) -> int:
        return sum(self.num_rows)


def part_name(partition: int) -> str:
    return f"part-{partition:05d}.parquet"


def plan_partitions(table_rows: list[int], partition_rows: int) -> list[list[Slice]]:
    """Cut the listed tables, in order, into partitions of `partition_rows` images (the last may be shorter)."""
    partitions: list[list[Slice]] = []
    room = 0
    for table, num_rows in enumerate(table_rows):
        start = 0
        while start < num_rows:
            if room == 0:
                partitions.append([])
                room = partition_rows
            stop = min(num_rows, start + room)
            partitions[-1].append(Slice(table, start, stop))
            room -= stop - start
            start = stop
    return partitions


def ids_digest(collection: CollectionSettings, sorted_ids: np.ndarray) -> str:
    """Return a digest of the set of images, independent of their order. sorted_ids: int64 [n], ascending."""
    return digest([collection.name, hashlib.sha256(sorted_ids.tobytes()).hexdigest()])


def build_partition(
    tables: list[pa.Table],
    moved_ids: dict[str, int],
    collection: CollectionSettings,
    storage: Storage,
    met: Met | None = None,
) -> pa.Table:
    """Return the rows of one partition: concatenated listings, colliding ids replaced, metadata joined.

    met: counts of images and rows that met are added to it.
    """
    images = pa.concat_tables(tables)
    if moved_ids:
        keys, ids = images["key"].to_pylist(), images["id"].to_pylist()
        replaced = [moved_ids.get(key, image_id) for key, image_id in zip(keys, ids)]
        images = images.set_column(0, images.schema.field("id"), pa.array(replaced, pa.int64()))
    return join_metadata(images, collection, storage, met)


def open_places(uris: list[str], storage: Storage) -> pyarrow.dataset.Dataset:
    """Return LOCATION_FIELDS of partitions; those that manifests of earlier versions lack are null."""
    return storage.dataset(uris, format="parquet", schema=pa.schema(LOCATION_FIELDS))


def open_manifest(uri: str, storage: Storage) -> Manifest:
    """Read a finished manifest. Raises AttribError if there is none."""
    place = join(uri, MANIFEST_RECORD)
    record = storage.require(place, "jobs.manifest")
    same = ("digest", "order_digest", "rows_digest", "num_rows", "metadata_columns")
    with taking_values(place):
        collection = CollectionSettings.model_validate(record["settings"]["collection"])
        return Manifest(uri, collection, **{name: record[name] for name in same}, sha256=record.get("sha256"))


def sample_threshold(manifest: Manifest, max_images: int, storage: Storage) -> np.uint64 | None:
    """Return the largest sampling_rank in a sample of `max_images` images; None if the sample is the whole manifest."""
    if max_images >= manifest.num_images:
        return None
    parts = (
        storage.read_table(manifest.checked_uri(p, storage), columns=["id"]) for p in range(len(manifest.num_rows))
    )
    ranks = np.concatenate([sampling_rank(part["id"].to_numpy()) for part in parts])
    threshold: np.uint64 = np.partition(ranks, max_images - 1)[max_images - 1]
    return threshold


def sampled_rows(manifest: Manifest, partition: int, threshold: np.uint64 | None, storage: Storage) -> pa.Table:
    """Rows of a partition whose sampling_rank is at most `threshold`, by ascending id. threshold: None for all rows."""
    rows = storage.read_table(manifest.checked_uri(partition, storage)).sort_by("id")
    return rows if threshold is None else rows.filter(pa.array(sampling_rank(rows["id"].to_numpy()) <= threshold))


def sampled_images(manifest: Manifest, max_images: int, storage: Storage) -> pa.Table:
    """Rows of a sample of `max_images` images, by partition and id. The sample does not depend on the partitions."""
    threshold = sample_threshold(manifest, max_images, storage)
    tables = [sampled_rows(manifest, p, threshold, storage) for p in range(len(manifest.num_rows))]
    return pa.concat_tables(tables).combine_chunks()
