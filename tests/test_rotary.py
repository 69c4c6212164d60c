"""Rotary: R[m] and rotate() against rotations written out one plane at a time, and everything they refuse."""

import copy
import pickle

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropecy import Rotary
from ropecy.rotary import Planes, rotate_rows

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BOTH = pytest.mark.parametrize("pairing", ["half", "interleaved"])
PRECISIONS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def rotated(X, positions, pairing="half", r=None, base=10000.0):
    """Row by row and plane by plane, with NumPy's cos and sin of the float64 angle."""
    X = np.asarray(X, np.float64)
    r = r or X.shape[-1]
    positions = np.broadcast_to(positions, X.shape[:-1])
    Y = X.copy()
    for b in range(r // 2):
        u, v = (b, b + r // 2) if pairing == "half" else (2 * b, 2 * b + 1)
        angle = positions * base ** (-2 * b / r)
        Y[..., u] = X[..., u] * np.cos(angle) - X[..., v] * np.sin(angle)
        Y[..., v] = X[..., u] * np.sin(angle) + X[..., v] * np.cos(angle)
    return Y


@BOTH
@PRECISIONS
@pytest.mark.parametrize("d, r", [(2, 2), (6, 6), (8, 8), (7, 4), (16, 16), (33, 32), (64, 64), (80, 20)])
def test_rotate_is_the_plane_rotation(rng, pairing, dtype, d, r):
    X = rng.standard_normal((1100, d)).astype(dtype)
    Y = Rotary(d, pairing=pairing, rotary_dim=r).rotate(X)
    assert Y.dtype == dtype and Y.shape == X.shape and Y.flags.c_contiguous
    # One rounding of the result, and in float64 that of the reference's angles as well.
    tolerance = 2e-12 if dtype == np.float64 else 1.01 * np.finfo(np.float32).eps * np.abs(X).max()
    np.testing.assert_allclose(Y, rotated(X, np.arange(1100), pairing, r), rtol=0, atol=tolerance)
    assert np.array_equal(Y[:, r:], X[:, r:])


@BOTH
@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("i, j", [(0, 0), (3, 11), (700, 2), (-5, 1234), (10**6, 10**6 + 3)])
def test_score_depends_on_the_offset_alone(rng, pairing, scaling, i, j):
    R = Rotary(10, pairing=pairing, rotary_dim=8, scaling=scaling)
    q, k = rng.standard_normal((2, 1, 10))
    score = R.rotate(q, [i]) @ R.rotate(k, [j]).T
    np.testing.assert_allclose(score, q @ R[j - i] @ k.T, rtol=0, atol=2e-14)


@BOTH
def test_matrices_are_orthogonal_and_multiply_by_adding(pairing):
    R = Rotary(12, pairing=pairing, rotary_dim=8)
    for m in (0, 1, -1, 513, -100000):
        np.testing.assert_allclose(R[m] @ R[m].T, np.eye(12), rtol=0, atol=1e-15)
        np.testing.assert_allclose(R[m].T @ R[m + 77], R[77], rtol=0, atol=1e-15)
        np.testing.assert_array_equal(R[-m], R[m].T)
    np.testing.assert_array_equal(R[0], np.eye(12))
    assert R[5].dtype == np.float64 and R[np.int32(5)].shape == (12, 12)


def test_attention_factor_is_squared_in_the_matrix():
    R = Rotary(6, rotary_dim=4, scaling={**YARN, "attention_factor": 1.5})
    np.testing.assert_allclose(R[0], np.diag([2.25] * 4 + [1.0] * 2), rtol=1e-15)
    np.testing.assert_allclose(R[9], R.rotate(np.eye(6), 0) @ R.rotate(np.eye(6), 9).T, rtol=0, atol=1e-15)


def test_pairings_are_a_permutation_of_each_other(rng):
    d = 12
    X = rng.standard_normal((40, d))
    order = np.arange(d).reshape(2, d // 2).T.ravel()
    half, interleaved = Rotary(d), Rotary(d, pairing="interleaved")
    np.testing.assert_array_equal(interleaved.rotate(X[:, order]), half.rotate(X)[:, order])
    assert not np.allclose(interleaved.rotate(X), half.rotate(X))


@pytest.mark.parametrize("first", [-600, 10**6, -(10**6) - 17, 10**7, -(10**7), 2**34])
def test_far_positions_are_exact(first):
    """Angles in 60 digits from the float64 frequencies: what is left is the rounding of the table and of the result."""
    positions = first + np.array([0, 1, 511, 512, 513, 1500])
    theta, _ = Rotary(8)._frequencies(1)
    Y = Rotary(8).rotate(np.tile(np.repeat([1.0, 0.0], 4), (6, 1)), positions)
    with mpmath.workdps(60):
        angles = [[mpmath.mpf(int(p)) * mpmath.mpf(float(t)) for t in theta] for p in positions]
        expected = [[float(f(a)) for f in (mpmath.cos, mpmath.sin) for a in row] for row in angles]
    np.testing.assert_allclose(Y, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "positions",
    [
        np.arange(100) * -3,
        np.repeat([5, -7, 5, 1023], 25),
        np.arange(100, dtype=np.uint8),
        np.arange(100)[::-1],
        np.arange(100) * 1_000_003 - 5 * 10**7,
        [2**40] * 100,
    ],
    ids=["negative", "repeated", "uint8", "reversed", "scattered", "huge"],
)
def test_any_integers_are_positions(rng, positions):
    X = rng.standard_normal((100, 6))
    # The reference rounds the angle, by at most half an ulp of it.
    tolerance = 1e-14 + 4 * np.spacing(float(np.abs(np.asarray(positions, np.int64)).max()))
    np.testing.assert_allclose(Rotary(6).rotate(X, positions), rotated(X, positions), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (5,), (1, 1, 5), (2, 1, 5), (1, 3, 5), (2, 3, 5)])
def test_positions_broadcast_over_leading_axes(rng, shape):
    X = rng.standard_normal((2, 3, 5, 4))
    positions = rng.integers(-50, 5000, shape)
    np.testing.assert_allclose(Rotary(4).rotate(X, positions), rotated(X, positions), rtol=0, atol=1e-11)


@BOTH
@PRECISIONS
@pytest.mark.parametrize("scaling", [None, YARN])
def test_inverse_undoes(rng, pairing, dtype, scaling):
    R = Rotary(10, pairing=pairing, rotary_dim=8, scaling=scaling)
    X = rng.standard_normal((3, 50, 10)).astype(dtype)
    positions = rng.integers(-(10**6), 10**6, (3, 50))
    back = R.rotate(R.rotate(X, positions), positions, inverse=True)
    np.testing.assert_allclose(back, X, rtol=0, atol=10 * np.finfo(dtype).eps)


@BOTH
@PRECISIONS
def test_adjoint_is_the_transpose(rng, pairing, dtype):
    theta, _ = Rotary(8)._frequencies(1)
    X, Y = rng.standard_normal((2, 300, 9)).astype(dtype)
    positions = rng.integers(-(10**6), 10**6, 300)
    forward = rotate_rows(X, positions, Planes(theta, 1.25, pairing))
    adjoint = rotate_rows(Y, positions, Planes(theta, 1.25, pairing), adjoint=True)
    np.testing.assert_allclose((forward * Y).sum(), (X * adjoint).sum(), rtol=100 * np.finfo(dtype).eps)


@BOTH
@PRECISIONS
def test_strides_fortran_order_and_read_only(rng, pairing, dtype):
    R = Rotary(10, pairing=pairing, rotary_dim=8)
    X = rng.standard_normal((2, 3, 70, 10)).astype(dtype)
    expected = R.rotate(X)
    frozen = X.copy()
    frozen.flags.writeable = False
    wide = np.zeros((2, 3, 140, 20), dtype)
    wide[:, :, ::2, ::-2] = X
    packed = np.zeros(2 * 3 * 70 * 10 * X.itemsize + 1, np.uint8)[1:].view(dtype).reshape(X.shape)
    packed[...] = X
    variants = {
        "Fortran": np.asfortranarray(X),
        "read-only": frozen,
        "reversed steps": wide[:, :, ::2, ::-2],
        "heads last": X.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3),
        "unaligned": packed,
        "byte-swapped": X.astype(X.dtype.newbyteorder()),
    }
    for name, variant in variants.items():
        before = variant.copy()
        np.testing.assert_array_equal(R.rotate(variant), expected, err_msg=name)
        np.testing.assert_array_equal(variant, before, err_msg=name)
    broadcast = np.broadcast_to(X[:1], X.shape)
    np.testing.assert_array_equal(R.rotate(broadcast), np.broadcast_to(expected[:1], X.shape))


@BOTH
@PRECISIONS
def test_thread_count_changes_no_bit(rng, pairing, dtype):
    theta, factor = Rotary(16)._frequencies(1)
    X = rng.standard_normal((3, 5003, 16)).astype(dtype)
    one, two, three = (rotate_rows(X, np.arange(5003), Planes(theta, factor, pairing), threads=k) for k in (1, 2, 3))
    assert one.tobytes() == two.tobytes() == three.tobytes()


@BOTH
@PRECISIONS
def test_in_place(rng, pairing, dtype):
    theta, factor = Rotary(20)._frequencies(1)
    X = rng.standard_normal((2, 600, 23)).astype(dtype)
    expected = rotate_rows(X, np.arange(600), Planes(theta, factor, pairing))
    assert rotate_rows(X, np.arange(600), Planes(theta, factor, pairing), out=X) is X
    np.testing.assert_array_equal(X, expected)


def test_half_precision_is_computed_in_float32(rng):
    X = rng.standard_normal((30, 8)).astype(np.float16)
    Y = Rotary(8).rotate(X)
    assert Y.dtype == np.float16
    np.testing.assert_array_equal(Y, Rotary(8).rotate(X.astype(np.float32)).astype(np.float16))


def test_bfloat16_is_computed_in_float32(rng):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    X = rng.standard_normal((30, 8)).astype(bfloat16)
    Y = Rotary(8).rotate(X)
    assert Y.dtype == bfloat16
    np.testing.assert_array_equal(Y, Rotary(8).rotate(X.astype(np.float32)).astype(bfloat16))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 5, 4)])
