"""Metadata of a collection from a table beside it: CSV, TSV, Parquet, or a folder of Parquet files.

A row describes the image of its key, or that of its key and an extension, as img2dataset writes keys.
"""

import csv
import io
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.fs

from attrib.common.errors import AttribError, first_line, one_line
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, is_of_store
from attrib.data.collections import check_distinct, check_metadata_columns
from attrib.data.folders import FoundFile, files_below
from attrib.data.parquet_files import VIEWS, as_text
from attrib.data.places import open_file
from attrib.data.selection import Skipped, shard_filter
from attrib.data.settings import CollectionSettings, MetadataSettings, TableSettings

MAX_FIELD_CHARS = 1 << 21  # of a CSV; Arrow reads blocks of 1 MiB
MAX_UNMET = 100  # keys without a row that are kept of each partition
SAMPLE_ROWS = 1_000  # of a table, in which rows without an image are searched
MAX_EXAMPLES = 3
# In what two keys may differ by mistake, and how they become equal.
DIFFERENCES: dict[str, Callable[[str], str]] = {
    "the Unicode form": lambda key: unicodedata.normalize("NFC", key),
    "spaces around them": str.strip,
    "backslashes": lambda key: key.replace("\\", "/"),
    "upper and lower case": str.casefold,
    "extensions": lambda key: os.path.splitext(key)[0],
    "folders": lambda key: key.replace("\\", "/").rsplit("/", 1)[-1],
}


@dataclass
class Met:
    """How many images have a row, and how many rows an image. unmet: some keys of images without one."""

    num_images: int = 0
    num_described: int = 0
    num_rows: int = 0
    unmet: list[str] = field(default_factory=list)

    def update(self, other: "Met") -> None:
        self.num_images += other.num_images
        self.num_described += other.num_described
        self.num_rows += other.num_rows
        self.unmet += other.unmet[: 10 * MAX_UNMET - len(self.unmet)]


def join_metadata(
    images: pa.Table, collection: CollectionSettings, storage: Storage, met: Met | None = None
) -> pa.Table:
    """Return `images` with the columns of the sidecar table; images that the table does not list get nulls.

    met: counts are added to it. The sidecar is scanned and only rows of these keys are kept, so it may be larger than
    memory. Raises AttribError if it cannot be read, if a column name is reserved or occurs twice, or if a key has two
    rows.
    """
    if collection.metadata is None:
        return images
    uri, key_column = collection.metadata.uri, collection.metadata.key_column
    sidecar = open_sidecar(collection.metadata, storage)
    check_metadata_columns([*collection.metadata_columns, *(n for n in sidecar.schema.names if n != key_column)], uri)
    whole, without_extension = table_keys(images["key"], collection.metadata)
    with _named_if_damaged(uri):
        # Keys may be numbers, dictionaries or large strings.
        wanted = pc.field(key_column).cast(pa.string()).isin(pa.concat_arrays([whole, without_extension]))
        # Not sidecar.to_table(filter=wanted): Arrow takes statistics of the filter's column from the footer, and ends
        # the process if they are damaged. A reader raises.
        rows = sidecar.scanner().to_reader()
        found = pyarrow.dataset.Scanner.from_batches(rows, filter=wanted).to_table()
        found.validate(full=True)  # Arrow does not check that what Parquet calls a string is UTF-8
        found_keys = as_text(found[key_column]).combine_chunks()
    if len(found) != len(pc.unique(found_keys)):
        values, counts = pc.value_counts(found_keys).flatten()
        twice = values.filter(pc.greater(counts, 1))[0].as_py()
        raise AttribError(f"{uri}: the key {twice!r} has more than one row; keep one row per image")
    positions = pc.coalesce(*(pc.index_in(keys, value_set=found_keys) for keys in (whole, without_extension)))
    if met is not None:
        unmet = images["key"].filter(positions.is_null()).slice(0, MAX_UNMET).to_pylist()
        num_rows = len(pc.unique(positions.drop_null()))
        met.update(Met(len(images), len(images) - positions.null_count, num_rows, unmet))
    for name in found.schema.names:
        if name != key_column:
            images = images.append_column(name, found[name].combine_chunks().take(positions))
    return images


