"""Rounding of DecodeState: long texts do not drift, and certificates count what storing a result costs."""

import cases
import numpy as np
import pytest

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def truth(q, K, V, slope=0.0):
    """O minus the first value, for one query over a whole text, in extended precision; scale 1/d."""
    q, K, V = (X.astype(np.longdouble) for X in (q, K, V))
    scores = K @ q / K.shape[-1] - slope * np.arange(len(K) - 1, -1, -1, dtype=np.longdouble)
    A = np.exp(scores - scores.max())
    return A @ (V - V[0]) / A.sum()


def assert_certified(state, o, q, K, V, slope=0.0):
    """Column by column: truncation in units of its range, rounding in units of the largest."""
    off = np.abs(o.astype(np.longdouble) - V[0].astype(np.longdouble) - truth(q, K, V, slope))
    V = V.astype(np.longdouble)
    spread = V.max(axis=0) - V.min(axis=0)
    certificate = state.certificate
    assert np.isfinite(o.astype(float)).all()
    assert (off <= certificate.truncation * spread + certificate.rounding * spread.max()).all(), (
        off / spread.max(),
        certificate,
    )


# ---- sums over long texts ----


def equal_tokens(state, n, how):
    """A token of value 0, then n of value 0.1, all with one key; returns the last result."""
    k = np.full(2, np.sqrt(1e-3 / 2))
    zero, value = np.zeros(1), np.full(1, 0.1)
    state.extend(k[None], zero[None])
    if how == "steps":
        for _ in range(n - 1):
            state.step(k, k, value)
    else:
        most = n - 1 if how == "whole" else 999
        for start in range(0, n - 1, most):
            count = min(most, n - 1 - start)
            state.extend(np.broadcast_to(k, (count, 2)), np.broadcast_to(value, (count, 1)))
    return state.step(k, k, value)[0]


@pytest.mark.parametrize("how, n", [("whole", 10**6), ("pieces", 100_000), ("steps", 3_000)])
@pytest.mark.parametrize("slope", [None, 1e-6, 2.0**-8])
def test_equal_tokens_do_not_drift(slope, how, n):
    bias = None if slope is None else ropecy.RelativeBias.alibi(slope)
    state = ropecy.DecodeState(2, 1, eps=1e-12, bound=1.001e-3, scale=1.0, bias=bias)
    o = equal_tokens(state, n, how)
    # 0.1 (1 - w_0 / sum w)
    first = np.exp(-np.longdouble(slope or 0) * n)
    total = np.expm1(-np.longdouble(slope) * (n + 1)) / np.expm1(-np.longdouble(slope)) if slope else n + 1
    error = abs(float(o - np.longdouble(0.1) * (1 - first / total))) / 0.1
    assert error <= state.certificate.error
    assert error <= 2e-14
    assert state.certificate.rounding <= 2e-14


