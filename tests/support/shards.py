"""Index shards on a local disk, built without a cluster, and an exact search as reference."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.embed.embeddings import Embeddings, schema
from attrib.index.index import QUANTIZER_FILE
from attrib.index.normalize import inverse_norms, to_float32, unit_rows
from attrib.index.planning import IndexPlan
from attrib.index.quantizer import read_quantizer, train_quantizer, write_quantizer
from attrib.index.shard import Shard, build_shard, open_shard, shard_name

faiss.omp_set_num_threads(1)  # for small arrays, more threads are slower

STORAGE = Storage(StorageSettings())
KINDS = ("flat", "ivf_flat", "ivf_sq8", "ivf_pq")


def clustered_vectors() -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [900] and vectors float16 [900, 40] in clusters, 30 of them equal."""
    generator = np.random.default_rng(20)
    centres = 3 * generator.standard_normal((12, 40))
    vectors = (centres[generator.integers(0, 12, 900)] + generator.standard_normal((900, 40))).astype(np.float16)
    vectors[50:80] = vectors[50]
    return generator.choice(1 << 62, 900, replace=False), vectors


def make_plan(kind: str, num_lists: int = 8, pq_bytes: int = 4) -> IndexPlan:
    return IndexPlan(kind, num_lists if kind != "flat" else 0, pq_bytes if kind == "ivf_pq" else 0, 1, 0, 0, 0, "test")


def write_embeddings(
    folder: Path, ids: np.ndarray, vectors: np.ndarray, partition_of: np.ndarray, failed: np.ndarray | None = None
) -> Embeddings:
    """Write embeddings.

    ids: int64 [n] in any order; vectors: float16 [n, d]; partition_of: int [n]; failed: bool [n], rows without vector.
    """
    failed = np.zeros(len(ids), bool) if failed is None else failed
    dimension = vectors.shape[1]
    embeddings = Embeddings(
        uri=str(folder / "embeddings"),
        manifest_uri=str(folder / "manifest"),
        encoder={"model_digest": "m", "dimension": dimension},
        digest="d",
        num_rows=np.bincount(partition_of).tolist(),
        num_embedded=np.bincount(partition_of[~failed], minlength=partition_of.max() + 1).tolist(),
    )
    for partition in range(len(embeddings.num_rows)):
        rows = np.flatnonzero(partition_of == partition)
        rows = rows[np.argsort(ids[rows])]
        columns = {
            name: pa.nulls(len(rows), kind) for name, kind in zip(schema(dimension).names, schema(dimension).types)
        }
        columns["id"] = pa.array(ids[rows])
        columns["stage"] = pa.array(["decode" if f else None for f in failed[rows]], pa.string())
        columns["reason"] = pa.array(["cut off" if f else None for f in failed[rows]], pa.string())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors[rows].ravel()), type=pa.list_(pa.float16(), dimension), mask=pa.array(failed[rows])
        )
        STORAGE.write_table(embeddings.part_uri(partition), pa.table(list(columns.values()), schema=schema(dimension)))
    return embeddings


def make_sources(ids: np.ndarray) -> pa.Table:
    ids = np.sort(ids)
    return pa.table(
        {
            "id": ids,
            "key": [f"{i}.jpg" for i in ids],
            "uri": [f"/sources/{i}.jpg" for i in ids],
            "owner": [None if i % 3 == 0 else f"owner {i % 5}" for i in ids],
        }
    )


def make_index(
    folder: Path,
    ids: np.ndarray,
    vectors: np.ndarray,
    plan: IndexPlan,
    partition_of: np.ndarray,
    groups: list[list[int]] | None = None,
    failed: np.ndarray | None = None,
) -> list[dict]:
    """Build shards in `folder` and return their records. groups: partitions of each shard; None: one shard each."""
    embeddings = write_embeddings(folder, ids, vectors, partition_of, failed)
    template = None
    if plan.kind != "flat":
        # Sorted by id, so that the coarse quantizer does not depend on the order of the vectors in a test.
        template = train_quantizer(unit_rows(vectors[np.argsort(ids)]), plan, 0)
        write_quantizer(template, str(folder / QUANTIZER_FILE), STORAGE)
    groups = groups or [[partition] for partition in range(len(embeddings.num_rows))]
    return [
        build_shard(str(folder / shard_name(i)), embeddings, group, template, make_sources(ids), STORAGE)
        for i, group in enumerate(groups)
    ]


def open_index_shards(folder: Path, records: list[dict]) -> list[Shard]:
    has_lists = (folder / QUANTIZER_FILE).exists()
    template = read_quantizer(str(folder / QUANTIZER_FILE), STORAGE) if has_lists else None
    uris = [str(folder / shard_name(i)) for i in range(len(records))]
    return [open_shard(uri, record, STORAGE, str(folder), template) for uri, record in zip(uris, records)]


def flat_shard(ids: np.ndarray, vectors: np.ndarray) -> Shard:
    """A flat shard in memory. ids: int64 [n] ascending; vectors: float16 [n, d]."""
    return Shard(ids, vectors, inverse_norms(to_float32(vectors)))


def exact_scores(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosine similarity float32 [n, m] of unit queries float32 [n, d] and vectors float16 [m, d], summed in float64."""
    stored = vectors.astype(np.float64)
    stored /= np.sqrt((stored * stored).sum(axis=1, keepdims=True))
    return np.stack([(stored * query).sum(axis=1) for query in queries.astype(np.float64)]).astype(np.float32)


def nearest(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [n, k] and scores float32 [n, k] of the best; ties: lower id first; -1 and -inf for scores of -inf."""
    k = min(k, len(ids))
    found, best = np.full((len(scores), k), -1), np.full((len(scores), k), -np.inf, np.float32)
    for i, row in enumerate(scores):
        order = sorted(np.flatnonzero(np.isfinite(row)), key=lambda j: (-row[j], ids[j]))[:k]
        found[i, : len(order)], best[i, : len(order)] = ids[order], row[order]
    return found, best
