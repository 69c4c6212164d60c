"""Masks: what a row may see, rows that see nothing, and what is hidden."""

import cases
import numpy as np
import oracle
import pytest

import ropecy
from ropecy.engines.exact import streaming
from ropecy.problem.problem import Problem

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Ways in which rows of an 11 by 7 problem are left without any key, and which rows these are.
BLIND = {
    "key_mask": ({"key_mask": np.zeros(7, dtype=bool)}, np.arange(11)),
    "offset": ({"causal": True, "q_offset": -3}, np.arange(3)),
    "window": ({"window": 2}, np.arange(8, 11)),
    "two_sided": ({"window": (1, 1), "q_offset": -3}, np.array([0, 1])),
    "together": ({"causal": True, "key_mask": np.arange(7) >= 4}, np.arange(4)),
    "mask_and_window": ({"window": 1, "key_mask": np.arange(7) % 2 == 0}, np.array([1, 3, 5, 7, 8, 9, 10])),
}
BLIND_POLYNOMIAL = ["key_mask", "offset", "together"]


def _arrays(rng, n=11, n_k=7, d=4):
    Q, K, V = rng.standard_normal((n, d)), rng.standard_normal((n_k, d)), rng.standard_normal((n_k, 3))
    return cases.unit_rows(Q), cases.unit_rows(K), V


@pytest.mark.parametrize(
    ("name", "method"), [*((x, "exact") for x in BLIND), *((x, "polynomial") for x in BLIND_POLYNOMIAL)]
)
def test_rows_without_keys_are_zero(name, method, rng):
    options, blind = BLIND[name]
    Q, K, V = _arrays(rng)
    dense = oracle.attention(Q, K, V, **options)
    np.testing.assert_array_equal(np.flatnonzero(~dense.allowed.any(axis=-1)), blind)

    O, lse = ropecy.attention(Q, K, V, **options, method=method, return_lse=True)
    np.testing.assert_array_equal(O[blind], 0.0)
    np.testing.assert_array_equal(lse[blind], -np.inf)
    assert np.isfinite(np.delete(lse, blind)).all()

    dO = rng.standard_normal(O.shape)
    _, vjp = ropecy.attention_vjp(Q, K, V, **options, method=method)
    g = vjp(dO)
    np.testing.assert_array_equal(g.dQ[blind], 0.0)
    expected = dense.backward(dO)
    tolerance = 1e-12 if method == "exact" else 1e-2
    for gradient in ("dQ", "dK", "dV"):
        np.testing.assert_allclose(getattr(g, gradient), expected[gradient], atol=tolerance)
    # Nor does anything that arrives at a blind row go further.
    dO[blind] = 1e9
    moved = vjp(dO)
    for gradient in ("dQ", "dK", "dV"):
        np.testing.assert_allclose(getattr(moved, gradient), getattr(g, gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "exact", "polynomial"])
