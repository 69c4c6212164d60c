"""Certificates by moments of the scores: never violated, attained where they can be, and good enough to be of use."""

import math

import cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ropecy
from ropecy import moments
from ropecy import polynomial as poly
from ropecy.bounds import measure, measure_values
from ropecy.engines import polynomial as engine
from ropecy.problem import Problem

CHUNK = 192  # of causal scans: pairs inside one are exact


def problem_of(q, k, v, causal=False, mask=None, q_offset=0, scale=1.0):
    """q (H, G, n, d), k (H, n_k, d), v (H, n_k, d_v); what mask hides is 0, as engines are promised."""
    if mask is not None:
        k, v = np.where(mask[..., None], k, 0), np.where(mask[..., None], v, 0)
    return Problem(q=q, k=k, v=v, scale=scale, hi=0 if causal else None, q_offset=q_offset, key_mask=mask)


def by_moments(problem, degree, kappa=0.0):
    """O, the certificate of its rows, and whether there is one (p > 0)."""
    scores, values = measure(problem), measure_values(problem)
    p = poly.fit_moments(poly.B_grid(scores.bound), degree, kappa)
    if p is None:
        return None
    fourth = moments.fourth_moments(problem, scores, seed=5) if kappa else (None, None)
    reach = moments.reach(problem, values, engine.chunk(problem))
    o, _, saved = engine.forward(problem, scores, values, p, False, False, reach)
    return o, moments.MomentRule(p, *fourth).truncation(problem, scores, saved.moment, saved.spread, saved.inverse)


def row_errors(problem, o):
    """max_c |O - Attn| / range of the values that the row sees, (H, G, n), plain NumPy."""
    H, G, n, _ = problem.q.shape
    n_k = problem.k.shape[1]
    q, k, v = (x.astype(float) for x in (problem.q, problem.k, problem.v))
    seen = np.ones((n, n_k), bool)
    if problem.hi is not None:
        seen = np.arange(n_k) <= np.arange(n)[:, None] + problem.q_offset
    seen = np.broadcast_to(seen, (H, 1, n, n_k))
    if problem.key_mask is not None:
        seen = seen & problem.key_mask[:, None, None, :]
    s = np.where(seen, problem.scale * q @ k[:, None].swapaxes(-1, -2), -np.inf)
    w = np.exp(s - np.maximum(s.max(axis=-1, keepdims=True), -1e300))
    total = w.sum(axis=-1, keepdims=True)
    exact = np.divide(w, total, out=np.zeros_like(w), where=total > 0) @ v[:, None]
    every = np.where(seen[..., None], v[:, None, None], np.nan)
    with np.errstate(all="ignore"):
        spread = np.nanmax(every, axis=-2, initial=-np.inf) - np.nanmin(every, axis=-2, initial=np.inf)
        error = np.where(spread > 0, np.abs(o - exact) / spread, 0)
    return error.max(axis=-1)


# ---- the polynomials ----