def test_empty(shape):
    assert Rotary(4).rotate(np.zeros(shape)).shape == shape
    assert Rotary(4).rotate(np.zeros((0, 4)), []).shape == (0, 4)


@settings(max_examples=40)
@given(
    st.integers(1, 9).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, 3))),
    st.lists(st.integers(-(2**34), 2**34), min_size=1, max_size=20),
    st.sampled_from(["half", "interleaved"]),
)
def test_lengths_are_kept(widths, positions, pairing):
    pairs, rest = widths
    X = np.random.default_rng(len(positions)).standard_normal((len(positions), 2 * pairs + rest))
    Y = Rotary(2 * pairs + rest, pairing=pairing, rotary_dim=2 * pairs).rotate(X, positions)
    np.testing.assert_allclose(np.linalg.norm(Y, axis=1), np.linalg.norm(X, axis=1), rtol=1e-14)


def test_is_a_value():
    R = Rotary(8, scaling={"rope_type": "longrope", "factor": 2, "original_max_position_embeddings": 8,
                           "short_factor": [1.0] * 4, "long_factor": np.full(4, 2.0)})
    for same in (pickle.loads(pickle.dumps(R)), copy.deepcopy(R), eval(repr(R))):
        assert same == R and hash(same) == hash(R)
    assert R != Rotary(8) and Rotary(8) == Rotary(8, rotary_dim=8)
    with pytest.raises(AttributeError):
        R.base = 5.0
    with pytest.raises(TypeError):
        R.scaling["factor"] = 3.0
    assert repr(Rotary(8)) == "Rotary(8, base=10000.0, pairing='half', rotary_dim=8, scaling=None, length=None)"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
