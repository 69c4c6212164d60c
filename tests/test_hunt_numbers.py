"""A hunt for results past their certificates in numbers far from 0, of any size and of unlike sizes.

``ROPECY_HUNT=10000 pytest tests/test_hunt_numbers.py`` looks at so many problems.
"""

import os

import numpy as np
import oracle
import pytest
from conftest import relative_bias, rotary
from hypothesis import given, settings
from hypothesis import strategies as st

import ropecy

ASKED = os.environ.get("ROPECY_HUNT")
# The powers of ten that values of a dtype may have.
SIZES = {"float16": (-6, 4), "bfloat16": (-37, 37), "float32": (-43, 37), "float64": (-300, 306)}


def values_drawn(kind, rng, shape, powers):
    """Values (heads, n_k, d_v) of a kind."""
    V = rng.uniform(-1, 1, shape)
    heads, _, d_v = shape
    far = min(7, powers[1] - 1)
    return {
        "plain": lambda: V,
        "far": lambda: V + 10.0 ** rng.uniform(0, far) * rng.standard_normal(d_v),
        "columns": lambda: V * 10.0 ** rng.uniform(*np.clip(powers, -30, 30), d_v),
        "heads": lambda: V * 10.0 ** rng.uniform(*np.clip(powers, -30, 30), (heads, 1, 1)),
        "any size": lambda: V * 10.0 ** rng.uniform(*powers),
        "a constant": lambda: np.where(np.arange(d_v) == 0, 10.0 ** rng.uniform(-3, 3), V),
        "few digits": lambda: 10.0 ** rng.integers(0, far) + rng.integers(0, 3, shape),
    }[kind]()


def bias_drawn(kind, rng):
    """The oracle's bias."""
    if kind == "steep":
        return oracle.Alibi(10.0 ** rng.uniform(-2, 3))
    if kind == "a mask":
        lowest = rng.choice([-1e4, -7e37, -1e39, float(np.finfo(np.float32).min)])
        return oracle.Table(np.where(np.arange(99) > 49, lowest, 0.0))
    return oracle.Table(10.0 ** rng.uniform(0, 9) * rng.standard_normal(2 * int(rng.integers(1, 80)) - 1))


def problem_drawn(rng, kind, keys, bias, dtype):
    """The arguments of the oracle."""
    n, n_k = (int(rng.choice([1, 3, 17, 60, 130])) for _ in range(2))
    d, heads, group = int(rng.choice([1, 2, 4, 8, 32])), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    Q, K = rng.standard_normal((heads * group, n, d)), rng.standard_normal((heads, n_k, d))
    Q *= 10.0 ** rng.uniform(-1, 1)
    wide = dtype != "float16"
    if keys == "far":
        K += 10.0 ** rng.uniform(0, 5 if wide else 2) * rng.standard_normal(d)
    if keys == "of unlike size":
        power = 10.0 ** (rng.uniform(-30, 30) if wide else 0)
        Q, K = Q * power, K / power
    case = {"Q": Q, "K": K, "V": values_drawn(kind, rng, (heads, n_k, 2), SIZES[dtype])}
    case["scale"] = float(rng.choice([1 / d, d**-0.5, -1 / d]))
    if rng.random() < 0.15:
        case["near"] = int(rng.integers(1, 40)), float(10.0 ** rng.uniform(-2, 2))
        case["scale"] *= float(rng.integers(0, 2))
    if rng.random() < 0.4:
        case |= {"causal": True, "q_offset": n_k - n + int(rng.integers(-3, 4))}
    elif rng.random() < 0.3:
        case["window"] = tuple(int(side) for side in rng.integers(0, 30, 2))
    if rng.random() < 0.3:
        case["key_mask"] = rng.random(n_k) < 0.5
    if d % 2 == 0 and rng.random() < 0.3:
        case["R"] = oracle.Rope(d)
    if bias != "none":
        case["bias"] = bias_drawn(bias, rng)
    if dtype in ("float32", "float64") and rng.random() < 0.2:
        # A projection in which nearly all cancels.
        common = 10.0 ** rng.uniform(0, 4)
        case["K"] = np.concatenate([case["K"] + common, np.full(case["K"].shape, common)], axis=-1)
        case["W_K"] = np.concatenate([np.eye(d), -np.eye(d)])
    made = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype) if dtype == "bfloat16" else dtype)
    return {key: X.astype(made) if isinstance(X, np.ndarray) and X.dtype != bool else X for key, X in case.items()}


def exactly(case):
    """The oracle in extended precision, biases counted from the largest, which softmax does not see."""
    wide = {key: X.astype(np.longdouble) for key, X in case.items() if isinstance(X, np.ndarray) and X.dtype != bool}
    if isinstance(bias := case.get("bias"), oracle.Table):
        wide["bias"] = oracle.Table(bias.values - bias.values.max())
    return oracle.attention(**{**case, **wide}, dtype=np.longdouble)


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 2.0**-60, reason="long double is no more than double here")
@pytest.mark.filterwarnings("ignore::ropecy.AccuracyWarning")
@settings(max_examples=int(ASKED or 200))
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["plain", "far", "columns", "heads", "any size", "a constant", "few digits"]),
    keys=st.sampled_from(["plain", "far", "of unlike size"]),
    bias=st.sampled_from(["none", "none", "none", "steep", "a table", "a mask"]),
    dtype=st.sampled_from(list(SIZES)),
)
def test_no_number_is_past_what_is_certified(seed, kind, keys, bias, dtype):
    case = problem_drawn(np.random.default_rng(seed), kind, keys, bias, dtype)
    given = dict(case)
    if "bias" in case:
        given["bias"] = relative_bias(case["bias"])
    if "R" in case:
        given["R"] = rotary(case["R"])
    O, certificate = ropecy.attention(**given, method="exact", return_certificate=True)
    dense = exactly(case)
    kept = np.broadcast_to(case.get("key_mask", True), dense.v.shape[:-1])[..., None]
    high, low = np.where(kept, dense.v, -np.inf).max(axis=-2), np.where(kept, dense.v, np.inf).min(axis=-2)
    largest = np.abs(np.where(kept, dense.v, 0)).max(axis=-2, keepdims=True)
    spread = np.where(kept.any(axis=-2), high - low, 0).max() or largest.max()
    assert np.isfinite(O.astype(np.longdouble)).all()
    # The oracle rounds too: constants, and keys far from 0, which it does not centre.
    own = 8 * float(np.finfo(np.longdouble).eps)
    room = own * largest + own * np.abs(dense.k).max() * np.abs(dense.q).max() * np.abs(case["scale"]) * spread
    assert np.all(np.abs(O.astype(np.longdouble) - dense.O) <= certificate.error * spread + room)
