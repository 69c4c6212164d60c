"""Numbers far from 0, huge, tiny and of unlike size: the exact engine is right, or its certificate says how far not."""

import math
import warnings

import numpy as np
import oracle
import pytest
from conftest import relative_bias
from oracle import Table

import ropecy
from ropecy.certify.rounding import bias_reach
from ropecy.problem.mask import Mask
from ropecy.problem.problem import Problem

F4, F8 = np.float32, np.float64


def uniform(rng, *shape, dtype=F4):
    return rng.uniform(-1, 1, shape).astype(dtype)


def truth(case):
    numbers = {key: X.astype(F8) for key, X in case.items() if isinstance(X, np.ndarray) and X.dtype != bool}
    return oracle.attention(**{**case, **numbers})


def error_and_certificate(case, **options):
    """The error in units of the largest range of a column, and what is certified; a case has the oracle's bias."""
    dense = truth(case)
    ours = dict(case)
    if "bias" in ours:
        ours["bias"] = relative_bias(ours["bias"])
    O, certificate = ropecy.attention(**ours, **options, return_certificate=True)
    with np.errstate(over="ignore"):
        spread = np.ptp(0.5 * dense.v, axis=-2).max() or np.abs(0.5 * dense.v).max()
        error = np.abs(0.5 * O.astype(F8) - 0.5 * dense.O).max() / spread
    assert np.isfinite(O.astype(F8)).all()
    return error, certificate


def assert_certified(case, **options):
    error, certificate = error_and_certificate(case, **options)
    assert error <= certificate.error
    return certificate


def values(kind, rng, n):
    return {
        "far": rng.random((n, 2)) + 1e4,
        "one constant, one small": np.stack([np.full(n, 1000.0), 1e-5 * rng.uniform(-1, 1, n)], axis=1),
        "two numbers": 1e8 + 8.0 * rng.integers(0, 2, (n, 1)),
        "of unlike size": rng.uniform(-1, 1, (n, 2)) * [1e30, 1e-30],
        "few digits": 3e7 + rng.integers(0, 3, (n, 1)),
        "huge": 1e37 * rng.random((n, 3)),
        "tiny": 1e-20 * rng.uniform(-1, 1, (n, 3)),
        "subnormal": 1e-43 * rng.uniform(-1, 1, (n, 3)),
    }[kind].astype(F4)


VALUES = "far", "one constant, one small", "two numbers", "of unlike size", "few digits", "huge", "tiny", "subnormal"


@pytest.mark.filterwarnings("ignore::ropecy.AccuracyWarning")
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("method", ["exact", "auto"])
def test_values_of_any_size(kind, method, rng):
    case = {"Q": uniform(rng, 400, 8), "K": uniform(rng, 400, 8), "V": values(kind, rng, 400)}
    assert_certified(case, method=method)
    assert_certified({**case, "causal": True, "bias": Table(np.linspace(-9, 0, 101))}, method=method)


def test_each_column_keeps_its_digits(rng):
    V = values("of unlike size", rng, 300)
    O = ropecy.attention(uniform(rng, 300, 8), uniform(rng, 300, 8), V, method="exact")
    assert np.all(np.ptp(O, axis=0) > 0)
    O = ropecy.attention(uniform(rng, 300, 8), uniform(rng, 300, 8), V * F4(2.0**27), method="exact")
    assert np.all(np.ptp(O, axis=0) > 0) and np.isfinite(O).all()


def test_a_sum_of_two_is_past_the_largest_number():
    V = np.array([[2e38], [2e38], [-1e38]], F4)
    O = ropecy.attention(np.zeros((1, 2), F4), np.ones((3, 2), F4), V, method="exact")
    assert O == pytest.approx(1e38, rel=1e-6)


