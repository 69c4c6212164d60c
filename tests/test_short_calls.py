"""Short calls do little beside their arithmetic: how many functions they call, and what they measure."""

import cProfile
import gc
import pstats

import numpy as np
import pytest

import ropecy
from ropecy.certify import statistics


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
    assert count(lambda: ropecy.attention(*arrays, scale=0.125, method="exact", threads=2)) <= 120


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
