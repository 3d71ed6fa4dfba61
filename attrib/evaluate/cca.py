"""Canonical correlation analysis (CCA) of known pairs, and the alignment and whiteness of the vectors themselves.

CCA of real features x and synthetic features y (Hotelling, Biometrika 28:321, 1936) maximises tr(U' Sxy V) subject to
white projections, U' Sxx U = V' Syy V = I. The canonical correlations of held-out pairs show how much a linear map,
fitted on other pairs, predicts. `alignment` and `whiteness` measure the two parts of this objective without a fit: how
strongly each coordinate correlates across the domains, and how uncorrelated the coordinates of one domain are.
"""

from dataclasses import asdict, dataclass

import numpy as np

from attrib.common.errors import AttribError
from attrib.pages.charts import correlation_figure, svg

NUM_COMPONENTS = 32
SHRINKAGE = 0.1
NUM_FOLDS = 5
RANK_TOLERANCE = 1e-12  # of the largest eigenvalue: smaller ones are rounding errors
TINY = 1e-300


@dataclass(frozen=True)
class Whiteness:
    """Whiteness of one domain.

    num_rows: distinct vectors. num_constant: coordinates without variance, which count in the effective rank only.
    redundancy: -logdet(R) / d of the shrunk correlation matrix R, in nats, 0 if uncorrelated. effective_rank: exp of
    the entropy of the covariance's spectrum, divided by d (Roy and Vetterli, EUSIPCO 2007). mean_correlation: mean
    absolute correlation of two coordinates.
    """

    num_rows: int
    num_constant: int
    redundancy: float
    effective_rank: float
    mean_correlation: float


@dataclass(frozen=True)
class CcaSummary:
    """Measures of pairs.

    canonical_correlations [p]: of held-out pairs, in the order of the fit, so not sorted; fitted_correlations [p]: of
    the fitted pairs. variance_kept: by the PCA before CCA. alignment: tr(Rxy) / d, the mean correlation of a coordinate
    across the domains; variance_alignment: tr(Sxy) / sqrt(tr(Sxx) tr(Syy)), which weights coordinates by their
    variance. diagonal_share: share of the squared norm of Rxy on its diagonal: 1 if Rxy is diagonal, 1 / d if it is
    uniform, None if no correlation exceeds the noise. real_floor, synthetic_floor: white noise of the same shape.
    """

    num_pairs: int
    num_groups: int
    dimension: int
    num_folds: int
    shrinkage: float
    canonical_correlations: tuple[float, ...]
    fitted_correlations: tuple[float, ...]
    variance_kept: float
    alignment: float
    variance_alignment: float
    diagonal_share: float | None
    real: Whiteness
    synthetic: Whiteness
    real_floor: Whiteness
    synthetic_floor: Whiteness

    @property
    def whiteness(self) -> float:
        """Minus the redundancy above that of white noise, mean of both domains, in nats per coordinate: 0 is white."""
        real = self.real_floor.redundancy - self.real.redundancy
        return (real + self.synthetic_floor.redundancy - self.synthetic.redundancy) / 2

    def to_dict(self) -> dict:
        return asdict(self) | {"whiteness": self.whiteness}


def summarise(
    real: np.ndarray,
    synthetic: np.ndarray,
    groups: np.ndarray,
    num_components: int = NUM_COMPONENTS,
    shrinkage: float = SHRINKAGE,
    num_folds: int = NUM_FOLDS,
    seed: int = 0,
) -> CcaSummary:
    """Measure pairs by cross-validated CCA, alignment and whiteness.

    real, synthetic: float [n, d], the source and the generated image of each pair; groups: labels [n]. Pairs of one
    group (copies of one source) share a fold. Raises AttribError if the arrays do not fit together or are too small.
    """
    real, synthetic = np.asarray(real), np.asarray(synthetic)
    if real.ndim != 2 or real.shape != synthetic.shape or len(real) < 2:
        raise AttribError(
            f"real {real.shape} and synthetic {synthetic.shape} are not pairs; give arrays of one shape [n, d], n >= 2"
        )
    real, synthetic = _finite(real, "real"), _finite(synthetic, "synthetic")
    folds = folds_by_group(groups, num_folds, seed)
    if len(folds) != len(real):
        raise AttribError(f"{len(folds)} group labels for {len(real)} pairs; give one label per pair")
    # No more than the rank of the smallest training set.
    num_components = min(num_components, len(real) - int(np.bincount(folds).max()) - 1)
    held_out, fitted = [], []
    for out in (folds == fold for fold in range(num_folds)):
        directions = fit_directions(real[~out], synthetic[~out], num_components, shrinkage)
        x, y = ((rows - rows[~out].mean(axis=0)) @ axes for rows, axes in zip((real, synthetic), directions))
        held_out.append(_moments(x[out], y[out]))
        fitted.append(_moments(x[~out], y[~out]))
    spectrum, _ = _principal_axes(np.concatenate([domain - domain.mean(axis=0) for domain in (real, synthetic)]))
    # The source of several pairs counts once in the whiteness of its domain.
    domains = [np.unique(domain, axis=0) for domain in (real, synthetic)]
    floors = [np.random.default_rng(seed).standard_normal(domain.shape) for domain in domains]
    return CcaSummary(
        len(real),
        len(set(np.asarray(groups).tolist())),
        real.shape[1],
        num_folds,
        shrinkage,
        tuple(_correlations(np.sum(held_out, axis=0)).tolist()),
        tuple(_correlations(np.sum(fitted, axis=0)).tolist()),
        float(spectrum[:num_components].sum() / spectrum.sum()),
        *alignment(real, synthetic),
        diagonal_share(real, synthetic, folds),
        *[whiteness(vectors, shrinkage) for vectors in (*domains, *floors)],
    )