def table_keys(keys: pa.ChunkedArray, settings: MetadataSettings) -> tuple[pa.Array, pa.Array]:
    """Return the keys that rows of these images may have, with and without extension."""
    whole = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    if settings.ignore_folders:
        whole = pc.replace_substring_regex(whole, r"^.*/", "")
    whole = pc.binary_join_element_wise(settings.key_prefix, whole, "")
    return whole, pc.replace_substring_regex(whole, r"\.[^./]+$", "")


def describe_met(met: Met, collection: CollectionSettings, partitions: Collection[str], storage: Storage) -> str | None:
    """Return how many images and rows met and how the keys of others look; None if all of both did.

    partitions: URIs of the manifest's. Raises AttribError if no row has an image.
    """
    settings = collection.metadata
    if settings is None:
        return None
    sidecar = open_sidecar(settings, storage)
    total, num_unmet = sidecar.count_rows(), met.num_images - met.num_described
    num_rows_unmet = max(0, total - met.num_rows)
    if not num_unmet and not num_rows_unmet:
        return None
    with _named_if_damaged(settings.uri):
        head = sidecar.head(SAMPLE_ROWS, columns=[settings.key_column])
        head.validate(full=True)
        rows = as_text(head[settings.key_column]).drop_null()
    for uri in partitions:
        known = pa.concat_arrays(table_keys(storage.read_table(uri, columns=["key"])["key"], settings))
        rows = rows.filter(pc.invert(pc.is_in(rows, value_set=known)))
    theirs = rows.to_pylist()
    hints = _differences([key.removeprefix(settings.key_prefix) for key in theirs], met.unmet)
    if not met.num_described:
        raise AttribError(
            f"{settings.uri} describes none of the images: its keys look like {(theirs or ['(no rows)'])[0]!r}, the "
            f"collection's like {met.unmet[0]!r}{hints}; set metadata.key_column, metadata.key_prefix and "
            "metadata.ignore_folders to match"
        )
    parts = [f"{settings.uri} describes {met.num_described:,} of {met.num_images:,} images"]
    if num_unmet:
        parts.append(f"without a row are e.g. {_some(met.unmet)}")
    if num_rows_unmet:
        of_sample = f", e.g. {_some(theirs)}" if theirs else ""
        parts.append(f"{num_rows_unmet:,} of its {total:,} rows found no image{of_sample}")
    return "; ".join(parts) + hints


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:MAX_EXAMPLES]))


def _differences(theirs: list[str], ours: list[str]) -> str:
    """Return what keys of rows and images differ in that seem to mean the same image."""
    found = []
    for name, fold in DIFFERENCES.items():
        by_form = {fold(key): key for key in ours}
        pairs = {key: by_form[fold(key)] for key in theirs if fold(key) in by_form}
        theirs = [key for key in theirs if key not in pairs]
        found += [f"{key!r} and {other!r} differ in {name}" for key, other in list(pairs.items())[:1]]
    return f"; {'; '.join(found)}" if found else ""


def open_sidecar(settings: TableSettings, storage: Storage) -> pyarrow.dataset.Dataset:
    """Return the sidecar table as a data set; CSV columns are text: a type guessed from one block can be wrong later.

    Raises AttribError if the table does not exist, cannot be read or lacks the key column.
    """
    uri, key_column = settings.uri, settings.key_column
    filesystem, path = storage.resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pyarrow.fs.FileType.NotFound:
        raise AttribError(f"the metadata table {uri} does not exist")
    if kind not in (pyarrow.fs.FileType.File, pyarrow.fs.FileType.Directory):  # a pipe would block
        raise AttribError(f"the metadata table {uri} is no regular file; correct metadata.uri")
    extension = os.path.splitext(uri)[1].lower()
    with _named_if_damaged(uri):
        if kind == pyarrow.fs.FileType.Directory:
            table = _folder_table(settings, storage)
        elif extension == ".parquet":
            table = storage.dataset([uri], format="parquet")
            if any(kind in VIEWS for kind in table.schema.types):  # Arrow cannot filter them
                table = storage.dataset([uri], format="parquet", schema=_without_views(table.schema))
        elif extension in (".csv", ".tsv"):
            table = storage.dataset([uri], format=_csv_format(uri, storage))
        else:
            raise AttribError(f"the metadata table {uri} must be .csv, .tsv or .parquet, or a folder of .parquet files")
    if key_column not in table.schema.names:
        raise AttribError(
            f"{uri} has no column {key_column!r} (metadata.key_column); it has {one_line(table.schema.names)}"
        )
    return table


