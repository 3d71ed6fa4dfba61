"""How many distractors reach each of a query's thresholds, exactly, in one pass over a million of them.

Only counts are kept, never a matrix of queries x distractors: 15 TFLOP for a million x 768 and 10,000 queries, done in float32. A float32
product of two unit vectors is off by at most (d + 2) * 2^-24, whatever the order of its additions (Higham, "Accuracy and Stability of
Numerical Algorithms", 2nd ed., eq. 3.5, with the sum of |x_i y_i| at most 1; 2 more for rounding the vectors). What lies further than that
from a threshold is counted as it is; the few pairs that lie nearer are multiplied again in float64. So the counts are those of float64.

Measured (tests/test_abc_protocol.py --long) for that size with 12 exemplars a query, two shared CPU cores: 4.3 minutes, 2.3 GB at most in
the whole process, of which 1.5 GB are pages of the memory-mapped file.
"""

from dataclasses import dataclass

import numpy as np

from attrib.common.errors import AttribError
from attrib.evaluate.collection import unit_rows
from attrib.evaluate.distractors import Distractors
from attrib.evaluate.scores import TIE, TOP_SOURCES

QUERY_ROWS = 1024  # float32 scores of these with one block of 16,384 distractors: 64 MB


@dataclass(frozen=True)
class Scan:
    """num_at_or_above: int64 [q, t]; the best distractors, best first: top_rows int64 [q, TOP_SOURCES], -1 where there are fewer, and
    top_similarity float64, -inf there."""

    num_at_or_above: np.ndarray
    top_rows: np.ndarray
    top_similarity: np.ndarray


def scan_distractors(queries: np.ndarray, thresholds: np.ndarray, distractors: Distractors, mapper=None) -> Scan:
    """Counts for unit vectors float64 [q, d] and thresholds float64 [q, t], padded with +inf; mapper: the real images', for distractors.

    Peak memory beside the arguments: 0.6 GB for d = 768 (a block in float64, twice when mapped, and in float32; scores), and 5 MB per
    thousand queries. Each block is read once. Raises AttribError if a distractor is not finite or dimensions differ.
    """
    state = _State(queries, thresholds)
    start = 0
    for block in distractors.blocks():
        if mapper is None and block.shape[1] != queries.shape[1]:
            raise AttribError(
                f"{distractors.origin} has vectors of {block.shape[1]} numbers and the queries have {queries.shape[1]}; make both with "
                "the same model"
            )
        rows = unit_rows(block, mapper, f"{distractors.origin}, rows from {start:,}")
        rows32 = rows.astype(np.float32)
        for first in range(0, len(queries), QUERY_ROWS):
            scores = state.queries32[first : first + QUERY_ROWS] @ rows32.T
            reached = np.flatnonzero(scores.max(axis=1) >= state.floors[first : first + QUERY_ROWS])
            for i in reached:
                state.add(first + i, scores[i], rows, start)
        start += len(block)
    return Scan(state.counts, state.top_rows, state.top_similarity)


class _State:
    """The counts and best distractors so far, and what a score must reach to change either."""

    def __init__(self, queries: np.ndarray, thresholds: np.ndarray):
        num_queries, dimension = queries.shape
        self.queries, self.thresholds = queries, thresholds
        self.queries32 = queries.astype(np.float32)
        # 8 instead of 2: second-order terms, and the rounding of the limits themselves to float32.
        self.margin = (dimension + 8) * 2.0**-24
        self.lower = (thresholds - TIE - self.margin).astype(np.float32)
        self.upper = (thresholds + self.margin).astype(np.float32)
        self.lowest = self.lower.min(axis=1, initial=np.inf)
        self.counts = np.zeros(thresholds.shape, np.int64)
        self.top_rows = np.full((num_queries, TOP_SOURCES), -1, np.int64)
        self.top_similarity = np.full((num_queries, TOP_SOURCES), -np.inf)
        self.floors = np.full(num_queries, -np.inf, np.float32)

    def add(self, i: int, scores: np.ndarray, rows: np.ndarray, start: int) -> None:
        """Count a block for query i: its float32 scores [b], the block's unit vectors float64 [b, d], and its first row's number."""
        at = np.flatnonzero(scores >= self.floors[i])
        found = scores[at]
        self._count(i, at, found, rows)
        self._keep_best(i, at, found, rows, start)

    def _count(self, i: int, at: np.ndarray, found: np.ndarray, rows: np.ndarray) -> None:
        ascending = np.sort(found)
        surely = len(found) - np.searchsorted(ascending, self.upper[i], side="right")
        perhaps = len(found) - np.searchsorted(ascending, self.lower[i], side="left")
        self.counts[i] += surely
        for j in np.flatnonzero(perhaps > surely):
            near = at[(found >= self.lower[i, j]) & (found <= self.upper[i, j])]
            exact = rows[near] @ self.queries[i]
            self.counts[i, j] += np.count_nonzero(exact >= self.thresholds[i, j] - TIE)

    def _keep_best(self, i: int, at: np.ndarray, found: np.ndarray, rows: np.ndarray, start: int) -> None:
        worst_kept = self.top_similarity[i, -1]
        if len(found) > TOP_SOURCES:
            # The exact fifth best is at most a margin below the fifth best in float32, which itself is off by at most one.
            worst_kept = max(worst_kept, np.partition(found, -TOP_SOURCES)[-TOP_SOURCES] - self.margin)
        better = at[found >= worst_kept - self.margin]
        if not len(better):
            return
        similarity = np.concatenate([self.top_similarity[i], rows[better] @ self.queries[i]])
        numbers = np.concatenate([self.top_rows[i], better + start])
        order = np.lexsort((numbers, -similarity))[:TOP_SOURCES]
        self.top_similarity[i], self.top_rows[i] = similarity[order], numbers[order]
        self.floors[i] = min(self.lowest[i], similarity[order[-1]] - self.margin)
