"""The FFTW binding: transforms against numpy.fft, plans made and executed from many threads, and its errors."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ropecy.kernels._fftw import ComplexFFT, RealFFT, fftw_version

LENGTHS = [1, 2, 3, 8, 15, 97, 128, 1009, 4096, 5000]  # odd, even, prime, powers of two
DTYPES = [np.float32, np.float64]


def tolerance(n, dtype):
    """Of the largest error over the root mean square of a spectrum: a few units of rounding a level."""
    return 4 * np.finfo(dtype).eps * max(1.0, np.log2(n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("howmany", [1, 5])
@pytest.mark.parametrize("n", LENGTHS)
def test_against_numpy_and_round_trip(rng, n, howmany, dtype):
    x = rng.standard_normal((howmany, n)).astype(dtype)
    fft = RealFFT(n, howmany, dtype)
    X = fft.forward(x)
    assert X.dtype == np.result_type(dtype, np.complex64)
    assert X.shape == (howmany, n // 2 + 1)
    scale = np.linalg.norm(x, axis=1, keepdims=True)
    assert np.all(np.abs(X - np.fft.rfft(x.astype(float))) <= tolerance(n, dtype) * scale)

    back = fft.inverse(X)
    assert back.dtype == dtype and back.shape == x.shape
    assert np.all(np.abs(back - x) <= tolerance(n, dtype) * np.abs(x).max(axis=1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_measured_plans_agree_with_estimated_ones(rng, dtype):
    x = rng.standard_normal((3, 360)).astype(dtype)
    measured = RealFFT(360, 3, dtype, flags="measure").forward(x)
    estimated = RealFFT(360, 3, dtype).forward(x)
    assert np.all(np.abs(measured - estimated) <= 2 * tolerance(360, dtype) * np.linalg.norm(x))


@pytest.mark.parametrize("flags", ["estimate", "measure"])
@pytest.mark.parametrize("n", LENGTHS)
def test_complex_against_numpy_and_round_trip(rng, n, flags):
    x = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    kept, fft = x.copy(), ComplexFFT(n, flags=flags)
    X = fft.forward(x)
    assert np.all(np.abs(X - np.fft.fft(x)) <= tolerance(n, np.float64) * np.linalg.norm(x))
    assert np.all(np.abs(fft.inverse(X) - x) <= tolerance(n, np.float64) * np.abs(x).max())
    fft.rounds(3, 2)
    assert np.array_equal(x, kept)


def test_one_row_may_be_one_dimensional(rng):
    fft = RealFFT(10)
    x = rng.standard_normal(10)
    assert fft.forward(x).shape == (6,)
    assert np.array_equal(fft.inverse(fft.forward(x)), fft.inverse(fft.forward(x[None]))[0])


def test_strides_order_and_inputs_are_kept(rng):
    whole = rng.standard_normal((40, 12))
    fft = RealFFT(20, 12)
    expected = fft.forward(np.ascontiguousarray(whole[::-2].T))
    assert np.array_equal(fft.forward(whole[::-2].T), expected)
    expected.flags.writeable = False
    kept = expected.copy()
    fft.inverse(expected)
    assert np.array_equal(expected, kept)


def test_plans_made_executed_and_dropped_at_once(rng):
    rows = {n: rng.standard_normal((3, n)) for n in (31, 64, 90, 128, 243)}

    def work(k):
        n = sorted(rows)[k % len(rows)]
        dtype = DTYPES[k % 2]
        fft = RealFFT(n, 3, dtype, flags="measure" if k % 3 == 0 else "estimate")
        X = fft.forward(rows[n].astype(dtype))
        return np.abs(X - np.fft.rfft(rows[n])).max() <= 10 * tolerance(n, dtype) * np.linalg.norm(rows[n])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_plan_executed_by_many_threads(rng, dtype):
    fft = RealFFT(1000, 7, dtype)
    rows = rng.standard_normal((40, 7, 1000)).astype(dtype)
    alone = [fft.forward(x) for x in rows]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fft.forward, rows))
        back = list(pool.map(fft.inverse, together))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert np.allclose(back, rows, rtol=0, atol=100 * np.finfo(dtype).eps)


def test_version_names_fftw_in_both_precisions():
    assert set(fftw_version()) == {"float32", "float64"}
    assert all(version.startswith("fftw-3") for version in fftw_version().values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "n must be from 1 to 2147483647, got 0"),
        ((-3,), ValueError, "n must be from 1"),
        ((2**31,), ValueError, "n must be from 1"),
        ((2**80,), ValueError, "n must be from 1"),
        ((4.0,), TypeError, "n must be an integer, got 4.0"),
        ((True,), TypeError, "n must be an integer"),
        ((4, 0), ValueError, "howmany must be from 1"),
        ((4, "2"), TypeError, "howmany must be an integer, got '2'"),
        ((4, 1, np.int64), TypeError, "dtype must be float32 or float64, got int64"),
        ((4, 1, np.complex128), TypeError, "dtype must be float32 or float64"),
        ((2**31 - 1, 2**31 - 1), MemoryError, "addressed"),
    ],
)
def test_plan_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        RealFFT(*arguments)


def test_unknown_flags():
    with pytest.raises(ValueError, match="flags must be 'estimate' or 'measure', got 'patient'"):
        RealFFT(4, flags="patient")
    with pytest.raises(ValueError, match="flags must be 'estimate' or 'measure', got 'patient'"):
        ComplexFFT(4, flags="patient")


def test_complex_errors():
    with pytest.raises(ValueError, match="n must be from 1"):
        ComplexFFT(0)
    with pytest.raises(TypeError, match="x must be complex128, got float64"):
        ComplexFFT(4).forward(np.zeros(4))
    with pytest.raises(ValueError, match=r"X must have shape \(4,\), got \(3,\)"):
        ComplexFFT(4).inverse(np.zeros(3, complex))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 5)), ValueError, r"x must have shape \(2, 4\), got \(2, 5\)"),
        (np.zeros(4), ValueError, r"x must have shape \(2, 4\), got \(4,\)"),
        (np.zeros((2, 4), np.float32), TypeError, "x must be float64, got float32"),
        (np.zeros((2, 4), complex), TypeError, "x must be float64, got complex128"),
    ],
)
def test_forward_errors(x, error, message):
    with pytest.raises(error, match=message):
        RealFFT(4, 2).forward(x)


def test_inverse_errors():
    with pytest.raises(TypeError, match="X must be complex64, got complex128"):
        RealFFT(4, 2, np.float32).inverse(np.zeros((2, 3), np.complex128))
    with pytest.raises(ValueError, match=r"X must have shape \(2, 3\)"):
        RealFFT(4, 2).inverse(np.zeros((2, 4), complex))
