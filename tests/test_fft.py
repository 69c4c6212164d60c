"""The fft engine: what the oracle says, where transforms are weak, and what it costs."""

import math

import cases
import numpy as np
import oracle
import pytest
from inside import chosen
from test_gradients import _backward, gradient_bounds

import ropecy
from ropecy.engines.fft.shared import _pairs, _spectra
from ropecy.engines.fft.symbol import _NOISE, Symbol
from ropecy.kernels._fftw import ComplexFFT, RealFFT
from ropecy.kernels._toeplitz import Product

CASES = [
    name
    for name, spec in cases.SPECS.items()
    if "near" not in spec.get("options", {}) and spec.get("d", 4) <= 8
]


def _bounded(rng, n, d=4, d_v=3, dtype=np.float64):
    Q, K = rng.standard_normal((2, n, d)).astype(dtype)
    return cases.unit_rows(Q), cases.unit_rows(K), rng.standard_normal((n, d_v)).astype(dtype)


def assert_certified(case, ours, eps, method="fft", **options):
    """O and every gradient within what eps promises; the certificate."""
    rng = np.random.default_rng(7)
    dense = oracle.attention(**case)
    O, certificate, lse = ropecy.attention(
        **ours(case), method=method, eps=eps, **options, return_certificate=True, return_lse=True
    )
    assert certificate.engine == method and certificate.error <= eps
    # A row that sees one key has a range of 0; rounding is promised in units of the range over all keys.
    rounding = certificate.rounding * np.ptp(dense.v, axis=-2).max() + 4 * np.finfo(O.dtype).eps * np.abs(dense.O)
    assert np.all(np.abs(O - dense.O) <= eps * dense.value_range + rounding)
    seen = dense.allowed.any(axis=-1)
    e = 2 * eps / (1 + eps * eps) + 1e-5 * (O.dtype == np.float32)
    assert np.all(np.abs(lse[seen] - dense.lse[seen]) <= 2 * e + 1e-9)
    assert np.all(lse[~seen] == -np.inf) and np.all(O[~seen] == 0)
    dO = cases.upstream(case, dense, rng)
    gradients = _backward(case, ours, dO, method=method, eps=eps, **options)
    expected = dense.backward(dO)
    # As for O: a row that sees one key has gradient 0, up to rounding.
    unit = 10 * certificate.rounding + 100 * np.finfo(O.dtype).eps
    if "bias" in case:
        # Each entry of dS is off by at most zeta P omega, and P and omega of a row add up to what dO and V allow.
        inner = dO.astype(float) @ np.swapaxes(dense.v, -1, -2)
        allowed = 8 * eps * dense.P * dense.ranges(inner[..., None])
        t = np.arange(dense.P.shape[-1]) - (np.arange(dense.P.shape[-2])[:, None] + case.get("q_offset", 0))
        bound = np.abs(case["bias"].gradient(allowed, t))
        rounding = unit * len(dO.reshape(-1)) * (1 + np.abs(inner).max())
        assert np.all(np.abs(gradients["dbias"] - expected["dbias"]) <= bound + rounding)
    if not {"W", "W_Q", "W_K", "W_V"} & set(case):
        for name, bound in gradient_bounds(case, dense, dO, eps).items():
            difference = np.abs(gradients[name] - expected[name])
            error = difference if name == "dV" else np.linalg.norm(difference, axis=-1, keepdims=True)
            assert np.all(error <= bound + unit * (1 + np.abs(expected[name]).max(initial=0))), name
    return certificate


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "eps"), [(np.float64, 1e-1), (np.float64, 1e-4), (np.float32, 1e-2)])
def test_cases_keep_the_bounds(name, dtype, eps, rng, ours):
    if cases.SPECS[name].get("d", 4) > 6:
        eps = max(eps, 1e-2)  # more monomials than a test has time for
    assert_certified(cases.make(name, rng, dtype, unit=True), ours, eps)


@pytest.mark.parametrize("name", ["projections", "bias_table_per_head", "alibi_per_head", "window_two_sided_causal"])
def test_at_a_small_eps_it_is_the_oracle(name, rng, ours):
    case = cases.make(name, rng, unit=True)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    expected = dense.backward(dO)
    for argument, gradient in _backward(case, ours, dO, method="fft", eps=1e-8).items():
        tolerance = 1e-6 * np.linalg.norm(expected[argument]) + 1e-8
        assert np.linalg.norm(gradient - expected[argument]) <= tolerance, argument


