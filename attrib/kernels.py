"""The arithmetic of a scan on a CPU: stored vectors to unit float32, products with queries, and what reaches the queries' floors.

`attrib/torch_kernel.py` has the same for GPUs. NumPy here and not torch: torch takes half a gigabyte of every search worker. A list is small
enough for its products to stay in the cache, so that the time goes where it must, into one matrix product a list.
"""

import numpy as np

from attrib.index import Shard
from attrib.template import decode
from attrib.units import to_float32

# Well above the rounding error of float32 products of unit vectors: tests/test_search.py holds that to a quarter.
SCAN_TOLERANCE = 1e-5


class CpuKernel:
    """Queries and their floors, the scan scores below which nothing can be among a query's `width` best.

    queries: float32 [n, d], unit length. floors: float32 [n], only ever raised.
    """

    # A scan score is at most this far from the exact one.
    tolerance = SCAN_TOLERANCE

    def __init__(self, queries: np.ndarray, width: int, margin: float):
        self.queries, self.width, self.margin = queries, width, np.float32(margin)
        self.floors = np.full(len(queries), -np.inf, np.float32)

    def vectors(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as unit float32."""
        rows = to_float32(shard.vectors[start:stop])
        rows *= shard.inverse_norms[start:stop, None]
        return rows

    def decoded(self, shard: Shard, list_number: int, start: int, stop: int) -> np.ndarray:
        """What the codes of rows [start, stop), all of one list, stand for; of unit length, as what they were made from."""
        block = decode(shard.template, shard.codes[start:stop], list_number)
        # A code may stand for nothing at all, where vectors are many times closer to their centroid than to the origin of a sphere.
        block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return block

    def reaching(self, rows: np.ndarray | slice, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the products of the queries `rows` with a block float32 [b, d], those that reach the query's floor.

        Position in rows int64 [h], position in the block int64 [h], score float32 [h]. Floors of queries that found more than `width` rise.
        """
        scores = self.queries[rows] @ block.T
        num_queries, num_vectors = scores.shape
        floors = self.floors[rows]
        if num_vectors > self.width:
            fresh = np.flatnonzero(floors == -np.inf)
            self._raise(floors, scores, fresh)
        hits = np.flatnonzero(scores >= floors[:, None])
        query = hits // num_vectors
        if len(hits) > self.width and num_vectors > self.width:
            crowded = np.flatnonzero(np.bincount(query, minlength=num_queries) > self.width)
            if len(crowded):
                self._raise(floors, scores, crowded)
                hits = hits[scores.ravel()[hits] >= floors[query]]
                query = hits // num_vectors
        self.floors[rows] = floors
        return query, hits - query * num_vectors, scores.ravel()[hits]

    def _raise(self, floors: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
        """Floors of some rows to their own `width`-th best score of this block, less the margin."""
        if not len(rows):
            return
        place = scores.shape[1] - self.width
        best = np.partition(scores[rows], place, axis=1)[:, place]
        floors[rows] = np.maximum(floors[rows], best - self.margin)

    def raise_floors(self, floors: np.ndarray) -> None:
        np.maximum(self.floors, floors, out=self.floors)
