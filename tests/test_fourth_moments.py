"""Fourth moments from an eigenvalue: never too small, for every prefix of the keys."""

import itertools

import cases
import numpy as np
import pytest
from inside import measure
from moment_cases import CHUNK, by_moments, problem_of, row_errors

from ropecy.certify import fourth_moments, moments
from ropecy.kernels import _quartic


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 5, 16, 33, 64])
def test_sums_of_weighted_products(d, dtype, rng):
    H, n = 2, 2 * 2048 + 777
    x, centre = rng.standard_normal((H, n, d)).astype(dtype), rng.standard_normal((H, d)).astype(dtype)
    keep, stops = rng.random((H, n)) < 0.7, [3 * CHUNK, 12 * CHUNK, n]
    X = rng.standard_normal((H, len(stops), d, d))
    X += X.swapaxes(2, 3)
    unit = float(np.finfo(dtype).eps)
    for mask, shift in ((None, None), (keep, centre)):
        found = [_quartic.Rows(x, mask, shift, np.full(len(x), 0.4), threads).apply(stops, X) for threads in (1, 3)]
        for one, two in zip(*found, strict=True):
            np.testing.assert_array_equal(one, two)
        plain, _ = _quartic.Rows(x, mask, shift, np.full(len(x), 0.4), 2).apply(stops, None)
        for head, (place, stop) in itertools.product(range(H), enumerate(stops)):
            y = 0.4 * (x[head, :stop].astype(float) - (0 if shift is None else shift[head].astype(float)))
            y = y if mask is None else y[mask[head, :stop]]
            w = np.einsum("ma,ab,mb->m", y, X[head, place], y, optimize=True)
            atol = 30 * unit * np.abs(w).sum() * np.max(y * y)
            np.testing.assert_allclose(found[0][0][head, place], (y * w[:, None]).T @ y, atol=atol)
            np.testing.assert_allclose(found[0][1][head, place], w.sum(), atol=30 * unit * np.abs(w).sum())
            np.testing.assert_allclose(plain[head, place], y.T @ y, atol=30 * unit * np.sum(y * y))


