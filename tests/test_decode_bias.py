"""DecodeState under ALiBi: decayed states against exact attention with the bias over the whole prefix."""

import cases
import numpy as np
import pytest

import ropecy
from ropecy.kernels import _monomials

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

alibi = ropecy.RelativeBias.alibi
# Leading axes of keys and of queries, slopes.
LAYOUTS = {
    "one": ((), (), 0.3),
    "steep": ((2,), (2,), 40.0),
    "gentle": ((2,), (2,), 2.0**-8),
    "none": ((2,), (2,), 0.0),
    "heads": ((2,), (2,), [0.5, 2.0**-8]),
    "one_slope_for_groups": ((2,), (6,), 0.5),
    "one_key_head": ((), (3,), [0.25, 0.0, 40.0]),
    "groups": ((2,), (6,), [0.5, 0.25, 0.125, 2.0, 40.0, 2.0**-8]),
    "equal_in_groups": ((2,), (4,), [0.5, 0.5, 0.25, 0.25]),
    "batch": ((3, 2), (3, 4), [0.5, 0.25, 0.125, 40.0]),
}


def text(rng, n, lead=(), q_lead=(), d=6, d_v=5, dtype=np.float64):
    """Q, K, V of a text, Q and K within the bound of 1 at scale 1/d; values far from 0."""
    Q = cases.unit_rows(rng.standard_normal((*q_lead, n, d)))
    K = cases.unit_rows(rng.standard_normal((*lead, n, d)))
    return Q.astype(dtype), K.astype(dtype), (3 + rng.standard_normal((*lead, n, d_v))).astype(dtype)


def exact(Q, K, V, slopes, R=None, start=0):
    """Rows from `start` on of causal attention with the bias: in float64, by NumPy alone, but for the rotations."""
    Q, K, V = (X.astype(np.float64) for X in (Q, K, V))
    if R is not None:
        Q, K = R.rotate(Q), R.rotate(K)
    repeats = Q[..., 0, 0].size // K[..., 0, 0].size
    lead = Q.shape[:-2]
    K, V = (np.repeat(X, repeats, axis=-3) if repeats > 1 and X.ndim > 2 else X for X in (K, V))
    age = np.arange(start, K.shape[-2])[:, None] - np.arange(K.shape[-2])
    slopes = np.broadcast_to(np.asarray(slopes), lead)[..., None, None]
    scores = Q[..., start:, :] @ K.swapaxes(-2, -1) / K.shape[-1] - slopes * age
    A = np.exp(np.where(age >= 0, scores, -np.inf))
    return A @ V / A.sum(axis=-1, keepdims=True)


def decode(state, Q, K, V, start=0):
    rows = [state.step(Q[..., i, :], K[..., i, :], V[..., i, :]) for i in range(start, K.shape[-2])]
    return np.stack(rows, axis=-2)


def assert_within(O, expected, V, eps):
    spread = float(np.ptp(V.astype(np.float64), axis=-2).max())
    assert np.abs(O - expected).max() <= eps * spread + float(np.finfo(O.dtype).eps) * float(np.abs(V).max())


@pytest.mark.parametrize("window", [None, 1, 7, 500])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_attention_over_the_prefix(layout, dtype, window, rng):
    lead, q_lead, slopes = LAYOUTS[layout]
    Q, K, V = text(rng, 160, lead, q_lead, dtype=dtype)
    R = ropecy.Rotary(6)
    state = ropecy.DecodeState(6, 5, R, eps=1e-6, window=window, bias=alibi(slopes))
    state.extend(K[..., :120, :], V[..., :120, :])
    O, expected = decode(state, Q, K, V, 120), exact(Q, K, V, slopes, R, 120)
    certificate = state.certificate
    assert certificate.engine == "polynomial" and certificate.error <= 1e-6
    assert_within(O, expected, V, certificate.error)
    if window == 500:  # all of the text: nothing is left to the polynomial
        assert_within(O, expected, V, 1e-13)
    np.testing.assert_allclose(
        state.attend(Q[..., -1, :]), O[..., -1, :], rtol=0, atol=8 * np.finfo(dtype).eps * np.abs(V).max()
    )


