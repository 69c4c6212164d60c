"""RelativeFamily: W_{i-j} in the place of R, by both engines, and what is refused."""

import pickle

import cases
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import chosen, measure, problem_for

import ropecy
from ropecy.engines.fft import family as family_fft
from ropecy.engines.fft import symbol

ROPE_PAIRS = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1), (1, 3), (3, 1), (3, 3)]

# Shapes as in cases.SPECS; `family` says which: pairs (None for all), offsets (None for all there are), n_k, zeros.
SPECS = {
    "dense": {"d": 2, "family": {}},
    "sparse": {"d": 4, "family": {"support": [(0, 1), (2, 2), (3, 0)]}},
    "one_token": {"n": 1, "d": 2, "family": {}},
    "one_column": {"d": 1, "family": {}},
    "lengths": {"n": 31, "n_k": 44, "d": 2, "d_v": 5, "family": {}},
    "lengths_the_other_way": {"n": 44, "n_k": 31, "d": 2, "d_v": 1, "family": {"support": [(0, 1), (1, 1)]}},
    "clipped": {"n": 30, "d": 2, "family": {"M": 9, "n_k": 5}},
    "clipped_far": {"n": 12, "d": 2, "family": {"M": 7, "n_k": 2}, "options": {"q_offset": 40}},
    "one_matrix": {"n": 12, "d": 2, "family": {"M": 1, "n_k": 1}},
    "zeros": {"d": 3, "family": {"zeros": True}},
    "all_zeros": {"d": 2, "family": {"zeros": "all"}},
    "causal": {"d": 2, "family": {}, "options": {"causal": True}},
    "causal_offset": {
        "n": 15,
        "n_k": 40,
        "d": 2,
        "family": {"M": 80, "n_k": 40},
        "options": {"causal": True, "q_offset": 25},
    },
    "empty_rows": {
        "n": 17,
        "n_k": 9,
        "d": 2,
        "family": {"M": 30, "n_k": 12},
        "options": {"causal": True, "q_offset": -4},
    },
    "window": {"n": 59, "d": 2, "family": {}, "options": {"window": 7}},
    "window_two_sided": {"n": 59, "n_k": 50, "d": 2, "family": {}, "options": {"window": (5, 3)}},
    "key_mask": {"n": 29, "n_k": 37, "d": 2, "family": {}, "mask": "one axis"},
    "key_mask_per_row": {"q_lead": (2, 3), "n": 11, "n_k": 13, "d": 2, "family": {}, "mask": "per row"},
    "bias": {"n": 23, "n_k": 27, "d": 2, "family": {}, "bias": ("table", (9,)), "options": {"causal": True}},
    "alibi_per_head": {"q_lead": (2, 3), "n": 17, "d": 2, "family": {}, "bias": ("alibi", (3,))},
    "bias_per_grouped_head": {"q_lead": (4,), "k_lead": (2,), "n": 17, "d": 2, "family": {}, "bias": ("table", (4, 7))},
    "grouped": {"q_lead": (2, 6), "k_lead": (2, 2), "n": 13, "n_k": 19, "d": 2, "family": {}},
    "projections": {
        "n": 21,
        "d": 5,
        "d_v": 6,
        "family": {"d": 2},
        "project": {"W": (2, 2), "W_Q": (5, 2), "W_K": (5, 2), "W_V": (6, 3)},
        "options": {"causal": True},
    },
    "negative_scale": {"d": 2, "family": {}, "options": {"scale": -0.3}},
    "no_scale": {"d": 2, "family": {}, "options": {"scale": 0.0}},
    "near": {"d": 2, "family": {}, "options": {"near": (6, 2.0)}},
    "blocks": {"n": 150, "n_k": 700, "d": 2, "family": {}, "options": {"causal": True, "q_offset": 560}},
}


def make(name, rng, dtype=np.float64):
    """The keyword arguments of the case; scores are within about 1."""
    spec = SPECS[name]
    cases.SPECS["family"] = spec
    try:
        case = cases.make("family", rng, dtype, unit=True)
    finally:
        del cases.SPECS["family"]
    family = spec["family"]
    d = family.get("d", case["K"].shape[-1])
    M = family.get("M", case["Q"].shape[-2] + case["K"].shape[-2] - 1)
    support = family.get("support")
    values = rng.uniform(-0.5, 0.5, (M, d, d) if support is None else (M, len(support)))
    if family.get("zeros"):
        values[:, 1 if family["zeros"] is True else slice(None)] = 0
    case["R"] = oracle.Family(values, family.get("n_k"), None if support is None else np.array(support))
    return case


