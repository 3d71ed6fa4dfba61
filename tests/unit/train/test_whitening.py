"""Projections: definition of whitening, formula of shrinkage, and the optimum of Hadamard's inequality."""

import numpy as np
import pytest
import torch

from attrib.common.errors import AttribError
from attrib.models.heads import Head
from attrib.models.settings import HeadSettings
from attrib.train.whitening import (
    affine,
    centre_projections,
    fit_projections,
    is_symmetric,
    principal_directions,
    projected_sizes,
)

TINY = 1e-12  # shrinkage
BY_DOMAIN = {"separate_domains": True, "net": "none"}  # whitened symmetrically


def data(num: int, dimension: int, rank: int | None = None, seed: int = 0) -> np.ndarray:
    """Return float64 [n, D], correlated dimensions of different scales, not centred."""
    rng = np.random.default_rng(seed)
    rank = rank or dimension
    mixing = rng.standard_normal((rank, dimension)) * np.geomspace(1, 20, dimension)
    return rng.standard_normal((num, rank)) @ mixing + rng.uniform(-5, 5, dimension)


def settings_of(projection="whiten", shrinkage=TINY, **values) -> HeadSettings:
    return HeadSettings(projection=projection, shrinkage=shrinkage, **values)


def projected(features: np.ndarray, settings: HeadSettings, fitted_to: np.ndarray | None = None) -> np.ndarray:
    weight, bias = affine(features if fitted_to is None else fitted_to, settings)
    return features @ weight.T + bias


def cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def fitted_head(features: np.ndarray, settings: HeadSettings, num_images: int | None = None) -> Head:
    sizes = {"pooled": features.shape[1]}
    head = Head(sizes, projected_sizes(sizes, num_images or len(features), settings), settings)
    fit_projections(head.parts["all"], {"pooled": features}, settings)
    return head


@pytest.mark.parametrize("projection", ["whiten", "standardise_whiten"])
@pytest.mark.parametrize(("num", "dimension"), [(200, 12), (13, 12), (12, 12), (9, 12), (2, 5)])
def test_whitened_data_have_identity_covariance(num, dimension, projection):
    white = projected(data(num, dimension), settings_of(projection))
    rank = min(num - 1, dimension)
    assert white.shape == (num, rank)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-8)
    np.testing.assert_allclose(white.T @ white / num, np.eye(rank), atol=2e-5)


def test_shrinkage_adds_a_share_of_the_largest_variance():
    features = data(300, 7)
    white = projected(features, settings_of(shrinkage=0.05))
    variance = np.sort(np.linalg.eigvalsh(np.cov(features.T, bias=True)))[::-1]
    np.testing.assert_allclose(white.T @ white / 300, np.diag(variance / (variance + 0.05 * variance[0])), atol=1e-9)


def test_principal_directions_equal_a_singular_value_decomposition():
    for num, dimension in ((60, 8), (8, 60)):
        features = data(num, dimension)
        centred = features - features.mean(axis=0)
        _, singular, expected = np.linalg.svd(centred, full_matrices=False)
        variance, directions = principal_directions(centred)
        rank = min(num - 1, dimension)
        assert len(variance) == rank and (np.diff(variance) <= 0).all()
        np.testing.assert_allclose(variance, singular[:rank] ** 2 / num, rtol=1e-6)
        np.testing.assert_allclose(directions @ directions.T, np.eye(rank), atol=1e-8)
        np.testing.assert_allclose(abs((directions * expected[:rank]).sum(axis=1)), 1, atol=1e-6)  # up to the sign


@pytest.mark.parametrize("projection", ["whiten", "standardise_whiten"])
@pytest.mark.parametrize("shrinkage", [TINY, 0.05])
def test_gram_matrix_equals_the_covariance(projection, shrinkage):
    """20 images of 30 dimensions use the Gram matrix; the same images twice are 40, which use the covariance."""
    few, settings, new = data(20, 30), settings_of(projection, shrinkage), data(6, 30, seed=1)
    by_products, by_covariance = (projected(new, settings, fitted_to) for fitted_to in (few, np.repeat(few, 2, axis=0)))
    assert by_products.shape == by_covariance.shape == (6, 19)
    np.testing.assert_allclose(cosines(by_products), cosines(by_covariance), atol=1e-6)
    np.testing.assert_allclose(abs(by_products), abs(by_covariance), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [50, 6])
def test_missing_directions_are_zeros(num):
    features = data(num, 8, rank=3)
    settings = settings_of()
    head = fitted_head(features, settings)
    project = head.parts["all"].project["pooled"]
    assert project.out_features == min(num - 1, 8) == head.dimension
    assert not project.weight[3:].any() and not project.bias[3:].any()
    with torch.no_grad():
        white = project(torch.from_numpy(features).float()).numpy()
    np.testing.assert_allclose(white.T @ white / num, np.diag([1.0] * 3 + [0.0] * (len(white.T) - 3)), atol=1e-3)


