"""The rows of a Parquet file that holds images or lists them, and the columns of such files."""

import os
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attrib.common.errors import AttribError, first_line, one_line
from attrib.common.secrets import without_user_info
from attrib.common.settings import local_path
from attrib.common.storage import Storage, is_remote, join
from attrib.data.places import local_version, open_file
from attrib.data.settings import CollectionSettings

VIEWS = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}


def list_rows(uri: str, collection: CollectionSettings, storage: Storage) -> dict[str, Any]:
    """Return LOCATION_FIELDS of all rows without their ids, as columns, and the metadata columns.

    Raises AttribError for an unreadable file, an absent column, or one that holds no keys, URIs or image files.
    """
    key_column = collection.key_column or collection.uri_column or ""
    wanted = list(dict.fromkeys(c for c in (key_column, collection.uri_column, *collection.metadata_columns) if c))
    try:
        with open_file(uri, storage) as source:
            file = pq.ParquetFile(source.file)
            needed = [c for c in [*wanted, collection.bytes_column] if c]
            names = file.schema_arrow.names
            if twice := [c for c in needed if names.count(c if c in names else c.split(".")[0]) > 1]:
                raise AttribError(f"{uri} has more than one column {twice[0]!r}; rename all but one")
            absent = [c for c in needed if column_type(file.schema_arrow, c) is None]
            if absent:
                known = one_line(_columns(file.schema_arrow))
                raise AttribError(f"{uri} has no column {absent[0]!r}; it has {known}")
            if collection.bytes_column:
                _check_bytes_column(file.schema_arrow, collection.bytes_column, uri)
            table = file.read(columns=wanted)
            table.validate(full=True)  # Arrow does not check that what Parquet calls a string is UTF-8
            group_rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            listed_version = next(iter(source.versions), None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns may be any bytes
        if isinstance(error, FileNotFoundError):
            raise
        raise AttribError(f"{uri} is not a readable Parquet file ({first_line(error)}); fetch it again") from error
    columns: dict[str, Any] = {"key": _texts(table, key_column, uri)}
    if None in columns["key"]:
        raise AttribError(f"{uri}: column {key_column!r} holds nulls; every image needs a key")
    if collection.uri_column:
        base = os.path.dirname(uri)
        # Tables and pages show keys and URIs. A URI with credentials lies below no allowed root, so it is not read.
        columns["key"] = [without_user_info(key) for key in columns["key"]]
        texts = [text and without_user_info(text) for text in _texts(table, collection.uri_column, uri)]
        columns["uri"] = [_absolute(base, text) for text in texts]
        columns["listed_version"] = [_version(text) for text in columns["uri"]]
    else:
        columns["uri"] = [uri] * table.num_rows
        columns["listed_version"] = [listed_version] * table.num_rows
        columns["row_group"] = np.repeat(np.arange(len(group_rows)), group_rows)
        columns["row"] = np.concatenate([np.arange(n) for n in group_rows]) if group_rows else []
    return columns | {name: column_of(table, name) for name in collection.metadata_columns}


def read_column(file: IO[bytes] | pa.NativeFile, row_group: int, name: str) -> pa.ChunkedArray:
    """Return one column of a row group; name may be that of a field of a struct, such as image.bytes."""
    return column_of(pq.ParquetFile(file).read_row_group(row_group, columns=[name]), name)


def column_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Return the type of a column or of a field in structs; None if there is none."""
    if name in schema.names:
        return schema.field(name).type
    first, *rest = name.split(".")
    if first not in schema.names:
        return None
    kind = schema.field(first).type
    for part in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind


def column_of(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column, or a field in structs; views as plain values, because Arrow cannot take rows of views."""
    first, *rest = [name] if name in table.schema.names else name.split(".")
    column = pc.struct_field(table[first], rest) if rest else table[first]
    return column.cast(VIEWS[column.type]) if column.type in VIEWS else column


def _columns(schema: pa.Schema) -> list[str]:
    """Return all columns; those of structs by the fields that they hold."""
    names = []
    for field in schema:
        is_struct = pa.types.is_struct(field.type)
        names += [f"{field.name}.{inner.name}" for inner in field.type] if is_struct else [field.name]
    return names


def _check_bytes_column(schema: pa.Schema, name: str, uri: str) -> None:
    kind: Any = column_type(schema, name)
    if is_bytes(kind.value_type if pa.types.is_dictionary(kind) else kind):
        return
    inner = [
        column for column in _columns(schema) if column.startswith(f"{name}.") and is_bytes(column_type(schema, column))
    ]
    remedy = f"set bytes_column to {inner[0]}" if inner else "for paths use uri_column"
    raise AttribError(
        f"{uri}: column {name!r} holds {kind} values, but bytes_column must hold image files as binary; {remedy}"
    )


def is_bytes(kind: pa.DataType | None) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or pa.types.is_fixed_size_binary(kind)


def _texts(table: pa.Table, name: str, uri: str) -> list[str | None]:
    """Return the values of a column as text: of numbers, dictionaries, and bytes that are UTF-8."""
    column = column_of(table, name)
    try:
        return [None if text is None else str(text) for text in as_text(column).to_pylist()]
    except pa.ArrowException as error:
        raise AttribError(
            f"{uri}: column {name!r} holds {column.type} values that are no text ({first_line(error)}); name a column "
            "of texts or numbers"
        ) from error


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column as strings. Raises ArrowException for bytes that are not UTF-8, and for lists and structs."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type):
        raise pa.ArrowInvalid("lists and structs are no text")
    if is_bytes(column.type):
        column = column.cast(pa.binary())
    return column.cast(pa.string())


def _absolute(base: str, uri: str | None) -> str:
    """Return an absolute URI. Relative paths start at the folder of the Parquet file; a null becomes that folder."""
    try:
        path = local_path(uri or "")
        path.encode()
    except ValueError:  # a file on another host, or a name that is not UTF-8; reading it fails alone
        return uri or ""
    return path if "://" in path or path.startswith("/") else join(base, path)


def _version(uri: str) -> str | None:
    """Return the version of a local file; None if it cannot be told, and for objects, where it costs a request."""
    if is_remote(uri) or "://" in uri:
        return None
    try:
        return local_version(os.stat(uri))
    except (OSError, ValueError):
        return None


def has_text(kind: pa.DataType) -> bool:
    """Whether all values of a type can be written as text: not those of bytes, lists and structs."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        return has_text(kind.value_type)
    if pa.types.is_nested(kind) or is_bytes(kind):
        return False
    try:
        # The name of a time zone is looked up with the first value only.
        pa.array([0] if pa.types.is_timestamp(kind) else [], kind).cast(pa.string())
    except pa.ArrowException:
        return False
    return True


def shown_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return rows for a page: bytes as their number, values that Python cannot hold as Arrow writes them."""
    columns = []
    for column in table.columns:
        try:
            values = column.to_pylist()
        except (ValueError, OverflowError, pa.ArrowException):  # years above 9999, nanoseconds, unknown time zones
            values = [None if value is None else str(value) for value in _plain(column)]
        columns.append([f"{len(value):,} bytes" if isinstance(value, bytes) else value for value in values])
    return [dict(zip(table.schema.names, row)) for row in zip(*columns)]


def _plain(column: pa.ChunkedArray) -> list[Any]:
    try:
        return list(column.cast(pa.string()).to_pylist())
    except pa.ArrowException:
        return ["(cannot be shown)" if value.is_valid else None for value in column]
