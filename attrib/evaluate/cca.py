"""Canonical correlations of held-out pairs, and the two halves of the CCA objective: alignment and whiteness.

CCA of real features x and synthetic features y (Hotelling, Biometrika 28:321, 1936) maximises the alignment tr(U' Sxy
V) while the data stay white, U' Sxx U = V' Syy V = I. A model whose own coordinates match concepts across the domains
has the first, a disentangled one the second; `alignment` and `whiteness` read both off the vectors as they are, with no
fit. The canonical correlations say what a linear map fitted on pairs would find.
"""

from dataclasses import asdict, dataclass

import numpy as np

from attrib.common.errors import AttribError
from attrib.pages.charts import correlation_figure, svg

NUM_COMPONENTS = 32
SHRINKAGE = 0.1
NUM_FOLDS = 5
Pairs = tuple[np.ndarray, np.ndarray]  # (real, synthetic), both float [n, d]


@dataclass(frozen=True)
class Directions:
    """Canonical directions, best first: means float64 [d], projections [d, p] of unit variance on the fitted pairs."""

    real_mean: np.ndarray
    synthetic_mean: np.ndarray
    real: np.ndarray
    synthetic: np.ndarray


@dataclass(frozen=True)
class Whiteness:
    """One domain. redundancy: -logdet(R) / d of the shrunk correlation matrix R, in nats, 0 if uncorrelated;
    effective_rank: exp of the entropy of the covariance's spectrum, over d; mean_correlation: mean of the absolute
    correlation of two coordinates.

    num_rows: distinct vectors. num_constant: coordinates without variance; they have no correlation and count in the
    effective rank alone.
    """

    num_rows: int
    num_constant: int
    redundancy: float
    effective_rank: float
    mean_correlation: float


