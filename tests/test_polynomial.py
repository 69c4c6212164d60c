"""The polynomial for exp: its proved error against 60 digits, its optimality, and the degrees it asks for."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropecy.approximation import minimax as polynomial
from ropecy.approximation.minimax import (
    MAX_BOUND,
    B_grid,
    Polynomial,
    antiderivative,
    minimax,
    n_features,
    relative_error_for,
    smallest_degree,
    tau,
)


def relative_errors(p, n_points=400):
    """p(s) e^{-s} - 1 on a Chebyshev grid, in 60 digits."""
    with mpmath.workdps(60):
        exact = [mpmath.mpf(c) for c in p.coefficients]
        points = [mpmath.mpf(p.B) * mpmath.cos(mpmath.pi * j / n_points) for j in range(n_points + 1)]
        return [np.polynomial.polynomial.polyval(s, exact) * mpmath.exp(-s) - 1 for s in points]


def alternation(errors):
    """The largest |error| in each run of equal signs."""
    peaks, sign = [], 0
    for error in filter(None, errors):
        if mpmath.sign(error) != sign:
            sign = mpmath.sign(error)
            peaks.append(abs(error))
        peaks[-1] = max(peaks[-1], abs(error))
    return peaks


# Degrees whose minimax error is well above what rounding the coefficients costs.
SMOOTH = [
    (1e-8, 0), (1e-5, 1), (1e-3, 1), (1e-3, 3), (0.25, 2), (0.25, 5), (0.7, 3), (1.0, 0), (1.0, 4), (1.0, 9),
    (2.0, 6), (3.3, 7), (4.0, 10), (6.0, 12), (8.0, 16), (8.0, 20), (10.0, 16), (12.0, 14),
]  # fmt: skip
# Degrees where it is below: B small, degrees high, or B large.
ROUGH = [(1e-8, 20), (1e-3, 40), (0.25, 12), (1.0, 25), (4.0, 30), (8.0, 40), (12.0, 24), (16.0, 28), (18.0, 40)]


@pytest.mark.parametrize(("B", "degree"), SMOOTH)
def test_proved_error_is_above_the_true_one_and_close(B, degree):
    p = minimax(B, degree)
    true = max(abs(error) for error in relative_errors(p))
    # 1.3% belongs to the proof, the rest to its rounding at the largest B
    assert true <= p.error <= 1.05 * true


@pytest.mark.parametrize(("B", "degree"), ROUGH)
def test_proved_error_is_above_the_true_one_at_rounding_level(B, degree):
    p = minimax(B, degree)
    true = max(abs(error) for error in relative_errors(p))
    assert true <= p.error
    # nor is it far from the rounding of coefficients, which nothing can undo
    assert p.error <= 200 * 2.0**-53 * math.exp(2 * B)


@pytest.mark.parametrize(("B", "degree"), SMOOTH)
def test_no_polynomial_of_the_degree_is_better(B, degree):
    # de la Vallee-Poussin: where the error alternates g + 2 times, its least peak bounds every polynomial from below
    p = minimax(B, degree)
    peaks = alternation(relative_errors(p))
    assert len(peaks) == degree + 2
    assert p.error <= 1.06 * min(peaks)


def test_error_counts_the_coefficients_that_are_handed_out(monkeypatch):
    # an exchange that is off must widen the error, not the truth
    exact = polynomial._exchange
    monkeypatch.setattr(polynomial, "_exchange", lambda *args: exact(*args) * 1.5)
    p = minimax.__wrapped__(1.0, 4)
    true = max(abs(error) for error in relative_errors(p))
    assert minimax(1.0, 4).error < true <= p.error <= 1.05 * true


def test_exchange_that_fails_leaves_the_taylor_polynomial(monkeypatch):
    def singular(*args):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "solve", singular)
    p = minimax.__wrapped__(1.0, 3)
    np.testing.assert_allclose(p.coefficients, [1, 1, 1 / 2, 1 / 6], rtol=1e-15)
    true = max(abs(error) for error in relative_errors(p))
    assert true <= p.error <= 1.05 * true


@settings(max_examples=60)
@given(B=st.floats(1e-9, MAX_BOUND), degree=st.integers(0, 40))
def test_error_holds_anywhere(B, degree):
    p = minimax(B, degree)
    assert len(p.coefficients) == degree + 1
    assert all(map(math.isfinite, (*p.coefficients, p.error, p.absolute_sum)))
    assert max(abs(error) for error in relative_errors(p, 60)) <= p.error


def test_remainder_of_the_taylor_polynomial_keeps_its_digits():
    x = np.linspace(-1, 1, 21)
    for B, g in [(1e-3, 3), (1.0, 0), (5.0, 12), (20.0, 30)]:
        with mpmath.workdps(100):
            scale = mpmath.factorial(g + 1) / mpmath.mpf(B) ** (g + 1)
            expected = [
                scale * (1 - mpmath.exp(-s) * mpmath.fsum(s**t / mpmath.factorial(t) for t in range(g + 1)))
                for s in (mpmath.mpf(v) for v in B * x)
            ]
        np.testing.assert_allclose(polynomial._taylor_remainder(B, g, x), np.array(expected, float), rtol=1e-13)


@pytest.mark.parametrize(("B", "n"), [(1e-8, 1), (0.5, 3), (2.0, 5), (8.0, 10), (30.0, 60)])
def test_tail_of_the_chebyshev_series_is_bounded(B, n):
    tail = 2 * mpmath.nsum(lambda k: mpmath.besseli(k, B), [n + 1, n + 120])
    assert tail <= polynomial._exponential_tail(B, n) <= 3 * tail


def test_positivity_is_what_the_error_says():
    p = minimax(4.0, 7)
    assert p.positive
    assert min(p(np.linspace(-4.0, 4.0, 2001))) > 0
    assert not minimax(8.0, 1).positive
    assert not minimax(30.0, 40).positive


def test_error_falls_with_the_degree_and_grows_with_the_bound():
    errors = [minimax(2.0, g).error for g in range(15)]
    assert errors == sorted(errors, reverse=True)
    errors = [minimax(B, 5).error for B in (1e-6, 0.1, 0.5, 1.0, 2.0, 4.0, 6.0)]
    assert errors == sorted(errors)


def test_narrow_intervals_give_the_taylor_coefficients():
    p = minimax(1e-8, 10)
    assert p.coefficients == tuple(1 / math.factorial(t) for t in range(11))
    assert p.error < 1e-40


def test_absolute_sum_and_call():
    p = minimax(2.0, 5)
    assert p.absolute_sum == pytest.approx(sum(abs(c) * 2.0**t for t, c in enumerate(p.coefficients)), rel=1e-14)
    s = np.linspace(-2, 2, 7)
    np.testing.assert_allclose(p(s), np.polynomial.polynomial.polyval(s, p.coefficients), rtol=1e-14)
    assert p(0.0) == p.coefficients[0]


def test_results_are_cached_and_frozen():
    p = minimax(1.5, 4)
    assert minimax(1.5, 4) is p
    with pytest.raises(AttributeError):
        p.error = 0.0


# Smallest degree for e = 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-12; powers of two are on the grid of bounds.
SMALLEST = {
    0.25: (2, 2, 3, 4, 6, 8),
    0.5: (2, 3, 4, 5, 7, 9),
    1.0: (3, 4, 5, 7, 9, 12),
    2.0: (5, 6, 7, 9, 11, 15),
    4.0: (7, 9, 10, 13, 15, 19),
    # float64 coefficients cannot hold 1e-12 at B = 8
    8.0: (12, 14, 16, 19, 22, None),
}


@pytest.mark.parametrize("B", SMALLEST)
def test_smallest_degree(B):
    found = tuple(smallest_degree(B, e) for e in (1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-12))
    assert found == SMALLEST[B]
    for e, g in zip((1e-2, 1e-3, 1e-4, 1e-6, 1e-8), found, strict=False):
        assert minimax(B, g).error <= e < minimax(B, g - 1).error


def test_smallest_degree_covers_the_bound_it_was_asked_for():
    for B in (0.0, 1e-30, 0.3, 1.01, 5.0, 9.7):
        p = minimax(B_grid(B), smallest_degree(B, 1e-3))
        assert p.B >= B
        assert p.error <= 1e-3
    assert smallest_degree(0.0, 1e-3) == 0
    assert smallest_degree(0.3, 0.9) == 0


def test_smallest_degree_gives_none_where_no_degree_does():
    assert smallest_degree(4.0, 1e-6, max_degree=12) is None
    assert smallest_degree(4.0, 1e-6, max_degree=13) == 13
    assert smallest_degree(20.0, 1e-3) is None
    assert smallest_degree(1e6, 1e-3) is None
    assert smallest_degree(math.inf, 1e-3) is None
    assert smallest_degree(1.0, 1e-30) is None


def test_work_for_unseen_bounds_is_bounded(monkeypatch):
    # a call that meets a new bound tries few degrees; a bound in the same step of the grid tries none
    calls = []

    def counted(B, degree):
        calls.append(degree)
        return minimax(B, degree)

    monkeypatch.setattr(polynomial, "minimax", counted)
    for B in (0.11, 0.37, 1.13, 2.9, 5.7, 7.3):
        for e in (1.23e-2, 1.23e-4, 1.23e-6):
            calls.clear()
            smallest_degree(B, e)
            assert 1 <= len(calls) <= 5
            calls.clear()
            smallest_degree(B * 1.0001, e)
            assert not calls


@given(B=st.floats(0, 1e300))
def test_grid_of_bounds_rounds_up_in_small_steps(B):
    rounded = B_grid(B)
    assert rounded >= B
    assert rounded <= max(B * 2 ** (1 / 24) * (1 + 1e-15), 2.0**-40)
    assert B_grid(rounded) == rounded


def test_grid_of_bounds_keeps_powers_of_two():
    for k in range(-40, 10):
        assert B_grid(2.0**k) == 2.0**k


def test_tau_and_its_inverse():
    assert tau(0.0) == 0.0
    assert tau(1.0) == tau(3.0) == math.inf
    assert tau(1e-9) == pytest.approx(5e-10, rel=1e-12)
    for eps in (1e-12, 1e-3, 0.3, 0.9):
        assert tau(relative_error_for(eps)) == pytest.approx(eps, rel=1e-12)


def test_tau_is_attained_by_two_keys():
    # Weights P and 1 - P, off by factors 1 + e and 1 - e
    e = 0.3
    P = np.linspace(0, 1, 100001)
    moved = P * (1 + e) / (P * (1 + e) + (1 - P) * (1 - e)) - P
    assert moved.max() == pytest.approx(tau(e), rel=1e-8)


def test_antiderivative():
    r = minimax(1.0, 4)
    P = antiderivative(r)
    assert len(P) == 6
    assert P[0] == 0.0
    np.testing.assert_allclose([t * c for t, c in enumerate(P)][1:], r.coefficients, rtol=1e-15)


def test_number_of_features_counts_exponents():
    assert n_features(3, 2) == 10
    assert n_features(8, 6) == 3003
    assert n_features(128, 2) == 8385
    assert n_features(5, 0) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: minimax(0.0, 2), "B must be in"),
        (lambda: minimax(math.nan, 2), "B must be in"),
        (lambda: minimax(33.0, 2), "B must be in"),
        (lambda: minimax(1.0, -1), "degree must be in"),
        (lambda: minimax(1.0, 41), "degree must be in"),
        (lambda: smallest_degree(1.0, 0.0), "e must be in"),
        (lambda: smallest_degree(1.0, 1.0), "e must be in"),
        (lambda: smallest_degree(-1.0, 0.1), "B must be a finite number"),
        (lambda: B_grid(math.inf), "B must be a finite number"),
    ],
)
def test_values_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_polynomial_is_a_plain_value():
    p = Polynomial(B=1.0, degree=0, coefficients=(1.0,), error=2.0, absolute_sum=1.0)
    assert p == Polynomial(1.0, 0, (1.0,), 2.0, 1.0)
    assert not p.positive