def fit_directions(
    real: np.ndarray, synthetic: np.ndarray, num_components: int, shrinkage: float
) -> tuple[np.ndarray, np.ndarray]:
    """Canonical directions of both domains by regularised CCA, best first, each float64 [d, p].

    Pairs float64 [n, d] are fitted in their first p = min(num_components, d, n - 1) principal components, where their
    centred projections have unit variance. Without PCA, noise correlates perfectly once d is near n. The components are
    those of both centred domains together: those of each domain alone are arbitrary for a white model and barely
    overlap. The covariance S of a domain is shrunk to (1 - shrinkage) * S + shrinkage * tr(S) / p * I (ridge CCA:
    Vinod, J. Econometrics 4:147, 1976). Raises AttribError for a setting out of range or vectors that vary too little.
    """
    count = min(num_components, real.shape[1], len(real) - 1)
    if not 0 <= shrinkage < 1 or count < 1:
        raise AttribError(
            f"shrinkage {shrinkage:g} must be in [0, 1), num_components {num_components} at least 1, "
            f"and the number of pairs to fit on ({len(real)}) at least 2"
        )
    means = real.mean(axis=0), synthetic.mean(axis=0)
    basis = _principal_axes(np.concatenate([real - means[0], synthetic - means[1]]))[1][:, :count]
    white, whitenings = [], []
    for name, vectors, mean in zip(("real", "synthetic"), (real, synthetic), means):
        projected = (vectors - mean) @ basis
        covariance = projected.T @ projected / len(vectors)
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / count * np.eye(count)
        variance, axes = np.linalg.eigh(shrunk)
        if basis.shape[1] < count or variance[0] <= RANK_TOLERANCE * max(variance[-1], TINY):
            raise AttribError(
                f"the {name} vectors of {len(vectors)} pairs vary in fewer than {count} directions; lower "
                f"num_components, raise shrinkage (now {shrinkage:g}), or check that they are not all the same"
            )
        whitenings.append(basis @ axes / np.sqrt(variance))
        white.append((vectors - mean) @ whitenings[-1])
    left, _, right = np.linalg.svd(white[0].T @ white[1])
    return whitenings[0] @ left, whitenings[1] @ right.T


