"""List the images of a collection (folder tree, tar shards or Parquet files) and join their metadata.

Each image becomes one row with the location of its bytes: a whole file (`uri`), a byte range of a tar shard, or a row
of a Parquet file.
"""

import os
import tarfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage, is_remote, join
from attrib.data.ids import image_ids
from attrib.data.settings import CollectionSettings, MetadataSettings

LOCATION_FIELDS = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("offset", pa.int64()),  # first byte within a tar shard
    pa.field("num_bytes", pa.int64()),  # null if unknown before reading
    pa.field("row_group", pa.int32()),  # of a Parquet file that holds image bytes
    pa.field("row", pa.int32()),  # within the row group
]
# Later stages add the columns stage and reason of a failure. Attribution rows prefix metadata with source_ or query_,
# so the names that fixed columns have after these prefixes (id, key, uri) are reserved as well.
RESERVED_COLUMNS = frozenset(field.name for field in LOCATION_FIELDS) | {"stage", "reason"}


@dataclass(frozen=True)
class ListingUnit:
    """The work unit of listing: a folder (recursive, or its direct files only), a tar shard or a Parquet file."""

    uri: str
    recursive: bool = True


def list_units(collection: CollectionSettings, storage: Storage) -> list[ListingUnit]:
    """Return the work units of a collection by URI. Raises AttribError if the collection is missing or empty."""
    scheme = "s3://" if is_remote(collection.uri) else ""
    suffix = {"webdataset": ".tar", "parquet": ".parquet"}.get(collection.format)
    filesystem, path = storage.resolve(collection.uri)
    kind = filesystem.get_file_info(path).type
    if kind == pyarrow.fs.FileType.NotFound:
        raise AttribError(f"collection {collection.name!r}: {collection.uri} does not exist; correct uri")
    if suffix is None:
        if kind != pyarrow.fs.FileType.Directory:
            raise AttribError(f"{collection.uri} is a file; set format to webdataset or parquet")
        found = storage.list_folder(collection.uri)
        folders = [info for info in found if info.type == pyarrow.fs.FileType.Directory]
        units = [ListingUnit(scheme + info.path) for info in folders if not info.base_name.startswith(".")]
        return [ListingUnit(collection.uri, recursive=False), *units]
    if kind == pyarrow.fs.FileType.File:
        return [ListingUnit(collection.uri)]
    files = [scheme + info.path for info in storage.list_folder(collection.uri, recursive=True, suffix=suffix)]
    if not files:
        raise AttribError(f"no {suffix} file below {collection.uri}; correct uri or format")
    return [ListingUnit(uri) for uri in files]


def list_images(unit: ListingUnit, collection: CollectionSettings, storage: Storage) -> pa.Table:
    """Return LOCATION_FIELDS, and metadata_columns of a Parquet collection, of all images of a work unit."""
    listers = {"folder": _list_folder, "webdataset": _list_tar, "parquet": _list_parquet}
    columns = listers[collection.format](unit, collection, storage)
    columns["id"] = image_ids(collection.name, columns["key"])
    num_rows, extra = len(columns["key"]), {name: columns[name] for name in collection.metadata_columns}
    arrays = [pa.array(columns.get(field.name, [None] * num_rows), type=field.type) for field in LOCATION_FIELDS]
    fields = [pa.field(name, column.type) for name, column in extra.items()]
    return pa.table([*arrays, *extra.values()], schema=pa.schema(LOCATION_FIELDS + fields))


def _list_folder(unit: ListingUnit, collection: CollectionSettings, storage: Storage) -> dict[str, Any]:
    scheme = "s3://" if is_remote(collection.uri) else ""
    root = storage.resolve(collection.uri)[1].rstrip("/") + "/"
    is_image = _name_filter(collection)
    listed = storage.list_folder(unit.uri, recursive=unit.recursive)
    files = [
        info for info in listed if info.type == pyarrow.fs.FileType.File and is_image(info.path.removeprefix(root))
    ]
    return {
        "key": [info.path.removeprefix(root) for info in files],
        "uri": [scheme + info.path for info in files],
        "num_bytes": [info.size for info in files],
    }


