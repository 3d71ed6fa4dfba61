"""From manifest rows to vectors: read, decode and resize a chunk of images, encode it, and keep one outcome per image."""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from attrib.common.errors import ImageError
from attrib.common.storage import Storage
from attrib.data.manifest import Manifest
from attrib.data.reading import read_all
from attrib.embed.embeddings import RESULT_FIELDS, schema
from attrib.embed.settings import EmbedSettings
from attrib.models.encoder import ImageEncoder
from attrib.models.preprocessing import Preprocessing


@dataclass
class PreparedChunk:
    """outcomes: one row per image (RESULT_FIELDS); pixels: uint8 [m, 3, h, w] of the m rows without a failure, in their order."""

    outcomes: pa.Table
    pixels: np.ndarray

    def to_row(self) -> dict:
        """As plain bytes, which pass between processes without a schema to agree on."""
        sink = pa.BufferOutputStream()
        with ipc.new_stream(sink, self.outcomes.schema) as writer:
            writer.write_table(self.outcomes)
        return {
            "outcomes": sink.getvalue().to_pybytes(),
            "pixels": self.pixels.tobytes(),
            "shape": list(self.pixels.shape),
        }

    @classmethod
    def from_row(cls, row: dict) -> "PreparedChunk":
        pixels = np.frombuffer(bytearray(row["pixels"]), np.uint8).reshape(tuple(row["shape"]))
        return cls(ipc.open_stream(row["outcomes"]).read_all(), pixels)


def prepare_images(
    images: pa.Table, manifest: Manifest, preprocessing: Preprocessing, settings: EmbedSettings, storage: Storage
) -> PreparedChunk:
    """Read, decode and resize the images of some manifest rows; a failure becomes its row's stage and reason."""
    rows = images.select(["id", "uri", "offset", "num_bytes", "row_group", "row"]).to_pylist()
    # In one piece: small arrays kept among the decoder's large ones would leave holes that nothing fits into.
    pixels = np.empty((len(rows), 3, preprocessing.crop_px, preprocessing.crop_px), np.uint8)
    outcomes, num_decoded = [], 0
    for row, data in zip(rows, read_all(rows, manifest, settings.io_threads, storage)):
        outcome = {"id": row["id"]}
        outcomes.append(outcome)
        try:
            if isinstance(data, ImageError):
                raise data
            outcome["content_sha256"] = sha256(data).digest()
            image = preprocessing.decode(data, max_megapixels=settings.max_megapixels)
            outcome |= {"width": image.width, "height": image.height, "format": image.format}
            pixels[num_decoded] = preprocessing.resize_and_crop(image).numpy()
            num_decoded += 1
        except ImageError as error:
            outcome |= {"stage": error.stage, "reason": error.reason}
    return PreparedChunk(pa.Table.from_pylist(outcomes, schema=pa.schema(RESULT_FIELDS)), pixels[:num_decoded])


def encode_chunk(prepared: PreparedChunk, encoder: ImageEncoder) -> pa.Table:
    """The rows of `schema` for a prepared chunk. A vector that is not finite in float16, or zero, is a failure of its image."""
    vectors = encoder.encode(prepared.pixels)
    with np.errstate(over="ignore"):
        halves = vectors.astype(np.float16)
    finite = np.isfinite(halves).all(axis=1)
    usable = finite & (halves != 0).any(axis=1)
    outcomes = prepared.outcomes
    decoded = np.flatnonzero(outcomes["stage"].is_null().to_numpy())
    stage, reason = outcomes["stage"].to_pylist(), outcomes["reason"].to_pylist()
    for position, ok in zip(decoded[~usable], finite[~usable]):
        stage[position] = "embed"
        reason[position] = "the embedding is zero" if ok else "the embedding is not finite in float16"
    table = np.zeros((len(outcomes), encoder.identity.dimension), np.float16)
    table[decoded[usable]] = halves[usable]
    absent = np.ones(len(outcomes), bool)
    absent[decoded[usable]] = False
    outcomes = outcomes.set_column(5, RESULT_FIELDS[5], pa.array(stage, pa.string()))
    outcomes = outcomes.set_column(6, RESULT_FIELDS[6], pa.array(reason, pa.string()))
    embedding = pa.FixedSizeListArray.from_arrays(
        pa.array(table.ravel()), type=pa.list_(pa.float16(), encoder.identity.dimension), mask=pa.array(absent)
    )
    return pa.table([*outcomes.columns, embedding], schema=schema(encoder.identity.dimension))