def folds_by_group(groups: np.ndarray, num_folds: int = NUM_FOLDS, seed: int = 0) -> np.ndarray:
    """Labels [n] -> fold int64 [n], equal for equal labels; the largest group goes first, into the emptiest fold.

    Not sklearn.model_selection.GroupKFold: it breaks ties in size by label instead of by seed, so its folds differ.
    """
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if not 2 <= num_folds <= len(names):
        raise AttribError(
            f"{len(names)} groups of pairs cannot be split into {num_folds} folds; set num_folds to 2 or more, "
            "but not above the number of groups"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of, filled = np.zeros(len(names), np.int64), np.zeros(num_folds, np.int64)
    for name in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of[name] = filled.argmin()
        filled[fold_of[name]] += sizes[name]
    return fold_of[group]


def alignment(real: np.ndarray, synthetic: np.ndarray) -> tuple[float, float]:
    """(tr(Rxy) / d, tr(Sxy) / sqrt(tr(Sxx) tr(Syy))) of pairs float64 [n, d]; a constant coordinate correlates 0."""
    moments = _moments(real, synthetic)
    return float(_correlations(moments).mean()), float(_correlations(moments.sum(axis=1)))


def diagonal_share(real: np.ndarray, synthetic: np.ndarray, folds: np.ndarray) -> float | None:
    """Share of Rxy's squared norm on its diagonal, of pairs float64 [n, d] with folds [n]; None if it is all noise.

    Each of the d * d entries of a sample's Rxy has noise of variance 1 / n. So each square is estimated by products of
    two folds, whose noise is independent. Over all pairs of folds: (sum M)^2 - sum M^2.
    """
    scaled = [vectors / np.where(vectors.std(axis=0) > 0, vectors.std(axis=0), 1) for vectors in (real, synthetic)]
    total, squares = np.zeros((2, real.shape[1], real.shape[1]))
    for fold in np.unique(folds):
        x, y = (vectors[folds == fold] - vectors[folds == fold].mean(axis=0) for vectors in scaled)
        cross = x.T @ y / max(len(x) - 1, 1)
        total += cross
        squares += cross**2
    products = total**2 - squares
    return float(np.clip(np.trace(products) / products.sum(), 0, 1)) if products.sum() > 0 else None


def whiteness(vectors: np.ndarray, shrinkage: float = SHRINKAGE) -> Whiteness:
    """Measure the whiteness of vectors float [n, d]. Compare equal shapes only: all measures depend on n / d.

    Raises AttribError if all vectors are equal, or if shrinkage is 0 and the vectors do not span all coordinates.
    """
    vectors = _finite(vectors, "given")
    if len(vectors) < 2 or not np.ptp(vectors, axis=0).any():
        raise AttribError(f"{len(vectors)} vectors, all equal, have no covariance; give at least two that differ")
    centred = vectors - vectors.mean(axis=0)
    variance, _ = _principal_axes(centred)
    weight = variance / variance.sum()
    varies = np.ptp(vectors, axis=0) > 0
    scaled = centred[:, varies] / np.linalg.norm(centred[:, varies], axis=0)
    count, (spectrum, _) = scaled.shape[1], _principal_axes(scaled)
    if not 0 <= shrinkage < 1 or (shrinkage == 0 and len(spectrum) < count):
        raise AttribError(
            f"shrinkage {shrinkage:g} must be in [0, 1), and above 0 if vectors vary in fewer directions (here "
            f"{len(spectrum)}) than they have coordinates ({count})"
        )
    logdet = np.log((1 - shrinkage) * spectrum + shrinkage).sum()
    # Directions without variance, where there are fewer vectors than coordinates.
    logdet += (count - len(spectrum)) * np.log(shrinkage) if len(spectrum) < count else 0.0
    off_diagonal = np.abs(scaled.T @ scaled).sum() - count
    return Whiteness(
        num_rows=len(vectors),
        num_constant=int(np.count_nonzero(~varies)),
        redundancy=float(-logdet / count),
        effective_rank=float(np.exp(-(weight * np.log(weight)).sum()) / vectors.shape[1]),
        mean_correlation=float(off_diagonal / (count * (count - 1))) if count > 1 else 0.0,
    )


def _principal_axes(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PCA of centred rows [n, d] of rank r: sums of squares float64 [r], descending; axes float64 [d, r]."""
    tall = len(centred) > centred.shape[1]
    # The smaller Gram matrix: several times faster than an SVD at 400 rows of 1280.
    squares, vectors = np.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    kept = np.flatnonzero(squares > RANK_TOLERANCE * max(squares[-1], TINY))[::-1]
    squares, vectors = squares[kept], vectors[:, kept]
    return squares, vectors if tall else centred.T @ vectors / np.sqrt(squares)


def _finite(vectors: np.ndarray, name: str) -> np.ndarray:
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise AttribError(f"{name} vector {wrong[0]} holds a NaN or infinity; embed that image again or leave it out")
    return vectors.astype(np.float64)


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums of xy, xx and yy float64 [3, p] of rows [n, p], each centred."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.stack([(x * y).sum(axis=0), (x * x).sum(axis=0), (y * y).sum(axis=0)])


def _correlations(moments: np.ndarray) -> np.ndarray:
    scale = np.sqrt(moments[1]) * np.sqrt(moments[2])
    return np.divide(moments[0], scale, out=np.zeros_like(scale), where=scale > 0)


def plot(summaries: dict[str, CcaSummary]) -> str:
    """Canonical correlations, alignment and whiteness by method as SVG. Raises AttribError if summaries is empty."""
    lines = {name: summary.canonical_correlations for name, summary in summaries.items()}
    figure = correlation_figure(lines, {name: (s.alignment, s.whiteness) for name, s in summaries.items()})
    return svg(figure, "Canonical correlations, alignment and whiteness by method")
