"""Read the encoded bytes of images from files, tar shards and Parquet files; errors are kept per image."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attrib.common.errors import ImageError, first_line
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, is_remote
from attrib.data.manifest import Manifest


def read_image(row: dict[str, Any], storage: Storage) -> bytes:
    """Return the encoded bytes of an image that is a whole file or a byte range. Raises ImageError (stage "read")."""
    scheme, separator, _ = row["uri"].partition("://")
    if separator and not is_remote(row["uri"]):
        raise ImageError("read", f"{scheme}:// is not supported; use a local path or s3://")
    try:
        with storage.open(row["uri"]) as file:
            if row["offset"] is None:
                return bytes(file.read())
            data = bytes(file.read_at(row["num_bytes"], row["offset"]))
    except FileNotFoundError:
        raise ImageError("read", "the file is gone since it was listed") from None
    except Exception as error:  # clients of object stores raise many exception types
        raise ImageError("read", first_line(error)) from error
    if len(data) != row["num_bytes"]:
        raise ImageError("read", f"the shard ends early: {len(data)} of {row['num_bytes']} bytes")
    return data


def read_image_or_error(row: dict[str, Any], storage: Storage) -> bytes | ImageError:
    """Return what `read_image` returns, or its ImageError as a value."""
    try:
        return read_image(row, storage)
    except ImageError as error:
        return error


def read_parquet_images(
    rows: list[dict[str, Any]], bytes_column: str, storage: Storage
) -> Iterator[bytes | ImageError]:
    """Yield the encoded bytes, or the ImageError, of each row that lies inside a Parquet file."""
    for row in rows:
        found: bytes | ImageError
        try:
            column = _read_row_group(storage.settings, row["uri"], row["row_group"], bytes_column)
            value = column[row["row"]].as_py() if row["row"] < len(column) else None
            found = ImageError("read", "the row holds no bytes") if value is None else value
        except FileNotFoundError:
            found = ImageError("read", "the file is gone since it was listed")
        except Exception as error:  # damaged files and object stores raise many exception types
            found = ImageError("read", first_line(error))
        yield found


@lru_cache(maxsize=1)  # the next chunk of a worker often lies in the same row group of thousands of images
def _read_row_group(storage: StorageSettings, uri: str, row_group: int, column: str) -> pa.ChunkedArray:
    with Storage(storage).open(uri) as source:
        return pq.ParquetFile(source).read_row_group(row_group, columns=[column]).column(0)


def read_all(
    rows: list[dict[str, Any]], manifest: Manifest, io_threads: int, storage: Storage
) -> Iterator[bytes | ImageError]:
    """Yield the encoded bytes, or the ImageError, of manifest rows (LOCATION_FIELDS), in their order."""
    if manifest.collection.bytes_column:
        yield from read_parquet_images(rows, manifest.collection.bytes_column, storage)
        return
    if not any(is_remote(row["uri"]) for row in rows):
        # The operating system reads local files ahead; threads would only compete with the decoder.
        yield from (read_image_or_error(row, storage) for row in rows)
        return

    with ThreadPoolExecutor(io_threads) as pool:
        # Read ahead a window and not the whole chunk: encoded originals can be large.
        window = 2 * io_threads
        pending = deque(pool.submit(read_image_or_error, row, storage) for row in rows[:window])
        for i in range(len(rows)):
            yield pending.popleft().result()
            if i + window < len(rows):
                pending.append(pool.submit(read_image_or_error, rows[i + window], storage))
