"""What the fuzz tier reads of the files that jobs write: records, tables, arrays, weights, quantizers."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from attrib.common.json_records import with_checksum
from attrib.common.run_record import STARTED, finished, run_identity
from attrib.common.storage import bytes_sha256
from attrib.data.manifest import MANIFEST_RECORD, open_manifest
from attrib.data.settings import ManifestSettings
from attrib.embed.embeddings import EMBEDDINGS_RECORD, open_embeddings, schema
from attrib.evaluate.mappers import load_mappers
from attrib.generators.fingerprints.discriminant import Discriminant, load_discriminant, save_discriminant
from attrib.generators.registry.registry import open_registry
from attrib.generators.synthesis.pool import CARD_KEY, open_pool, read_card
from attrib.index.index import INDEX_RECORD, open_index
from attrib.index.planning import IndexPlan
from attrib.index.quantizer import read_quantizer, record_uri, train_quantizer, trained_sha256
from attrib.index.shard import SHARD_RECORD, finished_shard, open_shard
from attrib.train.view_features import COLUMNS, ViewFeatures, read_chunks, write_chunk
from support.files import LOCAL
from support.fuzz import Target
from support.mutations import change_json

SETTINGS = ManifestSettings(collection={"name": "c", "uri": "/images", "format": "webdataset"}, output="/manifest")
POOL, REGISTRY = "pool.json", "registry.json"
DIMENSION = 8
INPUTS = {"files": "e" * 64}


def _plan() -> IndexPlan:
    return IndexPlan("ivf_flat", 4, 0, 1, 0, 0, 0, "a test")


def _records() -> dict[str, bytes]:
    run = {"identity": run_identity(SETTINGS, INPUTS), "inputs": INPUTS, "written_at": "2026-11-30T20:00:00+00:00"}
    run |= {"settings": SETTINGS.model_dump(mode="json"), "versions": {"python": "3.11"}}
    files = {name: {"sha256": "f" * 64, "num_bytes": 0} for name in ("ids.npy", "vectors.npy")}
    shard = {"num_vectors": 3, "partitions": [0], "files": files, "sources_sha256": "f" * 64}
    encoder = {"name": "tiny", "model_digest": "d" * 64, "preprocessing": {"crop_px": 8}, "dimension": DIMENSION}
    digests = {"digest": "a" * 64, "order_digest": "b" * 64, "rows_digest": "c" * 64, "sha256": ["f" * 64]}
    index = {"digest": "a" * 64, "encoder": encoder, "shards": [shard], "plan": asdict(_plan()), "nprobe": 4}
    index |= {"recall": {"k": 1}, "metadata_columns": [], "vectors_fit": True, "rates": {"scan": 1.0}}
    spec = {"num_blocks": 1, "convs_per_block": 1, "upsampler": "nearest", "activation": "relu", "norm": "none"}
    model = {"model_id": "m000", "spec": spec | {"order": "conv_norm_act"}, "seed": 0, "loss": 0.1, "num_steps": 1}
    entry = {"name": "g", "version": 1, "role": "generator", "source_sizes": [10], "codecs": {"PNG": 10}}
    entry |= {"sides_px": [48, 48], "sha256": "a" * 64, "registered_at": run["written_at"]}
    found = {
        MANIFEST_RECORD: run | digests | {"num_rows": [3], "metadata_columns": ["owner"]},
        STARTED: run,
        EMBEDDINGS_RECORD: run
        | {"settings": {"manifest": "/m"}, "encoder": encoder, "digest": "e" * 64, "num_rows": [3]}
        | {"num_embedded": [2], "sha256": ["f" * 64]},
        INDEX_RECORD: run | index | {"template_sha256": "b" * 64, "settings": {"rerank_factor": 4}},
        SHARD_RECORD: shard,
        "template.json": {"sha256": bytes_sha256(b"template")},
        POOL: {
            "models": [model | {"samples_sha256": "a" * 64}],
            "settings": {"px": 16, "num_photographs": 4},
            "digest": "b" * 64,
        },
        REGISTRY: {
            "method": {"name": "log-spectrum", "uri": "/method"},
            "method_digest": "c" * 64,
            "degradations": ["none"],
            "entries": [entry],
            "generation": 1,
        },
    }
    return {name: json.dumps(with_checksum(record), indent=1).encode() for name, record in found.items()}


def _read_record(name: str, data: bytes, folder: Path) -> None:
    uri = str(folder)
    (folder / name).write_bytes(data)
    if name == MANIFEST_RECORD:
        open_manifest(uri, LOCAL)
    if name in (MANIFEST_RECORD, STARTED):
        finished(SETTINGS.model_copy(update={"output": uri}), MANIFEST_RECORD, INPUTS, LOCAL)
    elif name == EMBEDDINGS_RECORD:
        open_embeddings(uri, LOCAL)
    elif name == INDEX_RECORD:
        open_index(uri, LOCAL)
    elif name == SHARD_RECORD:
        for file in ("ids.npy", "vectors.npy", "sources.parquet"):
            (folder / file).touch()
        finished_shard(uri, LOCAL)
    elif name == "template.json":
        (folder / "template.faiss").write_bytes(b"template")
        assert record_uri(str(folder / "template.faiss")) == str(folder / name)
        trained_sha256(str(folder / "template.faiss"), LOCAL)
    elif name == POOL:
        open_pool(uri, LOCAL)
    else:
        open_registry(uri, LOCAL)


def _tables() -> dict[str, bytes]:
    """Tables with checksums of their pages, and arrays."""
    vectors = np.random.default_rng(0).standard_normal((300, DIMENSION)).astype(np.float16)
    kind = schema(DIMENSION).field("embedding").type
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind)
    table = pa.table({"id": np.arange(300), "key": [f"{i % 7}.png" for i in range(300)], "embedding": embedding})
    return {
        "rows.parquet": _written("rows.parquet", lambda uri: LOCAL.write_table(uri, table, row_group_rows=100)),
        "empty.parquet": _written("empty.parquet", lambda uri: LOCAL.write_table(uri, table.slice(0, 0))),
        "vectors.npy": _written("vectors.npy", lambda uri: LOCAL.write_array(uri, vectors)),
        "ids.npy": _written("ids.npy", lambda uri: LOCAL.write_array(uri, np.arange(40))),
    }


def _written(name: str, write) -> bytes:
    with TemporaryDirectory() as folder:
        write(str(Path(folder) / name))
        return (Path(folder) / name).read_bytes()


def _read_table(name: str, data: bytes, folder: Path) -> None:
    uri = str(folder / name)
    (folder / name).write_bytes(data)
    if name.endswith(".npy"):
        assert LOCAL.read_array(uri).dtype.kind in "biufc"
        return
    LOCAL.read_table(uri)
    if name != "empty.parquet":
        LOCAL.read_rows(uri, 90, 110, ["id", "embedding"])


def _weights() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    layers = {f"{domain}_mapper.weight": rng.standard_normal((3, 4)) for domain in ("real", "synth")}
    layers |= {f"{domain}_mapper.bias": np.zeros(3) for domain in ("real", "synth")}
    chunk = ViewFeatures(*(np.arange(6).reshape(6, 1) for _ in COLUMNS), failures=[{"id": 1, "reason": "x"}])
    discriminant = Discriminant(rng.standard_normal(4), rng.standard_normal((4, 2)), 0.5)
    card = json.loads(_records()[POOL])["models"][0]
    return {
        "mapper.safetensors": save(layers),
        "chunk.sealed": _written("chunk.sealed", lambda uri: write_chunk(uri, chunk, LOCAL)),
        "m000.safetensors": save({"w": np.zeros(3)}, metadata={CARD_KEY: json.dumps(card)}),
        "lda.safetensors": _written(
            "lda.safetensors", lambda uri: save_discriminant(discriminant, {"bins": 8}, uri, LOCAL)
        ),
    }


def _read_weights(name: str, data: bytes, folder: Path) -> None:
    place = folder / "models" / name
    place.parent.mkdir()
    place.write_bytes(data)
    if name.startswith("mapper"):
        load_mappers(str(place), LOCAL)
    elif name.startswith("chunk"):
        read_chunks([str(place)], LOCAL)
    elif name.startswith("lda"):
        load_discriminant(str(place), LOCAL)
    else:
        read_card(str(folder), "m000", LOCAL)


QUANTIZER, SHARD_ARRAYS = "template.faiss", ("ids.npy", "vectors.npy", "inverse_norms.npy")


@cache
def _checked() -> dict[str, bytes]:
    """Files whose checksum is in a record."""
    vectors = np.random.default_rng(0).standard_normal((40, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    quantizer = faiss.serialize_index(train_quantizer(vectors, _plan(), 0)).tobytes()
    return {QUANTIZER: quantizer, "ids.npy": _tables()["ids.npy"]}


def _read_checked(name: str, data: bytes, folder: Path) -> None:
    whole, uri = _checked()[name], str(folder)
    for array in SHARD_ARRAYS:
        (folder / array).write_bytes(whole)
    (folder / name).write_bytes(data)
    if name == QUANTIZER:
        read_quantizer(str(folder / name), LOCAL, bytes_sha256(whole))
    else:
        record = {"files": {array: {"sha256": bytes_sha256(whole)} for array in SHARD_ARRAYS}}
        open_shard(uri, record, LOCAL, uri)
    assert data == whole


RECORD_TARGETS = {
    "record": Target(_records, _read_record, change=change_json, weight=3),
    "table or array": Target(_tables, _read_table, weight=3),
    "weights": Target(_weights, _read_weights, weight=2),
    "file with checksum": Target(_checked, _read_checked),
}
