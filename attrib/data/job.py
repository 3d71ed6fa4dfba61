"""The manifest job: list units in parallel, settle ids over the whole collection, write partitions in parallel."""

import hashlib
import logging
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.progress import Progress
from attrib.common.run_record import begin, finish
from attrib.common.settings import JobSettings
from attrib.common.storage import Storage, join
from attrib.data.collections import RESERVED_COLUMNS, ListingUnit, list_images, list_units, open_sidecar
from attrib.data.estimate import ManifestTask, RowBytes, estimate_manifest
from attrib.data.ids import duplicated_ids, resolve_collisions
from attrib.data.manifest import (
    MANIFEST_RECORD,
    Manifest,
    Slice,
    build_partition,
    ids_digest,
    open_manifest,
    part_name,
    plan_partitions,
)
from attrib.data.settings import CollectionSettings, ManifestSettings
from attrib.runtime.admission import admit
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import baseline_bytes
from attrib.runtime.session import connect, num_cluster_cpus
from attrib.runtime.tasks import run_units

logger = logging.getLogger(__name__)

LISTINGS = "_listings"
SAMPLE_ROWS = 4_096  # of a listing, to see how large its rows are


def run(settings: ManifestSettings) -> dict:
    """Make the manifest and return its record. Raises AttribError for an empty collection or a key that occurs twice."""
    baseline_bytes()
    storage = Storage(settings.storage)
    record = begin(settings, MANIFEST_RECORD, {}, storage, resumable=False)
    if record:
        logger.info(
            f"manifest {settings.collection.name}: finished at {record['written_at']}, NOT listed again; choose another output if "
            f"images came or went since"
        )
        return record
    # Parts of a killed run may be cut otherwise.
    for name in storage.names(settings.output, suffix=".parquet"):
        storage.delete_file(join(settings.output, name))
    storage.delete_folder(join(settings.output, LISTINGS))
    connect(settings.ray)
    collection = settings.collection
    units = list_units(collection, storage)
    listings = [join(settings.output, LISTINGS, f"unit-{i:06d}.parquet") for i in range(len(units))]
    ids_by_unit: list[np.ndarray] = [np.empty(0, np.int64)] * len(units)
    progress = Progress(f"list {collection.name}", len(units), "units")
    started = time.monotonic()
    schemas: list[pa.Schema | None] = [None] * len(units)
    work = ((unit, collection, uri, storage) for unit, uri in zip(units, listings))
    for i, (ids, schema) in run_units(_list_unit, work):
        ids_by_unit[i], schemas[i] = ids, schema
        progress.update(1)
    progress.close()
    _check_same_columns(units, schemas)
    sorted_ids = np.sort(np.concatenate(ids_by_unit))
    if not len(sorted_ids):
        wanted = f"files ending in {', '.join(collection.extensions)}" if collection.format != "parquet" else "rows"
        raise AttribError(f"collection {collection.name!r}: no {wanted} below {collection.uri}")
    admit(_estimate(settings, listings, ids_by_unit, time.monotonic() - started, storage), settings)
    moved = _settle_collisions(sorted_ids, listings, ids_by_unit, storage)
    sorted_ids = np.union1d(sorted_ids, np.array(list(moved.values()), np.int64))

    partitions = plan_partitions([len(ids) for ids in ids_by_unit], settings.partition_rows)
    metadata_columns: list[str] = []
    order, rows = [""] * len(partitions), [""] * len(partitions)
    num_described = 0
    progress = Progress(f"manifest {collection.name}", len(sorted_ids), "images")
    work = (
        # A task is given the listings of its own slices: with all of them, arguments would grow with the square of the collection.
        ([listings[s.table] for s in slices], slices, moved, collection, join(settings.output, part_name(i)), storage)
        for i, slices in enumerate(partitions)
    )
    for i, (columns, described, order[i], rows[i]) in run_units(_write_partition, work):
        metadata_columns = columns
        num_described += described
        progress.update(sum(s.stop - s.start for s in partitions[i]))
    progress.close()
    _check_described(collection, num_described, listings, storage)
    results = {
        "collection": collection.name,
        "digest": ids_digest(collection, sorted_ids),
        "order_digest": digest(order),
        "rows_digest": digest(rows),
        "num_images": len(sorted_ids),
        "num_moved_ids": len(moved),
        "num_rows": [sum(s.stop - s.start for s in slices) for slices in partitions],
        "metadata_columns": metadata_columns,
        "num_tasks": {ManifestTask.LIST: len(units), ManifestTask.PARTITION: len(partitions)},
        "num_files": len(partitions),
    }
    storage.delete_folder(join(settings.output, LISTINGS))
    return finish(settings, MANIFEST_RECORD, {}, results, storage)