@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf, 1e300])
def test_hidden_keys_do_not_leak(hidden, method, rng):
    Q, K, V = _arrays(rng)
    mask = np.array([True, True, False, True, False, True, True])
    W_K, W_V = rng.standard_normal((4, 4)) / 4, rng.standard_normal((3, 2))
    options = {"key_mask": mask, "W_K": W_K, "W_V": W_V, "method": method, "causal": True}
    O, vjp = ropecy.attention_vjp(Q, K, V, **options)
    dO = rng.standard_normal(O.shape)
    g = vjp(dO)
    K[~mask], V[~mask] = hidden, hidden
    poisoned, vjp = ropecy.attention_vjp(Q, K, V, **options)
    np.testing.assert_array_equal(poisoned, O)
    h = vjp(dO)
    for name in ("dQ", "dK", "dV", "dW_K", "dW_V"):
        np.testing.assert_array_equal(getattr(h, name), getattr(g, name))
    np.testing.assert_array_equal(h.dK[~mask], 0.0)
    np.testing.assert_array_equal(h.dV[~mask], 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("far", [1e2, 1e6, 1e15])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hidden_keys_beside_keys_far_from_0(dtype, far, causal, rng):
    # What is hidden is 0, and as far from the centre of the others: its weight would overflow, and its monomials.
    Q, K, V = rng.uniform(-1, 1, (3, 700, 4))
    Q, K, V = (X.astype(dtype) for X in (Q / (far * 1e-4), far * (1 + 1e-4 * K), V))
    options = {"key_mask": rng.random(700) < 0.7, "causal": causal}
    O, vjp = ropecy.attention_vjp(Q, K, V, **options, method="polynomial", eps=1e-2)
    dense = oracle.attention(Q, K, V, **options)
    assert np.all(np.abs(O - dense.O) <= vjp.certificate.error * dense.value_range + 1e-6)
    g = vjp(V)
    for name, expected in dense.backward(V).items():
        assert np.linalg.norm(getattr(g, name) - expected) <= 1e-2 * np.linalg.norm(expected), name


def test_mask_of_ones_changes_nothing(rng):
    Q, K, V = _arrays(rng)
    for method in ("exact", "polynomial"):
        masked = ropecy.attention(Q, K, V, key_mask=np.ones(7, dtype=bool), method=method)
        np.testing.assert_array_equal(masked, ropecy.attention(Q, K, V, method=method))


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_masked_is_removed(method, rng):
    Q, K, V = _arrays(rng, n_k=40)
    mask = rng.random(40) < 0.5
    O = ropecy.attention(Q, K, V, key_mask=mask, method=method, eps=1e-6)
    np.testing.assert_allclose(O, ropecy.attention(Q, K[mask], V[mask], method="exact"), atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_key_mask_of_a_batch_with_heads(method, rng):
    Q, K, V = (rng.standard_normal((2, 3, 5, 4)) for _ in range(3))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    mask = rng.random((2, 1, 5)) < 0.7
    mask[..., 0] = True
    O = ropecy.attention(Q, K, V, key_mask=mask, method=method)
    expected = oracle.attention(Q, K, V, key_mask=mask)
    assert np.all(np.abs(O - expected.O) <= 1e-3 * expected.value_range + 1e-12)
    per_head = np.broadcast_to(mask, (2, 3, 5))
    np.testing.assert_array_equal(ropecy.attention(Q, K, V, key_mask=per_head, method=method), O)


@pytest.mark.parametrize("size", [2, 3])
def test_key_mask_without_a_head_axis_is_refused(size, rng):
    # (b, n_k) beside (b, h, n, d) would be read as one mask per head wherever b = h.
    Q = rng.standard_normal((size, 3, 5, 4))
    with pytest.raises(ValueError, match="key_mask") as caught:
        ropecy.attention(Q, Q, Q, key_mask=np.ones((size, 5), dtype=bool))
    assert "(b, 1, n_k)" in str(caught.value) or f"({size}, 1, 5)" in str(caught.value)


def test_key_mask_within_groups_of_queries(rng):
    # One mask for each query head, though two query heads share a key head.
    Q, K, V = rng.standard_normal((1, 4, 6, 4)), rng.standard_normal((1, 2, 6, 4)), rng.standard_normal((1, 2, 6, 4))
    mask = rng.random((1, 4, 6)) < 0.6
    mask[..., 0] = True
    for method, tolerance in (("exact", 1e-12), ("polynomial", 1e-4)):
        O, vjp = ropecy.attention_vjp(Q, K, V, key_mask=mask, method=method, eps=1e-5)
        dense = oracle.attention(Q, K, V, key_mask=mask)
        np.testing.assert_allclose(O, dense.O, atol=tolerance)
        g, expected = vjp(dense.O), dense.backward(dense.O)
        for name in ("dQ", "dK", "dV"):
            np.testing.assert_allclose(getattr(g, name), expected[name], atol=10 * tolerance)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_causal_row_zero_is_its_value(method, rng):
    Q, K, V = _arrays(rng, n=7)
    O = ropecy.attention(Q, K, V, causal=True, method=method)
    np.testing.assert_allclose(O[0], V[0], rtol=1e-14)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_later_keys_do_not_reach_earlier_rows(method, rng):
    Q, K, V = _arrays(rng, n=150, n_k=150)
    O, vjp = ropecy.attention_vjp(Q, K, V, causal=True, method=method, degree=4 if method == "polynomial" else None)
    V[100:] += 5.0
    moved = ropecy.attention(Q, K, V, causal=True, method=method, degree=4 if method == "polynomial" else None)
    np.testing.assert_allclose(moved[:100], O[:100], rtol=0, atol=1e-12)
    dO = np.zeros_like(O)
    dO[:100] = 1.0
    g = vjp(dO)
    for gradient in (g.dK, g.dV):
        np.testing.assert_array_equal(gradient[100:], 0.0)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_offset_continues_a_sequence(method, rng, ours):
    # The last queries of a causal sequence, alone, with the index they had.
    case = ours(cases.make("causal", rng, unit=True))
    whole = ropecy.attention(**case, method=method, eps=1e-6)
    last = ropecy.attention(**{**case, "Q": case["Q"][50:]}, q_offset=50, method=method, eps=1e-6)
    np.testing.assert_allclose(last, whole[50:], atol=1e-12 if method == "exact" else 1e-5)


def test_window_counts_as_documented(rng):
    # A query that weighs all keys alike returns the mean of the values it sees.
    n, n_k, q_offset = 9, 12, 2
    Q, K, V = np.zeros((n, 2)), np.zeros((n_k, 2)), np.eye(n_k)
    for options, sees in [
        ({"causal": True}, lambda t: t <= 0),
        ({"window": 3}, lambda t: -3 < t <= 0),
        ({"window": (2, 4)}, lambda t: -2 <= t <= 4),
        ({"window": (2, 4), "causal": True}, lambda t: -2 <= t <= 0),
        ({"window": (0, 0)}, lambda t: t == 0),
    ]:
        O = ropecy.attention(Q, K, V, q_offset=q_offset, **options)
        expected = [[sees(j - (i + q_offset)) for j in range(n_k)] for i in range(n)]
        np.testing.assert_array_equal(O > 0, expected)


def test_near_field_has_its_own_scale(rng):
    Q, K, V = rng.standard_normal((3, 30, 4))
    near = ropecy.attention(Q, K, V, near=(5, 1.5), method="exact")
    t = np.arange(30) - np.arange(30)[:, None]
    s = np.where(np.abs(t) < 5, 1.5, 0.25) * (Q @ K.T)
    P = np.exp(s - s.max(axis=1, keepdims=True))
    np.testing.assert_allclose(near, P / P.sum(axis=1, keepdims=True) @ V, atol=1e-12)
    same = ropecy.attention(Q, K, V, near=(5, 0.25), method="exact")
    np.testing.assert_allclose(same, ropecy.attention(Q, K, V, method="exact"), atol=1e-13)


def test_near_field_is_unbounded(rng):
    Q, K, V = _arrays(rng, n=60, n_k=60)
    options = {"near": (4, 100.0), "causal": True}
    expected = oracle.attention(Q, K, V, **options)
    O = ropecy.attention(Q, K, V, **options, eps=1e-3)
    assert np.all(np.abs(O - expected.O) <= 1e-3 * expected.value_range + 1e-10)


def test_the_layout_of_a_bias_does_not_matter_to_the_exact_engine(rng):
    # A table for each head in Fortran order, as slices and transposes leave it.
    q, k, v = rng.standard_normal((2, 3, 9, 4)), rng.standard_normal((2, 11, 4)), rng.standard_normal((2, 11, 5))
    bias = rng.standard_normal((2, 3, 19))
    results = []
    for order in ("C", "F"):
        problem = Problem(q=q, k=k, v=v, scale=0.3, bias=np.asarray(bias, order=order), threads=1)
        results.append(streaming.forward(problem, np.inf, True)[:2])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
