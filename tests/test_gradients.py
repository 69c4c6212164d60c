"""Gradients with respect to everything: exact against the oracle, by polynomials within the bounds of the theory."""

import cases
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

def _norm(X):
    return np.linalg.norm(X, axis=-1)


def _backward(case, ours, dO, **options):
    """The package's gradients as the dictionary that the oracle's backward returns."""
    _, vjp = ropecy.attention_vjp(**ours(case), **options)
    g = vjp(dO)
    names = ["dQ", "dK", "dV", *("d" + name for name in ("W", "W_Q", "W_K", "W_V", "bias") if name in case)]
    return {name: getattr(g, name) for name in names}


@pytest.mark.parametrize("name", cases.SPECS)
def test_exact_float64_is_the_oracle(name, rng, ours):
    case = cases.make(name, rng)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    expected = dense.backward(dO)
    O, _ = ropecy.attention_vjp(**ours(case), method="exact")
    np.testing.assert_allclose(O, dense.O, rtol=0, atol=1e-12)
    for argument, gradient in _backward(case, ours, dO, method="exact").items():
        # The arrays are of order one, and so is what cancels in a gradient that is zero.
        tolerance = 1e-12 * (1.0 + np.abs(expected[argument]).max())
        np.testing.assert_allclose(gradient, expected[argument], rtol=0, atol=tolerance, err_msg=argument)


@pytest.mark.parametrize("name", cases.SPECS)
def test_exact_float32_is_as_good_as_plain_numpy(name, rng, ours):
    case = cases.make(name, rng, np.float32)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    expected = dense.backward(dO)
    plain = oracle.attention(**case, dtype=np.float32).backward(dO)
    for argument, gradient in _backward(case, ours, dO, method="exact").items():
        if argument != "dbias":
            assert gradient.dtype == np.float32
        error = np.linalg.norm(gradient - expected[argument])
        # What cancels is of order one in a row; a bias's gradient sums over the rows as well.
        cancelled = case["Q"].shape[-2] if argument == "dbias" else 1.0
        floor = 8 * 2.0**-24 * (cancelled + np.linalg.norm(expected[argument]))
        assert error <= 3 * np.linalg.norm(plain[argument] - expected[argument]) + floor, argument


@pytest.mark.parametrize("name", cases.SPECS)
def test_gradients_have_the_shape_and_dtype_of_their_arguments(name, rng, ours):
    case = cases.make(name, rng, np.float32)
    dO = cases.upstream(case, oracle.attention(**case), rng)
    for argument, gradient in _backward(case, ours, dO).items():
        if argument == "dbias":
            bias = case["bias"]
            assert np.shape(gradient) == np.shape(bias.values if isinstance(bias, oracle.Table) else bias.slope)
        else:
            assert gradient.shape == case[argument[1:]].shape
            assert gradient.dtype == np.float32


def gradient_bounds(case, dense, dO, eps):
    """What eps promises of dQ and dK (norms of rows) and dV (entries): section 6.3 of the theory with e = 2 eps."""
    e = 2 * eps
    zeta = 2 * e / (1 - e)
    c = abs(dense.scale)
    rope = case.get("R")
    factor = 1.0 if rope is None else max(1.0, rope.attention_factor)
    dO = dO.astype(np.float64)
    inner = dO @ np.swapaxes(dense.v, -1, -2)
    omega = dense.ranges(inner[..., None])[..., 0]
    seen = dense.allowed.any(axis=-2)
    distance = _norm(dense.k[..., :, None, :] - dense.k[..., None, :, :])
    diameter = np.where(seen[..., :, None] & seen[..., None, :], distance, 0.0).max(axis=(-2, -1))
    of_keys = np.einsum("...ij,...i->...j", dense.P, omega * _norm(dense.q))
    bounds = {
        "dQ": factor * c * np.arctanh(e) / 4 * (omega * diameter[..., None])[..., None],
        "dK": factor * c * zeta * of_keys[..., None],
        "dV": zeta * np.swapaxes(dense.P, -1, -2) @ np.abs(dO),
    }
    lead = dense.O.shape[:-2]
    shapes = {name: case[name[1:]].shape[:-1] + bound.shape[-1:] for name, bound in bounds.items()}
    return {name: oracle.collapse(bound, shapes[name], lead) for name, bound in bounds.items()}


