"""Few queries over many keys, read where they lie and as they are stored, against dense attention in float64."""

import ml_dtypes
import numpy as np
import oracle
import pytest

import ropecy
from ropecy.engines.exact import few_queries
from ropecy.machine import memory
from ropecy.problem.call import check_forms

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]


def takes_this_path(Q, K, V, **options):
    arguments, request = check_forms(Q, K, V, **options)
    return few_queries.serves(arguments, request) and few_queries.forward(arguments, request, False) is not None


def compare(Q, K, V, **options):
    """That O and lse are as exact as in float32, rounded once where they are stored in less."""
    assert takes_this_path(Q, K, V, **options)
    O, lse = ropecy.attention(Q, K, V, **options, return_lse=True)
    own, finer = (np.float64, np.longdouble) if Q.dtype == np.float64 else (np.float32, np.float64)
    plain, dense = (oracle.attention(Q, K, V, **options, dtype=dtype) for dtype in (own, finer))
    assert O.dtype == Q.dtype and O.shape == dense.O.shape
    spread = float(np.abs(V.astype(np.float64)).max())
    unit = float(np.finfo(plain.O.dtype).eps)
    allowed = max(2 * float(np.abs(plain.O - dense.O).max()), 4 * unit * spread)
    if Q.dtype.itemsize == 2:
        # Half of the distance to the next number, of entries that are smaller than any normal one that of the least.
        finfo = ml_dtypes.finfo(Q.dtype)
        size = np.maximum(np.abs(dense.O), float(finfo.smallest_normal))
        allowed = allowed + 0.5 * float(finfo.eps) * size * (1 + 1e-3)
    assert (np.abs(O.astype(np.float64) - dense.O) <= allowed).all()
    seen = np.isfinite(dense.lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    largest = float(np.abs(dense.lse[seen]).max(initial=1))
    np.testing.assert_allclose(lse[seen], dense.lse[seen], atol=max(1e-13, 60 * unit * largest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "d, d_v", [(1, 1), (3, 5), (7, 16), (8, 8), (16, 40), (33, 65), (64, 64), (72, 80), (128, 128)]
)
@pytest.mark.parametrize("n_k", [1, 2, 63, 65, 700])
def test_widths_and_lengths(n_k, d, d_v, dtype, rng):
    Q, K, V = (rng.standard_normal((2, rows, width)).astype(dtype) for rows, width in ((1, d), (n_k, d), (n_k, d_v)))
    compare(Q, K, V, scale=d**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, heads, key_heads", [(1, 4, 1), (1, 6, 2), (1, 10, 2), (2, 3, 3), (3, 6, 1), (8, 8, 2), (5, 6, 6)]
)
def test_groups_of_queries(n, heads, key_heads, dtype, rng):
    Q = rng.standard_normal((2, heads, n, 20)).astype(dtype)
    K, V = rng.standard_normal((2, 2, key_heads, 600, 20)).astype(dtype)
    compare(Q, K, V, causal=True, q_offset=600 - n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        {"causal": True},
        {"causal": True, "q_offset": 40},
        {"causal": True, "q_offset": -2},
        {"window": 30, "q_offset": 640},
        {"window": (3, 70), "q_offset": 60},
        {"window": 5, "q_offset": 10_000},
        {"causal": True, "q_offset": 2**61},
    ],
    ids=str,
)
def test_bands(mask, dtype, rng):
    Q = rng.standard_normal((2, 3, 9)).astype(dtype)
    K, V = rng.standard_normal((2, 2, 700, 9)).astype(dtype)
    compare(Q, K, V, **mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(700,), (2, 1, 700), (1, 6, 700), (2, 6, 700)])
