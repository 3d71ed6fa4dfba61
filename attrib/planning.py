"""Which index to build: its kind, its number of lists, and what a search worker will hold of it."""

from dataclasses import asdict, dataclass

from attrib.errors import AttribError
from attrib.settings import IndexSettings

FLAT_UP_TO_VECTORS = 50_000  # below, exact search of a shard takes milliseconds and training buys nothing
MIN_TRAINING_VECTORS_PER_LIST = 39  # FAISS warns below it


@dataclass(frozen=True)
class IndexPlan:
    """kind: flat, ivf_flat, ivf_sq8 or ivf_pq; num_lists and pq_bytes are 0 where they do not apply."""

    kind: str
    num_lists: int
    pq_bytes: int
    num_shards: int
    shard_memory_bytes: (
        int  # held by a search worker for one shard; the exact vectors are memory-mapped and come on top as page cache
    )
    shard_disk_bytes: int
    reason: str

    @property
    def is_compressed(self) -> bool:
        return self.kind in ("ivf_sq8", "ivf_pq")

    def to_dict(self) -> dict:
        return asdict(self)


def plan_index(settings: IndexSettings, num_vectors: int, shard_sizes: list[int], dimension: int) -> IndexPlan:
    """The plan for `num_vectors` vectors in shards of the given sizes. Raises AttribError if no kind fits the memory of a worker."""
    largest = max(shard_sizes)
    budget = settings.worker_memory_gib * 2**30
    pq_bytes = settings.pq_bytes or _default_pq_bytes(dimension)
    num_lists = min(settings.num_lists or _default_num_lists(num_vectors, settings.training_rows), max(1, num_vectors))
    sizes = {
        kind: _memory_bytes(kind, largest, dimension, num_lists, pq_bytes)
        for kind in ("flat", "ivf_flat", "ivf_sq8", "ivf_pq")
    }
    if settings.kind != "auto":
        kind, reason = settings.kind, "chosen in the config"
    elif num_vectors <= FLAT_UP_TO_VECTORS:
        kind, reason = "flat", f"{num_vectors:,} vectors are few enough to search exactly"
    else:
        fitting = [kind for kind in ("ivf_flat", "ivf_sq8", "ivf_pq") if sizes[kind] <= budget]
        kind = fitting[0] if fitting else "ivf_pq"
        reason = f"the most precise kind whose shard of {largest:,} vectors fits worker_memory_gib = {settings.worker_memory_gib:g}"
    if kind == "ivf_pq":
        _check_pq_bytes(pq_bytes, dimension)
    if sizes[kind] > budget:
        raise AttribError(
            f"a shard of {largest:,} vectors as {kind} needs {sizes[kind] / 2**30:.2f} GiB, more than worker_memory_gib = "
            f"{settings.worker_memory_gib:g}; lower shard_rows (now {settings.shard_rows:,}; never below one manifest partition), choose a smaller kind, or raise the limit"
        )
    is_ivf = kind != "flat"
    disk = sizes[kind] + (2 * dimension * largest if is_ivf else 0)
    return IndexPlan(
        kind,
        num_lists if is_ivf else 0,
        pq_bytes if kind == "ivf_pq" else 0,
        len(shard_sizes),
        sizes[kind],
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


def _default_num_lists(num_vectors: int, training_rows: int) -> int:
    """4 sqrt(n) up to a power of two below a million vectors, then 16,384, and 65,536 from ten million (autofaiss's rule).

    Never more than the training sample can place: a centroid of a handful of vectors follows their noise.
    """
    most = max(1, min(num_vectors, training_rows) // MIN_TRAINING_VECTORS_PER_LIST)
    if num_vectors >= 10_000_000:
        return min(most, 65_536)
    if num_vectors >= 1_000_000:
        return min(most, 16_384)
    rule = 1 << (max(1, int(4 * num_vectors**0.5)) - 1).bit_length()
    return min(most, rule)


def _default_pq_bytes(dimension: int) -> int:
    """One byte per 8 dimensions, or the next lower number that divides the dimension."""
    return max(m for m in range(1, max(1, dimension // 8) + 1) if dimension % m == 0)


def _check_pq_bytes(pq_bytes: int, dimension: int) -> None:
    if dimension % pq_bytes:
        divisors = [m for m in range(1, dimension + 1) if dimension % m == 0]
        near = sorted(divisors, key=lambda m: abs(m - pq_bytes))[:3]
        raise AttribError(f"pq_bytes = {pq_bytes} does not divide the dimension {dimension}; near: {sorted(near)}")


def _memory_bytes(kind: str, num_vectors: int, dimension: int, num_lists: int, pq_bytes: int) -> int:
    ids = 8 * num_vectors
    if kind == "flat":
        return ids + 2 * dimension * num_vectors
    code_bytes = {"ivf_flat": 4 * dimension, "ivf_sq8": dimension, "ivf_pq": pq_bytes}[kind]
    codebooks = 4 * 256 * dimension if kind == "ivf_pq" else 0
    return 2 * ids + code_bytes * num_vectors + 4 * dimension * num_lists + codebooks
