"""What a job will need, from sizes that are known before it starts: memory of every process, disk, requests, time and cost.

Pure functions. What depends on the machine, its libraries and the network comes in as measurements (attrib/runtime/machine.py), so that no constant
here is of one machine. Memory is what a process holds itself, the libraries that it imports included; files that are memory-mapped are told
apart, since the page cache gives them up when it must.
"""

from dataclasses import asdict, dataclass, replace

from attrib.common.settings import PriceSettings
from attrib.runtime.machine import EncoderProbe, MachineRates, RowBytes

GIB = 2**30
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


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate_manifest(
    num_images: int,
    partition_rows: int,
    row: RowBytes,
    baseline_bytes: int,
    num_workers: int,
    seconds_per_image: float,
) -> Estimate:
    """Of the second half of the job, which writes partitions: what a collection costs is known once it is listed.

    row: of a listed image; seconds_per_image: of one worker's listing, which writes the same rows once.
    """
    rows = min(partition_rows, num_images)
    return Estimate(
        num_workers=num_workers,
        worker_bytes=baseline_bytes
        + READER_BYTES
        + WRITER_BYTES
        + rows * (TABLE_COPIES * row.in_memory + PLACES_BYTES),
        # By unit, joined, sorted, and once more while duplicates are looked for.
        driver_bytes=baseline_bytes + 4 * 8 * num_images,
        output_bytes=round(num_images * row.on_disk),
        temporary_bytes=round(num_images * row.on_disk),
        seconds=num_images * seconds_per_image / num_workers,
    )


def estimate_embed(
    num_images: int,
    dimension: int,
    partition_rows: int,
    images_in_flight: int,
    max_megapixels: float,
    probe: EncoderProbe,
    num_workers: int,
    on_gpus: bool = False,
) -> Estimate:
    """images_in_flight: prepared or waiting in one worker at a time (a chunk, or several where chunks overlap)."""
    beyond_probe = max(0, images_in_flight - probe.num_images)
    working = probe.growth_bytes + beyond_probe * (probe.image_bytes + IMAGE_OVERHEAD_BYTES + 4 * dimension)
    loading = 2 * probe.network_bytes  # the weights as read, and those of the network
    tables = READER_BYTES + WRITER_BYTES + TOUCHED_BYTES
    encoding = probe.baseline_bytes + max(loading, probe.network_bytes + working + tables)
    row_bytes = embedding_row_bytes(dimension)
    # A partition is assembled from its chunks by concatenating, sorting and writing it, in a worker that also holds the libraries.
    rows = min(partition_rows, num_images)
    assembling = probe.baseline_bytes + tables + rows * ((TABLE_COPIES + 1) * (2 * dimension + 64))
    return Estimate(
        num_workers=num_workers,
        worker_bytes=max(encoding, assembling),
        driver_bytes=probe.baseline_bytes + max(loading, probe.network_bytes + probe.growth_bytes),
        output_bytes=round(num_images * row_bytes),
        temporary_bytes=round(num_images * row_bytes),
        seconds=num_images * probe.seconds_per_image / num_workers,
        on_gpus=on_gpus,
        note=f"an image of {max_megapixels:g} megapixels adds up to {gib(FILE_BYTES_PER_PIXEL * max_megapixels * 1e6)}",
    )


def embedding_row_bytes(dimension: int) -> float:
    """On disk, of an image with its vector, which is stored plainly (attrib/common/storage.py)."""
    return 2 * dimension + OUTCOME_BYTES_ON_DISK


def estimate_train(
    num_images: int,
    views_per_image: int,
    feature_dimension: int,
    largest_block: int,
    input_dimension: int,
    num_parameters: int,
    num_epochs: int,
    images_in_flight: int,
    probe: EncoderProbe,
    rates: MachineRates,
    num_workers: int,
) -> Estimate:
    """Of features and training. feature_dimension: of an image's features, float16; largest_block: of its blocks, whose whitening holds square
    matrices in float64; input_dimension: what the nets see of an image; num_workers: of the extraction of features.
    """
    rows = num_images * (1 + views_per_image)
    features = 2 * rows * feature_dimension
    inputs = 2 * rows * input_dimension
    # Chunks and their concatenation are there together; then the originals, the square matrices, and the inputs twice while they are joined.
    whitening = 4 * 8 * largest_block**2 + 2 * 2 * num_images * feature_dimension
    weights = 4 * num_parameters
    reading = 2 * features
    driver = (
        probe.baseline_bytes + probe.network_bytes + max(reading, features + max(whitening, 2 * inputs)) + 2 * weights
    )
    # Each training worker reads all inputs, as the file's bytes and as tensors; the optimiser holds two moments and a gradient.
    training = probe.baseline_bytes + probe.network_bytes + 2 * inputs + 6 * weights
    extracting = (
        probe.baseline_bytes + probe.network_bytes + probe.growth_bytes
        + images_in_flight * (probe.image_bytes * 4 + 2 * (1 + views_per_image) * feature_dimension)
    )  # fmt: skip
    forward_backward = 6 * num_parameters * rows * num_epochs / rates.flops_per_second
    return Estimate(
        num_workers=num_workers,
        worker_bytes=max(training, extracting),
        driver_bytes=driver,
        output_bytes=features + inputs + probe.network_bytes + weights,
        seconds=rows * probe.seconds_per_image / num_workers + forward_backward,
    )
