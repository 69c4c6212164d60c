"""A call of a `DecodeState` that is interrupted anywhere has changed the state wholly or not at all."""

import sys

import numpy as np
import pytest

import ropecy

D = 3


class Interrupt:
    """Raises KeyboardInterrupt before the instruction of the interpreter that is `after` many into a call.

    Instructions are counted in what holds and changes a state: `ropecy.decode` and `ropecy.decoding`, but for the lock,
    which CPython itself gives back.
    """

    def __init__(self, after):
        self.after, self.seen = after, 0

    def __enter__(self):
        self.before = sys.gettrace()
        # CPython 3.12 reports instructions only where some frame has asked for them before tracing begins.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("ropecy.decod") or frame.f_code.co_name == "guarded":
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.seen += 1
            if self.seen == self.after:
                raise KeyboardInterrupt
        return self.trace


def tokens(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (3, 2, n, D)).astype(np.float32)


def step(state):
    Q, K, V = tokens(1, seed=1)
    state.step(Q[:, 0], K[:, 0], V[:, 0])


def step_past_the_bound(state):
    Q, K, V = tokens(1, seed=1)
    state.step(Q[:, 0], 9 * K[:, 0], V[:, 0])


def extend(state):
    state.extend(*tokens(150, seed=1)[1:])


def ask_past_the_bound(state):
    state.attend(9 * tokens(1)[0][:, 0])


# Tokens that are there before, options, the call, and that of its instructions every how manieth is tried.
CASES = {
    "the first token": (0, {}, step, 3),
    "the first tokens": (0, {"window": 5}, extend, 7),
    "a token": (10, {}, step, 1),
    "a token with a decay": (80, {"bias": ropecy.RelativeBias.alibi([0.1, 0.3])}, step, 1),
    "a token for which others leave the ring": (69, {"window": 5}, step, 1),
    "a token for which others decay": (64, {"bias": ropecy.RelativeBias.alibi(0.1)}, step, 2),
    "a token of a near field": (10, {"near": (5, 30.0)}, step, 2),
    "tokens": (70, {}, extend, 5),
    "a token beside a history": (10, {"on_break": "exact"}, step, 1),
    "tokens beside a history": (10, {"on_break": "exact"}, extend, 5),
    "a key past the bound": (10, {"on_break": "exact"}, step_past_the_bound, 2),
    "a query past the bound": (10, {"on_break": "exact"}, ask_past_the_bound, 2),
}


def says(state):
    """All that a state tells from now on: bytes, certificate, and what queries and later tokens give."""
    Q, K, V = tokens(70, seed=2)
    told = [state.length, state.nbytes, str(state.certificate)]
    if state.length:
        told.append(state.attend(Q[:, 0]).tobytes())
    told.append(state.copy().step(Q[:, 0], K[:, 0], V[:, 0]).tobytes())
    state.extend(K, V)
    return [*told, state.attend(Q[:, 1]).tobytes()]


@pytest.mark.parametrize("name", CASES)
def test_interrupted_anywhere(name):
    n, options, call, every = CASES[name]
    state = ropecy.DecodeState(D, D, ropecy.Rotary(D, rotary_dim=2), bound=2.0, eps=1e-2, **options)
    if n:
        # The last by a step, which leaves a full ring full.
        Q, K, V = tokens(n)
        state.extend(K[:, :-1], V[:, :-1])
        state.step(Q[:, -1], K[:, -1], V[:, -1])
    done = state.copy()
    call(done)
    before, after = says(state.copy()), says(done)
    assert before != after
    found, at = [], 1
    while True:
        tried = state.copy()
        try:
            with Interrupt(at):
                call(tried)
            break  # the call has fewer instructions
        except KeyboardInterrupt:
            found.append(says(tried))
        at += every
    assert all(one in (before, after) for one in found)
    assert before in found and at > 50