@pytest.mark.parametrize("masked", [False, True])
def test_causal_rows_have_the_fourth_moments_of_a_prefix(masked, rng):
    n, d = 72 * CHUNK + 50, 4
    # Keys change along the way: what holds for all of them says nothing of the first.
    k = rng.standard_normal((2, n, d)) * np.linspace(3.0, 0.1, n)[:, None]
    k[1] = k[1, ::-1]
    mask = rng.random((2, n)) < 0.6 if masked else None
    problem = problem_of(rng.standard_normal((2, 2, n, d)) / 30, k, k[..., :2], causal=True, mask=mask)
    scores = measure(problem)
    fourth = fourth_moments.fourth_moments(problem, scores, 2)
    assert len(fourth.stops) == 3
    assert fourth.stops[-1] == n
    assert np.all(fourth.stops[:-1] % CHUNK == 0)
    far = moments.far_keys(problem, np.arange(problem.q.shape[2]))
    np.testing.assert_array_equal(far, np.arange(n) // CHUNK * CHUNK)
    of_rows, kept = fourth.of_rows(far), problem.mask.kept_before(far, problem.sizes.H)
    sizes = scores.of_rows(problem)
    for head in range(2):
        y = (problem.k[head] - (0 if scores.centre is None else scores.centre[head])) * problem.scale
        y = y if mask is None else y * mask[head][:, None]
        largest = []
        for stop in fourth.stops:
            there = y[:stop] if mask is None else y[:stop][mask[head, :stop]]
            products = np.einsum("ma,mb->mab", there, there).reshape(len(there), -1)
            found = np.linalg.eigvalsh(np.cov(products.T, bias=True))[-1] * len(there) / scores.keys[head] ** 4
            largest.append(found)
        assert np.all(largest <= fourth.largest[head] * (1 + 1e-9))
        assert np.all(fourth.largest[head] <= 1.4 * np.array(largest))
        for i in rng.integers(CHUNK, n, 60):
            stretch = min(stop for stop in fourth.stops if stop >= far[i])
            assert of_rows[head, i] == fourth.largest[head, list(fourth.stops).index(stretch)]
            assert kept[head, i] == (far[i] if mask is None else mask[head, : far[i]].sum())
            s = y[: far[i]] @ problem.q[head, 1, i]
            bound = np.sum(s**2) ** 2 / kept[head, i] + sizes[head, 1, i] ** 4 * of_rows[head, i]
            assert np.sum(s**4) <= bound * (1 + 1e-12)


def test_either_moment_certifies_a_causal_row(rng):
    n, d = 24 * CHUNK, 16
    Q, K = (cases.unit_rows(x) for x in rng.standard_normal((2, n, d)))
    problem = problem_of(Q[None, None], K[None], rng.uniform(-1, 1, (1, n, 1)), causal=True, scale=1 / d)
    (o, rows, saved, rule), kappa = by_moments(problem, 2, 8.0), 8.0
    p, far = rule.polynomials[0], moments.far_keys(problem, np.arange(problem.q.shape[2]))
    y = K if rule.scores.centre is None else K - rule.scores.centre[0]
    s = np.where(np.arange(n) < far[:, None], Q @ y.T / d, 0)
    second, inverse = np.sum(s**2, axis=1), saved.inverse[0, 0]
    sizes = rule.scores.of_rows(problem)[0, 0]
    assert np.all(rule.fits(problem).of_rows(lambda fit: fit.B) == p.B)
    m4 = np.divide(second**2, far, where=far > 0, out=np.zeros(n)) + sizes**4 * rule.fourth.of_rows(far)[0]
    by_fourth, alone = (p.radius[0] * second + p.radius[1] * m4) * inverse, p.alone * second * inverse
    h = np.minimum(by_fourth, alone)
    low, high = problem.v.min(), problem.v.max()
    assert 0.1 < np.mean(by_fourth[CHUNK:] < alone[CHUNK:]) < 0.97  # short prefixes have large eigenvalues
    # Once rows have seen nearly the whole range, what they reach of it is known too.
    late = slice(4 * CHUNK, None)
    share = np.maximum(high - o[0, 0, :, 0], o[0, 0, :, 0] - low) / (high - low)
    np.testing.assert_allclose(rows[0, 0, late], (h / (1 - h) * share)[late], rtol=2e-2)
    assert kappa == rule.kappa


@pytest.mark.parametrize(("d", "n"), [(1, 9), (3, 40), (6, 500), (8, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_variance_of_products_is_bounded_from_above_and_not_far(d, n, masked, rng):
    k = rng.standard_normal((2, n, d)) + 0.5
    mask = rng.random((2, n)) < 0.7 if masked else None
    problem = problem_of(k[:, None], k, k, mask=mask)
    scores = measure(problem)
    found = fourth_moments.fourth_moments(problem, scores, seed=3).largest[:, 0] * (scores.keys * scores.k_factor) ** 4
    for head in range(2):
        y = problem.k[head] if mask is None else problem.k[head][mask[head]]
        y = (y if scores.centre is None else y - scores.centre[head]) * scores.k_factor[head]
        products = np.einsum("ma,mb->mab", y, y).reshape(len(y), -1)
        largest = np.linalg.eigvalsh(np.cov(products.T, bias=True).reshape(d * d, d * d))[-1] * len(y)
        assert largest <= found[head] * (1 + 1e-12)
        assert found[head] <= 1.5 * largest + 1e-12


def test_seed_decides_the_coins(rng):
    k = rng.standard_normal((1, 300, 12))
    problem = problem_of(k[:, None], k, k)
    scores = measure(problem)
    one, two = (fourth_moments.fourth_moments(problem, scores, 7) for _ in range(2))
    assert one.seed == 7
    np.testing.assert_array_equal(one.largest, two.largest)
    fresh = {fourth_moments.fourth_moments(problem, scores, None).seed for _ in range(3)}
    assert len(fresh) == 3


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_fourth_moments_are_attained_up_to_the_room_of_lanczos(degree, masked, rng):
    k = rng.uniform(-1, 1, (1, 500, 1))
    k[0, :2] = [[-1.0], [1.0]]
    problem = problem_of(np.ones((1, 1, 4, 1)), k, (k < -0.9) + 0.0, scale=0.6)
    if masked:
        mask = rng.random((1, 500)) < 0.5
        mask[0, :2] = True
        problem = problem_of(problem.q, k, problem.v, mask=mask, scale=0.6)
        k = k[:, mask[0]]
    scores = measure(problem)
    s = (k[0, :, 0] - (0 if scores.centre is None else scores.centre[0, 0])) * scores.k_factor * scores.q_factor
    o, rows, _, rule = by_moments(problem, degree, kappa=4.0)
    (p,) = rule.polynomials
    w = np.polyval(p.coefficients[::-1], s)
    fourth = np.mean(s**2) ** 2 + scores.bound**4 * rule.fourth.largest[0, 0] / len(s)
    assert np.mean(s**4) <= fourth * (1 + 1e-12)
    assert p.radius[0] * np.mean(s**2) + p.radius[1] * fourth < p.alone * np.mean(s**2)
    h = (p.radius[0] * np.mean(s**2) + p.radius[1] * fourth) / np.mean(w)
    share = max(1 - o[0, 0, 0, 0], o[0, 0, 0, 0])
    assert rows[0, 0, 0] == pytest.approx(h / (1 - h) * share, rel=1e-9)
    assert np.all(row_errors(problem, o) <= rows)


@pytest.mark.parametrize("heads", [1, 3])
def test_what_steps_of_lanczos_may_miss_is_added(heads, rng, monkeypatch):
    q, k = rng.standard_normal((heads, 1, 8, 6)), rng.standard_normal((heads, 400, 6))
    problem = problem_of(q, k, k)
    scores, theta = measure(problem), rng.random((heads, 1)) + 0.5
    monkeypatch.setattr(fourth_moments, "_largest_variance", lambda *given: theta)
    found = fourth_moments.fourth_moments(problem, scores, 0)
    # Kuczynski and Wozniakowski: theta < (1 - e) Lambda with probability 1.648 sqrt(N) exp(-sqrt(e) (2 k - 1)), k = 20.
    e = (np.log(1.648 * np.sqrt(21) * heads / 1e-6) / 39) ** 2
    expected = theta / (1 - e) / (scores.keys * abs(scores.k_factor))[:, None] ** 4
    assert 0.1 < e < 0.4
    np.testing.assert_allclose(found.largest, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("offset", [0, 100, 500, -300])
def test_far_keys_are_those_before_the_chunk(offset, rng):
    n, n_k = 700, 650
    k = np.ones((1, n_k, 1))
    problem = problem_of(np.ones((1, 1, n, 1)), k, k, causal=True, q_offset=offset)
    found = moments.far_keys(problem, np.arange(n))
    expected = [min(max((i + offset) // CHUNK * CHUNK, 0), n_k) for i in range(n)]
    np.testing.assert_array_equal(found, expected)
