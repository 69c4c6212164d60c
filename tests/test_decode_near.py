"""DecodeState with a near field, whose scores have a scale of their own and no bound, against attention's `near`."""

import io

import cases
import numpy as np
import oracle
import pytest
from decode_files import content, joined, of_version_3, of_version_4, parts

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Leading axes of keys and of queries, slopes.
LAYOUTS = {
    "none": ((), (), None),
    "heads": ((2,), (2,), None),
    "grouped": ((2,), (6,), None),
    "batch": ((3, 1), (3, 2), None),
    "slopes": ((2,), (4,), [0.5, 0.25, 0.0, 2.0**-8]),
    "steep": ((2,), (2,), 40.0),
}
# The last are so large that their exponentials are no numbers, and so small that they are all 0.
NEARS = [(1, 3.0), (7, 2.0), (7, 0.0), (65, -1.5), (20, 1e3), (20, -1e5), (500, 5.0)]


def text(rng, n, lead=(), q_lead=(), d=6, d_v=5, dtype=np.float64):
    """Q, K, V of a text, Q and K within the bound of 1 at scale 1/d; values far from 0."""
    Q = cases.unit_rows(rng.standard_normal((*q_lead, n, d)))
    K = cases.unit_rows(rng.standard_normal((*lead, n, d)))
    return Q.astype(dtype), K.astype(dtype), (3 + rng.standard_normal((*lead, n, d_v))).astype(dtype)


def exact(Q, K, V, near, slopes=None, start=0):
    """The rows from `start` on of causal attention with `near`, by the oracle."""
    lead, bias = Q.shape[:-2], None
    if slopes is not None:
        bias = oracle.Alibi(np.broadcast_to(np.asarray(slopes), lead[-1:]))
    options = {"causal": True, "near": near, "bias": bias, "q_offset": start}
    return oracle.attention(Q[..., start:, :], K, V, oracle.Rope(K.shape[-1]), **options).O


def decode(state, Q, K, V, start=0):
    rows = [state.step(Q[..., i, :], K[..., i, :], V[..., i, :]) for i in range(start, K.shape[-2])]
    return np.stack(rows, axis=-2)


def error_of(O, expected, V):
    """The largest error, in units of the largest range of a column of values."""
    return np.abs(O.astype(np.float64) - expected).max() / np.ptp(V.astype(np.float64), axis=-2).max()


@pytest.mark.parametrize("near", NEARS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_attention_with_a_near_field(layout, dtype, near, rng):
    lead, q_lead, slopes = LAYOUTS[layout]
    Q, K, V = text(rng, 200, lead, q_lead, dtype=dtype)
    bias = None if slopes is None else ropecy.RelativeBias.alibi(slopes)
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), eps=1e-5, near=near, bias=bias)
    state.extend(K[..., :140, :], V[..., :140, :])
    O, expected = decode(state, Q, K, V, 140), exact(Q, K, V, near, slopes, 140)
    certificate = state.certificate
    assert certificate.engine == "polynomial" and certificate.truncation <= 1e-5
    assert error_of(O, expected, V) <= certificate.error
    assert error_of(state.attend(Q[..., -1, :]), expected[..., -1, :], V) <= certificate.error
    if near[0] == 500:  # all of the text: nothing is left to the polynomial
        assert error_of(O, expected, V) <= 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("scale", [0.1, -0.1])
def test_near_scale_beside_a_scale_of_either_sign(scale, rng):
    Q, K, V = text(rng, 150)
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), scale=scale, near=(9, 4.0), eps=1e-6)
    state.extend(K[:120], V[:120])
    expected = oracle.attention(Q[120:], K, V, oracle.Rope(6), scale=scale, causal=True, near=(9, 4.0), q_offset=120).O
    assert error_of(decode(state, Q, K, V, 120), expected, V) <= 1e-6


def test_it_is_the_near_field_of_attention_at_2000_tokens(rng):
    Q, K, V = text(rng, 2000, (2,), (4,), dtype=np.float32)
    near, R = (64, 10.0), ropecy.Rotary(6)
    state = ropecy.DecodeState(6, 5, R, near=near)
    state.extend(K[:, :1900], V[:, :1900])
    O = decode(state, Q, K, V, 1900)
    whole, certificate = ropecy.attention(Q, K, V, R, causal=True, near=near, return_certificate=True)
    assert error_of(O, whole[:, 1900:].astype(np.float64), V) <= certificate.error + state.certificate.error


