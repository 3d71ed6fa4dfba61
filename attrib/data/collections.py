"""List the images of a collection: a folder tree, tar shards or Parquet files.

Each image becomes one row with the location of its bytes: a whole file (`uri`), a byte range of a tar shard, or a row
of a Parquet file.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs

from attrib.common.errors import AttribError
from attrib.common.storage import Storage, is_remote
from attrib.data.folders import files_below, folders_in, has_keys_below
from attrib.data.ids import image_ids
from attrib.data.parquet_files import list_rows
from attrib.data.places import open_file
from attrib.data.selection import SHARD_EXTENSIONS, Skipped, image_filter, shard_filter
from attrib.data.settings import CollectionSettings
from attrib.data.tars import list_members

LOCATION_FIELDS = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("offset", pa.int64()),  # first byte within a tar shard
    pa.field("num_bytes", pa.int64()),  # null if unknown before reading
    pa.field("row_group", pa.int32()),  # of a Parquet file that holds image bytes
    pa.field("row", pa.int32()),  # within the row group
    # Of the file, by attrib.data.places; null in manifests of earlier versions and for objects of a URI column.
    pa.field("listed_version", pa.string()),
]
# Later stages add the columns stage and reason of a failure. Attribution rows prefix metadata with source_ or query_,
# so the names that fixed columns have after these prefixes (id, key, uri) are reserved as well.
RESERVED_COLUMNS = frozenset(field.name for field in LOCATION_FIELDS) | {"stage", "reason"}


@dataclass(frozen=True)
class ListingUnit:
    """The work unit of listing: a folder (recursive, or its direct files only), a tar shard or a Parquet file.

    file_version: of a shard or file, by attrib.data.places; "" for a folder.
    """

    uri: str
    recursive: bool = True
    file_version: str = ""


def list_units(collection: CollectionSettings, storage: Storage, skipped: Skipped | None = None) -> list[ListingUnit]:
    """Return the work units of a collection by URI. skipped: folders and shards that are left out are added to it.

    Raises AttribError if the collection is missing or empty.
    """
    skipped = Skipped() if skipped is None else skipped
    filesystem, path = storage.resolve(collection.uri)
    kind = filesystem.get_file_info(path).type
    if kind == pyarrow.fs.FileType.NotFound:
        raise AttribError(f"collection {collection.name!r}: {collection.uri} does not exist; correct uri")
    if collection.format == "folder":
        if kind != pyarrow.fs.FileType.Directory and not (
            is_remote(collection.uri) and has_keys_below(collection.uri, storage)
        ):
            raise AttribError(f"{collection.uri} is a file; set format to webdataset or parquet")
        folders = folders_in(collection, storage, skipped)
        return [ListingUnit(collection.uri, recursive=False), *map(ListingUnit, folders)]
    if kind == pyarrow.fs.FileType.File:
        with open_file(collection.uri, storage) as opened:
            return [ListingUnit(collection.uri, file_version=opened.versions[-1])]
    files = files_below(collection.uri, True, collection, shard_filter(collection), storage, skipped)
    if not files:
        suffix = SHARD_EXTENSIONS[collection.format]
        raise AttribError(
            f"no {suffix} file below {collection.uri}; left out: {skipped.describe()}; correct uri or format, unpack "
            "what is compressed"
        )
    return [ListingUnit(file.uri, file_version=file.file_version) for file in files]


def list_images(
    unit: ListingUnit, collection: CollectionSettings, storage: Storage, skipped: Skipped | None = None
) -> pa.Table:
    """Return LOCATION_FIELDS, and metadata_columns of a Parquet collection, of all images of a work unit.

    skipped: what is left out is added to it. Raises AttribError for a shard that cannot be read.
    """
    skipped = Skipped() if skipped is None else skipped
    if collection.format == "folder":
        files = files_below(unit.uri, unit.recursive, collection, image_filter(collection), storage, skipped)
        columns: dict[str, Any] = {
            "key": [file.name for file in files],
            "uri": [file.uri for file in files],
            "num_bytes": [file.num_bytes for file in files],
            "listed_version": [file.file_version for file in files],
        }
    elif collection.format == "webdataset":
        members, version = list_members(unit.uri, image_filter(collection), storage, skipped)
        columns = {
            "key": [member.name for member in members],
            "uri": [unit.uri] * len(members),
            "offset": [member.offset for member in members],
            "num_bytes": [member.num_bytes for member in members],
            "listed_version": [version] * len(members),
        }
    else:
        columns = list_rows(unit.uri, collection, storage)
        check_metadata_columns(collection.metadata_columns, unit.uri)
    columns["id"] = image_ids(collection.name, columns["key"])
    num_rows, extra = len(columns["key"]), {name: columns[name] for name in collection.metadata_columns}
    arrays = [pa.array(columns.get(field.name, [None] * num_rows), type=field.type) for field in LOCATION_FIELDS]
    fields = [pa.field(name, column.type) for name, column in extra.items()]
    return pa.table([*arrays, *extra.values()], schema=pa.schema(LOCATION_FIELDS + fields))


def check_metadata_columns(names: Collection[str], origin: str) -> None:
    """Raise AttribError if a name is reserved or occurs twice."""
    clash = sorted(RESERVED_COLUMNS.intersection(names))
    if clash:
        raise AttribError(f"{origin}: the metadata column {clash[0]!r} has a reserved name; rename it")
    check_distinct(list(names), origin)


def check_distinct(names: list[str], origin: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AttribError(f"{origin}: the metadata column {twice[0]!r} occurs twice; rename or remove one of them")