def list_collection(collection: CollectionSettings, output: str, job: JobSettings) -> Manifest:
    """Make the manifest of a collection that another job reads, with that job's storage and Ray, and open it."""
    run(ManifestSettings(collection=collection, output=output, storage=job.storage, ray=job.ray))
    return open_manifest(output, Storage(job.storage))


def _estimate(
    settings: ManifestSettings,
    listings: list[str],
    ids_by_unit: list[np.ndarray],
    listed_seconds: float,
    storage: Storage,
) -> Estimate:
    """What a collection costs is known once it is listed."""
    largest = max(range(len(listings)), key=lambda unit: len(ids_by_unit[unit]))
    sample = storage.read_rows(listings[largest], 0, min(SAMPLE_ROWS, len(ids_by_unit[largest])))
    num_images, num_workers = sum(map(len, ids_by_unit)), num_cluster_cpus()
    return estimate_manifest(
        num_images=num_images,
        partition_rows=settings.partition_rows,
        row=RowBytes.of(sample),
        baseline_bytes=baseline_bytes(),
        num_workers=num_workers,
        seconds_per_image=listed_seconds * num_workers / num_images,
    )


def _list_unit(
    unit: ListingUnit, collection: CollectionSettings, uri: str, storage: Storage
) -> tuple[np.ndarray, pa.Schema]:
    images = list_images(unit, collection, storage)
    storage.write_table(uri, images)
    return images["id"].to_numpy(), images.schema


def _check_same_columns(units: list[ListingUnit], schemas: list[pa.Schema]) -> None:
    """The files of a Parquet collection are one table, so a column has one type in all of them."""
    for unit, schema in zip(units, schemas):
        for field, first in zip(schema, schemas[0]):
            if field.type != first.type:
                raise AttribError(
                    f"column {field.name!r} is {field.type} in {unit.uri} but {first.type} in {units[0].uri}; cast one of them"
                )


def _settle_collisions(
    sorted_ids: np.ndarray, listings: list[str], ids_by_unit: list[np.ndarray], storage: Storage
) -> dict[str, int]:
    duplicated = duplicated_ids(sorted_ids)
    if not len(duplicated):
        return {}
    colliding = []
    for uri, ids in zip(listings, ids_by_unit):
        if np.isin(ids, duplicated).any():
            rows = storage.read_table(uri, columns=["id", "key"], filter=pc.field("id").isin(duplicated))
            colliding += zip(rows["id"].to_pylist(), rows["key"].to_pylist())
    return resolve_collisions(colliding, sorted_ids)


def _write_partition(
    listings: list[str],
    slices: list[Slice],
    moved: dict[str, int],
    collection: CollectionSettings,
    uri: str,
    storage: Storage,
) -> tuple[list[str], int, str, str]:
    """listings: of each slice. The metadata columns, how many images the sidecar describes, a digest of the images in their order and places, and one of all that is written."""
    tables = [storage.read_rows(uri, s.start, s.stop) for uri, s in zip(listings, slices)]
    images = build_partition(tables, moved, collection, storage)
    storage.write_table(uri, images)
    columns = [name for name in images.schema.names if name not in RESERVED_COLUMNS]
    described = np.zeros(len(images), bool)
    for name in columns:
        described |= images[name].is_valid().to_numpy()
    places = images.select(["id", "offset", "num_bytes", "row_group", "row"]).to_pylist()
    order = digest([list(place.values()) for place in places])
    return columns, int(described.sum()), order, hashlib.sha256(storage.read_bytes(uri)).hexdigest()


def _check_described(collection: CollectionSettings, num_described: int, listings: list[str], storage: Storage) -> None:
    """A sidecar that names no image of the collection is a mistake in its keys, never what was meant."""
    if collection.metadata is None or num_described:
        return
    sidecar = open_sidecar(collection.metadata, storage)
    theirs = sidecar.head(1)[collection.metadata.key_column][0].as_py() if sidecar.count_rows() else "(no rows)"
    ours = next(k for uri in listings for k in storage.read_table(uri, columns=["key"])["key"].to_pylist())
    raise AttribError(
        f"{collection.metadata.uri} describes none of the images: its keys look like {theirs!r}, the collection's like {ours!r}; "
        "set metadata.key_column and metadata.key_prefix to match"
    )