def test_it_is_the_bias_of_attention(rng):
    slopes = [0.5, 0.25, 0.0, 2.0]
    Q, K, V = text(rng, 150, (3, 2), (3, 4))
    state = ropecy.DecodeState(6, 5, eps=1e-8, bias=alibi(slopes), window=3)
    expected = ropecy.attention(Q, K, V, bias=alibi(slopes), causal=True, method="exact")
    assert_within(decode(state, Q, K, V), expected, V, 1e-8)


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("slope", [2.0**-8, 0.5, 40.0])
def test_worst_case_text_stays_within_the_certificate(slope, eps, rng):
    # Keys at the ends of the interval, values that tell which: what the proof of eps is sharp for.
    B = 3.0
    K = np.where(rng.random((300, 1)) < 0.5, 1.0, -1.0) * np.sqrt([[B, 0.0]])
    V = np.sign(K[:, :1])
    state = ropecy.DecodeState(2, 1, eps=eps, bound=B, scale=1.0, bias=alibi(slope))
    state.extend(K, V)
    for q in (K[0], -K[0], K[0] / 2):
        scores = K @ q - slope * np.arange(299.0, -1, -1)
        A = np.exp(scores)
        assert abs(state.attend(q)[0] - A @ V[:, 0] / A.sum()) <= 2 * state.certificate.error
    assert state.certificate.error <= eps


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("slope", [2.0**-16, 2.0**-8, 1.0, 40.0])
def test_long_prefix(slope, window, rng):
    n = 131072
    Q, K, V = text(rng, n, d=4, d_v=3)
    state = ropecy.DecodeState(4, 3, ropecy.Rotary(4), eps=1e-7, window=window, bias=alibi(slope))
    state.extend(K[:100_000], V[:100_000])
    state.extend(K[100_000:-1], V[100_000:-1])
    o = state.step(Q[-1], K[-1], V[-1])
    assert np.isfinite(state._streams.sums.sums[0]).all()
    assert_within(o, exact(Q, K, V, slope, ropecy.Rotary(4), n - 1)[0], V, state.certificate.error)


@pytest.mark.parametrize("slope", [1e-3, 2.0**-8])
def test_decays_of_many_steps(slope, rng):
    n = 6000
    Q, K, V = text(rng, n, d=2, d_v=1)
    state = ropecy.DecodeState(2, 1, eps=1e-9, window=16, bias=alibi(slope))
    o = decode(state, Q, K, V)[-1]
    assert_within(o, exact(Q, K, V, slope, start=n - 1)[0], V, state.certificate.error)


@pytest.mark.parametrize("window", [None, 5, 33])
@pytest.mark.parametrize("layout", ["gentle", "steep", "groups"])
def test_extend_in_pieces_is_steps(layout, window, rng, monkeypatch):
    lead, q_lead, slopes = LAYOUTS[layout]
    Q, K, V = text(rng, 250, lead, q_lead)
    stepped, whole, pieces = (ropecy.DecodeState(6, 5, window=window, bias=alibi(slopes)) for _ in range(3))
    decode(stepped, Q, K, V)
    whole.extend(K, V)
    for start, stop in [(0, 1), (1, 4), (4, 4), (4, 150), (150, 250)]:
        pieces.extend(K[:, start:stop], V[:, start:stop])
    for other in (whole, pieces):
        np.testing.assert_allclose(other.attend(Q[:, -1]), stepped.attend(Q[:, -1]), rtol=0, atol=1e-14)


def test_long_prefill_in_pieces_of_its_own(rng, monkeypatch):
    for module in ("ropecy.decoding.streams", "ropecy.decoding.rows"):
        monkeypatch.setattr(f"{module}.PIECE", 2**10)
    Q, K, V = text(rng, 3000, (), (2,))
    slopes = [2.0**-10, 0.0]
    state = ropecy.DecodeState(6, 5, window=70, eps=1e-6, bias=alibi(slopes))
    state.extend(K, V)
    assert_within(state.attend(Q[:, -1]), exact(Q, K, V, slopes, start=2999)[:, 0], V, 1e-6)


