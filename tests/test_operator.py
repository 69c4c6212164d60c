"""AttentionMatrix as a linear operator: what NumPy and SciPy call of one, and what is certified of a product."""

import cases
import numpy as np
import oracle
import pytest

import ropecy

NAMES = ["plain", "prime_lengths", "one_key", "causal_more_keys", "causal_more_queries", "causal_empty_rows", "window"]
NAMES += ["key_mask_per_row", "bias_table_clipped", "alibi_per_head", "near_causal", "grouped_queries"]
NAMES += ["weight_per_head", "positions_per_row", "everything"]
DTYPES = [np.float64, np.float32]


def matrix_and_dense(name, rng, ours, dtype=np.float64, **how):
    """An AttentionMatrix, and A itself in float64."""
    case = {key: value for key, value in cases.make(name, rng, dtype, unit=True).items() if key != "W_V"}
    dense = oracle.attention(**case).A
    del case["V"]
    return ropecy.AttentionMatrix(**ours(case), **how), dense


def kernel(rng, n=40, dtype=np.float64, **how):
    """A symmetric positive definite A, and A itself."""
    Q = cases.unit_rows(rng.standard_normal((n, 4))).astype(dtype)
    return ropecy.AttentionMatrix(Q, Q, **how), np.exp(Q.astype(float) @ Q.T.astype(float) / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_products_from_both_sides(name, dtype, rng, ours):
    A, dense = matrix_and_dense(name, rng, ours, dtype, method="exact")
    n, n_k = dense.shape[-2:]
    tolerance = {"rtol": 0, "atol": (1e-11 if dtype == np.float64 else 1e-4) * dense.sum(axis=(-1, -2)).max()}
    assert A.ndim == dense.ndim
    for x, transposed in ((rng.standard_normal(n_k), False), (rng.standard_normal(n), True)):
        x = x.astype(dtype)
        expected = np.swapaxes(dense, -1, -2) @ x if transposed else dense @ x
        found = [A.rmatvec(x), A.T.dot(x), x @ A] if transposed else [A.matvec(x), A.dot(x)]
        X = np.stack([x, -x], axis=-1)
        found += [(A.rmatmat(X) if transposed else A.matmat(X))[..., 0]]
        if transposed:
            found += [(X.T @ A)[..., 0, :]]
        for y in found:
            assert y.dtype == dtype
            np.testing.assert_allclose(y, expected, **tolerance)


@pytest.mark.parametrize("method", ["exact", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_diagonal(name, method, rng, ours):
    A, dense = matrix_and_dense(name, rng, ours, method=method)
    expected = np.diagonal(dense, axis1=-2, axis2=-1)
    np.testing.assert_allclose(A.diagonal(), expected, rtol=1e-13)
    np.testing.assert_allclose(A.T.diagonal(), expected, rtol=1e-13)


def test_diagonal_of_a_family(rng):
    Q, K = rng.uniform(-1, 1, (9, 3)), rng.uniform(-1, 1, (7, 3))
    support = np.array([[0, 1], [2, 0], [1, 1], [0, 0]])
    family = ropecy.RelativeFamily(rng.standard_normal((15, 4)), n_k=7, support=support)
    A = ropecy.AttentionMatrix(Q, K, family, q_offset=2, method="exact")
    np.testing.assert_allclose(A.diagonal(), np.diagonal(A.toarray()), rtol=1e-13)


@pytest.mark.parametrize("q_offset", [0, 2, 3])
def test_diagonal_beside_a_near_scale(q_offset, rng):
    Q, K = rng.uniform(-1, 1, (2, 9, 3))
    A = ropecy.AttentionMatrix(Q, K, near=(3, 5.0), q_offset=q_offset, method="exact")
    np.testing.assert_allclose(A.diagonal(), np.diagonal(A.toarray()), rtol=1e-13)


def test_diagonal_of_what_a_mask_hides_is_0_whatever_the_bias(rng):
    Q = rng.standard_normal((3, 2))
    bias, mask = ropecy.RelativeBias(np.array([0.0, 800.0, 0.0])), np.array([True, False, True])
    A = ropecy.AttentionMatrix(Q, Q, bias=bias, key_mask=mask)
    np.testing.assert_array_equal(A.diagonal(), [np.inf, 0, np.inf])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_and_shifted(dtype, rng):
    A, dense = kernel(rng, dtype=dtype, method="exact")
    X = rng.standard_normal((40, 2)).astype(dtype)
    M, expected = 3 * (A * np.float64(2)).add_diagonal(0.5), 6 * dense + 1.5 * np.eye(40)
    atol = 1e-11 if dtype == np.float64 else 1e-3
    assert M.shape == A.shape and M.dtype == M.T.dtype == (M @ X).dtype == dtype
    np.testing.assert_allclose(M @ X, expected @ X, atol=atol)
    np.testing.assert_allclose(X.T @ M, X.T @ expected, atol=atol)
    np.testing.assert_allclose(M.T @ X, expected.T @ X, atol=atol)
    np.testing.assert_allclose(M.matvec(X[:, 0]), expected @ X[:, 0], atol=atol)
    np.testing.assert_allclose(M.diagonal(), np.diagonal(expected), rtol=1e-12 if dtype == np.float64 else 1e-6)
    np.testing.assert_allclose(M.toarray(), expected, atol=atol)


def test_only_a_square_matrix_has_a_diagonal_added(rng):
    A = ropecy.AttentionMatrix(rng.standard_normal((9, 4)), rng.standard_normal((7, 4)))
    with pytest.raises(ValueError, match=r"shift: got 0\.5, wants a square matrix .* \(9, 7\)"):
        A.add_diagonal(0.5)
    for wrong in (lambda: A * np.ones(7), lambda: A * A, lambda: "a" * A, lambda: 1j * A, lambda: A + 1):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match=r"factor: got nan"):
        np.nan * A
    with pytest.raises(ValueError, match=r"X: got shape \(2, 7\), wants \(9,\) or \(\.\.\., m, 9\)"):
        np.ones((2, 7)) @ A


def test_an_array_is_made_on_demand_alone(rng):
    A, _ = kernel(rng)
    for M in (A, A.add_diagonal(1.0)):
        with pytest.raises(TypeError, match=r"of shape \(40, 40\) holds no array: .*toarray"):
            np.asarray(M)
        with pytest.raises(TypeError, match="toarray"):
            np.linalg.norm(M)


def test_an_array_past_memory_is_refused_before_the_work():
    Q = np.zeros((2**20, 2), np.float32)
    with pytest.raises(MemoryError, match=r"an array of shape \(1048576, 1048576\) needs .* GiB"):
        ropecy.AttentionMatrix(Q, Q).toarray()


def test_solvers_choose_their_dtype(rng):
    A, dense = kernel(rng, dtype=np.float32)
    for x in (rng.standard_normal(40), np.arange(40), [1] * 40, rng.random(40) < 0.5):
        y = A.matvec(x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, dense @ np.asarray(x, float), rtol=0, atol=2e-3 * dense.sum(axis=1).max() * 40)
    with pytest.raises(TypeError, match="x: got dtype complex128"):
        A.matvec(np.ones(40, complex))
    with pytest.raises(TypeError, match="X: got dtype float64, wants float32"):
        A @ np.ones(40)


def conjugate_gradients(A, b, steps):
    """x with A x = b, by products with A alone."""
    x, r = np.zeros_like(b), b.copy()
    p, square = r.copy(), r @ r
    for _ in range(steps):
        Ap = A.matvec(p)
        step = square / (p @ Ap)
        x, r = x + step * p, r - step * Ap
        square, before = r @ r, square
        p = r + square / before * p
    return x


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_a_system_is_solved(method, rng):
    A, dense = kernel(rng, method=method, eps=1e-9)
    b = rng.standard_normal(40)
    x = conjugate_gradients(A.add_diagonal(0.3), b, 40)
    np.testing.assert_allclose(x, np.linalg.solve(dense + 0.3 * np.eye(40), b), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scipy_takes_it(dtype, rng):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    A, dense = kernel(rng, dtype=dtype, method="exact")
    atol, b = 1e-9 if dtype == np.float64 else 1e-2, rng.standard_normal(40)
    shifted = dense + 0.3 * np.eye(40)
    for M in (A.add_diagonal(0.3), linalg.aslinearoperator(A.add_diagonal(0.3))):
        x, status = linalg.cg(M, b, rtol=1e-11 if dtype == np.float64 else 1e-5)
        assert status == 0
        np.testing.assert_allclose(x, np.linalg.solve(shifted, b), atol=atol)
    operator = linalg.aslinearoperator(2 * A)
    X = rng.standard_normal((40, 3))
    np.testing.assert_allclose(operator @ X, 2 * dense @ X, atol=atol)
    np.testing.assert_allclose(operator.rmatmat(X), 2 * dense.T @ X, atol=atol)
    np.testing.assert_allclose((operator + linalg.aslinearoperator(A)).matvec(b), 3 * dense @ b, atol=atol)
    largest = linalg.eigsh(A, k=1, return_eigenvectors=False)
    np.testing.assert_allclose(largest, np.linalg.eigvalsh(dense)[-1:], rtol=1e-9 if dtype == np.float64 else 1e-4)


@pytest.mark.parametrize("method", ["exact", "polynomial", "fft"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "causal", "batch_and_heads", "key_mask", "prime_lengths"])
def test_the_certificate_of_a_product_holds(name, dtype, method, rng, ours):
    eps = 1e-2
    A, dense = matrix_and_dense(name, rng, ours, dtype, method=method, eps=eps)
    for M, D in ((A, dense), (A.T, np.swapaxes(dense, -1, -2))):
        for X in (rng.standard_normal((D.shape[-1], 3)), 1 + 1e-3 * rng.standard_normal((D.shape[-1], 1))):
            X = X.astype(dtype)
            product, certificate = M.dot(X, return_certificate=True)
            np.testing.assert_array_equal(product, M @ X)
            assert certificate.engine == method and certificate.rounding > 0
            assert (certificate.truncation == 0) == (method == "exact") and certificate.truncation <= 2 * eps
            size = np.abs(X.astype(float))
            allowed = certificate.truncation * (D @ size)
            allowed += certificate.rounding * D.sum(axis=-1, keepdims=True) * size.max()
            assert np.all(np.abs(product - D @ X.astype(float)) <= allowed)


def test_the_certificate_of_nothing(rng):
    A = ropecy.AttentionMatrix(rng.standard_normal((4, 3)), np.zeros((0, 3)))
    product, certificate = A.dot(np.zeros((0, 2)), return_certificate=True)
    assert product.shape == (4, 2) and certificate.engine == "exact"
    with pytest.raises(TypeError, match="return_certificate"):
        A.dot(np.zeros((0, 2)), return_certificate=1)
