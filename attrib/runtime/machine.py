"""Measure the memory of this process and the speed of this machine, each in a fraction of a second, for estimates."""

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet

from attrib.common.scratch import scratch_folder
from attrib.common.storage import naming

Result = TypeVar("Result")
RATE_ROWS = 16_384
MIN_SECONDS = 0.01  # of each timed operation, because the workers of a job wait for it


def resident_bytes() -> int:
    """Return the resident memory of this process, libraries included."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """Return the highest resident memory of this process since `reset_peak`, or since its start without Linux.

    psutil has no peak that can be reset, so this reads VmHWM.
    """
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def reset_peak() -> None:
    """Return freed memory to the system, so that new allocations are visible, and reset the peak."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    # A container may forbid it; the peak since the start is an upper bound.
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


@lru_cache(maxsize=1)
def baseline_bytes() -> int:
    """Return the memory of this process at the first call; a job calls it after its imports, before any work."""
    return resident_bytes()


def measure_growth(work: Callable[[], Result]) -> tuple[int, float, Result]:
    """Call `work` and return the growth of the peak in bytes, the CPU seconds, and the result."""
    reset_peak()
    before, started = resident_bytes(), time.thread_time()
    result = work()
    return max(0, peak_bytes() - before), time.thread_time() - started, result


@dataclass(frozen=True)
class MachineRates:
    """Speed of one worker with its threads.

    float32 products in flop/s; SHA-256, writing files to the local disk, and reading Parquet of float16 vectors in
    bytes/s.
    """

    flops_per_second: float
    hashed_bytes_per_second: float
    written_bytes_per_second: float
    decoded_bytes_per_second: float


@dataclass(frozen=True)
class AnswerRates:
    """Speed of one worker that searches shards and writes results.

    SHA-256, float64 scoring of float16 vectors, and Parquet tables of ids, numbers and strings, all in bytes/s.
    """

    hashed_bytes_per_second: float
    scored_bytes_per_second: float
    table_bytes_per_second: float


def measure_machine(dimension: int, num_threads: int) -> MachineRates:
    """Measure the speed of products, hashing, writing and reading, in about a third of a second."""
    import faiss

    floats = np.random.default_rng(0).standard_normal((RATE_ROWS, dimension), np.float32)
    queries, halves, data = floats[:256].copy(), floats.astype(np.float16), floats.tobytes()
    stored = pa.BufferOutputStream()
    vectors = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), dimension)})
    pa.parquet.write_table(vectors, stored, compression="none", use_dictionary=False)
    faiss.omp_set_num_threads(num_threads)

    def write(path: str) -> None:
        with naming(path), open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def decode() -> None:
        column = pa.parquet.read_table(pa.BufferReader(stored.getvalue()))["embedding"]
        column.combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()

    with scratch_folder() as folder:
        products = fastest(lambda: faiss.pairwise_distances(queries, floats, faiss.METRIC_INNER_PRODUCT))
        return MachineRates(
            flops_per_second=2 * queries.size * RATE_ROWS / products,
            hashed_bytes_per_second=_hashed_bytes_per_second(data),
            written_bytes_per_second=len(data) / fastest(lambda: write(os.path.join(folder, "probe"))),
            decoded_bytes_per_second=halves.nbytes / fastest(decode),
        )


def measure_answers(dimension: int) -> AnswerRates:
    """Measure the speed of hashing, scoring and tables, in about a tenth of a second."""
    generator = np.random.default_rng(0)
    ids, scores = generator.integers(0, 2**62, RATE_ROWS), generator.random(RATE_ROWS, np.float32)
    table = pa.table({"id": ids, "score": scores, "key": [f"{i:08d}.jpg" for i in range(RATE_ROWS)]})
    floats = generator.standard_normal((RATE_ROWS // 8, dimension), np.float32)
    halves = floats.astype(np.float16)

    def score() -> None:
        vectors = halves.astype(np.float64)
        np.einsum("md,md->m", vectors, vectors)
        np.einsum("md,md->m", vectors, vectors)

    def write_and_read() -> None:
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table, sink, compression="zstd")
        pa.parquet.read_table(pa.BufferReader(sink.getvalue()))

    return AnswerRates(
        hashed_bytes_per_second=_hashed_bytes_per_second(floats.tobytes()),
        scored_bytes_per_second=halves.nbytes / fastest(score),
        table_bytes_per_second=2 * table.nbytes / fastest(write_and_read),
    )


def _hashed_bytes_per_second(data: bytes) -> float:
    return len(data) / fastest(lambda: sha256(data).digest())


def fastest(work: Callable[[], object], min_seconds: float = MIN_SECONDS) -> float:
    """Return the seconds of the fastest call of `work` within min_seconds, after one call to warm up."""
    work()
    quickest, spent = float("inf"), 0.0
    while spent < min_seconds:
        started = time.perf_counter()
        work()
        took = time.perf_counter() - started
        quickest, spent = min(quickest, took), spent + took
    return quickest