def test_random_tokens_do_not_drift(rng):
    n = 300_000
    K, V = cases.unit_rows(rng.standard_normal((n, 3))), 100 + rng.random((n, 2))
    for slope in (0.0, 1e-5):
        state = ropecy.DecodeState(3, 2, eps=1e-11, bias=ropecy.RelativeBias.alibi(slope), window=10)
        state.extend(K[: n // 2], V[: n // 2])
        state.extend(K[n // 2 :], V[n // 2 :])
        assert_certified(state, state.attend(K[0]), K[0], K, V, slope)


def test_sums_of_decays_that_are_no_powers_of_two_are_the_same_however_they_came(rng):
    n = 5000
    K, V = cases.unit_rows(rng.standard_normal((n, 3))), rng.random((n, 2))
    one, many = (ropecy.DecodeState(3, 2, eps=1e-11, bias=ropecy.RelativeBias.alibi(0.3)) for _ in range(2))
    one.extend(K, V)
    for k, v in zip(K, V, strict=True):
        many.step(k, k, v)
    np.testing.assert_allclose(many.attend(K[0]), one.attend(K[0]), rtol=1e-14)


# ---- what results are stored in, and values far from 0 or of unlike columns ----

N = 300
VALUES = {
    "constant_beside_small": lambda rng: np.stack([np.full(N, 1000.0), 1e-5 * rng.random(N)], axis=1),
    "far": lambda rng: 1e8 + 8.0 * rng.integers(0, 2, (N, 2)),
    "unlike": lambda rng: rng.random((N, 2)) * [1e30, 1e-30],
    "steps": lambda rng: 3e7 + rng.choice([0.0, 1.0, 2.0, 1.0], (N, 2)),
    "late_outlier": lambda rng: np.concatenate([rng.random((N - 1, 2)), np.full((1, 2), 1e6)]),
    "huge": lambda rng: 3e38 * rng.choice([-1.0, 1.0], (N, 2)),
    "tiny": lambda rng: 1e-43 * rng.random((N, 2)),
    "constant": lambda rng: np.full((N, 2), 0.1),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("past", [False, True], ids=["polynomial", "exact"])
@pytest.mark.parametrize("values", VALUES)
def test_values_far_from_0_of_unlike_columns_and_of_any_size(values, past, dtype, rng):
    K, V = cases.unit_rows(rng.standard_normal((N, 4))).astype(dtype), VALUES[values](rng).astype(dtype)
    for slope in (0.0, 0.5):
        options = {"on_break": "exact", "bias": ropecy.RelativeBias.alibi(slope), "eps": 1e-5}
        state = ropecy.DecodeState(4, 2, **options)
        state.extend(K[:200], V[:200])
        for i in range(200, N):
            q = (3 if past else 1) * K[i]
            o = state.step(q, K[i], V[i])
        assert state.certificate.engine == ("exact" if past else "polynomial")
        if values == "constant":
            np.testing.assert_array_equal(o, V[0])
        else:
            assert_certified(state, o, q, K, V, slope)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_counted_in_rounding_and_not_in_eps(name, rng):
    dtype = np.dtype(np.float16) if name == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    K = cases.unit_rows(rng.standard_normal((N, 4))).astype(dtype)
    V = (3 + rng.random((N, 2))).astype(dtype)
    for on_break, long in (("raise", 1), ("exact", 4)):
        state = ropecy.DecodeState(4, 2, eps=1e-5, on_break=on_break)
        state.extend(K, V)
        q = (long * K[0].astype(float)).astype(dtype)
        assert_certified(state, state.attend(q), q, K, V)
        certificate = state.certificate
        # Half a unit of 4 in its dtype, beside a range of 1.
        assert certificate.rounding >= (2.0**-9 if name == "float16" else 2.0**-6) * 0.9
        assert certificate.error - certificate.storing <= 1e-4
        assert on_break == "exact" or certificate.error - certificate.storing <= 1e-5


def test_results_past_the_bound_have_the_exact_engines_certificate(rng):
    n = 2000
    K, V = cases.unit_rows(rng.standard_normal((n, 8))).astype("f4"), rng.random((n, 2)).astype("f4")
    state = ropecy.DecodeState(8, 2, eps=1e-6, on_break="exact")
    state.extend(K, V)
    for size, engine in ((1, "polynomial"), (40, "exact"), (1, "polynomial"), (400, "exact")):
        q = np.float32(size) * K[0]
        o = state.attend(q)
        assert state.certificate.engine == engine
        assert_certified(state, o, q, K, V)
        np.testing.assert_array_equal(state.copy().attend(q), o)
        assert state.copy().certificate == state.certificate
    assert state.certificate.bound == pytest.approx(400, rel=1e-3)


# ---- sizes that no sum holds ----


def test_sizes_that_are_refused(rng):
    K, V = cases.unit_rows(rng.standard_normal((N, 4))), rng.random((N, 2))
    state = ropecy.DecodeState(4, 2, on_break="exact")
    V[7, 1] = -1e300
    with pytest.raises(ValueError, match=r"V: got a value of size 1e\+300, wants at most 2\^900"):
        state.extend(K, V)
    V[7, 1] = 1e270
    state.extend(K, V)
    assert np.isfinite(state.attend(K[0])).all()
    with pytest.raises(ropecy.BoundedEntryError, match=r"q: got a row with .* = inf, wants at most .* in float64"):
        state.attend(K[0] * 1e200)
    with pytest.raises(ropecy.BoundedEntryError, match=r"k: got a row with .* = inf, wants at most"):
        state.step(K[0], K[0] * 1e200, V[0])
    single = ropecy.DecodeState(4, 2, on_break="exact")
    single.extend(K.astype("f4"), V.clip(0, 1).astype("f4"))
    with pytest.raises(ropecy.BoundedEntryError, match=r"q: got a row with .*, wants at most .* in float32"):
        single.attend(K[0].astype("f4") * np.float32(1e36))
    o = single.attend(K[0].astype("f4") * np.float32(1e7))
    assert np.isfinite(o).all() and single.certificate.error >= 1
