"""Run a stage in its own process and measure its memory as reported by the operating system.

`python -m support.memory NAME JSON` prints the result of the function NAME of this module as JSON, with peak memory.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.001


def measure(name: str, **sizes) -> dict:
    """Result of a function of this module, with its peaks `peak_bytes` and `anonymous_bytes` (no mapped files)."""
    child = subprocess.Popen(
        [sys.executable, "-m", "support.memory", name, json.dumps(sizes)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    anonymous_bytes = 0
    child.stdout.readline()  # before that line it may still be a fork of this process
    while child.poll() is None:
        # Measured from outside: a thread inside would be blocked while NumPy holds the GIL.
        anonymous_bytes = max(anonymous_bytes, _status(child.pid).get("RssAnon", 0))
        time.sleep(POLL_SECONDS)
    assert child.returncode == 0
    result = json.loads(child.stdout.read().splitlines()[-1])
    return result | {"anonymous_bytes": anonymous_bytes}


def _status(pid: int) -> dict[str, int]:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM") if name in fields}


def folder_bytes(folder) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _start() -> dict:
    """Memory of the imported libraries, to compare with the baseline of the estimate."""
    from attrib.runtime.machine import baseline_bytes

    print("started", flush=True)
    return {"baseline_bytes": baseline_bytes(), "baseline_anonymous_bytes": _status(os.getpid())["RssAnon"]}


def _embedding(folder: str, backbone: str, num_images: int, chunk_rows: int):
    import pyarrow as pa

    from attrib.common.settings import StorageSettings
    from attrib.common.storage import Storage
    from attrib.data.collections import list_images, list_units
    from attrib.data.manifest import Manifest, part_name
    from attrib.data.settings import CollectionSettings
    from attrib.embed.settings import EmbedSettings
    from attrib.models.encoder import load_encoder
    from attrib.models.settings import BackboneSettings

    storage = Storage(StorageSettings())
    collection = CollectionSettings(name="c", uri=f"{folder}/images")
    images = pa.concat_tables([list_images(unit, collection, storage) for unit in list_units(collection, storage)])
    manifest = Manifest(f"{folder}/manifest", collection, "", "", "", [num_images], [])
    storage.write_table(f"{folder}/manifest/{part_name(0)}", images.slice(0, num_images))
    settings = EmbedSettings(
        manifest=manifest.uri,
        output=f"{folder}/out",
        backbone=BackboneSettings(name=backbone, weights="random"),
        chunk_rows=chunk_rows,
    )
    return manifest, settings, load_encoder(settings.backbone, storage), storage


def probe(folder: str, backbone: str, num_images: int, chunk_rows: int) -> dict:
    """The probe that the driver of the embed job runs."""
    import torch  # noqa: F401, so that its libraries are in the baseline

    from attrib.embed import encode  # noqa: F401
    from attrib.embed.estimate import probe_encoder

    _start()
    manifest, settings, encoder, storage = _embedding(folder, backbone, num_images, chunk_rows)
    return probe_encoder(encoder, manifest, settings, storage).__dict__ | {"dimension": encoder.identity.dimension}


def embed(folder: str, backbone: str, num_images: int, chunk_rows: int, output: str) -> dict:
    """Encode chunks like a worker of the embed job, and assemble the partition."""
    import torch

    from attrib.data.chunks import plan_chunks, publish_partition
    from attrib.embed import encode

    torch.set_num_threads(1)
    found = _start()
    manifest, settings, encoder, storage = _embedding(folder, backbone, num_images, chunk_rows)
    output = f"{folder}/{output}"
    rows = storage.read_table(manifest.partition_uri(0))
    chunks = plan_chunks(num_images, 0, chunk_rows)
    for chunk in chunks:
        images = rows.slice(chunk.start, chunk.stop - chunk.start)
        prepared = encode.prepare_images(images, manifest, encoder.preprocessing, settings, storage)
        storage.write_table(chunk.uri(output), encode.encode_chunk(prepared, encoder))
    found["chunks_on_disk"] = folder_bytes(output)
    publish_partition(f"{output}/part-00000.parquet", output, 0, num_images, chunk_rows, storage)
    found["partition_on_disk"] = os.path.getsize(f"{output}/part-00000.parquet")
    return found


def template(num_lists: int, dimension: int):
    """A coarse quantizer with random centroids: its memory does not depend on training."""
    import faiss
    import numpy as np

    centroids = np.random.default_rng(7).standard_normal((num_lists, dimension)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    quantizer = faiss.IndexFlatL2(dimension)
    quantizer.add(centroids)
    index = faiss.IndexIVFFlat(quantizer, dimension, num_lists, faiss.METRIC_L2)
    index.own_fields = True
    quantizer.this.disown()
    index.is_trained = True
    return index


def build(folder: str, dimension: int, num_lists: int, partitions: list[int]) -> dict:
    """Build one shard from the embeddings in `folder`, like a task of the index job."""
    import pyarrow as pa

    from attrib.embed.embeddings import Embeddings
    from attrib.index.index import QUANTIZER_FILE
    from attrib.index.quantizer import read_quantizer
    from attrib.index.shard import build_shard, shard_name
    from support.shards import STORAGE

    found = _start()
    uris = [f"{folder}/manifest/part-{p:05d}.parquet" for p in range(len(partitions))]
    embeddings = Embeddings(f"{folder}/embeddings", "m", {"dimension": dimension}, "d", partitions, partitions)
    sources = pa.concat_tables([STORAGE.read_table(uri, columns=["id", "key", "uri", "owner"]) for uri in uris])
    template = read_quantizer(f"{folder}/{QUANTIZER_FILE}", STORAGE) if num_lists else None
    build_shard(
        f"{folder}/{shard_name(0)}", embeddings, list(range(len(partitions))), template,
        sources.sort_by("id").combine_chunks(), STORAGE,
    )  # fmt: skip
    return found


def search(folder: str, num_queries: int, dimension: int, k: int, nprobe: int) -> dict:
    """Search a block of queries in the shard in `folder`, like a task of the attribute job. nprobe 0: exact search."""
    import faiss

    from attrib.attribute.blocks import partial_table, partial_uri, read_block
    from attrib.data.manifest import Slice
    from attrib.embed.embeddings import Embeddings
    from attrib.index.index import QUANTIZER_FILE
    from attrib.index.quantizer import read_quantizer
    from attrib.index.search import search_shard
    from attrib.index.shard import SHARD_RECORD, open_shard, shard_name
    from support.shards import STORAGE

    faiss.omp_set_num_threads(1)
    found = _start()
    rows, uri = [num_queries], f"{folder}/{shard_name(0)}"
    embeddings = Embeddings(f"{folder}/queries/embeddings", "m", {"dimension": dimension}, "d", rows, rows)
    template = read_quantizer(f"{folder}/{QUANTIZER_FILE}", STORAGE) if nprobe else None
    shard = open_shard(uri, STORAGE.read_json(f"{uri}/{SHARD_RECORD}"), STORAGE, folder, template)
    ids, queries = read_block(embeddings, [Slice(0, 0, num_queries)], STORAGE)
    candidates = search_shard(shard, queries, k, k, nprobe, False)
    STORAGE.write_table(partial_uri(f"{folder}/run", 0, 0), partial_table(candidates, ids))
    return found


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    # Measured before the interpreter exits, since its shutdown touches unused memory.
    print(json.dumps(result | {"peak_bytes": _status(os.getpid())["VmHWM"]}))
