"""The near field, whose scores have a scale of their own, and the gradient by that scale."""

import numpy as np
import oracle
import pytest

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def _by_difference(case, dO):
    """d<dO, O> / d scale_near by the oracle."""
    width, scale = case["near"]
    h = 1e-5
    up, down = (oracle.attention(**{**case, "near": (width, scale + step)}).O for step in (h, -h))
    return float((dO * (up - down)).sum()) / (2 * h)


def _by_difference_of_each(case, dO):
    """d<dO, O> / d scale_near of each head by the oracle."""
    (width, scale), h = case["near"], 1e-5
    found = []
    for step in h * np.eye(len(scale)):
        up, down = (oracle.attention(**{**case, "near": (width, scale + each)}).O for each in (step, -step))
        found.append(float((dO * (up - down)).sum()) / (2 * h))
    return np.array(found)


def _by_scale(case, ours, dO, **options):
    return ropecy.attention_vjp(**ours(case), **options)[1](dO).dscale_near


LAYOUTS = {
    "plain": {"q": (90, 4)},
    "causal": {"q": (90, 4), "causal": True},
    "more keys": {"q": (70, 4), "k": (110, 4), "causal": True, "q_offset": 40},
    "rows without keys": {"q": (90, 4), "k": (60, 4), "causal": True, "q_offset": -20},
    "grouped": {"q": (2, 6, 90, 4), "k": (2, 3, 90, 4), "causal": True},
    "grouped slopes": {"q": (4, 90, 4), "k": (2, 90, 4), "bias": oracle.Alibi(np.array([0.01, 0.3, 0.1, 1.0]))},
    "mask": {"q": (2, 3, 90, 4), "mask": (2, 1, 90), "causal": True},
    "mask, two-sided": {"q": (2, 3, 90, 4), "mask": (90,)},
}


def _case(rng, layout, near, dtype=np.float64):
    spec = dict(LAYOUTS[layout] if isinstance(layout, str) else layout)
    q, k = spec.pop("q"), spec.pop("k", None)
    k = k or q
    case = {"Q": rng.uniform(-1, 1, q), "K": rng.uniform(-1, 1, k) + 1, "V": rng.standard_normal(k[:-1] + (3,))}
    case = {name: X.astype(dtype) for name, X in case.items()} | {"R": oracle.Rope(4), "near": near}
    if mask := spec.pop("mask", None):
        case["key_mask"] = rng.random(mask) > 0.4
    return case | spec, rng.standard_normal(q[:-1] + (3,)).astype(dtype)


@pytest.mark.parametrize("near", [(1, 3.0), (7, 2.0), (7, 0.0), (20, -1.5), (65, 0.25)], ids=str)
@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_by_scale_near(layout, method, near, rng, ours):
    case, dO = _case(rng, layout, near)
    found = _by_scale(case, ours, dO, method=method, eps=1e-9)
    assert isinstance(found, float)
    assert found == pytest.approx(_by_difference(case, dO), rel=1e-6, abs=1e-6)


def test_float32(rng, ours):
    case, dO = _case(rng, "grouped", (7, 2.0), np.float32)
    for method in ("exact", "polynomial"):
        found = _by_scale(case, ours, dO, method=method, eps=1e-3)
        assert found == pytest.approx(_by_difference(case, dO), rel=1e-2 if method == "polynomial" else 1e-4)


@pytest.mark.parametrize("options", [{"window": 5}, {"window": (30, 4)}, {"causal": True}], ids=str)
def test_beside_a_window_and_a_table(options, rng, ours):
    case, dO = _case(rng, "plain", (9, 2.0))
    case |= {"bias": oracle.Table(rng.standard_normal(21)), **options}
    assert _by_scale(case, ours, dO, method="exact") == pytest.approx(_by_difference(case, dO), rel=1e-6)


@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_with_a_family(scale, rng, ours):
    case, dO = _case(rng, "plain", (9, scale))
    case |= {"R": oracle.Family(rng.standard_normal((2 * 90 - 1, 4, 4))), "causal": True}
    assert _by_scale(case, ours, dO) == pytest.approx(_by_difference(case, dO), rel=1e-6)


def test_by_the_loss(rng, ours):
    case, E = _case(rng, "grouped", (7, 2.0))
    g = ropecy.loss_grad(**ours(case), E=E, method="polynomial", eps=1e-9)
    assert g.dscale_near == pytest.approx(_by_difference(case, oracle.attention(**case).O - E), rel=1e-6)


def test_large_upstream_and_large_scores(rng, ours):
    """<dO, V> past the largest number, and entries whose product is."""
    case, dO = _case(rng, "causal", (7, 2.0))
    plain = _by_scale(case, ours, dO, method="exact")
    assert _by_scale(case, ours, dO * 2.0**1000, method="exact") == pytest.approx(plain * 2.0**1000, rel=1e-12)
    scaled = {**case, "Q": case["Q"] * 2.0**600, "near": (7, 2.0**-599), "scale": 0.25 * 2.0**-600}
    assert _by_scale(scaled, ours, dO, method="exact") == pytest.approx(plain * 2.0**600, rel=1e-9)


