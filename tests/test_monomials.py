"""States of the polynomial engine against sums of monomials in float64, one by one as c/monomials.h orders them."""

import numpy as np
import pytest

from ropecy.approximation.minimax import minimax
from ropecy.engines.polynomial import features
from ropecy.kernels import _monomials
from ropecy.problem.problem import Problem

# Fewer variables than a vector has lanes, as many and more; degree 1, and runs of one, some and many vectors.
SHAPES = [(1, 1), (1, 4), (2, 3), (3, 5), (5, 1), (5, 4), (8, 2), (8, 4), (9, 3), (16, 1), (16, 3), (17, 2), (33, 2)]


def monomials_of(x, degree):
    """All monomials of rows x, (n, count), of each degree."""
    found, ends = [np.ones((len(x), 1))], [1] * x.shape[1]  # those of the first variables come first
    for _ in range(degree):
        runs = [found[-1][:, :end] * x[:, m : m + 1] for m, end in enumerate(ends)]
        ends = np.cumsum([run.shape[1] for run in runs])
        found.append(np.concatenate(runs, axis=1))
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d_v", [3, 16, 40])
@pytest.mark.parametrize(("d", "degree"), SHAPES)
def test_a_state_is_the_sum_of_monomials_times_values(d, degree, d_v, dtype, rng):
    H, n = 2, 117
    k, v = (rng.uniform(-1, 1, (H, n, width)).astype(dtype) for width in (d, d_v))
    problem = Problem(q=np.zeros((H, 1, 1, d), dtype), k=k, v=v, threads=2)
    monomials = features._monomials_for(problem, minimax(0.5, degree), None)
    middle, ones = np.zeros((H, d_v), dtype), np.ones(H)
    _, total = _monomials.Scan(problem, features.Frame(None, middle, ones, ones), monomials, 1).key_states()
    for head in range(H):
        columns = np.concatenate([v[head], np.ones((n, 1))], axis=1).astype(np.float64)
        wanted, size = np.zeros(total.shape[1:]), np.zeros(total.shape[1:])
        for start, phi in zip(monomials.offset, monomials_of(k[head].astype(np.float64), degree), strict=True):
            place = slice(start, start + phi.shape[1])
            wanted[:, place], size[:, place] = columns.T @ phi, np.abs(columns).T @ np.abs(phi)
        assert np.all(np.abs(total[head] - wanted) <= 30 * np.finfo(dtype).eps * size)
