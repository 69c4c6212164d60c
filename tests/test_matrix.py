"""AttentionMatrix (A without its array), and log-sum-exp, which merges partial attentions."""

import cases
import numpy as np
import oracle
import pytest

import ropecy

MATRICES = ["plain", "rope_half", "causal", "causal_more_keys", "causal_empty_rows", "prime_lengths", "key_mask"]
MATRICES += ["weight", "batch_and_heads", "grouped_queries", "positions"]
EXACT_ONLY = ["window", "window_two_sided_causal", "bias_table", "alibi_per_head", "everything"]


def _matrix_case(name, rng, ours):
    """The arguments of AttentionMatrix and its dense A."""
    case = {key: value for key, value in cases.make(name, rng, unit=True).items() if key != "W_V"}
    dense = oracle.attention(**case)
    del case["V"]
    return ours(case), dense.A


@pytest.mark.parametrize("name", MATRICES + EXACT_ONLY)
def test_exact_matrix_is_the_oracle(name, rng, ours):
    case, expected = _matrix_case(name, rng, ours)
    A = ropecy.AttentionMatrix(**case, method="exact")
    assert A.shape == expected.shape
    np.testing.assert_allclose(A.toarray(), expected, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(A.D, expected.sum(axis=-1), rtol=1e-11)
    size = np.abs(expected).sum(axis=-1).max()
    X = rng.standard_normal(expected.shape[:-2] + (expected.shape[-1], 3))
    np.testing.assert_allclose(A @ X, expected @ X, atol=1e-11 * size)
    Y = rng.standard_normal(expected.shape[:-1] + (3,))
    transposed = np.swapaxes(expected, -1, -2)
    assert A.T.shape == transposed.shape
    np.testing.assert_allclose(A.T @ Y, transposed @ Y, atol=1e-11 * transposed.sum(axis=-1).max())


@pytest.mark.parametrize("eps", [1e-2, 1e-5])
@pytest.mark.parametrize("name", MATRICES)
def test_polynomial_matrix_keeps_its_relative_error(name, eps, rng, ours):
    # |(A X)^ - A X| <= e A |X|, e = 2 eps / (1 + eps^2).
    case, expected = _matrix_case(name, rng, ours)
    A = ropecy.AttentionMatrix(**case, method="polynomial", eps=eps)
    e = 2 * eps / (1 + eps**2)
    X = rng.standard_normal(expected.shape[:-2] + (expected.shape[-1], 3))
    assert np.all(np.abs(A @ X - expected @ X) <= e * expected @ np.abs(X) + 1e-11)
    Y = rng.standard_normal(expected.shape[:-1] + (3,))
    transposed = np.swapaxes(expected, -1, -2)
    assert np.all(np.abs(A.T @ Y - transposed @ Y) <= e * transposed @ np.abs(Y) + 1e-11)
    np.testing.assert_allclose(A.D, expected.sum(axis=-1), rtol=e + 1e-12)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_matrix_times_vector(method, rng):
    Q, K = cases.unit_rows(rng.standard_normal((9, 4))), cases.unit_rows(rng.standard_normal((7, 4)))
    A = ropecy.AttentionMatrix(Q, K, method=method)
    x, y = rng.standard_normal(7), rng.standard_normal(9)
    assert (A @ x).shape == (9,)
    np.testing.assert_allclose(A @ x, (A @ x[:, None])[:, 0], rtol=1e-13)
    np.testing.assert_allclose(A.T @ y, (A.T @ y[:, None])[:, 0], rtol=1e-13)
    np.testing.assert_allclose(A @ np.ones(7), A.D, rtol=1e-12)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_matrix_divided_by_its_row_sums_is_attention(method, rng):
    Q, K, V = (cases.unit_rows(X) for X in rng.standard_normal((3, 30, 4)))
    A = ropecy.AttentionMatrix(Q, K, causal=True, method=method)
    O = ropecy.attention(Q, K, V, causal=True, method=method)
    np.testing.assert_allclose((A @ V) / A.D[:, None], O, atol=1e-12 if method == "exact" else 2e-3)


def test_product_of_the_wrong_shape_is_refused(rng):
    A = ropecy.AttentionMatrix(rng.standard_normal((9, 4)), rng.standard_normal((7, 4)))
    for X in (np.ones(9), np.ones((9, 2))):
        with pytest.raises(ValueError, match="7"):
            A @ X
    with pytest.raises(ValueError, match="9"):
        A.T @ np.ones(7)
    with pytest.raises(ValueError, match=r"\bX\b"):
        A @ np.full(7, np.nan)


@pytest.mark.parametrize("name", [*cases.SPECS])
def test_exact_lse_is_the_oracle(name, rng, ours):
    case = cases.make(name, rng)
    expected = oracle.attention(**case).lse
    _, lse = ropecy.attention(**ours(case), method="exact", return_lse=True)
    assert lse.dtype == np.float64
    assert lse.shape == expected.shape
    np.testing.assert_allclose(lse, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", cases.POLYNOMIAL)
def test_polynomial_lse_keeps_its_relative_error(name, rng, ours):
    case = cases.make(name, rng, np.float32, unit=True)
    expected = oracle.attention(**case).lse
    _, lse = ropecy.attention(**ours(case), method="polynomial", eps=1e-2, return_lse=True)
    assert lse.dtype == np.float64
    seen = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    e = 0.02 / (1 + 1e-4)
    np.testing.assert_allclose(lse[seen], expected[seen], rtol=0, atol=-np.log1p(-e) + 1e-5)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("causal", [False, True])
def test_partial_attentions_merge(method, causal, rng, ours):
    case = cases.make("long", rng, unit=True)
    case["R"], case["causal"], case["eps"] = ours(case)["R"], causal, 1e-3
    K, V = case.pop("K"), case.pop("V")
    n = case["Q"].shape[-2]
    parts = []
    for first, last in [(0, 100), (100, 130), (130, K.shape[-2])]:
        # Key j of a part is key j + first of the whole: masks go by index, so the queries move back by first.
        moved = {"q_offset": -first, "q_positions": np.arange(n), "k_positions": np.arange(first, last)}
        part = {"K": K[first:last], "V": V[first:last]}
        parts.append(ropecy.attention(**case, **part, **moved, method=method, return_lse=True))
    whole, lse = ropecy.attention(**case, K=K, V=V, method="exact", return_lse=True)
    merged_lse = np.logaddexp.reduce([part[1] for part in parts])
    merged = sum(np.exp(part[1] - merged_lse)[:, None] * part[0] for part in parts)
    tolerance = 1e-12 if method == "exact" else 1e-2
    np.testing.assert_allclose(merged_lse, lse, atol=tolerance)
    np.testing.assert_allclose(merged, whole, atol=tolerance)


def test_what_is_returned_comes_in_order(rng):
    Q, K, V = rng.standard_normal((3, 6, 4))
    O, certificate, lse = ropecy.attention(Q, K, V, return_certificate=True, return_lse=True)
    assert O.shape == (6, 4)
    assert certificate.engine in ("exact", "polynomial")
    assert lse.shape == (6,)
