"""Recall of an approximate index against exact search, and the smallest nprobe that reaches a target."""

from collections.abc import Callable

import faiss
import numpy as np

from attrib.data.ids import sampling_rank

MIN_GAIN = 0.0005  # of recall by a quarter more lists; below it more lists will not help
LIST_ORDER_QUERIES = 256  # queries whose whole order of lists is in memory at a time


def sample_threshold(wanted: int, num_vectors: int) -> np.uint64:
    """Images whose sampling_rank is at most this are enough (with a margin of six standard deviations) to take `wanted` of."""
    share = min(1.0, (wanted + 6 * wanted**0.5 + 8) / max(1, num_vectors))
    return np.uint64(min(share * 2**64, 2**64 - 2048))


def lowest_ranked(ids: np.ndarray, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` images that come first in the order of sampling_rank."""
    order = np.argsort(sampling_rank(ids))[:count]
    return ids[order], vectors[order]


def without_self(query_ids: np.ndarray, query: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Neighbour lists int64 [n, k] (-1 padded) from flat, ranked rows, leaving out each query's own image.

    query: int64 [m], the position of each row's query in query_ids, ascending; ids: int64 [m].
    """
    kept = ids != query_ids[query]
    query, ids = query[kept], ids[kept]
    table = np.full((len(query_ids), k), -1, np.int64)
    starts = np.searchsorted(query, np.arange(len(query_ids)))
    rank = np.arange(len(query)) - starts[query]
    table[query[rank < k], rank[rank < k]] = ids[rank < k]
    return table


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours that were found: int64 [n, k] each, -1 padded."""
    hits = sum(len(np.intersect1d(f[f >= 0], t[t >= 0])) for f, t in zip(found, truth))
    return hits / max(1, int((truth >= 0).sum()))


def recall_by_nprobe(template: faiss.IndexIVF, queries: np.ndarray, neighbour_lists: np.ndarray) -> np.ndarray:
    """float64 [num_lists]: entry i is the share of true neighbours that lie in the i + 1 lists nearest to their query.

    queries: unit float32 [n, d]; neighbour_lists: int64 [n, k], the list of each true neighbour, -1 where there is none. Without quantisation
    this is the recall at nprobe = i + 1, found for every nprobe at the price of one.
    """
    counts = np.zeros(template.nlist, np.int64)
    for start in range(0, len(queries), LIST_ORDER_QUERIES):
        wanted = neighbour_lists[start : start + LIST_ORDER_QUERIES]
        _, order = template.quantizer.search(queries[start : start + LIST_ORDER_QUERIES], template.nlist)
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(template.nlist)[None, :], axis=1)
        valid = wanted >= 0
        counts += np.bincount(np.take_along_axis(place, np.maximum(wanted, 0), axis=1)[valid], minlength=template.nlist)
    return np.cumsum(counts) / max(1, counts.sum())


def smallest_nprobe(measure: Callable[[int], float], first: int, num_lists: int, target: float) -> tuple[int, float]:
    """The smallest nprobe from `first` on whose measured recall reaches the target, and that recall.

    If the target is out of reach (codes too coarse for the re-rank), the nprobe after which recall stopped rising.
    """
    failed, previous, nprobe = first - 1, -1.0, first
    while (found := measure(nprobe)) < target:
        if nprobe >= num_lists:
            return nprobe, found
        if found < previous + MIN_GAIN:
            return failed, previous
        failed, previous, nprobe = nprobe, found, min(num_lists, nprobe + max(1, nprobe // 4))
    while nprobe - failed > 1:
        between = (failed + nprobe) // 2
        between_found = measure(between)
        if between_found >= target:
            nprobe, found = between, between_found
        else:
            failed = between
    return nprobe, found
