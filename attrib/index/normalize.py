"""Convert stored float16 vectors to float32 and to unit length; the cosine is the product of unit vectors."""

import numpy as np

BIAS = np.float32(2.0**112)  # difference of the exponent biases of float32 and float16


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return unit vectors float32 [n, d] of vectors [n, d] of any float type."""
    if vectors.dtype == np.float16:
        rows = to_float32(vectors)
        rows *= inverse_norms(rows)[:, None]
        return rows
    rows = vectors.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def inverse_norms(rows: np.ndarray) -> np.ndarray:
    """Return 1 / norm of each row: float32 [n, d] -> float32 [n]."""
    return np.asarray(1 / np.sqrt(np.einsum("nd,nd->n", rows, rows)))


def to_float32(vectors: np.ndarray, factors: np.ndarray | None = None) -> np.ndarray:
    """Convert finite float16 [n, d] to float32 [n, d]: exactly, or each row times its factor, float32 [n].

    NumPy's cast of float16 converts one value at a time and would take longer than the matrix products. The bits of a
    float16, shifted to their position in a float32, are its value times 2^-112, denormals included.
    """
    bits = vectors.view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # the shift copied the sign to three more bits
    values = bits.view(np.float32)
    if factors is None:
        values *= BIAS
    elif factors.max(initial=0) < 2**15:
        values *= BIAS * factors[:, None]
    else:  # BIAS * factor could overflow
        values *= BIAS
        values *= factors[:, None]
    return values
