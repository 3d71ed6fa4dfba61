"""The arithmetic of a scan on a CPU: stored vectors to unit float32, products with queries, and what reaches the queries' floors.

`attrib/index/gpu_kernel.py` has the same for GPUs. NumPy here and not torch: torch takes half a gigabyte of every search worker. A list is small
enough for its products to stay in the cache, so that the time goes where it must, into one matrix product a list.
"""

import numpy as np

from attrib.index.normalize import to_float32
from attrib.index.quantizer import decode
from attrib.index.shard import Shard

# Well above the rounding error of float32 products of unit vectors: tests/test_search.py holds that to a quarter.
SCAN_TOLERANCE = 1e-5
GROUPS_PER_WIDTH = 4


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
        return to_float32(shard.vectors[start:stop], shard.inverse_norms[start:stop])

    def decoded(self, shard: Shard, list_number: int, start: int, stop: int) -> np.ndarray:
        """What the codes of rows [start, stop), all of one list, stand for; of unit length, as what they were made from."""
        block = decode(shard.quantizer, shard.codes[start:stop], list_number)
        # A code may stand for nothing at all, where vectors are many times closer to their centroid than to the origin of a sphere.
        block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return block

    def reaching(self, rows: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the products of the queries `rows` with a block float32 [b, d], those that reach the query's floor.

        Position in rows int64 [h], position in the block int64 [h], score float32 [h]. Floors rise to what `width` of the products reach.
        """
        # This way around: BLAS fills its registers from the block, and is up to twice as fast where few queries meet a list.
        scores = block @ self.queries[rows].T
        floors = np.maximum(self.floors[rows], self._reached(scores) - self.margin)
        self.floors[rows] = floors
        hits = np.flatnonzero(scores >= floors)
        position, query = np.divmod(hits, len(rows))
        return query, position, scores.ravel()[hits]

    def _reached(self, scores: np.ndarray) -> np.ndarray | np.float32:
        """float32 [m]: what `width` scores of each column of float32 [b, m] reach or surpass.

        The `width`-th best of the maxima of a few times as many groups of rows: hardly below the `width`-th best of all, and sooner found.
        """
        maxima = scores
        while len(maxima) >= 2 * GROUPS_PER_WIDTH * self.width:
            half = len(maxima) // 2
            maxima = np.maximum(maxima[:half], maxima[half : 2 * half])
        place = len(maxima) - self.width
        if place < 0:
            return np.float32(-np.inf)
        return np.partition(maxima.T, place, axis=1)[:, place]

    def floors_of(self, queries: np.ndarray) -> np.ndarray:
        """float32 [m] of queries int64 [m]."""
        return self.floors[queries]

    def raise_floors(self, floors: np.ndarray) -> None:
        np.maximum(self.floors, floors, out=self.floors)
