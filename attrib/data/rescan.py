"""Whether the files of a collection are those that were listed: their names, sizes and times.

Files are listed and not opened: a small part of the work of making a manifest.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow.fs

from attrib.common.config import digest
from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.data.collections import ListingUnit, list_units
from attrib.data.folders import files_below
from attrib.data.places import open_file
from attrib.data.selection import Skipped, image_filter
from attrib.data.settings import CollectionSettings, TableSettings
from attrib.data.sidecar import folder_files

NUM_THREADS = 16  # an object store answers many requests for listing at a time


class UnitState(NamedTuple):
    """The files of a work unit. names, versions: digests."""

    num_files: int
    names: str
    versions: str


def unit_state(unit: ListingUnit, files: Iterable[tuple[str, str]]) -> UnitState:
    """Return the state of a work unit. files: name and version of each, where it is a folder."""
    found = [("", unit.file_version)] if unit.file_version else sorted(files)
    names, versions = ([unit.uri, *(file[column] for file in found)] for column in (0, 1))
    return UnitState(len(found), digest(names), digest(versions))


def collection_state(units: Sequence[UnitState], collection: CollectionSettings, storage: Storage) -> dict[str, Any]:
    """Return the state of a collection, for its record. units: in the order of `list_units`.

    To be called before the metadata are read: a change while they are read is then found later.
    """
    found = [unit for unit in units if unit.num_files]  # a new folder without a file is no change
    metadata = _table_versions(collection.metadata, storage) if collection.metadata else []
    return {
        "num_files": sum(unit.num_files for unit in found),
        "names": digest([unit.names for unit in found]),
        "versions": digest([unit.versions for unit in found]),
        "metadata": digest(metadata),
        "client": storage.settings.client,  # the two clients tell versions of objects in different ways
    }


def present_state(collection: CollectionSettings, storage: Storage) -> dict[str, Any]:
    """List the files of a collection as they are now, and return their state."""

    def state(unit: ListingUnit) -> UnitState:
        if unit.file_version:
            return unit_state(unit, ())
        found = files_below(unit.uri, unit.recursive, collection, image_filter(collection), storage, Skipped())
        return unit_state(unit, ((file.name, file.file_version) for file in found))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return collection_state(list(pool.map(state, list_units(collection, storage))), collection, storage)


def change_since(
    record: dict[str, Any], collection: CollectionSettings, storage: Storage, ignore_versions: bool = False
) -> str:
    """Return what changed in a collection since it was listed, "" for nothing. record: that of the manifest.

    Nothing is compared if the record is of a version that kept no state, or was made with another client.
    ignore_versions: files may have been repaired in their place. Raises AttribError if the collection is gone.
    """
    before = record.get("files")
    if before is None or before["client"] != storage.settings.client:
        return ""
    now, count = present_state(collection, storage), before["num_files"]
    if not now["num_files"]:
        raise AttribError(f"collection {collection.name!r}: no file is left below {collection.uri}; correct uri")
    changed = ""
    if now["num_files"] != count:
        changed = f"it had {count:,} files and has {now['num_files']:,}"
    elif now["names"] != before["names"]:
        changed = f"some of its {count:,} files have other names"
    elif now["versions"] != before["versions"] and not ignore_versions:
        changed = f"some of its {count:,} files have another size or time"
    elif now["metadata"] != before["metadata"] and collection.metadata:
        changed = f"its metadata {collection.metadata.uri} have another size or time"
    return changed and f"collection {collection.name!r} ({collection.uri}) changed since then: {changed}"


def _table_versions(settings: TableSettings, storage: Storage) -> list[list[str]]:
    """Return name and version of the files of a sidecar. Raises AttribError if it is gone."""
    filesystem, path = storage.resolve(settings.uri)
    kind = filesystem.get_file_info(path).type
    if kind == pyarrow.fs.FileType.NotFound:
        raise AttribError(f"the metadata table {settings.uri} does not exist")
    if kind == pyarrow.fs.FileType.Directory:
        return [[file.name, file.file_version] for file in folder_files(settings, storage, Skipped())]
    with open_file(settings.uri, storage) as opened:
        return [[settings.uri, opened.versions[-1]]]
