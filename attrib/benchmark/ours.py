"""The library's own build and search as the benchmark calls them, and nothing else of them."""

import json
import os

import numpy as np
import pyarrow as pa

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.data.manifest import open_manifest
from attrib.embed.embeddings import open_embeddings
from attrib.index.normalize import unit_rows
from attrib.index.planning import IndexPlan, plan_index, training_rows
from attrib.index.quantizer import read_quantizer, train_quantizer, write_quantizer
from attrib.index.search import Candidates, search_shard
from attrib.index.settings import IndexSettings
from attrib.index.shard import Shard, build_shard, open_shard

STORAGE = Storage(StorageSettings())


def ivf_plan(num_vectors: int, dimension: int) -> tuple[IndexPlan, int]:
    """What the planner would build of as many vectors, were it asked for IVF, and the vectors that it would train on."""
    settings = IndexSettings(embeddings="benchmark", output="benchmark", kind="ivf_flat", worker_memory_gib=1e6)
    plan = plan_index(settings, num_vectors, [num_vectors], dimension)
    return plan, min(num_vectors, training_rows(settings, plan))


def train(vectors: np.ndarray, template: str) -> int:
    """Write the template of `vectors`, float16 [n, d] in random order; the number of its lists."""
    plan, num_training = ivf_plan(*vectors.shape)
    write_quantizer(train_quantizer(unit_rows(vectors[:num_training]), plan, seed=0), template, STORAGE)
    return plan.num_lists


def build(embeddings_uri: str, template: str, folder: str, partitions: list[int] | None = None) -> None:
    """One shard of some partitions, by default of all."""
    embeddings = open_embeddings(embeddings_uri, STORAGE)
    manifest = open_manifest(embeddings.manifest_uri, STORAGE)
    partitions = partitions or list(range(len(embeddings.num_rows)))
    parts = [STORAGE.read_table(manifest.partition_uri(p), columns=["id", "key", "uri"]) for p in partitions]
    sources = pa.concat_tables(parts).sort_by("id").combine_chunks()
    build_shard(folder, embeddings, partitions, read_quantizer(template, STORAGE), sources, STORAGE)


def open_built(folder: str, template: str) -> Shard:
    with open(os.path.join(folder, "shard.json"), encoding="utf-8") as file:
        return open_shard(folder, json.load(file), STORAGE, folder, read_quantizer(template, STORAGE))


def search(shard: Shard, queries: np.ndarray, k: int, nprobe: int) -> Candidates:
    """queries: unit float32 [n, d]."""
    return search_shard(shard, queries, k, k, nprobe, compressed=False)
