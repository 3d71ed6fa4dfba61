"""What this machine multiplies: the arithmetic ceiling of every search."""

import numpy as np

from attrib.benchmark.contender import Clock

ROWS, COLUMNS, DIMENSION, REPEATS = 2048, 4096, 256, 20


def gemm(job: dict, clock: Clock) -> dict:
    """Lap "gflop": seconds for a billion float32 operations of a 2,048 x 256 by 256 x 4,096 product."""
    generator = np.random.default_rng(0)
    left = generator.standard_normal((ROWS, DIMENSION), np.float32)
    right = generator.standard_normal((DIMENSION, COLUMNS), np.float32)
    left @ right
    with clock.lap("gflop", scale=1 / (REPEATS * 2 * ROWS * COLUMNS * DIMENSION / 1e9)):
        for _ in range(REPEATS):
            left @ right
    return {}
