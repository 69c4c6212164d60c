"""Files of a DecodeState: whole or not at all, of earlier versions, to file objects, and of anybody's making."""

import contextlib
import io
import json
import os
import pickle
import zipfile

import cases
import numpy as np
import pytest
from decode_files import content, joined, of_version_3, parts

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def make(lead=(2,), dtype=np.float32, n=150, slopes=None, window=5, lengths=None, **options):
    """A state of d = 4, d_v = 3 after n tokens, or of streams of some of them, and a query."""
    rng = np.random.default_rng(1)
    K = cases.unit_rows(rng.standard_normal((*lead, n, 4))).astype(dtype)
    V = (3 + rng.standard_normal((*lead, n, 3))).astype(dtype)
    if options.get("on_break") == "long key":
        K[..., 3, :] *= 5
        options["on_break"] = "exact"
    bias = None if slopes is None else ropecy.RelativeBias.alibi(slopes)
    state = ropecy.DecodeState(4, 3, ropecy.Rotary(4), window=window, bias=bias, **options)
    if n:
        state.extend(K, V, lengths=lengths)
    q = K[..., 1, :] if n else None
    return state, q if np.ndim(slopes) == 0 else np.repeat(q, 2, axis=-2)


STATES = {
    "plain": {},
    "no_tokens": {"n": 0},
    "no_window": {"window": None, "lead": ()},
    "near": {"window": None, "near": (5, 3.0)},
    "float64": {"dtype": np.float64, "window": 90},
    "decays": {"slopes": [0.5, 0.25, 0.0, 1e-3]},
    "history": {"on_break": "exact"},
    "long_key": {"on_break": "long key"},
    "streams": {"lead": (3, 2), "lengths": [150, 0, 40]},
    "streams_with_history": {"lead": (3, 2), "lengths": [150, 3, 40], "on_break": "long key"},
}


def load(data):
    return ropecy.DecodeState.load(io.BytesIO(data))


# ---- writing ----


@pytest.mark.parametrize("name", STATES)
def test_file_objects_and_pickles(name, tmp_path):
    state, q = make(**STATES[name])
    with open(tmp_path / "state", "wb") as file:
        state.save(file)
    with open(tmp_path / "state", "rb") as file:
        others = [load(content(state)), ropecy.DecodeState.load(file), pickle.loads(pickle.dumps(state))]
    for other in others:
        assert (repr(other), other.certificate) == (repr(state), state.certificate)
    for other in others:
        if q is not None:
            active = state.lengths > 0
            np.testing.assert_array_equal(other.attend(q, active=active), state.attend(q, active=active))


@pytest.mark.parametrize("how", ["disk", "interrupt", "rename"])
def test_save_leaves_the_old_file_where_it_fails(how, tmp_path, monkeypatch):
    state, q = make()
    path = tmp_path / "state"
    state.save(path)
    before = state.attend(q)
    error = KeyboardInterrupt if how == "interrupt" else OSError

    def fail(*_, **__):
        raise error(28, "No space left on device")

    state.extend(*(np.zeros((2, 70, width), np.float32) for width in (4, 3)))
    with monkeypatch.context() as patch:
        where = {"disk": "os.fsync", "interrupt": "numpy.lib.format.write_array", "rename": "os.replace"}[how]
        patch.setattr(where, fail)
        with pytest.raises(error):
            state.save(path)
    assert os.listdir(tmp_path) == ["state"]
    np.testing.assert_array_equal(ropecy.DecodeState.load(path).attend(q), before)


def test_save_keeps_links_and_permissions(tmp_path):
    state, _ = make()
    path, link = tmp_path / "state", tmp_path / "link"
    state.save(path)
    path.chmod(0o640)
    link.symlink_to(path)
    state.extend(*(np.zeros((2, 70, width), np.float32) for width in (4, 3)))
    state.save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert ropecy.DecodeState.load(path).length == 220
    with pytest.raises(FileNotFoundError):
        state.save(tmp_path / "missing" / "state")


