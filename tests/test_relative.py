"""RelativeBias: b_t for every offset, its gradient against finite differences, and what is refused."""

import pickle

import numpy as np
import pytest

import ropecy
from ropecy import RelativeBias


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def biases(rng):
    return {
        "table": (RelativeBias, rng.standard_normal(7)),
        "one entry": (RelativeBias, rng.standard_normal(1)),
        "table a head": (RelativeBias, rng.standard_normal((3, 5))),
        "slope": (RelativeBias.alibi, rng.standard_normal(())),
        "slope a head": (RelativeBias.alibi, rng.standard_normal(3)),
    }


NAMES = ["table", "one entry", "table a head", "slope", "slope a head"]


def test_table_is_clipped_past_its_ends():
    bias = RelativeBias([10.0, 11.0, 12.0, 13.0, 14.0])
    np.testing.assert_array_equal(bias._symbol(-4, 3), [[10.0, 10.0, 10.0, 11.0, 12.0, 13.0, 14.0, 14.0]])
    np.testing.assert_array_equal(bias._symbol(50, 51), [[14.0, 14.0]])
    assert bias._symbol(-2, 2).dtype == np.float64 and bias.heads is None


def test_table_a_head(rng):
    table = rng.standard_normal((2, 3)).astype(np.float32)
    bias = RelativeBias(table)
    assert bias.heads == 2
    np.testing.assert_array_equal(bias._symbol(-1, 2), table[:, [0, 1, 2, 2]].astype(np.float64))


def test_alibi():
    np.testing.assert_array_equal(RelativeBias.alibi(0.5)._symbol(-2, 1), [[-1.0, -0.5, 0.0, -0.5]])
    bias = RelativeBias.alibi(np.array([1.0, 0.25], np.float32))
    assert bias.heads == 2
    np.testing.assert_array_equal(bias._symbol(-2, 1), [[-2.0, -1.0, 0.0, -1.0], [-0.5, -0.25, 0.0, -0.25]])


@pytest.mark.parametrize("name", NAMES)
def test_no_offsets(rng, name):
    build, values = biases(rng)[name]
    heads = build(values).heads or 1
    symbol = build(values)._symbol(0, -1)
    assert symbol.shape == (heads, 0)
    np.testing.assert_array_equal(build(values)._gradient(symbol, 0), np.zeros(values.shape))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t_min, t_max", [(-9, 12), (-1, 1), (2, 6), (-30, -25)])
def test_gradient_against_finite_differences(rng, name, t_min, t_max):
    build, values = biases(rng)[name]
    bias = build(values)
    weights = rng.standard_normal(bias._symbol(t_min, t_max).shape)
    # The symbol is linear in what built it, so a step of 1 is exact but for rounding.
    expected = np.empty(values.shape)
    for index in np.ndindex(values.shape):
        moved = values.copy()
        moved[index] += 1.0
        expected[index] = (weights * (build(moved)._symbol(t_min, t_max) - bias._symbol(t_min, t_max))).sum()
    gradient = bias._gradient(weights, t_min)
    assert gradient.shape == values.shape and gradient.dtype == np.float64
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12 * (1 + np.abs(weights).sum() * 30))


@pytest.mark.parametrize("build, shape", [(RelativeBias, (3,)), (RelativeBias, (2, 3)), (RelativeBias.alibi, (2,))])
def test_gradient_has_the_dtype_of_what_built_it(build, shape):
    bias = build(np.zeros(shape, np.float32))
    gradient = bias._gradient(np.ones(((bias.heads or 1), 9)), -4)
    assert gradient.dtype == np.float32 and gradient.shape == shape


def test_exact_gradient_of_a_tall_bias_is_finite(rng):
    # 50 rows are no whole tile; what stands past them has no weight, whatever the bias is.
    Q, K, V = rng.standard_normal((3, 50, 4))
    bias = RelativeBias(900 + rng.standard_normal(99))
    assert np.isfinite(ropecy.attention_vjp(Q, K, V, bias=bias, method="exact")[1](V).dbias).all()


def test_gradient_of_a_plain_number():
    gradient = RelativeBias.alibi(0.5)._gradient(np.ones((1, 5)), -2)
    assert gradient.shape == () and gradient.dtype == np.float64 and gradient == -6.0


def test_is_a_value(rng):
    table = rng.standard_normal(5)
    kept = table.copy()
    bias = RelativeBias(table)
    table[:] = 0.0
    np.testing.assert_array_equal(bias._symbol(-2, 2)[0], kept)
    with pytest.raises(AttributeError, match="immutable"):
        bias.heads = 4
    t5, kerple = RelativeBias.t5(np.arange(32.0)), RelativeBias.kerple([1.0], [2.0])
    for one in (bias, RelativeBias.alibi([0.5, 0.25]), t5, kerple):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(one))._symbol(-3, 3), one._symbol(-3, 3))
        # As version 0.1.0 wrote it, whose forms were in a module of their own.
        old = pickle.dumps(one, protocol=0).replace(b"ropecy.approximation.bias_forms", b"ropecy.forms")
        assert b"ropecy.forms" in old
        np.testing.assert_array_equal(pickle.loads(old)._symbol(-3, 3), one._symbol(-3, 3))
    assert repr(bias) == "RelativeBias(table of float64 (5,))"
    assert repr(RelativeBias.alibi(0.5)) == "RelativeBias(slope of float64 ())"


