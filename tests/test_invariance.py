"""What must not matter: threads, layout, batching, repetition, concurrency; and what must not be written to."""

from concurrent.futures import ThreadPoolExecutor

import cases
import numpy as np
import oracle
import pytest

import ropecy

METHODS = ["exact", "polynomial", "fft"]
SOME = ["rope_half", "long_causal", "key_mask", "grouped_queries", "projections", "prime_lengths", "one_token"]
FOR_METHOD = [(name, method) for name in SOME for method in METHODS]
FOR_METHOD += [(name, "exact") for name in ("window", "bias_table_per_head", "near_causal", "wide", "everything")]


def _results(case, dO, **options):
    """O, lse and every gradient of a call, by name."""
    O, lse = ropecy.attention(**case, **options, return_lse=True)
    from_vjp, vjp = ropecy.attention_vjp(**case, **options)
    g = vjp(dO)
    names = ["dQ", "dK", "dV", *("d" + name for name in ("W", "W_Q", "W_K", "W_V", "bias") if name in case)]
    return {"O": O, "O of vjp": from_vjp, "lse": lse, **{name: getattr(g, name) for name in names}}


def _assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def _case(name, rng, ours, dtype=np.float64):
    case = cases.make(name, rng, dtype, unit=True)
    return ours(case), cases.upstream(case, oracle.attention(**case), rng)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize(("name", "method"), FOR_METHOD)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thread_count_bitwise(name, method, dtype, threads, rng, ours):
    case, dO = _case(name, rng, ours, dtype)
    options = {"method": method, "eps": 1e-2}
    _assert_equal(_results(case, dO, **options, threads=threads), _results(case, dO, **options, threads=4))


@pytest.mark.parametrize("causal", [False, True])
def test_thread_count_bitwise_when_long(causal, method, rng):
    Q, K, V, dO = rng.standard_normal((4, 5003, 3)).astype(np.float32)
    case = {"Q": cases.unit_rows(Q), "K": cases.unit_rows(K), "V": V, "R": ropecy.Rotary(3, rotary_dim=2)}
    results = [_results(case, dO, causal=causal, method=method, threads=threads) for threads in (1, 2, 3)]
    _assert_equal(results[1], results[0])
    _assert_equal(results[2], results[0])


def test_repeated_calls_bitwise(method, rng, ours):
    for name in ("long_causal", "grouped_queries"):
        case, dO = _case(name, rng, ours, np.float32)
        first = _results(case, dO, method=method, eps=1e-2)
        for _ in range(3):
            _assert_equal(_results(case, dO, method=method, eps=1e-2), first)


def test_batch_is_a_loop(method, rng):
    Q, K, V, dO = rng.standard_normal((4, 2, 3, 41, 4))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    options = {"R": ropecy.Rotary(4), "causal": True, "method": method, "eps": 1e-6}
    whole = _results({"Q": Q, "K": K, "V": V}, dO, **options)
    for index in np.ndindex(2, 3):
        part = _results({"Q": Q[index], "K": K[index], "V": V[index]}, dO[index], **options)
        for name, value in part.items():
            # The polynomial may differ, since bounds are rounded up where there are several slots.
            tolerance = 1e-13 if method == "exact" else 2e-5
            np.testing.assert_allclose(whole[name][index], value, rtol=0, atol=tolerance, err_msg=name)


def test_grouped_queries_are_repeated_keys(method, rng):
    Q, K, V = rng.standard_normal((2, 6, 23, 4)), rng.standard_normal((2, 2, 23, 4)), rng.standard_normal((2, 2, 23, 4))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    options = {"method": method, "causal": True, "eps": 1e-6}
    grouped = ropecy.attention(Q, K, V, **options)
    repeated = ropecy.attention(Q, np.repeat(K, 3, axis=1), np.repeat(V, 3, axis=1), **options)
    np.testing.assert_allclose(grouped, repeated, atol=1e-12)


def _strided(X):
    between = np.nan if X.dtype.kind == "f" else 1
    wide = np.full(tuple(2 * size + 1 for size in X.shape), between, X.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in X.shape)]
    view[...] = X
    return view


def _reversed(X):
    flip = (slice(None, None, -1),) * X.ndim
    return X[flip].copy()[flip]


def _misaligned(X):
    buffer = np.empty(X.nbytes + 1, dtype=np.uint8)
    view = buffer[1:].view(X.dtype).reshape(X.shape)
    view[...] = X
    return view


def _read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


LAYOUTS = {
    "strided": _strided,
    "reversed": _reversed,
    "fortran": np.asfortranarray,
    "swapped": lambda X: np.swapaxes(np.swapaxes(X, -1, -2).copy(), -1, -2),
    "misaligned": _misaligned,
    "read_only": _read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "method"),
    [("causal", "exact"), ("causal", "polynomial"), ("grouped_queries", "polynomial"), ("everything", "exact")],
)
def test_memory_layout(name, method, layout, rng, ours):
    case, dO = _case(name, rng, ours)
    laid = {key: LAYOUTS[layout](value) if isinstance(value, np.ndarray) else value for key, value in case.items()}
    actual, expected = _results(laid, LAYOUTS[layout](dO), method=method), _results(case, dO, method=method)
    if name != "everything":
        _assert_equal(actual, expected)
    # Projections are NumPy's products, whose last bit depends on the layout.
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-12, atol=1e-13, err_msg=key)


