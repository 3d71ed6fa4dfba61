"""Checksums inside files that are in no record yet, such as the chunks of an unfinished run.

Parquet has checksums of pages, but none of its footer and of the headers of pages, where one changed bit can change
values. A sealed Parquet file holds two SHA-256 between its last page and its footer: one of the pages, one of the
footer. Readers of Parquet find pages by their offsets, so they do not see the seal. In all other sealed files the
SHA-256 follows the content.
"""

import hashlib
from typing import IO

from attrib.common.errors import AttribError

DIGEST_BYTES = 32
SEAL_BYTES = 2 * DIGEST_BYTES
END_BYTES = 8  # of a Parquet file: the length of the footer and PAR1


def sealed_parquet(data: memoryview) -> bytes:
    """The Parquet file with its seal. data: a whole Parquet file."""
    pages, footer = data[: _footer_start(data)], data[_footer_start(data) :]
    return b"".join([pages, _sha256(pages), _sha256(footer), footer])


def check_parquet(data: memoryview, uri: str) -> None:
    """Raise AttribError, which names the file, unless `data` is a whole sealed Parquet file."""
    start = _footer_start(data)
    pages, seal = data[: max(start - SEAL_BYTES, 0)], data[max(start - SEAL_BYTES, 0) : max(start, 0)]
    if start < SEAL_BYTES or bytes(seal) != _sha256(pages) + _sha256(data[start:]):
        raise damaged(uri)


def sealed_sha256(data: bytes, uri: str) -> str:
    """The SHA-256 of a sealed Parquet file, for its record. Raises AttribError as check_parquet does."""
    check_parquet(memoryview(data), uri)
    return hashlib.sha256(data).hexdigest()


def check_footer(file: IO[bytes], num_bytes: int, uri: str) -> None:
    """As check_parquet, but of the footer alone: for readers of a few pages, which have checksums of their own.

    num_bytes: size of the file.
    """
    end = _read(file, max(num_bytes - END_BYTES, 0), END_BYTES)
    start = num_bytes - END_BYTES - int.from_bytes(end[:4], "little")
    if start < DIGEST_BYTES:
        raise damaged(uri)
    found = _read(file, start - DIGEST_BYTES, num_bytes - start + DIGEST_BYTES)
    if found[:DIGEST_BYTES] != _sha256(found[DIGEST_BYTES:]):
        raise damaged(uri)


def sealed(data: bytes | memoryview) -> bytes:
    return b"".join([data, _sha256(data)])


def opened(data: bytes, uri: str, remade_without: str = "") -> memoryview:
    """What was sealed. Raises AttribError, which names the file, unless all of it is there.

    remade_without: what the user deletes so that the file is made again, unless it is the file itself.
    """
    content, digest = memoryview(data)[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if digest != _sha256(content):
        raise damaged(uri, remade_without)
    return content


def damaged(uri: str, remade_without: str = "") -> AttribError:
    return AttribError(
        f"{uri} is damaged: its checksum differs. It is of a run that did not end; delete "
        f"{remade_without or 'this file'} and run the job again, which makes it again"
    )


def _footer_start(data: memoryview) -> int:
    return len(data) - END_BYTES - int.from_bytes(data[-END_BYTES:-4], "little")


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _read(file: IO[bytes], start: int, num_bytes: int) -> bytes:
    file.seek(start)
    return bytes(file.read(num_bytes))