def _gradients(case, ours, dO, **options):
    O, vjp = ropecy.attention_vjp(**ours(case), **options)
    g = vjp(dO)
    names = ["dQ", "dK", "dV", "dR", *("d" + name for name in ("W", "W_Q", "W_K", "W_V", "bias") if name in case)]
    return O, {name: getattr(g, name) for name in names}


@pytest.mark.parametrize("name", SPECS)
def test_exact_float64_is_the_oracle(name, rng, ours):
    case = make(name, rng)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    O, gradients = _gradients(case, ours, dO, method="exact")
    np.testing.assert_allclose(O, dense.O, rtol=0, atol=1e-12)
    expected = dense.backward(dO)
    assert set(gradients) == set(expected)
    for argument, gradient in gradients.items():
        tolerance = 1e-12 * (1.0 + np.abs(expected[argument]).max())
        np.testing.assert_allclose(gradient, expected[argument], rtol=0, atol=tolerance, err_msg=argument)
    assert gradients["dR"].shape == case["R"].values.shape
    _, lse = ropecy.attention(**ours(case), method="exact", return_lse=True)
    np.testing.assert_allclose(lse, dense.lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_exact_float32_is_as_good_as_plain_numpy(name, rng, ours):
    case = make(name, rng, np.float32)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    plain = oracle.attention(**case, dtype=np.float32)
    O, gradients = _gradients(case, ours, dO, method="exact")
    assert O.dtype == np.float32 and gradients["dR"].dtype == np.float64
    floor = 4 * 2.0**-24 * (1 + np.abs(dense.O).max())
    assert np.abs(O - dense.O).max() <= 2 * np.abs(plain.O - dense.O).max() + floor
    expected, rounded = dense.backward(dO), plain.backward(dO)
    for argument, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected[argument])
        floor = 8 * 2.0**-24 * (np.sqrt(case["Q"].size) + np.linalg.norm(expected[argument]))
        assert error <= 3 * np.linalg.norm(rounded[argument] - expected[argument]) + floor, argument


def test_gradients_against_finite_differences(rng):
    Q, K, V = (rng.standard_normal(shape) for shape in ((6, 3), (8, 3), (8, 2)))
    dO = rng.standard_normal((6, 2))
    for support, clip in ((None, 0), ([(0, 2), (1, 1)], 0), (None, 9)):
        values = rng.standard_normal((13 - clip, 3, 3) if support is None else (13, len(support)))
        n_k = 8 if not clip else 2
        given = {"Q": Q, "K": K, "V": V, "R": values}

        def value(given, support=support, n_k=n_k):
            R = ropecy.RelativeFamily(given["R"], n_k=n_k, support=support)
            return (dO * ropecy.attention(given["Q"], given["K"], given["V"], R, causal=True, q_offset=2)).sum()

        R = ropecy.RelativeFamily(values, n_k=n_k, support=support)
        g = ropecy.attention_vjp(Q, K, V, R, causal=True, q_offset=2)[1](dO)
        for name, X in given.items():
            for index in np.ndindex(X.shape):
                up, down = X.copy(), X.copy()
                up[index] += 1e-5
                down[index] -= 1e-5
                expected = (value({**given, name: up}) - value({**given, name: down})) / 2e-5
                assert getattr(g, "d" + name)[index] == pytest.approx(expected, rel=1e-5, abs=1e-9), (name, index)


def test_rotations_are_a_member(rng):
    n, n_k, d = 40, 33, 4
    Q, K, V = rng.standard_normal((n, d)), rng.standard_normal((n_k, d)), rng.standard_normal((n_k, 2))
    R = ropecy.Rotary(d)
    dense = np.stack([R[-t] for t in range(-(n_k - 1), n)])
    sparse = np.stack([dense[:, a, b] for a, b in ROPE_PAIRS], axis=1)
    expected = ropecy.attention(Q, K, V, R, causal=True, method="exact")
    for family in (ropecy.RelativeFamily(dense), ropecy.RelativeFamily(sparse, n_k, ROPE_PAIRS)):
        np.testing.assert_allclose(ropecy.attention(Q, K, V, family, causal=True), expected, rtol=0, atol=1e-12)
        # Its blocks are orthogonal: the bound is that of Cauchy and Schwarz.
        bound = np.linalg.norm(Q, axis=1).max() * np.linalg.norm(K, axis=1).max() / d
        assert ropecy.plan(Q, K, family).certificate.bound >= bound * (1 - 1e-12)
        assert measure(problem_for(Q, K, K, family)).bound <= bound * (1 + 1e-9)


