"""Sequences packed side by side: each gives what it gives alone, in every engine and through every door."""

import numpy as np
import oracle
import pytest
from conftest import relative_bias, rotary
from promises import sequences

import ropecy

ROWS = np.array([70, 0, 33, 33, 150, 1, 12, 70])
KEYS = np.array([70, 9, 33, 33, 180, 40, 0, 70])
D, D_V = 6, 5
# Of each key of the array, whose key mask goes by its place in it.
KEPT = np.arange(KEYS.sum()) % 5 > 0


def _case(rng, rows=ROWS, keys=KEYS, heads=(), dtype=np.float64):
    n, n_k = int(rows.sum()), int(keys.sum())
    Q, K, V = (rng.standard_normal((*heads, *shape)) for shape in ((n, D), (n_k, D), (n_k, D_V)))
    return {"Q": Q.astype(dtype), "K": K.astype(dtype), "V": V.astype(dtype), "scale": 0.1}


def _expected(case, rows, keys, dO=None):
    """O, lse, the range of the values of each row's sequence, and the gradients for dO, by the dense oracle."""
    lead = np.broadcast_shapes(case["Q"].shape[:-2], case["V"].shape[:-2])
    O, lse = np.zeros((*lead, rows.sum(), D_V)), np.full((*lead, rows.sum()), -np.inf)
    ranges, gradients = np.zeros_like(O), {}
    for own, at, one in sequences(case, rows, keys):
        if own.start == own.stop or at.start == at.stop:
            continue
        dense = oracle.attention(**one)
        O[..., own, :], lse[..., own] = dense.O, dense.lse
        ranges[..., own, :] = dense.value_range
        if dO is None:
            continue
        for name, part in dense.backward(dO[..., own, :]).items():
            whole = case[name[1:]] if name in ("dQ", "dK", "dV") else None
            if whole is None:
                gradients[name] = gradients.get(name, 0) + part
                continue
            where = own if name == "dQ" else at
            gradients.setdefault(name, np.zeros(whole.shape))[..., where, :] += part
    return O, lse, ranges, gradients


def _ours(case):
    case = dict(case)
    if "R" in case:
        case["R"] = rotary(case["R"])
    if "bias" in case:
        case["bias"] = relative_bias(case["bias"])
    return case


OPTIONS = {
    "plain": ({}, ("exact", "polynomial", "fft")),
    "causal": ({"causal": True}, ("exact", "polynomial", "fft")),
    "rotary": ({"R": oracle.Rope(D), "causal": True}, ("exact", "polynomial")),
    "window": ({"window": 9}, ("exact", "fft")),
    "two sides": ({"window": (5, 3)}, ("exact", "fft")),
    "key mask": ({"key_mask": KEPT, "causal": True}, ("exact", "polynomial", "fft")),
    "alibi": ({"bias": oracle.Alibi(0.1), "causal": True}, ("exact", "polynomial", "fft")),
    "alibi, both sides": ({"bias": oracle.Alibi(0.1)}, ("exact", "polynomial", "fft")),
    "table": ({"bias": oracle.Table(np.sin(np.arange(41)))}, ("exact", "polynomial", "fft")),
    "near": ({"near": (4, 1.5), "causal": True}, ("exact",)),
    "offset": ({"causal": True, "q_offset": 3}, ("exact", "polynomial", "fft")),
    "offsets": ({"causal": True, "q_offset": KEYS - ROWS, "R": oracle.Rope(D)}, ("exact", "polynomial", "fft")),
}
CASES = [(name, method) for name, (_, methods) in OPTIONS.items() for method in (*methods, "auto")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_each_sequence_gives_what_it_gives_alone(name, method, rng):
    case = {**_case(rng), **OPTIONS[name][0]}
    dO = rng.standard_normal((ROWS.sum(), D_V))
    O, lse, ranges, gradients = _expected(case, ROWS, KEYS, dO)
    how = {"lengths": (ROWS, KEYS), "method": method, "eps": 1e-3}
    found, certificate, found_lse = ropecy.attention(**_ours(case), **how, return_lse=True, return_certificate=True)
    largest = (case["V"].max(axis=-2) - case["V"].min(axis=-2)).max()
    assert certificate.rows_truncation.shape == lse.shape
    assert np.all(np.abs(found - O) <= certificate.truncation * ranges + certificate.rounding * largest)
    assert not found[np.isneginf(lse)].any()
    np.testing.assert_allclose(found_lse, lse, atol=3e-3)
    found, vjp = ropecy.attention_vjp(**_ours(case), **how)
    assert np.all(np.abs(found - O) <= vjp.certificate.error * largest)
    g = vjp(dO)
    for gradient, expected in gradients.items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(getattr(g, gradient), expected, atol=5e-3 * size, err_msg=gradient)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["plain", "causal", "rotary", "window", "key mask", "alibi", "offsets"])
