"""From references of some generators to scores of queries: the ways that every fingerprint method can be asked in.

A scoring is fitted on the references of all generators at once and then scores any number of queries. Nothing else takes part, so that leaving out
a reference, or a generator, is to fit without it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from attrib.common.errors import AttribError

References = Sequence[np.ndarray]  # float32 [r_g, d] of each generator, unit rows
Scorer = Callable[
    [np.ndarray], np.ndarray
]  # unit rows float32 [n, d] -> float32 [n, G]: the higher, the more is a query like generator g
Scoring = Callable[[References], Scorer]
LOGISTIC_TOLERANCE = 1e-10  # of the gradient: scores then agree with the minimum's within 1e-3
LEAST_RELIABILITY = 0.01  # of a part: below it an estimate says nothing
ADAPTED_SHRINKAGE = 0.8  # of the covariance within a few references of each generator: most of it is chance


def mean_cosine(references: References) -> Scorer:
    """Cosine with the mean of each generator's references."""
    check_references(references)
    means = unit_or_zero(np.stack([rows.mean(axis=0, dtype=np.float64) for rows in references]))
    return lambda queries: (queries.astype(np.float64) @ means.T).astype(np.float32)


def max_cosine(references: References) -> Scorer:
    """Cosine with the nearest of each generator's references."""
    check_references(references)
    return lambda queries: np.stack([(queries @ rows.T).max(axis=1) for rows in references], axis=1)


def adapted_cosine(references: References) -> Scorer:
    """Cosine with the mean of each generator's references, in the space in which the references of one generator vary alike in all directions."""
    check_references(references)
    adapted, centres = _own_space(references)
    return lambda queries: (adapted(queries) @ centres.T).astype(np.float32)


def adapted_by_part(part_sizes: Sequence[int], one_sided: Sequence[bool]) -> Scoring:
    """`adapted_cosine` of vectors whose parts count by how far their references' means can be relied on; part_sizes: of the columns, in order.

    A part in which the generators leave no trace, such as fixed places of the pixel grid after a resize, is chance, and would be half of every
    cosine. It counts by the reliability of its means: the share of their variance between generators that is not the chance of few
    references. With one generator, whose variance cannot be known, parts count alike.

    one_sided: whether a part speaks for a generator but never against it; less than no likeness counts as none. A crop moves the pixel grid,
    and a moved pattern is often the opposite of itself.

    Scores are scaled by the root of the mean reliability: in a gallery whose references leave one part to chance, likeness of the other part
    alone must not look like likeness of both, or whatever is nobody's would go to the most degraded gallery.
    """
    columns = [slice(stop - size, stop) for size, stop in zip(part_sizes, np.cumsum(part_sizes))]

    def fit(references: References) -> Scorer:
        check_references(references)
        reliabilities = _reliabilities(references, part_sizes)
        weights = np.sqrt(np.repeat(reliabilities, part_sizes))
        scale = np.sqrt(reliabilities.mean())
        adapted, centres = _own_space([unit_or_zero(rows * weights) for rows in references])

        def scores(queries: np.ndarray) -> np.ndarray:
            rows = adapted(unit_or_zero(queries * weights))
            likeness = [rows[:, part] @ centres[:, part].T for part in columns]
            found = sum(
                np.maximum(of_part, 0) if only_for else of_part for of_part, only_for in zip(likeness, one_sided)
            )
            return (found * scale).astype(np.float32)

        return scores

    return fit


def _own_space(references: References) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """The map of rows into the references' own space, to unit rows float64 [n, d], and the generators' centres there, float64 [G, d].

    The origin is the mean of the generators' means, since what they share tells none of them apart; the origin of the method counts as one more
    generator, so that it moves little where one of few is left out. The scale is the covariance within generators, shrunk by
    ADAPTED_SHRINKAGE towards a multiple of the identity; where no two references of a generator differ the scale stays.
    """
    groups = [rows.astype(np.float64) for rows in references]
    means = np.stack([rows.mean(axis=0) for rows in groups])
    origin = means.sum(axis=0) / (len(groups) + 1)
    spread = np.concatenate([rows - mean for rows, mean in zip(groups, means)])
    freedom = len(spread) - len(groups)
    # The shrunk covariance is a multiple of the identity but in the span of the references, which are fewer than the dimensions: so is its root.
    directions, shortened = np.zeros((0, means.shape[1])), np.zeros(0)
    if freedom and spread.any():
        variances, directions = _principal(spread)
        variances /= freedom
        everywhere = ADAPTED_SHRINKAGE * variances.sum() / means.shape[1]
        shortened = np.sqrt(everywhere / (everywhere + (1 - ADAPTED_SHRINKAGE) * variances)) - 1

    def adapted(rows: np.ndarray) -> np.ndarray:
        moved = rows.astype(np.float64) - origin
        return unit_or_zero(moved + (moved @ directions.T * shortened) @ directions)

    return adapted, unit_or_zero(np.stack([adapted(rows).mean(axis=0) for rows in groups]))


