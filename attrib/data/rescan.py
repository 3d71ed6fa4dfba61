"""Whether the files of a collection are those that were listed: their names, sizes and times.

Files are listed and not opened: a small part of the work of making a manifest.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


def unit_state(unit: ListingUnit, files: Iterable[tuple[str, str]]) -> tuple[int, str]:
    """Return the number of files of a work unit and a digest of them. files: name and version, of a folder."""
    if unit.file_version:
        return 1, digest([unit.uri, unit.file_version])
    found = sorted(files)
    return len(found), digest([unit.uri, *map(list, found)])


def collection_state(
    units: Sequence[tuple[int, str]], collection: CollectionSettings, storage: Storage
) -> dict[str, Any]:
    """Return the state of a collection, for its record. units: of `unit_state`, in the order of `list_units`."""
    digests, client = [found for _, found in units], storage.settings.client
    if collection.metadata:
        digests.append(digest(_table_versions(collection.metadata, storage)))
    # The two clients tell versions of objects in different ways.
    return {"num_files": sum(count for count, _ in units), "digest": digest(digests), "client": client}


def present_state(collection: CollectionSettings, storage: Storage) -> dict[str, Any]:
    """List the files of a collection as they are now, and return their state."""

    def state(unit: ListingUnit) -> tuple[int, str]:
        if unit.file_version:
            return unit_state(unit, ())
        found = files_below(unit.uri, unit.recursive, collection, image_filter(collection), storage, Skipped())
        return unit_state(unit, ((file.name, file.file_version) for file in found))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return collection_state(list(pool.map(state, list_units(collection, storage))), collection, storage)


def change_since(record: dict[str, Any], collection: CollectionSettings, storage: Storage) -> str:
    """Return what changed in a collection since it was listed, "" for nothing. record: that of the manifest.

    Nothing is compared if the record is of a version that kept no state, or was made with another client.
    """
    before = record.get("files")
    if before is None or before["client"] != storage.settings.client:
        return ""
    try:
        now = present_state(collection, storage)
    except (AttribError, OSError) as error:  # the collection or its metadata are gone
        return str(error)
    if now == before:
        return ""
    if now["num_files"] != before["num_files"]:
        return f"it had {before['num_files']:,} files and has {now['num_files']:,} now"
    return f"some of its {now['num_files']:,} files, or its metadata, have another name, size or time"


def _table_versions(settings: TableSettings, storage: Storage) -> list[list[str]]:
    """Return name and version of the files of a sidecar."""
    filesystem, path = storage.resolve(settings.uri)
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        return [[file.name, file.file_version] for file in folder_files(settings, storage, Skipped())]
    with open_file(settings.uri, storage) as opened:
        return [[settings.uri, opened.versions[-1]]]
