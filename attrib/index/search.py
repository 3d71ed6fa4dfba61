"""Search one shard for a block of queries, score its candidates exactly, and merge the results of all shards.

A scan reads the shard once, list by list (exact search: block by block), and multiplies each list with all queries
that probe it in one matrix product, in the order of `faiss.contrib.big_batch_search`. Unlike there, vectors are
memory-mapped float16 arrays, candidates get exact scores, and the result is deterministic.

The scan selects candidates by approximate scores: float32 products with the stored or the decoded vectors. Candidates
are then scored again, one pair at a time, in float64 from the stored vectors. These scores do not depend on the
sharding of the index. Ties go to the lower id.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace

import faiss
import numpy as np

from attrib.index.cpu_kernel import SCAN_TOLERANCE, CpuKernel
from attrib.index.normalize import to_float32
from attrib.index.quantizer import nearest_lists
from attrib.index.shard import Shard

QUERY_ROWS = 131_072  # queries per pass over the shard, if their probed lists fit SCAN_CELLS
SCAN_CELLS = 1 << 23  # (query, probed list) pairs in memory at a time
BLOCK_ROWS = 4_096  # vectors converted to float32 at a time
SCORE_CELLS = 1 << 22  # float32 scores in memory at a time; 16 MiB fit most last-level caches
MAX_KEPT = 1 << 20  # candidates beyond the width of all queries: a tie can be as large as the shard
RESCORE_BYTES = 1 << 23  # float64 candidates in memory at a time

COLUMNS = {"query": np.int64, "id": np.int64, "scan_score": np.float32, "score": np.float32}


@dataclass(frozen=True)
class Candidates:
    """Candidates as columns of m rows, grouped by query."""

    query: np.ndarray  # int64 [m], position of the query
    id: np.ndarray  # int64 [m]
    scan_score: np.ndarray  # float32 [m], approximate cosine
    score: np.ndarray  # float32 [m], exact cosine

    def at(self, rows: np.ndarray | slice) -> "Candidates":
        return Candidates(*(getattr(self, column)[rows] for column in COLUMNS))


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
    """Return candidates of one shard, grouped by query. queries: unit vectors float32 [n, d].

    nprobe: number of lists that each query probes; 0: all vectors. compressed: scan the codes and return, with exact
    scores, the `num_candidates` best by scan score and ties with the last, for `merge`; otherwise scan the vectors and
    return the k nearest. kernel: CpuKernel or TorchKernel. lists: int [n, nprobe], the probed lists if known.
    """
    width = max(num_candidates, k) if compressed else k
    rows = min(QUERY_ROWS, max(1, SCAN_CELLS // max(nprobe, 1)))
    found = []
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        # The scan score of one of the `width` best may be two rounding errors below the width-th best scan score.
        margin = SCAN_TOLERANCE if compressed else 2 * kernel.tolerance
        best = _Best(shard, kernel(block, width, margin), block, k, compressed)
        if nprobe and shard.quantizer is not None:
            probed = probed_lists(shard.quantizer, block, nprobe) if lists is None else lists[start : start + rows]
            _scan(best, _visits(shard, probed))
        else:
            _scan(best, _everything(shard, len(block)))
        part = best.finish()
        found.append(replace(part, query=part.query + start))
    return _concatenate(found)


def probed_lists(quantizer: faiss.IndexIVF, queries: np.ndarray, nprobe: int) -> np.ndarray:
    """Return int32 [n, min(nprobe, num_lists)]: the lists that unit queries float32 [n, d] probe."""
    return nearest_lists(quantizer, queries, min(nprobe, quantizer.nlist)).astype(np.int32)


def _scan(best: "_Best", visits: Iterator[tuple[int, int, int, np.ndarray]]) -> None:
    """Scan all visits: list number, its rows [start, stop), and the queries that probe it, int64 [m]."""
    shard, kernel, compressed = best.shard, best.kernel, best.compressed
    stored = shard.codes if compressed and shard.codes is not None else shard.vectors
    upcoming = next(visits, None)
    while upcoming is not None:
        (list_number, start, stop, rows), upcoming = upcoming, next(visits, None)
        if upcoming is not None:
            _prefetch(stored, upcoming[1], upcoming[2])
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
    """Yield the visits of all lists that are probed and not empty. lists: int [n, nprobe] of each query."""
    assert shard.quantizer is not None and shard.offsets is not None  # exact search visits blocks instead
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
    """Ask the operating system to read the next rows while the current list is multiplied."""
    mapped = stored.base
    if isinstance(mapped, np.memmap):
        row_bytes, pages = stored.strides[0], mapped._mmap  # type: ignore[attr-defined]  # the only access to madvise
        first = (mapped.offset + start * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, first, min(len(pages), mapped.offset + stop * row_bytes) - first)


class _Best:
    """The candidates of a scan so far that may still be among the best of their query."""

    def __init__(self, shard: Shard, kernel: CpuKernel, queries: np.ndarray, k: int, compressed: bool):
        self.shard, self.kernel, self.queries, self.k, self.compressed = shard, kernel, queries, k, compressed
        self.kept = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)  # query, position, scan score
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.num_pending = 0

    def add(self, query: np.ndarray, position: np.ndarray, score: np.ndarray) -> None:
        self.pending.append((query, position, score))
        self.num_pending += len(query)
        # Early compaction raises the floors; each compaction sorts the kept candidates.
        if self.num_pending > max(4 * len(self.queries) * self.kernel.width, 1 << 16):
            self._compact()

    def _compact(self) -> None:
        """Drop candidates below the floors, and raise the floors to the width-th best so far."""
        query, position, score = (np.concatenate(parts) for parts in zip(self.kept, *self.pending))
        self.pending, self.num_pending = [], 0
        # The floors have risen since, so few candidates are left to sort.
        rows = np.flatnonzero(score >= self.kernel.floors_of(query))
        rows = rows[np.lexsort((-score[rows], query[rows]))]
        query, position, score = query[rows], position[rows], score[rows]
        last = np.flatnonzero(ranks(query) == self.kernel.width - 1)
        floors = np.full(len(self.queries), -np.inf, np.float32)
        floors[query[last]] = score[last] - self.kernel.margin
        self.kernel.raise_floors(floors)
        rows = score >= floors[query]
        self.kept = query[rows], position[rows], score[rows]
        if len(self.kept[0]) > MAX_KEPT + 4 * len(self.queries) * self.kernel.width:
            self._cut_ties()

    def _cut_ties(self) -> None:
        """Keep the k nearest of many ties, and for compressed kinds also the `width` best by scan score."""
        found = self._scored()
        rows = _nearest(found, self.k)
        if self.compressed:
            order = np.lexsort((found.id, -found.scan_score, found.query))
            rows = np.union1d(rows, order[ranks(found.query[order]) < self.kernel.width])
        query, position, scan_score = self.kept
        self.kept = query[rows], position[rows], scan_score[rows]

    def _scored(self) -> Candidates:
        query, position, scan_score = self.kept
        scores = _exact_scores(self.shard, self.queries, query, position)
        return Candidates(query, self.shard.ids[position], scan_score, scores)

    def finish(self) -> Candidates:
        self._compact()
        found = self._scored()
        return found if self.compressed else found.at(_nearest(found, self.k))


def _exact_scores(shard: Shard, queries: np.ndarray, query: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return the exact cosine float32 [m] of pairs (query, position). queries: unit vectors float32 [n, d]."""
    scores = np.empty(len(query), np.float32)
    order = np.argsort(position)  # reads the file sequentially
    rows = max(1, RESCORE_BYTES // (8 * queries.shape[1]))
    for start in range(0, len(query), rows):
        some = order[start : start + rows]
        vectors = to_float32(shard.vectors[position[some]]).astype(np.float64)
        products = np.einsum("md,md->m", queries[query[some]].astype(np.float64), vectors)
        scores[some] = products / np.sqrt(np.einsum("md,md->m", vectors, vectors))
    return scores


def merge(parts: list[Candidates], k: int, num_candidates: int | None = None) -> Candidates:
    """Return the k best of all parts per query by exact score, sorted by query and rank; ties go to the lower id.

    num_candidates: first keep this many per query by scan score, and ties, as one shard with all vectors would.
    """
    found = _concatenate(parts) if num_candidates is None else keep_candidates(parts, num_candidates)
    return found.at(_nearest(found, k))


def keep_candidates(parts: list[Candidates], num_candidates: int) -> Candidates:
    """Return the `num_candidates` best per query by scan score, and ties with the last. May be applied repeatedly."""
    found = _concatenate(parts)
    order = np.lexsort((-found.scan_score, found.query))
    last = order[ranks(found.query[order]) == num_candidates - 1]
    floor = np.full(found.query.max(initial=-1) + 1, -np.inf, np.float32)
    floor[found.query[last]] = found.scan_score[last] - SCAN_TOLERANCE
    return found.at(found.scan_score >= floor[found.query])


def ranks(query: np.ndarray) -> np.ndarray:
    """Return the position of each row within its query, from 0. query: int64 [m], grouped."""
    if not len(query):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1]])
    return np.arange(len(query)) - np.repeat(starts, np.diff(np.r_[starts, len(query)]))


def _concatenate(parts: list[Candidates]) -> Candidates:
    return Candidates(
        *(np.concatenate([np.empty(0, kind), *(getattr(p, name) for p in parts)]) for name, kind in COLUMNS.items())
    )


def _nearest(found: Candidates, k: int) -> np.ndarray:
    """Return the rows of the k nearest per query by exact score, sorted by query and rank; ties go to the lower id."""
    order = np.lexsort((found.id, -found.score, found.query))
    return order[ranks(found.query[order]) < k]