BIASES = {
    "rough over 40 nats": lambda t, rng: rng.uniform(-40, 0, t.size),
    "rising by 60 to the far past": lambda t, rng: -0.5 * t,
    "falling by 90 to the far past": lambda t, rng: 0.75 * t,
    "falling by 600 to the far past": lambda t, rng: np.where(t <= 0, 5.0 * t, 0.0),
    "a constant of 900": lambda t, rng: 900 + rng.uniform(-1, 1, t.size),
    "a constant of -900": lambda t, rng: -900 + rng.uniform(-1, 1, t.size),
    "steep on both sides": lambda t, rng: -7.0 * np.abs(t),
    "high at both ends": lambda t, rng: 1.0 * np.abs(t),
    "one tall entry": lambda t, rng: np.where(t == -20, 50.0, 0.0),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_biases_of_wide_range(name, causal, dtype, rng, ours):
    n = 120
    Q, K, V = _bounded(rng, n, dtype=dtype)
    table = oracle.Table(BIASES[name](np.arange(1 - n, n), rng))
    assert_certified({"Q": Q, "K": K, "V": V, "bias": table, "causal": causal}, ours, 1e-3)


def test_levels_and_exact_rows_are_seen_to_be_used(rng):
    n = 300
    Q, K, V = _bounded(rng, n)
    t = np.arange(1 - n, n)
    rising, far = (
        chosen(Q, K, V, bias=ropecy.RelativeBias(slope * t), causal=True, method="fft").executable.symbol
        for slope in (-0.2, -0.3)
    )
    assert rising.levels.shape[2] == 5 and rising.exact_rows == []
    assert far.exact_rows == [(slice(0, 1), 0, 60)]  # what lies more than 72 nats below the peak
    with pytest.raises(ropecy.BoundedEntryError, match="rows"):
        ropecy.plan(Q, K, V, bias=ropecy.RelativeBias(-3.0 * t), causal=True, method="fft")
    assert ropecy.plan(Q, K, V, bias=ropecy.RelativeBias(-3.0 * t), causal=True).engine == "exact"


def test_rows_exact_keep_the_bounds(rng, ours):
    n = 120
    Q, K, V = _bounded(rng, n)
    mask = rng.random(n) < 0.7
    case = {"Q": Q, "K": K, "V": V, "bias": oracle.Table(-0.75 * np.arange(1 - n, n)), "causal": True}
    assert_certified(case, ours, 1e-3)
    assert_certified({**case, "key_mask": mask}, ours, 1e-3)
    heads = np.stack([-0.75 * np.arange(1 - n, n), np.zeros(2 * n - 1)])
    grouped = {**case, "Q": np.stack([Q, Q[::-1]]), "K": K[None], "V": V[None], "bias": oracle.Table(heads)}
    assert_certified(grouped, ours, 1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outlier_in_the_last_row_does_not_leak(dtype, rng):
    Q, K, V = _bounded(rng, 500, dtype=dtype)
    outlier = V.copy()
    outlier[-1] *= 1e6
    options = {"causal": True, "method": "fft", "eps": 1e-3}
    difference = ropecy.attention(Q, K, outlier, **options) - ropecy.attention(Q, K, V, **options)
    assert np.all(np.abs(difference[:-1]) <= 1e-6 + 1e6 * np.finfo(dtype).eps * (dtype == np.float32))


def test_outlier_keeps_the_bounds_of_earlier_rows(rng, ours):
    Q, K, V = _bounded(rng, 300)
    V[-1] *= 1e6
    case = {"Q": Q, "K": K, "V": V, "causal": True}
    dense = oracle.attention(**case)
    O = ropecy.attention(**ours(case), method="fft", eps=1e-3)
    assert np.all(np.abs(O - dense.O) <= 1e-3 * dense.value_range + 1e-8)


@pytest.mark.parametrize(("d", "degree"), [(1, 3), (2, 5), (4, 4), (7, 2)])
def test_pairs_make_powers(d, degree, rng):
    degrees, variables, factors = _pairs(d, degree)
    q, k = rng.standard_normal((2, d))
    powers = np.zeros(degree + 1)
    for s, pair, both in zip(degrees, variables, factors, strict=True):
        powers[s] += sum(f**2 * np.prod(q[a[:s]] * k[a[:s]]) for a, f in zip(pair, both, strict=True))
    np.testing.assert_allclose(powers, (q @ k) ** np.arange(degree + 1), rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": 100},
        {"window": (300, 50)},
        {"key_mask": True},
        {"causal": True, "q_offset": 700},
    ],
)
def test_many_blocks(options, rng, ours):
    n = 2500
    Q, K, V = _bounded(rng, n, d=2, d_v=2)
    if "key_mask" in options:
        options = {"key_mask": rng.random(n) < 0.5}
    rough = oracle.Table(rng.uniform(-20, 0, 2 * n - 1))
    case = {"Q": Q[: n - 300], "K": K, "V": V, "R": oracle.Rope(2), "bias": rough, **options}
    # The exact engine is the oracle here, which takes its time over a table of this length.
    expected, expected_vjp = ropecy.attention_vjp(**ours(case), method="exact")
    dO = rng.standard_normal(expected.shape)
    O, vjp = ropecy.attention_vjp(**ours(case), method="fft", eps=1e-7)
    np.testing.assert_allclose(O, expected, rtol=0, atol=1e-6)
    g, expected = vjp(dO), expected_vjp(dO)
    for name in ("dQ", "dK", "dV", "dbias"):
        difference = np.linalg.norm(getattr(g, name) - getattr(expected, name))
        assert difference <= 1e-6 * np.linalg.norm(getattr(expected, name)), name


@pytest.mark.parametrize(("n", "n_k"), [(8700, 8700), (4500, 8000), (9000, 2200)])
def test_more_blocks_than_a_tile_has(n, n_k, rng):
    Q, K, V = _bounded(rng, max(n, n_k), d=1, d_v=1)
    Q, K, V = Q[:n], K[:n_k], V[:n_k]
    bias = ropecy.RelativeBias(rng.uniform(-3, 0, n + n_k - 1))
    options = {"bias": bias, "causal": True, "q_offset": n_k - n if n_k > n else 0, "threads": 1}
    expected, expected_vjp = ropecy.attention_vjp(Q, K, V, **options, method="exact")
    O, vjp = ropecy.attention_vjp(Q, K, V, **options, method="fft", eps=1e-7)
    np.testing.assert_allclose(O, expected, rtol=0, atol=1e-6)
    dO = rng.standard_normal(O.shape)
    g, expected = vjp(dO), expected_vjp(dO)
    for name in ("dQ", "dK", "dV", "dbias"):
        difference = np.linalg.norm(getattr(g, name) - getattr(expected, name))
        assert difference <= 1e-6 * np.linalg.norm(getattr(expected, name)), name


def test_one_level_holds_what_lies_deep(rng):
    n = 100
    bias = np.where(np.arange(2 * n - 1) % 2, -16.0, 0.0)
    symbol = chosen(*_bounded(rng, n), bias=ropecy.RelativeBias(bias), method="fft").executable.symbol
    assert symbol.levels.shape[2] == 1
    np.testing.assert_allclose(symbol.levels[0, 0, 0], np.exp(bias), rtol=1e-12)


def test_rounding_of_products_is_what_the_certificate_counts_with(rng):
    """T v against sums in extended precision, in units of u log2(2 b) ||t|| ||v||."""
    for n, block in ((64, 64), (1500, 2048), (5000, 1024)):
        for t in (rng.uniform(0.3, 3, 2 * n - 1), np.where(np.arange(2 * n - 1) < n, 1.0, 0.0)):
            for v in (np.ones(n), rng.standard_normal(n), np.where(np.arange(n) == n - 1, 1e6, rng.random(n))):
                symbol = Symbol(np.zeros((1, 1)), t[None, None, None], np.zeros((1, 1, n), int), [], 0.0, block)
                nonzero, spectra = _spectra(symbol, RealFFT(2 * block), n, n, 1)
                rows = -(-n // block) * block
                padded = np.zeros((1, 1, rows))
                padded[..., :n] = v
                zeros = np.zeros((1, 1, rows))
                operands = zeros[None], zeros, padded, spectra, nonzero, None
                product = Product(ComplexFFT(block // 2), operands, _pairs(1, 1), 1, 1)
                got = product.forward(np.array([1.0, 0.0]))[0, 0, 0, :n]
                length = 1 << (3 * n).bit_length()
                factors = (np.fft.rfft(x.astype(np.longdouble), length) for x in (t[::-1], v))
                exact = np.fft.irfft(math.prod(factors), length)[n - 1 : 2 * n - 1]
                unit = 2.0**-53 * np.log2(2 * block) * np.linalg.norm(t) * np.linalg.norm(v)
                assert np.abs(got - exact).max() <= _NOISE * unit


def test_thread_count_bitwise_over_blocks(rng):
    Q, K, V = _bounded(rng, 5003, d=2, dtype=np.float32)
    bias = ropecy.RelativeBias(rng.uniform(-30, 0, 2 * 5003 - 1))
    results = []
    for threads in (1, 2, 3):
        O, vjp = ropecy.attention_vjp(Q, K, V, causal=True, bias=bias, method="fft", threads=threads)
        g = vjp(O)
        results.append([O, g.dQ, g.dK, g.dV, g.dbias])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_float32_takes_scores_that_its_own_rounding_forbids(rng, ours):
    Q, K, V = _bounded(rng, 200, d=2, dtype=np.float32)
    case = {"Q": (6 * Q).astype(np.float32), "K": K, "V": V}
    with pytest.raises(ropecy.BoundedEntryError):
        ropecy.attention(**ours(case), method="polynomial")
    assert assert_certified(case, ours, 1e-3).bound > 4


def test_large_scores_are_refused(rng):
    Q, K, V = _bounded(rng, 50)
    with pytest.raises(ropecy.BoundedEntryError, match=r"\bB\b"):
        ropecy.attention(40 * Q, K, V, method="fft")
    with pytest.raises(ropecy.BoundedEntryError, match="degree"):
        ropecy.attention(Q, K, V, method="fft", degree=1, eps=1e-6)


def test_rows_lost_in_rounding_are_told_with_their_cause(rng):
    Q, K, V = _bounded(rng, 50)
    with pytest.raises(ropecy.BoundedEntryError, match=r"rounding .* in 50 of 50 rows \(B = \S+, degree \d+\); method"):
        ropecy.attention(9 * Q, K, V, method="fft", eps=1e-7)
    bias = ropecy.RelativeBias(-3.0 * np.arange(-49, 50))
    with pytest.raises(ropecy.BoundedEntryError, match=r"eighth of eps = 0.001 in \d+ of 50 .*, a bias\); method"):
        ropecy.attention(Q, K, V, bias=bias, causal=True, method="fft", eps=1e-3)


def test_near_field_is_refused_by_name(rng):
    with pytest.raises(NotImplementedError, match="near"):
        ropecy.attention(*_bounded(rng, 20), method="fft", near=(3, 1.0))


def test_auto_takes_it_for_a_long_rough_table(rng):
    n = 32768
    Q, K, V = _bounded(rng, n, d=2, dtype=np.float32)
    bias = ropecy.RelativeBias(rng.uniform(-2, 2, 2 * n - 1))
    plan = ropecy.plan(Q, K, V, bias=bias, eps=1e-2)
    assert plan.engine == "fft" and plan.seconds["fft"] < plan.seconds["exact"]
    assert "fft" in str(plan)


def test_products_with_the_matrix(rng):
    Q, K, V = _bounded(rng, 90)
    bias = oracle.Table(rng.standard_normal(2 * 90 - 1))
    A = ropecy.AttentionMatrix(Q, K, causal=True, bias=ropecy.RelativeBias(bias.values), method="fft", eps=1e-8)
    dense = oracle.attention(Q, K, V, causal=True, bias=bias).A
    np.testing.assert_allclose(A @ V, dense @ V, rtol=0, atol=1e-5)
    np.testing.assert_allclose(A.T @ V, dense.T @ V, rtol=0, atol=1e-5)


def test_loss_trains_a_table(rng):
    Q, K, V = _bounded(rng, 64)
    E = rng.standard_normal(V.shape)
    table = rng.standard_normal(31)
    g = ropecy.loss_grad(Q, K, V, E, bias=ropecy.RelativeBias(table), method="fft", eps=1e-9)
    for entry in (0, 15, 30):
        step = np.zeros(31)
        step[entry] = 1e-5
        up, down = (
            ropecy.loss(Q, K, V, E, bias=ropecy.RelativeBias(table + s * step), method="exact") for s in (1, -1)
        )
        assert g.dbias[entry] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-6)
