"""Distribution-free tests: conformal p-values and permutation tests."""

import numpy as np

BATCH_NUMBERS = 2_000_000  # in a batch of random draws


def conformal_p_values(
    values: np.ndarray,
    weights: np.ndarray,
    observed: np.ndarray,
    total: np.ndarray | None = None,
    own_weight: float = 1.0,
) -> np.ndarray:
    """float64 [m]: (own_weight + weight of the values at or above the observed one) / (1 + total), at most 1.

    values: [n] or [m, n]. weights: >= 0, same shape. observed: [m]. total: [m], weight of all values; None: the sum of
    weights. own_weight: weight of the observation; more than 1 if one item can contribute several values.

    With weights 1, P(p <= a) <= a if the observation is exchangeable with the values (Vovk et al., Algorithmic Learning
    in a Random World, 2005); with weights 1 / n_k for the n_k values of source k, if its source is exchangeable with
    the others (Dunn, Wasserman and Ramdas, arXiv 1809.07441).
    """
    reached = np.where(values >= observed[:, None], weights, 0.0).sum(axis=-1)
    return np.minimum(1.0, (own_weight + reached) / (1.0 + (weights.sum(axis=-1) if total is None else total)))


def column_means(rows: np.ndarray) -> np.ndarray:
    """float64 [..., G]: column means of rows [..., m, G], ignoring nan; -inf for a column with only nan."""
    present = ~np.isnan(rows)
    counts = present.sum(axis=-2)
    return np.where(counts > 0, np.where(present, rows, 0.0).sum(axis=-2) / np.maximum(counts, 1), -np.inf)


def permutation_p_value(strata: list[tuple[np.ndarray, np.ndarray]], num_permutations: int, generator) -> float:
    """P-value of a permutation test whose statistic is the largest column mean of m rows; means ignore nan.

    strata: (float [m_s, G], float [n_s, G]), the tested rows and the rows that they are compared with in each stratum.
    num_permutations: random choices of m_s rows in each stratum. Exact if all rows of a stratum are exchangeable.
    """
    observed = column_means(np.concatenate([own for own, _ in strata])).max()
    pools = [(len(own), np.concatenate([own, others])) for own, others in strata]
    return (1 + _reached(pools, observed, num_permutations, generator)) / (1 + num_permutations)


def source_p_value(own: list[np.ndarray], sources: list[list[np.ndarray]], num_draws: int, generator) -> float:
    """P-value of the largest column mean of m rows, compared with that of m rows of each of K sources.

    own: the tested rows, float [m_s, G] of each stratum. sources: for each source float [n_s, G] of each stratum, not
    empty where m_s > 0. Means ignore nan. The p-value is (1 + sum of shares) / (K + 1); the share of a source is that
    of num_draws random sets of m_s rows whose statistic is at least as high. Exact if the m rows come from a new source
    that is exchangeable with the others and n_s >= m_s. Smaller sources are drawn with replacement; their means vary
    more, so the test is conservative.
    """
    observed, reached = column_means(np.concatenate(own)).max(), []
    for source in sources:
        pools = [(len(mine), rows) for mine, rows in zip(own, source) if len(mine)]
        reached.append(_reached(pools, observed, num_draws, generator) / num_draws)
    return (1 + sum(reached)) / (1 + len(sources))


def _reached(pools: list[tuple[int, np.ndarray]], observed: float, num_draws: int, generator) -> int:
    """Number of draws in which a column mean of `count` rows of each pool (count, rows) is at least `observed`."""
    numbers_per_draw = sum(len(rows) + count * rows.shape[1] for count, rows in pools)
    together, reached = max(1, BATCH_NUMBERS // max(1, numbers_per_draw)), 0
    for start in range(0, num_draws, together):
        size = min(together, num_draws - start)
        drawn = []
        for count, rows in pools:
            if len(rows) < count:  # too few to draw without replacement
                chosen = generator.integers(0, len(rows), (size, count))
            else:
                chosen = np.argpartition(generator.random((size, len(rows))), count - 1, axis=1)[:, :count]
            drawn.append(rows[chosen])
        means = column_means(np.concatenate(drawn, axis=1))
        reached += int(np.count_nonzero(means.max(axis=-1) >= observed - 1e-12))
    return reached
