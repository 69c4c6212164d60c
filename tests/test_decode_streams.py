"""A DecodeState of many streams against a state for each of them: other lengths, resets, choices, and broken bounds."""

import time

import cases
import numpy as np
import oracle
import pytest

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

D, D_V, H = 6, 5, 2
KINDS = {
    "plain": {},
    "window": {"window": 7},
    "near": {"near": (9, 20.0)},
    "decays": {"bias": ropecy.RelativeBias.alibi([0.5, 0.25, 0.0, 2.0**-8])},
    "history": {"on_break": "exact"},
}


def text(rng, n, streams, dtype=np.float64):
    """Q, K, V of so many streams of two key heads and four query heads, within the bound of 1 at scale 1/d."""
    lead = streams if isinstance(streams, tuple) else (streams,)
    Q, K = (cases.unit_rows(rng.standard_normal((*lead, heads, n, D))) for heads in (2 * H, H))
    return Q.astype(dtype), K.astype(dtype), (3 + rng.standard_normal((*lead, H, n, D_V))).astype(dtype)


def make(**options):
    return ropecy.DecodeState(D, D_V, ropecy.Rotary(D), eps=1e-4, **options)


def exact(Q, K, V, **options):
    """The last row of causal attention, by the oracle."""
    options |= {"q_offset": K.shape[-2] - 1, "causal": True}
    return oracle.attention(Q[..., -1:, :], K, V, oracle.Rope(D), **options).O[..., 0, :]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_other_lengths_are_states_of_their_own(kind, rng):
    """Random rows of random streams: every result is, to the last bits, that of a state which has this stream alone."""
    streams, n = 5, 400
    Q, K, V = text(rng, n, streams)
    state, alone = make(**KINDS[kind]), [make(**KINDS[kind]) for _ in range(streams)]
    at = np.zeros(streams, int)

    def rows(X, count):
        """The next rows of each stream; where it takes fewer, what is not to be read."""
        found = np.full((streams, X.shape[1], count, X.shape[3]), np.nan)
        for i in range(streams):
            some = X[i, :, at[i] : at[i] + count]
            found[i, :, : some.shape[1]] = some
        return found

    for turn in range(90):
        if turn % 5 == 0:
            counts = rng.integers(0, 3, streams) * rng.integers(0, 40, streams)
            counts = np.minimum(counts, n - 20 - at).clip(0)
            state.extend(rows(K, 80), rows(V, 80), lengths=counts)
            for i, own in enumerate(counts):
                alone[i].extend(K[i, :, at[i] : at[i] + own], V[i, :, at[i] : at[i] + own])
            at += counts
        active = (rng.random(streams) < 0.7) & (at < n - 1)
        q, k, v = (rows(X, 1)[:, :, 0] for X in (Q, K, V))
        for X in (q, k, v):
            X[~active] = np.inf
        O = state.step(q, k, v, active=active)
        assert not O[~active].any()
        for i in np.flatnonzero(active):
            np.testing.assert_allclose(O[i], alone[i].step(q[i], k[i], v[i]), rtol=0, atol=1e-13)
        at += active
        assert state.lengths.tolist() == at.tolist() == [each.length for each in alone]
    some = at > 0
    O = state.attend(np.where(some[:, None, None], Q[:, :, 0], np.nan), active=some)
    for i in np.flatnonzero(some):
        np.testing.assert_allclose(O[i], alone[i].attend(Q[i, :, 0]), rtol=0, atol=1e-13)
        assert state.certificates[i] == alone[i].certificate


@pytest.mark.parametrize("kind", ["plain", "near", "decays"])
def test_256_streams_of_other_lengths_are_attention(kind, rng):
    lengths = rng.integers(1, 300, 256)
    Q, K, V = text(rng, 300, 256, np.float32)
    state = make(**KINDS[kind])
    state.extend(K[:, :, :-1], V[:, :, :-1], lengths=lengths - 1)
    last = np.arange(256), slice(None), lengths - 1
    O = state.step(Q[last], K[last], V[last])
    given = {"near": KINDS[kind]["near"]} if kind == "near" else {}
    if kind == "decays":
        given = {"bias": oracle.Alibi(np.array([0.5, 0.25, 0.0, 2.0**-8]))}
    for i in range(0, 256, 5):
        expected = exact(*(X[i, :, : lengths[i]] for X in (Q, K, V)), **given)
        spread = np.ptp(V[i, :, : lengths[i]], axis=1).max() or np.abs(V[i]).max()
        assert np.abs(O[i] - expected).max() <= state.certificates[i].error * spread
    assert state.certificate.error == max(each.error for each in state.certificates)


