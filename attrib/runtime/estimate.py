"""Prediction, made before a job starts, of what it will need: memory of each process, disk, requests, time and cost.

Each stage computes its estimate in its own estimate.py from known sizes and from measurements of the machine
(attrib/runtime/machine.py). Memory includes the imported libraries. Memory-mapped files are counted separately, because
the system can drop them from memory.
"""

from dataclasses import asdict, dataclass

from attrib.common.formats import GIB, duration, gib
from attrib.common.settings import PriceSettings

# Memory of libraries, measured on 2026-11-21 with the versions pinned in pyproject.toml.
READER_BYTES = 40 << 20  # threads and pools of Arrow after its first Parquet file
WRITER_BYTES = 45 << 20  # Parquet writer of a table with strings
TOUCHED_BYTES = 25 << 20  # library code loaded at its first call
TABLE_COPIES = 3  # of an Arrow table that is read, sorted and indexed
IMAGE_OVERHEAD_BYTES = 4_096  # Python objects per image of a chunk in preparation


@dataclass(frozen=True)
class Estimate:
    """Resources that a job will need.

    worker_bytes, driver_bytes: peak memory of one process, without mapped_bytes, the files that a worker maps.
    scratch_bytes: local disk per worker. output_bytes: files of the output; temporary_bytes: further files there until
    the job ends. num_writes, num_reads: requests to an object store, 0 if the output is local.
    """

    num_workers: int
    worker_bytes: int
    driver_bytes: int
    output_bytes: int
    seconds: float
    mapped_bytes: int = 0
    scratch_bytes: int = 0
    temporary_bytes: int = 0
    num_writes: int = 0
    num_reads: int = 0
    on_gpus: bool = False
    note: str = ""

    def cost(self, prices: PriceSettings | None) -> float | None:
        """Return the cost in the currency of `prices`; None without prices."""
        if prices is None:
            return None
        hour = prices.per_gpu_worker_hour if self.on_gpus else prices.per_cpu_worker_hour
        return (
            self.num_workers * self.seconds / 3600 * hour
            + self.output_bytes / GIB * prices.storage_per_gib_month
            + self.num_writes / 1e6 * prices.per_million_writes
            + self.num_reads / 1e6 * prices.per_million_reads
        )

    def describe(self, prices: PriceSettings | None = None) -> str:
        """Return one line: `estimate: 4 workers of 0.9 GiB, driver 0.5 GiB, output 3.1 GiB, about 12 min, 7.40 EUR`."""
        workers = f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''} of {gib(self.worker_bytes)}"
        mapped = f" (+ {gib(self.mapped_bytes)} mapped)" if self.mapped_bytes else ""
        temporary = f" (+ {gib(self.temporary_bytes)} until it ends)" if self.temporary_bytes else ""
        parts = [f"estimate: {workers}{mapped}", f"driver {gib(self.driver_bytes)}"]
        parts.append(f"output {gib(self.output_bytes)}{temporary}")
        if self.scratch_bytes:
            parts.append(f"scratch {gib(self.scratch_bytes)} a worker")
        if self.num_writes or self.num_reads:
            parts.append(f"{self.num_writes:,} writes and {self.num_reads:,} reads")
        parts.append(f"about {duration(self.seconds)}")
        if prices is not None:
            parts.append(f"{self.cost(prices):,.2f} {prices.currency}")
        return ", ".join(parts) + (f" ({self.note})" if self.note else "")

    def to_dict(self) -> dict:
        return asdict(self)