def assert_within_bounds(gradients, case, dense, dO, eps):
    exact = dense.backward(dO)
    bounds = gradient_bounds(case, dense, dO, eps)
    u = np.finfo(dO.dtype).eps
    for name, bound in bounds.items():
        difference = gradients[name] - exact[name]
        error = np.abs(difference) if name == "dV" else _norm(difference)[..., None]
        rounding = 100 * u * (1.0 + np.abs(exact[name]).max(initial=0.0))
        assert np.all(error <= bound + rounding), name


WITHOUT_PROJECTIONS = [name for name in cases.POLYNOMIAL if "project" not in cases.SPECS[name]]


@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("name", WITHOUT_PROJECTIONS)
def test_polynomial_keeps_the_bounds(name, eps, rng, ours):
    case = cases.make(name, rng, unit=True)
    if case["Q"].shape[-1] > 6:
        eps = max(eps, 1e-3)  # more monomials than a test has time for
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    gradients = _backward(case, ours, dO, method="polynomial", eps=eps)
    assert_within_bounds(gradients, case, dense, dO, eps)


@pytest.mark.parametrize("name", WITHOUT_PROJECTIONS)
def test_polynomial_float32_keeps_the_bounds(name, rng, ours):
    case = cases.make(name, rng, np.float32, unit=True)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    gradients = _backward(case, ours, dO, method="polynomial", eps=1e-2)
    assert_within_bounds(gradients, case, dense, dO, 1e-2)


@pytest.mark.parametrize("name", WITHOUT_PROJECTIONS)
def test_auto_keeps_the_bounds(name, rng, ours):
    case = cases.make(name, rng, np.float32, unit=True)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    assert_within_bounds(_backward(case, ours, dO, eps=1e-3), case, dense, dO, 1e-3)


@pytest.mark.parametrize("name", ["weight", "weight_per_head", "projections", "one_projection"])
def test_polynomial_gradients_of_projections_are_near_the_oracle(name, rng, ours):
    # At an eps this small the bounds leave eight digits: enough to see any wrong factor, order or transpose.
    case = cases.make(name, rng, unit=True)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    expected = dense.backward(dO)
    for argument, gradient in _backward(case, ours, dO, method="polynomial", eps=1e-8).items():
        tolerance = 1e-6 * np.linalg.norm(expected[argument])
        assert np.linalg.norm(gradient - expected[argument]) <= tolerance, argument


@pytest.mark.parametrize("bound", [0.2, 2.0, 5.0])
@pytest.mark.parametrize("causal", [False, True])
def test_polynomial_keeps_the_bounds_over_every_bound_on_scores(bound, causal, rng, ours):
    case = cases.make("prime_lengths", rng, unit=True)
    case = {**case, "scale": bound / 3, "causal": causal}
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    assert_within_bounds(_backward(case, ours, dO, method="polynomial", eps=1e-3), case, dense, dO, 1e-3)


def test_polynomial_refuses_at_the_vjp_call_what_it_cannot_hold(rng):
    Q, K, V = rng.standard_normal((3, 30, 8))
    with pytest.raises(ropecy.BoundedEntryError):
        ropecy.attention_vjp(30 * Q, K, V, method="polynomial")


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("name", ["rope_half", "causal", "causal_more_keys", "key_mask", "grouped_queries"])
def test_gradients_of_values_sum_to_those_of_outputs(name, method, rng, ours):
    # Rows of D^-1 A sum to one, whatever weights p gives: sum_j dV_j = sum_i dO_i.
    case = cases.make(name, rng, unit=True)
    dO = cases.upstream(case, oracle.attention(**case), rng)
    dV = _backward(case, ours, dO, method=method)["dV"]
    sums = dO.sum(axis=-2)
    if name == "grouped_queries":
        sums = sums.reshape(2, 2, 3, -1).sum(axis=2)
    np.testing.assert_allclose(dV.sum(axis=-2), sums, atol=1e-10)