def test_nothing_to_see(rng):
    Q, K, V = rng.uniform(-1, 1, (3, 9, 4))
    hidden = {"key_mask": np.zeros(9, bool), "near": (3, 1.0)}
    assert ropecy.attention_vjp(Q, K, V, **hidden)[1](V).dscale_near == 0
    far = {"causal": True, "q_offset": 40, "near": (3, 1.0)}
    assert ropecy.attention_vjp(Q, K, V, **far, method="exact")[1](V).dscale_near == 0
    assert not hasattr(ropecy.attention_vjp(Q, K, V)[1](V), "dscale_near")


def test_threads_change_nothing(rng, ours):
    case, dO = _case(rng, "grouped", (7, 2.0), np.float32)
    one, two = (_by_scale(case, ours, dO, method="polynomial", threads=t) for t in (1, 2))
    assert one == two


# ---- one scale a head ----

HEADS = {
    "heads": {"q": (3, 90, 4)},
    "causal": {"q": (3, 90, 4), "causal": True},
    "one head": {"q": (1, 90, 4)},
    "no head axis": {"q": (90, 4)},
    "batch": {"q": (2, 3, 90, 4), "causal": True},
    "grouped": {"q": (2, 6, 90, 4), "k": (2, 3, 70, 4), "causal": True, "q_offset": -20},
    "grouped slopes": {"q": (4, 90, 4), "k": (2, 90, 4), "bias": oracle.Alibi(np.array([0.01, 0.3, 0.1, 1.0]))},
    "mask": {"q": (2, 3, 90, 4), "mask": (2, 1, 90), "causal": True},
}
SCALES = np.array([2.0, -1.5, 0.0, 0.25, 30.0, 0.7])


def _case_of_heads(rng, layout, dtype=np.float64):
    spec = HEADS[layout]
    heads = spec["q"][-3] if len(spec["q"]) > 2 else 1
    return _case(rng, spec, (7, SCALES[:heads]), dtype)


