"""L(W) = half the sum of squares of D^-1 A V - E, and its gradient with respect to everything."""

import cases
import numpy as np
import oracle
import pytest

import ropecy

SOME = ["plain", "rope_half", "causal", "window", "key_mask", "bias_table", "alibi_per_head", "near", "everything"]
SOME += ["projections", "weight_per_head", "grouped_queries", "keys_without_batch", "positions", "causal_empty_rows"]


def _with_target(name, rng, dtype=np.float64, unit=False):
    case = cases.make(name, rng, dtype, unit)
    case["E"] = cases.upstream(case, oracle.attention(**case), rng)
    return case


def _parameters(case):
    return [name for name in ("Q", "K", "V", "W", "W_Q", "W_K", "W_V", "bias") if name in case]


@pytest.mark.parametrize("name", SOME)
def test_value(name, rng, ours):
    case = _with_target(name, rng)
    expected = oracle.loss(**case)
    L = ropecy.loss(**ours(case), method="exact")
    assert isinstance(L, float)
    assert L == pytest.approx(expected, rel=1e-12)
    assert ropecy.loss_grad(**ours(case), method="exact").loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_gradient_is_the_oracle(name, rng, ours):
    case = _with_target(name, rng)
    expected = oracle.loss_gradients(**case)
    g = ropecy.loss_grad(**ours(case), method="exact")
    for argument in _parameters(case):
        gradient = "d" + argument
        tolerance = 1e-12 * (1.0 + np.abs(expected[gradient]).max())
        np.testing.assert_allclose(getattr(g, gradient), expected[gradient], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SOME)
def test_gradient_is_the_derivative_of_the_loss(name, rng, ours):
    case = _with_target(name, rng)
    g = ropecy.loss_grad(**ours(case), method="exact")
    h = 1e-5
    for argument in _parameters(case):
        gradient = np.asarray(getattr(g, "d" + argument))
        direction = rng.standard_normal(gradient.shape)

        def loss(step, argument=argument, direction=direction):
            value = case[argument]
            if isinstance(value, oracle.Table):
                value = oracle.Table(value.values + step * direction)
            elif isinstance(value, oracle.Alibi):
                value = oracle.Alibi(value.slope + step * direction)
            else:
                value = value + step * direction
            return ropecy.loss(**ours({**case, argument: value}), method="exact")

        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.vdot(gradient, direction) - (loss(h) - loss(-h)) / (2 * h)) <= 1e-7 * max(size, 1.0), argument


def test_gradient_carries_the_output_and_the_certificate(rng, ours):
    case = _with_target("causal", rng, unit=True)
    g = ropecy.loss_grad(**ours(case), method="polynomial")
    O = ropecy.attention(**ours({name: value for name, value in case.items() if name != "E"}), method="polynomial")
    np.testing.assert_array_equal(g.O, O)
    assert g.loss == pytest.approx(0.5 * np.sum((O - case["E"]) ** 2), rel=1e-12)
    assert g.certificate.engine == "polynomial"


@pytest.mark.parametrize("name", ["rope_half", "causal", "projections", "grouped_queries"])
@pytest.mark.parametrize("method", ["auto", "polynomial"])
def test_small_eps_comes_close(name, method, rng, ours):
    case = _with_target(name, rng, unit=True)
    expected = oracle.loss_gradients(**case)
    g = ropecy.loss_grad(**ours(case), method=method, eps=1e-8)
    assert g.loss == pytest.approx(oracle.loss(**case), rel=1e-6)
    for argument in _parameters(case):
        gradient = "d" + argument
        tolerance = 1e-5 * np.linalg.norm(expected[gradient])
        assert np.linalg.norm(getattr(g, gradient) - expected[gradient]) <= tolerance, argument


def test_loss_keeps_eps(rng, ours):
    case = _with_target("rope_half", rng, unit=True)
    dense = oracle.attention(**{name: value for name, value in case.items() if name != "E"})
    error = 1e-3 * dense.value_range
    allowed = np.sum(error * (np.abs(dense.O - case["E"]) + error))
    assert abs(ropecy.loss(**ours(case), eps=1e-3, method="polynomial") - oracle.loss(**case)) <= allowed


def test_loss_sums_over_every_axis(rng):
    Q, K, V, E = rng.standard_normal((4, 2, 3, 8, 4))
    whole = ropecy.loss(Q, K, V, E, method="exact")
    parts = sum(ropecy.loss(Q[i], K[i], V[i], E[i], method="exact") for i in np.ndindex(2, 3))
    assert whole == pytest.approx(parts, rel=1e-13)


def test_loss_of_a_perfect_fit_is_zero(rng):
    Q, K, V = rng.standard_normal((3, 8, 4))
    E = ropecy.attention(Q, K, V, method="exact")
    assert ropecy.loss(Q, K, V, E, method="exact") == pytest.approx(0.0, abs=1e-28)


def test_float32_loss_is_summed_in_float64(rng):
    Q, K, V = rng.standard_normal((3, 4000, 2)).astype(np.float32)
    E = (rng.standard_normal((4000, 2)) + 100).astype(np.float32)
    expected = oracle.loss(Q, K, V, E)
    assert ropecy.loss(Q, K, V, E, method="exact") == pytest.approx(expected, rel=1e-6)
    assert ropecy.loss_grad(Q, K, V, E, method="exact").loss == pytest.approx(expected, rel=1e-6)


def test_descent_lowers_the_loss(rng, ours):
    case = _with_target("projections", rng, unit=True)
    first = ropecy.loss_grad(**ours(case), method="polynomial")
    for _ in range(5):
        g = ropecy.loss_grad(**ours(case), method="polynomial")
        for weight in ("W", "W_Q", "W_K", "W_V"):
            case[weight] = case[weight] - 0.01 * getattr(g, "d" + weight)
    assert ropecy.loss(**ours(case), method="exact") < first.loss
