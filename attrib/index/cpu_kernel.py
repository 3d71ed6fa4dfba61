"""The arithmetic of a scan on a CPU: convert vectors, multiply them with queries, keep scores above a threshold.

`attrib/index/gpu_kernel.py` does the same on GPUs. This module uses NumPy, because torch would take half a gigabyte
of every search worker.
"""

from typing import Any

import numpy as np

from attrib.index.normalize import to_float32
from attrib.index.quantizer import decode
from attrib.index.shard import Shard

# Four times the largest rounding error of float32 products that tests/unit/index/test_search.py accepts.
SCAN_TOLERANCE = 1e-5
GROUPS_PER_WIDTH = 4


class CpuKernel:
    """Queries and their floors: a scan score below the floor cannot belong to the `width` best of a query.

    queries: unit vectors float32 [n, d]. floors: float32 [n]; they never decrease. margin: difference between the
    width-th best scan score and the floor. A TorchKernel has the same methods, for blocks that are tensors.
    """

    tolerance = SCAN_TOLERANCE  # maximum difference between a scan score and the exact score

    def __init__(self, queries: np.ndarray, width: int, margin: float):
        self.queries: Any = queries
        self.width, self.margin = width, margin
        self.floors: Any = np.full(len(queries), -np.inf, np.float32)

    def vectors(self, shard: Shard, start: int, stop: int) -> Any:
        """Return rows [start, stop) of the shard as unit vectors float32 [b, d]."""
        return to_float32(shard.vectors[start:stop], shard.inverse_norms[start:stop])

    def decoded(self, shard: Shard, list_number: int, start: int, stop: int) -> Any:
        """Return unit vectors float32 [b, d] decoded from the codes of rows [start, stop), all of one list."""
        assert shard.quantizer is not None and shard.codes is not None  # only compressed shards are decoded
        block = decode(shard.quantizer, shard.codes[start:stop], list_number)
        # A decoded vector can be zero, if all vectors of a list are very close to its centroid.
        block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return block

    def reaching(self, rows: np.ndarray, block: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Multiply the queries `rows` with a block float32 [b, d]; return the scores that reach their query's floor.

        As position in rows int64 [h], position in the block int64 [h] and score float32 [h]. Raises the floors first.
        """
        # In this order of the factors BLAS is up to twice as fast if few queries probe the list.
        scores = block @ self.queries[rows].T
        floors = np.maximum(self.floors[rows], self._reached(scores) - self.margin)
        self.floors[rows] = floors
        hits = np.flatnonzero(scores >= floors)
        position, query = np.divmod(hits, len(rows))
        return query, position, scores.ravel()[hits]

    def _reached(self, scores: np.ndarray) -> np.ndarray | np.float32:
        """Return float32 [m]: a score that at least `width` values of each column of float32 [b, m] reach.

        It is the width-th best maximum of groups of rows: close to the width-th best of all, and faster to compute.
        """
        maxima = scores
        while len(maxima) >= 2 * GROUPS_PER_WIDTH * self.width:
            half = len(maxima) // 2
            maxima = np.maximum(maxima[:half], maxima[half : 2 * half])
        position = len(maxima) - self.width
        if position < 0:
            return np.float32(-np.inf)
        return np.asarray(np.partition(maxima.T, position, axis=1)[:, position])

    def floors_of(self, queries: np.ndarray) -> np.ndarray:
        """Return the floors float32 [m] of queries int64 [m]."""
        return np.asarray(self.floors[queries])

    def raise_floors(self, floors: np.ndarray) -> None:
        """Raise the floors of all queries to `floors`, float32 [n], where these are higher."""
        np.maximum(self.floors, floors, out=self.floors)
