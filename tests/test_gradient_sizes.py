"""Gradients of arrays of any size: finite, and with their digits, where their dtype can hold them."""

import numpy as np
import oracle
import pytest
from conftest import relative_bias, relative_family

import ropecy

F4, F8 = np.float32, np.float64

# Powers of ten, of float32, of Q, W_Q, V and dO; K is such that scores are about 1.
SIZES = [
    (30, 0, 0, 0),
    (-30, 0, 0, 0),
    (0, 30, 0, 0),
    (25, 10, -30, 20),
    (-25, -10, 30, -30),
    (-30, 0, 0, 30),
    (-20, -15, 30, 25),
    (25, -30, -25, 25),
    (-25, 20, -25, -10),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("method, bias", [("exact", None), ("exact", 0.1), ("polynomial", None), ("polynomial", 0.1)])
def test_gradients_through_projections_are_finite_where_the_truth_is(method, bias, dtype, sizes, rng):
    # In float64, eight times as many powers of ten.
    of_q, of_w, of_v, of_do = (10.0 ** (e * (1 if dtype == F4 else 8)) for e in sizes)
    Q, K, V, dO = rng.uniform(-0.5, 0.5, (4, 40, 3))
    W_Q, W_K, W_V = rng.uniform(-1, 1, (3, 3, 3))
    of_k = np.clip(1 / of_q / of_w, 1e-37 if dtype == F4 else 1e-300, 1e37 if dtype == F4 else 1e300)
    case = {"Q": Q * of_q, "K": K * of_k, "V": V * of_v, "W_Q": W_Q * of_w, "W_K": W_K, "W_V": W_V}
    case = {name: X.astype(dtype) for name, X in case.items()}
    dO = (dO * of_do).astype(dtype)
    if bias is not None:
        case["bias"] = oracle.Alibi(np.array(bias))
    with np.errstate(over="ignore"):
        expected = oracle.attention(**case, dtype=np.longdouble).backward(dO)
    ours = case if bias is None else case | {"bias": relative_bias(case["bias"])}
    g = ropecy.attention_vjp(**ours, method=method, eps=1e-4, causal=False)[1](dO)
    least, most = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)
    checked = 0
    for name, X in expected.items():
        size = np.abs(X).max()
        if name == "dbias":
            size = max(size, np.abs(case["V"]).max() * np.abs(dO).astype(np.longdouble).sum())
        if 1e6 * least < size < most / 4:
            checked += 1
            off = np.abs(getattr(g, name).astype(np.longdouble) - X).max()
            assert off <= (1e-4 if method == "exact" else 1e-2) * size, name
    assert checked


def test_heads_of_unlike_sizes_each_have_their_digits(rng):
    Q, K, V, dO = rng.uniform(-1, 1, (4, 3, 40, 4)).astype(F4)
    by = np.array([1e30, 1.0, 1e-30], F4)[:, None, None]
    g = ropecy.attention_vjp(Q * by, K / by, V, method="exact")[1](dO)
    expected = oracle.attention(Q * by, K / by, V).backward(dO)
    for name, X in expected.items():
        size = np.abs(X).max(axis=(1, 2), keepdims=True)
        assert np.all(np.abs(getattr(g, name) - X) <= 1e-5 * size), name


