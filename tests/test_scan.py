"""Biases that factor, and near fields, by the polynomial engine: what the oracle says, far, steep and masked."""

import cases
import numpy as np
import oracle
import pytest
from test_fft import assert_certified
from test_gradients import _backward

import ropecy
from ropecy import RelativeBias
from ropecy.approximation import bias_forms, exponential_sums

CASES = ["bias_table_clipped", "bias_table_of_one", "bias_table_per_head", "alibi", "alibi_per_head"]


def _problem(rng, n, n_k, heads=2, key_heads=2, d=4, dtype=np.float64, **more):
    Q, K = rng.uniform(-1, 1, (heads, n, d)), rng.uniform(-1, 1, (key_heads, n_k, d))
    V, dO = rng.standard_normal((key_heads, n_k, 3)), rng.standard_normal((heads, n, 3))
    # A mean far from 0: what centring does to keys must not be seen.
    case = {"Q": Q, "K": K + 1.0, "V": V, **more}
    for name in ("Q", "K", "V"):
        case[name] = case[name].astype(dtype)
    return case, dO.astype(dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "eps"), [(np.float64, 1e-1), (np.float64, 1e-4), (np.float32, 1e-2)])
def test_cases_keep_the_bounds(name, dtype, eps, rng, ours):
    assert_certified(cases.make(name, rng, dtype, unit=True), ours, eps, method="polynomial")


@pytest.mark.parametrize("name", [*CASES, "near", "near_causal"])
def test_at_a_small_eps_it_is_the_oracle(name, rng, ours):
    case = cases.make(name, rng, unit=True)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    expected = dense.backward(dO)
    for argument, gradient in _backward(case, ours, dO, method="polynomial", eps=1e-9).items():
        tolerance = 1e-6 * np.linalg.norm(expected[argument]) + 1e-8
        assert np.linalg.norm(gradient - expected[argument]) <= tolerance, argument


BIASES = {
    "alibi": lambda rng: oracle.Alibi(0.05),
    "alibi, heads": lambda rng: oracle.Alibi(np.array([2.0**-8, 3.0])),
    "alibi of 0": lambda rng: oracle.Alibi(0.0),
    "t5": lambda rng: oracle.Buckets(rng.standard_normal(32)),
    "t5, heads, one side": lambda rng: oracle.Buckets(rng.standard_normal((2, 16)), 60, False),
    "table": lambda rng: oracle.Table(rng.standard_normal(101)),
    "a constant of 900": lambda rng: oracle.Table(900 + rng.uniform(-1, 1, 41)),
    "a constant of -900": lambda rng: oracle.Table(rng.uniform(-1, 1, (2, 41)) - 900),
    "none": lambda rng: None,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [None, (70, 3.0)], ids=["", "near"])
@pytest.mark.parametrize("n, n_k, q_offset", [(500, 500, 0), (300, 450, 150), (230, 300, -20)])
@pytest.mark.parametrize("bias", BIASES)
def test_forms(bias, n, n_k, q_offset, near, causal, rng, ours):
    bias = BIASES[bias](rng)
    if bias is None and near is None:
        pytest.skip("neither")
    mask = rng.random(n_k) > 0.3
    case, dO = _problem(rng, n, n_k, bias=bias, near=near, causal=causal, q_offset=q_offset, key_mask=mask)
    dense = oracle.attention(**case)
    O, vjp = ropecy.attention_vjp(**ours(case), method="polynomial", eps=1e-9)
    assert vjp.certificate.engine == "polynomial"
    assert np.all(np.abs(O - dense.O) <= 1e-9 * dense.value_range.max() + 1e-13 * np.abs(dense.O))
    found, expected = vjp(dO), dense.backward(dO)
    for name in ("dQ", "dK", "dV", *(["dbias"] if bias else [])):
        size = np.linalg.norm(expected[name])
        assert np.linalg.norm(getattr(found, name) - expected[name]) <= 1e-7 * size + 1e-7, name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "bias",
    [
        oracle.Kerple(1.0, 0.1),
        oracle.Kerple(np.array([0.5, 2.0]), np.array([0.3, 0.1])),
        oracle.Kerple(0.1, 0.5, "power"),
        oracle.Kerple(np.array([0.01, 0.2]), np.array([0.8, 0.4]), "power"),
    ],
    ids=repr,
)
def test_sums_of_exponentials(bias, causal, rng, ours):
    case, dO = _problem(rng, 700, 800, bias=bias, causal=causal, q_offset=100)
    dense = oracle.attention(**case)
    for eps in (1e-2, 1e-4):
        O, vjp = ropecy.attention_vjp(**ours(case), method="polynomial", eps=eps)
        assert vjp.certificate.error <= eps
        assert np.all(np.abs(O - dense.O) <= vjp.certificate.error * dense.value_range.max(axis=-1, keepdims=True))
        found, expected = vjp(dO), dense.backward(dO)
        for name in ("dQ", "dK", "dV", "dbias"):
            difference = np.linalg.norm(getattr(found, name) - expected[name])
            assert difference <= 5 * eps * np.linalg.norm(expected[name]), name
    with pytest.raises(NotImplementedError, match="no sum of exponentials fits"):
        ropecy.attention(**ours(case), method="polynomial", eps=1e-9)


