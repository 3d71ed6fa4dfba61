"""Measurements that estimates start from: what a process holds, what a network needs for one batch, how fast this machine is.

Each takes a fraction of a second at a job's start, in the process that asks, so nothing is stored that could grow old.
"""

import ctypes
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet

RATE_ROWS = 16_384
MIN_SECONDS = 0.01  # of each timed operation; a job's workers wait for them


def resident_bytes() -> int:
    """Memory of this process now, libraries included; on systems other than Linux its highest so far."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The highest memory of this process since `reset_peak`, or since it started where the system cannot reset it."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Give freed memory back to the system, so that what is allocated next is seen, and start the peak anew."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # a container may forbid it; then the peak is of the whole life, which errs on the safe side
        pass


@lru_cache(maxsize=1)
def baseline_bytes() -> int:
    """Memory of a process that has imported a job's modules and done nothing yet: call it first of all."""
    return resident_bytes()


def _status_bytes(field: str) -> int:
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _growth(work) -> tuple[int, float, object]:
    """By how many bytes the peak of this process rose while `work` ran, its CPU seconds, and its result."""
    reset_peak()
    before, started = resident_bytes(), time.thread_time()
    result = work()
    return max(0, peak_bytes() - before), time.thread_time() - started, result


@dataclass(frozen=True)
class MachineRates:
    """Of one worker with its threads: float32 products (flop/s), and in bytes/s hashing, publishing files to the local disk, and reading
    Parquet of float16 vectors."""

    flops_per_second: float
    hashed_bytes_per_second: float
    written_bytes_per_second: float
    decoded_bytes_per_second: float


@dataclass(frozen=True)
class AnswerRates:
    """Of one worker that opens shards and turns what it finds into rows: in bytes/s hashing, float64 scoring of float16 vectors, and tables of
    ids, numbers and strings, written or read as Parquet; and (query, source) pairs that are put in order."""

    hashed_bytes_per_second: float
    scored_bytes_per_second: float
    table_bytes_per_second: float
    ordered_pairs_per_second: float


def measure_machine(dimension: int, num_threads: int) -> MachineRates:
    """In about a third of a second."""
    import faiss

    floats = np.random.default_rng(0).standard_normal((RATE_ROWS, dimension), np.float32)
    queries, halves = floats[:256].copy(), floats.astype(np.float16)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), dimension)
    stored = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"embedding": vectors}), stored, compression="none", use_dictionary=False)
    faiss.omp_set_num_threads(num_threads)
    data = floats.tobytes()
    with tempfile.TemporaryDirectory(prefix="attrib-", dir=os.environ.get("ATTRIB_SCRATCH")) as folder:
        path = os.path.join(folder, "probe")

        def write():
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        def decode():
            column = pa.parquet.read_table(pa.BufferReader(stored.getvalue()))["embedding"]
            column.combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()

        products = fastest(lambda: faiss.pairwise_distances(queries, floats, faiss.METRIC_INNER_PRODUCT))
        return MachineRates(
            flops_per_second=2 * queries.size * RATE_ROWS / products,
            hashed_bytes_per_second=_hashed_bytes_per_second(data),
            written_bytes_per_second=len(data) / fastest(write),
            decoded_bytes_per_second=halves.nbytes / fastest(decode),
        )


def measure_answers(dimension: int) -> AnswerRates:
    """In about a tenth of a second."""
    generator = np.random.default_rng(0)
    ids, scores = generator.integers(0, 2**62, RATE_ROWS), generator.random(RATE_ROWS, np.float32)
    queries = np.repeat(np.arange(RATE_ROWS // 16), 16)
    table = pa.table({"id": ids, "score": scores, "key": [f"{i:08d}.jpg" for i in range(RATE_ROWS)]})
    floats = generator.standard_normal((RATE_ROWS // 8, dimension), np.float32)
    halves = floats.astype(np.float16)

    def score():
        vectors = halves.astype(np.float64)
        np.einsum("md,md->m", vectors, vectors)
        np.einsum("md,md->m", vectors, vectors)

    def write_and_read():
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table, sink, compression="zstd")
        pa.parquet.read_table(pa.BufferReader(sink.getvalue()))

    return AnswerRates(
        hashed_bytes_per_second=_hashed_bytes_per_second(floats.tobytes()),
        scored_bytes_per_second=halves.nbytes / fastest(score),
        table_bytes_per_second=2 * table.nbytes / fastest(write_and_read),
        ordered_pairs_per_second=RATE_ROWS / fastest(lambda: np.lexsort((ids, scores, queries))),
    )


def _hashed_bytes_per_second(data: bytes) -> float:
    return len(data) / fastest(lambda: sha256(data).digest())


def fastest(work: Callable[[], object], min_seconds: float = MIN_SECONDS) -> float:
    """Seconds of one call, the quickest of as many as fit into min_seconds: what disturbs a run only ever makes it longer."""
    work()
    quickest, spent = float("inf"), 0.0
    while spent < min_seconds:
        started = time.perf_counter()
        work()
        took = time.perf_counter() - started
        quickest, spent = min(quickest, took), spent + took
    return quickest
