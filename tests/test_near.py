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
    spec = dict(LAYOUTS[layout])
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
