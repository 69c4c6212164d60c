"""Predicted seconds: what was measured once, and that no choice hangs on the machine or on the number of threads."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ropecy
from ropecy.engines import cost
from ropecy.engines.cost import Work
from ropecy.engines.exact import cost as of_exact
from ropecy.engines.exact.cost import exact_work, seconds_of
from ropecy.engines.polynomial import cost as of_polynomial
from ropecy.engines.polynomial.cost import polynomial_work
from ropecy.problem.mask import Mask
from ropecy.problem.problem import Outline, Sizes

# Milliseconds of one thread of an EPYC (Zen 4), float32, x86-64-v4: engine's degree (0: exact), d, n, causal, grad.
MEASURED = [
    (0, 8, 512, False, False, 0.155),
    (0, 8, 8192, False, False, 27.9),
    (0, 8, 8192, True, True, 58.0),
    (0, 16, 32768, False, False, 751),
    (0, 64, 2048, False, False, 10.4),
    (0, 64, 8192, True, False, 82.2),
    (1, 8, 8192, False, False, 0.805),
    (4, 8, 65536, False, False, 17.2),
    (4, 8, 65536, True, False, 20.1),
    (4, 8, 65536, True, True, 133),
    (6, 8, 8192, False, True, 64.2),
    (9, 8, 32768, False, False, 372),
    (2, 16, 8192, False, True, 16.0),
    (3, 16, 8192, False, False, 7.26),
    (4, 16, 65536, False, False, 223),
    (2, 64, 8192, False, False, 49.9),
]


def problem(n, d, causal=False, dtype="float32", heads=1, groups=1):
    sizes = Sizes(heads, groups, n, n, d, d)
    return Outline(sizes=sizes, dtype=np.dtype(dtype), mask=Mask(n, n, hi=0 if causal else None))


def work(degree, made, grad):
    return polynomial_work(made, degree, grad) if degree else exact_work(made, grad)


@pytest.fixture
def measured_on(monkeypatch):
    """As on the machine of the table, at an instruction set."""

    def at(level, dtype="float32"):
        speeds = cost._SPEEDS[level, dtype]
        for module in (cost, of_exact, of_polynomial):
            monkeypatch.setattr(module, "speeds", lambda dtype: speeds)
        monkeypatch.setattr(of_exact, "slowness", lambda: 1.0)
        of_polynomial._polynomial_work.cache_clear()

    yield at
    monkeypatch.undo()
    of_polynomial._polynomial_work.cache_clear()


@pytest.mark.parametrize(("degree", "d", "n", "causal", "grad", "milliseconds"), MEASURED)
def test_predictions_are_near_what_was_measured(degree, d, n, causal, grad, milliseconds, measured_on):
    measured_on("v4")
    predicted = 1e3 * seconds_of(work(degree, problem(n, d, causal), grad), 1, grad)
    assert milliseconds / 1.25 < predicted < 1.25 * milliseconds


def test_a_higher_instruction_set_is_faster(measured_on):
    taken = {}
    for level, dtype in cost._SPEEDS:
        measured_on(level, dtype)
        taken[level, dtype] = [work(g, problem(4096, 16, dtype=dtype), True).seconds(1) for g in (0, 3)]
    for dtype in ("float32", "float64"):
        for faster, slower in (("v4", "v3"), ("v3", "baseline")):
            assert np.all(np.array(taken[faster, dtype]) < taken[slower, dtype])
    for level in ("baseline", "v3", "v4"):
        assert np.all(np.array(taken[level, "float32"]) < taken[level, "float64"])


def test_work_adds_up_and_is_shared_in_whole_pieces():
    some = Work(1.0, ((6.0, 3), (4.0, 100)))
    assert some.seconds(1) == 11.0
    assert some.seconds(2) == 1.0 + 4.0 + 2.0
    assert some.seconds(1000) == 1.0 + 2.0 + 0.04
    both = some + some.times(2)
    assert both.seconds(2) == pytest.approx(3 * some.seconds(2))
    assert some.nominal == pytest.approx((11.0 * 7.0) ** 0.5)


sizes = {
    "n": st.integers(1, 5000),
    "d": st.integers(1, 40),
    "causal": st.booleans(),
    "grad": st.booleans(),
    "degree": st.integers(0, 4),
    "heads": st.integers(1, 5),
    "groups": st.integers(1, 3),
}


@settings(max_examples=60)
@given(**sizes)
def test_more_work_takes_longer(n, d, causal, grad, degree, heads, groups):
    def seconds(n=n, d=d, heads=heads, groups=groups, grad=grad, degree=degree):
        return work(degree, problem(n, d, causal, heads=heads, groups=groups), grad).seconds(1)

    least = seconds()
    assert 0 < least < np.inf
    assert seconds(n=4 * n + 4096) > least
    assert seconds(d=d + 8) > least
    assert seconds(heads=heads + 1) > least
    assert seconds(groups=groups + 1) > least
    assert seconds(grad=True) >= least
    if degree:
        assert seconds(degree=degree + 1) > least
    several = work(degree, problem(n, d, causal, heads=heads, groups=groups), grad)
    assert several.seconds(1) >= several.seconds(2) >= several.seconds(64)


@settings(max_examples=20)
@given(n=st.integers(200, 6000), d=st.integers(1, 6), causal=st.booleans(), grad=st.booleans(), B=st.floats(0.2, 4))
def test_choices_do_not_depend_on_the_number_of_threads(n, d, causal, grad, B):
    R = ropecy.Rotary(2 * d)
    Q, K = np.random.default_rng(n).uniform(-1, 1, (2, n, 2 * d)).astype(np.float32)
    plans = [ropecy.plan(Q, K, R, causal=causal, grad=grad, scale=B / (2 * d), threads=t) for t in (1, 2, 3, 40)]
    assert len({(made.engine, made.certificate.degree, made.certificate.rule) for made in plans}) == 1
    for engine in plans[0].seconds:
        seconds = [made.seconds[engine] for made in plans]
        assert seconds == sorted(seconds, reverse=True)


def test_nor_on_how_fast_the_machine_is(monkeypatch, rng):
    Q, K = rng.uniform(-1, 1, (2, 3000, 8))
    plans = []
    for slowness in (0.01, 1.0, 100.0):
        monkeypatch.setattr(of_exact, "slowness", lambda s=slowness: s)
        plans.append(ropecy.plan(Q, K, ropecy.Rotary(8)))
    assert len({made.engine for made in plans}) == 1
    for engine in plans[0].seconds:
        assert plans[2].seconds[engine] == pytest.approx(1e4 * plans[0].seconds[engine])


def test_slowness_is_measured_once():
    assert 0 < of_exact.slowness() < np.inf
    assert of_exact.slowness() is of_exact.slowness()


@pytest.mark.parametrize("method", ["exact", "fft"])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_family_takes_no_more_memory_than_is_told(zeros, method, rng):
    n, d = 1500, 3
    Q, K, V = 0.3 * rng.standard_normal((3, n, d))
    W = 0.3 * rng.standard_normal((2 * n - 1, d, d))
    W[:, 1] *= not zeros
    R, options = ropecy.RelativeFamily(W), {"method": method, "eps": 1e-2}
    ropecy.attention_vjp(Q, K, V, R, **options)
    tracemalloc.start()
    try:
        O, vjp = ropecy.attention_vjp(Q, K, V, R, **options)
        forward = tracemalloc.get_traced_memory()[1] - O.nbytes
        tracemalloc.reset_peak()
        g = vjp(O)
        backward = tracemalloc.get_traced_memory()[1] - O.nbytes - sum(x.nbytes for x in (g.dQ, g.dK, g.dV, g.dR))
    finally:
        tracemalloc.stop()
    assert forward <= ropecy.plan(Q, K, V, R, **options).bytes[method] <= 2 * forward
    assert backward <= ropecy.plan(Q, K, V, R, **options, grad=True).bytes[method] <= 2 * backward
