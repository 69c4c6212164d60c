"""W, W_Q, W_K and W_V: where they stand in the score, and what is not given is the identity."""

import cases
import numpy as np
import pytest

import ropecy


def _arrays(rng, n=14, d=4):
    return tuple(cases.unit_rows(X) for X in rng.standard_normal((3, n, d)))


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_projections_are_products_made_beforehand(method, rng):
    Q, K, V = _arrays(rng)
    W_Q, W_K, W_V = rng.standard_normal((3, 4, 4)) / 4
    O = ropecy.attention(Q, K, V, W_Q=W_Q, W_K=W_K, W_V=W_V, method=method)
    np.testing.assert_allclose(O, ropecy.attention(Q @ W_Q, K @ W_K, V @ W_V, method=method), atol=1e-12)


def test_weight_stands_before_the_rotation(rng):
    Q, K, _ = _arrays(rng)
    W = rng.standard_normal((4, 4)) / 2
    R = ropecy.Rotary(4)
    A = ropecy.AttentionMatrix(Q, K, R, W=W, method="exact").toarray()
    expected = [[np.exp(Q[i] @ W @ R[j - i] @ K[j] / 4) for j in range(14)] for i in range(14)]
    np.testing.assert_allclose(A, expected, rtol=1e-12)


def test_identities_change_nothing(rng):
    Q, K, V = _arrays(rng)
    eye = dict.fromkeys(("W", "W_Q", "W_K", "W_V"), np.eye(4))
    R = ropecy.Rotary(4)
    O = ropecy.attention(Q, K, V, R, **eye, method="exact")
    np.testing.assert_allclose(O, ropecy.attention(Q, K, V, R, method="exact"), atol=1e-13)


def test_default_scale_and_rotary_go_by_the_width_that_meets(rng):
    Q, K, V = _arrays(rng, d=5)
    W_Q, W_K = rng.standard_normal((2, 5, 2))
    R = ropecy.Rotary(2)
    O = ropecy.attention(Q, K, V, R, W_Q=W_Q, W_K=W_K, method="exact")
    np.testing.assert_allclose(O, ropecy.attention(Q, K, V, R, W_Q=W_Q, W_K=W_K, scale=0.5, method="exact"))


def test_queries_and_keys_may_have_widths_of_their_own(rng):
    Q, K, V = rng.standard_normal((6, 3)), rng.standard_normal((8, 5)), rng.standard_normal((8, 2))
    W_Q, W_K = rng.standard_normal((3, 4)), rng.standard_normal((5, 4))
    O = ropecy.attention(Q, K, V, W_Q=W_Q, W_K=W_K, method="exact")
    np.testing.assert_allclose(O, ropecy.attention(Q @ W_Q, K @ W_K, V, method="exact"), atol=1e-13)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_gradients_of_projections_follow_the_papers(method, rng):
    # dW_Q = A_1^T dQ, dW_K = A_2^T dK, dW_V = A_3^T dV, with dQ, dK, dV of what the projections give.
    A_1, A_2, A_3 = _arrays(rng)
    W_Q, W_K, W_V = rng.standard_normal((3, 4, 4)) / 4
    R = ropecy.Rotary(4)
    dO = rng.standard_normal((14, 4))
    _, vjp = ropecy.attention_vjp(A_1, A_2, A_3, R, W_Q=W_Q, W_K=W_K, W_V=W_V, causal=True, method=method)
    _, inner = ropecy.attention_vjp(A_1 @ W_Q, A_2 @ W_K, A_3 @ W_V, R, causal=True, method=method)
    g, h = vjp(dO), inner(dO)
    np.testing.assert_allclose(g.dW_Q, A_1.T @ h.dQ, atol=1e-11)
    np.testing.assert_allclose(g.dW_K, A_2.T @ h.dK, atol=1e-11)
    np.testing.assert_allclose(g.dW_V, A_3.T @ h.dV, atol=1e-11)
    np.testing.assert_allclose(g.dQ, h.dQ @ W_Q.T, atol=1e-11)
    np.testing.assert_allclose(g.dK, h.dK @ W_K.T, atol=1e-11)
    np.testing.assert_allclose(g.dV, h.dV @ W_V.T, atol=1e-11)


def test_projections_shared_by_a_batch_collect_its_gradients(rng):
    Q, K, V = rng.standard_normal((3, 2, 3, 7, 4))
    W, W_V = rng.standard_normal((4, 4)), rng.standard_normal((4, 2))
    O, vjp = ropecy.attention_vjp(Q, K, V, W=W, W_V=W_V, method="exact")
    g = vjp(O)
    dW, dW_V = np.zeros_like(W), np.zeros_like(W_V)
    for index in np.ndindex(2, 3):
        _, one = ropecy.attention_vjp(Q[index], K[index], V[index], W=W, W_V=W_V, method="exact")
        part = one(O[index])
        dW, dW_V = dW + part.dW, dW_V + part.dW_V
    np.testing.assert_allclose(g.dW, dW, atol=1e-11)
    np.testing.assert_allclose(g.dW_V, dW_V, atol=1e-11)