def test_size(rng):
    def size(n, slopes, window=None):
        _, K, V = text(rng, n, (2,))
        state = ropecy.DecodeState(6, 5, window=window, bias=alibi(slopes))
        state.extend(K, V)
        return state.nbytes

    assert size(5000, [0.5, 0.25], 40) == size(50, [0.5, 0.25], 40)
    shared, apart = size(50, [0.5, 0.5, 0.25, 0.25]), size(50, [0.5, 0.4, 0.25, 0.2])
    assert shared == size(50, 0.5)
    # What a key head has whatever its slopes: recent tokens, and the first, least and largest values. The ring has
    # whole vectors.
    lanes = _monomials.lanes_of(np.float64)
    each_head = 2 * 8 * (-(-65 // lanes) * lanes * (6 + 5 + 1) + 3 * 5)
    assert apart - each_head == 2 * (shared - each_head)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("layout", ["gentle", "groups", "batch", "one_slope_for_groups"])
def test_long_queries_are_answered_exactly_and_the_state_goes_on(layout, window, dtype, rng):
    lead, q_lead, slopes = LAYOUTS[layout]
    Q, K, V = text(rng, 160, lead, q_lead, dtype=dtype)
    Q[..., 140, :] *= 30
    state = ropecy.DecodeState(6, 5, window=window, on_break="exact", eps=1e-5, bias=alibi(slopes))
    state.extend(K[..., :120, :], V[..., :120, :])
    O, expected = decode(state, Q, K, V, 120), exact(Q, K, V, slopes, start=120)
    assert_within(O, expected, V, 1e-5)
    assert_within(O[..., 20, :], expected[..., 20, :], V, 100 * np.finfo(dtype).eps)
    assert state.certificate.engine == "polynomial"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["gentle", "steep", "groups"])
def test_a_long_key_makes_everything_exact(layout, dtype, rng):
    lead, q_lead, slopes = LAYOUTS[layout]
    Q, K, V = text(rng, 180, lead, q_lead, dtype=dtype)
    K[1, 130] *= 20
    state = ropecy.DecodeState(6, 5, window=6, on_break="exact", bias=alibi(slopes))
    state.extend(K[:, :140], V[:, :140])
    O, expected = decode(state, Q, K, V, 140), exact(Q, K, V, slopes, start=140)
    certificate = state.certificate
    assert (certificate.engine, certificate.truncation) == ("exact", 0.0)
    assert_within(O, expected, V, certificate.error)
    assert certificate.error <= 1000 * np.finfo(dtype).eps * certificate.bound


def test_copy_save_and_load(tmp_path, rng):
    for layout, options in (("groups", {"window": 5}), ("gentle", {"on_break": "exact"}), ("one", {})):
        lead, q_lead, slopes = LAYOUTS[layout]
        Q, K, V = text(rng, 201, lead, q_lead)
        state = ropecy.DecodeState(6, 5, bias=alibi(np.asarray(slopes, np.float32)), **options)
        state.save(tmp_path / "empty")
        assert repr(ropecy.DecodeState.load(tmp_path / "empty")) == repr(state)
        state.extend(K[..., :-1, :], V[..., :-1, :])
        state.save(tmp_path / "state")
        token = Q[..., -1, :], K[..., -1, :], V[..., -1, :]
        loaded, copied = ropecy.DecodeState.load(tmp_path / "state"), state.copy()
        assert repr(loaded).split(" tokens")[0] == repr(state).split(" tokens")[0]
        assert loaded.certificate == state.certificate
        o = state.step(*token)
        np.testing.assert_array_equal(loaded.step(*token), o)
        np.testing.assert_array_equal(copied.step(*token), o)


def test_results_do_not_depend_on_threads(rng, monkeypatch):
    Q, K, V = text(rng, 5000, (2,), (4,))
    found = []
    monkeypatch.setattr("ropecy.machine.threads.KEPT", 0.0)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        state = ropecy.DecodeState(6, 5, window=11, bias=alibi([0.5, 0.1, 0.01, 0.001]))
        state.extend(K[:, 1:], V[:, 1:])
        found.append(state.step(Q[:, 0], K[:, 0], V[:, 0]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


SUPPORTED = r"wants RelativeBias.alibi\(slope\) with slopes of at least 0"
REFUSED = {
    "kind": (0.5, TypeError, rf"bias: got float 0.5, {SUPPORTED}"),
    "table": (
        ropecy.RelativeBias([0.0, 1.0, 0.0]),
        NotImplementedError,
        rf"bias: got RelativeBias\(table.*{SUPPORTED}",
    ),
    "negative": (alibi([0.5, -0.25]), ValueError, rf"bias: got a slope of -0.25, {SUPPORTED}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_biases(name):
    bias, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        ropecy.DecodeState(6, 5, bias=bias)


def test_heads_that_do_not_fit(rng):
    Q, K, V = text(rng, 10, (2,), (4,))
    state = ropecy.DecodeState(6, 5, bias=alibi([0.5, 0.25, 0.2, 0.1]))
    with pytest.raises(ValueError, match=r"K, V: got leading axes \(3,\), wants .* heads that divides the 4 of bias"):
        state.extend(np.zeros((3, 10, 6)), np.zeros((3, 10, 5)))
    with pytest.raises(ValueError, match=r"q: got leading axes \(2,\), wants \(4,\), heads as bias has"):
        state.step(Q[:2, 0], K[:, 0], V[:, 0])
    assert (state.length, state.nbytes) == (0, 0)
    state.extend(K, V)
    with pytest.raises(ValueError, match=r"q: got leading axes \(2,\), wants \(4,\), heads as bias has"):
        state.attend(Q[:2, 0])
    single = ropecy.DecodeState(6, 5, bias=alibi([0.5, 0.25]))
    with pytest.raises(ValueError, match=r"q: got leading axes \(\), wants \(2,\), heads as bias has"):
        single.step(Q[0, 0], K[0, 0], V[0, 0])


def test_memory_counts_a_state_for_each_slope(monkeypatch):
    # Three states of degree 1, d = 8, twice, for what rounding takes; and the recent tokens.
    monkeypatch.setattr("ropecy.decoding.bounds.fits", lambda size: size < 3 * 2 * 8 * 9 * 3 + 8 * 65 * (8 + 2 + 1))
    rows = np.full((1, 1, 8), 0.01)
    ropecy.DecodeState(8, 2, eps=0.2, bias=ropecy.RelativeBias.alibi([0.1, 0.1])).extend(rows, rows[..., :2])
    state = ropecy.DecodeState(8, 2, eps=0.2, bias=ropecy.RelativeBias.alibi([0.1, 0.2, 0.3, 0.4]))
    with pytest.raises(MemoryError, match="4 x 9 features"):
        state.extend(rows, rows[..., :2])