@settings(max_examples=60)
@given(st.data())
def test_bounds_hold(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, n_k, d, H = (data.draw(st.integers(1, most)) for most in (9, 9, 5, 2))
    Q, K = rng.standard_normal((H, n, d)), rng.standard_normal((H, n_k, d))
    pairs = np.argwhere(rng.random((d, d)) < 0.5)
    pairs = pairs if len(pairs) else np.array([[0, d - 1]])
    values = rng.standard_normal((n + n_k - 1, len(pairs))) * 10.0 ** rng.integers(-3, 3, len(pairs))
    family = oracle.Family(values, None, pairs)
    lo = data.draw(st.sampled_from([None, 0, 3]))
    t = np.arange(n_k) - np.arange(n)[:, None]
    allowed = np.ones(t.shape, bool) if lo is None else (t <= 0) & (t > -lo - 1)
    matrices = family.matrices(t, d, float)
    s = np.einsum("hia,ijab,hjb->hij", Q, matrices, K) / d
    size = np.einsum("hia,ijab,hjb->hij", abs(Q), abs(matrices), abs(K)) / d
    R, window = ropecy.RelativeFamily(values, support=pairs), None if lo is None else lo + 1
    if allowed.any():
        scores = measure(problem_for(Q, K, K, R, window=window))
        assert np.abs(np.where(allowed, s, 0)).max() <= scores.bound
        assert np.where(allowed, size, 0).max() <= scores.plain


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_certificate_holds(dtype, rng):
    for size in (1e-3, 1.0, 30.0):
        Q, K, V = (rng.standard_normal((200, 5)).astype(dtype) for _ in range(3))
        family = oracle.Family(size * rng.standard_normal((399, 5, 5)))
        R = ropecy.RelativeFamily(family.values)
        O, certificate = ropecy.attention(Q, K, V, R, method="exact", return_certificate=True)
        error = np.abs(O - oracle.attention(Q, K, V, family).O).max() / np.ptp(V, axis=0).max()
        assert error <= certificate.error


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_takes_what_overflows(dtype, rng):
    huge = float(np.sqrt(np.finfo(dtype).max)) * 8
    Q, K, V = (rng.standard_normal((20, 2)).astype(dtype) for _ in range(3))
    family = oracle.Family(rng.standard_normal((39, 2, 2)))
    Q64, K64 = (Q / dtype(64)).astype(float), K.astype(float)
    s = np.einsum("ia,ijab,jb->ij", Q64, family.matrices(np.arange(20) - np.arange(20)[:, None], 2, float), K64)
    expected = V[s.argmax(axis=1)]
    R = ropecy.RelativeFamily(family.values * huge if dtype == np.float64 else family.values)
    O, vjp = ropecy.attention_vjp(Q * dtype(huge), K * dtype(huge), V, R, method="exact")
    np.testing.assert_array_equal(O, expected)
    assert all(np.isfinite(getattr(vjp(O), name)).all() for name in ("dQ", "dK", "dV", "dR"))


FFT = [name for name in SPECS if "near" not in SPECS[name].get("options", {})]


def _diameter(points, allowed):
    """The largest distance between two of those points (..., m, d) that are allowed (..., m)."""
    distance = np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1)
    return np.where(allowed[..., :, None] & allowed[..., None, :], distance, 0).max(axis=(-2, -1), initial=0)


def _bounds(case, dense, dO, eps):
    """What eps promises of gradients: section 6.3 of the theory with e = 2 eps, W_t k_j in the place of keys."""
    e = 2 * eps
    zeta, c = 2 * e / (1 - e), abs(dense.scale)
    n, n_k, d = *dense.P.shape[-2:], dense.q.shape[-1]
    t = np.arange(n_k) - (np.arange(n)[:, None] + case.get("q_offset", 0))
    W = case["R"].matrices(t, d, float)
    keys = np.einsum("ijab,...jb->...ija", W, dense.k)
    queries = np.einsum("ijab,...ia->...ijb", W, dense.q)
    omega = dense.ranges((dO @ np.swapaxes(dense.v, -1, -2))[..., None])[..., 0]
    diameter = np.stack([_diameter(keys[..., i, :, :], dense.allowed[..., i, :]) for i in range(n)], axis=-1)
    pairs = zeta * dense.P * omega[..., None]
    entries = c * np.einsum("...ij,...ia,...jb->...ijab", pairs, abs(dense.q), abs(dense.k))
    bounds = {
        "dQ": np.broadcast_to((c * np.arctanh(e) / 4 * omega * diameter)[..., None], dense.q.shape),
        "dK": np.broadcast_to(
            c * np.einsum("...ij,...ij->...j", pairs, np.linalg.norm(queries, axis=-1))[..., None], dense.k.shape
        ),
        "dV": zeta * np.swapaxes(dense.P, -1, -2) @ np.abs(dO),
    }
    bounds = {name: oracle.collapse(bound, case[name[1:]].shape, dense.O.shape[:-2]) for name, bound in bounds.items()}
    bounds["dR"] = case["R"].gradient(entries.reshape((-1,) + entries.shape[-4:]).sum(axis=0), t)
    if "bias" in case:
        bounds["dbias"] = np.abs(case["bias"].gradient(pairs, t))
    return bounds