def _check_against_the_oracle(case, dO, ours, method):
    """O, lse and all gradients are the oracle's, and that by the scale has its shape."""
    O, vjp = ropecy.attention_vjp(**ours(case), method=method, eps=1e-9)
    g, dense = vjp(dO), oracle.attention(**case)
    np.testing.assert_allclose(O, dense.O, rtol=0, atol=1e-8)
    for name, expected in dense.backward(dO).items():
        np.testing.assert_allclose(getattr(g, name), expected, rtol=1e-7, atol=1e-6, err_msg=name)
    assert g.dscale_near.shape == case["near"][1].shape and g.dscale_near.dtype == np.float64
    np.testing.assert_allclose(g.dscale_near, _by_difference_of_each(case, dO), rtol=1e-6, atol=1e-6)
    lse = ropecy.attention(**ours(case), method=method, eps=1e-9, return_lse=True)[1]
    np.testing.assert_allclose(lse, dense.lse, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("layout", HEADS)
def test_a_scale_of_each_head(layout, method, rng, ours):
    case, dO = _case_of_heads(rng, layout)
    _check_against_the_oracle(case, dO, ours, method)


def test_a_scale_of_each_head_with_a_family(rng, ours):
    case, dO = _case_of_heads(rng, "heads")
    case |= {"R": oracle.Family(rng.standard_normal((2 * 90 - 1, 4, 4))), "causal": True}
    _check_against_the_oracle(case, dO, ours, "exact")


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_scales_are_one_number(dtype, method, rng, ours):
    case, dO = _case(rng, "grouped", (7, 1.7), dtype)
    found = []
    for scale in (1.7, [1.7] * 6, np.full(6, 1.7)):
        O, vjp = ropecy.attention_vjp(**ours(case, near=(7, scale)), method=method, eps=1e-3)
        found.append((O, vjp(dO)))
    for O, g in found[1:]:
        np.testing.assert_array_equal(O, found[0][0])
        for name in ("dQ", "dK", "dV"):
            np.testing.assert_array_equal(getattr(g, name), getattr(found[0][1], name))
        assert g.dscale_near.sum() == pytest.approx(found[0][1].dscale_near)


def test_float32_of_heads(rng, ours):
    case, dO = _case_of_heads(rng, "grouped", np.float32)
    for method in ("exact", "polynomial"):
        found = _by_scale(case, ours, dO, method=method, eps=1e-4)
        np.testing.assert_allclose(found, _by_difference_of_each(case, dO), rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("options", [{"window": 5}, {"window": (30, 4)}], ids=str)
def test_a_scale_of_each_head_beside_a_window_and_a_table(options, rng, ours):
    case, dO = _case_of_heads(rng, "batch")
    case |= {"bias": oracle.Table(rng.standard_normal((3, 21))), **options}
    expected = _by_difference_of_each(case, dO)
    np.testing.assert_allclose(_by_scale(case, ours, dO, method="exact"), expected, rtol=1e-6, atol=1e-7)


def test_a_scale_of_each_head_by_the_loss(rng, ours):
    case, E = _case_of_heads(rng, "grouped")
    g = ropecy.loss_grad(**ours(case), E=E, method="polynomial", eps=1e-9)
    expected = _by_difference_of_each(case, oracle.attention(**case).O - E)
    np.testing.assert_allclose(g.dscale_near, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_a_tiny_scale_beside_others_has_the_gradient_of_0(method, rng, ours):
    case, dO = _case_of_heads(rng, "heads", np.float32)
    tiny, none = ([2.0, 0.25, scale] for scale in (1e-42, 0.0))
    found, expected = (_by_scale({**case, "near": (7, each)}, ours, dO, method=method) for each in (tiny, none))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scores_of_heads_that_would_overflow(rng, ours):
    case, dO = _case_of_heads(rng, "heads")
    plain, near = _by_scale(case, ours, dO, method="exact"), case["near"][1]
    scaled = {**case, "Q": case["Q"] * 2.0**600, "near": (7, near * 2.0**-600), "scale": 0.25 * 2.0**-600}
    np.testing.assert_allclose(_by_scale(scaled, ours, dO, method="exact"), plain * 2.0**600, rtol=1e-9, atol=1e170)


def test_nothing_to_see_of_heads(rng):
    Q, K, V = rng.uniform(-1, 1, (3, 2, 9, 4))
    hidden = {"key_mask": np.zeros(9, bool), "near": (3, [1.0, 2.0])}
    np.testing.assert_array_equal(ropecy.attention_vjp(Q, K, V, **hidden)[1](V).dscale_near, [0.0, 0.0])
    far = {"causal": True, "q_offset": 40, "near": (3, [1.0, 2.0])}
    np.testing.assert_array_equal(ropecy.attention_vjp(Q, K, V, **far, method="exact")[1](V).dscale_near, [0.0, 0.0])


def test_threads_change_nothing_of_heads(rng, ours):
    case, dO = _case_of_heads(rng, "grouped", np.float32)
    for method in ("exact", "polynomial"):
        one, two = (_by_scale(case, ours, dO, method=method, eps=1e-3, threads=t) for t in (1, 2))
        np.testing.assert_array_equal(one, two)


def test_the_matrix_has_a_scale_of_each_head(rng, ours):
    case, _ = _case_of_heads(rng, "grouped")
    V = case.pop("V")
    A, dense = ropecy.AttentionMatrix(**ours(case), method="exact"), oracle.attention(**case, V=V)
    X, Y = rng.standard_normal((70, 2)), rng.standard_normal((90, 2))
    np.testing.assert_allclose(A @ X, dense.A @ X, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(A.T @ Y, dense.A.swapaxes(-1, -2) @ Y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(A.diagonal(), np.diagonal(dense.A, axis1=-2, axis2=-1), rtol=1e-10)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ([1.0, 2.0], ValueError, r"near: got a scale_near of shape \(2,\), wants a number, or shape \(3,\)"),
        (np.ones(1), ValueError, r"near: got a scale_near of shape \(1,\), wants a number, or shape \(3,\)"),
        (np.ones((3, 1)), ValueError, r"near: got a scale_near of shape \(3, 1\), wants a number, or shape \(heads,\)"),
        ([1.0, np.nan, 2.0], ValueError, "near: got nan, wants a finite number"),
        ([1.0, "x", 2.0], TypeError, "near: got str 'x', wants a real number"),
        ([1.0, [2.0], 2.0], TypeError, "near: got list of unlike things"),
        (np.array([True, False, True]), TypeError, "near: got bool.* wants a real number"),
        ([1.0, 1e39, 2.0], ValueError, r"near: got 1e\+39, wants a number that float32 can hold"),
        ([1.0, 1e30, 2.0], ValueError, r"near: got 1e\+30 beside other scales, wants at most 7.92e\+28 where heads"),
    ],
    ids=str,
)
def test_scales_that_are_refused(scale, error, message, rng):
    Q, K, V = rng.uniform(-1, 1, (3, 3, 9, 4)).astype(np.float32)
    with pytest.raises(error, match=message):
        ropecy.attention(Q, K, V, near=(3, scale))


def test_what_is_given_may_change_afterwards(rng):
    Q, K, V = rng.uniform(-1, 1, (3, 2, 30, 4))
    scale = np.array([1.0, 3.0])
    _, vjp = ropecy.attention_vjp(Q, K, V, near=(3, scale))
    before = vjp(V)
    scale[:] = 9
    np.testing.assert_array_equal(vjp(V).dscale_near, before.dscale_near)