LONGROPE = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"d": 7}, ValueError, "d: got 7, which is odd.*rotary_dim"),
        ({"d": 0}, ValueError, "d: got 0, wants"),
        ({"d": 8.0}, TypeError, "d: got 8.0, wants an integer"),
        ({"d": True}, TypeError, "d: got True, wants an integer"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim: got 3, wants an even integer from 2 to d = 8"),
        ({"rotary_dim": 10}, ValueError, "rotary_dim: got 10, wants"),
        ({"rotary_dim": 0}, ValueError, "rotary_dim: got 0, wants"),
        ({"rotary_dim": -2}, ValueError, "rotary_dim: got -2, wants"),
        ({"rotary_dim": 4.0}, TypeError, "rotary_dim: got 4.0, wants an integer"),
        ({"base": 0}, ValueError, "base: got 0, wants a positive finite"),
        ({"base": -3.0}, ValueError, "base: got -3.0, wants"),
        ({"base": np.inf}, ValueError, "base: got inf, wants"),
        ({"base": np.nan}, ValueError, "base: got nan, wants"),
        ({"base": "10000"}, TypeError, "base: got '10000', wants a number"),
        ({"pairing": "neox"}, ValueError, "pairing: got 'neox', wants one of 'half', 'interleaved'"),
        ({"pairing": None}, ValueError, "pairing: got None"),
        ({"pairing": ["half"]}, ValueError, "pairing: got \\['half'\\]"),
        ({"length": 0}, ValueError, "length: got 0, wants"),
        ({"length": 2.5}, TypeError, "length: got 2.5, wants an integer"),
        ({"scaling": "linear"}, TypeError, "scaling: got str, wants a mapping"),
        ({"scaling": {"rope_type": "ntk"}}, ValueError, "scaling: got rope_type 'ntk', wants one of 'default'"),
        ({"scaling": {"factor": 2.0}}, ValueError, "scaling: got rope_type None, wants"),
        ({"scaling": {"rope_type": ["yarn"]}}, ValueError, "scaling: got rope_type \\('yarn',\\), wants"),
        ({"scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, ValueError, "scaling: got mrope_section"),
        ({"scaling": {"rope_type": "linear"}}, ValueError, "scaling: got no factor.*'linear'"),
        ({"scaling": {"rope_type": "linear", "factor": None}}, ValueError, "scaling: got no factor"),
        ({"scaling": {"rope_type": "linear", "factor": 0.0}}, ValueError, "scaling\\['factor'\\]: got 0.0, wants"),
        ({"scaling": {"rope_type": "linear", "factor": "2"}}, TypeError, "scaling\\['factor'\\]: got '2', wants"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2.0}}, ValueError, "got no original_max_position_embeddings"),
        (
            {"rotary_dim": 2, "scaling": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 8}},
            ValueError, "rotary_dim: got 2, wants 4 or more",
        ),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0}}, ValueError, "got no original_max_position_embeddings"),
        ({"scaling": {**YARN, "original_max_position_embeddings": 1}}, ValueError, "got original_max.* 1, wants more"),
        ({"base": 1.0, "scaling": YARN}, ValueError, "base: got 1, wants another"),
        ({"scaling": {**YARN, "attention_factor": -1.0}}, ValueError, "scaling\\['attention_factor'\\]: got -1.0"),
        ({"scaling": {**LLAMA3, "low_freq_factor": None}}, ValueError, "got no low_freq_factor"),
        ({"scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ValueError, "low_freq_factor 4.0.*wants the first smaller"),
        ({"scaling": {**LONGROPE, "long_factor": None}}, ValueError, "got no long_factor"),
        ({"scaling": {**LONGROPE, "long_factor": [1.0]}}, ValueError, "long_factor.*: got 1 of them, wants a list"),
        ({"scaling": {**LONGROPE, "short_factor": 2.0}}, ValueError, "'short_factor'\\]: got 2.0, wants a list of 4"),
        ({"scaling": {**LONGROPE, "short_factor": [1.0] * 3 + [0.0]}}, ValueError, "'short_factor'\\]: got 0.0, wants"),
        ({"scaling": {"rope_type": "default", "rope_theta": 5e5}}, ValueError, "rope_theta 500000.0, wants base = 1"),
        (
            {"scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            ValueError, "partial_rotary_factor 0.5, which is rotary_dim 4; wants it to agree with rotary_dim = 8",
        ),
        (
            {"rotary_dim": 4, "scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
            ValueError, "rotary_dim 4, wants.* the second 8",
        ),
    ],
)
def test_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        Rotary(**{"d": 8, **arguments})


@pytest.mark.parametrize(
    "X, positions, error, message",
    [
        (np.zeros((3, 5)), None, ValueError, "X: got shape \\(3, 5\\), wants \\(..., n, 4\\)"),
        (np.zeros(4), None, ValueError, "X: got shape \\(4,\\), wants"),
        (np.zeros((3, 4), int), None, TypeError, "X: got dtype int64, wants float32"),
        (np.zeros((3, 4), complex), None, TypeError, "X: got dtype complex128, wants"),
        (np.zeros((3, 4), object), None, TypeError, "X: got dtype object, wants"),
        (np.zeros((3, 4)), [0.0, 1.0, 2.0], TypeError, "positions: got dtype float64, wants integers"),
        (np.zeros((3, 4)), [True, False, True], TypeError, "positions: got dtype bool, wants integers"),
        (np.zeros((3, 4)), [0, 1, 2**63], TypeError, "positions: got dtype .*, wants integers that fit int64"),
        (np.zeros((3, 4)), [0, 1], ValueError, "positions: got shape \\(2,\\), wants \\(3,\\)"),
        (np.zeros((3, 4)), [0], ValueError, "positions: got shape \\(1,\\), wants \\(3,\\)"),
        (np.zeros((2, 3, 4)), np.zeros((3, 3), int), ValueError, "positions: got shape \\(3, 3\\), wants"),
        (np.zeros((2, 5, 3, 4)), np.zeros((5, 3), int), ValueError, "positions: got shape \\(5, 3\\), wants"),
    ],
)
def test_refused_by_rotate(X, positions, error, message):
    with pytest.raises(error, match=message):
        Rotary(4).rotate(X, positions)


def test_offset_must_be_an_integer():
    with pytest.raises(TypeError, match=r"m: got 1\.5, wants an integer"):
        Rotary(4)[1.5]


@pytest.mark.parametrize("m", [2**63, -(2**63), 10**30])
def test_offsets_past_64_bits_are_refused(m):
    with pytest.raises(ValueError, match=rf"m: got {m}, wants an offset between"):
        Rotary(4)[m]
    assert Rotary(4)[2**63 - 1].shape == (4, 4)
