"""Heads of unlike scale, of unlike centres, and without queries: what holds for each is found for each."""

import numpy as np
import oracle
import pytest
from inside import measure

import ropecy
from ropecy.problem.problem import Problem

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "alibi": {"bias": oracle.Alibi(0.02)},
    "fft": {"method": "fft"},
    "fft, table": {"method": "fft", "bias": oracle.Table(np.sin(np.arange(101)))},
}


def _heads(rng, n=500, d=4):
    return rng.uniform(-1, 1, (3, 2, n, d))


def _assert_close(case, dO, ours, eps=1e-3):
    """O within what is certified, and gradients within 5 eps of each head's own size."""
    dense = oracle.attention(**{name: X for name, X in case.items() if name != "method"})
    O, vjp = ropecy.attention_vjp(**ours({"method": "polynomial", **case}), eps=eps)
    assert np.all(np.abs(O - dense.O) <= vjp.certificate.error * dense.value_range.max() + 1e-6)
    g = vjp(dO)
    for name, expected in dense.backward(dO).items():
        found = getattr(g, name)
        if name == "dbias":
            continue
        for head in range(len(expected)):
            size = np.linalg.norm(expected[head])
            assert np.linalg.norm(found[head] - expected[head]) <= 5 * eps * size, (name, head)


@pytest.mark.parametrize(
    ("dtype", "times"),
    [(np.float32, 1e9), (np.float32, 1e18), (np.float32, 1e-18), (np.float64, 1e9), (np.float64, 1e-120)],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_heads_of_unlike_scale(options, times, dtype, rng, ours):
    # Monomials of a head that has the other's factors would overflow or vanish.
    Q, K, V = _heads(rng)
    Q[0] *= times
    K[0] /= times
    case = {"Q": Q.astype(dtype), "K": K.astype(dtype), "V": V.astype(dtype), **OPTIONS[options]}
    _assert_close(case, rng.standard_normal(V.shape).astype(dtype), ours)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_a_head_of_which_keys_or_queries_are_0(causal, dtype, rng, ours):
    Q, K, V = _heads(rng)
    largest = float(np.finfo(dtype).max) ** 0.4
    Q[0], K[0] = 0, K[0] * largest
    case = {"Q": Q.astype(dtype), "K": K.astype(dtype), "V": V.astype(dtype), "causal": causal}
    dO = rng.standard_normal(V.shape).astype(dtype)
    _assert_close(case, dO, ours)
    # A gradient that is 0 has no size to compare with.
    case["Q"], case["K"] = case["K"], case["Q"]
    O, vjp = ropecy.attention_vjp(**case, method="polynomial")
    np.testing.assert_allclose(O, oracle.attention(**case).O, rtol=0, atol=2e-3)
    g = vjp(dO)
    assert np.all(g.dQ[0] == 0) and all(np.isfinite(X).all() for X in (g.dQ, g.dK, g.dV))


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_keys_are_centred_where_queries_are_0(dtype, tolerance, rng):
    # Scores are 0 with a centre and without; the gradient of queries is a sum of keys all the same.
    n = 700
    Q, K, V = np.zeros((n, 4), dtype), (1e4 + rng.uniform(-1, 1, (n, 4))).astype(dtype), rng.uniform(-1, 1, (n, 3))
    V = V.astype(dtype)
    _, vjp = ropecy.attention_vjp(Q, K, V, method="polynomial")
    expected = oracle.attention(Q, K, V).backward(V)["dQ"]
    assert np.linalg.norm(vjp(V).dQ - expected) <= tolerance * np.linalg.norm(expected)


def test_a_centre_for_the_heads_that_gain_by_it(rng):
    q, k, v = _heads(rng)
    k[1] += 50
    problem = Problem(q=q[:, None], k=k, v=v, scale=0.25)
    scores = measure(problem)
    np.testing.assert_allclose(scores.centre[1], k[1].mean(axis=0))
    for head in range(2):
        k_norm = np.linalg.norm(k[head] - scores.centre[head], axis=1).max()
        own = 0.25 * np.linalg.norm(q[head], axis=1).max() * k_norm
        assert scores.of_slots[head] == pytest.approx(own, rel=1e-9)
        # Both come to the root of the head's own bound, and give the scale together.
        assert scores.k_factor[head] * k_norm == pytest.approx(own**0.5, rel=1e-9)
        assert scores.q_factor[head] * scores.k_factor[head] == pytest.approx(0.25, rel=1e-12)
    assert scores.bound == max(scores.of_slots)
    kept = scores.within(scores.bound / 4)
    np.testing.assert_allclose(kept.k_factor * scores.keys, np.sqrt(kept.of_slots), rtol=1e-9)
