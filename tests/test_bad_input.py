"""What is refused, by which error and in which words: each message names the argument. And what is empty."""

import numpy as np
import pytest

import ropecy
from ropecy.problem import checks

N, N_K, D, D_V = 6, 5, 4, 3
EITHER = (TypeError, ValueError)


def _case(rng, **changes):
    """A legal call with everything given, but for the changes."""
    case = {
        "Q": rng.standard_normal((N, D)),
        "K": rng.standard_normal((N_K, D)),
        "V": rng.standard_normal((N_K, D_V)),
        "E": rng.standard_normal((N, D_V)),
        "R": ropecy.Rotary(D),
        "W": np.eye(D),
        "W_Q": np.eye(D),
        "W_K": np.eye(D),
        "W_V": np.eye(D_V),
    }
    return {**case, **changes}


def _refused(error, name, case):
    """Every entrance refuses the case; the message names the argument and says something about it."""
    without = {key: value for key, value in case.items() if key != "E"}
    for call in (ropecy.loss, ropecy.loss_grad):
        with pytest.raises(error, match=rf"\b{name}\b") as caught:
            call(**case)
        assert len(str(caught.value)) > len(name) + 12
    if name == "E":
        return
    for call in (ropecy.attention, ropecy.attention_vjp, ropecy.plan):
        with pytest.raises(error, match=rf"\b{name}\b"):
            call(**without)


def test_the_legal_case_is_legal(rng):
    assert np.isfinite(ropecy.loss(**_case(rng)))


ARRAYS = ["Q", "K", "V", "E", "W", "W_Q", "W_K", "W_V"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ARRAYS)
def test_nan_and_inf(name, value, rng):
    case = _case(rng)
    case[name][-1, -1] = value
    _refused(ValueError, name, case)


@pytest.mark.parametrize("name", ["K", "V"])
def test_nan_in_a_kept_key_that_no_row_reaches(name, rng):
    case = _case(rng, causal=True, q_offset=-4, key_mask=np.array([True, True, True, False, True]))
    case[name][4, 0] = np.nan
    _refused(ValueError, name, case)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_, np.complex128, np.complex64, object, "U8"])
@pytest.mark.parametrize("name", ARRAYS)
def test_dtypes(name, dtype, rng):
    case = _case(rng)
    case[name] = np.ones(case[name].shape).astype(dtype)
    _refused(TypeError, name, case)


@pytest.mark.parametrize("name", ARRAYS[1:])
def test_mixed_dtypes(name, rng):
    case = _case(rng)
    case[name] = case[name].astype(np.float32)
    _refused(TypeError, name, case)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Q", (D,)),
        ("Q", ()),
        ("K", (D,)),
        ("V", (N_K,)),
        ("V", (N_K + 1, D_V)),
        ("E", (N, D_V + 1)),
        ("E", (N + 1, D_V)),
        ("W", (D, D + 1)),
        ("W", (D + 1, D)),
        ("W", (D,)),
        ("W_Q", (D + 1, D)),
        ("W_Q", (D,)),
        ("W_K", (D + 1, D)),
        ("W_V", (D_V + 1, 2)),
        ("W_V", (D_V,)),
    ],
)
def test_shapes(name, shape, rng):
    _refused(ValueError, name, _case(rng, **{name: rng.standard_normal(shape)}))


@pytest.mark.parametrize("name", ["Q", "K"])
def test_queries_and_keys_of_different_widths(name, rng):
    case = {"Q": rng.standard_normal((N, D)), "K": rng.standard_normal((N_K, D)), "V": rng.standard_normal((N_K, D_V))}
    case[name] = case[name][:, 1:]
    with pytest.raises(ValueError, match=r"\b(Q|K)\b"):
        ropecy.attention(**case)


def test_message_says_the_shape_it_got(rng):
    with pytest.raises(ValueError, match=r"\(7, 3\)"):
        ropecy.attention(*(rng.standard_normal(shape) for shape in [(N, D), (N_K, D), (7, 3)]))


