"""Search of one shard for a block of queries, exact scores for what it finds, and the exact merge of shards.

A scan goes through the shard once, list by list (or block by block, where the search is exact), and multiplies all queries that probe a list
with it at once: one matrix product instead of a pass over memory for every query. It proposes candidates by approximate scores (float32
products with the stored vectors, or with what their codes stand for); candidates are then scored again from the stored vectors in float64, one
pair at a time. Those scores do not depend on the shard or on a neighbour, so that answers do not depend on how the index was cut, and ties go to
the lower id.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np

from attrib.index.cpu_kernel import SCAN_TOLERANCE, CpuKernel
from attrib.index.normalize import to_float32
from attrib.index.quantizer import nearest_lists
from attrib.index.shard import Shard

QUERY_ROWS = 131_072  # queries in one pass over the shard, if their probed lists fit SCAN_CELLS
SCAN_CELLS = 1 << 23  # (query, probed list) pairs in memory at a time
BLOCK_ROWS = 4_096  # vectors that are float32 at a time
SCORE_CELLS = 1 << 22  # float32 scores in memory at a time; 16 MiB stay in most last-level caches
MAX_KEPT = 1 << 20  # candidates beyond a few for each query: a tie can be as large as the shard
RESCORE_BYTES = 1 << 23  # float64 candidates in memory at a time


@dataclass(frozen=True)
class Candidates:
    """Candidates as flat columns, by query: query int64 [m] (its position), id int64 [m], scan_score and score float32 [m] (cosine)."""

    query: np.ndarray
    id: np.ndarray
    scan_score: np.ndarray
    score: np.ndarray

    def at(self, rows: np.ndarray) -> "Candidates":
        return Candidates(self.query[rows], self.id[rows], self.scan_score[rows], self.score[rows])


def search_shard(
    shard: Shard,
    queries: np.ndarray,
    k: int,
    num_candidates: int,
    nprobe: int,
    compressed: bool,
    kernel: type[CpuKernel] = CpuKernel,
    lists: np.ndarray | None = None,
) -> Candidates:
    """Candidates of one shard for unit queries float32 [n, d], by query. nprobe: lists that each query sees; 0: all vectors.

    compressed: scan the codes; the `num_candidates` best by scan score (and what ties with the last of them), each with its exact score, for
    `merge` to cut over all shards. Otherwise the vectors are scanned, and these are the k nearest of what was probed. kernel: where the arithmetic
    runs (kernels.CpuKernel, torch_kernel.TorchKernel). lists: int [n, nprobe], those that each query probes, where they are known.
    """
    width = max(num_candidates, k) if compressed else k
    rows = min(QUERY_ROWS, max(1, SCAN_CELLS // max(nprobe, 1)))
    found = []
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        # A vector among the `width` best by exact score may be below the width-th best scan score by two rounding errors.
        margin = SCAN_TOLERANCE if compressed else 2 * kernel.tolerance
        best = _Best(shard, kernel(block, width, margin), block, k, compressed)
        if nprobe and shard.offsets is not None:
            probed = probed_lists(shard.quantizer, block, nprobe) if lists is None else lists[start : start + rows]
            _scan(shard, best, _visits(shard, probed), compressed)
        else:
            _scan(shard, best, _everything(shard, len(block)), compressed)
        part = best.finish()
        found.append(Candidates(part.query + start, part.id, part.scan_score, part.score))
    return _concatenate(found)


def probed_lists(quantizer: faiss.IndexIVF, queries: np.ndarray, nprobe: int) -> np.ndarray:
    """int32 [n, nprobe]: the lists that unit queries float32 [n, d] probe; of all lists, where nprobe is more."""
    return nearest_lists(quantizer, queries, min(nprobe, quantizer.nlist)).astype(np.int32)


def _scan(shard: Shard, best: "_Best", visits: Iterator[tuple[int, int, int, np.ndarray]], compressed: bool) -> None:
    """visits: list number, its rows [start, stop), and the queries that want it, int64 [m]."""
    kernel = best.kernel
    upcoming = next(visits, None)
    while upcoming is not None:
        (list_number, start, stop, rows), upcoming = upcoming, next(visits, None)
        if upcoming is not None:
            _prefetch(shard.codes if compressed else shard.vectors, upcoming[1], upcoming[2])
        for first in range(start, stop, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, stop)
            block = (
                kernel.decoded(shard, list_number, first, last) if compressed else kernel.vectors(shard, first, last)
            )
            step = max(1, SCORE_CELLS // (last - first))
            for cut in range(0, len(rows), step):
                some = rows[cut : cut + step]
                query, position, score = kernel.reaching(some, block)
                best.add(some[query], position + first, score)


def _everything(shard: Shard, num_queries: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    rows = np.arange(num_queries)
    for start in range(0, len(shard.ids), BLOCK_ROWS):
        yield 0, start, min(start + BLOCK_ROWS, len(shard.ids)), rows


def _visits(shard: Shard, lists: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Every list that is neither empty nor unprobed. lists: int [n, nprobe], of each query."""
    order = np.argsort(lists, axis=None, kind="stable")
    query = order // lists.shape[1]
    ends = np.cumsum(np.bincount(lists.ravel(), minlength=shard.quantizer.nlist))
    offsets = shard.offsets.tolist()
    before = 0
    for number, end in enumerate(ends.tolist()):
        if end > before and offsets[number + 1] > offsets[number]:
            yield number, offsets[number], offsets[number + 1], query[before:end]
        before = end