def _principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values, float64 [r], above rounding, and right singular vectors, float64 [r, d], of rows float64 [n, d]: by the
    smaller of their two products, which takes a fraction of a decomposition's time."""
    wide = len(rows) <= rows.shape[1]
    squared, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = squared > squared.max() * max(rows.shape) * np.finfo(np.float64).eps
    squared, vectors = squared[kept], vectors[:, kept].T
    return squared, vectors @ rows / np.sqrt(squared)[:, None] if wide else vectors


def _reliabilities(references: References, part_sizes: Sequence[int]) -> np.ndarray:
    """float64 [parts], LEAST_RELIABILITY to 1."""
    freedom = sum(len(rows) - 1 for rows in references)
    if len(references) < 2 or not freedom:
        return np.ones(len(part_sizes))
    groups = [rows.astype(np.float64) for rows in references]
    means = np.stack([rows.mean(axis=0) for rows in groups])
    between = np.square(means - means.mean(axis=0)).sum(axis=0) / (len(means) - 1)
    within = sum(np.square(rows - mean).sum(axis=0) for rows, mean in zip(groups, means)) / freedom
    of_chance = within * np.mean([1 / len(rows) for rows in groups])
    starts = np.cumsum([0, *part_sizes[:-1]])
    between, of_chance = np.add.reduceat(between, starts), np.add.reduceat(of_chance, starts)
    shares = np.divide(between - of_chance, between, out=np.ones(len(part_sizes)), where=between > 0)
    return np.clip(shares, LEAST_RELIABILITY, 1)


def nearest_neighbours(num_neighbours: int) -> Scoring:
    """How much of a query's nearest references, each weighted by its similarity, is of each generator.

    A neighbour weighs (1 + cosine) / 2, so that a query far from all references scores low everywhere. Ties in rank go to the earlier
    reference.
    """

    def fit(references: References) -> Scorer:
        check_references(references)
        rows = np.concatenate(references)
        owner = np.repeat(np.arange(len(references)), [len(group) for group in references])
        k = min(num_neighbours, len(rows))

        def scores(queries: np.ndarray) -> np.ndarray:
            similarity = queries @ rows.T
            nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
            weights = (1 + np.take_along_axis(similarity, nearest, axis=1)) / 2
            found = np.zeros((len(queries), len(references)), np.float32)
            np.add.at(found, (np.arange(len(queries))[:, None], owner[nearest]), weights / k)
            return found

        return scores

    return fit


def check_references(references: References) -> None:
    """Raises AttribError if there is no generator, or one without references."""
    empty = [position for position, rows in enumerate(references) if len(rows) == 0]
    if not len(references) or empty:
        which = f"generator {empty[0]} has no references" if empty else "there are no generators"
        raise AttribError(f"{which}; register each with 10 images or more")


def unit_or_zero(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, in the given type; a row of zeros, which has no direction, stays zero and is like nothing."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def identified(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """int64 [n]: the generator with the highest score; where the true one shares it, the first other that does.

    scores: float [n, G]; truth: int [n] in 0..G-1.
    """
    rows = np.arange(len(truth))
    own = scores[rows, truth]
    others = scores.astype(np.float64)
    others[rows, truth] = -np.inf
    rival = others.argmax(axis=1)
    return np.where(own > others[rows, rival], truth, rival)


def logistic_scores(strength: float) -> Scoring:
    """The log probability of each generator by multinomial logistic regression on all references, with an L2 penalty.

    Minimises sum_i w_i * -log p(label_i | row_i) + strength / 2 * |weights|^2 without a penalty on the bias. w_i: n / (G * references of the
    generator), so that a generator with more references is not preferred.
    """

    def fit(references: References) -> Scorer:
        check_references(references)
        num_generators = len(references)
        if num_generators == 1:
            return lambda queries: np.zeros((len(queries), 1), np.float32)
        rows = np.concatenate(references).astype(np.float64)
        labels = np.repeat(np.arange(num_generators), [len(group) for group in references])
        mean = rows.mean(axis=0)
        # One scale for all dimensions keeps the geometry, and with it the meaning of the penalty whatever made the rows.
        scale = np.sqrt(np.square(rows - mean).mean()) or 1.0
        # scikit-learn gives two classes one vector of weights, the difference of theirs: its penalty is twice that of both together.
        inverse_penalty = (2 if num_generators == 2 else 1) / strength
        model = LogisticRegression(C=inverse_penalty, class_weight="balanced", tol=LOGISTIC_TOLERANCE, max_iter=1000)
        model.fit((rows - mean) / scale, labels)
        return lambda queries: model.predict_log_proba((queries - mean) / scale).astype(np.float32)

    return fit