@pytest.mark.parametrize("B", [2.0**-20, 0.01, 0.3, 1.0, 2.3, 5.0])
@pytest.mark.parametrize(("degree", "kappa"), [(2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (2, 0.3), (2, 20), (3, 5.0)])
def test_radius_covers_the_error_and_is_reached(B, degree, kappa):
    mpmath = pytest.importorskip("mpmath")
    p = poly.fit_moments(B, degree, kappa)
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
            value = mpmath.polyval(exact[::-1], s)
            allowed = p.radius[0] * s**p.order + p.radius[1] * s ** (p.order + 2)
            assert value > 0
            assert abs(value - mpmath.exp(s)) <= allowed
            if s:
                worst = max(worst, abs(value - mpmath.exp(s)) / allowed)
    assert worst > (0.99 if B > 1e-4 else 0.9)  # at tiny B, rounding of coefficients is in the radius


def test_radii_are_those_of_the_closed_forms():
    for B in (0.5, 1.0, 2.0):
        assert poly.fit_moments(B, 2).radius[0] == pytest.approx((math.sinh(B) - B) / B**2, rel=1e-12)
    # What the difference of sinh and its series would get wrong by 13%.
    assert poly.fit_moments(0.01, 6).radius[0] == pytest.approx(0.01 / math.factorial(7), rel=1e-5)
    # Minimax errors of phi_2 by lines, as tabulated; at B = 2 the polynomial has a root.
    assert poly.fit_moments(1.0, 3).radius[0] == pytest.approx(2.2e-2, rel=0.03)
    assert poly.fit_moments(0.5, 3).radius[0] == pytest.approx(5.3e-3, rel=0.03)
    assert poly.fit_moments(2.0, 3) is None


def test_odd_degrees_are_refused_where_they_may_be_negative():
    assert poly.fit_moments(1.0, 3) is not None
    assert poly.fit_moments(8.0, 3) is None
    assert poly.fit_moments(8.0, 2) is not None


# ---- fourth moments ----


@pytest.mark.parametrize(("d", "n"), [(1, 9), (3, 40), (6, 500), (8, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_variance_of_products_is_bounded_from_above_and_not_far(d, n, masked, rng):
    k = rng.standard_normal((2, n, d)) + 0.5
    mask = rng.random((2, n)) < 0.7 if masked else None
    problem = problem_of(k[:, None], k, k, mask=mask)
    scores = measure(problem)
    found, _ = moments.fourth_moments(problem, scores, seed=3)
    for head in range(2):
        y = problem.k[head] if mask is None else problem.k[head][mask[head]]
        y = (y if scores.centre is None else y - scores.centre[head]) * scores.k_factor
        products = np.einsum("ma,mb->mab", y, y).reshape(len(y), -1)
        largest = np.linalg.eigvalsh(np.cov(products.T, bias=True).reshape(d * d, d * d))[-1]
        assert largest <= found[head] * (1 + 1e-12)
        assert found[head] <= 1.5 * largest + 1e-12


def test_seed_decides_the_coins(rng):
    k = rng.standard_normal((1, 300, 12))
    problem = problem_of(k[:, None], k, k)
    scores = measure(problem)
    (one, seed), (two, _) = moments.fourth_moments(problem, scores, 7), moments.fourth_moments(problem, scores, 7)
    assert seed == 7
    assert one == two
    fresh = {moments.fourth_moments(problem, scores, None)[1] for _ in range(3)}
    assert len(fresh) == 3


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
    o, rows = by_moments(problem, degree)
    errors = row_errors(problem, o)
    assert np.all(errors <= rows + 1e-13)
    # The two keys are charged alike, and the errors of one have the other's sign.
    assert errors.max() >= 0.45 * rows.max()
    alone = far_key(40, 3)
    scores, values = measure(alone), measure_values(alone)
    scores.bound, scores.centre, scores.q_factor, scores.k_factor = 1.0, None, 1.0, 1.0
    p = poly.fit_moments(1.0, degree)
    _, _, saved = engine.forward(alone, scores, values, p, False, False, moments.reach(alone, values, CHUNK))
    rows = moments.MomentRule(p).truncation(alone, scores, saved.moment, saved.spread, saved.inverse)
    errors = row_errors(alone, saved.o)
    assert np.all(errors <= rows + 1e-13)
    assert errors.max() >= 0.99 * rows.max()


@pytest.mark.parametrize("degree", [2, 4])
def test_causal_certificate_is_of_the_far_keys_that_a_row_sees(degree):
    n = 3 * CHUNK
    problem = far_key(n, 3, causal=True)
    problem.k[0, CHUNK + 5] = 1.0  # seen by exp inside its own chunk
    problem.k[0, 2 * CHUNK :] = np.where(np.arange(CHUNK) % 2, 1.0, -1.0)[:, None]  # far for no row
    scores, values = measure(problem), measure_values(problem)
    scores.bound, scores.centre, scores.q_factor, scores.k_factor = 1.0, None, 1.0, 1.0
    p = poly.fit_moments(1.0, degree)
    o, _, saved = engine.forward(problem, scores, values, p, False, False, moments.reach(problem, values, CHUNK))
    rows = moments.MomentRule(p).truncation(problem, scores, saved.moment, saved.spread, saved.inverse)[0, 0]
    errors = row_errors(problem, o)[0, 0]
    assert np.all(errors <= rows + 1e-13)
    assert rows[:CHUNK].max() < 1e-13
    assert np.all(errors[CHUNK : 2 * CHUNK] >= 0.98 * rows[CHUNK : 2 * CHUNK])
    # One more key of size 1 is far for the last chunk.
    moment = saved.moment[0, 0] / saved.inverse[0, 0] / p.coefficients[degree]
    np.testing.assert_allclose(moment[[0, CHUNK, 2 * CHUNK, n - 1]], [0, 1, 2, 2], atol=1e-12)


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
    p = poly.fit_moments(poly.B_grid(scores.bound), degree, 1.0)
    fourth, _ = moments.fourth_moments(problem, scores, 1)
    s = (k[0, :, 0] - (0 if scores.centre is None else scores.centre[0, 0])) * scores.k_factor * scores.q_factor
    o, rows = by_moments(problem, degree, kappa=1.0)
    w = np.polyval(p.coefficients[::-1], s)
    x4 = scores.q_factor**4
    fourth_moment = np.mean(s**2) ** 2 + x4 * fourth[0]
    assert np.mean(s**4) <= fourth_moment * (1 + 1e-12)
    h = (p.radius[0] * np.mean(s**2) + p.radius[1] * fourth_moment) / np.mean(w)
    share = max(1 - o[0, 0, 0, 0], o[0, 0, 0, 0])
    assert rows[0, 0, 0] == pytest.approx(h / (1 - h) * share, rel=1e-9)
    assert np.all(row_errors(problem, o) <= rows)


def test_values_away_from_their_middle_are_charged_the_longer_way(rng):
    k = rng.uniform(-1, 1, (1, 300, 2))
    v = np.zeros((1, 300, 3))
    v[0, ::50] = 1.0
    v[..., 2] = 7.0  # constant: nothing can go wrong
    problem = problem_of(k[:, None], k, v)
    o, rows = by_moments(problem, 2)
    scores = measure(problem)
    p = poly.fit_moments(poly.B_grid(scores.bound), 2)
    y = k[0] - (0 if scores.centre is None else scores.centre[0])
    s = k[0] @ y.T
    w = np.polyval(p.coefficients[::-1], s)
    h = p.radius[0] * np.sum(s**2, axis=1) / w.sum(axis=1)
    np.testing.assert_allclose(rows[0, 0], h / (1 - h) * np.maximum(1 - o, o)[0, 0, :, 0], rtol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_reach_holds_for_every_row_of_a_causal_chunk(masked, rng):
    n = 3 * CHUNK + 17
    v = np.cumsum(rng.standard_normal((2, n, 2)), axis=1) + 5
    mask = rng.random((2, n)) < 0.5 if masked else None
    problem = problem_of(np.zeros((2, 1, n, 1)), np.zeros((2, n, 1)), v, causal=True, mask=mask)
    values = measure_values(problem)
    table = moments.reach(problem, values, CHUNK)
    assert table.shape == (2, 4, 3, 2)
    for head in range(2):
        for row in range(CHUNK, n, 7):
            middle, half, per_range = table[head, row // CHUNK]
            seen = problem.v[head, : row + 1] if mask is None else v[head, : row + 1][mask[head, : row + 1]]
            spread = seen.max(axis=0) - seen.min(axis=0)
            for o in (seen.min(axis=0), seen.max(axis=0), seen.mean(axis=0)):
                allowed = (half + np.abs(o - values.middle[head] - middle)) * per_range
                assert np.all(np.abs(seen - o).max(axis=0) <= allowed * spread * (1 + 1e-12))


DATA = ("gauss", "one direction", "two clusters", "all negative", "heavy tails", "signs", "one far key")


def adversarial(kind, rng, shape, size):
    """Queries and keys of the kind, scores up to about `size`."""
    H, G, n, n_k, d = shape
    q, k = rng.standard_normal((H, G, n, d)), rng.standard_normal((H, n_k, d))
    axis = rng.standard_normal(d)
    if kind == "one direction":
        k = rng.standard_normal((H, n_k, 1)) * axis
        q = rng.choice([-1.0, 1.0], (H, G, n, 1)) * axis
    elif kind == "two clusters":
        k = rng.choice([-1.0, 1.0], (H, n_k, 1), p=[0.1, 0.9]) * axis + 0.01 * k
    elif kind == "all negative":
        q, k = axis + 0.01 * q, -axis + 0.01 * k
    elif kind == "heavy tails":
        k = rng.standard_t(2, (H, n_k, d))
    elif kind == "signs":
        q, k = np.sign(q), np.sign(k)
    elif kind == "one far key":
        k *= 0.01
        k[:, 0] = -axis
        q = axis + 0.1 * q
    largest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    return q * (size / max(largest, 1e-30)), k


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(DATA),
    seed=st.integers(0, 2**32),
    degree=st.sampled_from([2, 3, 4, 5, 6]),
    fourth=st.booleans(),
    causal=st.booleans(),
    masked=st.booleans(),
    size=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.5]),
    values=st.sampled_from(["uniform", "signs of the error", "rare", "ramp"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_no_certificate_is_violated(kind, seed, degree, fourth, causal, masked, size, values, dtype):
    rng = np.random.default_rng(seed)
    H, G, d = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 5)
    n, n_k = (int(rng.integers(190, 420)),) * 2 if causal else (int(rng.integers(1, 8)), int(rng.integers(1, 30)))
    q, k = adversarial(kind, rng, (H, G, n, n_k, d), size)
    s = np.einsum("d,hmd->hm", q[0, 0, -1], k)[..., None]
    v = {
        "uniform": rng.uniform(-1, 1, (H, n_k, 2)),
        "signs of the error": np.concatenate([np.sign(s), s < -0.5 * size], axis=-1),
        "rare": rng.random((H, n_k, 2)) < 0.1,
        "ramp": np.arange(n_k)[None, :, None] + 0.1 * s,
    }[values]
    mask = rng.random((H, n_k)) < 0.7 if masked else None
    offset = int(rng.integers(-5, 5)) if causal else 0
    problem = problem_of(*(x.astype(dtype) for x in (q, k, v)), causal=causal, mask=mask, q_offset=offset)
    if problem.empty:
        return
    kappa = float(rng.choice([0.5, 4.0, 32.0])) if fourth and degree < 4 and not causal else 0.0
    found = by_moments(problem, degree, kappa)
    if found is None:
        return
    o, rows = found
    scores, spread = measure(problem), measure_values(problem)
    unit = float(np.finfo(dtype).eps) / 2
    # Rounding is in units of the largest range of a column, over all keys: what a row sees of one may be less.
    slack = unit * (12 + 4 * math.exp(2 * scores.bound) + 2 * spread.offset) * 50
    assert np.all(row_errors(problem, o) <= rows * (1 + 1e-6) + slack)


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