@contextmanager
def _named_if_damaged(uri: str) -> Iterator[None]:
    """Raise AttribError that names the table if it cannot be read. Errors of the disk or the store pass."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and is_of_store(error):
            raise
        raise AttribError(f"the metadata table {uri} cannot be read: {first_line(error)}") from error


def folder_files(settings: TableSettings, storage: Storage, skipped: Skipped) -> list[FoundFile]:
    """Return the Parquet files of a sidecar that is a folder."""
    folder = CollectionSettings(name="metadata", uri=settings.uri, format="parquet", uri_column=settings.key_column)
    return files_below(settings.uri, True, folder, shard_filter(folder), storage, skipped)


def _folder_table(settings: TableSettings, storage: Storage) -> pyarrow.dataset.Dataset:
    skipped = Skipped()
    files = folder_files(settings, storage, skipped)
    if not files:
        raise AttribError(
            f"no .parquet file below {settings.uri}; left out: {skipped.describe()}; correct metadata.uri"
        )
    tables = [storage.dataset([file.uri], format="parquet") for file in files]
    # Else the columns of the first file would be those of all.
    schema = pa.unify_schemas([_without_views(table.schema) for table in tables])
    return storage.dataset([file.uri for file in files], format="parquet", schema=schema)


def _without_views(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(VIEWS.get(field.type, field.type)) for field in schema])


def _csv_format(uri: str, storage: Storage) -> pyarrow.dataset.CsvFileFormat:
    with open_file(uri, storage) as file:
        _check_text(uri, next(iter(file.versions), None), storage.settings)
    if uri.lower().endswith(".tsv"):  # has no quotes (IANA's text/tab-separated-values): " is a letter as others
        parsing = pa.csv.ParseOptions(delimiter="\t", quote_char=False)
    else:
        with open_file(uri, storage) as file:
            _check_quotes(uri, next(iter(file.versions), None), storage.settings)
        # Quoted values may contain line breaks.
        parsing = pa.csv.ParseOptions(newlines_in_values=True)
    with storage.open(uri) as file:
        header = pa.csv.open_csv(file, parse_options=parsing).schema.names
    check_distinct(header, uri)
    conversion = pa.csv.ConvertOptions(column_types={name: pa.string() for name in header})
    return pyarrow.dataset.CsvFileFormat(parse_options=parsing, convert_options=conversion)


@lru_cache(maxsize=16)  # a table is opened once per partition
def _check_text(uri: str, file_version: str | None, storage: StorageSettings) -> None:
    """Raise AttribError for a table that is not UTF-8; Arrow fails in several ways, without a remedy."""
    num_lines = 0
    with open_file(uri, Storage(storage)) as source:
        try:
            for _ in io.TextIOWrapper(source.file, "utf-8"):
                num_lines += 1
        except UnicodeDecodeError as error:
            raise AttribError(
                f"the metadata table {uri} cannot be read: it is not UTF-8 (after line {num_lines}: {error.reason}); "
                "save it as UTF-8"
            ) from error


@lru_cache(maxsize=16)  # a table is opened once per partition
def _check_quotes(uri: str, file_version: str | None, storage: StorageSettings) -> None:
    """Raise AttribError for a quote that is not closed: Arrow would take all rows after it as one value."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    with open_file(uri, Storage(storage)) as source:
        rows = csv.reader(io.TextIOWrapper(source.file, "utf-8", errors="replace", newline=""), strict=True)
        start = 1
        try:
            for _ in rows:
                start = rows.line_num + 1
        except csv.Error as error:
            raise AttribError(
                f"the metadata table {uri} cannot be read: the row that begins in line {start} has a quote that is not "
                f"closed, or text after a closed one ({error}); correct it, or write a .tsv, which has no quotes"
            ) from error
