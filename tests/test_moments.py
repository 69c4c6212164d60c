"""Certificates by moments of the scores: attained where they can be, and good enough to be of use."""

import math
from dataclasses import replace

import cases
import numpy as np
import pytest
from inside import chosen, chosen_for, measure, measure_values
from moment_cases import CHUNK, as_they_are, by_moments, problem_of, row_errors

import ropecy
from ropecy.approximation import minimax as poly
from ropecy.approximation import moment_fit
from ropecy.certify import moments
from ropecy.certify.statistics import Statistics
from ropecy.certify.values import medians
from ropecy.engines.polynomial import moment_search as search

# ---- the polynomials ----


@pytest.mark.parametrize("B", [2.0**-20, 0.01, 0.3, 1.0, 2.3, 5.0])
@pytest.mark.parametrize(("degree", "kappa"), [(2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (2, 0.3), (2, 20), (3, 5.0)])
def test_radius_covers_the_error_and_is_reached(B, degree, kappa):
    mpmath = pytest.importorskip("mpmath")
    p = moment_fit.fit_moments(B, degree, kappa)
    if p is None:
        assert degree % 2
        assert B > 1
        return
    assert p.degree == degree
    assert p.order == degree - degree % 2
    worst = 0
    with mpmath.workdps(60):
        exact = [1 / mpmath.factorial(t) for t in range(p.order)] + [mpmath.mpf(c) for c in p.coefficients[p.order :]]
        np.testing.assert_allclose([float(c) for c in exact], p.coefficients, rtol=1e-15)
        for s in np.linspace(-B, B, 201):
            s = mpmath.mpf(float(s))
            value = np.polynomial.polynomial.polyval(s, exact)
            allowed = p.radius[0] * s**p.order + p.radius[1] * s ** (p.order + 2)
            assert value > 0
            assert abs(value - mpmath.exp(s)) <= allowed
            if s:
                worst = max(worst, abs(value - mpmath.exp(s)) / allowed)
    assert worst > (0.99 if B > 1e-4 else 0.9)  # at tiny B, rounding of coefficients is in the radius


def test_radii_are_those_of_the_closed_forms():
    for B in (0.5, 1.0, 2.0):
        assert moment_fit.fit_moments(B, 2).radius[0] == pytest.approx((math.sinh(B) - B) / B**2, rel=1e-12)
    # What the difference of sinh and its series would get wrong by 13%.
    assert moment_fit.fit_moments(0.01, 6).radius[0] == pytest.approx(0.01 / math.factorial(7), rel=1e-5)
    # Minimax errors of phi_2 by lines, as tabulated; at B = 2 the polynomial has a root.
    assert moment_fit.fit_moments(1.0, 3).radius[0] == pytest.approx(2.2e-2, rel=0.03)
    assert moment_fit.fit_moments(0.5, 3).radius[0] == pytest.approx(5.3e-3, rel=0.03)
    assert moment_fit.fit_moments(2.0, 3) is None


def test_odd_degrees_are_refused_where_they_may_be_negative():
    assert moment_fit.fit_moments(1.0, 3) is not None
    assert moment_fit.fit_moments(8.0, 3) is None
    assert moment_fit.fit_moments(8.0, 2) is not None


@pytest.mark.parametrize("B", [0.01, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("degree", "kappa"), [(2, 0), (3, 0), (4, 0), (2, 8.0), (3, 8.0)])
def test_radius_without_the_second_moment_past_k(B, degree, kappa):
    p = moment_fit.fit_moments(B, degree, kappa / B**2)
    if p is None:
        return
    s = np.linspace(-B, B, 4001)[:, None]
    gap = np.abs(np.polyval(p.coefficients[::-1], s.astype(np.longdouble)) - np.exp(s.astype(np.longdouble)))
    allowed = p.alone * np.abs(s) ** p.order
    assert np.all(gap <= allowed * (1 + 1e-12) + 1e-18)
    assert np.max(gap[[0, -1]] / allowed[[0, -1]]) > 0.999
    assert (p.alone == pytest.approx(p.radius[0], rel=1e-6)) == (kappa == 0)


# ---- a polynomial for every row ----


@pytest.mark.parametrize(("degree", "kappa"), [(2, 0), (3, 0), (4, 0), (5, 0), (2, 8.0), (3, 8.0)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_row_has_the_polynomial_of_its_own_size(degree, kappa, causal, rng):
    H, G, n, d = 2, 2, 2 * CHUNK + 11, 3
    q, k = rng.standard_normal((H, G, n, d)), rng.standard_normal((H, n, d))
    q *= rng.choice([1e-9, 0.03, 0.5, 1.0], (H, G, n, 1)) / np.linalg.norm(q, axis=-1, keepdims=True)
    k /= np.linalg.norm(k, axis=-1, keepdims=True) * np.array([1.0, 0.7])[:, None, None]
    problem = problem_of(q, k, rng.uniform(-1, 1, (H, n, 2)), causal=causal)
    scores = measure(problem)
    o, *_ = by_moments(problem, degree, kappa, scores)
    for head, group in np.ndindex(H, G):
        y = k[head] - (0 if scores.centre is None else scores.centre[head])
        s = q[head, group] @ y.T
        size = np.linalg.norm(q[head, group], axis=1) * np.linalg.norm(y, axis=1).max()
        far = np.arange(n) < np.arange(n)[:, None] // CHUNK * CHUNK if causal else np.ones((n, n), bool)
        seen = np.arange(n) <= np.arange(n)[:, None] if causal else far
        w = np.exp(s)
        for i in range(n):
            B = poly.B_grid(size[i] * (1 + 1e-12))
            w[i, far[i]] = np.polyval(moment_fit.fit_moments(B, degree, kappa / B**2).coefficients[::-1], s[i, far[i]])
        w *= seen
        expected = w @ problem.v[head] / w.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(o[head, group], expected, atol=1e-13)


def test_sizes_of_rows_bound_their_scores(rng):
    for dtype in (np.float32, np.float64):
        q, k = rng.standard_normal((2, 3, 40, 5)), rng.standard_normal((2, 30, 5)) + 1
        q[0, 0, :5], k[1] = q[0, 0, :5] * 1e-23, k[1] * 1e18  # squares that float32 does not hold
        q[1] *= 1e-18
        q[0, 0, 0] = 0
        problem = problem_of(q.astype(dtype), k.astype(dtype), k.astype(dtype), scale=-0.3)
        scores = measure(problem)
        y = problem.k.astype(float) - (0 if scores.centre is None else scores.centre[:, None].astype(float))
        s = np.abs(problem.scale * problem.q.astype(float) @ y[:, None].swapaxes(2, 3)).max(axis=3)
        norms = np.linalg.norm(problem.q.astype(float), axis=3) * np.linalg.norm(y, axis=2).max(axis=1)[:, None, None]
        sizes = scores.of_rows(problem)
        assert np.all(s <= sizes)
        np.testing.assert_allclose(sizes, 0.3 * norms, rtol=1e-4)
        assert sizes.max() == pytest.approx(scores.bound, rel=1e-6)


def test_a_short_query_is_bounded_though_float32_holds_no_square_of_it():
    q, k = np.full((1, 1, 4, 1), 1e-23, np.float32), np.full((1, 4, 1), 1e18, np.float32)
    k[0, ::2] *= -1
    assert measure(problem_of(q, k, k)).bound >= 0.99e-5


def test_no_centre_brings_the_bound_below_what_is_asked_about(rng):
    q, k = rng.standard_normal((2, 2, 50, 5)), rng.standard_normal((2, 300, 5)) * [[[3.0]], [[0.1]]] + 7
    found = Statistics(problem_of(q, k, k, scale=0.3))
    assert found.plain.bound == np.inf and found.plain.plain == found.scores.plain
    assert 0.3 * found.scores.bound < found.least_bounds.max() < found.scores.bound
    # Two keys are as far from their mean as they can be.
    two = np.ascontiguousarray(k[:, :2])
    two = Statistics(problem_of(q, two, two, scale=0.3))
    assert two.scores.bound == pytest.approx(two.least_bounds.max(), rel=1e-12)
    assert Statistics(problem_of(q, k, k, scale=0.3, mask=np.ones(k.shape[:2], bool))).least_bounds.max() == 0


@pytest.mark.parametrize("factor", [40.0, 1e6])
@pytest.mark.parametrize(("degree", "eps"), [(2, 1e-2), (3, 1e-3)])
def test_long_queries_spoil_no_other_row(factor, degree, eps, rng):
    Q, K, V = bulk(rng, n=3000)
    short, _ = ropecy.attention(Q, K, V, eps=eps, degree=degree, method="polynomial", return_certificate=True)
    long = rng.choice(3000, 8, replace=False)
    Q[long] *= factor
    O, certificate = ropecy.attention(Q, K, V, eps=eps, degree=degree, method="polynomial", return_certificate=True)
    assert certificate.rule == "moments"
    assert certificate.bound == pytest.approx(1, rel=1e-6)
    assert certificate.n_exact_rows == 8
    assert certificate.error <= eps
    assert np.flatnonzero(certificate.rows_truncation == 0).tolist() == sorted(long)
    others = np.delete(np.arange(3000), long)
    np.testing.assert_allclose(O[others], short[others], atol=1e-12)
    exact = ropecy.attention(Q[long], K, V, method="exact")
    np.testing.assert_allclose(O[long], exact, atol=1e-9)


def test_rows_past_the_bound_are_exact_however_small_their_moments(rng):
    # A long query that no key has much of: its certificate is small, but the rounding that is certified is for less.
    Q, K, V = bulk(rng, n=3000)
    K[:, 0] = 1e-3 * np.sign(K[:, 0])
    Q[7] = 0
    Q[7, 0] = 8
    problem = problem_of(Q[None, None], K[None], V[None], scale=1 / 16)
    planned = chosen_for(problem, eps=1e-1, method="polynomial", degree=2).executable
    assert planned.certificate.bound > 1.9
    shorter = replace(planned.expansion, scores=planned.expansion.scores.within(1.01))
    assert replace(planned, expansion=shorter).forward(problem, False).certificate.n_exact_rows == 1


def test_long_queries_between_the_sampled_ones_are_known(rng):
    Q, K, V = bulk(rng, n=8192, d=8)
    Q[1:201:2] *= 2
    O, certificate = ropecy.attention(Q, K, V, eps=2e-2, degree=2, method="polynomial", return_certificate=True)
    assert certificate.rule == "moments"
    assert certificate.n_exact_rows == 100


@pytest.mark.parametrize("masked", [False, True])
def test_medians_of_many_values_are_not_moved_by_a_few(masked, rng):
    v = rng.uniform(-1, 1, (2, 50_000, 3)) + [[[0.0]], [[5.0]]]
    v[:, rng.choice(50_000, 100, replace=False)] = 1e30
    problem = problem_of(np.zeros((2, 1, 4, 3)), np.zeros((2, 50_000, 3)), v)
    if masked:
        keep = rng.random((2, 50_000)) < 0.5
        v[~keep] = 1e30
        problem = replace(problem, mask=replace(problem.mask, kept=keep))
    # One of 12,500 values has a standard error of 0.009.
    np.testing.assert_allclose(medians(problem), [[0.0] * 3, [5.0] * 3], atol=0.05)


def test_a_look_may_cost_more_where_it_is_expected_to_find_something(rng, monkeypatch):
    q, k = rng.standard_normal((2, 8192, 16)).astype(np.float32)
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    v = rng.uniform(-1, 1, (8192, 16)).astype(np.float32)
    looks, run = [], search._Search.run
    monkeypatch.setattr(search._Search, "run", lambda own, least: looks.append(own) or run(own, least))
    # Let no look be cheap, on any machine: it is worth it for B = 1, of which degree 3 is expected, not for B = 2.
    monkeypatch.setattr(search, "_LOOK", 0)
    assert ropecy.plan(q, k, v, scale=1.0, causal=True).certificate.rule == "moments"
    assert looks
    problem = problem_of(q[None, None], k[None], v[None], scale=2.0, causal=True)
    looks.clear()
    assert chosen_for(problem).candidate.engine == "exact"
    assert not looks


def test_causal_rows_that_fail_alone_cost_a_tile_each(rng):
    Q, K, V = bulk(rng, n=4096)
    work = []
    for long in (slice(4000, 4020), slice(3000, 4000, 50)):
        q = Q.copy()
        q[long] *= 40
        work.append(chosen(q, K, V, eps=1e-2, degree=2, causal=True, method="polynomial").candidate.nominal)
    assert work[1] > 1.5 * work[0]


def test_queries_of_many_sizes_are_kept_up_to_what_eps_allows(rng):
    # Log-normal norms: rows fail one by one, the longest first.
    Q, K, V = bulk(rng, n=4000)
    Q *= np.exp(0.25 * rng.standard_normal((4000, 1)))
    eps = 2e-2
    O, certificate = ropecy.attention(Q, K, V, eps=eps, method="polynomial", degree=2, return_certificate=True)
    assert certificate.rule == "moments"
    assert 8 < certificate.n_exact_rows < 200
    size = np.linalg.norm(Q, axis=1) / 4
    failed = certificate.rows_truncation == 0
    assert size[failed].min() > 0.7 * size[~failed].max()
    errors = np.abs(O - ropecy.attention(Q, K, V, method="exact")) / (V.max(axis=0) - V.min(axis=0))
    assert np.all(errors.max(axis=1) <= certificate.rows_truncation + certificate.rounding)
    assert certificate.error <= eps


# ---- the certificate ----


def far_key(n, place, causal=False, size=1.0):
    """Keys of score 0 and value 0, and one of score -size and value 1; its error has the sign that makes Z small."""
    q, k, v = np.zeros((1, 1, n, 1)), np.zeros((1, n, 1)), np.zeros((1, n, 1))
    q[:], k[0, place], v[0, place] = 1.0, -size, 1.0
    # A query and a key that set B to 1 and no sum: the mean of the keys must not pay.
    return problem_of(q, k, v, causal=causal)


@pytest.mark.parametrize("degree", [2, 4, 6])
def test_certificate_is_attained(degree):
    problem = far_key(40, 3)
    problem.k[0, 4], problem.v[0, 4] = 1.0, 0.0  # keeps centring from paying
    o, rows, *_ = by_moments(problem, degree)
    errors = row_errors(problem, o)
    assert np.all(errors <= rows + 1e-13)
    # The two keys are charged alike, and the errors of one have the other's sign.
    assert errors.max() >= 0.45 * rows.max()
    alone = far_key(40, 3)
    o, rows, *_ = by_moments(alone, degree, scores=as_they_are(alone))
    errors = row_errors(alone, o)
    assert np.all(errors <= rows + 1e-13)
    assert errors.max() >= 0.97 * rows.max()


@pytest.mark.parametrize("degree", [2, 4])
def test_causal_certificate_is_of_the_far_keys_that_a_row_sees(degree):
    n = 3 * CHUNK
    problem = far_key(n, 3, causal=True)
    problem.k[0, CHUNK + 5] = 1.0  # seen by exp inside its own chunk
    problem.k[0, 2 * CHUNK :] = np.where(np.arange(CHUNK) % 2, 1.0, -1.0)[:, None]  # far for no row
    o, rows, saved, rule = by_moments(problem, degree, scores=as_they_are(problem))
    p = rule.fits(problem)._fits[0]
    rows, errors = rows[0, 0], row_errors(problem, o)[0, 0]
    assert np.all(errors <= rows + 1e-13)
    assert rows[:CHUNK].max() < 1e-13
    assert np.all(errors[CHUNK : 2 * CHUNK] >= 0.97 * rows[CHUNK : 2 * CHUNK])
    # One more key of size 1 is far for the last chunk.
    moment = saved.moment[0, 0] / saved.inverse[0, 0] / p.coefficients[degree]
    np.testing.assert_allclose(moment[[0, CHUNK, 2 * CHUNK, n - 1]], [0, 1, 2, 2], atol=1e-12)


def test_values_away_from_their_middle_are_charged_the_longer_way(rng):
    k = rng.uniform(-1, 1, (1, 300, 2))
    v = np.zeros((1, 300, 3))
    v[0, ::50] = 1.0
    v[..., 2] = 7.0  # constant: nothing can go wrong
    problem = problem_of(k[:, None], k, v)
    o, rows, _, rule = by_moments(problem, 2)
    scores = measure(problem)
    y = k[0] - (0 if scores.centre is None else scores.centre[0])
    s = k[0] @ y.T
    for i in range(300):
        B = poly.B_grid(np.linalg.norm(k[0, i]) * np.linalg.norm(y, axis=1).max() * (1 - 1e-7))
        p = moment_fit.fit_moments(B, 2)
        w = np.polyval(p.coefficients[::-1], s[i])
        h = p.radius[0] * np.sum(s[i] ** 2) / w.sum()
        assert rows[0, 0, i] == pytest.approx(h / (1 - h) * np.maximum(1 - o, o)[0, 0, i, 0], rel=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_reach_holds_for_every_row_of_a_causal_chunk(masked, rng):
    n = 3 * CHUNK + 17
    v = np.cumsum(rng.standard_normal((2, n, 2)), axis=1) + 5
    mask = rng.random((2, n)) < 0.5 if masked else None
    problem = problem_of(np.zeros((2, 1, n, 1)), np.zeros((2, n, 1)), v, causal=True, mask=mask)
    values = measure_values(problem)
    table = moments.value_distances(problem, values)
    assert table.shape == (2, 4, 3, 2)
    for head in range(2):
        for row in range(CHUNK, n, 7):
            middle, half, per_range = table[head, row // CHUNK]
            seen = problem.v[head, : row + 1] if mask is None else v[head, : row + 1][mask[head, : row + 1]]
            spread = seen.max(axis=0) - seen.min(axis=0)
            for o in (seen.min(axis=0), seen.max(axis=0), seen.mean(axis=0)):
                allowed = (half + np.abs(o - values.middle[head] - middle)) * per_range
                assert np.all(np.abs(seen - o).max(axis=0) <= allowed * spread * (1 + 1e-12))


# ---- what users see ----


@pytest.mark.parametrize(
    ("d", "eps", "features"), [(16, 1e-3, 969), (32, 2e-3, 561), (64, 1e-3, 2145), (128, 5e-4, 8385)]
)
def test_head_sizes_that_people_use_are_certified(d, eps, features, rng):
    n = 4096 if d < 128 else 2560
    Q, K = (cases.unit_rows(x).astype(np.float32) for x in rng.standard_normal((2, n, d)))
    V = rng.uniform(-1, 1, (n, 16)).astype(np.float32)
    R = ropecy.Rotary(d)
    O, certificate = ropecy.attention(Q, K, V, R, eps=eps, method="polynomial", seed=1, return_certificate=True)
    assert certificate.rule == "moments"
    assert certificate.n_features <= features
    assert certificate.error <= eps
    assert "moments" in str(certificate)
    assert certificate.rows_truncation.shape == (n,)
    assert certificate.rows_truncation.max() == certificate.truncation
    rows = rng.choice(n, 50, replace=False)
    exact = ropecy.attention(Q[rows], K, V, R, q_positions=rows, k_positions=np.arange(n), method="exact")
    errors = np.abs(O[rows] - exact).max(axis=-1) / (V.max(axis=0) - V.min(axis=0)).max()
    assert np.all(errors <= certificate.rows_truncation[rows] + certificate.rounding)
    uses_coins = certificate.degree < 4 and d > 16
    assert (certificate.seed == 1) if uses_coins else (certificate.seed is None)
    assert (certificate.failure > 0) == uses_coins


def bulk(rng, n=2500, d=16, heads=()):
    """Rows of norm sqrt(d) in d dimensions: most scores are a quarter of their bound."""
    Q, K = (cases.unit_rows(x) for x in rng.standard_normal((2, *heads, n, d)))
    return Q, K, rng.uniform(-1, 1, (*heads, n, 2))


def test_long_queries_are_computed_exactly(rng):
    Q, K, V = bulk(rng)
    Q *= 0.25
    Q[[5, 900, 901, 2499]] *= 4
    for causal in (False, True):
        O, lse, certificate = None, None, None
        O, certificate, lse = ropecy.attention(
            Q, K, V, eps=1e-3, degree=2, causal=causal, return_certificate=True, return_lse=True, method="polynomial"
        )
        assert certificate.rule == "moments"
        assert 0 < certificate.n_exact_rows < 50
        exact, exact_lse = ropecy.attention(Q, K, V, method="exact", causal=causal, return_lse=True)
        computed = np.flatnonzero(certificate.rows_truncation == 0)
        for row in (900, 901, 2499):
            assert row in computed
        np.testing.assert_allclose(O[computed], exact[computed], atol=1e-12)
        np.testing.assert_allclose(lse[computed], exact_lse[computed], atol=1e-12)
        assert np.abs(O - exact).max() <= 2 * certificate.error
        assert "exactly" in str(certificate)


def hidden(rng):
    """Keys of which a sample of every other one sees the short ones only."""
    Q, K, V = bulk(rng, n=8192, d=4)
    K[::2] *= 0.02
    return Q[:200], K, V


def test_failed_certificates_are_not_handed_out(rng):
    Q, K, V = hidden(rng)
    with pytest.raises(ropecy.BoundedEntryError, match=r"degree 2 .*rows.* B ="):
        ropecy.attention(Q, K, V, eps=1e-3, degree=2, method="polynomial")
    exact = ropecy.attention(Q, K, V, method="exact")
    for method in ("polynomial", "auto"):
        O, certificate = ropecy.attention(Q, K, V, eps=1e-3, method=method, return_certificate=True)
        assert certificate.rule in ("worst case", "exact")
        assert np.abs(O - exact).max() <= 2e-3
    O, certificate = ropecy.attention(Q, K, V, eps=1e-3, degree=2, return_certificate=True)
    assert certificate.engine == "exact"
    np.testing.assert_allclose(O, exact, atol=1e-12)


def test_what_asks_for_every_weight_stays_with_the_worst_case(rng):
    Q, K, V = bulk(rng, n=300)
    K[:3] = Q[:3]  # scores of 1, where moments' polynomials are far off
    eps = 1e-2
    _, certificate = ropecy.attention(Q, K, V, eps=eps, method="polynomial", return_certificate=True)
    assert certificate.rule == "moments"
    A = ropecy.AttentionMatrix(Q, K, eps=eps, method="polynomial").toarray()
    exact = np.exp(Q @ K.T / 16)
    assert np.all(np.abs(A - exact) <= 2 * eps / (1 + eps**2) * exact + 1e-12)
    _, vjp = ropecy.attention_vjp(Q, K, V, eps=eps, method="polynomial")
    assert vjp.certificate.rule == "worst case"
    assert vjp(V).certificate.degree > certificate.degree


def test_rows_have_the_shape_of_the_result(rng):
    Q, K, V = bulk(rng, n=64, heads=(2, 3))
    for method in ("polynomial", "exact"):
        O, certificate = ropecy.attention(Q, K[:, :1], V[:, :1], method=method, return_certificate=True, eps=1e-2)
        assert certificate.rows_truncation.shape == O.shape[:-1]
        assert certificate.rows_truncation.max() == certificate.truncation


def test_plan_expects_what_the_call_finds(rng):
    Q, K, V = bulk(rng)
    plan = ropecy.plan(Q, K, V, eps=1e-3, method="polynomial")
    _, certificate = ropecy.attention(Q, K, V, eps=1e-3, method="polynomial", return_certificate=True)
    assert plan.certificate.rule == certificate.rule == "moments"
    assert plan.certificate.degree == certificate.degree
    assert certificate.truncation / 1.5 <= plan.certificate.truncation <= 1.5 * certificate.truncation


@pytest.mark.parametrize("length", [1.35, 1.5])
def test_rows_just_past_eps_are_computed_exactly(length):
    # Queries that grow slowly: some are certified to between eps and 2 eps, and may not pass.
    rng = np.random.default_rng(0)
    n, d = 3000, 16
    Q, K = rng.standard_normal((2, n, d))
    Q, K = (X * np.sqrt(d) / np.linalg.norm(X, axis=1, keepdims=True) for X in (Q, K))
    Q[rng.choice(n, 20, replace=False)] *= np.linspace(1, length, 20)[:, None]
    V = rng.uniform(-1, 1, (n, 4))
    _, certificate = ropecy.attention(Q, K, V, eps=1e-3, method="polynomial", return_certificate=True)
    assert certificate.rule == "moments"
    assert 0 < certificate.n_exact_rows < 30
    assert certificate.error <= 1e-3
    assert np.count_nonzero(certificate.rows_truncation == 0) == certificate.n_exact_rows


def test_rounding_has_its_part_of_eps(rng):
    Q, K, V = bulk(rng, n=3000)
    problem = problem_of(Q[None, None], K[None], V[None], scale=1 / 16)
    planned = chosen_for(problem, eps=1e-2, method="polynomial", degree=2, seed=1).executable
    rows = planned.forward(problem, False).certificate.rows_truncation
    eps = 1.5 * float(np.quantile(rows, 0.99))
    certificate = replace(planned.certificate, rounding=eps / 3)
    planned = replace(planned, allowed=np.array([2 / 3 * eps]), certificate=certificate)
    certificate = planned.forward(problem, False).certificate
    assert certificate.n_exact_rows == np.count_nonzero(rows > eps - planned.certificate.rounding) > 20
    assert certificate.error <= eps


def test_a_row_that_is_exact_rounds_as_exact_rows_do(rng):
    Q, K, V = (x.astype(np.float32) for x in bulk(rng, n=4000, d=8))
    Q[7] *= 3000
    options = {"eps": 5e-2, "return_certificate": True, "scale": 1 / 8}
    _, certificate = ropecy.attention(Q, K, V, method="polynomial", degree=2, seed=1, **options)
    _, exact = ropecy.attention(Q, K, V, method="exact", **options)
    assert certificate.n_exact_rows >= 1
    assert certificate.rounding == exact.rounding > 1e-4