def _assert_certified(case, ours, eps, **options):
    dense = oracle.attention(**case)
    O, certificate, lse = ropecy.attention(
        **ours(case), method="fft", eps=eps, **options, return_certificate=True, return_lse=True
    )
    assert certificate.engine == "fft" and certificate.error <= eps
    rounding = certificate.rounding * np.ptp(dense.v, axis=-2).max() + 4 * np.finfo(O.dtype).eps * np.abs(dense.O)
    assert np.all(np.abs(O - dense.O) <= eps * dense.value_range + rounding)
    seen = dense.allowed.any(axis=-1)
    e = 2 * eps / (1 + eps * eps) + 1e-5 * (O.dtype == np.float32)
    assert np.all(np.abs(lse[seen] - dense.lse[seen]) <= 2 * e + 1e-9)
    assert np.all(lse[~seen] == -np.inf) and np.all(O[~seen] == 0)
    dO = cases.upstream(case, dense, np.random.default_rng(7))
    _, gradients = _gradients(case, ours, dO, method="fft", eps=eps, **options)
    expected = dense.backward(dO)
    if {"W", "W_Q", "W_K", "W_V"} & set(case):
        return certificate
    unit = (10 * certificate.rounding + 100 * np.finfo(O.dtype).eps) * (1 + np.ptp(dense.v, axis=-2).max())
    for name, bound in _bounds(case, dense, dO.astype(float), eps).items():
        cancelled = np.size(dense.P[..., 0]) if name in ("dR", "dbias") else 1
        assert gradients[name].shape == expected[name].shape
        error = np.abs(gradients[name] - expected[name])
        assert np.all(error <= bound + unit * cancelled * (1 + np.abs(expected[name]).max(initial=0))), name
    return certificate


PRECISIONS = [(np.float64, 1e-1), (np.float64, 1e-3), (np.float32, 1e-2)]


@pytest.mark.parametrize(
    ("name", "dtype", "eps"), [(name, *each) for name in FFT for each in PRECISIONS[-1 if name == "blocks" else 0 :]]
)
def test_fft_keeps_the_bounds(name, dtype, eps, rng, ours):
    _assert_certified(make(name, rng, dtype), ours, eps)


@pytest.mark.parametrize("name", ["dense", "sparse", "clipped", "zeros", "causal", "grouped", "bias_per_grouped_head"])
def test_fft_at_a_small_eps_is_the_oracle(name, rng, ours):
    case = make(name, rng)
    case["Q"] = case["Q"] / 2
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    expected = dense.backward(dO)
    _, gradients = _gradients(case, ours, dO, method="fft", eps=1e-6)
    for argument, gradient in gradients.items():
        tolerance = 1e-5 * np.linalg.norm(expected[argument]) + 1e-7
        assert np.linalg.norm(gradient - expected[argument]) <= tolerance, argument


@pytest.mark.parametrize("name", [name for name in FFT if name != "blocks"])
def test_fft_in_blocks_and_batches(name, rng, ours, monkeypatch):
    case = make(name, rng)
    n, dO = case["Q"].shape[-2] + case["K"].shape[-2], np.ones(oracle.attention(**case).O.shape)
    whole = _gradients(case, ours, dO, method="fft", eps=1e-3)
    monkeypatch.setattr(family_fft, "_BATCH_BYTES", 1)
    monkeypatch.setattr(family_fft, "_LANE_BYTES", 1)
    monkeypatch.setattr(symbol, "block_size", lambda *_: 32)
    cut = _gradients(case, ours, dO, method="fft", eps=1e-3)
    np.testing.assert_allclose(cut[0], whole[0], rtol=0, atol=1e-12)
    for argument, gradient in whole[1].items():
        np.testing.assert_allclose(cut[1][argument], gradient, rtol=0, atol=1e-11 * n, err_msg=argument)


