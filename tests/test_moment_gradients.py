"""Gradients certified by moments: weights of their own in backward, of a lower degree than the worst case asks for."""

from dataclasses import replace

import cases
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import chosen_for, measure, measure_values, outputs, problem_for
from test_moments import problem_of

import ropecy
from ropecy.approximation import minimax as poly
from ropecy.approximation import moment_fit
from ropecy.certify import moments
from ropecy.engines.polynomial import features

HOW = {"eps": 0.05, "certify": "proof", "method": "polynomial", "degree": None, "seed": None, "grad": True}


def weights(B, degree, lower):
    """p of forward, and r of backward: of the degree of p's order less one, of it, or one more."""
    p = moment_fit.fit_moments(B, degree)
    if p is None:
        return None, None
    return p, moment_fit.taylor(B, p.order) if lower == 1 else moment_fit.fit_moments(B, p.order + (lower < 0))


def run(problem, degree, lower, do):
    """dq, dk, dv and e of every row; or None where there is no such polynomial."""
    scores, values = measure(problem), measure_values(problem)
    p, r = weights(poly.B_grid(scores.bound), degree, lower)
    if p is None or r is None:
        return None
    judged = features.Judged(moments.value_distances(problem, values), None)
    o, _, saved = features.forward(problem, features.Expansion(scores, values, p, r), False, judged=judged)
    rule = moments.MomentRule((p,), 0.0, scores, weights=(r,))
    e = rule.gradient(problem, rule.fits(problem), saved)
    return *outputs(features.backward(problem, saved, do)), e, scores