def test_exact_sequences_are_bitwise_what_they_are_alone(name, dtype, rng):
    # Those of at most 8 queries are in test_packed_few.py.
    rows, keys = np.array([70, 33, 33, 150, 70]), np.array([70, 33, 35, 180, 70])
    case = {**_case(rng, rows, keys, heads=(2,), dtype=dtype), **OPTIONS[name][0]}
    if "key_mask" in case:
        case["key_mask"] = np.arange(keys.sum()) % 5 > 0
    if name == "offsets":
        case["q_offset"] = keys - rows
    # Of unlike size, so that some heads and sequences need a running maximum and others do not.
    case["Q"][0, :100] *= 60
    dO = rng.standard_normal((2, rows.sum(), D_V)).astype(dtype)
    O, vjp = ropecy.attention_vjp(**_ours(case), lengths=(rows, keys), method="exact")
    g, forward = vjp(dO), ropecy.attention(**_ours(case), lengths=(rows, keys), method="exact", threads=1)
    assert np.array_equal(O, forward)
    for own, at, one in sequences(case, rows, keys):
        alone, of_one = ropecy.attention_vjp(**_ours(one), method="exact")
        assert np.array_equal(O[:, own], alone)
        h = of_one(dO[:, own])
        for gradient, where in (("dQ", own), ("dK", at), ("dV", at)):
            assert np.array_equal(getattr(g, gradient)[:, where], getattr(h, gradient)), gradient


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["K", "V"])
@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_sequences_far_from_0_have_centres_of_their_own(method, name, masked, rng):
    case = _case(rng, heads=(2,), dtype=np.float32)
    Q, K, V = (case[key] / 4 for key in "QKV")
    given = {"Q": Q, "K": K, "V": V}
    far = np.repeat(rng.choice([-1.0, 0.0, 1.0], len(KEYS)), KEYS)[:, None] * 2048
    given[name] = (given[name] + far).astype(np.float32)
    O, lse = np.zeros((2, ROWS.sum(), D_V)), np.full((2, ROWS.sum()), -np.inf)
    options = {"method": method, "eps": 1e-3, "scale": 0.1, "key_mask": KEPT if masked else None}
    ours, our_lse = ropecy.attention(**given, **options, lengths=(ROWS, KEYS), return_lse=True)
    for own, at, one in sequences(given | ({"key_mask": KEPT} if masked else {}), ROWS, KEYS):
        if own.start == own.stop or at.start == at.stop:
            continue
        dense = oracle.attention(**one, scale=0.1)
        O[..., own, :], lse[..., own] = dense.O, dense.lse
        if method == "exact":
            alone = ropecy.attention(**one, scale=0.1, method=method)
            np.testing.assert_array_equal(ours[..., own, :], alone)
    np.testing.assert_allclose(ours, O, rtol=0, atol=6e-3 if method == "polynomial" else 5e-4)
    np.testing.assert_allclose(our_lse, lse, rtol=1e-6, atol=5e-3)