@pytest.mark.parametrize("name", ["rope_half", "causal", "key_mask", "everything", "window", "rope_attention_factor"])
def test_queries_and_keys_share_one_scale(name, rng, ours):
    # Q -> tQ and K -> K/t leave every score alone, so <Q, dQ> = <K, dK>.
    case = cases.make(name, rng)
    dO = cases.upstream(case, oracle.attention(**case), rng)
    g = _backward(case, ours, dO, method="exact")
    assert np.vdot(case["Q"], g["dQ"]) == pytest.approx(np.vdot(case["K"], g["dK"]), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("name", ["plain", "rope_half", "rope_interleaved", "causal", "window"])
def test_a_constant_added_to_rotated_keys_is_not_seen(name, rng, ours):
    # sum_j R_j dK_j = 0.
    case = cases.make(name, rng)
    dO = cases.upstream(case, oracle.attention(**case), rng)
    dK = _backward(case, ours, dO, method="exact")["dK"]
    if "R" in case:
        dK = case["R"].rotate(dK, np.arange(dK.shape[-2]))
    np.testing.assert_allclose(dK.sum(axis=-2), 0.0, atol=1e-11)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_vjp_may_be_called_again(method, rng, ours):
    case = cases.make("causal", rng, unit=True)
    O, vjp = ropecy.attention_vjp(**ours(case), method=method)
    first, second = rng.standard_normal((2, *O.shape))
    g = [vjp(dO) for dO in (first, second, first, first + second)]
    for name in ("dQ", "dK", "dV"):
        a, b, again, both = (getattr(x, name) for x in g)
        np.testing.assert_array_equal(a, again)
        np.testing.assert_allclose(a + b, both, atol=1e-11)


def test_zero_upstream_gives_zero(rng, ours):
    case = cases.make("grouped_queries_causal", rng, unit=True)
    for method in ("exact", "polynomial"):
        O, vjp = ropecy.attention_vjp(**ours(case), method=method)
        g = vjp(np.zeros_like(O))
        for gradient in (g.dQ, g.dK, g.dV):
            np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("causal", [False, True])
def test_polynomial_is_the_adjoint_of_the_exact_derivative_when_long(causal, rng):
    # <dQ, X> + <dK, Y> + <dV, Z> against the exact engine's difference along (X, Y, Z), n = 4096.
    n, d, eps, h = 4096, 4, 1e-7, 1e-4
    Q, K, V, X, Y, Z, dO = rng.standard_normal((7, n, d))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    R = ropecy.Rotary(d)
    _, vjp = ropecy.attention_vjp(Q, K, V, R, causal=causal, eps=eps, method="polynomial")
    g = vjp(dO)

    def exact(t):
        return ropecy.attention(Q + t * X, K + t * Y, V + t * Z, R, causal=causal, method="exact")

    expected = np.vdot(dO, exact(h) - exact(-h)) / (2 * h)
    # 6.3: every row's omega_i is at most 2 |dO_i| max|V_j|, and the diameter at most twice the longest key, |K_j| = 2.
    omega = 2 * _norm(dO) * _norm(V).max()
    zeta = 4 * eps / (1 - 2 * eps)
    allowed = np.sum(omega * (eps / 2 / d * 4 * _norm(X) + zeta / d * 2 * _norm(Y).max()))
    allowed += zeta * np.sum(np.abs(dO)) * np.abs(Z).max()
    curvature = 1e-7 * _norm(dO).sum()
    assert abs(np.vdot(g.dQ, X) + np.vdot(g.dK, Y) + np.vdot(g.dV, Z) - expected) <= allowed + curvature


@settings(max_examples=40)
@given(data=st.data())
def test_exact_is_the_oracle_for_any_shape(data):
    draw = data.draw
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n, n_k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    d, d_v = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    Q = rng.standard_normal((heads * groups, n, d))
    K, V = rng.standard_normal((heads, n_k, d)), rng.standard_normal((heads, n_k, d_v))
    window = draw(st.none() | st.integers(1, 50) | st.tuples(st.integers(0, 20), st.integers(0, 20)))
    options = {"causal": draw(st.booleans()), "window": window, "q_offset": draw(st.integers(-30, 30))}
    dense = oracle.attention(Q, K, V, **options)
    dO = rng.standard_normal(dense.O.shape)
    g = ropecy.attention_vjp(Q, K, V, **options, method="exact")[1](dO)
    for name, expected in dense.backward(dO).items():
        np.testing.assert_allclose(getattr(g, name), expected, rtol=0, atol=1e-11)
