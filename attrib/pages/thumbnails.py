"""Thumbnails of embedded images as data URIs, found through the manifest of their embed run.

A report may be made long after the run, when an image or the manifest is gone. A missing image is never an error: the
page shows the reason in its place. A damaged manifest is one.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from torchvision.transforms.v2.functional import to_pil_image

from attrib.common.errors import ImageError, MissingFileError
from attrib.common.storage import Storage, join
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.decoding import decode_image
from attrib.data.manifest import MANIFEST_RECORD, open_manifest, open_places
from attrib.data.reading import read_all
from attrib.embed.embeddings import EMBEDDINGS_RECORD

JPEG_QUALITY = 80
NUM_THREADS = 4  # that read from an object store
REDUCING_GAP = 3  # an image is reduced cheaply to this many times the size of the thumbnail, then resized


@dataclass(frozen=True)
class Thumbnail:
    """data_uri: a JPEG as data:image/jpeg;base64,...; None if there is none, for the given reason."""

    data_uri: str | None
    reason: str | None = None


def read_thumbnails(
    embeddings_uri: str,
    images: Iterable,
    thumbnail_px: int,
    storage: Storage,
    column: str = "id",
    absent: str = "not in the manifest",
) -> dict:
    """{image: Thumbnail} of images of an embed run, given by ids, or by keys with column="key".

    The longer side is at most thumbnail_px. Images are decoded under the megapixel limit of that run. absent: the
    reason for images that the manifest does not list. Raises AttribError that names a damaged record or manifest.
    """
    wanted, fields = sorted(set(images)), pa.schema(LOCATION_FIELDS)
    if not wanted:
        return {}
    gone = dict.fromkeys(wanted, Thumbnail(None, "the manifest is gone"))
    try:
        if not storage.exists(record_uri := join(embeddings_uri, EMBEDDINGS_RECORD)):
            return gone
        settings = storage.require(record_uri, "jobs.embed")["settings"]
        if not storage.exists(join(settings["manifest"], MANIFEST_RECORD)):
            return gone
        manifest = open_manifest(settings["manifest"], storage)
        uris = [
            manifest.checked_uri(partition, storage) for partition, num_rows in enumerate(manifest.num_rows) if num_rows
        ]
        is_wanted = pc.field(column).isin(pa.array(wanted, fields.field(column).type))
        table = open_places(uris, storage).to_table(filter=is_wanted)
    except (MissingFileError, OSError):
        return gone
    # A Parquet row group is read as a whole, so its images follow each other.
    rows = table.sort_by([("uri", "ascending"), ("row_group", "ascending"), ("row", "ascending")]).to_pylist()
    thumbnails = dict.fromkeys(wanted, Thumbnail(None, absent))
    for row, data in zip(rows, read_all(rows, manifest, NUM_THREADS, storage)):
        thumbnails[row[column]] = _thumbnail(data, settings["max_megapixels"], thumbnail_px)
    return thumbnails


def _thumbnail(data: bytes | ImageError, max_megapixels: float, thumbnail_px: int) -> Thumbnail:
    try:
        if isinstance(data, ImageError):
            raise data
        decoded = decode_image(data, max_megapixels=max_megapixels, min_side_px=REDUCING_GAP * thumbnail_px)
    except ImageError as error:
        return Thumbnail(None, error.reason)
    image = to_pil_image(decoded.pixels)
    image.thumbnail((thumbnail_px, thumbnail_px), reducing_gap=REDUCING_GAP)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return Thumbnail("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
