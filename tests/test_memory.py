"""Memory that is kept for later calls: nobody sees what another call wrote, and what a caller holds stays as it is."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import ropecy

SHAPE = 2, 5000, 8  # results are large enough to be kept
CASES = {
    "causal": {"causal": True},
    "no mask": {},
    "rows before the first key": {"causal": True, "q_offset": -700},
    "key mask": {"causal": True, "key_mask": np.arange(5000) % 3 > 0},
}


def _results(seed, size=1.0, method="polynomial", **options):
    """O and the gradients of a call on numbers of some size."""
    Q, K, V, dO = np.random.default_rng(seed).uniform(-1, 1, (4, *SHAPE)).astype(np.float32)
    O, vjp = ropecy.attention_vjp(Q, K, size * V, **options, method=method, eps=0.1, threads=2)
    g = vjp(size * dO)
    return O, g.dQ, g.dK, g.dV


def _assert_equal(results, expected):
    for actual, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, value)


@pytest.mark.parametrize("method", ["polynomial", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_does_not_see_what_another_wrote(name, method):
    how = {**CASES[name], "method": method}
    expected = [result.copy() for result in _results(1, **how)]
    for options in CASES.values() if method == "polynomial" else [CASES["no mask"]]:
        _results(2, 1e15, **options)
        _assert_equal(_results(1, **how), expected)


def test_what_is_held_stays():
    held = _results(1)
    kept = [result.copy() for result in held]
    row, expected = _results(3)[0][1, 7:8], _results(3)[0][1, 7:8].copy()
    for seed in range(4, 8):
        _results(seed)
    _assert_equal(held, kept)
    np.testing.assert_array_equal(row, expected)
    assert not any(np.shares_memory(one, other) for one in held for other in held if one is not other)


PAGES = """
import resource, numpy, ropecy
Q, K, V, dO = numpy.random.default_rng(1).uniform(-1, 1, (4, 2, 5000, 8)).astype("f")
O, vjp = ropecy.attention_vjp(Q, K, V, method="polynomial", eps=0.1, threads=1)
for call in range(4):
    if call == 3:
        ropecy.kernels._halves.widened(numpy.zeros(17 << 20, "f2"), 1)  # more than is kept of all
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    vjp(dO)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the pages of glibc's malloc")
def test_what_is_dropped_is_taken_again():
    """A malloc that gives all back to the system stands for one that does so where a call has dropped much."""
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PAGES], env=variables, capture_output=True, check=True)
    first, _, again, last = map(int, done.stdout.split())
    results = 3 * math.prod(SHAPE) * 4 // os.sysconf("SC_PAGE_SIZE")
    assert max(again, last) < results / 4 < first, (first, again, last, results)


def test_threads_that_hold_and_drop_results():
    expected = {seed: [result.copy() for result in _results(seed)] for seed in range(3)}

    def run(first):
        held = [(seed % 3, _results(seed % 3)) for seed in range(first, first + 6)]
        for seed, results in held:
            _assert_equal(results, expected[seed])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(8)))