def test_a_stream_does_not_depend_on_others(rng):
    """Bitwise: what is written for one stream, and what is not read of one that is not active."""
    Q, K, V = text(rng, 200, 3)
    one, other = make(window=3), make(window=3)
    for state in (one, other):
        state.extend(K[:, :, :150], V[:, :, :150], lengths=[150, 80, 0])
    for i in range(150, 200):
        q, k, v = Q[:, :, i], K[:, :, i], V[:, :, i]
        same = one.step(q, k, v)[0]
        np.testing.assert_array_equal(other.step(q, k, v, active=[True, i % 3 == 0, False])[0], same)
    assert (one.lengths.tolist(), other.lengths.tolist()) == ([200, 130, 50], [200, 97, 0])


def test_length_of_streams_that_differ(rng):
    _, K, V = text(rng, 10, 3)
    state = make()
    assert (state.length, state.lengths.shape) == (0, ())
    state.extend(K, V)
    assert (state.length, state.lengths.tolist()) == (10, [10, 10, 10])
    state.extend(K, V, active=[False, True, False])
    with pytest.raises(ValueError, match="length: got streams of 10 to 20 tokens, wants `lengths`"):
        _ = state.length
    assert "10 to 20 tokens" in repr(state)
    state.lengths[0] = 99  # a copy
    assert state.lengths.tolist() == [10, 20, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind, rng):
    """A stream begins again with other tokens, as a new state; the others do not notice."""
    Q, K, V = text(rng, 300, 3)
    state, untouched, fresh = (make(**KINDS[kind]) for _ in range(3))
    for each in (state, untouched):
        each.extend(K[:, :, :150], V[:, :, :150])
    state.reset(1)
    assert state.lengths.tolist() == [150, 0, 150]
    with pytest.raises(ValueError, match="attend: got a stream without tokens"):
        state.attend(Q[:, :, 0])
    for i in range(150, 300):
        step = Q[:, :, i], 0.9 * K[:, :, i], 7 * V[:, :, i]
        O, same, new = state.step(*step), untouched.step(*step), fresh.step(*(X[1] for X in step))
        np.testing.assert_array_equal(O[[0, 2]], same[[0, 2]])
        np.testing.assert_allclose(O[1], new, rtol=0, atol=1e-12)
    state.reset()
    assert not state.lengths.any() and state.nbytes > 0
    state.reset([0, 0, -1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [[2, 0, 0, 1], slice(1, None), [True, False, True], [[0, 1], [2, 2]]], ids=str)
def test_select(chosen, kind, rng):
    Q, K, V = text(rng, 200, 3)
    state = make(**KINDS[kind])
    state.extend(K[:, :, :150], V[:, :, :150], lengths=[150, 100, 3])
    before, picked = state.attend(Q[:, :, 0]), state.select(chosen)
    np.testing.assert_array_equal(picked.lengths, np.array([150, 100, 3])[chosen])
    np.testing.assert_array_equal(picked.attend(Q[chosen][..., 0, :]), before[chosen])
    # Branches go their own ways, and the state that they come from goes none.
    twin = make(**KINDS[kind])
    twin.extend(K[:, :, :150], V[:, :, :150], lengths=[150, 100, 3])
    for i in range(150, 200):
        token = Q[..., i, :], K[..., i, :], V[..., i, :]
        O = picked.step(*(X[chosen] for X in token))
        np.testing.assert_array_equal(O, twin.step(*token)[chosen])
    np.testing.assert_array_equal(state.attend(Q[:, :, 0]), before)
    assert state.lengths.tolist() == [150, 100, 3]


def test_branches_of_one_text(rng):
    """From a text without an axis of streams; branches share its sums until they go on."""
    Q, K, V = text(rng, 200, ())
    state = make()
    state.extend(K, V)
    branches = state.select(None).select([0, 0, 0])
    assert branches.lengths.tolist() == [200] * 3
    sums = branches._streams.sums.sums
    assert sums[0] is sums[1] is state._streams.sums.sums[0]
    np.testing.assert_array_equal(branches.attend(Q[None, :, 0].repeat(3, 0)), state.attend(Q[:, 0])[None].repeat(3, 0))


def test_one_stream_past_the_bound_leaves_the_others(rng):
    Q, K, V = text(rng, 160, 3)
    K[1, :, 130] *= 20
    state, kept = make(), make(on_break="exact")
    with pytest.raises(ropecy.BoundedEntryError, match=r"K: got a row at index \(1, [01], 130\)"):
        state.extend(K, V)
    state.extend(K, V, active=[True, False, True])  # what is not read breaks nothing
    assert state.lengths.tolist() == [160, 0, 160]
    before = state.attend(Q[:, :, 0], active=[True, False, True])
    with pytest.raises(ropecy.BoundedEntryError, match=r"k: got a row at index \(1, [01]\)"):
        state.step(Q[:, :, 0], K[:, :, 130], V[:, :, 130])
    assert state.lengths.tolist() == [160, 0, 160]
    np.testing.assert_array_equal(state.attend(Q[:, :, 0], active=[True, False, True]), before)
    kept.extend(K[:, :, :120], V[:, :, :120])
    for i in range(120, 160):
        q = Q[:, :, i].copy()
        q[2] *= 5 if i == 140 else 1
        O = kept.step(q, K[:, :, i], V[:, :, i])
        engines = [each.engine for each in kept.certificates]
        assert engines == ["polynomial", "exact" if i >= 130 else "polynomial", "exact" if i == 140 else "polynomial"]
        for s in range(3):
            rows = np.concatenate([Q[s, :, :i], q[s][:, None]], axis=1)
            error = np.abs(O[s] - exact(rows, K[s, :, : i + 1], V[s, :, : i + 1])).max()
            assert error <= kept.certificates[s].error * np.ptp(V[s, :, : i + 1], axis=1).max()
    assert kept.certificate.error == max(each.error for each in kept.certificates)
    kept.reset(1)
    kept.step(Q[:, :, 0], K[:, :, 0], V[:, :, 0])
    assert kept.certificates[1].engine == "polynomial"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind, tmp_path, rng):
    Q, K, V = text(rng, 200, (2, 2), np.float32)
    state = make(**KINDS[kind])
    if kind == "history":
        K[0, 1, :, 20] *= 5
    state.extend(K[..., :150, :], V[..., :150, :], lengths=[[150, 30], [0, 70]])
    state.save(tmp_path / "state")
    others = [state.copy(), ropecy.DecodeState.load(tmp_path / "state")]
    expected = [state.step(*(X[..., i, :] for X in (Q, K, V))) for i in range(150, 200)]
    for other in others:
        assert other.lengths.tolist() == [[150, 30], [0, 70]]
        for i in range(150, 200):
            np.testing.assert_array_equal(other.step(*(X[..., i, :] for X in (Q, K, V))), expected[i - 150])
        assert (other.certificates == state.certificates).all()


