"""Stream chunks of images through a pool of Ray Data actors.

Each chunk commits by itself: the worker publishes one file per chunk, so a killed job loses at most the chunks in
flight. Ray Data's own checkpointing gathers blocks until a file is worth writing, so small results would be lost.

Ray restarts a lost actor and repeats its chunk, so workers must be idempotent. At the start of a stream Ray prints
"Actor ... has constructor arguments in the object store and max_restarts > 0". The line is harmless: Ray Data passes
its context and the mapped function to every actor as references (https://github.com/ray-project/ray/issues/57733). The
driver holds them until the stream ends. Ray prints the line at level ERROR and has no filter for it: a higher level
would hide real errors, and `max_restarts=0` would end the restarts.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy

from attrib.runtime.session import device_of, num_cluster_cpus, num_cluster_gpus
from attrib.runtime.tasks import USER_ERRORS

MAX_BLOCKS = 10_000  # of Ray Data, which schedules a chunk alone up to this many
ERROR = "error"  # column: class of an error that the user can fix, "" for none
USER_ERRORS_BY_NAME = {error.__name__: error for error in USER_ERRORS}


@dataclass(frozen=True)
class WorkerPool:
    """Workers with one GPU each, or with one CPU each."""

    device: str
    num_workers: int

    @classmethod
    def plan(cls, wanted_device: str, job: str, num_workers: int | None = None) -> "WorkerPool":
        """Plan one worker per GPU, or per CPU if there is no GPU, unless `num_workers` is given.

        Raises AttribError as `device_of` does.
        """
        device = device_of(wanted_device, job)
        available = num_cluster_gpus() if device == "cuda" else num_cluster_cpus()
        return cls(device, num_workers or max(1, available))

    @property
    def num_gpus(self) -> int:
        """GPUs of each worker."""
        return int(self.device == "cuda")

    def describe(self) -> str:
        if self.device == "cuda":
            return f"{self.num_workers} GPU(s)"
        return f"{self.num_workers} CPU worker(s), NO GPU: expect it to be slow"


def map_chunks(
    worker: type,
    arguments: tuple,
    chunks: Iterable[Any],
    pool: WorkerPool,
    *,
    prepare: Callable[[dict], dict] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[dict]:
    """Yield `worker(*arguments)(row)` for the row of every chunk, in the order in which they finish.

    worker: class that is created once per actor, when its first chunk arrives.
    chunks: dataclass instances; a row is the dict of their fields.
    prepare: runs first, on CPUs, and returns the row that the worker receives.
    environment: environment variables of the worker processes.
    The worker's own row holds plain values only. Errors that the user can fix are raised as themselves.
    """
    if not (rows := [asdict(chunk) for chunk in chunks]):
        return
    size = min(pool.num_workers, len(rows))
    stream = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    options = {"runtime_env": {"env_vars": environment}} if environment else {}
    if prepare:
        stream = stream.map(partial(_or_error, prepare), num_cpus=1, **options)
    finished = stream.map(
        ChunkWorker,
        fn_constructor_args=(worker, arguments),
        compute=ActorPoolStrategy(min_size=1, max_size=size, initial_size=size),
        # A GPU worker takes no CPU: on a node with as many GPUs as CPUs, nothing would be left to prepare its chunks.
        num_cpus=0 if pool.num_gpus else 1,
        num_gpus=pool.num_gpus,
        **options,
    )
    for row in finished.iter_rows():
        if row[ERROR]:
            raise USER_ERRORS_BY_NAME[row[ERROR]](row["message"])
        yield json.loads(row["result"])


class ChunkWorker:
    """The actor around a worker. All its rows have the same columns, because rows of one block of Ray Data must."""

    def __init__(self, worker: type, arguments: tuple):
        self._worker = cache(lambda: worker(*arguments))

    def __call__(self, row: dict) -> dict:
        found = row if row.get(ERROR) else _or_error(lambda row: self._worker()(row), row)
        if found.get(ERROR):
            return {"result": "", ERROR: found[ERROR], "message": found["message"]}
        return {"result": json.dumps(found), ERROR: "", "message": ""}


def _or_error(function: Callable[[dict], dict], row: dict) -> dict:
    """Return function(row), or the class name and message of an error that the user can fix.

    Ray Data loses the cause of an exception on the way to the driver, whether a constructor or a call raised it.
    """
    try:
        return function(row)
    except USER_ERRORS as error:
        name = next(cls.__name__ for cls in type(error).__mro__ if cls in USER_ERRORS)
        return {ERROR: name, "message": str(error)}
