"""Stored vectors to vectors of length one, which cosines are products of."""

import numpy as np

BIAS = np.float32(2.0**112)  # between the exponents of float16 and float32


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """[n, d] of any float type -> float32 [n, d] of length one."""
    if vectors.dtype == np.float16:
        rows = to_float32(vectors)
        rows *= inverse_norms(rows)[:, None]
        return rows
    rows = vectors.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def inverse_norms(rows: np.ndarray) -> np.ndarray:
    """float32 [n, d] -> float32 [n]."""
    return 1 / np.sqrt(np.einsum("nd,nd->n", rows, rows))


def to_float32(vectors: np.ndarray, factors: np.ndarray | None = None) -> np.ndarray:
    """float16 [n, d], finite -> float32 [n, d]: exactly, or each row times its factor float32 [n].

    NumPy's own cast of float16 goes one number at a time and would take longer than the products. Moved to float32's place, the bits of a
    float16 are its value times 2^-112, denormals included.
    """
    bits = vectors.view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # the sign was carried into the three bits beside it
    values = bits.view(np.float32)
    if factors is None:
        values *= BIAS
    elif factors.max(initial=0) < 2**15:
        values *= BIAS * factors[:, None]
    else:  # of vectors so short that both at once would overflow
        values *= BIAS
        values *= factors[:, None]
    return values
