"""Reads and writes files on a local disk or an object store. Writes are atomic: a reader sees a whole file or none.

An object becomes visible when its upload completes. A local file is written beside its target, flushed and renamed.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

from attrib.common import seal
from attrib.common.errors import AttribError, first_line
from attrib.common.json_records import parse_record
from attrib.common.scratch import unfinished_path
from attrib.common.settings import StorageSettings

PARQUET_ROW_GROUP_ROWS = 16_384
COPY_BYTES = 1 << 24  # copied at a time


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def is_remote(uri: str) -> bool:
    return uri.startswith("s3://")


def has_odd_parts(uri: str) -> bool:
    """Whether a key has an empty part, . or ..: Arrow refuses // and reads a/b for a/./b."""
    return bool({"", ".", ".."} & set(uri.removeprefix("s3://").split("/")))


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in an OSError of a write that does not name it, such as "no space left on device"."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, path) from error
        if error.filename is None and "requested and" in str(error):  # NumPy's, which hides the reason
            raise OSError(f"{path} was written in part ({error}); is the disk full?") from error
        raise


class _S3fsHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]  # untyped
    """Opens files without asking first whether they exist: Arrow's own handler takes a refusal (403) for "no"."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")

    open_input_stream = open_input_file


class Storage:
    """Reads and writes the URIs of a job. Picklable: each worker opens its own connections."""

    def __init__(self, settings: StorageSettings):
        self.settings = settings

    def __reduce__(self) -> tuple[type["Storage"], tuple[StorageSettings]]:
        return Storage, (self.settings,)

    @cached_property
    def s3fs_client(self) -> Any:
        """s3fs's file system. The only client with conditional writes."""
        from attrib.common.s3_client import s3_client  # imports the clients of AWS, which most jobs do not need

        return s3_client(self.settings)

    @cached_property
    def _s3(self) -> pyarrow.fs.FileSystem:
        settings = self.settings
        if settings.client == "s3fs":
            return pyarrow.fs.PyFileSystem(_S3fsHandler(self.s3fs_client))
        scheme, _, host = (settings.endpoint or "").partition("://")
        return pyarrow.fs.S3FileSystem(
            endpoint_override=host or None,
            scheme=scheme or None,
            region=settings.region or ("us-east-1" if settings.endpoint else None),
            connect_timeout=settings.connect_timeout_seconds,
            request_timeout=settings.request_timeout_seconds,
            allow_delayed_open=True,  # a small object is then one request, not the three of a multipart upload
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=settings.max_attempts),
        )

    @cached_property
    def _local(self) -> pyarrow.fs.FileSystem:
        return pyarrow.fs.LocalFileSystem()

    def resolve(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """The file system of `uri` and the path within it."""
        return (self._s3, uri.removeprefix("s3://")) if is_remote(uri) else (self._local, uri)

    def exists(self, uri: str) -> bool:
        filesystem, path = self.resolve(uri)
        return bool(filesystem.get_file_info(path).type != pyarrow.fs.FileType.NotFound)

    def list_folder(self, uri: str, *, recursive: bool = False, suffix: str = "") -> list[pyarrow.fs.FileInfo]:
        """Files and folders below `uri` that end in `suffix`, sorted by path; empty if `uri` does not exist.

        Raises AttribError for a name that is not UTF-8.
        """
        filesystem, path = self.resolve(uri)
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=recursive, allow_not_found=True))
        try:
            return sorted((info for info in found if info.path.endswith(suffix)), key=lambda info: info.path)
        except UnicodeDecodeError as error:
            name = error.object
            raise AttribError(f"a file below {uri} has a name that is not UTF-8 ({name!r}); rename it") from error

    def names(self, uri: str, suffix: str = "") -> list[str]:
        return [info.base_name for info in self.list_folder(uri, suffix=suffix)]

    def open(self, uri: str) -> pa.NativeFile:
        filesystem, path = self.resolve(uri)
        return filesystem.open_input_file(path)

    def read_bytes(self, uri: str) -> bytes:
        with self.open(uri) as file:
            return bytes(file.read())

    def read_json(self, uri: str) -> Any:
        return json.loads(self.read_bytes(uri))

    def read_table(
        self, uri: str, columns: list[str] | None = None, filter: Any = None, *, check_footer: bool = False
    ) -> pa.Table:
        """Read a Parquet file, of which only the pages of `columns` that `filter` needs are fetched.

        check_footer: whether the file's checksum is in no record yet, and too little of it is read to verify all.
        """
        with _named_if_damaged(uri), self.open(uri) as source:
            if check_footer:
                seal.check_footer(source, source.size(), uri)
            return pq.read_table(source, columns=columns, filters=filter, page_checksum_verification=True)

    def read_sealed(self, uri: str, columns: list[str] | None = None, filter: Any = None) -> pa.Table:
        """As read_table, of a file whose checksum is in no record yet. All of it is read and verified."""
        return unsealed(self.read_bytes(uri), uri, columns, filter)

    def read_rows(
        self, uri: str, start: int, stop: int, columns: list[str] | None = None, *, check_footer: bool = False
    ) -> pa.Table:
        """Rows [start, stop) of a Parquet file; only the row groups that hold them are read.

        check_footer: as in read_table.
        """
        with _named_if_damaged(uri), self.open(uri) as source:
            if check_footer:
                seal.check_footer(source, source.size(), uri)
            file = pq.ParquetFile(source, page_checksum_verification=True)
            ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            skipped = int(ends[first - 1]) if first else 0
            return file.read_row_groups(range(first, last + 1), columns=columns).slice(start - skipped, stop - start)

    def dataset(self, uris: list[str], **options: Any) -> pyarrow.dataset.Dataset:
        """A scan over these files. Lists no folder, since that is slow on an object store."""
        filesystem, _ = self.resolve(uris[0])
        return pyarrow.dataset.dataset([self.resolve(uri)[1] for uri in uris], filesystem=filesystem, **options)

    def write_bytes(self, uri: str, data: bytes | pa.Buffer) -> None:
        if not is_remote(uri):
            self._write_local(uri, lambda file: file.write(data))
            return
        self._upload(io.BytesIO(data), len(data), uri)

    def publish(self, local_path: str, uri: str) -> None:
        """Move a finished local file to `uri`. The local file stays until the whole object was seen in the store."""
        if is_remote(uri):
            with open(local_path, "rb") as source:
                self._upload(source, os.path.getsize(local_path), uri)
            os.unlink(local_path)
            return
        os.makedirs(os.path.dirname(uri), exist_ok=True)
        if os.stat(local_path).st_dev == os.stat(os.path.dirname(uri)).st_dev:
            with naming(local_path), open(local_path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(local_path, uri)
            return
        with open(local_path, "rb") as source:
            self._write_local(uri, lambda file: shutil.copyfileobj(source, file, COPY_BYTES))
        os.unlink(local_path)

    def _upload(self, source: IO[bytes], num_bytes: int, uri: str) -> None:
        """Write an object and see that all of it is there. Raises OSError if it is not.

        Not pyarrow.fs.copy_files, which returns without an error if the last request of an upload fails. The clients
        send a checksum with each request, which the store compares.
        """
        filesystem, path = self.resolve(uri)
        with filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(source, stream, COPY_BYTES)
        there = filesystem.get_file_info(path).size
        if there != num_bytes:
            raise OSError(f"{uri} has {there} bytes after {num_bytes} were written; is another job writing to it?")

    @staticmethod
    def _write_local(path: str, write: Callable[[IO[bytes]], object]) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        beside = unfinished_path(path)
        try:
            with naming(path), open(beside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            if os.path.exists(beside):
                os.unlink(beside)

    def write_sealed_bytes(self, uri: str, data: bytes | memoryview) -> None:
        """Write data and their checksum, for a file that no record will name."""
        self.write_bytes(uri, seal.sealed(data))

    def read_sealed_bytes(self, uri: str) -> memoryview:
        """What write_sealed_bytes wrote. Raises AttribError if it was damaged."""
        return seal.opened(self.read_bytes(uri), uri)

    def write_array(self, uri: str, array: np.ndarray) -> None:
        sink = io.BytesIO()
        np.save(sink, array, allow_pickle=False)
        self.write_sealed_bytes(uri, sink.getbuffer())

    def read_array(self, uri: str, *, sealed: bool = False) -> np.ndarray:
        """An array of numbers, as write_array wrote it. Raises AttribError if the file is not a whole .npy file.

        sealed: whether the file's checksum is in no record yet. The one behind the array is then verified.
        """
        data = self.read_sealed_bytes(uri) if sealed else self.read_bytes(uri)
        try:
            array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # NumPy parses the header as a Python expression, which fails in many ways
            raise AttribError(f"{uri} is damaged: not a whole .npy file of numbers; restore it from a copy") from error
        return array

    def write_json(self, uri: str, value: Any) -> None:
        self.write_bytes(uri, json.dumps(value, indent=1, sort_keys=False, default=str).encode())

    def write_table(self, uri: str, table: pa.Table, row_group_rows: int = PARQUET_ROW_GROUP_ROWS) -> str:
        """Write a sealed Parquet file; return its SHA-256."""
        # Vectors do not repeat or compress. A dictionary makes reading them five times slower, compression a third.
        vectors = {f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)}
        others = [name for name in table.column_names if name not in vectors]
        codecs = dict.fromkeys(others, "zstd") | {f"{name}.list.element": "none" for name in vectors}
        sink = io.BytesIO()
        pq.write_table(
            table, sink, row_group_size=row_group_rows, compression=codecs, use_dictionary=others,
            write_page_checksum=True,
        )  # fmt: skip
        data = seal.sealed_parquet(sink.getbuffer())
        self.write_bytes(uri, data)
        return bytes_sha256(data)

    def delete_file(self, uri: str) -> None:
        filesystem, path = self.resolve(uri)
        filesystem.delete_file(path)

    def delete_folder(self, uri: str) -> None:
        filesystem, path = self.resolve(uri)
        if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
            filesystem.delete_dir(path)

    def localise(self, uri: str, folder: str) -> str:
        """A local path with the content of `uri`: `uri` itself if it is local, else a copy in `folder`."""
        if not is_remote(uri):
            return uri
        filesystem, path = self.resolve(uri)
        # The hash keeps objects of the same name apart; a whole key may be too long for a local file name.
        target = os.path.join(folder, f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{os.path.basename(path)}")
        with filesystem.open_input_file(path) as source, open(target, "wb") as file:
            num_bytes = source.size()
            while block := source.read(COPY_BYTES):
                with naming(target):
                    file.write(block)
                    file.flush()
        if os.path.getsize(target) != num_bytes:
            raise OSError(f"{uri}: {os.path.getsize(target)} of {num_bytes} bytes arrived; run again")
        return target

    def require(self, uri: str, made_by: str) -> dict[str, Any]:
        """The JSON record of a finished job. Raises AttribError if it is missing; `made_by` names the job to run."""
        if not self.exists(uri):
            raise AttribError(f"{uri} is not there: run {made_by} to its end first, or correct the path")
        return parse_record(uri, self.read_bytes(uri))


def own_folder(path: str, made_by: str) -> str:
    """A local folder that `made_by` may change later. Raises AttribError if it holds files of anything else."""
    marker = os.path.join(path, f".{made_by}")
    if os.path.isdir(path) and os.listdir(path) and not os.path.exists(marker):
        raise AttribError(f"{path} holds files that {made_by} did not make; choose another output folder")
    os.makedirs(path, exist_ok=True)
    with open(marker, "w", encoding="utf-8") as file:
        file.write(f"Made by {made_by}, which deletes files here when it runs again.\n")
    return path


def fresh_folder(path: str, made_by: str, names: tuple[str, ...]) -> str:
    """As own_folder, without the folders `names` of an earlier run. All else in it is left alone."""
    own_folder(path, made_by)
    for name in names:
        if os.path.isdir(os.path.join(path, name)):
            shutil.rmtree(os.path.join(path, name))
    return path


def unsealed(data: bytes, uri: str, columns: list[str] | None = None, filter: Any = None) -> pa.Table:
    """The table of a sealed Parquet file, whose bytes are here. Raises AttribError if it was damaged."""
    seal.check_parquet(memoryview(data), uri)
    return pq.read_table(pa.BufferReader(data), columns=columns, filters=filter)


@contextmanager
def _named_if_damaged(uri: str) -> Iterator[None]:
    """Raise AttribError that names the file if Parquet cannot read it. Errors of the store pass."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if is_of_store(error):
            raise
        raise AttribError(
            f"{uri} is damaged ({first_line(error)}); restore it from a copy, or delete it and run its job again"
        ) from error


def is_of_store(error: Exception) -> bool:
    """Whether the disk or the store failed, and not the parsing: Arrow raises OSError for damaged Parquet, too."""
    # Errors of the operating system have a number, those of Arrow's S3 client name AWS.
    return isinstance(error, FileNotFoundError) or "AWS" in str(error) or getattr(error, "errno", None) is not None


def bytes_sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
