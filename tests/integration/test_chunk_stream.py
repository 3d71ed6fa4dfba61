"""map_chunks: one row per chunk, one worker per actor, errors raised unchanged, lost workers replaced."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray import cloudpickle

from attrib.common.errors import AttribError, MismatchError
from attrib.data.chunks import Chunk
from attrib.runtime.chunk_stream import WorkerPool, map_chunks

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules
CHUNKS = [Chunk(0, start, start + 2) for start in range(0, 20, 2)]


@dataclass
class Adder:
    """Adds a constant to the start of a chunk, and reports its process."""

    added: int

    def __call__(self, row: dict) -> dict:
        return {"start": row["start"], "sum": row["start"] + self.added, "pid": os.getpid(), "id": id(self)}


class OtherWeights:
    def __init__(self):
        raise MismatchError("other weights on this node")

    def __call__(self, row: dict) -> dict:
        return row


class Refusing:
    def __call__(self, row: dict) -> dict:
        raise AttribError(f"no room for the chunk at {row['start']}")


@dataclass
class KilledOnce:
    """Kills its process once, at the third chunk."""

    folder: str

    def __call__(self, row: dict) -> dict:
        Path(self.folder, f"{row['start']}.committed").touch()
        killed = Path(self.folder, "killed")
        if row["start"] == 4 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"start": row["start"]}


def doubled(row: dict) -> dict:
    return row | {"start": 2 * row["start"]}


def test_every_chunk_yields_one_row_and_every_actor_makes_one_worker(local_ray):
    pool = WorkerPool("cpu", 2)
    rows = list(map_chunks(Adder, (100,), CHUNKS, pool))
    assert sorted(row["start"] for row in rows) == [chunk.start for chunk in CHUNKS]
    assert all(row["sum"] == row["start"] + 100 for row in rows)
    assert len({(row["pid"], row["id"]) for row in rows}) == len({row["pid"] for row in rows}) <= 2
    rows = list(map_chunks(Adder, (1,), CHUNKS, pool, prepare=doubled))
    assert sorted(row["sum"] for row in rows) == [2 * chunk.start + 1 for chunk in CHUNKS]


def test_nothing_pending_starts_nothing():
    assert list(map_chunks(Adder, (1,), [], WorkerPool("cpu", 2))) == []


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        (OtherWeights, MismatchError, "^other weights on this node$"),
        (Refusing, AttribError, r"^no room for the chunk at \d+$"),
    ],
)
def test_errors_of_the_user_are_raised_unchanged(local_ray, worker, error, message):
    with pytest.raises(error, match=message):
        list(map_chunks(worker, (), CHUNKS[:1], WorkerPool("cpu", 1)))


def test_a_killed_worker_is_replaced_and_its_chunk_is_repeated(local_ray, tmp_path):
    rows = list(map_chunks(KilledOnce, (str(tmp_path),), CHUNKS, WorkerPool("cpu", 1)))
    assert sorted(row["start"] for row in rows) == [chunk.start for chunk in CHUNKS]
    assert (tmp_path / "killed").exists()


def test_a_missing_gpu_is_an_error(local_ray):
    with pytest.raises(AttribError, match=r"device is 'cuda' \(job embed\), but the cluster has no GPU"):
        WorkerPool.plan("cuda", "embed")
    assert WorkerPool.plan("auto", "embed") == WorkerPool("cpu", 2)
    assert WorkerPool.plan("cpu", "embed", 5) == WorkerPool("cpu", 5)
