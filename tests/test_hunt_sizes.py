"""A hunt for numbers that are wrong where sizes are unlike: heads, columns, centres, biases, hidden keys, long rows.

``ROPECY_HUNT=10000 pytest tests/test_hunt_sizes.py`` looks at so many problems. They are float32, so that the float64
of the oracle is the truth.
"""

import math
import warnings

import numpy as np
import oracle
from conftest import relative_bias
from hypothesis import given
from hypothesis import strategies as st
from test_hunt import hunting

import ropecy

TINY = 16 * float(np.finfo(np.float32).tiny)


def either(rng, chance, low, high):
    """A power of ten between two exponents, or 1."""
    return 10.0 ** rng.uniform(low, high) if rng.random() < chance else 1.0


def bias_drawn(rng, heads):
    lead = () if rng.random() < 0.5 else (heads,)
    kind = rng.choice(["none", "alibi", "table", "t5", "kerple"])
    if kind == "alibi":
        return oracle.Alibi(10.0 ** rng.uniform(-4, 1.5, lead))
    if kind == "table":
        table = rng.standard_normal(lead + (2 * int(rng.integers(1, 60)) - 1,)) * 10.0 ** rng.uniform(-1, 2)
        # Integers, which leave the table its digits in float64.
        return oracle.Table(table + rng.choice([-1, 0, 1]) * np.floor(10.0 ** rng.uniform(0, 5)))
    if kind == "t5":
        return oracle.Buckets(rng.standard_normal((*lead, 16)), 60, bool(rng.random() < 0.5))
    if kind == "kerple":
        return oracle.Kerple(10.0 ** rng.uniform(-1, 0.5, lead), 10.0 ** rng.uniform(-2, 0, lead))
    return None


def case_drawn(rng):
    """The arguments of a call, with the oracle's bias, and dO."""
    key_heads = int(rng.integers(1, 3))
    group, d, d_v = (int(rng.integers(1, 4)) for _ in range(3))
    n = int(rng.choice([3, 60, 230, 420]))
    n_k = n if rng.random() < 0.6 else int(rng.choice([5, 60, 230, 420]))
    heads = key_heads * group
    Q, K, V = (rng.uniform(-1, 1, X) for X in ((heads, n, d), (key_heads, n_k, d), (key_heads, n_k, d_v)))
    Q *= rng.choice([0.1, 0.5, 1.0, 2.0])
    if key_heads == 2:
        times = either(rng, 0.4, -12, 12)
        Q[group:] *= times
        K[1] /= times
    for some, most in ((Q, 6), (K, 1)):
        rows = rng.integers(0, some.shape[1], 1 + some.shape[1] // 100)
        some[:, rows] *= either(rng, 0.2, 0, most)
    if rng.random() < 0.4:
        K += np.abs(K).max(axis=(1, 2), keepdims=True) * 10.0 ** rng.uniform(0, 3) * rng.choice([-1, 1], d)
    V[..., 0] *= either(rng, 0.2, -4, 0)
    V[:, int(rng.integers(n_k))] *= either(rng, 0.2, 0, 2)
    if rng.random() < 0.4:
        V += np.abs(V).max() * 10.0 ** rng.uniform(0, 3)
    V *= either(rng, 0.4, -30, 30)
    case = {"Q": Q, "K": K, "V": V}
    case = {name: X.astype(np.float32) for name, X in case.items()}
    if rng.random() < 0.6:
        case |= {"causal": True, "q_offset": int(rng.integers(-5, n_k)) if rng.random() < 0.3 else 0}
    if rng.random() < 0.4:
        mask = rng.random(n_k) < 0.8
        start = int(rng.integers(n_k))
        mask[start : start + int(rng.integers(60))] = False
        mask[int(rng.integers(n_k))] = True
        case["key_mask"] = mask
    if rng.random() < 0.2:
        case["near"] = (int(rng.integers(1, 40)), float(rng.choice([0.0, 1.0, -1.0, 5.0])) / d)
        if rng.random() < 0.5:
            case["near"] = case["near"][0], case["near"][1] * rng.choice([0.1, 1.0, -3.0], heads)
    bias = bias_drawn(rng, heads)
    return case | ({} if bias is None else {"bias": bias}), rng.standard_normal((heads, n, d_v)).astype(np.float32)


def assert_gradients(case, g, dense, dO):
    """All finite, and dQ within what README says of it, rounding and all."""
    expected = dense.backward(dO)
    for name, X in expected.items():
        if np.abs(X).max(initial=0) < 0.25 * np.finfo(np.float32).max:
            assert np.isfinite(getattr(g, name)).all(), name
    kept = case.get("key_mask", np.ones(dense.k.shape[1], bool))
    k, spread = dense.k[:, kept], np.ptp(dense.v[:, kept], axis=1)
    # Beside a near scale, keys are not centred.
    k = k if "near" in case else k - k.mean(axis=1, keepdims=True)
    size = (np.abs(dO.astype(np.float64)) * spread[:, None]).sum(axis=-1)
    scale = max(dense.scale, np.abs(case.get("near", (0, 0.0))[1]).max())
    size *= np.linalg.norm(k, axis=-1).max(axis=1)[:, None] * scale
    error = min(g.certificate.error, 0.999)
    allowed = (math.atanh(error) / 2 + g.certificate.rounding) * size
    allowed += 4 * np.finfo(np.float32).eps * np.linalg.norm(expected["dQ"], axis=-1) + TINY
    # What float32 does not hold is Inf in g.dQ.
    held = np.abs(expected["dQ"]).max(axis=-1) < 0.25 * np.finfo(np.float32).max
    off = np.linalg.norm(np.where(held[..., None], g.dQ, 0.0) - np.where(held[..., None], expected["dQ"], 0.0), axis=-1)
    assert np.all(off <= allowed)


@hunting
@given(
    seed=st.integers(0, 2**32),
    method=st.sampled_from(["auto", "exact", "polynomial", "fft"]),
    eps=st.sampled_from([1e-2, 1e-3, 1e-4]),
)
def test_no_number_is_past_what_is_certified(seed, method, eps):
    case, dO = case_drawn(np.random.default_rng(seed))
    ours = case | ({"bias": relative_bias(case["bias"])} if "bias" in case else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ropecy.AccuracyWarning)
        try:
            O, vjp = ropecy.attention_vjp(**ours, method=method, eps=eps, seed=1)
        except (ropecy.BoundedEntryError, NotImplementedError):
            assert method in ("polynomial", "fft")
            return
        g = vjp(dO)
    with np.errstate(over="ignore", under="ignore"):
        dense = oracle.attention(**case)
        kept = case.get("key_mask", np.ones(dense.k.shape[1], bool))
        values = dense.v[:, kept]
        spread = np.ptp(values, axis=1).max() or np.abs(values).max()
        assert np.abs(O - dense.O).max(initial=0) <= vjp.certificate.error * spread * 1.02
        assert_gradients(case, g, dense, dO)
