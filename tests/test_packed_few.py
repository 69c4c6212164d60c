"""Packed sequences of a few queries are computed as a call of one of them alone is."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import sequences

import ropecy

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def assert_as_alone(case, rows, keys, threads=1):
    """O and lse are bitwise those of each sequence alone."""
    how = {"method": "exact", "return_lse": True, "threads": threads}
    O, lse = ropecy.attention(**case, lengths=(rows, keys), **how)
    for own, _, one in sequences(case, rows, keys):
        alone, of_one = ropecy.attention(**one, **how)
        np.testing.assert_array_equal(O[..., own, :], alone)
        np.testing.assert_array_equal(lse[..., own], of_one)
    return O


@st.composite
def problems(draw):
    """Problems of packed sequences of up to 12 queries, and their lengths."""
    count = draw(st.integers(1, 9))
    rows = np.array(draw(st.lists(st.integers(0, 12), min_size=count, max_size=count)))
    more = draw(st.sampled_from([0, 0, 3, 600]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    keys = rng.integers(0, 13, count) + more * (rng.integers(0, 3, count) == 0) if more else rows
    key_heads, group, batch = (draw(st.sampled_from(each)) for each in ([1, 2, 3], [1, 2, 5], [(), (2,)]))
    lead = draw(st.sampled_from([(), (*batch, key_heads * group)]))
    of_keys = (*lead[:-1], key_heads) if lead else ()
    d, d_v = draw(st.sampled_from([(1, 3), (8, 8), (20, 5)]))
    dtype = draw(st.sampled_from(DTYPES))
    shapes = (*lead, rows.sum(), d), (*of_keys, keys.sum(), d), (*of_keys, keys.sum(), d_v)
    case = {name: rng.standard_normal(shape).astype(dtype) for name, shape in zip("QKV", shapes, strict=True)}
    case |= draw(st.sampled_from([{}, {"causal": True}, {"window": 3}, {"window": (2, 1)}]))
    case["q_offset"] = draw(st.sampled_from([0, 2, keys - rows]))
    masked = draw(st.sampled_from([None, (), lead]))
    if masked is not None:
        case["key_mask"] = rng.random((*masked, keys.sum())) < 0.7
        # In some sequences nothing is hidden.
        case["key_mask"][..., : keys[: count // 2].sum()] = True
    if draw(st.booleans()):
        # What is far from 0 is left to kernels that centre it.
        case["V"][..., : keys[: (count + 1) // 2].sum(), :] += np.asarray(500, dtype)
    return case, rows, keys


@given(problems(), st.integers(1, 3))
@settings(max_examples=100)
def test_short_sequences_are_bitwise_what_they_are_alone(problem, threads):
    assert_as_alone(*problem, threads)


def test_long_and_short_ones_side_by_side(rng):
    rows = np.array([3, 40, 8, 9, 1, 300, 0])
    keys = np.array([700, 40, 8, 9, 2, 300, 5])
    Q, K, V = (rng.standard_normal((2, lengths.sum(), 16)).astype(np.float32) for lengths in (rows, keys, keys))
    case = {"Q": Q, "K": K, "V": V}
    case |= {"causal": True, "q_offset": keys - rows}
    O = assert_as_alone(case, rows, keys)
    again, certificate = ropecy.attention(**case, lengths=(rows, keys), method="exact", return_certificate=True)
    np.testing.assert_array_equal(O, again)
    assert certificate.engine == "exact"
    assert certificate.rows_truncation.shape == (2, rows.sum())
    short = {**case, "Q": case["Q"][:, :3], "q_offset": 697, "K": case["K"][:, :700], "V": case["V"][:, :700]}
    _, alone = ropecy.attention(**short, method="exact", return_certificate=True)
    assert 0 < alone.rounding <= 2 * certificate.rounding


@pytest.mark.parametrize("beside", [0, 30])
def test_rounding_is_that_of_values_and_keys_as_they_were_given(beside, rng):
    # All values are nearly 1 but for one, which no sample of them sees; and keys are far from 0.
    rows, keys = np.array([3, beside]), np.array([3000, beside])
    Q, K, V = (rng.standard_normal((lengths.sum(), 4)).astype(np.float32) for lengths in (rows, keys, keys))
    K, V = K + np.float32(100), np.ones_like(V)
    V[1, 0], V[3000:] = 1 + 1e-4, 1
    how = {"method": "exact", "scale": 0.1, "return_certificate": True}
    O, certificate = ropecy.attention(Q, K, V, lengths=(rows, keys), **how)
    alone, of_one = ropecy.attention(Q[:3], K[:3000], V[:3000], **how)
    np.testing.assert_array_equal(O[:3], alone)
    assert certificate.rounding >= 0.9 * of_one.rounding
    assert certificate.bound >= 0.9 * of_one.bound


@pytest.mark.parametrize("rows", [[3, 5, 30], [3, 5]])
def test_what_is_not_finite_is_named_as_ever(rows, rng):
    n = sum(rows)
    Q, K, V = rng.standard_normal((3, n, 4))
    K[6, 2] = np.nan
    with pytest.raises(ValueError, match=r"K: got NaN at index \(6, 2\)"):
        ropecy.attention(Q, K, V, lengths=rows)
    K[6, 2] = 0
    V[4] = np.inf
    # What the mask hides is not read.
    O = ropecy.attention(Q, K, V, lengths=rows, key_mask=np.arange(n) != 4)
    assert np.isfinite(O).all()


def test_short_sequences_of_auto_are_exact_whatever_else_is_beside_them(rng):
    rows = np.array([4, 3000, 4])
    Q, K, V = rng.uniform(-0.5, 0.5, (3, rows.sum(), 4))
    O, certificate = ropecy.attention(Q, K, V, lengths=rows, return_certificate=True)
    assert [(part.engine, slots) for slots, part in certificate.parts] == [
        ("exact", ((0, 0), (0, 2))),
        ("polynomial", ((0, 1),)),
    ]
    np.testing.assert_array_equal(O[:4], ropecy.attention(Q[:4], K[:4], V[:4]))


@pytest.mark.parametrize("seed", range(12))
def test_a_look_at_hidden_keys_sees_nothing_of_other_sequences(seed):
    """Whether keys are so long that "auto" has to plan is told by a sample of keys, the hidden ones being 0."""
    rng = np.random.default_rng(seed)
    Q, K, V = (3 * rng.standard_normal((2, n, d)).astype(np.float16) for n, d in ((11, 1), (120, 1), (120, 3)))
    kept = rng.random(120) < 0.7
    options = {"scale": 1.0, "eps": 1e-3, "return_lse": True}
    O, lse = ropecy.attention(Q, K, V, lengths=([3, 8], [20, 100]), key_mask=kept, **options)
    o, own = ropecy.attention(Q[:, :3], K[:, :20], V[:, :20], key_mask=kept[:20], **options)
    assert np.array_equal(O[:, :3], o)
    assert np.array_equal(lse[:, :3], own)