def test_hidden_keys_are_not_read(shape, dtype, rng):
    Q = rng.standard_normal((2, 6, 2, 12)).astype(dtype)
    K, V = rng.standard_normal((2, 2, 3, 700, 12)).astype(dtype)
    key_mask = rng.random(shape) < 0.3
    key_mask[..., :130] = False
    # Hidden from every query head of every batch element that shares them.
    kept = np.broadcast_to(key_mask, (2, 6, 700)).reshape(2, 3, 2, 700).any(axis=2)
    K[~kept] = np.nan
    V[~kept] = np.inf
    compare(Q, K, V, key_mask=key_mask)
    nothing = np.zeros(700, bool)
    O, lse = ropecy.attention(Q, K, V, key_mask=nothing, return_lse=True)
    assert not O.any() and np.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, rng):
    Q = rng.standard_normal((2, 1, 4, 24)).astype(dtype).swapaxes(1, 2)
    tokens_first = rng.standard_normal((2, 2, 300, 2, 24)).astype(dtype).swapaxes(2, 3)
    K, V = tokens_first
    expected = ropecy.attention(Q.copy(), K.copy(), V.copy())
    compare(Q, K, V)
    other = {
        "transposed": np.ascontiguousarray(K.swapaxes(-1, -2)).swapaxes(-1, -2),
        "reversed": np.ascontiguousarray(K[..., ::-1, :])[..., ::-1, :],
        "backwards": np.ascontiguousarray(K[..., ::-1])[..., ::-1],
        "every other": np.repeat(K, 2, axis=-1)[..., ::2],
        "a room": np.concatenate([K, np.full_like(K, np.nan)], axis=-2)[..., :300, :],
        "fortran": np.asfortranarray(K),
    }
    for name, keys in other.items():
        np.testing.assert_array_equal(ropecy.attention(Q, keys, V), expected, err_msg=name)
    shared = np.broadcast_to(K[:1, :1], K.shape)
    np.testing.assert_array_equal(ropecy.attention(Q, shared, V), ropecy.attention(Q, shared.copy(), V))
    before = K.copy()
    for X in (Q, K, V):
        X.flags.writeable = False
    np.testing.assert_array_equal(ropecy.attention(Q, K, V), expected)
    np.testing.assert_array_equal(K, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Q", "K", "V"])
@pytest.mark.parametrize("value, said", [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "-Inf")])
@pytest.mark.parametrize("place", [(0, 1, 0), (1, 0, 4), (1, 650, 10)])
def test_what_is_not_finite_is_named(place, value, said, name, dtype, rng):
    given = {"Q": rng.standard_normal((2, 2, 11)).astype(dtype)}
    given |= {name: rng.standard_normal((2, 700, 11)).astype(dtype) for name in "KV"}
    place = (place[0], min(place[1], given[name].shape[1] - 1), place[2])
    given[name][place] = value
    # Whether or not the mask lets a query see it, and where its weight would be 0.
    for mask in ({}, {"window": 2, "q_offset": 300}, {"scale": 0.0}, {"scale": 1e4}):
        with pytest.raises(ValueError, match=rf"^{name}: got {said} at index \({place[0]}, {place[1]}, {place[2]}\)"):
            ropecy.attention(**given, **mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_number_is_read_as_it_is(dtype, rng):
    # One key a query: O is the value itself, whatever its bits.
    if dtype.itemsize == 2:
        bits = np.arange(2**16, dtype=np.uint16).view(dtype)
        V = bits[np.isfinite(bits.astype(np.float32))]
    else:
        V = np.ldexp(rng.standard_normal(4096), rng.integers(-120, 120, 4096)).astype(dtype)
    V = V[: len(V) // 16 * 16].reshape(-1, 1, 1, 16)
    Q, K = np.zeros((2, *V.shape), dtype)
    np.testing.assert_array_equal(ropecy.attention(Q, K, V), V)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_past_the_largest_number(dtype, rng):
    # They are not finite here, and the exact engine takes them as it takes those of many queries.
    size = np.sqrt(np.finfo(dtype).max) * 4
    Q, K = (rng.choice([-1.0, 1.0], (rows, 4)).astype(dtype) * dtype(size) for rows in (1, 50))
    V = rng.standard_normal((50, 4)).astype(dtype)
    assert not takes_this_path(Q, K, V, scale=1.0)
    O = ropecy.attention(Q, K, V, scale=1.0)
    best = (np.sign(K) * np.sign(Q)).sum(axis=1) == (np.sign(K) * np.sign(Q)).sum(axis=1).max()
    np.testing.assert_allclose(O[0], V[best].mean(axis=0, dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_no_thread_count_and_no_certificate(dtype, rng):
    Q = rng.standard_normal((2, 4, 1, 32)).astype(dtype)
    K, V = rng.standard_normal((2, 2, 2, 5000, 32)).astype(dtype)
    one, lse = ropecy.attention(Q, K, V, threads=1, return_lse=True)
    for threads in (2, 3, 7):
        again, certificate, again_lse = ropecy.attention(
            Q, K, V, threads=threads, return_certificate=True, return_lse=True
        )
        np.testing.assert_array_equal(again, one)
        np.testing.assert_array_equal(again_lse, lse)
    assert certificate.engine == "exact" and certificate.truncation == 0 < certificate.rounding
    assert certificate.rows_truncation.shape == lse.shape
    np.testing.assert_array_equal(ropecy.attention(Q, K, V), one)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_k", [96, 3000, 100_000])
def test_sums_of_equal_terms_are_covered(n_k, dtype, rng):
    for size in (1.0, 40.0):
        Q, K, V = (np.ones((rows, width)) for rows, width in ((1, 2), (n_k, 2), (n_k, 8)))
        Q, K, V = (X.astype(dtype) for X in (Q, K * rng.uniform(0.5, 1) * size, V * rng.uniform(1, 2, 8)))
        O, certificate = ropecy.attention(Q, K, V, scale=1.0, return_certificate=True)
        assert float(np.abs(O - V[:1]).max()) / float(V.max()) <= certificate.rounding


def test_auto_says_where_float32_does_not_hold_eps(rng):
    Q, K, V = (rng.uniform(-1, 1, (rows, 6)).astype("f4") for rows in (1, 80, 80))
    for queries in (Q, np.repeat(Q, 40, axis=0)):
        with pytest.warns(ropecy.AccuracyWarning, match="no engine certifies eps = 1e-09"):
            ropecy.attention(queries, K, V, eps=1e-9)
    assert takes_this_path(Q, K, V, eps=1e-9, method="exact") and takes_this_path(Q, K, V, eps=1e-5)


def test_what_more_is_asked_goes_to_the_engines(rng):
    Q, K, V = (rng.uniform(-1, 1, (rows, 6)) for rows in (1, 80, 80))
    for options in (
        {"R": ropecy.Rotary(6)},
        {"bias": ropecy.RelativeBias.alibi(0.1)},
        {"near": (3, 2.0)},
        {"W": np.eye(6)},
        {"method": "polynomial"},
        {"method": "fft"},
        {"degree": 3},
    ):
        assert not takes_this_path(Q, K, V, **options)
        options.setdefault("eps", 0.01)
        assert np.isfinite(ropecy.attention(Q, K, V, **options)).all()
    assert not takes_this_path(rng.uniform(-1, 1, (9, 6)), K, V)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("name, offset", [("V", 256), ("K", 4096)])
def test_what_is_far_from_0_is_computed_in_its_normal_form(name, offset, dtype, rng):
    # Numbers that all of these types can hold.
    given = {"Q": rng.integers(4, 8, (1, 2, 9)), "K": rng.integers(-4, 5, (1, 600, 9))}
    given["V"] = rng.integers(0, 2, (1, 600, 9)) * 2
    near = {key: X.astype(dtype) for key, X in given.items()}
    assert takes_this_path(**near)
    given[name] = offset + given[name] * (32 if name == "K" else 1)
    far = {key: X.astype(dtype) for key, X in given.items()}
    assert not takes_this_path(**far)
    dense = oracle.attention(**far)
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    error = np.abs(ropecy.attention(**far).astype(np.float64) - dense.O)
    assert (error <= 1e-3 * dense.ranges(dense.v[..., None, :, :]).max() + unit * np.abs(dense.O)).all()


def test_a_scale_below_the_least_number_of_the_dtype(rng):
    Q, K = (3e30 * rng.standard_normal((n, 4)).astype("f4") for n in (40, 50))
    V = rng.standard_normal((50, 3)).astype("f4")
    expected = oracle.attention(Q, K, V, scale=1e-61).O
    np.testing.assert_allclose(ropecy.attention(Q[:1], K, V, scale=1e-61), expected[:1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ropecy.attention(Q, K, V, scale=1e-61), expected, rtol=0, atol=1e-5)


def test_halves_need_no_memory_for_copies_in_float32(monkeypatch, rng):
    Q, K, V = (rng.standard_normal((2, n, 16)).astype(np.float16) for n in (1, 500, 500))
    monkeypatch.setattr(memory, "fits", lambda size: size <= 2 * 16 * 4)
    compare(Q, K, V)
    with pytest.raises(MemoryError, match="what is copied of Q, K and V"):
        ropecy.attention(Q, K, V, method="polynomial")
    with pytest.raises(MemoryError, match=r"the result, of shape \(2, 2, 16\)"):
        ropecy.attention(np.repeat(Q, 2, axis=1), K, V)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_of_any_strides_and_shared_by_heads(dtype, rng):
    Q = rng.standard_normal((6, 2, 1, 20)).astype(dtype)
    K, V = rng.standard_normal((2, 3, 2, 100, 20)).astype(dtype)
    compare(Q[::2, :, :, ::-1], K, V)
    compare(Q[::2, :, :, :5], K[..., ::4], V)
    compare(Q[0], K, V)
    compare(Q[:3, :1], K, V)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_are_not_aligned_take_another_path(dtype, rng):
    Q, K, V = (rng.standard_normal((2, n, 8)).astype(dtype) for n in (1, 50, 50))
    raw = np.zeros(Q.nbytes + 1, np.uint8)
    odd = raw[1:].view(dtype).reshape(Q.shape)
    odd[...] = Q
    expected = oracle.attention(Q, K, V, dtype=np.float64).O
    assert not odd.flags.aligned
    np.testing.assert_allclose(ropecy.attention(odd, K, V).astype(np.float64), expected, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 16, 40])
@pytest.mark.parametrize("size, eps", [(5e3, 1e-3), (50.0, 1e-5)])
def test_auto_warns_where_keys_are_so_long_that_rounding_of_scores_may_pass_eps(size, eps, width, dtype, rng):
    # Scores are small, for queries and keys are nearly orthogonal; their products are not.
    rows = np.arange(width) % 2
    Q, K = rows * np.ones((2, 1, 1)), np.where(rows, 1e-4, rng.choice([-1.0, 1.0], (2, 900, width)))
    Q, K, V = (X.astype(dtype) for X in (Q, K * size, rng.uniform(-1, 1, (2, 900, 3))))
    options = {"scale": 1e9 if dtype == np.float64 else 1.0, "eps": eps}
    assert takes_this_path(Q, K, V, **options, method="exact")
    with pytest.warns(ropecy.AccuracyWarning):
        O, certificate = ropecy.attention(Q, K, V, **options, return_certificate=True)
    assert certificate.error - certificate.storing > options["eps"]
