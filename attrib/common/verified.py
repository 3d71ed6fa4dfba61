"""Verifies that a file is the one that a job wrote, by the SHA-256 in the job's record."""

import hashlib
import os

from attrib.common.errors import AttribError, MissingFileError
from attrib.common.storage import COPY_BYTES, Storage, is_remote

_verified: set[tuple[object, ...]] = set()  # files that this process has verified


def verify(uri: str, sha256: str | None, made_by: str, storage: Storage) -> str:
    """Return `uri` if the file has this SHA-256. Reads it once per process, as a stream.

    sha256: None if the record is of a version without it; nothing is read then. Raises AttribError if the file is
    missing or another one; made_by names the job that wrote it.
    """
    if sha256 is not None:
        remedy = f"restore it from a copy, or run {made_by} again in another folder"
        _verify(uri, uri, sha256, remedy, storage)
    return uri


def verify_copy(uri: str, folder: str, sha256: str, remedy: str, storage: Storage) -> str:
    """Return the path of a file that has this SHA-256: its own, or that of a copy in `folder` if it is remote.

    The copy is verified, so a remote file is read once. Raises AttribError as `verify` does.
    """
    try:
        path = storage.localise(uri, folder)
    except FileNotFoundError:
        raise AttribError(f"{uri} is missing; {remedy}") from None
    _verify(path, uri, sha256, remedy, storage)
    return path


def _verify(path: str, shown: str, sha256: str, remedy: str, storage: Storage) -> None:
    seen: tuple[object, ...] = (path, sha256)
    try:
        if not is_remote(path):
            status = os.stat(path)
            seen += (status.st_size, status.st_mtime_ns, status.st_ino)
        if seen in _verified:
            return
        found = hashlib.sha256()
        with storage.open(path) as file:
            while block := file.read(COPY_BYTES):
                found.update(block)
    except FileNotFoundError:
        raise MissingFileError(f"{shown} is missing; {remedy}") from None
    if found.hexdigest() != sha256:
        raise AttribError(f"{shown} is damaged: its checksum differs from the record; {remedy}")
    _verified.add(seen)