def test_one_set_of_lengths_is_that_of_queries_and_keys(rng):
    case = _case(rng, ROWS, ROWS)
    assert np.array_equal(
        ropecy.attention(**case, lengths=ROWS), ropecy.attention(**case, lengths=(ROWS.tolist(), tuple(ROWS)))
    )


def test_heads_groups_and_projections(rng):
    rows = np.array([40, 25, 40])
    case = _case(rng, rows, rows)
    case["Q"] = rng.standard_normal((2, 4, rows.sum(), D))
    case["K"], case["V"] = rng.standard_normal((2, 2, 1, rows.sum(), D))[..., :D], rng.standard_normal((2, 1, 105, D_V))
    case |= {"W": rng.standard_normal((D, D)) / 3, "causal": True, "R": oracle.Rope(D)}
    case["K"] = case["K"][0]
    dO = rng.standard_normal((2, 4, rows.sum(), D_V))
    O, *_, gradients = _expected(case, rows, rows, dO)
    found, vjp = ropecy.attention_vjp(**_ours(case), lengths=rows, method="exact")
    np.testing.assert_allclose(found, O, atol=1e-12)
    g = vjp(dO)
    for gradient, expected in gradients.items():
        np.testing.assert_allclose(getattr(g, gradient), expected, atol=1e-10, err_msg=gradient)


