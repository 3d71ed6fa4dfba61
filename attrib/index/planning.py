"""Choose the kind of index and its number of lists, and predict the memory of a search worker."""

from dataclasses import asdict, dataclass
from typing import Any

from attrib.common.errors import AttribError
from attrib.index.settings import IndexSettings

FLAT_UP_TO_VECTORS = 50_000  # up to here, exact search of a shard takes milliseconds and training gains nothing
MIN_TRAINING_VECTORS_PER_LIST = 39  # FAISS warns below it
TRAINING_VECTORS_PER_LIST = 64
MIN_TRAINING_ROWS = 65_536  # the codec needs training vectors even if there are few lists
MAX_LISTS = 65_536
MAX_HELD_OUT_SHARE = 0.2  # of the vectors: those that measure the recall, and so do not train the index
IVF_KINDS = ("ivf_flat", "ivf_sq8", "ivf_pq")  # most precise first


@dataclass(frozen=True)
class IndexPlan:
    """The plan of an index. num_lists and pq_bytes are 0 if they do not apply to the kind."""

    kind: str  # flat, ivf_flat, ivf_sq8 or ivf_pq
    num_lists: int
    pq_bytes: int
    num_shards: int
    template_bytes: int  # coarse quantizer and codec, in the memory of every worker
    shard_scan_bytes: int  # read from memory-mapped files by a scan of the largest shard
    shard_disk_bytes: int  # all files of the largest shard but the metadata of its sources
    reason: str

    @property
    def is_compressed(self) -> bool:
        return self.kind in ("ivf_sq8", "ivf_pq")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_index(settings: IndexSettings, num_vectors: int, shard_sizes: list[int], dimension: int) -> IndexPlan:
    """Return the plan for `num_vectors` vectors in shards of the given sizes.

    Raises AttribError if the centroids exceed worker_memory_gib, or pq_bytes does not divide the dimension.
    """
    largest = max(shard_sizes)
    budget = settings.worker_memory_gib * 2**30
    divisors = [m for m in range(1, dimension + 1) if dimension % m == 0]
    # One byte per 8 dimensions, or the next lower number that divides the dimension.
    pq_bytes = settings.pq_bytes or max(m for m in divisors if m <= max(1, dimension // 8))
    most_lists = max(1, num_vectors - num_held_out(settings, num_vectors))  # each needs a training vector
    num_lists = min(settings.num_lists or _default_num_lists(num_vectors, settings.training_rows), most_lists)
    scanned = {"flat": 2 * dimension, "ivf_flat": 2 * dimension, "ivf_sq8": dimension, "ivf_pq": pq_bytes}
    scan_bytes = {kind: row_bytes * largest for kind, row_bytes in scanned.items()}
    kind, reason = str(settings.kind), "chosen in the config"
    if kind == "auto" and num_vectors <= FLAT_UP_TO_VECTORS:
        kind, reason = "flat", f"{num_vectors:,} vectors are few enough to search exactly"
    elif kind == "auto":
        fits = [k for k in IVF_KINDS if scan_bytes[k] + _quantizer_bytes(k, dimension, num_lists) <= budget]
        kind = fits[0] if fits else "ivf_pq"
        reason = f"the most precise kind whose shard of {largest:,} vectors stays in memory"
    if kind == "ivf_pq" and dimension % pq_bytes:
        near = sorted(sorted(divisors, key=lambda m: abs(m - pq_bytes))[:3])
        raise AttribError(f"pq_bytes = {pq_bytes} does not divide the dimension {dimension}; near: {near}")
    template_bytes = _quantizer_bytes(kind, dimension, num_lists)
    if template_bytes > budget:
        raise AttribError(
            f"{num_lists:,} centroids of {dimension} dimensions need {template_bytes / 2**30:.2f} GiB in every worker, "
            f"more than worker_memory_gib = {settings.worker_memory_gib:g}; lower num_lists, or raise the limit"
        )
    if scan_bytes[kind] + template_bytes > budget:
        reason += (
            f"; its {scan_bytes[kind] / 2**30:.2f} GiB exceed worker_memory_gib = {settings.worker_memory_gib:g} and "
            "are read from disk once per block of queries: if that is too slow, lower shard_rows (now "
            f"{settings.shard_rows:,}) or choose a smaller kind"
        )
    num_lists, pq_bytes = num_lists if kind != "flat" else 0, pq_bytes if kind == "ivf_pq" else 0
    # Vectors, norms and ids, offsets, and the codes of compressed kinds.
    disk = (2 * dimension + 12) * largest + 8 * num_lists
    disk += scan_bytes[kind] if kind in ("ivf_sq8", "ivf_pq") else 0
    return IndexPlan(kind, num_lists, pq_bytes, len(shard_sizes), template_bytes, scan_bytes[kind], disk, reason)


def num_held_out(settings: IndexSettings, num_vectors: int) -> int:
    """Return the number of vectors that measure the recall; at least one."""
    return min(settings.held_out_rows, max(1, int(MAX_HELD_OUT_SHARE * num_vectors)))


def group_partitions(num_rows: list[int], rows_per_group: int) -> list[list[int]]:
    """Group consecutive partitions up to `rows_per_group` rows. Larger ones stay alone, empty ones are skipped."""
    groups: list[list[int]] = []
    filled = 0
    for partition, rows in enumerate(num_rows):
        if not rows:
            continue
        if not groups or filled + rows > rows_per_group:
            groups.append([])
            filled = 0
        groups[-1].append(partition)
        filled += rows
    return groups


def _default_num_lists(num_vectors: int, training_rows: int | None) -> int:
    """Return 2 sqrt(n), rounded up to a power of two, at most 65,536 and at most what the training sample supports.

    With a million vectors, twice as many lists do not speed up a batch of 10,000 queries, but training takes four times
    as long. A centroid of only a few training vectors would fit their noise.
    """
    most = max(1, min(num_vectors, training_rows or num_vectors) // MIN_TRAINING_VECTORS_PER_LIST)
    rule = 1 << (max(1, int(2 * num_vectors**0.5)) - 1).bit_length()
    return min(most, rule, MAX_LISTS)


def training_rows(settings: IndexSettings, plan: IndexPlan) -> int:
    """Return the number of training vectors of the coarse quantizer and codec; 0 for kind flat."""
    default = max(MIN_TRAINING_ROWS, TRAINING_VECTORS_PER_LIST * plan.num_lists)
    return 0 if plan.kind == "flat" else settings.training_rows or default


def _quantizer_bytes(kind: str, dimension: int, num_lists: int) -> int:
    codebooks = {"ivf_pq": 4 * 256 * dimension, "ivf_sq8": 8 * dimension}.get(kind, 0)
    return 0 if kind == "flat" else 4 * dimension * num_lists + codebooks