@pytest.mark.parametrize("values", [{}, BY_DOMAIN])
@pytest.mark.parametrize("projection", ["centre", "standardise", "whiten", "standardise_whiten"])
def test_constant_block_becomes_zeros(projection, values):
    for num in (20, 3):
        head = fitted_head(np.full((num, 5), 0.25), settings_of(projection, **values))
        with torch.no_grad():
            assert not head(torch.full((2, 5), 0.25)).any()


@pytest.mark.parametrize("projection", ["standardise", "standardise_whiten"])
def test_constant_dimension_stays_zero(projection):
    features = data(50, 4)
    features[:, 2] = 7.5
    found = projected(features, settings_of(projection))
    assert np.isfinite(found).all() and abs(found).max() < 10
    np.testing.assert_allclose(
        cosines(found), cosines(projected(np.delete(features, 2, axis=1), settings_of(projection))), atol=1e-8
    )


@pytest.mark.parametrize("values", [{}, BY_DOMAIN])
@pytest.mark.parametrize("projection", ["standardise", "standardise_whiten"])
@pytest.mark.parametrize("num", [50, 3])
def test_dimension_constant_when_fitted_is_ignored_later(num, projection, values):
    """Its scale is unknown, so even large values have no effect."""
    fitted_to, new = data(num, 4), data(6, 4, seed=1)
    fitted_to[:, 2] = 7.5
    settings, other = settings_of(projection, shrinkage=0.05, **values), new.copy()
    new[:, 2], other[:, 2] = 7.5, 1e6 * new[:, 2]
    assert not affine(fitted_to, settings)[0][:, 2].any()
    np.testing.assert_array_equal(projected(other, settings, fitted_to), projected(new, settings, fitted_to))


def test_centring_and_standardising_equal_their_definitions():
    features, new = data(30, 5), data(4, 5, seed=1)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    np.testing.assert_allclose(projected(new, settings_of("centre"), features), new - mean, atol=1e-9)
    np.testing.assert_allclose(
        projected(new, settings_of("standardise"), features), (new - mean) / deviation, atol=1e-9
    )


def test_identity_projection_has_no_layer():
    head = fitted_head(data(30, 5), settings_of("identity"))
    assert isinstance(head.parts["all"].project["pooled"], torch.nn.Identity)


def test_whitening_by_pca_and_by_zca_give_the_same_cosines():
    features, new = data(100, 9), data(12, 9, seed=1)
    settings = settings_of(shrinkage=0.05)
    variance, directions = np.linalg.eigh(np.cov(features.T, bias=True))
    zca = directions / np.sqrt(variance + 0.05 * variance[-1]) @ directions.T
    np.testing.assert_allclose(
        cosines(projected(new, settings, features)), cosines((new - features.mean(axis=0)) @ zca), atol=1e-9
    )


def test_heads_by_domain_without_a_net_are_symmetric():
    found = {
        (separate, net): is_symmetric(HeadSettings(separate_domains=separate, net=net))
        for separate in (False, True)
        for net in ("none", "linear", "mlp")
    }
    assert [key for key, symmetric in found.items() if symmetric] == [(True, "none")]


@pytest.mark.parametrize("projection", ["whiten", "standardise_whiten"])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
@pytest.mark.parametrize(("num", "rank"), [(300, 9), (9, 9), (5, 9), (2, 9), (300, 3)])
def test_whitening_by_domain_is_the_inverse_root_of_the_shrunk_covariance(projection, shrinkage, num, rank):
    """Also in directions in which the images do not vary."""
    features = data(num, 9, rank)
    weight, bias = affine(features, settings_of(projection, shrinkage, **BY_DOMAIN))
    scale = 1 / features.std(axis=0) if projection.startswith("standardise") else np.ones(9)
    covariance = np.cov((features * scale).T, bias=True)
    shrunk = covariance + shrinkage * np.linalg.eigvalsh(covariance)[-1] * np.eye(9)
    root = weight / scale
    np.testing.assert_allclose(root, root.T, atol=1e-8 * abs(root).max())
    assert np.linalg.eigvalsh(root)[0] > 0
    np.testing.assert_allclose(root @ shrunk @ root, np.eye(9), atol=1e-6)
    np.testing.assert_allclose(weight @ features.mean(axis=0) + bias, 0, atol=1e-8)


def test_separately_whitened_domains_correspond():
    """Two domains stretch the same contents along different axes: only symmetric whitening recovers the contents."""
    contents = projected(data(200, 6), settings_of())
    rng = np.random.default_rng(4)
    domains = []
    for offset in (0, 30):
        axes = np.linalg.qr(rng.standard_normal((6, 6)))[0]
        domains.append(contents @ (axes * np.geomspace(1, 8, 6)) @ axes.T + offset)
    for features in domains:
        found = projected(features, settings_of(**BY_DOMAIN))
        np.testing.assert_allclose(found, contents - contents.mean(axis=0), atol=1e-6)
    first, second = (projected(features, settings_of()) for features in domains)
    assert abs(abs(first) - abs(second)).max() > 1  # for any choice of signs