def test_the_gradient_of_the_near_scale_is_summed(rng):
    case = {**_case(rng), "near": (4, 1.5), "causal": True}
    dO = rng.standard_normal((ROWS.sum(), D_V))
    _, vjp = ropecy.attention_vjp(**case, lengths=(ROWS, KEYS), method="exact")
    h = 1e-5

    def total(scale):
        return np.sum(dO * ropecy.attention(**{**case, "near": (4, scale)}, lengths=(ROWS, KEYS), method="exact"))

    assert vjp(dO).dscale_near == pytest.approx((total(1.5 + h) - total(1.5 - h)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_a_near_scale_of_each_head(method, rng):
    """Heads share keys, sequences of one shape are computed together, and the gradients of all are summed."""
    rows = np.array([70, 33, 70, 12])
    case = {**_case(rng, rows, rows, heads=(2, 4)), "near": (4, np.array([1.5, 0.5, 0.0, -1.0])), "causal": True}
    case |= {name: case[name][:, :1] for name in "KV"}
    dO = rng.standard_normal((2, 4, rows.sum(), D_V))
    O, _, _, gradients = _expected(case, rows, rows, dO)
    found, vjp = ropecy.attention_vjp(**case, lengths=rows, method=method, eps=1e-6)
    np.testing.assert_allclose(found, O, atol=1e-4)
    g, total = vjp(dO), 0
    for name, expected in gradients.items():
        np.testing.assert_allclose(getattr(g, name), expected, atol=1e-3, err_msg=name)
    for own, _, one in sequences(case, rows, rows):
        total = total + ropecy.attention_vjp(**one, method="exact")[1](dO[..., own, :]).dscale_near
    np.testing.assert_allclose(g.dscale_near, total, rtol=1e-4, atol=1e-4)


def test_a_near_field_beside_a_polynomial(rng):
    rows = np.array([70, 33, 70])
    case = {**_case(rng, rows, rows), "near": (4, 1.5), "causal": True}
    O, *_ = _expected(case, rows, rows)
    np.testing.assert_allclose(ropecy.attention(**case, lengths=rows, method="polynomial"), O, atol=5e-3)


def test_loss_and_its_gradient(rng):
    rows = np.array([30, 20, 30])
    case, E = _case(rng, rows, rows), rng.standard_normal((80, D_V))
    O, *_, gradients = _expected(case, rows, rows, ropecy.attention(**case, lengths=rows, method="exact") - E)
    found = ropecy.loss_grad(**case, E=E, lengths=rows, method="exact")
    assert found.loss == pytest.approx(0.5 * np.sum((O - E) ** 2))
    np.testing.assert_allclose(found.dQ, gradients["dQ"], atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_products_with_the_matrix(causal, rng):
    case = {**_case(rng), "causal": causal, "bias": oracle.Alibi(0.2)}
    X, Y = case.pop("V"), rng.standard_normal((ROWS.sum(), 3))
    A = ropecy.AttentionMatrix(**_ours(case), lengths=(ROWS, KEYS))
    dense = np.zeros((ROWS.sum(), KEYS.sum()))
    for own, at, one in sequences({**case, "V": X}, ROWS, KEYS):
        t = np.arange(at.stop - at.start) - np.arange(own.stop - own.start)[:, None]
        weights = np.exp(one["scale"] * one["Q"] @ one["K"].T - 0.2 * np.abs(t))
        dense[own, at] = np.where((t <= 0) | (not causal), weights, 0)
    np.testing.assert_allclose(A @ X, dense @ X, atol=1e-2)
    np.testing.assert_allclose(A.T @ Y, dense.T @ Y, atol=1e-2)
    np.testing.assert_allclose(A.diagonal(), np.diagonal(dense), atol=1e-12)


def test_a_result_is_checked_sequence_by_sequence(rng):
    rows = np.array([60, 35, 60])
    case = {**_case(rng, rows, rows), "causal": True, "lengths": rows}
    O, vjp = ropecy.attention_vjp(**case)
    assert ropecy.check(O, **case).error < 1e-3
    O[70] += 0.5
    found = ropecy.check(O, **case)
    assert found.error > 0.05
    assert found.index == (70,)
    dO = rng.standard_normal(O.shape)
    assert ropecy.check(vjp(dO).dQ, **case, dO=dO).error < 1e-3


def test_plans_say_how_many_sequences_take_what(rng):
    rows = np.array([4000, 30, 30, 4000])
    case = _case(rng, rows, rows)
    case["Q"], case["scale"] = np.clip(case["Q"], -1, 1), 0.02
    plan = ropecy.plan(**case, lengths=rows)
    assert plan.engine == plan.certificate.engine == "mixed"
    assert "2 sequences: the cheapest engine" in plan.reason
    O, certificate = ropecy.attention(**case, lengths=rows, return_certificate=True)
    assert certificate.engine == "mixed"
    assert str(certificate).startswith("mixed, degree ")
    # The short ones are exact.
    assert not certificate.rows_truncation[4000:4060].any()
    assert certificate.rows_truncation[:4000].all()


def test_one_sharp_sequence_leaves_the_others_their_polynomial(rng):
    rows = np.array([2000] * 3)
    case = _case(rng, rows, rows)
    case["Q"], case["K"] = (np.clip(case[name], -1, 1) for name in "QK")
    case["Q"][2000:4000] *= 300
    _, certificate = ropecy.attention(**case, lengths=rows, return_certificate=True)
    assert certificate.engine == "mixed"
    assert not certificate.rows_truncation[2000:4000].any()
    assert certificate.rows_truncation[:2000].all()


def test_many_short_sequences(rng):
    lengths = rng.integers(0, 6, 10_000)
    case = {**_case(rng, lengths, lengths), "causal": True}
    O = ropecy.attention(**case, lengths=lengths)
    starts = np.cumsum(lengths) - lengths
    # The first row of each sequence sees one key.
    first = starts[lengths > 0]
    np.testing.assert_allclose(O[first], case["V"][first], atol=1e-12)
    for j in rng.choice(10_000, 20):
        own = slice(starts[j], starts[j] + lengths[j])
        alone = ropecy.attention(**{**case, **{name: case[name][own] for name in "QKV"}})
        np.testing.assert_allclose(O[own], alone, atol=1e-12)


def test_nothing_at_all(rng):
    for lengths in ([], [0, 0]):
        case = {name: X[:0] if np.ndim(X) else X for name, X in _case(rng).items()}
        assert ropecy.attention(**case, lengths=lengths).shape == (0, D_V)
    # No sequence has both rows and keys.
    case = _case(rng, np.array([5, 0]), np.array([0, 7]))
    O, vjp = ropecy.attention_vjp(**case, lengths=([5, 0], [0, 7]))
    assert not O.any()
    assert not vjp(np.ones_like(O)).dV.any()


def test_threads_change_no_bit(rng):
    case = {**_case(rng), "causal": True, "lengths": (ROWS, KEYS)}
    dO = rng.standard_normal((ROWS.sum(), D_V))
    for method in ("exact", "polynomial"):
        one, two = (ropecy.attention_vjp(**case, method=method, threads=threads) for threads in (1, 2))
        assert np.array_equal(one[0], two[0])
        assert np.array_equal(one[1](dO).dK, two[1](dO).dK)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3, 2], ValueError, r"lengths: got 2 that add up to 5, wants 6 as there are queries"),
        (([3, 3], [3, 3]), ValueError, r"lengths: got 2 that add up to 6, wants 5 as there are keys"),
        (([7, -1], [3, 2]), ValueError, r"lengths: got -1, wants integers of at least 0"),
        (([3, 3], [5]), ValueError, r"lengths: got 2 lengths of queries and 1 of keys, wants one of each a sequence"),
        (6, ValueError, r"lengths: got int 6 of shape \(\), wants a vector of integers"),
        ([[3, 3]], ValueError, r"lengths: got list of shape \(1, 2\), wants a vector of integers"),
        (([3.0, 3.0], [3, 2]), TypeError, r"lengths: got dtype float64, wants integers"),
        ([2**63 - 1, 1], ValueError, r"lengths: got 9223372036854775807, wants an integer of less than 63 bits"),
    ],
)
def test_lengths_that_are_refused(lengths, error, message, rng):
    Q, K = rng.standard_normal((6, 4)), rng.standard_normal((5, 4))
    for call in (ropecy.attention, ropecy.attention_vjp, ropecy.plan):
        with pytest.raises(error, match=message):
            call(Q, K, K, lengths=lengths)


