"""Exact tests without a model of the scores: conformal p-values and permutation tests."""

import numpy as np


def conformal_p_values(
    values: np.ndarray,
    weights: np.ndarray,
    observed: np.ndarray,
    total: np.ndarray | None = None,
    itself: float = 1.0,
) -> np.ndarray:
    """float64 [m]: (itself + weight of the values at or above what was observed) / (1 + total), at most 1.

    values: [n] or [m, n]; weights: >= 0, of the same shape; observed: [m]; total: [m], the weight of all there is, by default of the values.
    With weights of one: P(p <= a) <= a for every a if the observation is exchangeable with the values (Vovk et al., Algorithmic Learning in
    a Random World, 2005). With weights of 1 / n_k for the n_k values of source k: the same if it is the first draw of a new source,
    exchangeable with the sources (Dunn, Wasserman and Ramdas, arXiv 1809.07441). Ties count against the observation. itself: what the
    observation counts for, where each of those that it is exchangeable with may have several values.
    """
    reached = np.where(values >= observed[:, None], weights, 0.0).sum(axis=-1)
    return np.minimum(1.0, (itself + reached) / (1.0 + (weights.sum(axis=-1) if total is None else total)))


def column_means(rows: np.ndarray) -> np.ndarray:
    """float64 [..., G] of rows [..., m, G], nan left out; -inf where nothing is left."""
    present = ~np.isnan(rows)
    counts = present.sum(axis=-2)
    return np.where(counts > 0, np.where(present, rows, 0.0).sum(axis=-2) / np.maximum(counts, 1), -np.inf)


def permutation_p_value(strata: list[tuple[np.ndarray, np.ndarray]], num_permutations: int, generator) -> float:
    """Whether m rows are higher than others, by the largest of their columns' means.

    strata: (float [m_s, G], float [n_s, G]), the rows and what they are compared with in each stratum; nan takes no part in a mean. Exact if the m_s + n_s rows of every
    stratum are exchangeable: which of them are the m_s is drawn again num_permutations times.
    """
    observed = column_means(np.concatenate([own for own, _ in strata])).max()
    pools = [(len(own), np.concatenate([own, others])) for own, others in strata]
    return (1 + _reached(pools, observed, num_permutations, generator)) / (1 + num_permutations)


def source_p_value(own: list[np.ndarray], sources: list[list[np.ndarray]], num_draws: int, generator) -> float:
    """Whether m rows are higher than as many rows of any one of K sources, by the largest of their columns' means.

    own: float [m_s, G] of each stratum; sources: of each source float [n_s, G] of each stratum, where m_s > 0 some; nan takes no part. (1 + the sum over
    sources of the share of num_draws sets of m_s of their rows that are as high) / (K + 1): exact if the m rows are all from a new source that
    is exchangeable with the others and n_s >= m_s. A source of fewer rows is drawn from with replacement, which spreads its means
    wider than they are and so errs to the safe side.
    """
    observed = column_means(np.concatenate(own)).max()
    shares = [
        _reached([(len(mine), rows) for mine, rows in zip(own, source) if len(mine)], observed, num_draws, generator)
        / num_draws
        for source in sources
    ]
    return (1 + sum(shares)) / (1 + len(sources))


def _reached(pools: list[tuple[int, np.ndarray]], observed: float, num_draws: int, generator) -> int:
    """How often the mean of count rows drawn from each pool, (count, rows), has a column at or above what was observed."""
    reached = 0
    for size in _batches(num_draws, sum(len(rows) + count * rows.shape[1] for count, rows in pools)):
        drawn = np.concatenate([_drawn(count, rows, size, generator) for count, rows in pools], axis=1)
        reached += int(np.count_nonzero(column_means(drawn).max(axis=-1) >= observed - 1e-12))
    return reached


def _drawn(count: int, rows: np.ndarray, size: int, generator) -> np.ndarray:
    """[size, count, G]: rows drawn without replacement, with it where there are too few."""
    if len(rows) < count:
        return rows[generator.integers(0, len(rows), (size, count))]
    return rows[np.argpartition(generator.random((size, len(rows))), count - 1, axis=1)[:, :count]]


def _batches(total: int, numbers_per_draw: int) -> list[int]:
    """Sizes that keep a batch of draws below about two million numbers."""
    size = max(1, 2_000_000 // max(1, numbers_per_draw))
    return [min(size, total - start) for start in range(0, total, size)]
