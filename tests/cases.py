"""The problems that the tests share: each case is the keyword arguments of one call, with the oracle's R and bias."""

import numpy as np
from oracle import Alibi, Rope, Table

# What each case says of shapes (leads, n, n_k, d, d_v), of R, and of what is made at random: masks, biases, positions,
# projections. `options` goes to the call as it is.
SPECS = {
    "plain": {},
    "one_token": {"n": 1, "rope": {}},
    "one_key": {"n": 5, "n_k": 1},
    "one_column": {"n": 19, "d": 1, "d_v": 1},
    "prime_lengths": {"n": 101, "n_k": 53, "d": 3, "d_v": 5},
    "wide": {"n": 61, "n_k": 67, "d": 64, "d_v": 71, "rope": {}},
    "wide_values": {"n": 17, "d": 2, "d_v": 130},
    "long": {"n": 300, "n_k": 271, "d": 8, "rope": {}},
    "long_causal": {"n": 293, "d": 8, "rope": {}, "options": {"causal": True}},
    "rope_half": {"d": 6, "rope": {}},
    "rope_interleaved": {"d": 6, "rope": {"pairing": "interleaved"}},
    "rope_partial_odd_width": {"d": 7, "rope": {"rotary_dim": 4, "base": 100.0}},
    "rope_partial_interleaved": {"d": 5, "rope": {"rotary_dim": 2, "pairing": "interleaved"}},
    "rope_attention_factor": {"d": 4, "rope": {"attention_factor": 1.25}},
    "positions": {"n": 23, "n_k": 31, "rope": {}, "positions": "one axis"},
    "positions_per_row": {"q_lead": (3,), "n": 11, "n_k": 13, "rope": {}, "positions": "per row"},
    "causal": {"n": 67, "rope": {}, "options": {"causal": True}},
    "causal_more_keys": {"n": 20, "n_k": 45, "rope": {}, "options": {"causal": True, "q_offset": 25}},
    "causal_more_queries": {"n": 45, "n_k": 20, "options": {"causal": True}},
    "causal_empty_rows": {"n": 17, "n_k": 9, "rope": {}, "options": {"causal": True, "q_offset": -4}},
    "window": {"n": 59, "rope": {}, "options": {"window": 7}},
    "window_of_one": {"n": 13, "options": {"window": 1}},
    "window_wider_than_text": {"n": 13, "options": {"window": 1000}},
    "window_two_sided": {"n": 59, "n_k": 50, "rope": {}, "options": {"window": (5, 3)}},
    "window_two_sided_causal": {"n": 31, "options": {"window": (4, 4), "causal": True, "q_offset": 2}},
    "key_mask": {"n": 29, "n_k": 37, "rope": {}, "mask": "one axis"},
    "key_mask_per_row": {"q_lead": (2, 3), "n": 11, "n_k": 13, "mask": "per row"},
    "key_mask_causal": {"n": 41, "mask": "one axis", "options": {"causal": True}},
    "bias_table": {"n": 23, "n_k": 27, "rope": {}, "bias": ("table", (2 * 40 - 1,))},
    "bias_table_clipped": {"n": 23, "n_k": 27, "bias": ("table", (9,)), "options": {"q_offset": 3}},
    "bias_table_of_one": {"n": 7, "bias": ("table", (1,))},
    "bias_table_per_head": {"q_lead": (2, 4), "k_lead": (2, 2), "n": 11, "bias": ("table", (4, 7))},
    "alibi": {"n": 33, "bias": ("alibi", ()), "options": {"causal": True}},
    "alibi_per_head": {"q_lead": (2, 3), "n": 17, "bias": ("alibi", (3,)), "options": {"causal": True}},
    "near": {"n": 43, "rope": {}, "options": {"near": (6, 2.0)}},
    "near_causal": {"n": 43, "n_k": 50, "rope": {}, "options": {"near": (6, 2.0), "causal": True, "q_offset": 7}},
    "near_of_heads": {
        "q_lead": (2, 4),
        "k_lead": (2, 2),
        "n": 43,
        "rope": {},
        "options": {"near": (6, [2.0, 0.5, -1.0, 0.0]), "causal": True},
    },
    "batch_and_heads": {"q_lead": (2, 3), "n": 13, "d": 6, "d_v": 5, "rope": {}},
    "grouped_queries": {"q_lead": (2, 6), "k_lead": (2, 2), "n": 13, "n_k": 19, "rope": {}},
    "grouped_queries_causal": {"q_lead": (4,), "k_lead": (2,), "n": 31, "rope": {}, "options": {"causal": True}},
    "one_key_head": {"q_lead": (2, 4), "k_lead": (2, 1), "n": 13, "rope": {}},
    "keys_without_batch": {"q_lead": (3, 2), "k_lead": (), "n": 9, "n_k": 7},
    "queries_without_batch": {"q_lead": (), "k_lead": (3,), "n": 9, "n_k": 7},
    "weight": {"n": 21, "d": 4, "rope": {}, "project": {"W": (4, 4)}},
    "weight_per_head": {"q_lead": (2, 3), "n": 9, "project": {"W": (3, 4, 4)}},
    "projections": {
        "n": 21,
        "d": 5,
        "d_v": 6,
        "rope": {"d": 4},
        "project": {"W": (4, 4), "W_Q": (5, 4), "W_K": (5, 4), "W_V": (6, 3)},
        "options": {"causal": True},
    },
    "one_projection": {"n": 21, "project": {"W_K": (4, 4)}},
    "negative_scale": {"n": 21, "rope": {}, "options": {"scale": -0.3}},
    "no_scale": {"n": 21, "options": {"scale": 0.0}},
    "everything": {
        "q_lead": (2, 4),
        "k_lead": (2, 2),
        "n": 19,
        "n_k": 23,
        "d": 7,
        "d_v": 3,
        "rope": {"d": 5, "rotary_dim": 4, "pairing": "interleaved"},
        "positions": "per row",
        "mask": "per row",
        "bias": ("table", (4, 11)),
        "project": {"W": (5, 5), "W_Q": (7, 5), "W_K": (7, 5), "W_V": (3, 2)},
        "options": {"causal": True, "window": (9, 4), "near": (3, 0.7), "q_offset": 3},
    },
}