@pytest.mark.parametrize(
    ("q_lead", "k_lead"), [((3,), (2,)), ((2, 4), (2, 3)), ((2, 2), (2, 4)), ((2, 4), (3, 4)), ((3, 1), (2, 1))]
)
def test_leading_axes_that_do_not_fit(q_lead, k_lead, rng):
    Q, K = rng.standard_normal((*q_lead, N, D)), rng.standard_normal((*k_lead, N_K, D))
    with pytest.raises(ValueError, match=r"\b(Q|K)\b"):
        ropecy.attention(Q, K, K)


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (ValueError, "scale", np.nan),
        (ValueError, "scale", np.inf),
        (EITHER, "scale", 1j),
        (EITHER, "scale", "1/d"),
        (EITHER, "scale", np.ones(N)),
        (ValueError, "window", 0),
        (ValueError, "window", -3),
        (EITHER, "window", 2.5),
        (EITHER, "window", (1, 2, 3)),
        (EITHER, "window", "wide"),
        (ValueError, "near", (0, 1.0)),
        (ValueError, "near", (3, np.nan)),
        (ValueError, "near", (3, np.inf)),
        (EITHER, "near", 3),
        (EITHER, "near", (2.5, 1.0)),
        (EITHER, "bias", np.zeros(11)),
        (ValueError, "bias", ropecy.RelativeBias(np.zeros((3, 11)))),
        (EITHER, "key_mask", np.ones(N_K)),
        (EITHER, "key_mask", np.ones(N_K, dtype=int)),
        (ValueError, "key_mask", np.ones(N_K + 1, dtype=bool)),
        (ValueError, "key_mask", np.ones((2, N_K), dtype=bool)),
        (EITHER, "q_positions", np.arange(N) + 0.5),
        (ValueError, "q_positions", np.arange(N + 1)),
        (ValueError, "q_positions", np.arange(2 * N).reshape(2, N)),
        (EITHER, "k_positions", np.arange(N_K) + 0.5),
        (ValueError, "k_positions", np.arange(N_K - 1)),
        (EITHER, "k_positions", ["a"] * N_K),
        (EITHER, "q_offset", 1.5),
        (EITHER, "q_offset", "end"),
        (ValueError, "eps", 0),
        (ValueError, "eps", 1),
        (ValueError, "eps", -1e-3),
        (ValueError, "eps", 2.0),
        (ValueError, "eps", np.nan),
        (EITHER, "eps", "small"),
        (ValueError, "certify", "maybe"),
        (ValueError, "method", "exakt"),
        (EITHER, "method", 3),
        (ValueError, "degree", -1),
        (EITHER, "degree", 2.5),
        (ValueError, "threads", 0),
        (ValueError, "threads", -2),
        (EITHER, "threads", 1.5),
        (EITHER, "seed", "dice"),
        (EITHER, "R", 10000.0),
        (ValueError, "R", ropecy.Rotary(D + 2)),
    ],
)
def test_options(error, name, value, rng):
    _refused(error, name, _case(rng, **{name: value}))


@pytest.mark.parametrize("name", ["q_positions", "k_positions"])
def test_positions_without_a_rotary(name, rng):
    _refused(ValueError, name, _case(rng, R=None, **{name: np.arange(N if name == "q_positions" else N_K)}))


