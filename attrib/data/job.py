"""The manifest job: list the collection in parallel, resolve colliding ids, write partitions in parallel."""

import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.run_record import ChangedInputsError, run_once
from attrib.common.settings import JobSettings
from attrib.common.storage import Storage, join
from attrib.data.collections import RESERVED_COLUMNS, ListingUnit, list_images, list_units
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
from attrib.data.rescan import UnitState, change_since, collection_state, unit_state
from attrib.data.selection import Skipped
from attrib.data.settings import CollectionSettings, ManifestSettings
from attrib.data.sidecar import Met, describe_met, open_sidecar
from attrib.runtime.admission import admit
from attrib.runtime.estimate import Estimate
from attrib.runtime.machine import baseline_bytes
from attrib.runtime.session import connect, num_cluster_cpus
from attrib.runtime.tasks import run_all

logger = logging.getLogger(__name__)

LISTINGS = "_listings"
IS_PART = re.compile(r"part-\d{5,}\.parquet").fullmatch
SAMPLE_ROWS = 4_096  # of a listing, whose mean row size is measured


def run(settings: ManifestSettings, ignore_versions: bool = False) -> dict[str, Any]:
    """Make the manifest and return its record. If it is finished, list the files again and compare them.

    ignore_versions: files may have another size or time than in a finished manifest. Raises AttribError for an empty
    collection, a key that occurs twice, more left out than max_skipped_share allows, or metadata that match no image;
    ChangedInputsError if the collection is not as it was listed, without settings.rescan.
    """
    baseline_bytes()
    storage = Storage(settings.storage)

    def change(record: dict[str, Any]) -> str:
        return change_since(record, settings.collection, storage, ignore_versions)

    def work() -> dict[str, Any]:
        return _list_collection(settings, storage)

    return run_once(settings, MANIFEST_RECORD, {}, storage, work, resumable=False, change=change)


def _list_collection(settings: ManifestSettings, storage: Storage) -> dict[str, Any]:
    """The results of the job, for its record."""
    # A killed run may have cut the collection into other partitions.
    for name in storage.names(settings.output, suffix=".parquet"):
        if IS_PART(name):
            storage.delete_file(join(settings.output, name))
    storage.delete_folder(join(settings.output, LISTINGS))
    connect(settings.ray)
    collection, skipped = settings.collection, Skipped()
    if collection.metadata:
        open_sidecar(collection.metadata, storage)
    units = list_units(collection, storage, skipped)
    if collection.format != "folder":
        skipped.check(collection.name, len(units), settings.max_skipped_share, "shards")
    listings = [join(settings.output, LISTINGS, f"unit-{i:06d}.parquet") for i in range(len(units))]
    started = time.monotonic()
    work = [(unit, collection, listing, storage) for unit, listing in zip(units, listings)]
    listed = run_all(_list_unit, work, f"list {collection.name}", "units", [1] * len(work))
    ids_by_unit, schemas, left_out, states = zip(*listed)
    _check_same_columns(units, schemas)
    files = collection_state(states, collection, storage)
    sorted_ids = np.sort(np.concatenate(ids_by_unit))
    in_units = Skipped()
    for of_unit in left_out:
        in_units.update(of_unit)
    _check_skipped(settings, len(sorted_ids), in_units, skipped)
    admit(_estimate(settings, listings, ids_by_unit, time.monotonic() - started, storage), settings)
    moved = _resolve_collisions(sorted_ids, listings, ids_by_unit, storage)
    sorted_ids = np.union1d(sorted_ids, np.array(list(moved.values()), np.int64))
    partitions = plan_partitions([len(ids) for ids in ids_by_unit], settings.partition_rows)
    num_rows = [sum(s.stop - s.start for s in slices) for slices in partitions]
    partition_work = [
        # Only the listings of its own slices: all arguments together must not grow as the collection squared.
        ([listings[s.table] for s in slices], slices, moved, collection, join(settings.output, part_name(i)), storage)
        for i, slices in enumerate(partitions)
    ]
    written = run_all(_write_partition, partition_work, f"manifest {collection.name}", "images", num_rows)
    metadata_columns, met, order_digests, rows_digests = zip(*written)
    results = {
        "collection": collection.name,
        "files": files,
        "digest": ids_digest(collection, sorted_ids),
        "order_digest": digest(order_digests),
        "rows_digest": digest(rows_digests),
        "sha256": list(rows_digests),
        "num_images": len(sorted_ids),
        "num_moved_ids": len(moved),
        "num_rows": num_rows,
        "metadata_columns": metadata_columns[-1],
        "num_tasks": {ManifestTask.LIST: len(units), ManifestTask.PARTITION: len(partitions)},
        "num_files": len(partitions),
        "skipped": {str(reason): count for reason, count in skipped.counts.items()},
    } | _join_results(settings, met, len(partitions), storage)
    storage.delete_folder(join(settings.output, LISTINGS))
    return results


