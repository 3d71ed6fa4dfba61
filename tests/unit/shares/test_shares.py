"""Soft shares against a loop over AbC's formula."""

import math

import numpy as np
import pytest

from attrib.shares.settings import SharesSettings
from attrib.shares.shares import soft_shares


def naive_shares(row: list[float], inverse_temperature: float, offset: float) -> list[float]:
    best = max(row)
    kept = [max(0.0, math.exp((s - best) * inverse_temperature) + 0.001 * offset) for s in row]
    return [value / sum(kept) for value in kept]


@pytest.fixture(scope="module")
def similarity():
    generator = np.random.default_rng(16)
    rows = generator.uniform(-1, 1, (50, 10))
    rows[10:30] = 0.7 + 0.1 * rows[10:30]
    rows[5] = 0.25
    rows[6, 4:] = rows[6, 3]
    rows[7, 3:], rows[8, 1:] = -np.inf, -np.inf
    return -np.sort(-rows, axis=1).astype(np.float32)


@pytest.mark.parametrize("settings", [{}, {"inverse_temperature": 3.0}, {"offset": 0.0}, {"offset": -900.0}])
def test_shares_equal_the_formula(settings, similarity):
    settings = SharesSettings(**settings)
    shares = soft_shares(similarity, settings)
    expected = [naive_shares(row, settings.inverse_temperature, settings.offset) for row in similarity.tolist()]
    assert shares.dtype == np.float64
    np.testing.assert_allclose(shares, expected, rtol=1e-12, atol=0)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-12)
    assert (np.diff(shares, axis=1) <= 0).all()
    assert (shares[~np.isfinite(similarity)] == 0).all()
    assert shares[8, 0] == 1


def test_distant_sources_get_nothing_and_equal_ones_equal_shares(similarity):
    shares = soft_shares(similarity, SharesSettings())
    # By default, a share is zero from log(1 / 0.05) / 50 = 0.06 below the best.
    gap = similarity[:, :1] - similarity
    assert (shares[gap > 0.0601] == 0).all() and (shares[gap < 0.0599] > 0).all()
    assert 0 < (shares[:5] == 0).sum()
    assert shares[5] == pytest.approx(0.1) and len(set(shares[5].tolist())) == 1
    assert len(set(shares[6, 3:].tolist())) == 1


@pytest.mark.parametrize("inverse_temperature", [1e-300, 1e300])
def test_no_temperature_overflows(inverse_temperature, similarity):
    """Near zero all sources get equal shares; near infinity the best get everything."""
    shares = soft_shares(similarity, SharesSettings(inverse_temperature=inverse_temperature))
    sharing = np.isfinite(similarity) if inverse_temperature < 1 else similarity == similarity[:, :1]
    np.testing.assert_allclose(shares, sharing / sharing.sum(axis=1, keepdims=True), rtol=1e-12)
