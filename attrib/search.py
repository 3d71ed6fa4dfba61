"""Search of one shard for a block of queries, exact scores for what it finds, and the exact merge of shards.

A scan proposes candidates by approximate scores (BLAS products over all vectors or the probed lists, or quantised codes); candidates are then
scored again from the stored vectors in float64, one pair at a time. Those scores are the same on every machine, in every shard and beside every
neighbour, so that answers do not depend on how the index was cut, and ties go to the lower id.
"""

import contextlib
import io
from dataclasses import dataclass

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

from attrib.index import ADD_ROWS, Shard, unit_rows

SCAN_TOLERANCE = 1e-5  # above the rounding error of a float32 product or squared distance of unit vectors
RESCORE_BYTES = 1 << 26  # float64 candidates in memory at a time


@dataclass(frozen=True)
class Candidates:
    """Candidates as flat columns, by query: query int64 [m] (its position), id int64 [m], scan_score and score float32 [m] (cosine)."""

    query: np.ndarray
    id: np.ndarray
    scan_score: np.ndarray
    score: np.ndarray


def search_shard(
    shard: Shard, queries: np.ndarray, k: int, num_candidates: int, nprobe: int, compressed: bool
) -> Candidates:
    """Candidates of one shard for unit queries float32 [n, d].

    compressed: the `num_candidates` best by scan score, each with its exact score, for `merge` to cut over all shards. Otherwise the scan is
    exact up to rounding, and these are the k nearest among what was probed: where equal or nearly equal scores straddle the end of the
    candidate list, it is widened until they do not.
    """
    wanted = min(max(num_candidates, k), len(shard.ids))
    everything = np.arange(len(queries))
    if compressed:
        scan, ids = _scan(shard, queries, wanted, nprobe)
        return _flatten(everything, ids, scan, _exact_scores(shard, queries, ids))
    pending, found = everything, []
    while len(pending):
        scan, ids = _scan(shard, queries[pending], wanted, nprobe)
        exact = _exact_scores(shard, queries[pending], ids)
        kth = -np.sort(-exact, axis=1)[:, min(k, wanted) - 1]
        settled = (wanted == len(shard.ids)) | (ids[:, -1] < 0) | (kth > scan[:, -1] + SCAN_TOLERANCE)
        found.append(_flatten(pending[settled], ids[settled], scan[settled], exact[settled]))
        pending = pending[~settled]
        wanted = min(4 * wanted, len(shard.ids))
    return merge(found, k)


def merge(parts: list[Candidates], k: int, num_candidates: int | None = None) -> Candidates:
    """The k best of all parts by exact score, ties to the lower id; by query, then rank.

    num_candidates: first keep that many per query by scan score, so that a compressed index re-ranks the same candidates however it is sharded.
    """
    query, ids, scan, score = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("query", "id", "scan_score", "score")
    )
    if num_candidates is not None:
        kept = _first_per_query(query, np.lexsort((ids, -scan, query)), num_candidates)
        query, ids, scan, score = query[kept], ids[kept], scan[kept], score[kept]
    kept = _first_per_query(query, np.lexsort((ids, -score, query)), k)
    return Candidates(query[kept], ids[kept], scan[kept], score[kept])


def ranks(query: np.ndarray) -> np.ndarray:
    """Position of each row within its query, from 0; query: int64 [m], grouped."""
    if not len(query):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1]])
    return np.arange(len(query)) - np.repeat(starts, np.diff(np.r_[starts, len(query)]))


def _first_per_query(query: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    return order[ranks(query[order]) < count]


def _scan(shard: Shard, queries: np.ndarray, wanted: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [n, wanted], descending, and ids int64 [n, wanted]; id -1 where fewer were probed."""
    if shard.lists is None:
        return _scan_flat(shard, queries, wanted)
    shard.lists.nprobe = min(nprobe, shard.lists.nlist)
    # verbose=1 is the quietest setting (0 prints a line per list), and it still prints timings.
    with contextlib.redirect_stdout(io.StringIO()):
        distances, ids = big_batch_search(shard.lists, queries, wanted, verbose=1)
    return 1 - distances / 2, ids


def _scan_flat(shard: Shard, queries: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    best = faiss.ResultHeap(len(queries), wanted, keep_max=True)
    for start in range(0, len(shard.ids), ADD_ROWS):
        block = unit_rows(shard.vectors[start : start + ADD_ROWS])
        scores, at = faiss.knn(queries, block, min(wanted, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(scores, shard.ids[start + at])
    best.finalize()
    return best.D, best.I


def _exact_scores(shard: Shard, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Cosine float32 [n, m] of queries float32 [n, d] and the stored vectors of ids int64 [n, m]; -inf for id -1."""
    position = np.searchsorted(shard.ids, np.maximum(ids, shard.ids[0]))
    scores = np.empty(ids.shape, np.float32)
    rows = max(1, RESCORE_BYTES // max(1, 8 * ids.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        vectors = shard.vectors[position[block]].astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        scores[block] = np.einsum("nd,nmd->nm", queries[block].astype(np.float64), vectors)
    scores[ids < 0] = -np.inf
    return scores


def _flatten(query: np.ndarray, ids: np.ndarray, scan: np.ndarray, exact: np.ndarray) -> Candidates:
    valid = ids >= 0
    return Candidates(
        np.repeat(query, ids.shape[1])[valid.ravel()], ids[valid], scan[valid].astype(np.float32), exact[valid]
    )
