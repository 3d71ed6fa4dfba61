"""Thumbnails of embedded images as data URIs, found through the manifest of their embed run.

A report may be made long after the run, when an original or the manifest is gone. A missing image is a reason to print in
its place, never an error.
"""

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage, join
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.decoding import decode_image
from attrib.data.manifest import Manifest, open_manifest
from attrib.data.reading import read_image_or_error, read_parquet_images
from attrib.embed.embeddings import EMBEDDINGS_RECORD

JPEG_QUALITY = 80
NUM_THREADS = 4  # each may hold one decoded original: 0.3 GB at 100 megapixels


@dataclass(frozen=True)
class Thumbnail:
    """data_uri: a JPEG as data:image/jpeg;base64,...; None if there is none, for the given reason."""

    data_uri: str | None
    reason: str | None = None


def read_thumbnails(
    embeddings_uri: str, ids: Iterable[int], thumbnail_px: int, storage: Storage
) -> dict[int, Thumbnail]:
    """One thumbnail per id of the images of an embed run.

    The longer side is at most thumbnail_px. Images are decoded under the megapixel limit of that run.
    """
    wanted = sorted(set(ids))
    try:
        settings = storage.require(join(embeddings_uri, EMBEDDINGS_RECORD), "jobs.embed")["settings"]
        manifest = open_manifest(settings["manifest"], storage)
        rows = _locations(manifest, wanted, storage)
    except (AttribError, OSError):
        return dict.fromkeys(wanted, Thumbnail(None, "the manifest is gone"))
    thumbnails = dict.fromkeys(wanted, Thumbnail(None, "not in the manifest"))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        made = pool.map(
            lambda group: _make(group, manifest, settings["max_megapixels"], thumbnail_px, storage),
            _groups(rows, manifest),
        )
        for found in made:
            thumbnails |= found
    return thumbnails


def _locations(manifest: Manifest, ids: list[int], storage: Storage) -> list[dict]:
    uris = [manifest.partition_uri(partition) for partition, num_rows in enumerate(manifest.num_rows) if num_rows]
    columns = [field.name for field in LOCATION_FIELDS]
    images = storage.dataset(uris, format="parquet").to_table(
        columns=columns, filter=pc.field("id").isin(pa.array(ids, pa.int64()))
    )
    return images.sort_by([("uri", "ascending"), ("row_group", "ascending"), ("row", "ascending")]).to_pylist()


def _groups(rows: list[dict], manifest: Manifest) -> list[list[dict]]:
    """Rows that are read together: those of one Parquet row group, which is read as a whole; files one by one."""
    if not manifest.collection.bytes_column:
        return [[row] for row in rows]
    return [list(group) for _, group in groupby(rows, key=lambda row: (row["uri"], row["row_group"]))]


def _make(
    rows: list[dict], manifest: Manifest, max_megapixels: float, thumbnail_px: int, storage: Storage
) -> dict[int, Thumbnail]:
    if manifest.collection.bytes_column:
        encoded = read_parquet_images(rows, manifest.collection.bytes_column, storage)
    else:
        encoded = [read_image_or_error(row, storage) for row in rows]
    return {row["id"]: _thumbnail(data, max_megapixels, thumbnail_px) for row, data in zip(rows, encoded)}


def _thumbnail(data: bytes | ImageError, max_megapixels: float, thumbnail_px: int) -> Thumbnail:
    try:
        if isinstance(data, ImageError):
            raise data
        decoded = decode_image(data, max_megapixels=max_megapixels)
    except ImageError as error:
        return Thumbnail(None, error.reason)
    image = Image.fromarray(np.ascontiguousarray(decoded.pixels.permute(1, 2, 0).numpy()))
    image.thumbnail((thumbnail_px, thumbnail_px), reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return Thumbnail("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
