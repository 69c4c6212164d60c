"""What hunts draw: the words that say what kind of problem it is, and the problem that they stand for.

A problem is drawn in words, `SHORT` and `LONG` (`TEXTS` for DecodeState), one for each thing in which problems differ,
and a seed; a counterexample reads as such words. The first of each is the plainest, to which Hypothesis shrinks.
"""

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from moment_cases import DATA, adversarial
from oracle import Alibi, Buckets, Family, Kerple, Rope, Table
from promises import numbers

from ropecy import RelativeBias

DTYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "float16": np.dtype(np.float16)}
try:
    import ml_dtypes

    DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    pass

FAR = (1e1, 1e3, 1e4)  # how many times as far from 0 as keys spread

VALUES = {
    "uniform": lambda rng, n, m: rng.uniform(-1, 1, (n, m)),
    "far": lambda rng, n, m: rng.uniform(-1, 1, (n, m)) + 10 ** rng.uniform(0, 7),
    "one constant, one small": lambda rng, n, m: 10.0 ** -rng.integers(0, 9, m) * _first_constant(rng, n, m),
    "few digits": lambda rng, n, m: 10.0 ** rng.integers(5, 9) + 8.0 * rng.integers(0, 3, (n, m)),
    "columns unlike": lambda rng, n, m: rng.uniform(-1, 1, (n, m)) * 10 ** rng.uniform(-30, 30, m),
    "huge": lambda rng, n, m: 3e38 * rng.uniform(-1, 1, (n, m)),
    "signs of the largest": lambda rng, n, m: 3e38 * rng.choice([-1.0, 1.0], (n, m)),
    "tiny": lambda rng, n, m: 10 ** rng.uniform(-43, -20) * rng.uniform(-1, 1, (n, m)),
    "constant": lambda rng, n, m: np.broadcast_to(rng.uniform(-5, 5, m), (n, m)),
    "rare": lambda rng, n, m: (rng.random((n, m)) < 0.05) + 0.0,
    "ramp": lambda rng, n, m: np.arange(n)[:, None] + rng.uniform(-1, 1, (n, m)),
    "late outlier": lambda rng, n, m: rng.uniform(-1, 1, (n, m)) + 1e5 * (np.arange(n) == n - 1)[:, None],
    "equal but for two": lambda rng, n, m: 0.1 + 0.01 * np.isin(np.arange(n), (0, n // 2))[:, None] * np.ones(m),
}

BIASES = {
    "none": lambda rng, heads, n: None,
    "alibi": lambda rng, heads, n: Alibi(np.array(10 ** rng.uniform(-4, 0.5))),
    "alibi of heads": lambda rng, heads, n: Alibi(10 ** rng.uniform(-4, 0.5, heads)),
    "steep alibi": lambda rng, heads, n: Alibi(np.array(10 ** rng.uniform(0, 9))),
    "table": lambda rng, heads, n: Table(rng.standard_normal(2 * int(rng.integers(1, 2 * n + 2)) - 1)),
    "table of heads": lambda rng, heads, n: Table(rng.standard_normal((heads, 2 * int(rng.integers(1, 30)) - 1))),
    "high table": lambda rng, heads, n: Table(10 ** rng.uniform(1, 9) * rng.uniform(-1, 1, 2 * n - 1)),
    "ramp": lambda rng, heads, n: Table(np.linspace(-(10 ** rng.uniform(0, 3)), 0, 2 * n - 1)),
    "lowest beyond a distance": lambda rng, heads, n: Table(
        np.where(np.abs(np.arange(1 - n, n)) > rng.integers(0, n), rng.choice([-1e9, -7e37, -3.4e38]), 0.0)
    ),
    "one for all": lambda rng, heads, n: Table(np.array([rng.choice([-1e39, -7e37, -1e9, 1e4, 1e9, 1e39])])),
    "t5": lambda rng, heads, n: Buckets(rng.standard_normal(8), 40, bool(rng.integers(2))),
    "kerple": lambda rng, heads, n: Kerple(np.array(1.5), np.array(0.7), str(rng.choice(["log", "power"]))),
}

SEEN = {
    "all": lambda rng, n, n_k: {},
    "causal": lambda rng, n, n_k: {"causal": True},
    "causal, offset": lambda rng, n, n_k: {"causal": True, "q_offset": int(rng.integers(-n // 2, n_k))},
    "window": lambda rng, n, n_k: {"window": int(rng.integers(1, n_k + 1))},
    "two-sided window": lambda rng, n, n_k: {"window": (int(rng.integers(0, n_k)), int(rng.integers(0, n_k)))},
    "key_mask": lambda rng, n, n_k: {"key_mask": rng.random(n_k) < 0.6},
    "a run hidden": lambda rng, n, n_k: {"key_mask": _outside_a_run(rng, n_k)},
    "causal, a gap": lambda rng, n, n_k: {"causal": True, "key_mask": abs(np.arange(n_k) / n_k - 0.5) > 0.1},
    "near": lambda rng, n, n_k: {"near": (int(rng.integers(1, n_k + 1)), float(rng.choice([0.5, 2.0, 30.0, 1e4])))},
    "near, scale 0": lambda rng, n, n_k: {"near": (int(rng.integers(1, n_k + 1)), 10 ** rng.uniform(0, 6)), "scale": 0},
    "near, largest": lambda rng, n, n_k: {"near": (int(rng.integers(1, n_k + 1)), float(rng.choice([1e30, 3e38])))},
    "causal, near": lambda rng, n, n_k: {"causal": True, "near": (int(rng.integers(1, 40)), rng.uniform(0.5, 3))},
    "near of heads": lambda rng, n, n_k: {"near": (int(rng.integers(1, n_k + 1)), float(rng.choice([0.5, 2.0, 30.0])))},
    "causal, near of heads": lambda rng, n, n_k: SEEN["causal, near"](rng, n, n_k),
}

ROTATED = {
    "no": lambda rng, d, n, n_k: None,
    "half": lambda rng, d, n, n_k: Rope(d, 100.0, rotary_dim=2 * (d // 2)) if d > 1 else None,
    "interleaved": lambda rng, d, n, n_k: Rope(d, pairing="interleaved", rotary_dim=2) if d > 1 else None,
    "family": lambda rng, d, n, n_k: Family(rng.uniform(-1, 1, (n + n_k - 1, d, d)) / d, n_k=n_k),
    "diagonal family": lambda rng, d, n, n_k: Family(
        rng.uniform(-1, 1, (n + n_k - 1, d)), n_k=n_k, support=np.stack([np.arange(d)] * 2, axis=1)
    ),
}

# What becomes of queries and keys (H, G, n, d), (H, n_k, d); both products and shapes are as they were.
MOVED = {
    "no": lambda rng, q, k: (q, k),
    "keys far": lambda rng, q, k: (q, k + rng.choice(FAR) * rng.standard_normal(k.shape[-1])),
    "keys near each other": lambda rng, q, k: (q, rng.standard_normal(k.shape[-1]) + 1e-4 * k),
    "columns unlike": lambda rng, q, k: (q * (by := 10 ** rng.uniform(-7, 7, q.shape[-1])), k / by),
    "heads unlike": lambda rng, q, k: (q * (by := 10.0 ** rng.integers(-9, 10, (len(q), 1, 1, 1))), k / by[:, 0]),
    "huge and tiny": lambda rng, q, k: (q * (by := 10 ** rng.uniform(-25, 25)), k / by),
    "long queries": lambda rng, q, k: (q * np.where(rng.random(q.shape[:-1]) < 8 / q.shape[2], 60, 1)[..., None], k),
    "a long key": lambda rng, q, k: (q, k * np.where(np.arange(k.shape[1]) == k.shape[1] // 2, 60, 1)[:, None]),
    "no queries": lambda rng, q, k: (0 * q, k),
    "no queries, keys far": lambda rng, q, k: (0 * q, k + rng.choice(FAR) * rng.standard_normal(k.shape[-1])),
    "zeros": lambda rng, q, k: (q * (rng.random(q.shape[:-1]) < 0.5)[..., None], 0 * k),
}

SHORT = {
    "method": ["exact", "auto", "polynomial", "fft"],
    "dtype": [*DTYPES],
    "sizes": ["few", "some", "many", "few queries"],
    "heads": ["one", "groups", "key heads", "both"],
    "scores": [0.5, 0.1, 2.0, 3.5, 30.0, 1e3],
    "data": [*DATA],
    "moved": [*MOVED],
    "values": [*VALUES],
    "seen": [*SEEN],
    "bias": [*BIASES],
    "rotated": [*ROTATED],
    "projected": ["no", "V", "Q", "K", "all"],
    "upstream": ["uniform", "huge", "tiny", "of few rows"],
    "eps": [1e-3, 1e-1, 1e-2, 1e-5, 1e-9, 1e-12],
}

LONG = {
    "method": ["auto", "polynomial"],
    "dtype": ["float32", "float64", "bfloat16" if "bfloat16" in DTYPES else "float16"],
    "n": [5000, 8000, 12000, 20000],
    "heads": ["one", "groups"],
    "scores": [1.0, 0.5, 2.0],
    "data": ["of one length", "gauss"],
    "moved": ["no", "long queries", "a long key", "keys far", "heads unlike"],
    "values": [*VALUES],
    "seen": ["causal", "all", "causal, a gap", "causal, near", "causal, near of heads", "key_mask"],
    "bias": ["none", "none", "alibi", "alibi of heads", "steep alibi", "table of heads", "t5"],
    "upstream": ["of few rows", "huge of few rows", "tiny of few rows"],
    "eps": [1e-2, 1e-3, 1e-4],
}

TEXTS = {
    "dtype": ["float64", "float32"],
    "scores": [1.0, 1e-3, 0.3],
    "values": [*VALUES],
    "slope": ["none", "none", "one", "of heads", "steep"],
    "heads": ["one", "groups", "both"],
    "window": [None, None, 1, 100],
    "keys": ["equal", "unit", "short and long"],
    "told": ["in pieces", "one by one", "one by one, all alike"],
    "asks": ["within", "past the bound"],
    "eps": [1e-3, 1e-6, 1e-12, 1e-12],
}


def words(of):
    """A strategy for the words of `SHORT`, `LONG` or `TEXTS`, and a seed."""
    found = st.fixed_dictionaries(
        {name: st.sampled_from(each) for name, each in of.items()} | {"seed": st.integers(0, 2**32)}
    )
    return found.map(within_reach)


# What an engine that is insisted on refuses whatever the numbers are, and what is drawn in its place.
REFUSED = {
    "polynomial": {
        "rotated": {"family": "half", "diagonal family": "interleaved"},
        "seen": {"window": "causal", "two-sided window": "a run hidden"},
        "scores": {30.0: 1.0, 1e3: 0.3},
    },
    "fft": {
        "seen": {word: "causal" if "causal" in word else "all" for word in SEEN if "near" in word},
        "scores": {30.0: 1.0, 1e3: 0.3},
    },
}
UNREACHED = {1e-5: 1e-3, 1e-9: 1e-2, 1e-12: 1e-1}  # by float32, of eps


# Tokens whose sums drift, for each is rounded to the same side: it shows where hardly anything else is rounded.
ALIKE = {"scores": 1e-3, "values": "equal but for two", "keys": "equal", "slope": "none", "window": None}


def within_reach(drawn):
    """The words, with others for those that the engine which is insisted on always refuses, so that most reach it; and
    for those that would hide the drift of tokens that are all alike.
    """
    if drawn.get("told") == "one by one, all alike":
        return drawn | ALIKE | {"eps": 1e-12 if drawn["dtype"] == "float64" else 1e-6}
    refused = dict(REFUSED.get(drawn.get("method"), {}))
    if refused and drawn["dtype"] != "float64":
        refused["eps"] = UNREACHED
    return drawn | {name: instead.get(drawn[name], drawn[name]) for name, instead in refused.items() if name in drawn}


def _first_constant(rng, n, m):
    V = rng.uniform(-1, 1, (n, m))
    V[:, 0] = 1000.0
    return V


def _outside_a_run(rng, n_k):
    first, last = np.sort(rng.integers(0, n_k, 2))
    return ~((first <= np.arange(n_k)) & (np.arange(n_k) < last))


def _held(X, dtype):
    """X in a dtype, where its largest number stands for what is past it; C-contiguous."""
    largest = float(numbers(dtype).max)
    with np.errstate(under="ignore"):
        return np.ascontiguousarray(np.clip(X, -largest, largest).astype(dtype))


def _cancelling(X, rng):
    """[X + c, c] and [[a I], [-a I]], which give a X back, c being far larger."""
    far, eye = np.full_like(X, 10 ** rng.uniform(0, 4) * max(1e-30, np.abs(X).max())), np.eye(X.shape[-1])
    return np.concatenate([X + far, far], axis=-1), rng.uniform(0.5, 2) * np.concatenate([eye, -eye])


def short(drawn):
    """The arguments of attention that the words stand for, with the oracle's R and bias; and dO."""
    rng, dtype = np.random.default_rng(drawn["seed"]), DTYPES[drawn["dtype"]]
    most = {"few": 24, "some": 130}.get(drawn["sizes"], 490)
    n, n_k = (int(size) for size in rng.integers(max(1, most // 3), most, 2))
    if drawn["seen"].startswith("causal") or rng.random() < 0.3:
        n_k = n
    if drawn["sizes"] == "few queries":
        n = int(rng.integers(1, 9))
    d, d_v = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    if drawn["rotated"] == "family" and drawn["method"] == "fft":
        # Of d^2 entries there are millions of monomials at the degrees that a small eps takes.
        d = min(d, 2)
    return _problem(drawn, rng, dtype, n, n_k, d, d_v)


def _problem(drawn, rng, dtype, n, n_k, d, d_v):
    H = 2 if drawn["heads"] in ("key heads", "both") else 1
    G = int(rng.integers(2, 4)) if drawn["heads"] in ("groups", "both") else 1
    if drawn["data"] == "of one length":
        q, k = (X / norms(X)[..., None] for X in adversarial("gauss", rng, (H, G, n, n_k, d), 1.0))
        q = q * drawn["scores"]
    else:
        q, k = adversarial(drawn["data"], rng, (H, G, n, n_k, d), drawn["scores"])
    q, k = MOVED[drawn["moved"]](rng, q, k)
    v = np.stack([VALUES[drawn["values"]](rng, n_k, d_v) for _ in range(H)])
    if dtype == np.float64 and drawn["values"] in ("huge", "tiny"):
        v = v * (1e269 if drawn["values"] == "huge" else 1e-280)
    if drawn["moved"] == "heads unlike" and rng.random() < 0.5:
        v = v * 10.0 ** rng.integers(-19, 1, (H, 1, 1))
    lead = () if H * G == 1 and "heads" not in drawn["bias"] else (H,)
    case = {"Q": q.reshape(*((H * G,) if lead else ()), n, d), "K": k.reshape(*lead, n_k, d), "scale": 1.0}
    case["V"] = v.reshape(*lead, n_k, d_v)
    case |= SEEN[drawn["seen"]](rng, n, n_k)
    if drawn["seen"].endswith("of heads"):
        # Each head has its own, of any size and sign, 0 among them.
        width, scale = case["near"]
        case["near"] = width, scale * 10 ** rng.uniform(-2, 2, H * G) * rng.choice([-1, 0, 1], H * G)
    if (R := ROTATED[drawn.get("rotated", "no")](rng, d, n, n_k)) is not None:
        case["R"] = R
    if (bias := BIASES[drawn["bias"]](rng, H * G if lead else 1, max(n, n_k))) is not None:
        case["bias"] = bias
    projected = drawn.get("projected", "no")
    for name in "QKV" if projected == "all" else projected if projected != "no" else "":
        if np.abs(case[name]).max() < 1e-8 * float(numbers(dtype).max):
            X, W = _cancelling(case[name], rng)
            case[name], case[f"W_{name}"] = X, _held(W, dtype)
    dO = rng.uniform(-1, 1, case["Q"].shape[:-1] + (d_v,))
    dO *= 10 ** rng.uniform(10, 30) if "huge" in drawn["upstream"] else 1
    dO *= 10 ** rng.uniform(-38, -10) if "tiny" in drawn["upstream"] else 1
    return case | {name: _held(case[name], dtype) for name in "QKV"}, _held(dO, dtype)


def long(drawn):
    """The same of a problem of many rows; and the blocks of rows that are looked at, outside which dO is 0."""
    rng, dtype, n = np.random.default_rng(drawn["seed"]), DTYPES[drawn["dtype"]], drawn["n"]
    n += int(rng.integers(0, 300))
    case, dO = _problem(drawn, rng, dtype, n, n, int(rng.integers(2, 5)), 2)
    size = norms(case["Q"])
    longest = np.argsort(size.reshape(-1, n).max(axis=0))[-6:]
    rows = np.unique([0, 1, 191, 192, 193, n // 2, n - 1, *longest, *rng.integers(0, n, 12)])
    chosen = np.zeros((n, 1), dtype)
    chosen[rows] = 1
    return case, dO * chosen, [(int(i), int(i) + 1) for i in rows]


def norms(X):
    return np.linalg.norm(X.astype(np.float64), axis=-1)


@dataclass
class Text:
    """The options of a DecodeState, and the tokens that it is told; scale 1.

    Keys are (*lead, n, d), values (*lead, n, d_v), each key head having `groups` queries, and each of these a slope.
    """

    options: dict
    K: np.ndarray
    V: np.ndarray
    lead: tuple
    groups: int
    slopes: np.ndarray

    def query(self, at, long):
        """(..., d): the keys around a token, so many times as long."""
        lead = (self.lead[0] * self.groups,) if self.lead else ()
        rows = self.K[..., max(0, at - self.groups) : max(1, at), :]
        return np.resize(rows * self.K.dtype.type(long), (*lead, self.K.shape[-1]))


def text(drawn, length=100_000):
    """The text that the words stand for."""
    rng, dtype = np.random.default_rng(drawn["seed"]), DTYPES[drawn["dtype"]]
    lead = {"one": (), "groups": (1,), "both": (2,)}[drawn["heads"]]
    groups = 2 if lead else 1
    d, d_v = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    K = rng.standard_normal(lead + (length, d))
    if drawn["keys"] == "equal":
        K = np.broadcast_to(K[..., :1, :], K.shape)
    K = K * (math.sqrt(drawn["scores"]) / norms(K)[..., None])
    if drawn["keys"] == "short and long":
        K = K * 10 ** rng.uniform(-6, 0, K.shape[:-1] + (1,))
    V = np.broadcast_to(VALUES[drawn["values"]](rng, length, d_v), lead + (length, d_v))
    slopes = {"none": 0.0, "one": 10 ** rng.uniform(-6, -1), "steep": rng.uniform(1, 50)}.get(drawn["slope"])
    slopes = 10 ** rng.uniform(-6, 0, math.prod(lead) * groups) if slopes is None else np.array(slopes)
    if not lead:
        slopes = slopes.reshape(-1)[0]
    options = {"d": d, "d_v": d_v, "dtype": dtype, "eps": drawn["eps"], "bound": drawn["scores"], "scale": 1.0}
    options |= {"window": drawn["window"], "on_break": "exact" if drawn["asks"] == "past the bound" else "raise"}
    if drawn["slope"] != "none":
        options["bias"] = RelativeBias.alibi(slopes)
    return Text(options, _held(K, dtype), _held(V, dtype), lead, groups, slopes)
