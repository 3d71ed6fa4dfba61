"""Which index to build: its kind, its number of lists, and what a search worker will hold of it."""

from dataclasses import asdict, dataclass

from attrib.common.errors import AttribError
from attrib.index.settings import IndexSettings

FLAT_UP_TO_VECTORS = 50_000  # below, exact search of a shard takes milliseconds and training buys nothing
MIN_TRAINING_VECTORS_PER_LIST = 39  # FAISS warns below it
TRAINING_VECTORS_PER_LIST = 64
MIN_TRAINING_ROWS = 65_536  # codecs want some, however few the lists
MAX_LISTS = 65_536
IVF_KINDS = ("ivf_flat", "ivf_sq8", "ivf_pq")  # most precise first


@dataclass(frozen=True)
class IndexPlan:
    """kind: flat, ivf_flat, ivf_sq8 or ivf_pq; num_lists and pq_bytes are 0 where they do not apply.

    template_bytes: held in memory by every worker; shard_scan_bytes: what a scan of the largest shard reads, from memory-mapped files;
    shard_disk_bytes: all of its files but the sources' metadata.
    """

    kind: str
    num_lists: int
    pq_bytes: int
    num_shards: int
    template_bytes: int
    shard_scan_bytes: int
    shard_disk_bytes: int
    reason: str

    @property
    def is_compressed(self) -> bool:
        return self.kind in ("ivf_sq8", "ivf_pq")

    def to_dict(self) -> dict:
        return asdict(self)


def plan_index(settings: IndexSettings, num_vectors: int, shard_sizes: list[int], dimension: int) -> IndexPlan:
    """The plan for `num_vectors` vectors in shards of the given sizes. Raises AttribError if a worker cannot hold the centroids."""
    largest = max(shard_sizes)
    budget = settings.worker_memory_gib * 2**30
    pq_bytes = settings.pq_bytes or _default_pq_bytes(dimension)
    num_lists = min(settings.num_lists or _default_num_lists(num_vectors, settings.training_rows), max(1, num_vectors))
    scanned = {"flat": 2 * dimension, "ivf_flat": 2 * dimension, "ivf_sq8": dimension, "ivf_pq": pq_bytes}
    scan_bytes = {kind: row_bytes * largest for kind, row_bytes in scanned.items()}
    if settings.kind != "auto":
        kind, reason = settings.kind, "chosen in the config"
    elif num_vectors <= FLAT_UP_TO_VECTORS:
        kind, reason = "flat", f"{num_vectors:,} vectors are few enough to search exactly"
    else:
        fits = [k for k in IVF_KINDS if scan_bytes[k] + _template_bytes(k, dimension, num_lists) <= budget]
        kind = fits[0] if fits else "ivf_pq"
        reason = f"the most precise kind whose shard of {largest:,} vectors stays in memory"
    if kind == "ivf_pq":
        _check_pq_bytes(pq_bytes, dimension)
    template_bytes = _template_bytes(kind, dimension, num_lists)
    if template_bytes > budget:
        raise AttribError(
            f"{num_lists:,} centroids of {dimension} dimensions need {template_bytes / 2**30:.2f} GiB in every worker, more than "
            f"worker_memory_gib = {settings.worker_memory_gib:g}; lower num_lists, or raise the limit"
        )
    if scan_bytes[kind] + template_bytes > budget:
        reason += (
            f"; its {scan_bytes[kind] / 2**30:.2f} GiB exceed worker_memory_gib = {settings.worker_memory_gib:g} and come from the disk, "
            f"once for each block of queries: lower shard_rows (now {settings.shard_rows:,}) or choose a smaller kind where that is slow"
        )
    is_ivf = kind != "flat"
    # Vectors, norms and ids, and where there are lists, their offsets and codes.
    disk = (2 * dimension + 12) * largest + (8 * num_lists if is_ivf else 0)
    disk += scan_bytes[kind] if kind in ("ivf_sq8", "ivf_pq") else 0
    return IndexPlan(
        kind,
        num_lists if is_ivf else 0,
        pq_bytes if kind == "ivf_pq" else 0,
        len(shard_sizes),
        template_bytes,
        scan_bytes[kind],
        disk,
        reason,
    )


def group_partitions(num_rows: list[int], rows_per_group: int) -> list[list[int]]:
    """Consecutive partitions in groups of at most `rows_per_group` rows (a larger partition stands alone); empty ones are left out."""
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
    """2 sqrt(n) up to a power of two, at most 65,536: enough that a batch sees a small share, few enough that a list fills a matrix product.

    Of a million vectors, twice as many lists make a batch of 10,000 queries no quicker, training four times and building twice as slow.

    Never more than the training sample can place: a centroid of a handful of vectors follows their noise.
    """
    most = max(1, min(num_vectors, training_rows or num_vectors) // MIN_TRAINING_VECTORS_PER_LIST)
    rule = 1 << (max(1, int(2 * num_vectors**0.5)) - 1).bit_length()
    return min(most, rule, MAX_LISTS)


def training_rows(settings: IndexSettings, plan: IndexPlan) -> int:
    """Vectors that the template is trained on."""
    if plan.kind == "flat":
        return 0
    return settings.training_rows or max(MIN_TRAINING_ROWS, TRAINING_VECTORS_PER_LIST * plan.num_lists)


def _default_pq_bytes(dimension: int) -> int:
    """One byte per 8 dimensions, or the next lower number that divides the dimension."""
    return max(m for m in range(1, max(1, dimension // 8) + 1) if dimension % m == 0)


def _check_pq_bytes(pq_bytes: int, dimension: int) -> None:
    if dimension % pq_bytes:
        divisors = [m for m in range(1, dimension + 1) if dimension % m == 0]
        near = sorted(divisors, key=lambda m: abs(m - pq_bytes))[:3]
        raise AttribError(f"pq_bytes = {pq_bytes} does not divide the dimension {dimension}; near: {sorted(near)}")


def _template_bytes(kind: str, dimension: int, num_lists: int) -> int:
    codebooks = {"ivf_pq": 4 * 256 * dimension, "ivf_sq8": 8 * dimension}.get(kind, 0)
    return 0 if kind == "flat" else 4 * dimension * num_lists + codebooks
