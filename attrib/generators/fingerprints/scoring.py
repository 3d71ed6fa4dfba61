"""Scorings: functions that are fitted on the references of all generators and then score queries against each of them.

A fit uses nothing but the references. So to leave out a reference or a generator, fit again without it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from attrib.common.errors import AttribError

References = Sequence[np.ndarray]  # float32 [r_g, d] of each generator, unit rows
Scorer = Callable[[np.ndarray], np.ndarray]  # unit rows float32 [n, d] -> float32 [n, G]; higher: more like generator g
Scoring = Callable[[References], Scorer]
LOGISTIC_TOLERANCE = 1e-10  # of the gradient: scores then differ from those at the minimum by less than 1e-3
LEAST_RELIABILITY = 0.01  # of a part; smaller estimates are noise
ADAPTED_SHRINKAGE = 0.8  # of the covariance within generators, which few references estimate badly


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
    """Cosine with the mean of each generator's references, after whitening by the covariance within generators."""
    check_references(references)
    adapted, centres = _whitened_space(references)
    return lambda queries: (adapted(queries) @ centres.T).astype(np.float32)


def adapted_by_part(part_sizes: Sequence[int], one_sided: Sequence[bool]) -> Scoring:
    """`adapted_cosine` with each part of the vector weighted by its reliability.

    part_sizes: number of columns of each part, in order. The reliability of a part is the share of its variance between
    the generators' means that is not explained by the variance within generators. It is low for a part that a
    degradation has destroyed. one_sided: for each part, whether a negative cosine counts as zero. A crop can shift a
    periodic pattern by half a period, which often gives a negative cosine for images of the same generator.

    Scores are multiplied by the root of the mean reliability. Otherwise images that resemble no generator would be
    assigned to the most degraded gallery: there most of the weight is on one part, so similarity of this part alone
    gives a high score.
    """
    columns = [slice(stop - size, stop) for size, stop in zip(part_sizes, np.cumsum(part_sizes))]

    def fit(references: References) -> Scorer:
        check_references(references)
        reliabilities = _reliabilities(references, part_sizes)
        weights = np.sqrt(np.repeat(reliabilities, part_sizes))
        scale = np.sqrt(reliabilities.mean())
        adapted, centres = _whitened_space([unit_or_zero(rows * weights) for rows in references])

        def scores(queries: np.ndarray) -> np.ndarray:
            rows = adapted(unit_or_zero(queries * weights))
            found = 0
            for part, only_positive in zip(columns, one_sided):
                cosine = rows[:, part] @ centres[:, part].T
                found = found + (np.maximum(cosine, 0) if only_positive else cosine)
            return (found * scale).astype(np.float32)

        return scores

    return fit


def _whitened_space(references: References) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """A whitening function, rows to unit rows float64 [n, d], and the whitened generator centres float64 [G, d].

    The origin is the mean of zero and the generators' means, because it then changes little if one of few generators is
    left out. The whitening uses the covariance within generators, shrunk by ADAPTED_SHRINKAGE towards a multiple of the
    identity. Without any variance it only subtracts the origin.
    """
    groups = [rows.astype(np.float64) for rows in references]
    means = np.stack([rows.mean(axis=0) for rows in groups])
    origin = means.sum(axis=0) / (len(groups) + 1)
    spread = np.concatenate([rows - mean for rows, mean in zip(groups, means)])
    freedom = len(spread) - len(groups)
    # The shrunk covariance is a multiple of the identity outside the span of the references, so whitening changes only
    # the directions inside it, up to a common factor that the cosine ignores.
    directions, shortened = np.zeros((0, means.shape[1])), np.zeros(0)
    if freedom and spread.any():
        # Eigenvectors of the smaller Gram matrix take a fraction of the time of a singular value decomposition.
        wide = len(spread) <= spread.shape[1]
        squared, vectors = np.linalg.eigh(spread @ spread.T if wide else spread.T @ spread)
        kept = squared > squared.max() * max(spread.shape) * np.finfo(np.float64).eps
        squared, vectors = squared[kept], vectors[:, kept].T
        directions = vectors @ spread / np.sqrt(squared)[:, None] if wide else vectors
        variances = squared / freedom
        everywhere = ADAPTED_SHRINKAGE * variances.sum() / means.shape[1]
        shortened = np.sqrt(everywhere / (everywhere + (1 - ADAPTED_SHRINKAGE) * variances)) - 1

    def adapted(rows: np.ndarray) -> np.ndarray:
        moved = rows.astype(np.float64) - origin
        return unit_or_zero(moved + (moved @ directions.T * shortened) @ directions)

    return adapted, unit_or_zero(np.stack([adapted(rows).mean(axis=0) for rows in groups]))


def _reliabilities(references: References, part_sizes: Sequence[int]) -> np.ndarray:
    """Reliability of each part as in `adapted_by_part`, float64 [parts], from LEAST_RELIABILITY to 1."""
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
    """Share of each generator among the query's nearest references, each weighted by (1 + cosine) / 2.

    A query far from all references thus scores low everywhere. Ties go to the earlier reference.
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
    if not len(references):
        raise AttribError("there are no generators; register one with 10 images or more")
    for position, rows in enumerate(references):
        if not len(rows):
            raise AttribError(f"generator {position} has no references; register it with 10 images or more")


def unit_or_zero(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, in the given dtype; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def identified(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """int64 [n]: generator of the highest score; in a tie the true generator loses, so that a tie is an error.

    scores: float [n, G]. truth: int [n] in 0..G-1.
    """
    rows = np.arange(len(truth))
    own = scores[rows, truth]
    others = scores.astype(np.float64)
    others[rows, truth] = -np.inf
    rival = others.argmax(axis=1)
    return np.where(own > others[rows, rival], truth, rival)


def logistic_scores(strength: float) -> Scoring:
    """Log probability of each generator by multinomial logistic regression on all references, with an L2 penalty.

    Minimises sum_i w_i * -log p(label_i | row_i) + strength / 2 * |weights|^2; the bias is not penalised. w_i = n / (G
    * number of references of the generator), so that a generator with more references is not preferred.
    """

    def fit(references: References) -> Scorer:
        check_references(references)
        num_generators = len(references)
        if num_generators == 1:
            return lambda queries: np.zeros((len(queries), 1), np.float32)
        rows = np.concatenate(references).astype(np.float64)
        labels = np.repeat(np.arange(num_generators), [len(group) for group in references])
        mean = rows.mean(axis=0)
        # One scale for all dimensions keeps the geometry, and with it the meaning of the penalty for every method.
        scale = np.sqrt(np.square(rows - mean).mean()) or 1.0
        # For two classes scikit-learn penalises the difference of their weights, which is twice the penalty of both.
        inverse = (2 if num_generators == 2 else 1) / strength
        model = LogisticRegression(C=inverse, class_weight="balanced", tol=LOGISTIC_TOLERANCE, max_iter=1000)
        model.fit((rows - mean) / scale, labels)
        return lambda queries: model.predict_log_proba((queries - mean) / scale).astype(np.float32)

    return fit