@pytest.mark.parametrize("support", [None, np.array([[0, 0], [1, 1]])])
def test_values_gradients_by_transforms_of_levels_beside_columns_without_a_gradient(support, rng):
    # A steep bias and hidden keys: of some rows the best key is 60 nats below that of others.
    n, d = 300, 1 if support is None else 2
    Q, K = rng.uniform(-0.5, 0.5, (2, n, d))
    V = 0.1 + 0.01 * np.isin(np.arange(n), (0, n // 2))[:, None] * np.ones(3)
    dO = rng.uniform(-1, 1, (n, 3))
    keep = rng.random(n) < 0.5
    values = rng.uniform(-1, 1, (2 * n - 1, *((d, d) if support is None else (2,))))
    family, bias = oracle.Family(values, n_k=n, support=support), oracle.Alibi(np.array(18.0))
    case = {"Q": Q, "K": K, "V": V, "scale": 1.0, "key_mask": keep}
    ours = case | {"R": relative_family(family), "bias": relative_bias(bias)}
    O, vjp = ropecy.attention_vjp(**ours, method="fft", eps=1e-2)
    g = vjp(dO)
    dense = oracle.attention(**case, R=family, bias=bias, dtype=np.longdouble)
    e = g.certificate.error
    allowed = 2 * e / (1 - e) * np.swapaxes(dense.P, -1, -2) @ np.abs(dO)
    assert np.all(np.abs(g.dV - dense.backward(dO)["dV"]) <= allowed + 1e-10)


@pytest.mark.parametrize("family", [False, True])
@pytest.mark.parametrize("method", ["exact", "fft", "polynomial"])
def test_offsets_at_which_all_keys_are_hidden_have_no_gradient(method, family, rng):
    n, n_k = 50, 40
    if family and method == "polynomial":
        pytest.skip("the polynomial engine does no families")
    Q, K, V, dO = (rng.uniform(-0.5, 0.5, (2, rows, 2)) for rows in (n, n_k, n_k, n))
    keep = np.ones((2, n_k), bool)
    keep[:, :4], keep[:, 33:], keep[0, :7] = False, False, False
    R = ropecy.RelativeFamily(rng.uniform(-1, 1, (n + n_k - 1, 2, 2)), n_k=n_k) if family else None
    bias = ropecy.RelativeBias(np.linspace(-1, 0, 2 * n - 1))
    g = ropecy.attention_vjp(Q, K, V, R, bias=bias, key_mask=keep, method=method)[1](dO)
    # Of offsets j - i that occur, from -(n - 1) to n_k - 1, these have keys 0 to 3, or 33 to 39, and no others.
    t = np.arange(-(n - 1), n)
    assert np.array_equal(g.dbias != 0, (t >= 4 - (n - 1)) & (t <= 32))
    if family:
        t = np.arange(-(n_k - 1), n)
        assert np.array_equal(g.dR.any(axis=(1, 2)), (t >= -32) & (t <= n - 1 - 4))


@pytest.mark.parametrize("name", ["Q", "K"])
@pytest.mark.parametrize("method", ["exact", "polynomial", "fft", "by moments", "near and far"])
def test_scores_of_projections_that_cancel_are_certified_by_every_engine(method, name, rng):
    n, d = (900, 2) if method == "by moments" else (60, 2)
    Q, K, V = rng.uniform(-1, 1, (3, n, d))
    case = {"Q": Q, "K": K, "V": V, "eps": 1e-3}
    far = np.full((n, d), 1e8)
    case[name] = np.concatenate([case[name] + far, far], axis=-1)
    case[f"W_{name}"] = 1.1 * np.concatenate([np.eye(d), -np.eye(d)])
    dense = oracle.attention(**{key: X for key, X in case.items() if key != "eps"}, dtype=np.longdouble)
    how = {"method": "polynomial" if method in ("by moments", "near and far") else method}
    if method == "near and far":
        how["bias"] = ropecy.RelativeBias.alibi(0.01)
        dense = oracle.attention(
            **{key: X for key, X in case.items() if key != "eps"},
            bias=oracle.Alibi(np.array(0.01)),
            dtype=np.longdouble,
        )
    for eps in (1e-3, 1e-6, 1e-12):
        try:
            O, certificate = ropecy.attention(**case | how | {"eps": eps}, return_certificate=True)
        except ropecy.BoundedEntryError:
            assert eps < 1e-6
            continue
        off = np.abs(O - dense.O).max() / np.ptp(V, axis=0).max()
        assert off <= certificate.error
        assert certificate.rounding >= 1e-9


@pytest.mark.filterwarnings("ignore::ropecy.AccuracyWarning")
@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("keys", ["zero", "of the size that scales leave"])
@pytest.mark.parametrize("power", [38, -38])
@pytest.mark.parametrize("near, bias", [(True, None), (True, 0.1), (False, None), (False, 0.1)])
def test_gradients_beside_scales_of_any_size(near, bias, power, keys, dtype, rng):
    Q, K, V, dO = rng.uniform(-1, 1, (4, 40, 3))
    scale = 10.0 ** (power if dtype == F4 else 8 * power)
    size = 0.0 if keys == "zero" else 1 / scale
    if dtype == F4 and size:
        # Both take their part, for float32 holds no reciprocal of 1e38.
        Q, size = Q * size**0.5, size**0.5
    of_values = 10.0 ** (-30 if dtype == F4 else -240)
    case = {"Q": Q, "K": K * size, "V": V * of_values, "W_V": rng.uniform(-1, 1, (3, 3))}
    case = {name: X.astype(dtype) for name, X in case.items()}
    case |= {"near": (9, scale), "scale": scale} if near else {"scale": scale}
    if bias is not None:
        case["bias"] = oracle.Alibi(np.array(bias))
    dO = dO.astype(dtype)
    expected = oracle.attention(**case, dtype=np.longdouble).backward(dO)
    ours = case if bias is None else case | {"bias": relative_bias(case["bias"])}
    g = ropecy.attention_vjp(**ours, method="exact")[1](dO)
    for name in ("dQ", "dK", "dV", "dW_V"):
        X, limit = expected[name], np.finfo(dtype)
        if np.abs(X).max() < limit.max / 4:
            off = np.abs(getattr(g, name).astype(np.longdouble) - X).max()
            assert off <= 1e-4 * np.abs(X).max() + 8 * limit.smallest_subnormal, name
