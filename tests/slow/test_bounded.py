"""Build and search an index four times larger than the memory of its worker, under a limit of the operating system."""

import json
import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.shards import STORAGE, nearest

from attrib.embed.embeddings import schema
from attrib.index.normalize import unit_rows

MIB = 1 << 20
LIMIT_BYTES = 320 * MIB
DIMENSION, NUM_PARTITIONS, PARTITION_ROWS = 2048, 161, 2_048
NUM_QUERIES, NUM_LISTS, K = 32, 16, 10

# Code of the worker process. `touch` allocates the limit and must fail, which proves that the limit works.
WORKER = """
import json, resource, sys
task, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import faiss, numpy as np, pyarrow as pa
from attrib.index.shard import build_shard, open_shard
from attrib.index.normalize import unit_rows
from attrib.index.search import search_shard
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.index.quantizer import read_quantizer
from attrib.embed.embeddings import Embeddings
faiss.omp_set_num_threads(1)
pa.set_cpu_count(1)
storage = Storage(StorageSettings())
setup = json.load(open(f"{folder}/setup.json"))
template = read_quantizer(f"{folder}/template.faiss", storage)
if task == "touch":
    np.ones(setup["limit_bytes"], np.uint8)
    print("touched")
elif task == "build":
    rows = setup["num_rows"]
    embeddings = Embeddings(f"{folder}/embeddings", "manifest", {"dimension": setup["dimension"]}, "d", rows, rows)
    ids = pa.array(np.arange(sum(rows)))
    sources = pa.table({"id": ids, "key": ids.cast(pa.string()), "uri": ids.cast(pa.string())})
    record = build_shard(f"{folder}/shard", embeddings, list(range(len(rows))), template, sources, storage)
    print(json.dumps(record))
else:
    shard = open_shard(f"{folder}/shard", storage.read_json(f"{folder}/shard/shard.json"), storage, folder, template)
    queries = np.load(f"{folder}/queries.npy")
    for nprobe in (0, template.nlist):
        found = search_shard(shard, queries, setup["k"], setup["k"], nprobe, False)
        print(json.dumps(found.id.tolist()))
"""


@contextmanager
def memory_group():
    """Folder of a cgroup with LIMIT_BYTES including page cache, or None if this user may not create one."""
    for root, name in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        group = root / f"attrib-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / name).exists():
                (group / name).write_text(str(LIMIT_BYTES))
                yield group
                return
        finally:
            group.rmdir()
    yield None


def work(task: str, folder: Path, group: Path | None) -> subprocess.CompletedProcess:
    """Run a task of the worker in the group; without a group, limit its private memory by RLIMIT_DATA."""
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    join = f"echo $$ > {group}/cgroup.procs && " if group else ""
    command = f'{join}exec "$0" -c "$1" {task} {folder} {0 if group else LIMIT_BYTES}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, WORKER],
        capture_output=True,
        text=True,
        env=os.environ | one_thread | {"TMPDIR": str(folder)},
        cwd=Path(__file__).parents[2],
    )


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """(folder, queries, vectors): embeddings of four times the limit, queries and a coarse quantizer."""
    from attrib.index.planning import IndexPlan
    from attrib.index.quantizer import train_quantizer, write_quantizer

    folder = tmp_path_factory.mktemp("bounded")
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((PARTITION_ROWS, DIMENSION), np.float32).astype(np.float16)
    for partition in range(NUM_PARTITIONS):
        ids = np.arange(partition * PARTITION_ROWS, (partition + 1) * PARTITION_ROWS)
        columns = {field.name: pa.nulls(len(ids), field.type) for field in schema(DIMENSION)} | {"id": pa.array(ids)}
        values = pa.array(of_partition(vectors, partition).ravel())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, DIMENSION)
        table = pa.table(list(columns.values()), schema=schema(DIMENSION))
        STORAGE.write_table(str(folder / "embeddings" / f"part-{partition:05d}.parquet"), table)
    queries = unit_rows(vectors[:NUM_QUERIES] + generator.standard_normal((NUM_QUERIES, DIMENSION)))
    np.save(folder / "queries.npy", queries)
    plan = IndexPlan("ivf_flat", NUM_LISTS, 0, 1, 0, 0, 0, "test")
    write_quantizer(train_quantizer(unit_rows(vectors), plan, 0), str(folder / "template.faiss"), STORAGE)
    setup = {"num_rows": [PARTITION_ROWS] * NUM_PARTITIONS, "dimension": DIMENSION, "k": K, "limit_bytes": LIMIT_BYTES}
    STORAGE.write_json(str(folder / "setup.json"), setup)
    return folder, queries, vectors


def of_partition(vectors: np.ndarray, partition: int) -> np.ndarray:
    """Different vectors for each partition, without drawing new ones."""
    return np.roll(vectors, 7 * partition, axis=1)


def test_an_index_four_times_the_memory_of_its_worker(collection):
    folder, queries, vectors = collection
    with memory_group() as group:
        refused = work("touch", folder, group)
        assert refused.returncode != 0 and "touched" not in refused.stdout
        built = work("build", folder, group)
        assert built.returncode == 0, built.stderr[-2000:]
        record = json.loads(built.stdout)
        assert record["files"]["vectors.npy"]["num_bytes"] >= 4 * LIMIT_BYTES
        searched = work("search", folder, group)
        assert searched.returncode == 0, searched.stderr[-2000:]
    best_ids, best_scores = np.zeros((NUM_QUERIES, 0), int), np.zeros((NUM_QUERIES, 0), np.float32)
    exact, queries = vectors.astype(np.float64), queries.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1)
    for partition in range(NUM_PARTITIONS):
        scores = of_partition(queries, -partition) @ exact.T / norms  # as queries @ of_partition(exact, partition).T
        ids, found = nearest_rows(scores.astype(np.float32), partition * PARTITION_ROWS)
        best_ids, best_scores = np.hstack([best_ids, ids]), np.hstack([best_scores, found])
    expected = [nearest(best_scores[i : i + 1], best_ids[i], K)[0][0].tolist() for i in range(NUM_QUERIES)]
    assert len(searched.stdout.splitlines()) == 2
    for line in searched.stdout.splitlines():
        assert np.array_equal(np.reshape(json.loads(line), (NUM_QUERIES, K)), expected)


def nearest_rows(scores: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return order + first, np.take_along_axis(scores, order, axis=1)
