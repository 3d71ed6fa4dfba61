"""Files of a collection opened for reading, with their version, and the folders that a URI column may name.

A manifest holds the version of each file that it lists: its size with the time of its last change, or with the ETag of
an object. What has another version later is not read, since its rows and byte ranges may mean other images.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs

from attrib.common.errors import ImageError
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, has_odd_parts, is_remote
from attrib.data.settings import CollectionSettings

CHANGED = "the file changed since it was listed; make the manifest again"
GONE = "the file is gone since it was listed"


class NotAFileError(OSError):
    """A folder, pipe, socket or device, which may block or never end."""


@dataclass(frozen=True)
class OpenFile:
    """A regular file or an object. versions: those that a manifest may hold of it, the one that tells most first."""

    file: IO[bytes] | pa.NativeFile
    num_bytes: int
    versions: tuple[str, ...]

    def check_version(self, listed: str | None) -> None:
        """Raise ImageError if the file is not as it was listed. listed: None in manifests of earlier versions."""
        if listed is not None and listed not in self.versions:
            raise ImageError("read", CHANGED)


@contextmanager
def open_file(uri: str, storage: Storage) -> Iterator[OpenFile]:
    """Open a file or object. Raises FileNotFoundError, NotAFileError or the client's error."""
    if not is_remote(uri):
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        descriptor = os.open(uri, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise NotAFileError("not a regular file")
        with open(descriptor, "rb") as file:
            yield OpenFile(file, found.st_size, (local_version(found),))
        return
    client = s3fs_client(storage, uri)
    if client:
        with client.open(storage.resolve(uri)[1], "rb") as file:
            size, details = file.details["size"], file.details
            yield OpenFile(
                file, size, (version(size, details["ETag"]), version(size, seconds(details["LastModified"])))
            )
        return
    if not can_read_key(uri, storage):
        raise NotAFileError(
            "the arrow client cannot read a key with an empty part, . or ..; set storage.client to s3fs"
        )
    with storage.open(uri) as file:
        # Arrow gives the time as s3:// lists it, in whole seconds.
        size, known = file.size(), {key.lower(): value.decode() for key, value in (file.metadata() or {}).items()}
        yield OpenFile(file, size, tuple(version(size, known[k]) for k in ("etag", "last-modified") if k in known))


def can_read_key(uri: str, storage: Storage) -> bool:
    """Whether the client reads the object of exactly this key."""
    return storage.settings.client == "s3fs" or not has_odd_parts(uri)


def s3fs_client(storage: Storage, uri: str) -> Any:
    """The s3fs client of a storage that uses one for `uri`; else None."""
    if not is_remote(uri) or storage.settings.client != "s3fs":
        return None
    return storage.resolve(uri)[0].handler.fs


def version(num_bytes: int, mark: Any) -> str:
    return f"{num_bytes} {mark}"


def seconds(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def local_version(found: os.stat_result) -> str:
    return version(found.st_size, found.st_mtime_ns)


def check_allowed(uri: str, collection: CollectionSettings, storage: Storage) -> str:
    """Return the URI to open: symbolic links of a local path are resolved. For a URI column.

    Raises ImageError if it lies outside of collection.allowed_roots.
    """
    roots = collection.allowed_roots or (own_folder(collection.uri, storage.settings),)
    if is_remote(uri):
        inside = ".." not in uri.split("/") and _lies_in(uri, roots)
        real = uri
    else:
        real = os.path.realpath(uri)
        inside = _lies_in(real, [os.path.realpath(root) for root in roots if not is_remote(root)])
    if not inside:
        raise ImageError(
            "read", "outside of the collection's folder; name what may be read in collection.allowed_roots"
        )
    return real


def _lies_in(uri: str, roots: Sequence[str]) -> bool:
    return any(uri.startswith(root.rstrip("/") + "/") for root in roots)


@lru_cache(maxsize=16)
def own_folder(uri: str, storage: StorageSettings) -> str:
    """Return the folder of a collection, which may also be a single file."""
    filesystem, path = Storage(storage).resolve(uri)
    is_file = filesystem.get_file_info(path).type == pyarrow.fs.FileType.File
    return os.path.dirname(uri) if is_file else uri