@dataclass(frozen=True)
class CcaSummary:
    """canonical_correlations [p]: of held-out pairs, in the order of the fit, so not sorted; fitted_correlations [p]:
    of the pairs fitted on.

    alignment: tr(Rxy) / d, the mean over coordinates of the correlation of real and synthetic. variance_alignment:
    tr(Sxy) over the root of tr(Sxx) tr(Syy), where coordinates count by their variance, as in the cosine.
    diagonal_share: of the squared norm of Rxy, 1 if exactly diagonal (the paper's assumption), 1 / d if spread evenly;
    None if no correlation exceeds the noise of the sample. real_floor, synthetic_floor: what white noise of as many
    rows and coordinates shows. variance_kept: of both domains, by the PCA before CCA.
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
        """Minus the redundancy in excess of white noise, mean of the domains, in nats per coordinate: 0 is white."""
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
    """Everything about pairs: float [n, d] of a generated image's source and of the image, in the same row; groups [n]
    of any labels.

    Directions are fitted on all folds but one and measured on that one; pairs of a group (one source, one image in
    several copies) share a fold. Raises AttribError if the arrays do not fit together or are too few.
    """
    real, synthetic = _pairs(real, synthetic)
    folds = folds_by_group(groups, num_folds, seed)
    if len(folds) != len(real):
        raise AttribError(f"{len(folds)} group labels for {len(real)} pairs; give one label per pair")
    num_components = min(num_components, len(real) - int(np.bincount(folds).max()) - 1)  # as the smallest fit allows
    held_out, fitted = [], []
    for out in (folds == fold for fold in range(num_folds)):
        directions = fit_directions(real[~out], synthetic[~out], num_components, shrinkage)
        held_out.append(_moments(directions, real[out], synthetic[out]))
        fitted.append(_moments(directions, real[~out], synthetic[~out]))
    spectrum = _spectrum(np.concatenate([domain - domain.mean(axis=0) for domain in (real, synthetic)]))
    # A source that made several images is one vector of its domain, not several equal ones.
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


def canonical_correlations(
    fit_pairs: Pairs, held_out_pairs: Pairs, num_components: int = NUM_COMPONENTS, shrinkage: float = SHRINKAGE
) -> np.ndarray:
    """Pairs [n, d] to fit on and [m, d] to measure -> correlations float64 [min(num_components, d, n - 1)].

    In the order of the fit: sorting what was measured would turn noise into a trend.
    """
    directions = fit_directions(*_pairs(*fit_pairs), num_components, shrinkage)
    return _correlations(_moments(directions, *_pairs(*held_out_pairs)))


def fit_directions(real: np.ndarray, synthetic: np.ndarray, num_components: int, shrinkage: float) -> Directions:
    """Regularised CCA of pairs float64 [n, d] in their first min(num_components, d, n - 1) principal components.

    With d of the order of n, some direction correlates any pairs perfectly, so that the fit would choose among noise;
    32 components leave ten pairs per direction where 400 pairs are 320 to fit on. The price is what lies outside, most
    of a white model's variance (`variance_kept`). The components are those of both domains together, each about its
    mean: of a white model each domain's own would be arbitrary, hardly overlap, and hide a correlation that is there.
    Each domain's covariance S in them is shrunk, (1 - shrinkage) * S + shrinkage * tr(S) / p * I (ridge CCA: Vinod, J.
    Econometrics 4:147, 1976). Raises AttribError for a setting out of range or vectors that vary too little.
    """
    count = min(num_components, real.shape[1], len(real) - 1)
    if not 0 <= shrinkage < 1 or count < 1:
        raise AttribError(
            f"shrinkage {shrinkage:g} must be in [0, 1), num_components {num_components} positive, "
            f"and the {len(real)} pairs to fit on 2 or more"
        )
    means = real.mean(axis=0), synthetic.mean(axis=0)
    basis = _principal_axes(np.concatenate([real - means[0], synthetic - means[1]]), count)
    white, whitenings = [], []
    for name, vectors, mean in zip(("real", "synthetic"), (real, synthetic), means):
        projected = (vectors - mean) @ basis
        covariance = projected.T @ projected / len(vectors)
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / count * np.eye(count)
        variance, axes = np.linalg.eigh(shrunk)
        if basis.shape[1] < count or variance[0] <= 1e-12 * max(variance[-1], 1e-300):
            raise AttribError(
                f"the {name} vectors of {len(vectors)} pairs vary in fewer than {count} directions; lower "
                f"num_components, raise shrinkage (now {shrinkage:g}), or check that they are not all the same"
            )
        whitenings.append(basis @ axes / np.sqrt(variance))
        white.append((vectors - mean) @ whitenings[-1])
    left, _, right = np.linalg.svd(white[0].T @ white[1])
    return Directions(*means, whitenings[0] @ left, whitenings[1] @ right.T)


def folds_by_group(groups: np.ndarray, num_folds: int = NUM_FOLDS, seed: int = 0) -> np.ndarray:
    """Labels [n] -> fold int64 [n], equal for equal labels; the largest group first into the emptiest fold.

    Not sklearn.model_selection.GroupKFold: it breaks ties in size by label instead of by seed, so its folds differ.
    """
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if not 2 <= num_folds <= len(names):
        raise AttribError(
            f"{len(names)} groups of pairs cannot be held out in {num_folds} folds; set num_folds from 2 to that number"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of, filled = np.zeros(len(names), np.int64), np.zeros(num_folds, np.int64)
    for name in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of[name] = filled.argmin()
        filled[fold_of[name]] += sizes[name]
    return fold_of[group]


def alignment(real: np.ndarray, synthetic: np.ndarray) -> tuple[float, float]:
    """(tr(Rxy) / d, tr(Sxy) / sqrt(tr(Sxx) tr(Syy))) of pairs float64 [n, d]; a constant coordinate correlates 0."""
    real, synthetic = real - real.mean(axis=0), synthetic - synthetic.mean(axis=0)
    moments = np.stack([(real * synthetic).sum(axis=0), (real**2).sum(axis=0), (synthetic**2).sum(axis=0)])
    return float(_correlations(moments).mean()), float(_correlations(moments.sum(axis=1)))


def diagonal_share(real: np.ndarray, synthetic: np.ndarray, folds: np.ndarray) -> float | None:
    """Share of Rxy's squared norm on its diagonal, of pairs float64 [n, d] and their fold [n]; None if all is noise.

    Each of the d * d entries of a sample's Rxy carries noise of variance 1 / n, which sums to more than any signal once
    d is near n. So a square is taken as a product of the entries of two folds, whose noise is independent: over all
    pairs of folds, (sum M)^2 - sum M^2.
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
    """Of float [n, d] (no pairs needed). Raises AttribError for no shrinkage where n <= d, or vectors all equal.

    All three depend on n / d: compare equal shapes, or with white noise of the same shape. The effective rank (Roy and
    Vetterli, EUSIPCO 2007) is that of the covariance matrix, so that it also sees coordinates that carry no variance,
    which correlations do not.
    """
    vectors = _finite(vectors, "given")
    if len(vectors) < 2 or not np.ptp(vectors, axis=0).any():
        raise AttribError(f"{len(vectors)} distinct vectors have no covariance; give at least two that differ")
    centred = vectors - vectors.mean(axis=0)
    variance = _spectrum(centred)
    weight = variance / variance.sum()
    varies = np.ptp(vectors, axis=0) > 0
    scaled = centred[:, varies] / np.linalg.norm(centred[:, varies], axis=0)
    count, spectrum = scaled.shape[1], _spectrum(scaled)
    if not 0 <= shrinkage < 1 or (shrinkage == 0 and len(spectrum) < count):
        raise AttribError(
            f"shrinkage {shrinkage:g} must be in [0, 1), and above 0 for {len(vectors)} vectors that vary in "
            f"{len(spectrum)} of {count} directions"
        )
    logdet = np.log((1 - shrinkage) * spectrum + shrinkage).sum()
    # The directions in which a sample of fewer vectors than coordinates does not vary.
    logdet += (count - len(spectrum)) * np.log(shrinkage) if len(spectrum) < count else 0.0
    off_diagonal = np.abs(scaled.T @ scaled).sum() - count
    return Whiteness(
        len(vectors),
        int(np.count_nonzero(~varies)),
        float(-logdet / count),
        float(np.exp(-(weight * np.log(weight)).sum()) / vectors.shape[1]),
        float(off_diagonal / (count * (count - 1))) if count > 1 else 0.0,
    )


