"""What hunts found, each reduced to a few lines."""

import numpy as np
import oracle
import pytest

import ropecy

F4, F8 = np.float32, np.float64


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_projected_constant_is_rounded_when_it_is_stored(name, rng):
    dtype = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    Q, K = rng.uniform(-1, 1, (2, 20, 4)).astype(dtype)
    V, W_V = np.ones((20, 2), dtype), np.array([[1.0], [2.0**-9 + 2.0**-11]], dtype)
    O, certificate = ropecy.attention(Q, K, V, W_V=W_V, return_certificate=True)
    true = float((V.astype(F8) @ W_V.astype(F8))[0, 0])
    off = np.abs(O.astype(F8) - true).max() / true
    assert 0 < off <= certificate.error
    assert certificate.storing > 0


@pytest.mark.parametrize("name", ["Q", "K"])
def test_heads_of_unlike_size_whose_projections_cancel(name, rng):
    # Of the head that is small less is left than of the other.
    Q, K, V = rng.uniform(-1, 1, (3, 2, 40, 2))
    case, size = {"Q": Q, "K": K, "V": V}, np.array([1e-4, 1e4])[:, None, None]
    other = "K" if name == "Q" else "Q"
    case[other] = case[other] / size
    X = case[name] * size
    far = np.full_like(X, 1e8)
    case[name] = np.concatenate([X + far, far], axis=-1)
    case[f"W_{name}"] = 1.1 * np.concatenate([np.eye(2), -np.eye(2)])
    O, certificate = ropecy.attention(**case, method="exact", return_certificate=True)
    dense = oracle.attention(**case, dtype=np.longdouble)
    off = np.abs(O - dense.O).max() / np.ptp(V, axis=1).max()
    assert 1e-12 < off <= certificate.error


def test_columns_of_unlike_size_beside_a_family_whose_projection_cancels(rng):
    Q, K, V = rng.uniform(-1, 1, (3, 40, 2))
    by = np.array([1e-7, 1e7])
    far = np.full_like(K, 1e8)
    case = {"Q": Q / by, "K": np.concatenate([K * by + far, far], axis=-1), "V": V}
    case["W_K"] = 1.1 * np.concatenate([np.eye(2), -np.eye(2)])
    values, support = rng.uniform(-1, 1, (79, 2)), np.array([[0, 0], [1, 1]])
    family = oracle.Family(values, n_k=40, support=support)
    dense = oracle.attention(**case, R=family, dtype=np.longdouble)
    O, certificate = ropecy.attention(
        **case, R=ropecy.RelativeFamily(values, n_k=40, support=support), method="exact", return_certificate=True
    )
    off = np.abs(O - dense.O).max() / np.ptp(V, axis=0).max()
    assert off <= certificate.error


def test_subnormal_numbers_of_float64_are_stored_with_few_digits(rng):
    Q, K, V = rng.uniform(-1, 1, (3, 40, 2))
    V *= 1e-313
    O, certificate = ropecy.attention(Q, K, V, method="exact", return_certificate=True)
    dense = oracle.attention(Q, K, V, dtype=np.longdouble)
    off = np.abs(O - dense.O).max() / np.ptp(V, axis=0).max()
    assert 1e-13 < off <= certificate.error


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("family", [False, True])
def test_the_gradient_of_a_near_scale_of_any_size_is_finite(family, dtype, rng):
    Q, K, V, dO = rng.uniform(-1, 1, (4, 30, 4)).astype(dtype)
    R = ropecy.RelativeFamily(rng.uniform(-1, 1, (59, 4, 4)), n_k=30) if family else None
    for near in (1e2, 1e8, 1e30, 3e38):
        g = ropecy.attention_vjp(Q, K, V, R, near=(4, near), method="exact")[1](dO)
        # Of the weights in a row one is 1 and the others 0, but where two keys are as good as each other.
        assert abs(g.dscale_near) < (1e-1 if near == 1e2 else 1e-5)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_gradient_of_a_bias_past_the_largest_number_is_inf_without_a_warning(rng):
    Q, K, V = rng.uniform(-1, 1, (3, 40, 2))
    g = ropecy.attention_vjp(Q, K, 1e307 * V, bias=ropecy.RelativeBias.alibi(0.1), method="exact")[1](1e10 * V)
    assert np.isinf(g.dbias)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", ["auto", "polynomial"])
def test_sums_of_many_values_at_the_largest_number_warn_of_nothing(method, rng):
    n = 40_000
    Q, K = rng.uniform(-0.1, 0.1, (2, n, 1))
    V = 1.7e308 * rng.choice([-1.0, 1.0], (n, 1))
    V[: n // 2], V[n // 2 :] = np.abs(V[: n // 2]), -np.abs(V[n // 2 :])
    O = ropecy.attention(Q, K, V, method=method, eps=1e-2)
    assert np.isfinite(O).all()
