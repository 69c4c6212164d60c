"""Short calls do little beside their arithmetic: how many functions they call, and what they measure."""

import cProfile
import gc
import itertools
import pstats
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ropecy
from ropecy.attention import differentiable
from ropecy.certify import statistics
from ropecy.engines.exact import few_queries
from ropecy.kernels import _halves
from ropecy.planning import plain_calls
from ropecy.problem.call import check_forms


def count(function):
    """How many functions, of Python and of C, are called inside of a call of this one, as cProfile counts them."""
    function()  # what is kept from a first call
    # A collection of garbage that happens to come calls what others have registered with it.
    gc.disable()
    try:
        with cProfile.Profile() as profile:
            function()
    finally:
        gc.enable()
    return pstats.Stats(profile).total_calls


@pytest.fixture
def arrays():
    return np.random.default_rng(0).standard_normal((3, 8, 64, 64), dtype=np.float32)


def test_an_exact_call_makes_few_calls(arrays):
    assert count(lambda: ropecy.attention(*arrays, scale=0.125, method="exact", threads=2)) <= 75


def test_values_are_measured_where_a_certificate_is_asked_for(arrays, monkeypatch):
    measured = []

    def measure_values(problem, *others, own=statistics.measure_values):
        measured.append(problem)
        return own(problem, *others)

    monkeypatch.setattr(statistics, "measure_values", measure_values)
    O = ropecy.attention(*arrays, method="exact")
    assert not measured
    same, certificate = ropecy.attention(*arrays, method="exact", return_certificate=True)
    assert len(measured) == 1
    assert np.array_equal(O, same)
    assert certificate == ropecy.plan(*arrays, method="exact").certificate


DTYPES = st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
SIZES = st.sampled_from([1, 2, 3, 5, 8, 12, 15, 16, 17, 30, 47, 48, 50, 64, 95, 97, 130, 300])


def drawn(rng, draw, shared=False):
    """Q, K and V of any sizes, and options; K may be one head for all if `shared`."""
    heads, group, n, n_k = draw(st.sampled_from([1, 2, 8, 9])), draw(st.sampled_from([1, 3])), draw(SIZES), draw(SIZES)
    d, d_v, dtype = draw(SIZES), draw(SIZES), draw(DTYPES)
    of_keys = draw(st.sampled_from([1, heads])) if shared else heads
    sizes, offsets = st.sampled_from([0.1, 0.3, 1, 1, 4, 1e-30]), st.sampled_from([0, 0, 0, 0, 50])
    Q = (rng.standard_normal((heads * group, n, d)) * draw(sizes)).astype(dtype)
    K = (rng.standard_normal((of_keys, n_k, d)) * draw(sizes) + draw(offsets)).astype(dtype)
    V = (rng.standard_normal((heads, n_k, d_v)) * draw(sizes) + draw(offsets)).astype(dtype)
    options = {"causal": draw(st.booleans()), "window": draw(st.sampled_from([None, None, 3, (2, 7)]))}
    options |= {"q_offset": draw(st.integers(-4, 4)), "scale": draw(st.sampled_from([0.25, -1.0, 0.0]))}
    options |= {"method": draw(st.sampled_from(["auto", "exact"])), "threads": draw(st.integers(1, 3))}
    return Q, K, V, options


@settings(max_examples=150)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_short_call_has_the_bits_of_the_usual_way(data, seed, ways):
    """The kernel is told the same of scores, whether a plan was made or not, and says so where numbers are unusual."""
    rng, draw = np.random.default_rng(seed), data.draw
    Q, K, V, options = drawn(rng, draw)
    for short, usual in zip(*ways(lambda: ropecy.attention(Q, K, V, **options, return_lse=True)), strict=True):
        assert short.dtype == usual.dtype
        assert np.array_equal(short, usual)


@settings(max_examples=100)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_short_gradient_has_the_bits_of_the_usual_way(data, seed, ways):
    rng, draw = np.random.default_rng(seed), data.draw
    Q, K, V, options = drawn(rng, draw, shared=True)
    dO = rng.standard_normal((*Q.shape[:2], V.shape[2])) * draw(st.sampled_from([1, 1, 1, 1e-6, 1e4]))
    dO = dO.astype(Q.dtype)

    def computed():
        O, vjp = ropecy.attention_vjp(Q, K, V, **options)
        g = vjp(dO)
        return [O, g.dQ, g.dK, g.dV], [vjp.certificate, g.certificate]

    (short, of_short), (usual, of_usual) = ways(computed)
    for found, wanted in zip(short, usual, strict=True):
        assert found.dtype == Q.dtype
        assert np.array_equal(found, wanted)
    for found, wanted in zip(of_short, of_usual, strict=True):
        assert repr(found) == repr(wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_no_array_of_halves_is_widened_for_a_gradient(arrays, dtype, monkeypatch):
    Q, K, V = arrays.astype(dtype)
    wanted = ropecy.attention_vjp(Q, K, V, method="exact")[1](Q)
    monkeypatch.delattr(_halves, "widened")
    evaluation = differentiable(Q, K, V, None, {"method": "exact"})
    assert np.array_equal(evaluation.vjp(Q)["dK"], wanted.dK)


@pytest.fixture(scope="module")
def ways():
    """Computes something twice: as it is computed, and with every short call sent the usual way."""

    def both(function):
        with pytest.MonkeyPatch.context() as patch:
            # Few queries have a way of their own, which comes first.
            patch.setattr(few_queries, "serves", lambda *arguments: False)
            found = function()
            patch.setattr(plain_calls, "serves", lambda *arguments: False)
            return found, function()

    return both


def test_a_short_call_is_not_planned(arrays, monkeypatch):
    monkeypatch.delattr(sys.modules["ropecy.attention"], "Evaluation")
    for options in ({}, {"causal": True}, {"window": 9}, {"method": "exact", "scale": 0.125}):
        ropecy.attention(*arrays, **options)
    for heads, n, d in itertools.product((1, 9), (17, 130, 300), (1, 20, 64)):
        for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
            Q, K, V = np.random.default_rng(n).standard_normal((3, heads, n, d)).astype(dtype)
            ropecy.attention(Q, K, V, method="exact", causal=True)
    with pytest.raises(NameError):
        ropecy.attention(*arrays, key_mask=np.arange(64) > 3)


@pytest.mark.parametrize("name, place", [("Q", 0), ("K", 1), ("V", 2)])
@pytest.mark.parametrize("entry", [np.nan, np.inf, -np.inf])
def test_an_entry_that_is_not_finite_is_named(arrays, name, place, entry):
    arrays[place, 5, 6, 7] = entry
    with pytest.raises(ValueError, match=rf"^{name}: .*\(5, 6, 7\)"):
        ropecy.attention(*arrays)


@pytest.mark.parametrize(
    "place, change", [(0, lambda x: x * 1e3), (1, lambda x: x + 100), (2, lambda x: x + 100), (2, lambda x: x * 1e30)]
)
def test_one_unusual_head_sends_all_the_usual_way(arrays, ways, place, change):
    """Scores past the bound, keys and values to be centred, values to be scaled."""
    arrays[place, 3] = change(arrays[place, 3])
    assert plain_calls.forward(*check_forms(*arrays), False) is None
    assert np.array_equal(*ways(lambda: ropecy.attention(*arrays)))