def _check_skipped(settings: ManifestSettings, num_images: int, in_units: Skipped, skipped: Skipped) -> None:
    """Add what units left out to `skipped`, say what it is, and raise AttribError if it is too much or all."""
    collection = settings.collection
    in_units.check(collection.name, num_images, settings.max_skipped_share)
    skipped.update(in_units)
    if skipped.counts:
        level = logging.WARNING if skipped.num_lost else logging.INFO
        logger.log(level, f"manifest {collection.name}: listing left out {skipped.describe()}")
    if not num_images:
        wanted = f"files ending in {', '.join(collection.extensions)}" if collection.format != "parquet" else "rows"
        raise AttribError(
            f"no {wanted} below {collection.uri}; correct uri, format or extensions (left out: {skipped.describe()})"
        )


def _join_results(
    settings: ManifestSettings, met: Sequence[Met], num_partitions: int, storage: Storage
) -> dict[str, Any]:
    """Return the counts of the metadata join, and say which images and rows did not meet."""
    if settings.collection.metadata is None:
        return {}
    total = Met()
    for partition in met:
        total.update(partition)
    parts = [join(settings.output, part_name(i)) for i in range(num_partitions)]
    unmet = describe_met(total, settings.collection, parts, storage)
    if unmet:
        logger.warning(unmet)
    return {"num_described": total.num_described, "num_metadata_rows": total.num_rows}


def list_collection(collection: CollectionSettings, output: str, job: JobSettings) -> Manifest:
    """Make the manifest of a collection that another job reads, with that job's storage and Ray, and open it."""
    try:
        run(ManifestSettings(collection=collection, output=output, storage=job.storage, ray=job.ray))
    except ChangedInputsError as error:  # the job has no rescan
        raise AttribError(f"{error.what}; choose another output folder than {job.output}") from None
    return open_manifest(output, Storage(job.storage))


def _estimate(
    settings: ManifestSettings, listings: list[str], ids_by_unit: Sequence[np.ndarray], seconds: float, storage: Storage
) -> Estimate:
    """Estimate from the largest listing; the time per image is that of listing, which took `seconds`."""
    largest = max(range(len(listings)), key=lambda unit: len(ids_by_unit[unit]))
    sample = storage.read_rows(listings[largest], 0, min(SAMPLE_ROWS, len(ids_by_unit[largest])), check_footer=True)
    num_images, num_workers = sum(map(len, ids_by_unit)), num_cluster_cpus()
    return estimate_manifest(
        num_images=num_images,
        partition_rows=settings.partition_rows,
        row=RowBytes.of(sample),
        baseline_bytes=baseline_bytes(),
        num_workers=num_workers,
        seconds_per_image=seconds * num_workers / num_images,
    )


def _list_unit(
    unit: ListingUnit, collection: CollectionSettings, uri: str, storage: Storage
) -> tuple[np.ndarray, pa.Schema, Skipped, UnitState]:
    """Write the listing of a work unit; return its ids and columns, what it left out, and the state of its files."""
    skipped = Skipped()
    images = list_images(unit, collection, storage, skipped)
    storage.write_table(uri, images)
    files = images.select(["key", "listed_version"]).to_pylist() if collection.format == "folder" else []
    state = unit_state(unit, [(file["key"], file["listed_version"]) for file in files])
    return images["id"].to_numpy(), images.schema, skipped, state


def _check_same_columns(units: list[ListingUnit], schemas: Sequence[pa.Schema]) -> None:
    """Raise AttribError if a column has different types in two files of a Parquet collection, which is one table."""
    for unit, schema in zip(units, schemas):
        for field, first in zip(schema, schemas[0]):
            if field.type != first.type:
                raise AttribError(
                    f"column {field.name!r} is {field.type} in {unit.uri} but {first.type} in {units[0].uri}; cast one "
                    "of them"
                )


def _resolve_collisions(
    sorted_ids: np.ndarray, listings: list[str], ids_by_unit: Sequence[np.ndarray], storage: Storage
) -> dict[str, int]:
    duplicated = duplicated_ids(sorted_ids)
    if not len(duplicated):
        return {}
    colliding: list[tuple[int, str]] = []
    for uri, ids in zip(listings, ids_by_unit):
        if np.isin(ids, duplicated).any():
            rows = storage.read_sealed(uri, ["id", "key"], pc.field("id").isin(duplicated))
            colliding += zip(rows["id"].to_pylist(), rows["key"].to_pylist())
    return resolve_collisions(colliding, sorted_ids)


def _write_partition(
    listings: list[str],
    slices: list[Slice],
    moved: dict[str, int],
    collection: CollectionSettings,
    uri: str,
    storage: Storage,
) -> tuple[list[str], Met, str, str]:
    """Write the rows of slices of listings, one each.

    Returns the metadata columns, the counts of their join, a digest of ids, places and versions in order, and one of
    the whole file.
    """
    met = Met()
    tables = [storage.read_rows(listing, s.start, s.stop, check_footer=True) for listing, s in zip(listings, slices)]
    images = build_partition(tables, moved, collection, storage, met)
    sha256 = storage.write_table(uri, images)
    columns = [name for name in images.schema.names if name not in RESERVED_COLUMNS]
    # With versions, so that vectors of files that changed in their place are not taken for those of the present ones.
    places = images.select(["id", "offset", "num_bytes", "row_group", "row", "listed_version"]).to_pylist()
    order = digest([list(place.values()) for place in places])
    return columns, met, order, sha256