def _prefetch(stored: np.ndarray, start: int, stop: int) -> None:
    """Tell the kernel to read what comes next while this list is multiplied."""
    mapped = stored.base
    if isinstance(mapped, np.memmap):
        row_bytes, pages = stored.strides[0], mapped._mmap
        first = (mapped.offset + start * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, first, min(len(pages), mapped.offset + stop * row_bytes) - first)


class _Best:
    """What a scan has found so far that may still be among the best of its query."""

    def __init__(self, shard: Shard, kernel: CpuKernel, queries: np.ndarray, k: int, compressed: bool):
        self.shard, self.kernel, self.queries, self.k, self.compressed = shard, kernel, queries, k, compressed
        self.query, self.position = np.empty(0, np.int64), np.empty(0, np.int64)
        self.scan_score = np.empty(0, np.float32)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.num_pending = 0

    def add(self, query: np.ndarray, position: np.ndarray, score: np.ndarray) -> None:
        self.pending.append((query, position, score))
        self.num_pending += len(query)
        # Often enough for floors to rise while they are low; each time costs a sort of what is kept.
        if self.num_pending > max(4 * len(self.queries) * self.kernel.width, 1 << 16):
            self._compact()

    def _compact(self) -> None:
        """Drop what is below the floors, and raise them to the width-th best so far."""
        columns = zip((self.query, self.position, self.scan_score), *self.pending)
        query, position, score = (np.concatenate(parts) for parts in columns)
        self.pending, self.num_pending = [], 0
        # Floors have risen since most of this was found; what is sorted are few of it.
        kept = score >= self.kernel.floors_of(query)
        query, position, score = query[kept], position[kept], score[kept]
        order = np.lexsort((-score, query))
        query, position, score = query[order], position[order], score[order]
        last = np.flatnonzero(ranks(query) == self.kernel.width - 1)
        floors = np.full(len(self.queries), -np.inf, np.float32)
        floors[query[last]] = score[last] - self.kernel.margin
        self.kernel.raise_floors(floors)
        kept = score >= floors[query]
        self.query, self.position, self.scan_score = query[kept], position[kept], score[kept]
        if len(self.query) > MAX_KEPT + 4 * len(self.queries) * self.kernel.width:
            self._cut_ties()

    def _cut_ties(self) -> None:
        """Of vectors that the scan cannot tell apart, keep the k nearest, and as many by scan score as are wanted."""
        found = self._scored()
        rows = _nearest(found, self.k)
        if self.compressed:
            order = np.lexsort((found.id, -found.scan_score, found.query))
            rows = np.union1d(rows, order[ranks(found.query[order]) < self.kernel.width])
        self.query, self.position, self.scan_score = self.query[rows], self.position[rows], self.scan_score[rows]

    def _scored(self) -> Candidates:
        scores = _exact_scores(self.shard, self.queries, self.query, self.position)
        return Candidates(self.query, self.shard.ids[self.position], self.scan_score, scores)

    def finish(self) -> Candidates:
        self._compact()
        found = self._scored()
        return found if self.compressed else found.at(_nearest(found, self.k))


def _exact_scores(shard: Shard, queries: np.ndarray, query: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Cosine float32 [m] of pairs. queries: unit float32 [n, d]; query and position: int64 [m]."""
    scores = np.empty(len(query), np.float32)
    order = np.argsort(position)  # from the front of the file to its end
    rows = max(1, RESCORE_BYTES // (8 * queries.shape[1]))
    for start in range(0, len(query), rows):
        some = order[start : start + rows]
        vectors = to_float32(shard.vectors[position[some]]).astype(np.float64)
        products = np.einsum("md,md->m", queries[query[some]].astype(np.float64), vectors)
        scores[some] = products / np.sqrt(np.einsum("md,md->m", vectors, vectors))
    return scores


def merge(parts: list[Candidates], k: int, num_candidates: int | None = None) -> Candidates:
    """The k best of all parts by exact score, ties to the lower id; by query, then rank.

    num_candidates: first keep that many per query by scan score, and what ties with the last of them, so that a compressed index re-ranks the
    same candidates however it is sharded.
    """
    found = _concatenate(parts) if num_candidates is None else keep_candidates(parts, num_candidates)
    return found.at(_nearest(found, k))


def keep_candidates(parts: list[Candidates], num_candidates: int) -> Candidates:
    """The best `num_candidates` per query by scan score, and what ties with the last of them; parts may be folded in one by one."""
    found = _concatenate(parts)
    order = np.lexsort((-found.scan_score, found.query))
    last = order[ranks(found.query[order]) == num_candidates - 1]
    floor = np.full(found.query.max(initial=-1) + 1, -np.inf, np.float32)
    floor[found.query[last]] = found.scan_score[last] - SCAN_TOLERANCE
    return found.at(found.scan_score >= floor[found.query])


def ranks(query: np.ndarray) -> np.ndarray:
    """Position of each row within its query, from 0; query: int64 [m], grouped."""
    if not len(query):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1]])
    return np.arange(len(query)) - np.repeat(starts, np.diff(np.r_[starts, len(query)]))


def _concatenate(parts: list[Candidates]) -> Candidates:
    none = Candidates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32))
    return Candidates(
        *(np.concatenate([getattr(p, name) for p in (none, *parts)]) for name in ("query", "id", "scan_score", "score"))
    )


def _nearest(found: Candidates, k: int) -> np.ndarray:
    """Rows of the k nearest per query by exact score, ties to the lower id; by query, then rank."""
    order = np.lexsort((found.id, -found.score, found.query))
    return order[ranks(found.query[order]) < k]
