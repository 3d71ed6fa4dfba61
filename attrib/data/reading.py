"""Read the encoded bytes of images from files, tar shards and Parquet files; errors are kept per image."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from attrib.common.errors import ImageError, first_line
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, is_remote
from attrib.data.manifest import Manifest
from attrib.data.parquet_files import read_column
from attrib.data.places import GONE, check_allowed, open_file
from attrib.data.settings import CollectionSettings


def read_image(row: dict[str, Any], storage: Storage, collection: CollectionSettings | None = None) -> bytes:
    """Return the encoded bytes of an image that is a whole file or a byte range.

    collection: limits what may be read, to its allowed_roots if it has a URI column and to max_image_bytes. Raises
    ImageError (stage "read").
    """
    scheme, separator, _ = row["uri"].partition("://")
    if separator and not is_remote(row["uri"]):
        raise ImageError("read", f"{scheme}:// is not supported; use a local path or s3://")
    try:
        uri = check_allowed(row["uri"], collection, storage) if collection and collection.uri_column else row["uri"]
        with open_file(uri, storage) as opened:
            opened.check_version(row.get("listed_version"))
            num_bytes = opened.num_bytes if row["offset"] is None else row["num_bytes"]
            limit = collection.max_image_bytes if collection else num_bytes
            if num_bytes > limit:
                raise ImageError("read", f"larger than collection.max_image_bytes = {limit:,}")
            opened.file.seek(row["offset"] or 0)
            # One byte more than the size: some files of the kernel say that they are empty.
            data = bytes(opened.file.read(num_bytes if row["offset"] is not None else num_bytes + 1))
    except FileNotFoundError:
        raise ImageError("read", GONE) from None
    except ImageError:
        raise
    except Exception as error:  # clients of object stores raise many exception types
        raise ImageError("read", first_line(error)) from error
    if len(data) < num_bytes:
        raise ImageError("read", f"the shard ends early: {len(data)} of {num_bytes} bytes")
    if len(data) > num_bytes:
        raise ImageError("read", "the file grows while it is read")
    return data


def read_image_or_error(
    row: dict[str, Any], storage: Storage, collection: CollectionSettings | None = None
) -> bytes | ImageError:
    """Return what `read_image` returns, or its ImageError as a value."""
    try:
        return read_image(row, storage, collection)
    except ImageError as error:
        return error


def read_parquet_images(
    rows: list[dict[str, Any]], bytes_column: str, storage: Storage
) -> Iterator[bytes | ImageError]:
    """Yield the encoded bytes, or the ImageError, of each row that lies inside a Parquet file."""
    for row in rows:
        found: bytes | ImageError
        try:
            place = row["uri"], row.get("listed_version"), row["row_group"]
            column = _read_row_group(storage.settings, *place, bytes_column)
            value = column[row["row"]].as_py() if row["row"] < len(column) else None
            found = ImageError("read", "the row holds no bytes") if value is None else value
        except FileNotFoundError:
            found = ImageError("read", GONE)
        except ImageError as error:
            found = error
        except Exception as error:  # damaged files and object stores raise many exception types
            found = ImageError("read", first_line(error))
        yield found


@lru_cache(maxsize=1)  # the next chunk of a worker often lies in the same row group of thousands of images
def _read_row_group(
    storage: StorageSettings, uri: str, listed_version: str | None, row_group: int, column: str
) -> pa.ChunkedArray:
    with open_file(uri, Storage(storage)) as opened:
        opened.check_version(listed_version)
        return read_column(opened.file, row_group, column)


def accept_repaired(images: pa.Table) -> pa.Table:
    """Return manifest rows whose whole files may have changed since they were listed, for a retry of failed images.

    In a shard that changed, a place may hold another image, so that it is still compared.
    """
    is_file = pc.and_(images["offset"].is_null(), images["row_group"].is_null())
    versions = pc.if_else(is_file, pa.scalar(None, pa.string()), images["listed_version"])
    return images.set_column(images.schema.get_field_index("listed_version"), "listed_version", versions)


def read_all(
    rows: list[dict[str, Any]], manifest: Manifest, io_threads: int, storage: Storage
) -> Iterator[bytes | ImageError]:
    """Yield the encoded bytes, or the ImageError, of manifest rows (LOCATION_FIELDS), in their order."""
    collection = manifest.collection
    if collection.bytes_column:
        yield from read_parquet_images(rows, collection.bytes_column, storage)
        return
    if not any(is_remote(row["uri"]) for row in rows):
        # The operating system reads local files ahead; threads would only compete with the decoder.
        yield from (read_image_or_error(row, storage, collection) for row in rows)
        return

    with ThreadPoolExecutor(io_threads) as pool:
        # Read ahead a window and not the whole chunk: encoded originals can be large.
        window = 2 * io_threads
        pending = deque(pool.submit(read_image_or_error, row, storage, collection) for row in rows[:window])
        for i in range(len(rows)):
            yield pending.popleft().result()
            if i + window < len(rows):
                pending.append(pool.submit(read_image_or_error, rows[i + window], storage, collection))
