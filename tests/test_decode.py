"""DecodeState against exact attention over the whole prefix, and what its state promises: size, time, copies, files."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cases
import numpy as np
import pytest

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Leading axes of keys, and of queries.
LEADS = {
    "none": ((), ()),
    "one_key_head": ((), (3,)),
    "heads": ((2,), (2,)),
    "grouped": ((2,), (6,)),
    "batch": ((3, 1), (3, 2)),
}


def text(rng, n, d=6, d_v=5, lead=(), q_lead=None, dtype=np.float64):
    """Q, K, V of a text, Q and K within the bound of 1 at scale 1/d; values far from 0."""
    Q = cases.unit_rows(rng.standard_normal((*(lead if q_lead is None else q_lead), n, d)))
    K = cases.unit_rows(rng.standard_normal((*lead, n, d)))
    V = 3 + rng.standard_normal((*lead, n, d_v))
    return Q.astype(dtype), K.astype(dtype), V.astype(dtype)


def exact(Q, K, V, R, **options):
    """Causal attention over the text in float64."""
    Q, K, V = (X.astype(np.float64) for X in (Q, K, V))
    return ropecy.attention(Q, K, V, R, causal=True, method="exact", **options)


def decode(state, Q, K, V, start=0):
    """The rows of O from `start` on, a step each."""
    rows = [state.step(Q[..., i, :], K[..., i, :], V[..., i, :]) for i in range(start, K.shape[-2])]
    return np.stack(rows, axis=-2)


def assert_within(O, expected, V, eps):
    spread = float(np.ptp(V.astype(np.float64), axis=-2).max())
    stored = float(np.finfo(O.dtype).eps) * float(np.abs(V).max())
    assert np.abs(O - expected).max() <= eps * spread + stored


@pytest.mark.parametrize("window", [None, 1, 7, 500])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("leads", LEADS)
def test_steps_are_attention_over_the_prefix(leads, dtype, window, rng):
    lead, q_lead = LEADS[leads]
    Q, K, V = text(rng, 160, lead=lead, q_lead=q_lead, dtype=dtype)
    R = ropecy.Rotary(6)
    state = ropecy.DecodeState(6, 5, R, eps=1e-4, window=window)
    state.extend(K[..., :120, :], V[..., :120, :])
    O = decode(state, Q, K, V, 120)
    assert O.dtype == dtype
    assert state.length == 160
    assert state.certificate.error <= 1e-4
    expected = exact(Q, K, V, R)[..., 120:, :]
    assert_within(O, expected, V, 1e-4)
    if window == 500:  # all of the text: nothing is left to the polynomial
        assert_within(O, expected, V, 1e-13)


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("bound", [0.1, 1.0, 3.0])
def test_worst_case_text_stays_within_the_certificate(bound, eps, rng):
    # Keys at the ends of the interval, values that tell which: what the proof of eps is sharp for.
    K = np.where(rng.random((200, 1)) < 0.5, 1.0, -1.0) * np.sqrt([[bound, 0.0]])
    V = np.sign(K[:, :1])
    state = ropecy.DecodeState(2, 1, eps=eps, bound=bound, scale=1.0)
    state.extend(K, V)
    O = np.array([state.attend(q) for q in (K[0], -K[0], K[0] / 2)])
    expected = ropecy.attention(np.array([K[0], -K[0], K[0] / 2]), K, V, scale=1.0, method="exact")
    assert np.abs(O - expected).max() <= 2 * state.certificate.error
    assert state.certificate.error <= eps


@pytest.mark.parametrize(
    "R",
    [
        None,
        ropecy.Rotary(7, rotary_dim=4, pairing="interleaved"),
        ropecy.Rotary(
            7,
            rotary_dim=4,
            length=160,
            scaling={
                "rope_type": "longrope",
                "short_factor": [1.0, 1.0],
                "long_factor": [1.0, 2.0],
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
    ],
    ids=["none", "partial", "attention_factor"],
)
@pytest.mark.parametrize("scale", [0.1, -0.1])
def test_rotations_and_signs(R, scale, rng):
    Q, K, V = text(rng, 160, d=7)
    state = ropecy.DecodeState(7, 5, R, scale=scale, bound=2.0, window=9, eps=1e-5)
    state.extend(K[:120], V[:120])
    assert_within(decode(state, Q, K, V, 120), exact(Q, K, V, R, scale=scale)[120:], V, 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window", [None, 5, 33])
def test_extend_in_pieces_is_steps(window, dtype, rng):
    Q, K, V = text(rng, 250, lead=(2,), dtype=dtype)
    R = ropecy.Rotary(6)
    stepped, whole, pieces = (ropecy.DecodeState(6, 5, R, window=window) for _ in range(3))
    decode(stepped, Q, K, V)
    whole.extend(K, V)
    for start, stop in [(0, 1), (1, 4), (4, 4), (4, 150), (150, 250)]:
        pieces.extend(K[:, start:stop], V[:, start:stop])
    q = Q[:, -1]
    tolerance = 4 * np.finfo(dtype).eps * np.abs(V).max()
    for other in (whole, pieces):
        assert other.length == stepped.length == 250
        np.testing.assert_allclose(other.attend(q), stepped.attend(q), rtol=0, atol=tolerance)


def test_long_prefill_in_pieces_of_its_own(rng, monkeypatch):
    for module in ("ropecy.decoding.streams", "ropecy.decoding.rows"):
        monkeypatch.setattr(f"{module}.PIECE", 2**10)
    Q, K, V = text(rng, 3000)
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), window=70, eps=1e-6)
    state.extend(K, V)
    assert_within(state.attend(Q[-1]), exact(Q, K, V, ropecy.Rotary(6))[-1], V, 1e-6)


def test_attend_leaves_the_state_alone(rng):
    Q, K, V = text(rng, 140)
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), window=4)
    state.extend(K, V)
    first = state.attend(Q[0])
    state.attend(Q[1])
    assert state.length == 140
    np.testing.assert_array_equal(state.attend(Q[0]), first)


def test_broadcast_leading_axes(rng):
    _, K, V = text(rng, 30, lead=(2, 3))
    state, full = (ropecy.DecodeState(6, 5, ropecy.Rotary(6)) for _ in range(2))
    state.extend(K[:1], V)
    full.extend(np.broadcast_to(K[:1], K.shape), V)
    q = K[..., 0, :]
    np.testing.assert_array_equal(state.attend(q), full.attend(q))
    np.testing.assert_array_equal(
        state.step(q, K[:1, :, 0], V[0, :, 0]), full.step(q, K[[0, 0], :, 0], V[[0, 0], :, 0])
    )


def test_extend_wants_the_leading_axes_of_the_state(rng):
    _, K, V = text(rng, 8, lead=(2, 3))
    state = ropecy.DecodeState(6, 5)
    state.extend(K, V)
    before = state.attend(K[..., 0, :])
    for lead in ((1, 3), (3,), ()):
        one = np.zeros((*lead, 8, 6)), np.zeros((*lead, 8, 5))
        with pytest.raises(ValueError, match=r"K, V: got leading axes .*, wants \(2, 3\) as the state has"):
            state.extend(*one)
    np.testing.assert_array_equal(state.attend(K[..., 0, :]), before)
    state.extend(K[:1], V)  # together they have the state's axes
    assert state.length == 16


def test_strides_and_read_only_inputs(rng):
    Q, K, V = text(rng, 130, lead=(2,))
    state, other = (ropecy.DecodeState(6, 5, ropecy.Rotary(6), window=3) for _ in range(2))
    state.extend(K[:, :90], V[:, :90])
    K_f, V_f = np.asfortranarray(K), np.asfortranarray(V)
    for X in (K_f, V_f, Q):
        X.flags.writeable = False
    other.extend(K_f[:, :90], V_f[:, :90])
    np.testing.assert_array_equal(decode(other, Q, K_f, V_f, 90), decode(state, Q, K, V, 90))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(name, rng):
    dtype = np.dtype(np.float16) if name == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    # Rows are scaled to the bound exactly and then rounded: past it by rounding is allowed.
    Q, K, V = (X.astype(dtype) for X in text(rng, 160))
    R = ropecy.Rotary(6)
    state = ropecy.DecodeState(6, 5, R, dtype=dtype, window=8, on_break="exact")
    state.extend(K[:120], V[:120])
    O = decode(state, Q, K, V, 120)
    assert O.dtype == dtype
    assert state.certificate.engine == "polynomial"
    expected = exact(Q, K, V, R)[120:]
    assert np.abs(O.astype(np.float64) - expected).max() <= (1e-3 + 2.0**-7) * np.abs(expected).max()


def test_ten_million_tokens(rng):
    # Positions differ, keys repeat, so that the truth is a sum that NumPy can make in pieces.
    pieces, n = 10, 10**6
    R = ropecy.Rotary(2, base=1.0)
    K = cases.unit_rows(rng.standard_normal((n, 2))).astype(np.float32)
    V = rng.standard_normal((n, 1)).astype(np.float32)
    state = ropecy.DecodeState(2, 1, R, eps=1e-6)
    q = K[0]
    numerator = denominator = 0.0
    for piece in range(pieces):
        state.extend(K, V)
        angle = pieces * n - 1 - piece * n - np.arange(n, dtype=np.float64)
        c, s = np.cos(angle), np.sin(angle)
        x, y = K.T.astype(np.float64)
        # R_{-angle} k against q
        weights = np.exp(0.5 * (q[0] * (c * x + s * y) + q[1] * (c * y - s * x)))
        numerator, denominator = numerator + weights @ V[:, 0].astype(np.float64), denominator + weights.sum()
    assert state.length == 10**7
    assert abs(state.attend(q)[0] - numerator / denominator) <= 1e-6 * np.ptp(V)


def test_size_does_not_depend_on_the_length(rng):
    d = 16
    Q, K, V = text(rng, 131072, d=d, d_v=d, dtype=np.float32)
    states = [ropecy.DecodeState(d, d, ropecy.Rotary(d), window=64) for _ in range(2)]
    for state, n in zip(states, (4096, 131072), strict=True):
        state.extend(K[:n], V[:n])
        state.step(Q[0], K[0], V[0])
    assert states[0].nbytes == states[1].nbytes


def test_error_after_131072_tokens(rng):
    d = 8
    Q, K, V = text(rng, 131072, d=d, d_v=d, lead=(2,), dtype=np.float32)
    state = ropecy.DecodeState(d, d, ropecy.Rotary(d))
    state.extend(K, V)
    rows = Q[:, -1:].astype(np.float64)
    expected = ropecy.attention(
        rows, K.astype(np.float64), V.astype(np.float64), ropecy.Rotary(d), q_offset=131071, causal=True, method="exact"
    )
    assert_within(state.attend(Q[:, -1]), expected[:, 0], V, 1e-3)


@pytest.mark.parametrize("window", [None, 4])
def test_interrupted_extend_leaves_the_state_as_it_was(window, rng, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    Q, K, V = text(rng, 200)
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), window=window)
    with monkeypatch.context() as patch:
        patch.setattr("ropecy.decoding.sums._decoding.add_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            state.extend(K, V)
    with pytest.raises(ValueError, match="attend: got a state without tokens"):
        state.attend(Q[0])
    state.extend(K, V)
    before = state.attend(Q[0])
    with monkeypatch.context() as patch:
        patch.setattr("ropecy.decoding.sums._decoding.add_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            state.extend(K, V)
    assert state.length == 200
    np.testing.assert_array_equal(state.attend(Q[0]), before)


def test_results_do_not_depend_on_threads(rng, monkeypatch):
    Q, K, V = text(rng, 5000, lead=(3,))
    found = []
    monkeypatch.setattr("ropecy.machine.threads.KEPT", 0.0)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), window=11)
        state.extend(K[:, 1:], V[:, 1:])
        found.append(state.step(Q[:, 0], K[:, 0], V[:, 0]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


# ---- one call at a time ----

CALLS = {
    "extend": lambda state, x: state.extend(x[None], x[None]),
    "step": lambda state, x: state.step(x, x, x),
    "attend": lambda state, x: state.attend(x),
    "copy": lambda state, x: state.copy(),
    "save": lambda state, x: state.save(os.devnull),
    "certificate": lambda state, x: state.certificate,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_during_another_is_refused(name, rng, monkeypatch):
    """While `extend` works in one thread, other calls raise in another, and what can be read is as it was before."""
    x = np.full(4, 0.1)
    state = ropecy.DecodeState(4, 4)
    state.extend(x[None], x[None])
    refused = []

    def meanwhile(*_):
        with ThreadPoolExecutor(1) as pool:
            for call in (CALLS[name], lambda state, x: (state.length, state.nbytes, repr(state))):
                refused.append(pool.submit(call, state, x).exception())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ropecy.decoding.sums._decoding.add_block", meanwhile)
        with pytest.raises(KeyboardInterrupt):
            state.extend(np.tile(x, (200, 1)), np.tile(x, (200, 1)))
    assert isinstance(refused[0], RuntimeError)
    assert re.match(f"{name}: got a state that another call is working on, wants one call at a time", str(refused[0]))
    assert refused[1] is None
    CALLS[name](state, x)  # an interrupted call does not keep the state


def test_threads_give_right_rows_or_an_error(rng):
    Q, K, V = text(rng, 1600, d=8, d_v=8)
    state, alone = (ropecy.DecodeState(8, 8, eps=1e-6) for _ in range(2))
    alone.extend(K, V)
    expected = alone.attend(Q[0])

    def decode_some(start):
        done = 0
        while done < 400:
            i = start + done
            try:
                state.step(Q[i], K[i], V[i])
                done += 1
            except RuntimeError:
                time.sleep(1e-4)  # another thread's call goes on at once instead of when Python takes turns

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode_some, range(0, 1600, 400)))
    # Every token is there once, in whatever order the threads got their turns.
    assert state.length == 1600
    np.testing.assert_allclose(state.attend(Q[0]), expected, rtol=0, atol=1e-5)


# ---- past the bound ----


@pytest.mark.parametrize("window", [None, 4])
def test_past_the_bound_raises_and_leaves_the_state_as_it_was(window, rng):
    Q, K, V = text(rng, 120, lead=(2,))
    state, untouched = (ropecy.DecodeState(6, 5, ropecy.Rotary(6), window=window) for _ in range(2))
    with pytest.raises(ropecy.BoundedEntryError, match="K: got a row at index"):
        state.extend(2 * K, V)
    assert (state.length, state.nbytes) == (0, 0)
    for each in (state, untouched):
        each.extend(K, V)
    long = K.copy()
    long[1, 7] *= 1.1
    with pytest.raises(ropecy.BoundedEntryError, match=r"K: got a row at index \(1, 7\) with .* = 1.21, .* bound = 1;"):
        state.extend(long, V)
    with pytest.raises(ropecy.BoundedEntryError, match=r"k: got a row at index \(1,\)"):
        state.step(Q[:, 0], long[:, 7], V[:, 0])
    with pytest.raises(ropecy.BoundedEntryError, match="q: got a row"):
        state.step(2 * Q[:, 0], K[:, 0], V[:, 0])
    with pytest.raises(ropecy.BoundedEntryError, match="q: got a row"):
        state.attend(2 * Q[:, 0])
    assert state.length == 120
    np.testing.assert_array_equal(state.attend(Q[:, 0]), untouched.attend(Q[:, 0]))
    step = Q[:, 0], K[:, 0], V[:, 0]
    np.testing.assert_array_equal(state.step(*step), untouched.step(*step))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window", [None, 4])
def test_long_queries_are_answered_exactly_and_the_state_goes_on(window, dtype, rng):
    Q, K, V = text(rng, 160, lead=(2,), q_lead=(4,), dtype=dtype)
    Q[:, 140] *= 30
    R = ropecy.Rotary(6)
    state = ropecy.DecodeState(6, 5, R, window=window, on_break="exact", eps=1e-4)
    state.extend(K[:, :120], V[:, :120])
    O, expected = decode(state, Q, K, V, 120), exact(Q, K, V, R)[:, 120:]
    assert_within(O, expected, V, 1e-4)
    assert_within(O[:, 20], expected[:, 20], V, 100 * np.finfo(dtype).eps)
    assert state.certificate.engine == "polynomial"
    assert_within(state.attend(3 * Q[:, -1]), exact(3 * Q, K, V, R)[:, -1], V, 100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("how", ["step", "extend", "first"])
def test_a_long_key_makes_everything_exact(how, dtype, rng):
    Q, K, V = text(rng, 180, lead=(2,), q_lead=(4,), dtype=dtype)
    K[1, 0 if how == "first" else 130 if how == "extend" else 150] *= 20
    R = ropecy.Rotary(6)
    state = ropecy.DecodeState(6, 5, R, window=6, on_break="exact")
    state.extend(K[:, :120], V[:, :120])
    state.extend(K[:, 120:140], V[:, 120:140])
    O, expected = decode(state, Q, K, V, 140), exact(Q, K, V, R)[:, 140:]
    assert_within(O, expected, V, 1e-3)
    assert_within(O[:, 15:], expected[:, 15:], V, 100 * np.finfo(dtype).eps)
    certificate = state.certificate
    assert (certificate.engine, certificate.truncation) == ("exact", 0.0)
    assert_within(O[:, 15:], expected[:, 15:], V, certificate.error)
    assert state._streams.sums.exact.all()


def test_history_is_what_exact_costs(rng):
    _, K, V = text(rng, 1000, dtype=np.float32)
    state, lean = ropecy.DecodeState(6, 5, on_break="exact"), ropecy.DecodeState(6, 5)
    for each in (state, lean):
        each.extend(K, V)
    assert state.nbytes == lean.nbytes + 1000 * (6 + 5) * 4


# ---- copies and files ----


def states(rng):
    """A state of every kind, with the next token."""
    for options in ({}, {"window": 5}, {"window": 90, "eps": 1e-6}, {"on_break": "exact"}):
        Q, K, V = text(rng, 201, lead=(2,), q_lead=(4,), dtype=np.float32)
        if options.get("on_break"):
            Q[:, -1] *= 3
        state = ropecy.DecodeState(6, 5, ropecy.Rotary(6, base=100.0), **options)
        state.extend(K[:, :-1], V[:, :-1])
        yield state, (Q[:, -1], K[:, -1], V[:, -1])
    Q, K, V = text(rng, 201)
    broken = ropecy.DecodeState(6, 5, on_break="exact", window=3)
    broken.extend(2 * K[:-1], V[:-1])
    yield broken, (Q[-1], K[-1], V[-1])


@pytest.mark.parametrize("how", ["copy", "copy.copy", "copy.deepcopy"])
def test_copies_are_independent(how, rng):
    make = {"copy": lambda state: state.copy(), "copy.copy": copy.copy, "copy.deepcopy": copy.deepcopy}[how]
    for state, token in states(rng):
        other = make(state)
        before = state.attend(token[0])
        o = other.step(*token)
        other.step(*token)
        assert (state.length, other.length) == (200, 202)
        np.testing.assert_array_equal(state.attend(token[0]), before)
        np.testing.assert_array_equal(state.step(*token), o)


def test_save_and_load(tmp_path, rng):
    for state, token in states(rng):
        state.save(tmp_path / "state")
        loaded = ropecy.DecodeState.load(tmp_path / "state")
        assert repr(loaded).split(" tokens")[0] == repr(state).split(" tokens")[0]
        assert loaded.certificate == state.certificate
        np.testing.assert_array_equal(loaded.step(*token), state.step(*token))


def test_load_under_another_instruction_set(tmp_path, rng):
    Q, K, V = text(rng, 150)
    state = ropecy.DecodeState(6, 5, ropecy.Rotary(6), window=5)
    state.extend(K, V)
    state.save(tmp_path / "state")
    np.save(tmp_path / "q.npy", Q[-1])
    program = (
        "import sys, numpy, ropecy\n"
        "print(*ropecy.DecodeState.load(sys.argv[1]).attend(numpy.load(sys.argv[2])).tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "state", tmp_path / "q.npy"],
        env={**os.environ, "ROPECY_ISA": "baseline"},
        capture_output=True,
        text=True,
        check=True,
    )
    np.testing.assert_allclose(np.array(found.stdout.split(), float), state.attend(Q[-1]), rtol=1e-13)


def test_save_and_load_before_the_first_token(tmp_path):
    R = ropecy.Rotary(8, rotary_dim=4, scaling={"rope_type": "linear", "factor": 2.0})
    state = ropecy.DecodeState(8, 3, R, bound=0.5, scale=0.2, window=4, dtype=np.float32)
    state.save(tmp_path / "state.npz")
    assert repr(ropecy.DecodeState.load(tmp_path / "state.npz")) == repr(state)


def test_files_that_are_not_states(tmp_path, rng):
    (tmp_path / "text").write_text("not a state")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    state = ropecy.DecodeState(2, 1)
    state.save(tmp_path / "state.npz")
    with np.load(tmp_path / "state.npz") as file:
        header = json.loads(str(file["header"]))
    np.savez(tmp_path / "later.npz", header=np.array(json.dumps({**header, "version": 99})))
    for name in ("text", "other.npz"):
        with pytest.raises(ValueError, match=r"path: got .*, wants a file that DecodeState.save wrote"):
            ropecy.DecodeState.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"path: got .*; header: got format version 99, wants 5 or an earlier one"):
        ropecy.DecodeState.load(tmp_path / "later.npz")
    with pytest.raises(FileNotFoundError):
        ropecy.DecodeState.load(tmp_path / "missing.npz")


# ---- what is refused ----

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
REFUSED = {
    "d": ({"d": 0}, ValueError, "d: got 0, wants an integer of at least 1"),
    "d_kind": ({"d": 2.0}, TypeError, "d: got float 2.0, wants an integer"),
    "d_v": ({"d_v": -1}, ValueError, "d_v: got -1"),
    "R": ({"R": 3}, TypeError, "R: got int 3, wants a ropecy.Rotary or None"),
    "R_width": ({"R": ropecy.Rotary(4)}, ValueError, "R: got a Rotary of width 4, wants 6, the width of keys"),
    "R_length": ({"R": ropecy.Rotary(6, scaling=DYNAMIC)}, ValueError, r"R: got rope_type 'dynamic'.*wants .*length="),
    "eps": ({"eps": 0.0}, ValueError, "eps: got 0.0, wants a number between 0 and 1"),
    "bound": ({"bound": 0}, ValueError, "bound: got 0.0, wants a number above 0"),
    "bound_nan": ({"bound": np.nan}, ValueError, "bound: got nan, wants a finite number"),
    "bound_large": ({"bound": 100.0}, ropecy.BoundedEntryError, "bound: got 100, for which no degree certifies"),
    "eps_float32": ({"eps": 1e-8, "dtype": "f4"}, ropecy.BoundedEntryError, "float32: rounding alone is"),
    "scale": ({"scale": np.inf}, ValueError, "scale: got inf, wants a finite number"),
    "dtype": ({"dtype": np.int64}, TypeError, "dtype: got .*int64.*, wants float32"),
    "dtype_kind": ({"dtype": "nothing"}, TypeError, "dtype: got str 'nothing', wants a dtype"),
    "window": ({"window": 0}, ValueError, "window: got 0, wants an integer of at least 1"),
    "on_break": ({"on_break": "ignore"}, ValueError, "on_break: got str 'ignore', wants one of 'raise', 'exact'"),
    "memory": ({"d": 128, "eps": 1e-6}, MemoryError, r"the state needs .* GiB .* are available"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(name):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        ropecy.DecodeState(**{"d": 6, "d_v": 5, **options})


def test_refused_tokens(rng):
    Q, K, V = text(rng, 10, lead=(2,))
    q, k, v = Q[:, 0], K[:, 0], V[:, 0]
    state = ropecy.DecodeState(6, 5)
    with pytest.raises(ValueError, match="attend: got a state without tokens, wants extend or step first"):
        state.attend(q)
    with pytest.raises(ValueError, match="K, V: got 10 keys and 9 values"):
        state.extend(K, V[:, :9])
    with pytest.raises(ValueError, match=r"K, V: got leading axes \(2,\) and \(3,\), wants axes that broadcast"):
        state.extend(K, np.zeros((3, 10, 5)))
    with pytest.raises(ValueError, match=r"K, V: got leading axes \(0,\), wants at least one"):
        state.extend(K[:0], V[:0])
    with pytest.raises(TypeError, match="V: got dtype float32, wants float64 as the keys have"):
        state.extend(K, V.astype(np.float32))
    with pytest.raises(TypeError, match="K: got dtype int64"):
        state.extend(np.zeros((3, 6), np.int64), V)
    with pytest.raises(ValueError, match=r"V: got NaN at index \(1, 2, 3\)"):
        spoilt = V.copy()
        spoilt[1, 2, 3] = np.nan
        state.extend(K, spoilt)
    assert (state.length, state.nbytes) == (0, 0)
    state.extend(K, V)
    with pytest.raises(ValueError, match=r"k: got rows of width 5 \(shape \(2, 5\)\), wants 6"):
        state.step(q, v, v)
    with pytest.raises(ValueError, match=r"k, v: got leading axes \(3,\), wants \(2,\) as the state has"):
        state.step(q, np.zeros((3, 6)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"q: got leading axes \(3,\), wants \(2,\), or a multiple of its 2 heads"):
        state.step(np.zeros((3, 6)), k, v)
    with pytest.raises(ValueError, match="q: got Inf at index"):
        state.attend(np.full((2, 6), np.inf))
    with pytest.raises(TypeError, match="q: got dtype float32, wants float64 as the keys have"):
        state.attend(q.astype(np.float32))
    assert state.length == 10
