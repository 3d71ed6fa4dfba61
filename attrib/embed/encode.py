"""Embed a chunk of images: read, decode, resize and encode it, with one result row per image."""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from attrib.common.errors import ImageError
from attrib.common.storage import Storage
from attrib.data.collections import LOCATION_FIELDS
from attrib.data.fatal_images import without_fatal
from attrib.data.manifest import Manifest
from attrib.data.reading import read_all
from attrib.embed.embeddings import RESULT_FIELDS, schema
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import ImageEncoder
from attrib.models.preprocessing import Preprocessing

# What float16 may change, of the length of a vector: 2^-11 at most, but below 2^-14 its numbers have fewer digits.
MAX_ROUNDING = 2.0**-10
PLACE_COLUMNS = [field.name for field in LOCATION_FIELDS if field.name != "key"]


@dataclass
class PreparedChunk:
    """A chunk of decoded and resized images."""

    results: pa.Table  # RESULT_FIELDS, one row per image
    pixels: np.ndarray  # uint8 [m, 3, h, w] of the m images that did not fail, in the order of the rows

    def to_row(self) -> dict:
        """Return the chunk as plain bytes, so that Ray Data needs no schema for it."""
        sink = pa.BufferOutputStream()
        with ipc.new_stream(sink, self.results.schema) as writer:
            writer.write_table(self.results)
        results = sink.getvalue().to_pybytes()
        return {"results": results, "pixels": self.pixels.tobytes(), "shape": list(self.pixels.shape)}

    @classmethod
    def from_row(cls, row: dict) -> "PreparedChunk":
        pixels = np.frombuffer(bytearray(row["pixels"]), np.uint8).reshape(tuple(row["shape"]))
        return cls(ipc.open_stream(row["results"]).read_all(), pixels)


def prepare_images(
    images: pa.Table, manifest: Manifest, preprocessing: Preprocessing, settings: EmbedSettings, storage: Storage
) -> PreparedChunk:
    """Read, decode and resize the images of manifest rows; a failure becomes the stage and reason of its row."""
    rows = images.select([n for n in PLACE_COLUMNS if n in images.schema.names]).to_pylist()
    # One allocation: many small arrays between the large buffers of the decoder would fragment the memory.
    pixels = np.empty((len(rows), 3, preprocessing.crop_px, preprocessing.crop_px), np.uint8)
    results, num_decoded = [], 0
    encoded = read_all(rows, manifest, settings.io_threads, storage)
    for row, data in zip(rows, without_fatal(rows, encoded, settings.output, settings.max_megapixels)):
        result = {"id": row["id"]}
        results.append(result)
        try:
            if isinstance(data, ImageError):
                raise data
            result["content_sha256"] = sha256(data).digest()
            image = preprocessing.decode(data, max_megapixels=settings.max_megapixels)
            result |= {"width": image.width, "height": image.height, "format": image.format}
            pixels[num_decoded] = preprocessing.resize_and_crop(image).numpy()
            num_decoded += 1
        except ImageError as error:
            result |= {"stage": error.stage, "reason": error.reason}
    return PreparedChunk(pa.Table.from_pylist(results, schema=pa.schema(RESULT_FIELDS)), pixels[:num_decoded])


def encode_chunk(prepared: PreparedChunk, encoder: ImageEncoder) -> pa.Table:
    """Return the rows (`schema`) of a chunk. An image fails if its vector is zero or float16 cannot hold it."""
    vectors = encoder.encode(prepared.pixels)
    with np.errstate(over="ignore", invalid="ignore"):
        halves = vectors.astype(np.float16)
        rounding = np.linalg.norm(halves - vectors, axis=1)
        lengths = np.linalg.norm(vectors, axis=1)
    reasons = np.select(
        [~np.isfinite(halves).all(axis=1), lengths == 0, rounding > MAX_ROUNDING * lengths],
        ["the embedding is not finite in float16", "the embedding is zero", "the embedding is too small for float16"],
        "",
    )
    usable = reasons == ""
    results, fields = prepared.results, schema(encoder.identity.dimension)
    decoded = np.flatnonzero(results["stage"].is_null().to_numpy())
    stage, reason = results["stage"].to_pylist(), results["reason"].to_pylist()
    for position, found in zip(decoded[~usable], reasons[~usable]):
        stage[position], reason[position] = "embed", str(found)
    table = np.zeros((len(results), encoder.identity.dimension), np.float16)
    table[decoded[usable]] = halves[usable]
    failures = [pa.array(stage, pa.string()), pa.array(reason, pa.string())]
    values, kind = pa.array(table.ravel()), fields.field("embedding").type
    embedding = pa.FixedSizeListArray.from_arrays(values, type=kind, mask=failures[0].is_valid())
    return pa.table([*results.columns[:5], *failures, embedding], schema=fields)