@pytest.mark.parametrize("values", [{}, BY_DOMAIN])
@pytest.mark.parametrize("projection", ["centre", "standardise", "whiten", "standardise_whiten"])
def test_centring_changes_only_the_bias(projection, values):
    features, others = data(60, 5), data(30, 5, seed=1) + 9
    head = fitted_head(features, settings_of(projection, shrinkage=0.05, **values))
    project = head.parts["all"].project["pooled"]
    weight = project.weight.clone()
    centre_projections(head.parts["all"], {"pooled": others})
    assert torch.equal(project.weight, weight)
    with torch.no_grad():
        found = project(torch.from_numpy(others).float())
        expected = torch.from_numpy(others - others.mean(axis=0)).float() @ weight.T
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(5), atol=2e-4, rtol=0)


def test_identity_projection_has_no_centre():
    head = fitted_head(data(30, 5), settings_of("identity"))
    centre_projections(head.parts["all"], {"pooled": data(30, 5) + 9})
    assert not head.parts["all"].project.state_dict()


def test_whitening_is_invariant_to_invertible_maps():
    features, new = data(100, 6), data(8, 6, seed=1)
    mapping = np.random.default_rng(2).standard_normal((6, 6))
    expected = cosines(projected(new, settings_of(), features))
    np.testing.assert_allclose(
        cosines(projected(new @ mapping + 3, settings_of(), features @ mapping + 3)), expected, atol=1e-6
    )
    scale = np.geomspace(0.1, 50, 6)
    settings = settings_of("standardise_whiten", shrinkage=0.05)  # with shrinkage, to scales only
    np.testing.assert_allclose(
        cosines(projected(new * scale, settings, features * scale)), cosines(projected(new, settings, features))
    )


def test_whitening_has_the_largest_log_det_of_linear_heads():
    """Hadamard: the determinant of a correlation matrix is at most one, for uncorrelated outputs."""
    features, rng = data(400, 10), np.random.default_rng(3)

    def log_det(outputs: np.ndarray) -> float:
        outputs = outputs - outputs.mean(axis=0)
        outputs = outputs / outputs.std(axis=0)
        return np.linalg.slogdet(outputs.T @ outputs / len(outputs))[1]

    for num_outputs in (10, 4):
        best = log_det(projected(features, settings_of(num_directions=num_outputs)))
        assert best == pytest.approx(0, abs=1e-8)
        assert all(log_det(features @ rng.standard_normal((10, num_outputs))) < best for _ in range(200))


def test_directions_of_largest_variance_are_kept():
    features = data(60, 8)
    weight, bias = affine(features, settings_of(shrinkage=0.05))
    fewer = affine(features, settings_of(shrinkage=0.05, num_directions=3))
    np.testing.assert_allclose(fewer[0], weight[:3], rtol=1e-12)
    np.testing.assert_allclose(fewer[1], bias[:3], rtol=1e-12)
    assert len(affine(features, settings_of(num_directions=100))[0]) == 8
    head = fitted_head(features, settings_of(shrinkage=0.05, num_directions=3))
    np.testing.assert_allclose(head.parts["all"].project["pooled"].weight.detach(), weight[:3], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "num_images", "expected"),
    [
        ({"projection": "identity"}, 3, (10, 50)),
        ({"projection": "centre"}, 3, (10, 50)),
        ({"projection": "standardise", "num_directions": 4}, 3, (10, 50)),
        ({"projection": "whiten"}, 1000, (10, 50)),
        ({"projection": "whiten"}, 31, (10, 30)),
        ({"projection": "standardise_whiten", "num_directions": 20}, 31, (10, 20)),
        ({"projection": "standardise_whiten", "num_directions": 40}, 31, (10, 30)),
        ({"projection": "whiten"}, 2, (1, 1)),
        ({"projection": "whiten", "separate_domains": True, "net": "linear"}, 31, (10, 30)),
        ({"projection": "whiten"} | BY_DOMAIN, 31, (10, 50)),
        ({"projection": "standardise_whiten"} | BY_DOMAIN, 2, (10, 50)),
    ],
)
def test_number_of_images_limits_the_directions(values, num_images, expected):
    found = projected_sizes({"pooled": 10, "moments": 50}, num_images, HeadSettings(**values))
    assert found == dict(zip(("pooled", "moments"), expected))


@pytest.mark.parametrize("num", [40, 6])
def test_fitting_is_deterministic_and_takes_float16(num):
    features = data(num, 8).astype(np.float16)
    first, second = (fitted_head(features, HeadSettings()).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    exact = fitted_head(features.astype(np.float64), HeadSettings()).state_dict()
    assert all(torch.equal(value, exact[key]) for key, value in first.items())


def test_too_few_images_are_an_error():
    with pytest.raises(AttribError, match="1 images are too few to fit a projection; give at least two"):
        affine(data(1, 3), settings_of())
