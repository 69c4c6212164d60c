"""Positions and rotations inside attention: scores are q R_{j-i} k^T, whatever the integers i and j."""

import cases
import numpy as np
import oracle
import pytest

import ropecy


def _arrays(rng, n=9, n_k=12, d=6):
    return rng.standard_normal((n, d)), rng.standard_normal((n_k, d)), rng.standard_normal((n_k, 3))


@pytest.mark.parametrize("options", [{}, {"pairing": "interleaved"}, {"rotary_dim": 2}, {"base": 50.0}])
def test_scores_are_written_with_relative_rotations(options, rng):
    Q, K, _ = _arrays(rng)
    R = ropecy.Rotary(6, **options)
    A = ropecy.AttentionMatrix(Q, K, R, method="exact").toarray()
    expected = [[np.exp(Q[i] @ R[j - i] @ K[j] / 6) for j in range(12)] for i in range(9)]
    np.testing.assert_allclose(A, expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("shift", [-1, 7, -1000, 10**6])
def test_only_differences_of_positions_matter(method, shift, rng):
    Q, K, V = _arrays(rng)
    R = ropecy.Rotary(6)
    q_positions, k_positions = rng.integers(-100, 100, 9), rng.integers(-100, 100, 12)
    O = ropecy.attention(Q, K, V, R, q_positions=q_positions, k_positions=k_positions, method=method)
    moved = ropecy.attention(
        Q, K, V, R, q_positions=q_positions + shift, k_positions=k_positions + shift, method=method
    )
    np.testing.assert_allclose(moved, O, atol=1e-8)


@pytest.mark.parametrize("largest", [10, 10**4, 10**6, 10**7])
def test_far_positions_keep_their_angles(largest, rng, ours):
    Q, K, V = _arrays(rng)
    case = {"Q": Q, "K": K, "V": V, "R": oracle.Rope(6)}
    case["q_positions"] = rng.integers(-largest, largest + 1, 9)
    case["k_positions"] = rng.integers(-largest, largest + 1, 12)
    O = ropecy.attention(**ours(case), method="exact")
    # The angle itself is rounded: up to largest * 2^-53.
    np.testing.assert_allclose(O, oracle.attention(**case).O, atol=1e-12 + 1e-15 * largest)


def test_float32_angles_are_formed_in_float64(rng, ours):
    Q, K, V = (X.astype(np.float32) for X in _arrays(rng))
    case = {"Q": Q, "K": K, "V": V, "R": oracle.Rope(6)}
    case["q_positions"], case["k_positions"] = 10**6 + np.arange(9), 10**6 + np.arange(12)
    O = ropecy.attention(**ours(case), method="exact")
    np.testing.assert_allclose(O, oracle.attention(**case).O, atol=3e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16, np.int64])
def test_positions_may_be_any_integers(dtype, rng):
    Q, K, V = _arrays(rng)
    R = ropecy.Rotary(6)
    O = ropecy.attention(Q, K, V, R, q_positions=np.arange(9, dtype=dtype), k_positions=np.arange(12, dtype=dtype))
    np.testing.assert_array_equal(O, ropecy.attention(Q, K, V, R))


def test_repeated_positions(rng):
    Q, K, V = _arrays(rng)
    zeros = {"q_positions": np.full(9, 5), "k_positions": np.full(12, 5)}
    O = ropecy.attention(Q, K, V, ropecy.Rotary(6), **zeros, method="exact")
    np.testing.assert_allclose(O, ropecy.attention(Q, K, V, method="exact"), atol=1e-13)


def test_offset_moves_queries_by_default(rng):
    Q, K, V = _arrays(rng)
    R = ropecy.Rotary(6)
    O = ropecy.attention(Q, K, V, R, q_offset=3)
    np.testing.assert_array_equal(O, ropecy.attention(Q, K, V, R, q_offset=3, q_positions=np.arange(9) + 3))


def test_masks_go_by_index_not_by_position(rng, ours):
    Q, K, V = _arrays(rng)
    case = {"Q": Q, "K": K, "V": V, "R": oracle.Rope(6), "causal": True, "bias": oracle.Alibi(0.3)}
    case["q_positions"], case["k_positions"] = rng.permutation(9), rng.permutation(12)
    O = ropecy.attention(**ours(case), method="exact")
    np.testing.assert_allclose(O, oracle.attention(**case).O, atol=1e-12)


def test_positions_of_a_batch(rng):
    Q, K, V = (rng.standard_normal((2, 3, 8, 4)) for _ in range(3))
    R = ropecy.Rotary(4)
    positions = rng.integers(0, 100, (2, 1, 8))
    O = ropecy.attention(Q, K, V, R, q_positions=positions, k_positions=positions, method="exact")
    for b in range(2):
        row = {"q_positions": positions[b, 0], "k_positions": positions[b, 0]}
        np.testing.assert_allclose(O[b], ropecy.attention(Q[b], K[b], V[b], R, **row, method="exact"), atol=1e-13)


def test_pairings_are_permutations_of_each_other(rng):
    Q, K, V = _arrays(rng)
    order = [0, 2, 4, 1, 3, 5]
    interleaved = ropecy.attention(Q, K, V, ropecy.Rotary(6, pairing="interleaved"), method="exact")
    half = ropecy.attention(Q[:, order], K[:, order], V, ropecy.Rotary(6), method="exact")
    np.testing.assert_allclose(half, interleaved, atol=1e-13)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_linear_scaling_stretches_positions(method, rng):
    Q, K, V = _arrays(rng)
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    linear = ropecy.Rotary(6, scaling={"rope_type": "linear", "factor": 2.0})
    stretched = {"q_positions": 2 * np.arange(9), "k_positions": 2 * np.arange(12)}
    O = ropecy.attention(Q, K, V, linear, **stretched, method=method)
    np.testing.assert_allclose(O, ropecy.attention(Q, K, V, ropecy.Rotary(6), method=method), atol=1e-11)
