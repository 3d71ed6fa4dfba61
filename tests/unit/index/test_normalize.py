"""Conversion and normalisation of vectors, compared with NumPy."""

import numpy as np
import pytest

from attrib.index.normalize import inverse_norms, to_float32, unit_rows


def test_every_float16_is_converted_exactly():
    everything = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = everything[np.isfinite(everything)].reshape(-1, 16)
    assert finite.size == 2 * 31 * 1024
    assert np.array_equal(to_float32(finite), finite.astype(np.float32))
    assert np.array_equal(np.signbit(to_float32(finite)), np.signbit(finite))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_unit_rows_have_length_one_and_their_direction(dtype):
    vectors = (np.random.default_rng(0).standard_normal((50, 33)) * 10.0 ** np.linspace(-2, 3, 50)[:, None]).astype(
        dtype
    )
    units = unit_rows(vectors)
    expected = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    assert units.dtype == np.float32
    np.testing.assert_allclose(units, expected, atol=1e-6)


def test_inverse_norms():
    rows = np.array([[3, 4], [0, 2]], np.float32)
    assert inverse_norms(rows).tolist() == pytest.approx([0.2, 0.5])
