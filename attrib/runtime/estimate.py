"""What a job will need, from sizes that are known before it starts: memory of every process, disk, requests, time and cost.

Pure functions. What depends on the machine, its libraries and the network comes in as measurements (attrib/runtime/machine.py), so that no constant
here is of one machine. Memory is what a process holds itself, the libraries that it imports included; files that are memory-mapped are told
apart, since the page cache gives them up when it must.
"""

from dataclasses import asdict, dataclass, replace

from attrib.common.formats import GIB, duration, gib
from attrib.common.settings import PriceSettings

OUTCOME_BYTES_ON_DISK = 50  # of an image beside its vector: id and content hash, which do not compress
IMAGE_OVERHEAD_BYTES = 4_096  # Python's rows of one image while its chunk is prepared
READER_BYTES = 40 << 20  # of Arrow's threads and pools once a Parquet file was read
WRITER_BYTES = 45 << 20  # of its Parquet writer, for a table with strings
TOUCHED_BYTES = 25 << 20  # of libraries' code, which is read when it first runs
TABLE_COPIES = 3  # of an Arrow table that is read, sorted and taken from
PLACES_BYTES = 900  # Python's objects for one row's place, while a manifest's digest is made
FILE_BYTES_PER_PIXEL = 25  # at most, of a decoder's buffers (WebP; a plain JPEG takes 3)


@dataclass(frozen=True)
class Estimate:
    """What a job will need.

    worker_bytes, driver_bytes: memory at the peak of one process; mapped_bytes: of files that a worker maps; scratch_bytes: of local disk a
    worker; output_bytes: what stays in the output folder, temporary_bytes: what is there beside it until the job ends; num_writes and num_reads:
    requests to an object store, 0 where input and output are local.
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
        """One line, e.g. `estimate: 4 workers of 0.9 GiB (+ 1.2 GiB mapped), output 3.1 GiB, about 12 min, 7.40 EUR`."""
        mapped = f" (+ {gib(self.mapped_bytes)} mapped)" if self.mapped_bytes else ""
        temporary = f" (+ {gib(self.temporary_bytes)} until it ends)" if self.temporary_bytes else ""
        parts = [
            f"estimate: {self.num_workers} worker{'s' if self.num_workers > 1 else ''} of {gib(self.worker_bytes)}{mapped}",
            f"driver {gib(self.driver_bytes)}",
            f"output {gib(self.output_bytes)}{temporary}",
        ]
        if self.scratch_bytes:
            parts.append(f"scratch {gib(self.scratch_bytes)} a worker")
        if self.num_writes or self.num_reads:
            parts.append(f"{self.num_writes:,} writes and {self.num_reads:,} reads")
        parts.append(f"about {duration(self.seconds)}")
        cost = self.cost(prices)
        if cost is not None:
            parts.append(f"{cost:,.2f} {prices.currency}")
        return ", ".join(parts) + (f" ({self.note})" if self.note else "")

    def to_dict(self) -> dict:
        return asdict(self)

    def remote(self, num_writes: int, num_reads: int) -> "Estimate":
        """The same with its requests to an object store."""
        return replace(self, num_writes=num_writes, num_reads=num_reads)