@pytest.mark.parametrize(
    "build, values, error, message",
    [
        (RelativeBias, np.zeros(4), ValueError, "table: got length 4, wants an odd one"),
        (RelativeBias, np.zeros((2, 4)), ValueError, "table: got length 4, wants an odd one"),
        (RelativeBias, [], ValueError, "table: got length 0, wants an odd one"),
        (RelativeBias, np.zeros((0, 3)), ValueError, "table: got shape \\(0, 3\\), wants"),
        (RelativeBias, 1.0, ValueError, "table: got shape \\(\\), wants \\(2T-1,\\) or \\(h, 2T-1\\)"),
        (RelativeBias, np.zeros((1, 1, 3)), ValueError, "table: got shape \\(1, 1, 3\\), wants"),
        (RelativeBias, [0.0, np.nan, 0.0], ValueError, "table: got nan at \\(1,\\), wants finite"),
        (RelativeBias, [[0.0], [np.inf]], ValueError, "table: got inf at \\(1, 0\\), wants finite"),
        (RelativeBias, [0, 1, 2], TypeError, "table: got dtype int64, wants float32 or float64"),
        (RelativeBias, [0j, 1j, 2j], TypeError, "table: got dtype complex128, wants"),
        (RelativeBias, [None], TypeError, "table: got dtype object, wants"),
        (RelativeBias, np.zeros(3, np.float16), TypeError, "table: got dtype float16, wants"),
        (RelativeBias.alibi, np.nan, ValueError, "slope: got nan, wants finite"),
        (RelativeBias.alibi, [1.0, -np.inf], ValueError, "slope: got -inf at \\(1,\\), wants finite"),
        (RelativeBias.alibi, [1, 2], TypeError, "slope: got dtype int64, wants"),
        (RelativeBias.alibi, 1j, TypeError, "slope: got dtype complex128, wants"),
        (RelativeBias.alibi, np.zeros((2, 2)), ValueError, "slope: got shape \\(2, 2\\), wants a number or \\(h,\\)"),
        (RelativeBias.alibi, [], ValueError, "slope: got shape \\(0,\\), wants"),
    ],
)
def test_refused(build, values, error, message):
    with pytest.raises(error, match=message):
        build(values)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: RelativeBias.t5(np.zeros(31), 31), ValueError, "num_buckets: got 31, wants an even number, at"),
        (lambda: RelativeBias.t5(np.zeros(2), 2), ValueError, "num_buckets: got 2, wants an even number, at"),
        (lambda: RelativeBias.t5(np.zeros(32), 32.0), TypeError, "num_buckets: got 32.0, wants an integer"),
        (lambda: RelativeBias.t5(np.zeros(32), 32, "far"), TypeError, "max_distance: got 'far', wants an integer"),
        (lambda: RelativeBias.t5(np.zeros(32), 32, 8), ValueError, "max_distance: got 8, wants more than the 8"),
        (lambda: RelativeBias.t5(np.zeros(30)), ValueError, "table: got shape \\(30,\\), wants \\(32,\\) or \\(h, 32"),
        (lambda: RelativeBias.t5(np.zeros((0, 32))), ValueError, "table: got shape \\(0, 32\\), wants"),
        (lambda: RelativeBias.t5(np.zeros(32, int)), TypeError, "table: got dtype int64, wants"),
        (lambda: RelativeBias.kerple(0.0, 1.0), ValueError, "r1: got 0.0, wants numbers above 0"),
        (lambda: RelativeBias.kerple(1.0, [1.0, 2.0]), ValueError, "r2: got shape \\(2,\\), wants that of r1, \\(\\)"),
        (lambda: RelativeBias.kerple(1.0, -1.0), ValueError, "r2: got -1.0, wants numbers above 0"),
        (lambda: RelativeBias.kerple(1.0, np.float32(1)), TypeError, "r2: got dtype float32, wants that of r1"),
        (lambda: RelativeBias.kerple(1.0, 3.0, "power"), ValueError, "r2: got 3.0, wants at most 2"),
        (lambda: RelativeBias.kerple(1.0, 1.0, "exp"), ValueError, "variant: got 'exp', wants 'log' or 'power'"),
        (lambda: RelativeBias.kerple(np.nan, 1.0), ValueError, "r1: got nan, wants finite"),
    ],
)
def test_forms_refuse(build, error, message):
    with pytest.raises(error, match=message):
        build()