@pytest.mark.parametrize("sizes", [(1e12, 1e-9), (1e-9, 1e12), (1e12, 1e-9, 0.0), (0.0, 1e-9, 1e12)])
@pytest.mark.parametrize("grad_sizes", [(1e12, 1e-9, 1.0), (1e-9, 1e12, 1e12), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0)])
def test_fft_keeps_columns_of_other_sizes_apart(sizes, grad_sizes, rng):
    n, d_v = 70, len(sizes)
    Q, K = 0.2 * rng.standard_normal((2, n, 3))
    V, dO = rng.standard_normal((2, n, d_v))
    V[7, 0], dO[9, 0] = 50, 50
    V, dO = V * sizes, dO * grad_sizes[:d_v]
    family = oracle.Family(0.3 * rng.standard_normal((2 * n - 1, 3, 3)))
    O, vjp = ropecy.attention_vjp(Q, K, V, ropecy.RelativeFamily(family.values), method="fft", eps=1e-10)
    dense = oracle.attention(Q, K, V, family)
    expected, g = dense.backward(dO), vjp(dO)
    assert np.all(np.abs(O - dense.O) <= vjp.certificate.error * np.ptp(V, axis=0))
    # Each column of dV by its own size; what is a sum over columns by the size of all.
    for name, axis in (("dQ", None), ("dK", None), ("dV", 0), ("dR", None)):
        error = np.abs(getattr(g, name) - expected[name]).max(axis=axis)
        assert np.all(error <= 1e-9 * np.abs(expected[name]).max(axis=axis)), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [32, 256])
def test_rounding_of_products_is_what_the_certificate_counts_with(block, causal, rng, monkeypatch):
    """Sums over keys against extended precision, each column in units of u log2(2 b) ||t|| ||v_c|| sum |c_t| x^t."""
    n, d = 200, 2
    found = []

    def noted(self, p, run=family_fft.Product.forward):
        found.append((self._v, p[0], run(self, p)))
        return found[-1][-1]

    monkeypatch.setattr(family_fft.Product, "forward", noted)
    monkeypatch.setattr(symbol, "block_size", lambda *_: block)
    t = np.arange(n) - np.arange(n)[:, None]
    for spread in (0.0, 1.0):
        Q, K = np.where(spread, rng.uniform(-1, 1, (2, n, d)), 1.0)
        family = oracle.Family(np.where(spread, rng.uniform(-0.3, 0.3, (2 * n - 1, d, d)), 0.3))
        V = np.stack([rng.standard_normal(n), 1e6 * (np.arange(n) == n - 1), 1 - 1e-3 * t[0], t[0] % 7], axis=1)
        ropecy.attention(Q, K, V, ropecy.RelativeFamily(family.values), method="fft", eps=1e-6, causal=causal)
        v, p, got = found.pop()
        s = np.einsum("ia,ijab,jb->ij", Q.astype(np.longdouble), family.matrices(t, d, np.longdouble), K) / d
        weights = np.polynomial.polynomial.polyval(s, np.array(p.coefficients, np.longdouble))
        weights[(t > 0) & causal] = 0
        exact = weights @ v[0, :, :n].T
        x = np.abs(Q).max(axis=0) @ np.abs(family.values).max(axis=0) @ np.abs(K).max(axis=0) / d
        absolute = sum(abs(c) * x**s for s, c in enumerate(p.coefficients))
        unit = 2.0**-53 * np.log2(2 * block) * np.sqrt(n if causal else 2 * n - 1) * absolute * family_fft.TOGETHER
        error = np.abs(got[0, 0].T - exact[:, : got.shape[2]]).max(axis=0)
        assert np.all(error <= symbol._NOISE * unit * np.linalg.norm(v[0, : got.shape[2]], axis=1)), spread