def test_grouped_heads_with_slopes_of_their_own(rng, ours):
    case, dO = _problem(rng, 250, 250, heads=4, bias=oracle.Alibi(np.array([0.01, 0.3, 0.1, 1.0])), causal=True)
    dense = oracle.attention(**case)
    O, vjp = ropecy.attention_vjp(**ours(case), method="polynomial", eps=1e-9)
    np.testing.assert_allclose(O, dense.O, rtol=0, atol=1e-8)
    found, expected = vjp(dO), dense.backward(dO)
    for name in ("dQ", "dK", "dV", "dbias"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


SHARED = {
    "alibi": oracle.Alibi(0.01),
    "alibi of one head": oracle.Alibi(np.array([0.01])),
    "t5": oracle.Buckets(np.linspace(-1, 1, 32)),
    "table": oracle.Table(np.cos(np.arange(101))),
    "kerple": oracle.Kerple(0.5, 0.1),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [None, (70, 1.0)], ids=["", "near"])
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("bias", SHARED)
def test_a_bias_that_grouped_queries_share(bias, key_heads, near, causal, rng, ours):
    more = {"bias": SHARED[bias], "near": near, "causal": causal}
    case, dO = _problem(rng, 300, 300, heads=4, key_heads=key_heads, **more)
    dense = oracle.attention(**case)
    eps = 1e-4 if bias == "kerple" else 1e-9
    O, vjp = ropecy.attention_vjp(**ours(case), method="polynomial", eps=eps)
    assert vjp.certificate.engine == "polynomial"
    assert np.all(np.abs(O - dense.O) <= eps * dense.value_range.max())
    found, expected = vjp(dO), dense.backward(dO)
    for name in ("dQ", "dK", "dV", "dbias"):
        difference = np.linalg.norm(getattr(found, name) - expected[name])
        assert difference <= 10 * eps * np.linalg.norm(expected[name]) + 1e-7, name


@pytest.mark.parametrize("slope", [1e-6, 2.0**-8, 0.3, 40.0])
@pytest.mark.parametrize("causal", [False, True])
def test_slopes_over_many_chunks(slope, causal, rng):
    n = 20_000
    case, dO = _problem(rng, n, n, heads=1, key_heads=1, dtype=np.float32, causal=causal)
    case["bias"] = RelativeBias.alibi(slope)
    O, certificate = ropecy.attention(**case, method="polynomial", eps=1e-2, return_certificate=True)
    rows = rng.choice(n, 60, replace=False)
    q, k, v = (case[name][0].astype(float) for name in ("Q", "K", "V"))
    t = np.arange(n) - rows[:, None]
    s = 0.25 * q[rows] @ k.T - slope * np.abs(t)
    s[(t > 0) & causal] = -np.inf
    P = np.exp(s - s.max(axis=1, keepdims=True))
    assert np.abs(O[0, rows] - P @ v / P.sum(axis=1, keepdims=True)).max() <= certificate.error * np.ptp(v)
    # The gradient of the slope, against that in float64.
    exact = {**case, **{name: case[name].astype(float) for name in ("Q", "K", "V")}}
    few = slice(0, 3000)
    parts = [{**c, **{name: c[name][:, few] for name in ("Q", "K", "V")}} for c in (case, exact)]
    ours, truth = (
        ropecy.attention_vjp(**part, method=method, eps=1e-3)[1](dO[:, few].astype(part["Q"].dtype))
        for part, method in zip(parts, ("polynomial", "exact"), strict=True)
    )
    assert abs(ours.dbias - truth.dbias) <= 1e-2 * abs(truth.dbias) + 3e-7 * 3000**1.5


def test_a_slow_decay_keeps_its_digits_over_many_chunks():
    # Sixteen heads are cut into no segments, so a state passes through 417 chunks. All scores are 0.
    # Of this slope, float32's exp(-192 slope) is 3e-8 off, which every chunk would add.
    n, slope = 80_000, 9.617308654327164e-5
    Q, V = np.zeros((16, n, 1), np.float32), np.ones((16, n, 1), np.float32)
    V[:, : n // 2] = -1
    O = ropecy.attention(Q, Q, V, causal=True, bias=RelativeBias.alibi(slope), method="polynomial")
    weights = np.exp(slope * (np.arange(n) - n))
    expected = np.cumsum(weights * V[0, :, 0]) / np.cumsum(weights)
    assert np.abs(O[0, :, 0] - expected).max() <= 6e-7


def test_an_outlier_does_not_leak_into_earlier_rows(rng):
    case, _ = _problem(rng, 600, 600, heads=1, key_heads=1, dtype=np.float32, causal=True)
    O = ropecy.attention(**case, bias=RelativeBias.alibi(0.01), method="polynomial", eps=1e-2)
    case["V"][0, -1] = 1e6
    moved = ropecy.attention(**case, bias=RelativeBias.alibi(0.01), method="polynomial", eps=1e-2)
    assert np.abs(moved[0, :-1] - O[0, :-1]).max() <= 1e-5


@pytest.mark.parametrize("bias", [RelativeBias.alibi(0.05), RelativeBias.t5(np.arange(32) / 32)], ids=repr)
def test_bits_do_not_depend_on_threads(bias, threads, rng):
    case, dO = _problem(rng, 900, 900, bias=bias)
    results = []
    for count in (1, threads):
        O, vjp = ropecy.attention_vjp(**case, method="polynomial", threads=count)
        g = vjp(dO)
        results.append((O, g.dQ, g.dK, g.dV, g.dbias))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bias", [None, RelativeBias.alibi(0.001)], ids=["", "alibi"])
@pytest.mark.parametrize("heads, key_heads, n, n_k, q_offset", [(1, 1, 9000, 9000, 0), (6, 3, 7000, 9000, 2000)])
def test_bits_do_not_depend_on_which_segments_are_summed_up_first(heads, key_heads, n, n_k, q_offset, bias, rng):
    # One thread sums up none, sixteen all but the last, those between some of them.
    case, dO = _problem(rng, n, n_k, heads, key_heads, dtype=np.float32, bias=bias, causal=True, q_offset=q_offset)
    results = []
    for count in (1, 2, 3, 5, 16):
        O, vjp = ropecy.attention_vjp(**case, method="polynomial", degree=6, threads=count)
        g = vjp(dO)
        results.append((O, g.dQ, g.dK, g.dV))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bias", [None, RelativeBias.alibi(0.001)], ids=["", "alibi"])
@pytest.mark.parametrize("d_v, group, q_offset", [(32, 1, 0), (16, 2, -300), (24, 1, 200), (17, 1, 0), (3, 1, 0)])
def test_bits_do_not_depend_on_how_columns_are_shared_out(d_v, group, q_offset, bias, rng):
    # Five threads without heads of their own share 32 columns by 4 blocks, 24 by 3, 16 by 2, and 17 and 3 not at all.
    Q, dO = rng.uniform(-1, 1, (group, 3000, 4)), rng.standard_normal((group, 3000, d_v))
    K, V = rng.uniform(-1, 1, (1, 3000, 4)), rng.standard_normal((1, 3000, d_v)) + 1
    mask = rng.random(3000) < 0.9
    results = []
    for count in (1, 2, 3, 5):
        how = {"causal": True, "q_offset": q_offset, "bias": bias, "key_mask": mask, "threads": count}
        O, certificate, lse = ropecy.attention(
            Q, K, V, **how, method="polynomial", eps=1e-2, return_certificate=True, return_lse=True
        )
        _, vjp = ropecy.attention_vjp(Q, K, V, **how, method="polynomial", degree=6)
        g = vjp(dO)
        results.append((O, lse, certificate.rows_truncation, g.dQ, g.dK, g.dV))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            np.testing.assert_array_equal(one, other)


def test_keys_hidden_for_long(rng, ours):
    mask = np.ones(400, bool)
    mask[100:300] = False
    case, _ = _problem(rng, 400, 400, bias=oracle.Alibi(1.0), key_mask=mask, causal=True)
    with pytest.raises(NotImplementedError, match="hidden for so long that a decayed state fades"):
        ropecy.attention(**ours(case), method="polynomial")
    np.testing.assert_allclose(ropecy.attention(**ours(case)), oracle.attention(**case).O, rtol=0, atol=1e-9)
    case["bias"] = oracle.Alibi(0.25)  # what is 200 tokens old still weighs exp(-50)
    dense = oracle.attention(**case)
    O = ropecy.attention(**ours(case), method="polynomial", eps=1e-9)
    np.testing.assert_allclose(O, dense.O, rtol=0, atol=1e-8)
    # Rows past the last key.
    case, _ = _problem(rng, 400, 100, bias=oracle.Alibi(1.0), causal=True)
    with pytest.raises(NotImplementedError, match="fades"):
        ropecy.attention(**ours(case), method="polynomial")


def test_a_degree_beside_what_does_not_factor(rng, ours):
    case, _ = _problem(rng, 60, 60, bias=oracle.Alibi(-0.01))
    np.testing.assert_allclose(ropecy.attention(**ours(case), degree=3), oracle.attention(**case).O, rtol=0, atol=1e-9)
    case["bias"] = oracle.Alibi(0.01)
    with pytest.raises(ropecy.BoundedEntryError, match="degree 1 does not certify"):
        ropecy.attention(**ours(case), degree=1, eps=1e-6)


def test_auto_takes_it_and_plan_says_which_form(rng):
    n = 16_384
    Q, K, V = rng.uniform(-1, 1, (3, n, 8)).astype(np.float32)
    said = {
        RelativeBias.alibi(0.01): "no near field, 2 states, 2 of them decayed",
        RelativeBias.t5(np.zeros(32)): "an exact near field of 181, 2 states, 0 of them decayed",
        RelativeBias(np.zeros(65)): "an exact near field of 63, 2 states, 0 of them decayed",
    }
    for bias, form in said.items():
        plan = ropecy.plan(Q, K, V, bias=bias)
        assert plan.engine == "polynomial" and form in str(plan)
        assert plan.seconds["polynomial"] < plan.seconds["exact"]
    assert ropecy.plan(Q, K, V, near=(64, 5.0), causal=True).engine == "polynomial"


def test_products_with_the_matrix(rng):
    case, _ = _problem(rng, 90, 90, heads=1, key_heads=1, bias=oracle.Alibi(0.1), causal=True)
    options = {"causal": True, "bias": RelativeBias.alibi(0.1), "method": "polynomial", "eps": 1e-9}
    A = ropecy.AttentionMatrix(case["Q"], case["K"], **options)
    dense = oracle.attention(**case).A
    np.testing.assert_allclose(A @ case["V"], dense @ case["V"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(A.T @ case["V"], np.swapaxes(dense, -1, -2) @ case["V"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("first, last", [(128, 4096), (1, 300), (128, 1 << 17)])
def test_a_fit_is_as_good_as_it_says(first, last):
    def log_f(m):
        return -0.7 * np.log1p(0.2 * m)

    log_w, r, error = exponential_sums.fit(log_f, first, last, 1e-3)
    m = np.arange(first, last + 1.0)
    fitted = sum(np.exp(w - rate * m) for w, rate in zip(log_w, r, strict=True))
    np.testing.assert_allclose(np.abs(fitted / np.exp(log_f(m)) - 1).max(), error, rtol=1e-6)
    assert error <= 1e-3 and np.all(r >= 0)
    assert exponential_sums.fit(lambda m: np.sin(m), first, last, 1e-3) is None


def test_non_negative_least_squares(rng):
    for _ in range(20):
        A, b = rng.standard_normal((30, 6)), rng.standard_normal(30)
        x = exponential_sums.non_negative(A, b)
        gradient = A.T @ (A @ x - b)
        # The conditions of Karush, Kuhn and Tucker.
        assert np.all(x >= 0) and np.all(gradient >= -1e-9) and abs(gradient @ x) <= 1e-9


@pytest.mark.parametrize("buckets, max_distance, bidirectional", [(32, 128, True), (32, 128, False), (8, 20, True)])
def test_buckets(buckets, max_distance, bidirectional):
    t = np.arange(-3 * max_distance, 3 * max_distance + 1)
    expected = oracle.Buckets(np.arange(float(buckets)), max_distance, bidirectional).symbol(t)
    form = bias_forms.Buckets(buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(form.index(t), expected)
    left, right = form.reach()
    assert len(set(form.index(t[t <= -left]))) == 1 and form.index(-left + 1) != form.index(-left)
    assert len(set(form.index(t[t >= right]))) == 1
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    theirs = t5.T5Attention._relative_position_bucket(
        torch.as_tensor(t), bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(form.index(t), theirs.numpy())
