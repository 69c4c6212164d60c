"""Exact attention where the last tile of queries is not full, against dense attention in float64."""

import numpy as np
import oracle
import pytest

import ropecy

# Tiles have 4 to 48 queries; those past the last whole one fill one to four vectors of 2 to 16.
LENGTHS = [9, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 80, 81, 97]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.1, 4.0], ids=["bounded scores", "a running maximum"])
@pytest.mark.parametrize("n", LENGTHS)
def test_last_tile(n, scale, dtype, rng):
    Q, K, V = (rng.standard_normal((2, rows, width)).astype(dtype) for rows, width in ((n, 12), (130, 12), (130, 7)))
    masks = {}, {"causal": True, "q_offset": 20}, {"window": (9, 4)}
    for options in (*masks, {"bias": oracle.Alibi(0.05)}, {"near": (5, 0.7)}):
        plain, dense = (oracle.attention(Q, K, V, scale=scale, **options, dtype=t) for t in (dtype, np.float64))
        if "bias" in options:
            options = {"bias": ropecy.RelativeBias.alibi(0.05)}
        O, lse = ropecy.attention(Q, K, V, scale=scale, method="exact", return_lse=True, **options)
        unit = np.finfo(dtype).eps
        # A score that is rounded moves its weight by as much, and O by up to that much of the values.
        rounded = 2 * unit * max(2, np.abs(dense.lse).max()) * np.abs(V).max()
        assert np.abs(O - dense.O).max() <= max(2 * np.abs(plain.O - dense.O).max(), rounded)
        np.testing.assert_allclose(lse, dense.lse, rtol=0, atol=60 * unit * np.abs(dense.lse).max())


# So many heads that their gradients are not computed all at once, and some of them, across the border, that are.
@pytest.mark.parametrize("name", ["plain", "halves", "bias", "near", "key_mask"])
def test_gradients_of_heads_do_not_depend_on_which_are_computed_at_once(name, rng):
    heads, some = 14, slice(3, 10)
    Q, K, V, dO = rng.standard_normal((4, heads, 1024, 7)).astype(np.float16 if name == "halves" else np.float32)
    slopes, scales, kept = rng.uniform(0, 0.1, heads), rng.uniform(-1, 1, heads), rng.random((heads, 1024)) < 0.9

    def of(which):
        options = {
            "bias": {"bias": ropecy.RelativeBias.alibi(slopes[which])},
            "near": {"near": (5, tuple(scales[which]))},
            "key_mask": {"key_mask": kept[which]},
        }.get(name, {})
        how = {"method": "exact", "causal": True, "threads": 1}
        return vars(ropecy.attention_vjp(Q[which], K[which], V[which], **how, **options)[1](dO[which]))

    every, found = of(slice(None)), of(some)
    for gradient in ("dQ", "dK", "dV", "dbias", "dscale_near"):
        if gradient in found:
            assert np.array_equal(found[gradient], every[gradient][some])
