"""What planning measures of rows, against NumPy in float64."""

import numpy as np
import pytest

from ropecy.kernels import _rows

# Widths that are a whole number of vectors, a part of one that several rows fill, and neither.
SHAPES = [(1, 1, 1), (3, 50, 1), (2, 101, 2), (1, 37, 4), (2, 1003, 8)]
SHAPES += [(2, 100, 3), (3, 700, 17), (1, 5000, 64), (2, 333, 130)]


@pytest.fixture(params=SHAPES, ids=str)
def rows(request, rng):
    return rng.standard_normal(request.param)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quadratic_forms(rows, dtype, rng):
    x = rows.astype(dtype)
    H, _, d = x.shape
    M = rng.standard_normal((H, d, d))
    M += M.swapaxes(1, 2)
    found = [_rows.quadratic(x, M, threads) for threads in (1, 3)]
    np.testing.assert_array_equal(*found)
    size = np.einsum("hna,hab,hnb->hn", abs(x), abs(M), abs(x), dtype=np.float64)
    wanted = np.einsum("hna,hab,hnb->hn", x, M, x, dtype=np.float64)
    assert np.all(np.abs(found[0] - wanted) <= 4 * np.finfo(dtype).eps * size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_norms_and_columns(rows, dtype, masked, rng):
    x = rows.astype(dtype)
    H, n, d = x.shape
    keep = rng.random((H, n)) < 0.7 if masked else None
    kept = np.ones((H, n), bool) if keep is None else keep
    shift = rng.standard_normal((H, d)).astype(dtype)
    for centre in (None, shift):
        y = x.astype(np.float64) - (0 if centre is None else centre[:, None])
        wanted = np.where(kept, np.linalg.norm(y, axis=2), 0)
        found = [_rows.largest_norms(x, keep, centre, threads) for threads in (1, 3)]
        np.testing.assert_array_equal(*found)
        np.testing.assert_allclose(found[0], wanted.max(axis=1), rtol=4 * d * np.finfo(dtype).eps)
    factor = rng.random(H)
    wanted = factor[:, None] * np.linalg.norm(x.astype(np.float64), axis=2)
    np.testing.assert_allclose(_rows.norms(x, factor, 2), wanted, rtol=4 * d * np.finfo(dtype).eps)
    found = [_rows.columns(x, keep, threads) for threads in (1, 3)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    total, low, high = found[0]
    wanted = np.where(kept[..., None], x, 0).sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(total, wanted, atol=(1e-12 if dtype == np.float64 else 1e-6) * n)
    np.testing.assert_array_equal(low, np.where(kept[..., None], x, np.inf).min(axis=1))
    np.testing.assert_array_equal(high, np.where(kept[..., None], x, -np.inf).max(axis=1))


@pytest.mark.parametrize(("dtype", "size"), [("f4", 1e-38), ("f4", 1e18), ("f8", 1e-150), ("f8", 1e153)])
def test_norms_whose_squares_a_dtype_hardly_holds(dtype, size):
    x = np.full((1, 3, 33), size, dtype)
    np.testing.assert_allclose(_rows.largest_norms(x, None, None, 1), size * np.sqrt(33.0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step", [1, 3, 50])
def test_few_rows_are_scattered_about_their_mean(dtype, step, rng):
    x = (rng.standard_normal((2, 40, 5)) * [[[1.0]], [[1e3]]] + 2).astype(dtype)
    expected = x[:, ::step].astype(np.float64).var(axis=1).sum(axis=1)
    np.testing.assert_allclose(_rows.few_scatter(x, step), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", [0, 40_000, 99_999])
def test_the_largest_number_of_many_pieces(place, dtype, rng):
    x = rng.standard_normal(100_000).astype(dtype)
    for entry in (-9.0, np.inf, -np.inf, np.nan):
        x[place] = entry
        found = [_rows.largest(x, threads) for threads in (1, 3)]
        np.testing.assert_array_equal(found, abs(entry))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_stays(dtype, entry, rng):
    x = rng.standard_normal((2, 3000, 9)).astype(dtype)
    x[1, 1, 4] = entry
    found = _rows.largest_norms(x, None, None, 2)
    assert np.isfinite(found[0])
    assert not np.isfinite(found[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("entry", [np.nan, np.inf, 1e-18])
def test_norms_of_rows_that_share_a_vector(dtype, entry):
    x = np.zeros((1, 77, 2), dtype)
    x[0, 5, 1] = entry
    np.testing.assert_allclose(_rows.largest_norms(x, None, None, 1), entry, rtol=1e-6)
