"""float16 and bfloat16 arrays, widened to float32 and rounded back."""

import ml_dtypes
import numpy as np
import pytest

from ropecy.kernels import _halves
from ropecy.problem import checks

DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
PATTERNS = np.arange(2**16, dtype=np.uint16)


def same(found, wanted):
    """Bit by bit, but for NaN, of which there are many."""
    nan = np.isnan(wanted.astype(np.float64))
    bits = np.dtype(f"u{found.itemsize}")
    return np.array_equal(np.isnan(found.astype(np.float64)), nan) and np.array_equal(
        found.view(bits)[~nan], wanted.view(bits)[~nan]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_half_is_widened_and_comes_back(dtype):
    stored = PATTERNS.view(dtype)
    wide = _halves.widened(stored, 2)
    assert wide.dtype == np.float32
    assert same(wide, stored.astype(np.float32))
    assert same(_halves.narrowed(wide, dtype, 2), stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_between_halves_is_rounded_to_the_nearest(dtype):
    values = np.sort(PATTERNS.view(dtype)[np.isfinite(PATTERNS.view(dtype))].astype(np.float64))
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2**32, 10**5, dtype=np.uint64).astype(np.uint32).view(np.float32)
    past = np.float32([65519.99, 65520, 1e6, 3.3961775e38, 3.4e38, np.inf])
    sized = np.concatenate((np.nextafter(middle, -np.inf), middle, np.nextafter(middle, np.inf), past))
    x = np.concatenate((sized, -sized, drawn))
    with np.errstate(all="ignore"):
        assert same(_halves.narrowed(x, dtype, 1), x.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 15, 16, 17, 33, 2**16 + 5])
def test_lengths_strides_and_threads(dtype, n):
    x = np.random.default_rng(n).standard_normal((n, 3)).astype(dtype)
    for array in (x, x[:, 1], x[::-1], x.T, np.broadcast_to(x[:, :1], (n, 4))):
        wide = _halves.widened(array, 3)
        assert np.array_equal(wide, array.astype(np.float32))
        assert np.array_equal(_halves.narrowed(wide.T, dtype, 3), array.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_of_halves_is_found_without_their_signs(dtype):
    x = np.random.default_rng(0).standard_normal((9, 7)).astype(dtype)
    for array in (x, np.abs(x), -np.abs(x), x[::2, 1::3], 0 * x, x[:0]):
        assert checks.check_finite("dO", array) == np.abs(array.astype(np.float64)).max(initial=0)
    for entry, said in ((np.nan, "NaN"), (-np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "-Inf")):
        x[4, 5] = entry
        with pytest.raises(ValueError, match=rf"^dO: got {said} at index \(4, 5\), wants finite numbers only"):
            checks.check_finite("dO", x)