def _spectrum(centred: np.ndarray) -> np.ndarray:
    """Sums of squares float64 [r], descending, along the principal axes of centred rows [n, d]; r: their rank, up to
    rounding. By the smaller of the two Gram matrices, several times faster than an SVD at 400 rows of 1280."""
    tall = len(centred) > centred.shape[1]
    squares = np.linalg.eigvalsh(centred.T @ centred if tall else centred @ centred.T)[::-1]
    return squares[squares > 1e-12 * max(squares[0], 1e-300)]


def _principal_axes(centred: np.ndarray, count: int) -> np.ndarray:
    """The first of them, float64 [d, min(count, r)], orthonormal."""
    tall = len(centred) > centred.shape[1]
    squares, vectors = np.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    kept = np.flatnonzero(squares > 1e-12 * max(squares[-1], 1e-300))[::-1][:count]
    return vectors[:, kept] if tall else centred.T @ vectors[:, kept] / np.sqrt(squares[kept])


def _pairs(real: np.ndarray, synthetic: np.ndarray) -> Pairs:
    real, synthetic = np.asarray(real), np.asarray(synthetic)
    if real.ndim != 2 or real.shape != synthetic.shape or len(real) < 2:
        raise AttribError(
            f"real {real.shape} and synthetic {synthetic.shape} are not pairs; give both as [n, d], n of 2 or more"
        )
    return _finite(real, "real"), _finite(synthetic, "synthetic")


def _finite(vectors: np.ndarray, name: str) -> np.ndarray:
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise AttribError(f"{name} vector {wrong[0]} holds a NaN or infinity; embed that image again or leave it out")
    return vectors.astype(np.float64)


def _moments(directions: Directions, real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Sums of xy, xx and yy float64 [3, p] of the projections about their own means; they add up over folds."""
    x = (real - directions.real_mean) @ directions.real
    y = (synthetic - directions.synthetic_mean) @ directions.synthetic
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