def test_extend_in_pieces_is_steps(rng):
    Q, K, V = text(rng, 250, (2,), (2,))
    stepped, pieces = (ropecy.DecodeState(6, 5, ropecy.Rotary(6), near=(33, 50.0)) for _ in range(2))
    decode(stepped, Q, K, V)
    for start, stop in [(0, 1), (1, 4), (4, 150), (150, 250)]:
        pieces.extend(K[:, start:stop], V[:, start:stop])
    np.testing.assert_allclose(pieces.attend(Q[:, -1]), stepped.attend(Q[:, -1]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("what", ["key", "query"])
def test_past_the_bound_history_answers_with_the_near_field(what, dtype, rng):
    Q, K, V = text(rng, 180, (2,), (4,), dtype=dtype)
    (K if what == "key" else Q)[:, 150] *= 20
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), near=(20, 2.0), on_break="exact")
    state.extend(K[:, :140], V[:, :140])
    expected = exact(Q, K, V, (20, 2.0), start=140)
    for i in range(140, 180):
        o = state.step(Q[:, i], K[:, i], V[:, i])
        assert error_of(o, expected[:, i - 140], V) <= state.certificate.error
        assert state.certificate.engine == ("exact" if i == 150 or (what == "key" and i > 150) else "polynomial")
    assert state.certificate.error < 1e-3


def test_rounding_of_large_near_scores_is_counted(rng):
    """It grows with the scale, is found in results, and refuses an eps that it alone exceeds."""
    Q, K, V = text(rng, 100)
    rounding, off = [], []
    for scale in (1.0, 1e4, 1e8):
        state = ropecy.DecodeState(6, 5, near=(100, scale), eps=1e-2)
        O = decode(state, Q, K, V)
        expected = oracle.attention(Q, K, V, causal=True, near=(100, scale)).O
        rounding.append(state.certificate.rounding)
        off.append(error_of(O, expected, V))
        assert off[-1] <= rounding[-1]
    assert rounding[0] < rounding[1] < rounding[2]
    with pytest.raises(ropecy.BoundedEntryError, match="rounding alone"):
        ropecy.DecodeState(6, 5, near=(100, 1e14), eps=1e-2)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"near": 5}, TypeError, r"near: got int 5, wants a pair \(w, scale_near\)"),
        ({"near": (0, 1.0)}, ValueError, "near: got 0, wants an integer of at least 1"),
        ({"near": (5, np.inf)}, ValueError, "near: got inf, wants a finite number"),
        ({"near": (5, "x")}, TypeError, "near: got str 'x', wants a real number"),
        ({"near": (5, 1.0), "window": 3}, ValueError, r"near: got \(5, 1.0\) beside window=3, wants one of the two"),
        ({"near": (5, 1.0), "scale": 0.0}, ValueError, r"near: got .* beside scale=0, wants .* scale other than 0"),
        ({"near": (5, 1e300), "scale": 1e-300}, ValueError, r"near: got .* wants a finite multiple"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        ropecy.DecodeState(6, 5, **options)


def test_copies_and_files(tmp_path, rng):
    Q, K, V = text(rng, 160, (2,), (2,), dtype=np.float32)
    for on_break in ("raise", "exact"):
        state = ropecy.DecodeState(6, 5, near=(20, 30), on_break=on_break)
        state.extend(K[:, :150], V[:, :150])
        state.save(tmp_path / "state")
        others = [state.copy(), ropecy.DecodeState.load(tmp_path / "state")]
        expected = decode(state, Q, K, V, 150)
        for other in others:
            assert "near=(20, 30.0)" in repr(other)
            np.testing.assert_array_equal(decode(other, Q, K, V, 150), expected)
            if on_break == "exact":
                np.testing.assert_array_equal(other.attend(9 * Q[:, 0]), state.attend(9 * Q[:, 0]))


def test_files_of_version_3_have_no_near_field(rng):
    Q, K, V = text(rng, 160, (2,), (2,))
    state = ropecy.DecodeState(6, 5, window=20)
    state.extend(K, V)
    file = io.BytesIO()
    state.save(file)
    loaded = ropecy.DecodeState.load(io.BytesIO(of_version_3(file.getvalue())))
    assert (repr(loaded), loaded.certificate) == (repr(state), state.certificate)
    np.testing.assert_array_equal(loaded.attend(Q[:, 0]), state.attend(Q[:, 0]))


def test_files_of_version_4_have_one_near_scale(rng):
    Q, K, V = text(rng, 160, (2,), (2,))
    state = ropecy.DecodeState(6, 5, near=(20, 2.5))
    state.extend(K, V)
    loaded = ropecy.DecodeState.load(io.BytesIO(of_version_4(content(state))))
    np.testing.assert_array_equal(loaded.attend(Q[:, 0]), state.attend(Q[:, 0]))


# ---- one scale a head ----

HEADS = {
    "one head": ((), (), None),
    "heads": ((2,), (2,), None),
    "heads of one key head": ((), (3,), None),
    "grouped": ((2,), (6,), None),
    "batch": ((3, 1), (3, 2), None),
    "slopes": ((2,), (4,), [0.5, 0.25, 0.0, 2.0**-8]),
}
SCALES = np.array([3.0, -1.5, 0.0, 40.0, 0.2, 1.0])


def _of_heads(rng, layout, dtype=np.float64):
    lead, q_lead, slopes = HEADS[layout]
    near = 20, SCALES[: q_lead[-1] if q_lead else 1]
    bias = None if slopes is None else ropecy.RelativeBias.alibi(slopes)
    return *text(rng, 200, lead, q_lead, dtype=dtype), near, {"bias": bias}, slopes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", HEADS)
def test_a_scale_of_each_head(layout, dtype, rng):
    Q, K, V, near, more, slopes = _of_heads(rng, layout, dtype)
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), eps=1e-5, near=near, **more)
    state.extend(K[..., :140, :], V[..., :140, :])
    O, expected = decode(state, Q, K, V, 140), exact(Q, K, V, near, slopes, 140)
    assert state.certificate.engine == "polynomial"
    assert error_of(O, expected, V) <= state.certificate.error


