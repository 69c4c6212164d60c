"""exp of scores from 0 to far below what a type can hold: right to a few units, then 0, in every kernel.

The kernels put the whole part of x log2(e) into the exponent's bits. Where that part has more digits than the exponent,
the bits must wrap round without a signed overflow, which `.ci/sanitize` looks for in this file too.
"""

import numpy as np
import pytest

import ropecy


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("queries", [1, 2, 700])
def test_exp_of_every_size(dtype, queries):
    # Two keys with the scores 0 and -x, of which only the second has the value 1: the result is e^-x / (1 + e^-x).
    smallest = -np.log(float(np.finfo(dtype).tiny))
    within = np.linspace(0, smallest - 1, 500)
    past = np.concatenate([np.linspace(smallest + 1, 30 * smallest, 170), np.geomspace(1e5, 1e30, 30)])
    x = np.concatenate([within, past]).astype(dtype)
    Q, K, V = -x[:, None], np.array([[0], [1]], dtype), np.array([[0], [1]], dtype)
    pieces = [Q[i : i + queries] for i in range(0, len(Q), queries)]
    O = np.concatenate([ropecy.attention(q, K, V, scale=1.0, method="exact") for q in pieces])[:, 0].astype(float)

    a = np.exp(-x.astype(float))
    # A score is rounded to its type, and as a power of 2.
    rtol = np.finfo(dtype).eps * (4 + 2 * x[: len(within)])
    error = np.abs(O - a / (1 + a))
    assert np.all(error[: len(within)] <= rtol * a[: len(within)])
    # Below the smallest normal number there is 0, or what a subnormal one can hold.
    assert np.all(error[len(within) :] <= np.finfo(dtype).tiny)
    assert np.all(O[x > 2 * smallest] == 0)