def test_window_is_allowed_from_one(rng):
    assert np.isfinite(ropecy.loss(**_case(rng, window=1)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_nan_in_upstream(value, method, rng):
    case = _case(rng)
    del case["E"]
    O, vjp = ropecy.attention_vjp(**case, method=method, eps=0.3, scale=0.05)
    dO = np.zeros_like(O)
    dO[2, 1] = value
    with pytest.raises(ValueError, match=r"\bdO\b"):
        vjp(dO)


@pytest.mark.parametrize(
    ("error", "dO"),
    [
        (ValueError, np.ones((N, D_V + 1))),
        (ValueError, np.ones(D_V)),
        (ValueError, np.ones((1, N, D_V))),
        (TypeError, np.ones((N, D_V), dtype=np.float32)),
        (TypeError, np.ones((N, D_V), dtype=int)),
        (TypeError, np.ones((N, D_V), dtype=complex)),
        (TypeError, np.ones((N, D_V), dtype=object)),
    ],
)
def test_upstream(error, dO, rng):
    case = _case(rng)
    del case["E"]
    _, vjp = ropecy.attention_vjp(**case)
    with pytest.raises(error, match=r"\bdO\b"):
        vjp(dO)


@pytest.mark.parametrize(
    ("error", "name", "options"),
    [
        (ValueError, "rotary_dim", {"d": 5}),
        (ValueError, "rotary_dim", {"d": 6, "rotary_dim": 3}),
        (ValueError, "rotary_dim", {"d": 6, "rotary_dim": 8}),
        (ValueError, "rotary_dim", {"d": 6, "rotary_dim": -2}),
        (EITHER, "rotary_dim", {"d": 6, "rotary_dim": 2.5}),
        (ValueError, "base", {"d": 6, "base": 0.0}),
        (ValueError, "base", {"d": 6, "base": -10000.0}),
        (ValueError, "base", {"d": 6, "base": np.nan}),
        (ValueError, "base", {"d": 6, "base": np.inf}),
        (ValueError, "pairing", {"d": 6, "pairing": "neighbours"}),
        (EITHER, "scaling", {"d": 6, "scaling": {"rope_type": "magic", "factor": 2.0}}),
        (EITHER, "scaling", {"d": 6, "scaling": "linear"}),
        (ValueError, "d", {"d": 0}),
        (EITHER, "d", {"d": 6.5}),
    ],
)
def test_rotary(error, name, options):
    with pytest.raises(error, match=rf"\b{name}\b"):
        ropecy.Rotary(**options)


@pytest.mark.parametrize(
    ("error", "table"),
    [
        (ValueError, np.zeros(4)),
        (ValueError, np.zeros(0)),
        (ValueError, np.zeros((2, 3, 5))),
        (ValueError, np.array([0.0, np.nan, 0.0])),
        (ValueError, np.array([0.0, np.inf, 0.0])),
        (TypeError, np.zeros(3, dtype=complex)),
        (TypeError, np.zeros(3, dtype=object)),
    ],
)
def test_relative_bias(error, table):
    with pytest.raises(error, match="table"):
        ropecy.RelativeBias(table)


@pytest.mark.parametrize("slope", [np.nan, np.inf, 1j])
def test_alibi(slope):
    with pytest.raises(EITHER, match="slope"):
        ropecy.RelativeBias.alibi(slope)


EMPTY = {
    "no_queries": ((0, D), (N_K, D), (N_K, D_V)),
    "no_keys": ((N, D), (0, D), (0, D_V)),
    "nothing": ((0, D), (0, D), (0, D_V)),
    "no_values": ((N, D), (N_K, D), (N_K, 0)),
    "no_batch": ((0, N, D), (0, N_K, D), (0, N_K, D_V)),
    "no_heads": ((2, 0, N, D), (2, 0, N_K, D), (2, 0, N_K, D_V)),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["auto", "exact", "polynomial"])
@pytest.mark.parametrize("name", EMPTY)
def test_empty(name, method, causal, rng):
    Q, K, V = (rng.standard_normal(shape) / 4 for shape in EMPTY[name])
    R = ropecy.Rotary(D)
    shape = (*Q.shape[:-1], V.shape[-1])
    options = {"causal": causal, "method": method}
    O, lse = ropecy.attention(Q, K, V, R, **options, return_lse=True)
    assert O.shape == shape
    assert lse.shape == shape[:-1]
    assert np.isfinite(O).all()
    if name in ("no_keys", "nothing"):
        np.testing.assert_array_equal(O, 0.0)
        np.testing.assert_array_equal(lse, -np.inf)
    _, vjp = ropecy.attention_vjp(Q, K, V, R, **options)
    g = vjp(np.ones(shape))
    for X, gradient in ((Q, g.dQ), (K, g.dK), (V, g.dV)):
        assert gradient.shape == X.shape
        np.testing.assert_array_equal(gradient, 0.0)
    assert ropecy.loss(Q, K, V, np.ones(shape), R, **options) == pytest.approx(0.5 * np.sum((O - 1.0) ** 2))


def test_empty_matrix():
    A = ropecy.AttentionMatrix(np.zeros((N, D)), np.zeros((0, D)))
    assert A.shape == (N, 0)
    np.testing.assert_array_equal(A.D, 0.0)
    np.testing.assert_array_equal(A @ np.zeros((0, 2)), np.zeros((N, 2)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3, 16, 67])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_bad_number_among_many_is_found(dtype, count, bad):
    """Wherever it stands, in a vector or past the last whole one."""
    for place in range(count):
        X = np.linspace(-3, 2, count).reshape(count, 1).astype(dtype)
        assert checks.check_finite("X", X) == 3.0
        X[place] = bad
        with pytest.raises(ValueError, match=rf"X: got -?(NaN|Inf) at index \({place}, 0\)"):
            checks.check_finite("X", X)


@pytest.mark.parametrize("name", ["Q", "K", "V"])
@pytest.mark.parametrize(
    "call",
    [
        ropecy.attention,
        ropecy.attention_vjp,
        ropecy.plan,
        ropecy.AttentionMatrix,
        lambda *X: ropecy.loss(*X, X[0]),
        lambda *X: ropecy.loss_grad(*X, X[0]),
    ],
)
def test_memory_that_shapes_ask_for_is_asked_for_before_values_are_read(call, name):
    """Rows by the million million, which are one row: reading them would take an hour."""
    one = np.full((1, 4), np.nan, np.float32)
    long, short = np.broadcast_to(one, (2**40, 4)), np.zeros((3, 4), np.float32)
    X = {"Q": (long, short, short), "K": (short, long, long), "V": (short, long, long)}[name]
    X = X[:2] if call is ropecy.AttentionMatrix else X
    with pytest.raises(MemoryError, match=r"(a copy of Q and K|the result, of shape \(.*, 4\)).* needs .* GiB, and "):
        call(*X)
    lead = [np.broadcast_to(short, (2**38, 3, 4)), short, short][: len(X)]
    with pytest.raises(MemoryError):
        call(*lead)


def test_what_is_broadcast_is_checked_once():
    """A million million entries of which four are really there."""
    X = np.broadcast_to(np.arange(4.0)[:, None], (2**20, 4, 2**20))
    assert checks.check_finite("X", X) == 3.0
    X = np.broadcast_to(np.array([[1.0, np.nan, 1.0]]), (2**40, 3))
    with pytest.raises(ValueError, match=r"X: got NaN at index \(0, 1\)"):
        checks.check_finite("X", X)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_broadcast_is_what_its_copy_is(dtype, rng):
    Q, K, V = (rng.standard_normal((2, 3, 9, 4)).astype(dtype) for _ in range(3))
    K, V = np.broadcast_to(K[:1, :1], K.shape), np.broadcast_to(V[:, :, :1], V.shape)
    mask = np.broadcast_to(rng.random(9) < 0.7, (2, 1, 9))
    for options in ({}, {"key_mask": mask, "R": ropecy.Rotary(4), "causal": True}):
        O = ropecy.attention(Q, K, V, **options)
        np.testing.assert_array_equal(O, ropecy.attention(Q, K.copy(), V.copy(), **options))