def exactly(problem, do):
    """dq, dk, dv, and omega of every row, plain NumPy."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    q, k, v = (x.astype(float) for x in (problem.q, problem.k, problem.v))
    seen = np.ones((n, n_k), bool)
    if problem.mask.causal:
        seen = np.arange(n_k) <= np.arange(n)[:, None] + problem.mask.offset
    s = np.where(seen, problem.scale * q @ k[:, None].swapaxes(-1, -2), -np.inf)
    P = np.exp(s - s.max(axis=-1, keepdims=True))
    P /= P.sum(axis=-1, keepdims=True)
    a = do @ v[:, None].swapaxes(-1, -2)
    dS = P * (a - (P * a).sum(axis=-1, keepdims=True))
    omega = np.where(seen, a, -np.inf).max(axis=-1) - np.where(seen, a, np.inf).min(axis=-1)
    dq = problem.scale * dS @ k[:, None]
    dk = problem.scale * np.einsum("hgij,hgia->hja", dS, q)
    return dq, dk, np.einsum("hgij,hgic->hjc", P, do), omega


def worst(problem, degree, lower, do):
    """Errors by what is certified of them: of dQ row by row, of dK and of dV summed over keys."""
    found = run(problem, degree, lower, do)
    if found is None:
        return None
    dq, dk, dv, e, scores = found
    true_dq, true_dk, true_dv, omega = exactly(problem, do)
    c, k = abs(problem.scale), problem.k if scores.centre is None else problem.k - scores.centre[:, None]
    largest = np.linalg.norm(k, axis=-1).max(axis=-1)[:, None, None]
    with np.errstate(all="ignore"):
        zeta = np.where(e < 1, 2 * e / (1 - e), np.inf)
        rows = np.linalg.norm(dq - true_dq, axis=-1) / (c * np.arctanh(np.minimum(e, 1)) / 2 * omega * largest + 1e-13)
        keys = np.linalg.norm(dk - true_dk, axis=-1).sum(axis=-1)
        keys /= (c * zeta * omega * np.linalg.norm(problem.q, axis=-1)).sum(axis=(1, 2)) + 1e-12
        values = np.abs(dv - true_dv).sum(axis=1) / ((zeta[..., None] * np.abs(do)).sum(axis=(1, 2)) + 1e-12)
    return rows.max(), keys.max(), values.max()


def data(rng, kind, n, n_k, d):
    """q and k of one head: spread out, along one direction, two clusters, all scores near -B, or of heavy tails."""
    q, k = rng.standard_normal((n, d)), rng.standard_normal((n_k, d))
    if kind == "line":
        k = np.outer(rng.choice([-1.0, 1.0], n_k), rng.standard_normal(d))
    elif kind == "clusters":
        k = np.where(rng.random((n_k, 1)) < 0.1, 3.0, -0.3) * np.ones(d) + 0.01 * k
    elif kind == "low":
        q, k = np.abs(q), -np.abs(k)
    elif kind == "tails":
        q, k = rng.standard_t(2, q.shape), rng.standard_t(2, k.shape)
    return q, k


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["spread", "line", "clusters", "low", "tails"]),
    n=st.integers(1, 12),
    n_k=st.integers(1, 12),
    d=st.integers(1, 3),
    B=st.floats(0.1, 3.0),
    degree=st.integers(2, 5),
    lower=st.integers(-1, 1),
    signs=st.booleans(),
)
def test_no_certificate_is_exceeded(seed, kind, n, n_k, d, B, degree, lower, signs):
    rng = np.random.default_rng(seed)
    q, k = data(rng, kind, n, n_k, d)
    q *= B / max(np.linalg.norm(q, axis=1).max() * np.linalg.norm(k, axis=1).max(), 1e-9)
    v = rng.choice([-1.0, 1.0], (1, n_k, 2)) if signs else rng.standard_normal((1, n_k, 2))
    problem = problem_of(q[None, None], k[None], v)
    found = worst(problem, degree, lower, rng.standard_normal((1, 1, n, 2)))
    assert found is None or max(found) <= 1


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("lower", [-1, 0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_causal(degree, lower, groups, rng):
    q, k = (cases.unit_rows(rng.standard_normal(shape)) for shape in ((2, groups, 500, 6), (2, 500, 6)))
    problem = problem_of(q, k, rng.uniform(-1, 1, (2, 500, 3)), causal=True, scale=1 / 6)
    do = rng.standard_normal((2, groups, 500, 3))
    found = worst(problem, degree, lower, do)
    assert max(found) <= 1
    assert max(found) > 1e-4


@pytest.mark.parametrize("B", [0.3, 1.0])
def test_error_of_the_weights_is_reached(B):
    # A key whose score is B among many whose scores are 0: a^ is that of the many.
    k, v = np.zeros((1, 4000, 1)), np.zeros((1, 4000, 1))
    k[0, 0] = v[0, 0] = 1
    problem = problem_of(np.full((1, 1, 1, 1), B), k, v)
    rows, keys, _ = worst(problem, 5, 1, np.ones((1, 1, 1, 1)))
    assert 0.9 < rows <= 1 and 0.2 < keys <= 1


def test_error_of_the_denominator_is_felt():
    # Good weights in backward, bad ones in forward, and a mean key far from the centre.
    k = np.array([[[1.0], [-1.0]]])
    problem = problem_of(np.full((1, 1, 1, 1), 1.0), k, k)
    rows, _, values = worst(problem, 2, -1, np.ones((1, 1, 1, 1)))
    assert 0.1 < rows <= 1 and 0.05 < values <= 1


def test_gradient_error():
    h, h_r = np.array([0.0, 0.01, 0.2, 1.0]), np.array([0.01, 0.02, 0.3, 0.0])
    e = moments.gradient_error(h, h_r)
    np.testing.assert_allclose(np.arctanh(e[:3]) / 2, h_r[:3] + 1.5 * h[:3], rtol=1e-12)
    assert np.all(2 * e[:3] / (1 - e[:3]) >= h_r[:3] + 2 * h[:3]) and e[3] == np.inf


def make(rng, n=1500, d=32, heads=1, offset=0.0, dtype=np.float64):
    case = {name: cases.unit_rows(rng.standard_normal((heads, n, d))) for name in "QK"}
    case["K"] += offset
    case["V"] = rng.uniform(-1, 1, (heads, n, 3))
    return {name: X.astype(dtype) for name, X in case.items()}


def check(case, O, g, certificate, eps, rng_dO, causal=False):
    dense = oracle.attention(**case, causal=causal)
    expected = dense.backward(rng_dO)
    e = certificate.error
    omega = dense.ranges(np.einsum("...ic,...jc->...ij", rng_dO, dense.v)[..., None])[..., 0]
    centred = np.linalg.norm(dense.k - dense.k.mean(axis=-2, keepdims=True), axis=-1).max()
    diameter = 2 * min(np.linalg.norm(dense.k, axis=-1).max(), centred)
    room = 1e-12 if case["Q"].dtype == np.float64 else 1e-6
    dq = np.linalg.norm(g.dQ - expected["dQ"], axis=-1)
    assert np.all(dq <= dense.scale * np.arctanh(e) / 4 * omega * diameter + room)
    assert np.abs(O - dense.O).max() <= eps * 2
    zeta = 2 * e / (1 - e)
    dk = np.linalg.norm(g.dK - expected["dK"], axis=-1).sum()
    assert dk <= dense.scale * zeta * (omega * np.linalg.norm(case["Q"], axis=-1)).sum()
    assert np.all(np.abs(g.dV - expected["dV"]).sum(axis=(0, 1)) <= zeta * np.abs(rng_dO).sum(axis=(0, 1)))
    return expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_lower_degree_than_the_worst_case(causal, dtype, rng):
    case, dO = make(rng, dtype=dtype), rng.standard_normal((1, 1500, 3)).astype(dtype)
    options = {"method": "polynomial", "eps": 0.05, "causal": causal}
    plan = ropecy.plan(**case, **options, grad=True)
    assert plan.gradient_certificate.rule == "moments" and plan.gradient_certificate.degree == 2
    assert ropecy.plan(**case, **options, grad=True, degree=4).seconds["polynomial"] > plan.seconds["polynomial"]
    O, vjp = ropecy.attention_vjp(**case, **options)
    g = vjp(dO)
    assert g.certificate.rule == "moments" and g.certificate.rows_truncation.shape == (1, 1500)
    assert g.certificate.truncation <= 2 * 0.05
    expected = check(case, O, g, g.certificate, 0.05, dO, causal)
    for name in ("dQ", "dK", "dV"):
        difference = np.linalg.norm(getattr(g, name) - expected[name]) / np.linalg.norm(expected[name])
        assert difference <= 0.05, name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rows_that_fail_are_exact(causal, offset, rng):
    case, dO = make(rng, offset=offset), rng.standard_normal((1, 1500, 3))
    rows = rng.choice(np.arange(600, 1500), 4, replace=False)
    options = {"method": "polynomial", "eps": 0.05, "causal": causal}
    plan = ropecy.plan(**case, **options, grad=True)
    assert plan.gradient_certificate.rule == "moments"
    case["Q"][0, rows] *= 1.6
    O, vjp = ropecy.attention_vjp(**case, **options)
    assert vjp.certificate.n_exact_rows >= 4
    g = vjp(dO)
    expected = check(case, O, g, g.certificate, 0.05, dO, causal)
    np.testing.assert_allclose(g.dQ[0, rows], expected["dQ"][0, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("times", [60, 1e3, 1e9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_are_exact_may_be_of_any_size(dtype, times, causal, rng):
    # Weights of such a row would overflow in the polynomial's pass, and its monomials too.
    case, dO = make(rng, n=1200, d=4, dtype=dtype), rng.standard_normal((1, 1200, 3)).astype(dtype)
    case["Q"] *= dtype(2**0.5)
    case["K"] *= dtype(2**0.5)
    case["Q"][0, 600:1100:100] *= dtype(times)
    plan = ropecy.plan(**case, causal=causal, method="polynomial", eps=0.01, grad=True)
    assert plan.gradient_certificate.rule == "moments"
    O, vjp = ropecy.attention_vjp(**case, causal=causal, method="polynomial", eps=0.01)
    assert vjp.certificate.n_exact_rows >= 5
    g, dense = vjp(dO), oracle.attention(**case, causal=causal)
    assert np.all(np.abs(O - dense.O) <= 0.01 * dense.value_range + 1e-6)
    for name, expected in dense.backward(dO).items():
        assert np.linalg.norm(getattr(g, name) - expected) <= 0.01 * np.linalg.norm(expected), name


def test_too_many_rows_that_fail(rng):
    case, dO = make(rng), rng.standard_normal((1, 1500, 3))
    problem = problem_for(*case.values())
    planned = chosen_for(problem, **HOW).executable
    assert planned.certificate.rule == "moments" and planned.fallback is not None
    result = replace(planned, n_exact_rows=-1).forward(problem, False)
    assert result.executable is planned.fallback and result.gradient_certificate.rule == "worst case"
    gradients = outputs(result.backward(problem, dO[None]))
    for found, true in zip(gradients, exactly(problem, dO[None]), strict=False):
        np.testing.assert_allclose(found, true, rtol=0, atol=0.05 * np.abs(true).max())


@pytest.mark.parametrize("causal", [False, True])
def test_beside_outliers(causal, rng):
    case, dO = make(rng, offset=1.0), rng.standard_normal((1, 1, 1500, 3))
    case["K"][0, 700] *= 30
    case["Q"][0, 800] *= 30
    problem = problem_for(*case.values(), causal=causal)
    choice = chosen_for(problem, **HOW)
    planned = choice.executable
    assert "1 long keys and 1 long queries" in choice.candidate.reason
    assert planned.rest.expansion.scores.centre is not None
    # So that five rows of the rest fail.
    rows = planned.forward(problem, False).gradient_certificate.rows_truncation
    allowed = np.sort(rows, axis=None)[-6:-5] / 2
    result = replace(planned, rest=replace(planned.rest, allowed=allowed)).forward(problem, False)
    assert result.certificate.rule == "moments" and result.certificate.n_exact_rows == 6
    dq, dk, dv = outputs(result.backward(problem, dO))
    true_dq, true_dk, true_dv, _ = exactly(problem, dO)
    for found, true in ((dq, true_dq), (dk, true_dk), (dv, true_dv)):
        assert np.linalg.norm(found - true) <= 0.01 * np.linalg.norm(true)
    failed = result.saved.rest.saved.exact
    np.testing.assert_allclose(dq[failed], true_dq[failed], rtol=0, atol=1e-12)


def test_bits_do_not_depend_on_threads(threads, rng):
    case = make(rng, heads=2, dtype=np.float32)
    case["Q"][0, 700] *= 1.6
    results = []
    for count in (1, threads):
        O, vjp = ropecy.attention_vjp(**case, method="polynomial", eps=0.05, threads=count)
        g = vjp(O)
        results.append((O, g.dQ, g.dK, g.dV, g.certificate.rows_truncation))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_of_all_sizes_have_the_polynomial_itself(rng):
    # dV has its weights, so it is what every row is certified with.
    q = rng.standard_normal((1, 1, 20, 3)) * np.linspace(0.01, 1, 20)[:, None]
    problem = problem_of(q, rng.standard_normal((1, 30, 3)), rng.standard_normal((1, 30, 2)))
    scores = measure(problem)
    p = moment_fit.fit_moments(poly.B_grid(scores.bound), 4)
    fits = moments.MomentRule((p,), 0.0, scores, weights=(p,)).fits(problem)
    assert np.all(fits.of_rows(lambda fit: fit.B) == p.B)
    assert np.all(fits.of_rows(lambda fit: fit.alone) == p.alone)