def _name_filter(collection: CollectionSettings) -> Callable[[str], bool]:
    """Return whether a key names an image. Hidden files, e.g. thumbnails and the ._NAME files of macOS, do not."""
    extensions = {f".{extension.lower().removeprefix('.')}" for extension in collection.extensions}

    def is_image(key: str) -> bool:
        hidden = any(part.startswith(".") for part in key.split("/"))
        return not hidden and os.path.splitext(key)[1].lower() in extensions

    return is_image


class _CheckedHeader(tarfile.TarInfo):
    """A tar header that raises ReadError if it is damaged or missing; tarfile would see the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]  # missing in typeshed
            raise tarfile.ReadError("it has no end-of-archive marker, so it is truncated") from error
        # missing in typeshed
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged header: {error}") from error


def _list_tar(unit: ListingUnit, collection: CollectionSettings, storage: Storage) -> dict[str, Any]:
    filesystem, path = storage.resolve(unit.uri)
    # A remote tar is streamed: one request per member header would cost more than reading past the images.
    source = filesystem.open_input_stream(path) if is_remote(unit.uri) else filesystem.open_input_file(path)
    mode: Literal["r|", "r:"] = "r|" if is_remote(unit.uri) else "r:"
    is_image = _name_filter(collection)
    try:
        with source, tarfile.open(fileobj=source, mode=mode, tarinfo=_CheckedHeader, errors="backslashreplace") as tar:
            members = [m for m in tar if m.isfile() and is_image(m.name.removeprefix("./"))]
    except tarfile.TarError as error:
        raise AttribError(
            f"{unit.uri} is not a readable plain tar file ({error}); fetch it again if it is damaged, "
            "unpack it to .tar if it is compressed"
        ) from error
    return {
        "key": [member.name.removeprefix("./") for member in members],
        "uri": [unit.uri] * len(members),
        "offset": [member.offset_data for member in members],
        "num_bytes": [member.size for member in members],
    }


def _list_parquet(unit: ListingUnit, collection: CollectionSettings, storage: Storage) -> dict[str, Any]:
    key_column = collection.key_column or collection.uri_column
    wanted = list(dict.fromkeys(c for c in (key_column, collection.uri_column, *collection.metadata_columns) if c))
    try:
        with storage.open(unit.uri) as source:
            file = pq.ParquetFile(source)
            schema = file.schema_arrow
            absent = [c for c in [*wanted, collection.bytes_column] if c and c not in schema.names]
            if absent:
                raise AttribError(f"{unit.uri} has no column {absent[0]!r}; it has {', '.join(schema.names)}")
            table = file.read(columns=wanted)
            group_rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except pa.ArrowException as error:
        raise AttribError(f"{unit.uri} is not a readable Parquet file ({first_line(error)}); fetch it again") from error
    check_metadata_columns(collection.metadata_columns, unit.uri)
    if collection.bytes_column:
        kind = schema.field(collection.bytes_column).type
        if kind not in (pa.binary(), pa.large_binary(), pa.binary_view()):
            raise AttribError(
                f"{unit.uri}: column {collection.bytes_column!r} holds {kind} values, but bytes_column must hold image "
                "files as binary; for paths use uri_column"
            )
    if table[key_column].null_count:
        raise AttribError(f"{unit.uri}: column {key_column!r} holds nulls; every image needs a key")
    columns = {"key": table[key_column].cast(pa.string()).to_pylist()}
    if collection.uri_column:
        base = os.path.dirname(unit.uri)
        columns["uri"] = [_absolute(base, uri) for uri in table[collection.uri_column].cast(pa.string()).to_pylist()]
    else:
        columns["uri"] = [unit.uri] * table.num_rows
        columns["row_group"] = np.repeat(np.arange(len(group_rows)), group_rows)
        columns["row"] = np.concatenate([np.arange(n) for n in group_rows]) if group_rows else []
    return columns | {name: table[name] for name in collection.metadata_columns}


def _absolute(base: str, uri: str | None) -> str:
    """Return an absolute URI. Relative paths start at the folder of the Parquet file; a null becomes that folder."""
    uri = (uri or "").removeprefix("file://")
    return uri if "://" in uri or uri.startswith("/") else join(base, uri)


def check_metadata_columns(names: Collection[str], origin: str) -> None:
    """Raise AttribError if a name is reserved or occurs twice."""
    clash = sorted(RESERVED_COLUMNS.intersection(names))
    if clash:
        raise AttribError(f"{origin}: the metadata column {clash[0]!r} has a reserved name; rename it")
    _check_distinct(list(names), origin)


def _check_distinct(names: list[str], origin: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AttribError(f"{origin}: the metadata column {twice[0]!r} occurs twice; rename or remove one of them")


def join_metadata(images: pa.Table, collection: CollectionSettings, storage: Storage) -> pa.Table:
    """Return `images` with the columns of the sidecar table; images that the table does not list get nulls.

    The sidecar is scanned and only rows of these keys are kept, so it may be larger than memory. Raises AttribError
    if it cannot be read, if a column name is reserved or occurs twice, or if a key has two rows.
    """
    if collection.metadata is None:
        return images
    uri, key_column = collection.metadata.uri, collection.metadata.key_column
    sidecar = open_sidecar(collection.metadata, storage)
    check_metadata_columns([*collection.metadata_columns, *(n for n in sidecar.schema.names if n != key_column)], uri)
    keys = pc.binary_join_element_wise(collection.metadata.key_prefix, images["key"].combine_chunks(), "")
    try:
        # Keys may be numbers, dictionaries or large strings.
        found = sidecar.to_table(filter=pc.field(key_column).cast(pa.string()).isin(keys))
    except pa.ArrowException as error:
        raise AttribError(f"the metadata table {uri} cannot be read: {first_line(error)}") from error
    found_keys = found[key_column].combine_chunks().cast(pa.string())
    positions = pc.index_in(keys, value_set=found_keys)
    if len(found) != len(pc.unique(found_keys)):
        values, counts = pc.value_counts(found_keys).flatten()
        twice = values.filter(pc.greater(counts, 1))[0].as_py()
        raise AttribError(f"{uri}: the key {twice!r} has more than one row; keep one row per image")
    for name in found.schema.names:
        if name != key_column:
            images = images.append_column(name, found[name].combine_chunks().take(positions))
    return images


def open_sidecar(settings: MetadataSettings, storage: Storage) -> pyarrow.dataset.Dataset:
    """Return the sidecar table as a data set; CSV columns are text: a type guessed from one block can be wrong later.

    Raises AttribError if the table does not exist, cannot be read or lacks the key column.
    """
    uri, key_column = settings.uri, settings.key_column
    if not storage.exists(uri):
        raise AttribError(f"the metadata table {uri} does not exist")
    extension = os.path.splitext(uri)[1].lower()
    if extension not in (".csv", ".tsv", ".parquet"):
        raise AttribError(f"the metadata table {uri} must be .csv, .tsv or .parquet")
    try:
        table = storage.dataset([uri], format="parquet" if extension == ".parquet" else _csv_format(uri, storage))
    except pa.ArrowException as error:
        raise AttribError(f"the metadata table {uri} cannot be read: {first_line(error)}") from error
    if key_column not in table.schema.names:
        raise AttribError(
            f"{uri} has no column {key_column!r} (metadata.key_column); it has {', '.join(table.schema.names)}"
        )
    return table


def _csv_format(uri: str, storage: Storage) -> pyarrow.dataset.CsvFileFormat:
    # Quoted values may contain line breaks.
    parsing = pa.csv.ParseOptions(delimiter="\t" if uri.lower().endswith(".tsv") else ",", newlines_in_values=True)
    with storage.open(uri) as file:
        header = pa.csv.open_csv(file, parse_options=parsing).schema.names
    _check_distinct(header, uri)
    conversion = pa.csv.ConvertOptions(column_types={name: pa.string() for name in header})
    return pyarrow.dataset.CsvFileFormat(parse_options=parsing, convert_options=conversion)
