"""Compare-and-swap of a small file: the one operation that decides between two writers.

Local: a lock file beside the target is held while the content is compared and replaced. The operating system frees the
lock when its holder dies. S3: a conditional PUT (`If-Match`, `If-None-Match`).
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from attrib.common.errors import AttribError, first_line
from attrib.common.storage import Storage, is_remote

REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")  # S3's codes: another writer was faster


def swap(uri: str, data: bytes | None, expected: bytes | None, storage: Storage) -> bool:
    """Replace the content of `uri` by `data` if it is `expected`; return whether it was. None: no file.

    Of several writers that expect the same content, exactly one succeeds. Raises AttribError if the object store has
    no conditional writes.
    """
    if is_remote(uri):
        try:
            return _swap_object(uri, data, expected, storage)
        except AttribError:
            raise
        except Exception as error:
            raise _named(error, uri) from error
    os.makedirs(os.path.dirname(uri), exist_ok=True)
    with _locked(uri):
        if read_or_none(uri, storage) != expected:
            return False
        if data is not None:
            storage.write_bytes(uri, data)
        elif expected is not None:
            os.unlink(uri)
        return True


def read_or_none(uri: str, storage: Storage) -> bytes | None:
    """The content of a file; None if there is none. One request of S3, so never parts of two versions."""
    try:
        if is_remote(uri):
            content: bytes = storage.s3fs_client.cat_file(uri.removeprefix("s3://"), max_concurrency=1)
            return content
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise _named(error, uri) from error


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock file of `path`, which stays: deleting it would let two processes hold two locks of one name."""
    folder, name = os.path.split(path)
    with open(os.path.join(folder, f".{name}.lock"), "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _swap_object(uri: str, data: bytes | None, expected: bytes | None, storage: Storage) -> bool:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    place, client = {"Bucket": bucket, "Key": key}, storage.s3fs_client
    condition = {"IfNoneMatch": "*"}
    if expected is not None:
        try:
            found = client.info(uri.removeprefix("s3://"), refresh=True)
        except FileNotFoundError:
            return False
        etag = found["ETag"]
        # The ETag of a small object is its MD5, without KMS; else the content is compared before the conditional write.
        if etag.strip('"') != hashlib.md5(expected).hexdigest() and read_or_none(uri, storage) != expected:
            return False
        condition = {"IfMatch": etag}
    elif data is None:
        return not storage.exists(uri)
    try:
        if data is None:
            client.call_s3("delete_object", **place, **condition)
        else:
            client.call_s3("put_object", **place, **condition, Body=data)
    except Exception as error:  # s3fs translates the codes that it knows, botocore raises the others
        cause = error if hasattr(error, "response") else error.__cause__
        code = (getattr(cause, "response", None) or {}).get("Error", {}).get("Code", "")
        if code in REFUSED or isinstance(error, FileExistsError):
            return False
        if code == "NotImplemented":
            raise AttribError(
                f"{uri}: the object store has no conditional writes, so two jobs could not be told apart "
                f"({first_line(error)}); write to another store"
            ) from error
        if code == "NoSuchBucket":
            raise AttribError(f"{uri}: there is no bucket {bucket!r}; create it, or correct the URI") from error
        raise
    return True


def _named(error: Exception, uri: str) -> OSError:
    """The error of a store's client as an OSError that names the object. Those of the local disk stay."""
    if isinstance(error, OSError) and (not is_remote(uri) or uri.removeprefix("s3://") in str(error)):
        return error
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    return kind(f"{uri}: {type(error).__name__}: {first_line(error)}")