def test_equal_scales_are_one_number(rng):
    Q, K, V = text(rng, 160, (2,), (4,))
    states = [ropecy.DecodeState(6, 5, near=(20, scale), on_break="exact") for scale in (2.5, [2.5] * 4)]
    one, each = (decode(state, Q, K, V) for state in states)
    np.testing.assert_array_equal(one, each)
    np.testing.assert_array_equal(*(state.attend(30 * Q[:, 0]) for state in states))


def test_past_the_bound_history_has_a_scale_of_each_head(rng):
    Q, K, V, near, more, slopes = _of_heads(rng, "slopes")
    K[:, 150] *= 20
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), near=near, on_break="exact", **more)
    state.extend(K[:, :140], V[:, :140])
    O, expected = decode(state, Q, K, V, 140), exact(Q, K, V, near, slopes, 140)
    assert state.certificate.engine == "exact"
    assert error_of(O, expected, V) <= 1e-3


def test_copies_and_files_of_heads(rng):
    Q, K, V = text(rng, 160, (2,), (4,))
    state = ropecy.DecodeState(6, 5, near=(20, SCALES[:4]), on_break="exact")
    state.extend(K[:, :150], V[:, :150])
    assert "near=(20, (3.0, -1.5, 0.0, 40.0))" in repr(state)
    others = [state.copy(), ropecy.DecodeState.load(io.BytesIO(content(state)))]
    expected = decode(state, Q, K, V, 150)
    for other in others:
        np.testing.assert_array_equal(decode(other, Q, K, V, 150), expected)
        np.testing.assert_array_equal(other.attend(9 * Q[:, 0]), state.attend(9 * Q[:, 0]))
    header, arrays = parts(content(state))
    header["options"]["near"] = [20, [1.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match="near: got 3 scales, wants a multiple of the 2 heads"):
        ropecy.DecodeState.load(io.BytesIO(joined(header, arrays)))


def test_heads_that_do_not_fit_are_refused(rng):
    Q, K, V = text(rng, 5, (2,), (4,))
    with pytest.raises(ValueError, match="near: got a scale_near of no head"):
        ropecy.DecodeState(6, 5, near=(20, []))
    with pytest.raises(ValueError, match=r"near: got .* beside scale=1e-300, wants a finite multiple"):
        ropecy.DecodeState(6, 5, scale=1e-300, near=(20, [1.0, 1e300]))
    state = ropecy.DecodeState(6, 5, near=(20, [1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"K, V: got leading axes \(2,\), wants .* that divides the 3 of near"):
        state.extend(K, V)
    state = ropecy.DecodeState(6, 5, near=(20, [1.0, 2.0]))
    state.extend(K, V)
    with pytest.raises(ValueError, match=r"q: got leading axes \(4,\), wants \(2,\), heads as near has"):
        state.attend(Q[:, 0])