# What the polynomial engine does in one piece: no window, no bias, no near field, and few enough monomials.
POLYNOMIAL = [
    name
    for name, spec in SPECS.items()
    if "bias" not in spec and not {"window", "near"} & set(spec.get("options", {})) and spec.get("d", 4) <= 8
]


def unit_rows(X):
    """Rows of norm sqrt(d), which bounds a score with scale 1/d by 1."""
    norm = np.sqrt(np.mean(X * X, axis=-1, keepdims=True))
    return (X / np.maximum(norm, np.finfo(X.dtype).tiny)).astype(X.dtype)


def make(name, rng, dtype=np.float64, unit=False):
    """The keyword arguments of the case, R and bias included, drawn from rng."""
    spec = SPECS[name]
    q_lead = spec.get("q_lead", ())
    k_lead = spec.get("k_lead", q_lead)
    n, d = spec.get("n", 37), spec.get("d", 4)
    n_k, d_v = spec.get("n_k", n), spec.get("d_v", d)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    case = {"Q": draw(*q_lead, n, d), "K": draw(*k_lead, n_k, d), "V": draw(*k_lead, n_k, d_v)}
    if unit:
        case["Q"], case["K"] = unit_rows(case["Q"]), unit_rows(case["K"])
    for weight, shape in spec.get("project", {}).items():
        # Singular values of at most one: a projection doesn't take the scores past their bound.
        case[weight] = draw(*shape)
        case[weight] /= np.linalg.norm(case[weight], ord=2, axis=(-2, -1), keepdims=True)
    if "rope" in spec:
        case["R"] = Rope(**{"d": d, **spec["rope"]})
    if "mask" in spec:
        lead = () if spec["mask"] == "one axis" else q_lead[:1] + (1,) * len(q_lead[1:])
        case["key_mask"] = rng.random(lead + (n_k,)) < 0.6
        case["key_mask"][..., 0] = True
    if "positions" in spec:
        lead = () if spec["positions"] == "one axis" else q_lead[:1] + (1,) * len(q_lead[1:])
        case["q_positions"] = rng.integers(-50, 50, lead + (n,))
        case["k_positions"] = rng.integers(-50, 50, lead + (n_k,))
    if "bias" in spec:
        kind, shape = spec["bias"]
        case["bias"] = Table(rng.standard_normal(shape)) if kind == "table" else Alibi(rng.uniform(0.05, 0.5, shape))
    return {**case, **spec.get("options", {})}


def upstream(case, dense, rng):
    """A random dO for the case, in its dtype."""
    return rng.standard_normal(dense.O.shape).astype(case["Q"].dtype)