def test_refusals(rng):
    Q, K, V = text(rng, 10, 3)
    state = make()
    with pytest.raises(ValueError, match="select: got a state without tokens"):
        state.select([0])
    refused = [
        ({"active": [1, 0, 1]}, TypeError, "active: got dtype int64, wants bool"),
        ({"active": [True, False]}, ValueError, r"active: got shape \(2,\), wants \(3,\), one for each stream"),
        ({"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths: got dtype float64, wants integers"),
        ({"lengths": [1, 11, 3]}, ValueError, "lengths: got 11, wants from 0 to 10, the rows that are given"),
        ({"lengths": [1, -1, 3]}, ValueError, "lengths: got -1, wants from 0 to 10"),
        ({"lengths": [1, 1, 1], "active": [True] * 3}, ValueError, "active, lengths: got both, wants one of the two"),
    ]
    for _ in range(2):
        lengths = state.lengths.tolist()
        for told, error, message in refused:
            with pytest.raises(error, match=message):
                state.extend(K, V, **told)
        assert state.lengths.tolist() == lengths
        state.extend(K, V)
    spoilt = V.copy()
    spoilt[1, 0, 3] = np.nan
    with pytest.raises(ValueError, match=r"V: got NaN at index \(1, 0, 3, 0\)"):
        state.extend(K, spoilt)
    for streams in (3, [0, 5], "one", [True, False], (0, 0), 1.5):
        for call in (state.select, state.reset):
            with pytest.raises(ValueError, match=r"streams: got .*, wants what indexes an array of the streams"):
                call(streams)
    with pytest.raises(ValueError, match="streams: got an index of no stream"):
        state.select([])
    with pytest.raises(ValueError, match=r"leading axes \(4, 2\), wants \(3, 2\) as the state has"):
        state.extend(K[[0, 1, 2, 2]], V[[0, 1, 2, 2]])
    assert state.lengths.tolist() == [20, 20, 20]


def test_a_batched_step_is_far_faster_than_its_streams_one_by_one(rng):
    """20 times on two quiet cores for 256 streams; here without a state that memory has to be read for."""
    Q, K, V = text(rng, 100, 256, np.float32)
    state, one = make(), make()
    state.extend(K, V, lengths=rng.integers(1, 100, 256))
    one.extend(K[0], V[0])

    def seconds(call, times):
        best = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            best.append(time.perf_counter() - start)
        return min(best)

    together = seconds(lambda: state.step(Q[:, :, 0], K[:, :, 0], V[:, :, 0]), 20)
    alone = seconds(lambda: one.step(Q[0, :, 0], K[0, :, 0], V[0, :, 0]), 200)
    assert together < 256 * alone / 4