def test_what_does_not_go_with_lengths(rng):
    Q, how = rng.standard_normal((6, 4)), {"lengths": [3, 3]}
    with pytest.raises(ValueError, match=r"q_offset: got 3 numbers, wants one, or 2, one for each sequence"):
        ropecy.attention(Q, Q, Q, **how, q_offset=[0, 1, 2])
    with pytest.raises(TypeError, match=r"q_offset: got list, wants an integer"):
        ropecy.attention(Q, Q, Q, q_offset=[0, 1])
    family = ropecy.RelativeFamily(np.zeros((11, 4, 4)))
    with pytest.raises(NotImplementedError, match=r"R: got a RelativeFamily, which packed sequences \(lengths\)"):
        ropecy.attention(Q, Q, Q, family, **how)
    with pytest.raises(NotImplementedError, match=r"method='polynomial' does not do a window"):
        ropecy.attention(Q, Q, Q, **how, window=2, method="polynomial")


@pytest.mark.parametrize("method", ["exact", "polynomial", "auto"])
def test_query_heads_of_one_key_head_with_slopes_of_their_own(method, rng):
    rows = np.array([60, 60, 25])
    case = _case(rng, rows, rows)
    case |= {"Q": rng.standard_normal((3, 145, D)), "bias": oracle.Alibi(np.array([0.1, 0.3, 1.0]))}
    dO = rng.standard_normal((3, 145, D_V))
    O, *_, gradients = _expected(case, rows, rows, dO)
    found, vjp = ropecy.attention_vjp(**_ours(case), lengths=rows, method=method)
    np.testing.assert_allclose(found, O, atol=5e-3)
    g = vjp(dO)
    for gradient, expected in gradients.items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(getattr(g, gradient), expected, atol=1e-2 * size, err_msg=gradient)