def test_broadcast_views(method, rng):
    Q, K, V, dO = rng.standard_normal((4, 9, 4))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    many = {"Q": np.broadcast_to(Q, (3, 9, 4)), "K": np.broadcast_to(K, (3, 9, 4)), "V": np.broadcast_to(V, (3, 9, 4))}
    whole = _results(many, np.broadcast_to(dO, (3, 9, 4)), method=method)
    one = _results({"Q": Q, "K": K, "V": V}, dO, method=method)
    for name, value in one.items():
        for index in range(3):
            np.testing.assert_allclose(whole[name][index], value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["everything", "projections", "causal", "key_mask", "plain"])
def test_inputs_are_not_written_to(name, rng, ours):
    case = cases.make(name, rng, unit=True)
    E = dO = cases.upstream(case, oracle.attention(**case), rng)
    case = ours(case)
    before = {key: value.copy() for key, value in {**case, "E": E}.items() if isinstance(value, np.ndarray)}
    for method in ["exact"] if name == "everything" else METHODS:
        _results(case, dO, method=method)
        ropecy.loss_grad(**case, E=E, method=method)
        matrix = {key: value for key, value in case.items() if key not in ("V", "W_V")}
        ropecy.AttentionMatrix(**matrix, method=method).toarray()
    for key, value in before.items():
        np.testing.assert_array_equal(E if key == "E" else case[key], value)


def test_results_do_not_share_memory(method, rng):
    Q, K, V = rng.standard_normal((3, 12, 4)) / 2
    O, vjp = ropecy.attention_vjp(Q, K, V, method=method)
    g = vjp(O)
    kept = O.copy(), g.dQ.copy(), g.dK.copy(), g.dV.copy()
    h = vjp(2 * O)
    for array in (Q, K, V, h.dQ, h.dK, h.dV):
        for result in (O, g.dQ, g.dK, g.dV):
            assert not np.shares_memory(array, result)
    for result, value in zip((O, g.dQ, g.dK, g.dV), kept, strict=True):
        np.testing.assert_array_equal(result, value)


def _half_types():
    types = [np.dtype(np.float16)]
    try:
        import ml_dtypes
    except ImportError:
        return types
    return [*types, np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize("dtype", _half_types(), ids=str)
def test_half_precision_is_float32_rounded(dtype, method, rng):
    Q, K, V, dO = (X.astype(dtype) for X in rng.standard_normal((4, 33, 4)) / 2)
    R = ropecy.Rotary(4)
    options = {"causal": True, "method": method, "eps": 1e-2}
    half = _results({"Q": Q, "K": K, "V": V, "R": R}, dO, **options)
    wide = {"Q": Q.astype(np.float32), "K": K.astype(np.float32), "V": V.astype(np.float32), "R": R}
    single = _results(wide, dO.astype(np.float32), **options)
    for name, value in single.items():
        if name == "lse":
            np.testing.assert_array_equal(half[name], value)
            continue
        assert half[name].dtype == dtype
        np.testing.assert_array_equal(half[name].astype(np.float32), value.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("n", [1, 2, 3, 127, 251])
def test_any_length(n, method, rng):
    Q, K, V = rng.standard_normal((3, n, 4))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    for causal in (False, True):
        dense = oracle.attention(Q, K, V, causal=causal)
        O, vjp = ropecy.attention_vjp(Q, K, V, causal=causal, method=method, eps=1e-7)
        np.testing.assert_allclose(O, dense.O, atol=1e-12 if method == "exact" else 1e-6)
        g, expected = vjp(dense.O), dense.backward(dense.O)
        for name in ("dQ", "dK", "dV"):
            tolerance = 1e-12 if method == "exact" else 1e-5
            np.testing.assert_allclose(getattr(g, name), expected[name], atol=tolerance * (1 + np.abs(dense.O).max()))


@pytest.mark.parametrize("n", range(1, 70))
def test_every_short_length(n, method, rng):
    # Blocks, vectors and chunks end in every possible way.
    Q, K, V = rng.standard_normal((3, n, 3)).astype(np.float32)
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    for causal in (False, True):
        O = ropecy.attention(Q, K, V, causal=causal, method=method, eps=1e-3)
        dense = oracle.attention(Q, K, V, causal=causal)
        allowed = (1e-5 if method == "exact" else 1e-3) * dense.value_range + 1e-5
        assert np.all(np.abs(O - dense.O) <= allowed)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 128])
def test_any_width(d, rng):
    Q, K, V = rng.standard_normal((3, 37, d))
    for d_v in (1, d, d + 3):
        values = rng.standard_normal((37, d_v))
        dense = oracle.attention(Q, K, values)
        O, vjp = ropecy.attention_vjp(Q, K, values, method="exact")
        np.testing.assert_allclose(O, dense.O, atol=1e-12)
        g, expected = vjp(dense.O), dense.backward(dense.O)
        for name in ("dQ", "dK", "dV"):
            np.testing.assert_allclose(getattr(g, name), expected[name], atol=1e-11)


def test_many_python_threads_bitwise(rng, ours):
    names = ["causal", "rope_half", "grouped_queries", "key_mask", "long"]
    calls = [(*_case(name, rng, ours), method) for name in names for method in METHODS]

    def run(call):
        case, dO, method = call
        return _results(case, dO, method=method, threads=2)

    expected = [run(call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda _: [run(call) for call in calls], range(4)):
            for actual, value in zip(results, expected, strict=True):
                _assert_equal(actual, value)
