"""Recall of an approximate index against exact search, and the smallest nprobe that reaches a target."""

from collections.abc import Callable

import faiss
import numpy as np

from attrib.index.quantizer import nearest_lists
from attrib.index.search import ranks

MIN_GAIN = 0.0005  # recall that a quarter more lists must gain; below it, more lists will not help
LIST_ORDER_QUERIES = 256  # queries per block of complete list orders, to bound memory


def without_self(query_ids: np.ndarray, query: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Return neighbours int64 [n, k] (-1 padded) without each query's own image.

    query: int64 [m], ascending, positions in query_ids. ids: int64 [m], the ranked neighbours of these queries.
    """
    kept = ids != query_ids[query]
    query, ids = query[kept], ids[kept]
    table, rank = np.full((len(query_ids), k), -1, np.int64), ranks(query)
    table[query[rank < k], rank[rank < k]] = ids[rank < k]
    return table


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of the true neighbours that were found. found, truth: int64 [n, k], -1 padded.

    Without padding this is `faiss.contrib.evaluation.knn_intersection_measure`, which counts -1 as a neighbour.
    """
    hits = sum(len(np.intersect1d(f[f >= 0], t[t >= 0])) for f, t in zip(found, truth))
    return hits / max(1, int((truth >= 0).sum()))


def recall_by_nprobe(quantizer: faiss.IndexIVF, queries: np.ndarray, neighbour_lists: np.ndarray) -> np.ndarray:
    """Return float64 [num_lists]: entry i is the share of true neighbours in the i + 1 lists nearest to their query.

    queries: unit vectors float32 [n, d]. neighbour_lists: int64 [n, k], the list of each true neighbour, -1 for
    padding. For vectors that are not compressed this is the recall at nprobe = i + 1.
    """
    counts = np.zeros(quantizer.nlist, np.int64)
    for start in range(0, len(queries), LIST_ORDER_QUERIES):
        wanted = neighbour_lists[start : start + LIST_ORDER_QUERIES]
        order = nearest_lists(quantizer, queries[start : start + LIST_ORDER_QUERIES], quantizer.nlist)
        place = np.take_along_axis(np.argsort(order, axis=1), np.maximum(wanted, 0), axis=1)
        counts += np.bincount(place[wanted >= 0], minlength=quantizer.nlist)
    return np.asarray(np.cumsum(counts) / max(1, counts.sum()))


def smallest_nprobe(measure: Callable[[int], float], first: int, num_lists: int, target: float) -> tuple[int, float]:
    """Return the smallest nprobe >= `first` whose measured recall reaches the target, and that recall.

    If none does (the codes are too coarse for the re-ranking): the nprobe after which recall stopped rising.
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
        if (between_found := measure(between)) >= target:
            nprobe, found = between, between_found
        else:
            failed = between
    return nprobe, found
