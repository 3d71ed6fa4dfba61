"""Search of one shard for a block of queries, exact scores for what it finds, and the exact merge of shards.

A scan proposes candidates by approximate scores (BLAS products over all vectors or the probed lists, or quantised codes); candidates are then
scored again from the stored vectors in float64, one pair at a time. Those scores do not depend on the shard or on a neighbour, so that answers
do not depend on how the index was cut, and ties go to the lower id.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import lru_cache, partial

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

from attrib.errors import AttribError
from attrib.index import ADD_ROWS, Shard, unit_rows

# Well above the rounding error of float32 products and squared distances of unit vectors: tests/test_search.py holds that to a quarter.
SCAN_TOLERANCE = 1e-5
SLACK = 16  # candidates scanned beyond those wanted, to see whether a tie straddles the cut
SCAN_CELLS = 1 << 23  # (query, candidate) or (query, probed list) pairs in memory at a time
GPU_MAX_K = 2048
LIST_CELLS = 1 << 26  # float32 distances of one list to the queries that probe it, if all do
TIED_QUERIES = 8  # queries whose ties are in memory at a time; a tie can be as large as the shard
RESCORE_BYTES = 1 << 25  # float64 candidates in memory at a time


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
    shard: Shard, queries: np.ndarray, k: int, num_candidates: int, nprobe: int, compressed: bool, gpu: bool = False
) -> Candidates:
    """Candidates of one shard for unit queries float32 [n, d], by query. gpu: scan on the process's GPU. Raises AttribError beyond its limits.

    compressed: the `num_candidates` best by scan score, each with its exact score, and of those that tie with the last of them the k nearest, for
    `merge` to cut over all shards. Otherwise the scan is exact up to rounding, and these are the k nearest among what was probed.
    """
    num_scanned = max(num_candidates, k) if compressed else k
    width = min(num_scanned + SLACK, len(shard.ids))
    if gpu and width > GPU_MAX_K:
        raise AttribError(
            f"{num_scanned} candidates are more than the {GPU_MAX_K - SLACK} that FAISS scans for on a GPU; lower top_k or rerank_factor, "
            "or set device: cpu"
        )
    rows = max(1, min(SCAN_CELLS // max(width, nprobe), LIST_CELLS // _longest_list(shard)))
    found = []
    for start in range(0, len(queries), rows):
        block = _search_block(
            _Probed(shard, queries[start : start + rows], nprobe, gpu), k, num_scanned, width, compressed
        )
        found += [Candidates(part.query + start, part.id, part.scan_score, part.score) for part in block]
    if not compressed:
        return merge(found, k)
    everything = _concatenate(found)
    return everything.at(np.argsort(everything.query, kind="stable"))


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


def _search_block(probed: "_Probed", k: int, num_scanned: int, width: int, compressed: bool) -> list[Candidates]:
    shard, queries = probed.shard, probed.queries
    scan, ids = probed.scan(width)
    valid = ids >= 0
    # `floor` bounds the scan scores of the answer from below; where the last scan score is lower, nothing unseen belongs in it.
    if compressed:
        floor = scan[:, min(num_scanned, width) - 1] - SCAN_TOLERANCE
        above = valid & (scan >= floor[:, None])
        found = _score(shard, queries, np.nonzero(above)[0], ids[above], scan[above])
    else:
        found = _score(shard, queries, np.nonzero(valid)[0], ids[valid], scan[valid])
        exact = np.full(ids.shape, -np.inf, np.float32)
        exact[valid] = found.score
        floor = -np.sort(-exact, axis=1)[:, min(k, width) - 1] - SCAN_TOLERANCE
        found = found.at(found.scan_score >= floor[found.query])
    complete = (width == len(shard.ids)) | ~valid[:, -1] | (scan[:, -1] < floor)
    kept = [found.at(complete[found.query])]
    tied = np.flatnonzero(~complete)
    for start in range(0, len(tied), TIED_QUERIES):
        group = tied[start : start + TIED_QUERIES]
        part = _score(shard, queries, *probed.all_above(group, floor[group]))
        rows = _nearest(part, k)
        if compressed:
            order = np.lexsort((part.id, -part.scan_score, part.query))
            rows = np.union1d(rows, order[ranks(part.query[order]) < num_scanned])
        kept.append(part.at(rows))
    return kept


@lru_cache(maxsize=1)
def _gpu_resources():
    if not faiss.get_num_gpus():
        raise AttribError(
            "FAISS sees no GPU in a worker that was given one; is faiss-cpu installed? Or set device: cpu"
        )
    return faiss.StandardGpuResources()


def _longest_list(shard: Shard) -> int:
    if shard.lists is None:
        return 1
    return max(1, *(shard.lists.invlists.list_size(i) for i in range(shard.lists.nlist)))


class _Probed:
    """A block of queries and the lists that each of them probes (of kind flat: all vectors)."""

    def __init__(self, shard: Shard, queries: np.ndarray, nprobe: int, gpu: bool):
        self.shard, self.queries = shard, queries
        self.knn, self.pairwise_distances = faiss.knn, faiss.pairwise_distances
        if gpu:
            self.knn = partial(faiss.knn_gpu, _gpu_resources())
            self.pairwise_distances = partial(faiss.pairwise_distance_gpu, _gpu_resources())
        if shard.lists is not None:
            shard.lists.nprobe = min(nprobe, shard.lists.nlist)
            self.list_distances, self.lists = shard.lists.quantizer.search(queries, shard.lists.nprobe)

    def scan(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [n, width], descending, and ids int64 [n, width]; id -1 where fewer were probed."""
        if self.shard.lists is None:
            return self._scan_flat(width)
        lists = self.shard.lists
        # Few queries meet few others at a list: walking all lists would not pay, and FAISS's list-major search fails on them.
        if self.lists.size <= lists.nlist + 1:
            distances, ids = lists.search_preassigned(self.queries, width, self.lists, self.list_distances)
            return 1 - distances / 2, ids
        # verbose=1 is the quietest setting (0 prints a line per list), and it still prints timings.
        with contextlib.redirect_stdout(io.StringIO()):
            distances, ids = big_batch_search(
                lists,
                self.queries,
                width,
                pairwise_distances=self.pairwise_distances,
                method="pairwise_distances",  # its default, a k-nearest search per list, is slower at the usual sizes of lists
                verbose=1,
                q_assign=self.lists.astype(np.int32),  # a copy: it is sorted in place
            )
        return 1 - distances / 2, ids

    def _scan_flat(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        best = faiss.ResultHeap(len(self.queries), width, keep_max=True)
        for first, block in self._blocks():
            scores, at = self.knn(self.queries, block, min(width, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            best.add_result(scores, self.shard.ids[first + at])
        best.finalize()
        return best.D, best.I

    def all_above(self, group: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, id and scan score of everything probed by the queries int64 [m] whose scan score is at least floor float32 [m]."""
        found = []
        if self.shard.lists is None:
            for first, block in self._blocks():
                scores = faiss.pairwise_distances(self.queries[group], block, faiss.METRIC_INNER_PRODUCT)
                query, at = np.nonzero(scores >= floor[:, None])
                found.append((group[query], self.shard.ids[first + at], scores[query, at]))
        else:
            for query, least in zip(group, floor.tolist()):
                one = slice(query, query + 1)
                _, distances, ids = self.shard.lists.range_search_preassigned(
                    self.queries[one], 2 - 2 * least, self.lists[one], self.list_distances[one]
                )
                found.append((np.full(len(ids), query), ids, 1 - distances / 2))
        return tuple(np.concatenate(column) for column in zip(*found))

    def _blocks(self):
        for first in range(0, len(self.shard.ids), ADD_ROWS):
            yield first, unit_rows(self.shard.vectors[first : first + ADD_ROWS])


def _score(shard: Shard, queries: np.ndarray, query: np.ndarray, ids: np.ndarray, scan: np.ndarray) -> Candidates:
    """Candidates with their exact scores. queries: float32 [n, d]; query: position int64 [m]; ids: int64 [m]; scan: float32 [m]."""
    position = np.searchsorted(shard.ids, ids)
    scores = np.empty(len(ids), np.float32)
    rows = max(1, RESCORE_BYTES // (8 * queries.shape[1]))
    for start in range(0, len(ids), rows):
        block = slice(start, start + rows)
        vectors = shard.vectors[position[block]].astype(np.float64)
        products = np.einsum("md,md->m", queries[query[block]].astype(np.float64), vectors)
        scores[block] = products / np.sqrt(np.einsum("md,md->m", vectors, vectors))
    return Candidates(query, ids, scan.astype(np.float32), scores)
