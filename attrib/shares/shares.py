"""Turn a query's similarities into shares of sum one: a softmax with cut-off, as in AbC (arXiv 2306.09345)."""

import numpy as np

from attrib.shares.settings import SharesSettings


def soft_shares(similarity: np.ndarray, settings: SharesSettings) -> np.ndarray:
    """Cosine float [n, k] (-inf where a query has fewer sources) -> shares float64 [n, k], each row of sum one.

    e_j = exp((s_j - max s) * inverse_temperature), t_j = relu(e_j + 0.001 * offset), p_j = t_j / sum t. The best source
    has e = 1 and offset > -1000, so that no row is empty; a source far below the best gets exactly zero.
    """
    similarity = similarity.astype(np.float64)
    best = similarity.max(axis=1, keepdims=True)
    weight = np.exp((similarity - best) * settings.inverse_temperature)
    kept = np.maximum(weight + 0.001 * settings.offset, 0.0)
    return np.asarray(kept / kept.sum(axis=1, keepdims=True))