BIASES = {
    "rough over 40 nats": lambda t, rng: rng.uniform(-40, 0, t.size),
    "rising by 60 to the far past": lambda t, rng: -0.5 * t,
    "falling by 90 to the far past": lambda t, rng: 0.75 * t,
    "a constant of 900": lambda t, rng: 900 + rng.uniform(-1, 1, t.size),
    "steep on both sides": lambda t, rng: -7.0 * np.abs(t),
    "one tall entry": lambda t, rng: np.where(t == -20, 50.0, 0.0),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_biases_of_wide_range(name, causal, dtype, rng, ours):
    n = 80
    bias = oracle.Table(BIASES[name](np.arange(1 - n, n), rng))
    case = {**make("dense", rng, dtype), "bias": bias, "causal": causal}
    case.update({X: cases.unit_rows(rng.standard_normal((n, 2)).astype(dtype)) for X in "QKV"})
    case["R"] = oracle.Family(rng.uniform(-0.5, 0.5, (2 * n - 1, 2, 2)))
    _assert_certified(case, ours, 1e-2)


def test_rows_computed_exactly_have_gradients(rng):
    n = 300
    Q, K, V = 0.5 * rng.standard_normal((3, n, 2))
    family = ropecy.RelativeFamily(rng.uniform(-0.5, 0.5, (2 * n - 1, 2, 2)))
    options = {"bias": ropecy.RelativeBias(-0.3 * np.arange(1 - n, n)), "causal": True}
    found = chosen(Q, K, V, family, method="fft", eps=1e-5, **options).executable.symbol
    assert found.exact_rows and found.levels.shape[2] > 1
    O, vjp = ropecy.attention_vjp(Q, K, V, family, method="fft", eps=1e-5, **options)
    expected, expected_vjp = ropecy.attention_vjp(Q, K, V, family, method="exact", **options)
    np.testing.assert_allclose(O, expected, rtol=0, atol=1e-4)
    g, expected = vjp(V), expected_vjp(V)
    for name in ("dQ", "dK", "dV", "dbias", "dR"):
        difference = np.linalg.norm(getattr(g, name) - getattr(expected, name))
        assert difference <= 1e-4 * np.linalg.norm(getattr(expected, name)), name


def test_fft_outlier_in_the_last_row_does_not_leak(rng):
    Q, K, V = rng.standard_normal((3, 300, 2)).astype(np.float32)
    family = ropecy.RelativeFamily(0.2 * rng.standard_normal((599, 2, 2)))
    outlier = V.copy()
    outlier[-1] *= 1e6
    options = {"causal": True, "method": "fft", "eps": 1e-2}
    difference = ropecy.attention(Q, K, outlier, family, **options) - ropecy.attention(Q, K, V, family, **options)
    assert np.all(np.abs(difference[:-1]) <= 1e-6 + 1e6 * np.finfo(np.float32).eps)


@settings(max_examples=40)
@given(st.data())
def test_fft_certificate_holds_for_any_family(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, n_k, d = (data.draw(st.integers(1, most)) for most in (20, 20, 3))
    Q, K, V = rng.standard_normal((n, d)), rng.standard_normal((n_k, d)), rng.standard_normal((n_k, 2))
    pairs = np.argwhere(rng.random((d, d)) < 0.6)
    pairs = pairs if len(pairs) else np.array([[0, d - 1]])
    values = rng.standard_normal((n + n_k - 1, len(pairs)))
    kind = data.draw(st.sampled_from(["rough", "signs", "one offset", "one entry"]))
    if kind == "signs":
        values, Q, K = np.sign(values), np.sign(Q), np.sign(K)
        V[:] = np.sign(V)
    elif kind == "one offset":
        values[np.arange(len(values)) != data.draw(st.integers(0, len(values) - 1))] *= 1e-6
    elif kind == "one entry":
        values[:, 1:] *= 1e-12
    options = {"causal": data.draw(st.booleans()), "q_offset": data.draw(st.integers(-2, 3))}
    eps = data.draw(st.sampled_from([1e-1, 1e-2]))
    plain = measure(problem_for(Q, K, V, ropecy.RelativeFamily(values, support=pairs), **options)).bound
    values *= data.draw(st.floats(0.1, 2.0)) / max(plain, 1e-12)  # scores within 2
    family = oracle.Family(values, None, pairs)
    ours = ropecy.RelativeFamily(values, support=pairs)
    O, certificate = ropecy.attention(Q, K, V, ours, eps=eps, method="fft", return_certificate=True, **options)
    dense = oracle.attention(Q, K, V, family, **options)
    assert certificate.error <= eps
    allowed = certificate.truncation * dense.value_range + certificate.rounding * np.ptp(V, axis=0).max()
    assert np.all(np.abs(O - dense.O) <= allowed + 1e-15 * np.abs(dense.O))


def test_fft_refuses_what_it_cannot_do(rng):
    Q, K, V = rng.standard_normal((3, 20, 2))
    family = ropecy.RelativeFamily(rng.standard_normal((39, 2, 2)))
    with pytest.raises(NotImplementedError, match="near"):
        ropecy.attention(Q, K, V, family, method="fft", near=(3, 1.0))
    with pytest.raises(ropecy.BoundedEntryError, match=r"\bB\b"):
        ropecy.attention(40 * Q, K, V, family, method="fft")
    with pytest.raises(ropecy.BoundedEntryError, match="features, would do"):
        ropecy.attention(0.1 * Q, K, V, family, method="fft", degree=1, eps=1e-4)


def test_features_are_multisets_of_the_support(rng):
    Q, K, V = 0.5 * rng.standard_normal((3, 20, 4))
    family = ropecy.RelativeFamily(0.5 * rng.standard_normal((39, 3)), support=[(0, 1), (2, 2), (3, 0)])
    plan = ropecy.plan(Q, K, V, family, method="fft", degree=4, eps=0.1, grad=True)
    assert plan.certificate.n_features == 35 and plan.gradient_certificate.n_features == 56  # C(3 + 4, 4), C(3 + 5, 5)
    assert "by the norms of its matrices" in str(plan)


def test_auto_takes_the_cheaper_engine(rng):
    n = 20000
    Q, K, V = (0.3 * rng.standard_normal((3, n, 2))).astype(np.float32)
    family = ropecy.RelativeFamily(0.3 * rng.standard_normal((2 * n - 1, 2)), support=[(0, 1), (1, 0)])
    plan = ropecy.plan(Q, K, V, family, eps=1e-2)
    assert plan.engine == "fft" and plan.seconds["fft"] < plan.seconds["exact"]
    assert ropecy.plan(Q[:300], K[:300], V[:300], ropecy.RelativeFamily(np.ones((599, 2, 2)))).engine == "exact"


METHODS = ["exact", "fft"]


@pytest.mark.parametrize("method", METHODS)
def test_thread_count_bitwise(method, rng):
    Q, K, V = (rng.standard_normal((3, 300, 2)).astype(np.float32) for _ in range(3))
    family = ropecy.RelativeFamily(0.3 * rng.standard_normal((599, 2, 2)))
    bias = ropecy.RelativeBias(rng.standard_normal((3, 9)))
    results = []
    for threads in (1, 2, 3):
        O, vjp = ropecy.attention_vjp(Q, K, V, family, bias=bias, causal=True, method=method, eps=0.1, threads=threads)
        g = vjp(O)
        results.append([O, g.dQ, g.dK, g.dV, g.dbias, g.dR])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_products_with_the_matrix(method, rng):
    Q, K, V = 0.3 * rng.standard_normal((30, 2)), rng.standard_normal((25, 2)), rng.standard_normal((25, 3))
    family = oracle.Family(0.3 * rng.standard_normal((54, 2, 2)))
    A = ropecy.AttentionMatrix(Q, K, ropecy.RelativeFamily(family.values), causal=True, method=method, eps=1e-8)
    dense = oracle.attention(Q, K, V, family, causal=True).A
    np.testing.assert_allclose(A @ V, dense @ V, rtol=0, atol=1e-5)
    np.testing.assert_allclose(A.T @ Q, dense.T @ Q, rtol=0, atol=1e-5)
    np.testing.assert_allclose(A.D, dense.sum(axis=1), rtol=0, atol=1e-5)


def test_check_takes_families(rng):
    Q, K, V = rng.standard_normal((3, 50, 2))
    family = ropecy.RelativeFamily(rng.standard_normal((99, 2, 2)))
    O = ropecy.attention(Q, K, V, family, causal=True)
    assert ropecy.check(O, Q, K, V, family, causal=True).error < 1e-10
    assert ropecy.check(O, Q, K, V, causal=True).error > 1e-3


def test_loss_grad_gives_it(rng):
    Q, K, V, E = rng.standard_normal((4, 20, 2))
    values = rng.standard_normal((39, 2, 2)).astype(np.float32)
    g = ropecy.loss_grad(Q, K, V, E, ropecy.RelativeFamily(values), causal=True)
    expected = oracle.loss_gradients(Q, K, V, E, oracle.Family(values), causal=True)["dR"]
    assert g.dR.dtype == np.float32
    np.testing.assert_allclose(g.dR, expected, rtol=1e-6, atol=1e-6)


def test_empty(rng):
    family = ropecy.RelativeFamily(rng.standard_normal((5, 2, 2)))
    O, vjp = ropecy.attention_vjp(np.zeros((0, 2)), np.zeros((3, 2)), np.zeros((3, 1)), family)
    np.testing.assert_array_equal(vjp(O).dR, np.zeros((5, 2, 2)))


def test_is_a_value(rng):
    values = rng.standard_normal((5, 2))
    family = ropecy.RelativeFamily(values, n_k=3, support=[(0, 1), (1, 1)])
    assert repr(family) == "RelativeFamily(2 entries at 5 offsets, float64)" and family.n_k == 3
    kept = values.copy()
    values[:] = 0
    Q = rng.standard_normal((3, 2))
    expected = oracle.attention(Q, Q, Q, oracle.Family(kept, 3, np.array([(0, 1), (1, 1)]))).O
    for one in (family, pickle.loads(pickle.dumps(family))):
        np.testing.assert_allclose(ropecy.attention(Q, Q, Q, one), expected, rtol=0, atol=1e-12)
    with pytest.raises(AttributeError, match="immutable"):
        family.n_k = 4


PAIRS = [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": np.zeros((3, 2))}, ValueError, r"values: got shape \(3, 2\), wants \(M, d, d\)"),
        ({"values": np.zeros((3, 2, 4))}, ValueError, r"values: got shape \(3, 2, 4\), wants \(M, d, d\)"),
        ({"values": np.zeros((0, 2, 2))}, ValueError, "values: got shape .*, wants at least one offset"),
        ({"values": np.zeros((3, 0, 0))}, ValueError, "values: got shape .*, wants at least one offset"),
        ({"values": np.zeros((3, 2, 2), int)}, TypeError, "values: got dtype int64, wants float32 or float64"),
        ({"values": np.full((3, 2, 2), np.nan)}, ValueError, r"values: got nan at \(0, 0, 0\), wants finite"),
        ({"values": np.zeros((3, 3)), "support": PAIRS}, ValueError, r"values: got shape \(3, 3\), wants \(M, 2\)"),
        ({"values": np.zeros((3, 2, 2)), "support": PAIRS}, ValueError, r"values: got shape .*, wants \(M, 2\)"),
        ({"values": np.zeros((3, 2)), "support": [(0.0, 0), (1, 1)]}, TypeError, "support: got dtype float64"),
        ({"values": np.zeros((3, 2)), "support": [0, 1]}, ValueError, r"support: got shape \(2,\), wants"),
        ({"values": np.zeros((3, 2)), "support": [(0, 0), (1, -1)]}, ValueError, r"the pair \(1, -1\), wants indices"),
        ({"values": np.zeros((3, 2)), "support": [(1, 0), (1, 0)]}, ValueError, r"the pair \(1, 0\) twice"),
        ({"values": np.zeros((3, 2, 2)), "n_k": 4}, ValueError, "n_k: got 4, wants 1 to 3"),
        ({"values": np.zeros((3, 2, 2)), "n_k": 0}, ValueError, "n_k: got 0, wants 1 to 3"),
        ({"values": np.zeros((3, 2, 2)), "n_k": 2.0}, TypeError, "n_k: got float 2.0, wants an integer"),
        ({"values": np.zeros((3, 2, 2)), "n_k": True}, TypeError, "n_k: got bool True, wants an integer"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ropecy.RelativeFamily(**arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ({"values": np.zeros((9, 3, 3))}, {}, ValueError, "R: got a RelativeFamily of width 3, wants 2"),
        ({"values": np.zeros((9, 1, 1))}, {}, ValueError, "R: got a RelativeFamily of width 1, wants 2"),
        ({"values": np.zeros((9, 1)), "support": [(0, 2)]}, {}, ValueError, "the index 2, wants indices below 2"),
        ({"values": np.zeros((8, 2, 2))}, {}, ValueError, r"8 offsets, wants n \+ n_k - 1 = 9 for 5 queries"),
        ({"values": np.zeros((9, 2, 2))}, {"q_positions": np.arange(5)}, ValueError, "q_positions: got positions"),
        ({"values": np.zeros((9, 2, 2))}, {"method": "polynomial"}, NotImplementedError, "W_{i-j} does not factor"),
    ],
)
def test_refused_at_the_call(arguments, options, error, message):
    X = np.ones((5, 2))
    with pytest.raises(error, match=message):
        ropecy.attention(X, X, X, ropecy.RelativeFamily(**arguments), **options)
    with pytest.raises(error, match=message):
        ropecy.plan(X, X, ropecy.RelativeFamily(**arguments), **options)


@pytest.mark.parametrize("options", [{"bias": ropecy.RelativeBias.alibi(0.1)}, {"near": (3, 1.0)}, {"causal": True}])
def test_no_state_holds_it(options):
    X = np.ones((300, 2)) / 8
    family = ropecy.RelativeFamily(np.ones((599, 2, 2)))
    with pytest.raises(NotImplementedError, match=r"W_\{i-j\} does not factor"):
        ropecy.attention(X, X, X, family, method="polynomial", **options)
    assert ropecy.plan(X, X, X, family, **options).engine != "polynomial"


def test_states_of_fixed_size_refuse_it():
    with pytest.raises(NotImplementedError, match="does not factor"):
        ropecy.DecodeState(2, 2, ropecy.RelativeFamily(np.zeros((3, 2, 2))))


def test_rounding_counts_entries_that_cancel():
    # Both families have norm 1; the scores of one are sums of larger terms, of which monomials are made.
    X = np.full((40, 4), 4.0)
    H = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    plain, mixed = (
        chosen(X, X, X, ropecy.RelativeFamily(np.tile(W, (79, 1, 1))), scale=0.01, method="fft", eps=1e-2).executable
        for W in (np.eye(4), H)
    )
    own, other = (found.certificate.rounding - found.symbol.rounding for found in (mixed, plain))
    assert own > 1.2 * other


def test_monomials_that_memory_does_not_hold_are_refused_before_any_work(rng):
    Q, K, V = rng.uniform(-0.2, 0.2, (3, 20, 4))
    R = ropecy.RelativeFamily(rng.uniform(-1, 1, (39, 4, 4)))
    with pytest.raises(MemoryError, match="the fft engine"):
        ropecy.attention(Q, K, V, R, method="fft", degree=20)
