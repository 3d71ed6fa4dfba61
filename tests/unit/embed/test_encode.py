"""Chunks: their rows, and failures of images and of vectors."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import save_file
from support.embedding import BACKBONE, LOCAL, settings_of
from support.images import pictures, write_folder

from attrib.data.chunks import failures_of, plan_chunks
from attrib.data.collections import list_images, list_units
from attrib.data.manifest import Manifest
from attrib.data.settings import CollectionSettings
from attrib.embed.embeddings import RESULT_FIELDS
from attrib.embed.encode import PreparedChunk, encode_chunk, prepare_images
from attrib.models.encoder import load_encoder
from attrib.models.settings import BackboneSettings


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e4, "the embedding is not finite in float16"), (0, "the embedding is zero")]
)
def test_vector_that_float16_cannot_hold_is_a_failure(scale, reason, tmp_path):
    images = {f"{i}.jpg": data for i, data in enumerate(pictures(["0.jpg", "1.jpg", "2.jpg"]).values())} | {
        "3.jpg": b"broken"
    }
    write_folder(images, str(tmp_path / "images"), LOCAL)
    collection = CollectionSettings(name="c", uri=str(tmp_path / "images"))
    listed = list_images(list_units(collection, LOCAL)[0], collection, LOCAL)
    manifest = Manifest(str(tmp_path), collection, "", "", "", [4], [])
    plain = load_encoder(BackboneSettings(**BACKBONE), LOCAL, batch_size=4)
    norms = {
        k: v * scale if v.ndim == 1 and k.endswith(("weight", "bias")) else v
        for k, v in plain.model.state_dict().items()
    }
    save_file({k: v.contiguous() for k, v in norms.items()}, tmp_path / "scaled.safetensors")
    weights = str(tmp_path / "scaled.safetensors")
    scaled = load_encoder(BackboneSettings(name="test_resnet", weights=weights), LOCAL, batch_size=4)

    prepared = prepare_images(listed, manifest, plain.preprocessing, settings_of(tmp_path), LOCAL)
    prepared = PreparedChunk.from_row(prepared.to_row())  # as sent to encoders on GPUs
    assert encode_chunk(prepared, plain)["stage"].to_pylist() == [None, None, None, "decode"]
    table = encode_chunk(prepared, scaled)
    assert table["stage"].to_pylist() == ["embed", "embed", "embed", "decode"]
    assert table["reason"].to_pylist()[:3] == [reason] * 3
    assert table["embedding"].null_count == 4
    failed = failures_of(table, listed)
    assert failed.select(["key", "uri"]).to_pylist() == listed.select(["key", "uri"]).to_pylist()
    assert failed["stage"].to_pylist() == table["stage"].to_pylist()


@pytest.mark.parametrize("scale", [10.0**power for power in (-9, -8, -7, -6, -5, -4, -3, 0, 4, 5)])
def test_stored_vectors_have_the_cosines_of_the_network(scale):
    """At every scale of its vectors, or the images fail."""
    vectors = (np.abs(np.random.default_rng(0).normal(size=(8, 96))) * scale).astype(np.float32)
    results = pa.Table.from_pylist([{"id": i} for i in range(8)], schema=pa.schema(RESULT_FIELDS))
    encoder = SimpleNamespace(encode=lambda pixels: vectors, identity=SimpleNamespace(dimension=96))
    table = encode_chunk(PreparedChunk(results, np.empty((8, 3, 1, 1), np.uint8)), encoder)
    kept = np.flatnonzero(table["stage"].is_null().to_numpy())
    if not 1e-6 < scale < 1e5:
        small = "the embedding is too small for float16"
        assert table["reason"].to_pylist() == [small if scale < 1 else "the embedding is not finite in float16"] * 8
    elif 1e-4 < scale:
        assert len(kept) == 8
    stored = np.array([table["embedding"][i].as_py() for i in kept], float).reshape(-1, 96)
    assert np.allclose(cosines(stored), cosines(vectors[kept].astype(np.float64)), atol=5e-4)


def cosines(vectors: np.ndarray) -> np.ndarray:
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units @ units.T


@pytest.mark.parametrize(("num_rows", "chunk_rows"), [(0, 3), (1, 3), (3, 3), (10, 3)])
def test_chunks_cover_every_row_once(num_rows, chunk_rows):
    chunks = plan_chunks(num_rows, 7, chunk_rows)
    assert [row for c in chunks for row in range(c.start, c.stop)] == list(range(num_rows))
    assert all(c.partition == 7 and 0 < c.stop - c.start <= chunk_rows for c in chunks)
    assert len({c.uri("out") for c in chunks}) == len(chunks)