def test_float64_near_its_largest_number(rng):
    Q, K = uniform(rng, 2, 400, 8, dtype=F8)
    V = 1e307 * rng.random((400, 3))
    O, vjp = ropecy.attention_vjp(Q, K, V, method="exact")
    dense = oracle.attention(Q, K, V / 2**10)
    assert np.allclose(O / 2**10, dense.O, rtol=1e-13)
    dO = rng.standard_normal(O.shape)
    found, expected = vjp(dO * 2.0**-10), dense.backward(dO)
    assert np.allclose(found.dQ, expected["dQ"], rtol=1e-9, atol=1e-12 * np.abs(expected["dQ"]).max())
    assert np.allclose(found.dV, expected["dV"] / 2**10, rtol=1e-12)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("bias", [None, oracle.Alibi(0.1)], ids=["plain", "alibi"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [F4, F8])
def test_results_at_the_largest_number_are_not_inf(dtype, causal, bias, rng):
    most = np.finfo(dtype).max
    for n, n_k in ((60, 60), (60, 180), (1, 26)):
        Q, K, V = (uniform(rng, rows, 4, dtype=dtype) for rows in (n, n_k, n_k))
        V[:, :3] = most
        V[:, 1] *= np.linspace(0.9, 1, n_k).astype(dtype)
        V[n_k // 2, 2] = -most
        options = {"causal": causal, "bias": None if bias is None else relative_bias(bias)}
        O, certificate = ropecy.attention(Q, K, V, **options, return_certificate=True)
        assert np.isfinite(O).all() and certificate.error <= 1e-3
        assert np.allclose(O[:, 0], most)
        O, vjp = ropecy.attention_vjp(Q, K, V, **options)
        assert np.isfinite(O).all() and not np.isnan(vjp(np.ones_like(O)).dQ).any()


def test_auto_says_where_nothing_certifies_eps(rng):
    Q, K, V = uniform(rng, 3, 300, 8)
    with pytest.warns(ropecy.AccuracyWarning, match=r"no engine certifies eps = 0.001: rounding in float32") as caught:
        ropecy.attention(Q, K, V + F4(1e6))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ropecy.attention(Q, K, V + F4(1e6), method="exact", return_certificate=True)[1].error > 1e-3
        assert ropecy.attention(Q, K, V + F4(1e4), return_certificate=True)[1].error <= 1e-3
    with pytest.raises(ropecy.BoundedEntryError):
        ropecy.attention(Q, K, V + F4(1e6), method="polynomial")


def test_a_certificate_changes_no_bit(rng):
    Q, K, V = uniform(rng, 3, 200, 8) + F4(50)
    alone = ropecy.attention(Q, K, V)
    assert np.array_equal(alone, ropecy.attention(Q, K, V, return_certificate=True, return_lse=True)[0])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
def test_storing_in_half_precision_is_counted(name, offset, rng):
    dtype = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    case = {"Q": uniform(rng, 300, 8), "K": uniform(rng, 300, 8), "V": uniform(rng, 300, 3) + F4(offset)}
    case = {key: X.astype(dtype) for key, X in case.items()}
    with warnings.catch_warnings():
        # eps is asked of the result before it is stored.
        warnings.simplefilter("error")
        certificate = assert_certified(case)
    assert 0 < certificate.storing < certificate.rounding
    assert certificate.error - certificate.storing <= 1e-4 < certificate.error
    assert "for storing it in half precision" in str(certificate)
    plan = ropecy.plan(*case.values())
    assert plan.certificate.rounding == certificate.rounding


def test_float32_is_not_stored_again(rng):
    _, certificate = ropecy.attention(*uniform(rng, 3, 20, 4), return_certificate=True)
    assert certificate.storing == 0 and "storing" not in str(certificate)


@pytest.mark.parametrize("scale", [0.0, 0.125])
@pytest.mark.parametrize("method", ["exact", "auto"])
@pytest.mark.filterwarnings("ignore::ropecy.AccuracyWarning")
def test_rounding_of_near_scores_is_counted_whatever_the_scale(scale, method, rng):
    K = (uniform(rng, 8, dtype=F8) + 1e-4 * rng.standard_normal((512, 8))).astype(F4)
    case = {"Q": uniform(rng, 512, 8), "K": K, "V": uniform(rng, 512, 8), "near": (300, 1e4), "scale": scale}
    assert assert_certified(case, method=method).rounding > 1e-4


@pytest.mark.filterwarnings("ignore::ropecy.AccuracyWarning")
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("near", [(100, 3e38), (100, 1e30)])
def test_a_near_scale_of_any_size_gives_no_nan(near, rng):
    Q, K, V = uniform(rng, 3, 300, 8)
    O, vjp = ropecy.attention_vjp(Q, K, V, near=near)
    assert np.isfinite(O).all()
    assert not np.isnan(vjp(V).dQ).any()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_gradient_by_a_near_scale_is_finite_where_its_terms_pass_the_largest_number(rng):
    Q, K, V = (uniform(rng, 30, 8) * F4(size) for size in (1e22, 1e31, 3e21))
    O, vjp = ropecy.attention_vjp(Q, K, V, near=(3, -2e-55), causal=True, method="exact")
    assert 0 < abs(vjp(O).dscale_near) < math.inf


LARGE_BESIDE_SMALL = {
    "a query times log2(e)": (F4, 3e38, 1e-38, 1.0),
    "a query times the scale": (F4, 1e16, 1e-38, 1e23),
    "in float64": (F8, 1e125, 3e-308, 1e185),
    "scores past the largest number squared": (F4, 8e28, 3e29, 1e28),
}


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("n", [1, 30])
@pytest.mark.parametrize(("dtype", "q", "k", "scale"), LARGE_BESIDE_SMALL.values(), ids=LARGE_BESIDE_SMALL)
def test_products_of_any_two_of_queries_keys_and_the_scale(dtype, q, k, scale, n, near):
    Q, K = np.full((n, 1), q, dtype), (k * np.linspace(1, 2, 5)[:, None]).astype(dtype)
    V = np.arange(1, 6, dtype=dtype)[:, None]
    # In logarithms, for no order of the products is free of overflow.
    scores = np.exp(np.log(F8(Q[0, 0])) + np.log(K[:, 0].astype(F8)) + math.log(scale))
    weights = np.exp(scores - scores.max())
    options = {"scale": scale, "method": "exact"} | ({"near": (3, scale)} if near else {})
    for O in (ropecy.attention(Q, K, V, **options), ropecy.attention_vjp(Q, K, V, **options)[0]):
        np.testing.assert_allclose(O[:, 0], weights @ V[:, 0] / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("scale", [3e38, 1e-42])
def test_a_scale_of_any_size(scale, rng):
    q, k = (1e-19, 1e-19) if scale > 1 else (1e21, 1e21)
    case = {"Q": uniform(rng, 60, 8) * F4(q), "K": uniform(rng, 60, 8) * F4(k), "V": uniform(rng, 60, 2)}
    case["scale"] = scale
    assert_certified(case, method="exact")
    dense = truth(case)
    found = ropecy.attention_vjp(**case, method="exact")[1](case["V"])
    expected = dense.backward(case["V"].astype(F8))
    for name in ("dQ", "dK", "dV"):
        off = np.abs(getattr(found, name) - expected[name]).max()
        assert off <= 1e-4 * np.abs(expected[name]).max()


@pytest.mark.parametrize("dtype", [F4, F8])
def test_projections_that_cancel(dtype, rng):
    column = np.stack([1e4 + rng.random(512), np.full(512, 1e4)], axis=1).astype(dtype)
    W = np.array([[1.1], [-1.1]], dtype)
    case = {"Q": uniform(rng, 512, 1), "K": uniform(rng, 512, 1), "V": uniform(rng, 512, 2)}
    case = {key: X.astype(dtype) for key, X in case.items()}
    for name in "QKV":
        certificate = assert_certified({**case, name: column, f"W_{name}": W}, method="exact")
        assert certificate.error < (1e-5 if dtype == F4 else 1e-11)


LOWEST = [(-7e37, F4), (-1e39, F4), (1e39, F4), (float(np.finfo(F4).min), F4)]
LOWEST += [(-1e307, F8), (float(np.finfo(F8).min), F8)]


@pytest.mark.parametrize(("bias", "dtype"), LOWEST)
def test_a_bias_of_any_size_that_all_keys_have_is_none(bias, dtype, rng):
    Q, K, V = uniform(rng, 3, 130, 8, dtype=dtype)
    expected, vjp = ropecy.attention_vjp(Q, K, V, method="exact")
    O, with_bias = ropecy.attention_vjp(Q, K, V, bias=ropecy.RelativeBias(np.array([bias])), method="exact")
    assert np.allclose(O, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(with_bias(V).dQ, vjp(V).dQ, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("bias", "dtype"), [case for case in LOWEST if case[0] < 0])
def test_the_lowest_numbers_as_a_mask(bias, dtype, rng):
    table = np.zeros(2 * 130 - 1)
    table[130:] = bias
    case = {"Q": uniform(rng, 130, 8), "K": uniform(rng, 130, 8), "V": uniform(rng, 130, 3)}
    case = {key: X.astype(dtype) for key, X in case.items()}
    masked = error_and_certificate({**case, "bias": Table(table)}, method="exact")
    assert masked[0] <= masked[1].error < 1e-5
    # The first rows see only keys that are masked so: still a softmax.
    O = ropecy.attention(**case, bias=ropecy.RelativeBias(table), q_offset=-20, method="exact")
    assert np.all(O[:20] <= case["V"].max(axis=0)) and np.all(O[:20] >= case["V"].min(axis=0))


@pytest.mark.parametrize(("bias", "dtype"), LOWEST)
def test_a_bias_of_any_size_beside_a_family(bias, dtype, rng):
    Q, K, V = uniform(rng, 3, 60, 4, dtype=dtype)
    R = ropecy.RelativeFamily(uniform(rng, 119, 4, 4, dtype=dtype), n_k=60)
    for options in ({}, {"causal": True}):
        expected, vjp = ropecy.attention_vjp(Q, K, V, R, method="exact", **options)
        options["bias"] = ropecy.RelativeBias(np.array([bias]))
        O, with_bias = ropecy.attention_vjp(Q, K, V, R, method="exact", **options)
        assert np.allclose(O, expected, rtol=1e-5, atol=1e-6)
        assert np.allclose(with_bias(V).dQ, vjp(V).dQ, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [30.0, 1e4, 1e9])
@pytest.mark.filterwarnings("ignore::ropecy.AccuracyWarning")
def test_biases_of_many_nats(size, rng):
    case = {"Q": uniform(rng, 150, 8), "K": uniform(rng, 150, 8), "V": uniform(rng, 150, 3)}
    table = Table(size * rng.uniform(-1, 1, 299))
    mask = rng.random(150) < 0.5
    for options in ({}, {"causal": True}, {"window": 9}, {"key_mask": mask}, {"key_mask": mask, "causal": True}):
        assert_certified({**case, "bias": table, **options}, method="exact")


def test_a_steep_bias_that_every_row_sees_from_its_top_costs_nothing(rng):
    # Keys far below a row's best have no weight, however their scores are rounded.
    bias = ropecy.RelativeBias.alibi(40.0)
    options = {"causal": True, "bias": bias, "method": "exact", "return_certificate": True}
    _, certificate = ropecy.attention(*uniform(rng, 3, 3000, 4), **options)
    assert certificate.rounding < 1e-5


@pytest.mark.parametrize("shape", [(300, 300), (60, 300), (300, 40), (1, 70), (90, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_how_far_below_the_largest_bias_a_row_finds_its_best(shape, masked, rng):
    n, n_k = shape
    q_offset, steep = n_k - n, 1e3 * rng.random(n + n_k - 1)
    mask = rng.random((1, n_k)) < 0.3 if masked else None
    zero = {"q": np.zeros((1, 1, n, 1)), "k": np.zeros((1, n_k, 1)), "v": np.zeros((1, n_k, 1)), "scale": 1.0}
    t = np.arange(n_k) - np.arange(n)[:, None] - q_offset
    for lo, hi in ((None, None), (None, 0), (-7, 3), (5, None), (-(n - 1) - q_offset, None)):
        problem = Problem(**zero, mask=Mask(n, n_k, lo, hi, q_offset, mask), bias=steep[None, None])
        seen = (t >= (-np.inf if lo is None else lo)) & (t <= (np.inf if hi is None else hi))
        if not seen.any():
            continue
        bias = np.where(seen, steep[t + n - 1 + q_offset], -np.inf)
        deepest, lowest = bias.max(axis=1), np.where(seen, bias, np.inf).min()
        kept = bias if mask is None else np.where(mask, bias, -np.inf)
        expected = np.where(np.isfinite(kept.max(axis=1)), deepest.max() - kept.max(axis=1), 0).max() + math.log(n_k)
        found = bias_reach(problem, 0.0)
        if mask is None:
            assert found == pytest.approx(min(expected, deepest.max() - lowest), rel=1e-12)
        assert found >= min(expected, deepest.max() - lowest) * (1 - 1e-12)


@pytest.mark.parametrize("method", ["exact", "auto", "polynomial"])
def test_a_bias_of_which_a_band_reads_a_part(method, rng):
    # The near field of an engine is a band, and reads a part of a table that falls over many nats.
    case = {"Q": uniform(rng, 600, 4), "K": uniform(rng, 600, 4), "V": uniform(rng, 600, 2), "causal": True}
    case["bias"] = Table(np.where(np.abs(np.arange(-40, 41)) < 12, 100.0 * rng.random(81), 0.0))
    assert_certified(case, method=method, eps=0.01)


def test_centred_keys_certify_more(rng):
    Q, K, V = uniform(rng, 3, 500, 8)
    O, certificate = ropecy.attention(Q, K + F4(1000), V, method="exact", return_certificate=True)
    assert certificate.error < 2 * ropecy.attention(Q, K, V, method="exact", return_certificate=True)[1].error
    assert_certified({"Q": Q, "K": K + F4(1000), "V": V}, method="exact")
    lse = ropecy.attention(Q, K + F4(1000), V, method="exact", return_lse=True)[1]
    assert np.allclose(lse, truth({"Q": Q, "K": K + F4(1000), "V": V}).lse, rtol=1e-6)


def test_rows_without_keys_stay_0(rng):
    Q, K, V = uniform(rng, 3, 100, 8) + F4(100)
    O = ropecy.attention(Q, K, V, causal=True, q_offset=-30)
    assert not O[:30].any() and np.all(O[30:] > 90)
    mask = np.arange(100) > 49
    O, vjp = ropecy.attention_vjp(Q, K, V, causal=True, key_mask=mask)
    assert not O[:50].any() and np.all(O[50:] > 90)
    assert not vjp(V).dV[:50].any()


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e20, 1e37])
@pytest.mark.parametrize("of_v", [1e-40, 1e-20, 1e20, 1e37])
def test_gradients_of_any_size(size, of_v, rng):
    case = {"Q": uniform(rng, 70, 4), "K": uniform(rng, 70, 4), "V": uniform(rng, 70, 3)}
    dO = uniform(rng, 70, 3)
    expected = truth(case).backward(dO.astype(F8))
    found = ropecy.attention_vjp(case["Q"], case["K"], case["V"] * F4(of_v), method="exact")[1](dO * F4(size))
    room = 1e-4 if min(size, of_v) > 1e-38 else 1e-2  # subnormal numbers have few digits
    for name, factor in (("dQ", size * of_v), ("dK", size * of_v), ("dV", size)):
        with np.errstate(over="ignore"):
            wanted = (expected[name] * factor).astype(F4)
        got, smallest = getattr(found, name), 2 * float(np.finfo(F4).smallest_subnormal)
        finite = np.isfinite(wanted)
        largest = np.abs(wanted[finite]).max() if finite.any() else 0
        assert np.all(np.abs(got[finite] - wanted[finite]) <= room * largest + smallest) and not np.isnan(got).any()


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_gradients_of_constant_values_and_of_keys_far_away(method, rng):
    Q, K, dO = uniform(rng, 3, 300, 4)
    V = np.full((300, 4), 3.7, F4)
    gradients = ropecy.attention_vjp(Q, K, V, method=method)[1](dO)
    assert not gradients.dQ.any() and not gradients.dK.any()
    # Without scores rounding is that of sums over keys alone.
    K = (1e4 + rng.standard_normal((300, 4))).astype(F4)
    case = {"Q": np.zeros((300, 4), F4), "K": K, "V": uniform(rng, 300, 4)}
    found = ropecy.attention_vjp(**case, method=method)[1](dO)
    expected = truth(case).backward(dO.astype(F8))
    assert np.abs(found.dQ - expected["dQ"]).max() <= 1e-4 * np.abs(expected["dQ"]).max()


@pytest.mark.filterwarnings("ignore::ropecy.AccuracyWarning")
@pytest.mark.parametrize("steep", [0.0, 40.0, 400.0])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_rounding_of_gradients_is_within_what_is_said_of_it(steep, far, rng):
    case = {"Q": 3 * uniform(rng, 200, 8), "K": uniform(rng, 200, 8) + F4(far), "V": uniform(rng, 200, 3) + F4(far)}
    case["V"][:, 0] = 5.0
    if steep:
        case["bias"] = oracle.Alibi(steep)
    dO = uniform(rng, 200, 3)
    expected = truth(case).backward(dO.astype(F8))
    if steep:
        case["bias"] = ropecy.RelativeBias.alibi(steep)
    found = ropecy.attention_vjp(**case, method="exact")[1](dO)
    r, c, stored = found.certificate.rounding, 1 / 8, 2.0**-23
    w = np.abs(dO) @ np.ptp(case["V"], axis=0)
    off = {}
    for name in ("dQ", "dK", "dV"):
        off[name] = np.abs(getattr(found, name) - expected[name]) - stored * np.abs(expected[name])
    norms = np.linalg.norm(case["K"] - case["K"].mean(axis=0), axis=1).max()
    assert np.all(off["dQ"] <= c * r * w[:, None] * norms)
    assert np.all(off["dK"] <= c * r * (w * np.linalg.norm(case["Q"], axis=1)).sum())
    assert np.all(off["dV"] <= r * np.abs(dO).sum(axis=0))


def test_few_keys_round_less(rng):
    errors = [
        ropecy.attention(*uniform(rng, 3, n, 4), method="exact", return_certificate=True)[1].rounding for n in (4, 400)
    ]
    assert errors[0] < 0.4 * errors[1]
    assert math.isclose(errors[1], 54 * 2.0**-24, rel_tol=0.2)


@pytest.mark.parametrize("family", [False, True])
def test_biases_that_count_below_one_that_few_rows_see_are_rounded(family, rng):
    # All but the first row choose among biases of some -1000, which float32 holds to 1e-4 only.
    n = 8
    table = -1000 + rng.uniform(-1, 1, 2 * n - 1)
    table[-1] = 0
    case = {"Q": uniform(rng, n, 2), "K": uniform(rng, n, 2), "V": uniform(rng, n, 2), "bias": Table(table)}
    if family:
        # The oracle's answer does not depend on the family, for its matrices are all the identity.
        dense = truth(case)
        R = ropecy.RelativeFamily(np.broadcast_to(np.eye(2), (2 * n - 1, 2, 2)).astype(F4))
        ours = {**case, "bias": relative_bias(case["bias"]), "R": R}
        O, certificate = ropecy.attention(**ours, method="exact", return_certificate=True)
        error = np.abs(O - dense.O).max() / np.ptp(dense.v, axis=-2).max()
    else:
        error, certificate = error_and_certificate(case, method="exact")
    assert 5e-6 < error <= certificate.error