# ---- earlier versions ----


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("slopes", [None, [0.5, 0.25, 0.0, 1e-3]])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lead", [(2,), (3, 2)])
def test_files_of_earlier_versions(lead, window, slopes, version):
    if version == 1 and slopes is not None:
        pytest.skip("version 1 knew no bias")
    # So many tokens that the ring holds no more than the window, as it did.
    state, q = make(lead, n=128 + (window or 0), window=window, slopes=slopes, eps=1e-6)
    header, arrays = parts(of_version_3(content(state)))
    del header["folded"], header["asked"]
    if version == 1:
        del header["slopes"]
    phase = np.tile(state._streams.sums.frame(128)[1].reshape(-1), lead[0] if len(lead) > 1 else 1)
    old = {"state": arrays["state"] / np.exp(phase).reshape(-1, 1, 1), "centre": arrays["first"]}
    # Token t was in slot t modulo the window.
    ring = np.concatenate([arrays["ring"], np.ones_like(arrays["ring"][:, :1])], axis=1)
    shift = 128 % window if window else 0
    old |= {"ring_keys": np.roll(arrays["ring_keys"], shift, axis=-1), "ring": np.roll(ring, shift, axis=-1)}
    loaded = load(joined(header | {"version": version}, old))
    np.testing.assert_allclose(loaded.attend(q), state.attend(q), rtol=0, atol=1e-6)
    assert 0 < loaded.certificate.rounding < 3 * state.certificate.rounding
    k, v = q[..., : lead[-1], :], np.ones((*lead, 3), q.dtype)
    for _ in range(100):
        o, expected = loaded.step(q, k, v), state.step(q, k, v)
    # Not the same tokens have left the ring.
    np.testing.assert_allclose(o, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(load(content(loaded)).attend(q), loaded.attend(q))


@pytest.mark.parametrize("name", ["plain", "float64", "decays", "history", "long_key"])
@pytest.mark.parametrize("lead", [(2,), (3, 2)])
def test_files_of_version_3(lead, name):
    state, q = make(lead, **STATES[name])
    loaded = load(of_version_3(content(state)))
    assert (repr(loaded), loaded.certificate) == (repr(state), state.certificate)
    k, v = q[..., : lead[-1], :], np.ones((*lead, 3), q.dtype)
    for _ in range(70):
        np.testing.assert_array_equal(loaded.step(q, k, v), state.step(q, k, v))


# ---- files of anybody's making ----

HEADERS = {
    "lengths": ([-5], [1.5], [2**63 - 1], [True], None, ["5"], [149], [], 150, [150, 150]),
    "folded": ([-1], [151], [10**30], [0], [0.5], 128),
    "exact": ([True], [0], None, [False, False], False),
    "asked": ([-1.0], [None], 0.0),
    "degree": (0, 41, 4.0, None, -1),
    "largest": ([-1.0], [float("nan")], [float("inf")], ["x"], [1.0, 1.0]),
    "lead": ([0], [2, 2], [-2], [10**18], "ab", [1.5], [[2]], [2] * 40),
    "dtype": ("int64", "nothing", None, 3),
    "version": (0, 6, "5", None, 2),
    "slopes": ("a", [[1.0]], [0.5] * 3, [-1.0], -1.0, {}, float("nan")),
    "R": ([], {}, 3, {"base": 0}),
    "options": ([], {}, None),
}
OPTIONS = {
    "d": (0, 5, 2.0, 10**18, -1, True),
    "d_v": (0, 4, 10**18, None),
    "eps": (0, 2.0, "x", float("nan"), 1e-300),
    "bound": (0, 1e9, None, 1e-9),
    "scale": (float("inf"), "1"),
    "window": (0, 10**18, 1.5, 80),
    "near": (3, [1], [0, 1.0], [5, None], [5, float("nan")], {}),
    "on_break": ("ignore", None, "exact"),
}


def assert_refused(data, errors=(ValueError, MemoryError)):
    with pytest.raises(errors) as caught:
        load(data)
    if isinstance(caught.value, ValueError):
        assert str(caught.value).startswith("path: got <_io.BytesIO")
    return str(caught.value)


def test_headers_that_do_not_fit():
    header, arrays = parts(content(make()[0]))
    for name, values in HEADERS.items():
        for value in values:
            assert_refused(joined(header | {name: value}, arrays))
    for name, values in OPTIONS.items():
        for value in values:
            assert_refused(joined(header | {"options": header["options"] | {name: value}}, arrays))
    for text in ("[" * 100_000, "", "[]", "null", "{}", "\ud800"):
        assert_refused(joined(text, arrays))


@pytest.mark.parametrize("name", ["plain", "decays", "history", "long_key"])
def test_arrays_that_do_not_fit(name):
    header, arrays = parts(content(make(**STATES[name])[0]))
    for each, array in arrays.items():
        wrong = {
            "missing": None,
            "dtype": array.astype(np.float16),
            "integers": array.astype(np.int64),
            "short": array[..., :-1],
            "flat": array.ravel(),
            "nan": np.where(np.arange(array.size).reshape(array.shape) == array.size - 1, np.nan, array),
            "objects": np.array([None]),
        }
        if not array.size:
            del wrong["nan"], wrong["short"]
        elif each != "most":
            wrong["huge"] = array + np.array(1e30, array.dtype)
        for value in wrong.values():
            others = {key: value if key == each else kept for key, kept in arrays.items()}
            message = assert_refused(joined(header, {k: v for k, v in others.items() if v is not None}))
            assert each in message or "sums" in message or "value" in message
    assert_refused(joined(header, arrays | {"extra": np.zeros(3)}))


def test_claims_of_more_than_there_is():
    header, arrays = parts(content(make()[0]))
    # Of more memory than any machine has, agreeing with itself.
    options = header["options"]
    large = header | {"lead": [10**9], "options": options}
    assert_refused(joined(large, arrays), MemoryError)
    assert_refused(joined(header | {"options": options | {"window": 10**14}}, arrays), MemoryError)
    empty = header | {"lead": None, "lengths": 0, "folded": 0, "exact": False, "largest": 0.0, "asked": 0.0, "R": None}
    assert_refused(joined(empty | {"options": options | {"d": 10**12}}, {}), MemoryError)
    history, kept = parts(content(make(**STATES["history"])[0]))
    assert_refused(joined(history | {"lengths": [2**50]}, kept), MemoryError)
    old, kept = parts(of_version_3(content(make()[0])))
    assert_refused(joined(old | {"lead": [10**12, 2]}, kept), MemoryError)
    # npy headers that claim more than the file has.
    data = content(make()[0])
    shape = str(arrays["state"].shape).encode()
    for claim in (shape.replace(b"2, ", b"9, "), shape[:-1] + b"0" * 9 + b")"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        at = entries["state.npy"].index(shape)
        end = entries["state.npy"].index(b"\n")
        line = entries["state.npy"][at:end].replace(shape, claim)[: end - at]
        entries["state.npy"] = entries["state.npy"][:at] + line + entries["state.npy"][end:]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, entry in entries.items():
                archive.writestr(name, entry)
        assert_refused(file.getvalue(), ValueError)
    file = io.BytesIO()
    np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)
    assert "compressed" in assert_refused(file.getvalue(), ValueError)


def mutated(data, rng):
    """A file with bytes changed, cut or moved, or with numbers of its header or its arrays changed."""
    how = rng.integers(6)
    if how == 0:
        spoilt = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            spoilt[rng.integers(len(data))] ^= 1 << rng.integers(8)
        return bytes(spoilt)
    if how == 1:
        start, stop = sorted(rng.integers(0, len(data) + 1, 2))
        return data[:start] + data[stop:] if rng.integers(2) else data[:stop]
    if how == 2:  # the directory at the end, and the headers of entries
        spoilt = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            spoilt[-rng.integers(1, 900)] = rng.integers(256)
        return bytes(spoilt)
    header, arrays = parts(data)
    if how == 3:
        within = header if rng.integers(2) else header["options"]
        values = (0, 1, 2, -1, 7, 150, 2**40, 1e-3, 1e300, None, "float32", [2], [1, 2], {}, True, "exact")
        within[str(rng.choice(sorted(within)))] = values[rng.integers(len(values))]
    elif how == 4 and arrays:
        name = str(rng.choice(sorted(arrays)))
        array = arrays[name].copy()
        if array.size:
            array.flat[rng.integers(array.size)] = rng.choice([0.0, -1.0, 1e-3, 1e5, 1e30, np.inf, np.nan])
        arrays[name] = array
    elif arrays:
        name = str(rng.choice(sorted(arrays)))
        array = arrays.pop(name)
        if rng.integers(2):
            arrays[str(rng.choice([name, *sorted(arrays)]))] = array[..., : rng.integers(array.shape[-1] + 1)]
    return joined(header, arrays)


def test_mutated_files(monkeypatch):
    """None but ValueError or MemoryError; what is loaded can be worked with."""
    files = [content(make(**options)[0]) for options in STATES.values()]
    loaded = 0
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        data = mutated(files[seed % len(files)], rng)
        try:
            state = load(data)
        except (ValueError, MemoryError):
            continue
        loaded += 1
        if state._streams is None:
            continue
        lead, dtype = state._streams.lead, state._dtype
        heads = state._options.bias.heads if state._options.bias is not None else None
        q_lead = lead[:-1] + (heads,) if heads and heads > 1 else lead
        q, k, v = (np.full((*axes, width), 0.1, dtype) for axes, width in ((q_lead, 4), (lead, 4), (lead, 3)))
        with np.errstate(all="ignore"), contextlib.suppress(ropecy.BoundedEntryError):
            state.attend(q, active=state.lengths > 0)
            for _ in range(5):
                state.step(q, k, v)
            state.extend(np.repeat(k[..., None, :], 70, -2), np.repeat(v[..., None, :], 70, -2))
        assert state.certificate.error >= 0
    assert 50 < loaded < 1000
