"""Polynomials for exp whose error is bounded by moments of the scores instead of by their largest size.

For a minimax polynomial every pair of a query and a key counts with the error at the worst score. If instead
|p(s) - e^s| <= r s^k with k even, the mean error over the keys of a row is at most r times the k-th moment of its
scores, and that moment is cheap to measure. Most scores are far below the largest one, so that a lower degree often
suffices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .minimax import UNIT, horner

__all__ = ["MomentPolynomial", "fit_moments", "taylor"]


@dataclass(frozen=True)
class MomentPolynomial:
    """p with |p(s) - e^s| <= radius[0] s^k + radius[1] s^(k+2) for |s| <= B, where k is `order`, an even number.

    The mean of the right side over the keys of a row bounds the mean error of their weights, and it follows from the
    moments k and k + 2 of the row's scores. p > 0 on [-B, B], unless `taylor` made it.

    Attributes
    ----------
    B : float
        Half-width of the interval.
    degree : int
        g.
    coefficients : tuple of float
        c_0, ..., c_g. Those of powers below `order` are Taylor's, rounded to float64. The effect of that rounding is
        not included in the radius: the caller adds it.
    order : int
        k, even: the largest even number that is at most g; g + 1 for the polynomials of `taylor` of odd degree g.
    radius : (float, float)
        Factors of s^k and of s^(k+2) in the bound. The second is 0 where moment k is the only one that is known.
    alone : float
        A bound that uses moment k only: |p(s) - e^s| <= alone s^k.
    """

    B: float
    degree: int
    coefficients: tuple[float, ...]
    order: int
    radius: tuple[float, float]
    alone: float


@lru_cache(maxsize=1024)
def taylor(B: float, order: int) -> MomentPolynomial:
    """Taylor's polynomial T_{k-1} with k = `order`, an even number; its error s^k phi_k(s) is at most s^k phi_k(B).

    Its values may be negative, so it serves as the weights of a backward pass only. For phi_k see `fit_moments`.
    """
    largest = sum(_phi_ends(order, B)) * (1 + 80 * UNIT)
    coefficients = tuple(1 / math.factorial(t) for t in range(order))
    return MomentPolynomial(B, order - 1, coefficients, order, (largest, 0.0), largest)


@lru_cache(maxsize=8192)
def fit_moments(B: float, degree: int, kappa: float = 0.0) -> MomentPolynomial | None:
    """p = T_{k-1} + s^k q(s) with the least radius, k being the largest even number <= g and q of degree g - k <= 1.

    Parameters
    ----------
    B : float
        Bound of the scores, in (0, 32].
    degree : int
        g, at least 2.
    kappa : float
        0 where only moment k of the scores is known. For g = 2 and 3, where the second and the fourth moment are known,
        about the second divided by the fourth.

    Returns
    -------
    MomentPolynomial or None
        None where p > 0 on [-B, B] can't be proved, which happens for odd degrees and large B.

    Notes
    -----
    phi_k(s) = (e^s - T_{k-1}(s)) / s^k = int_0^1 (1-u)^{k-1} e^{us} du / (k-1)! is positive, increasing and convex, so
    the constant q nearest to it is the mean of its values at both ends, the nearest line has the slope of its chord,
    and 0 < phi_k'' <= phi_k(B) bounds what happens between the points of a grid. All sums are of one sign, so that no
    digits are lost at small B. For even g, p > 0 everywhere. With kappa and g = 2, q is the constant with the least
    largest |phi_2(s) - q| / (1 + kappa s^2); with kappa and g = 3, p = T_3, for which e^s - T_3 = s^4 phi_4(s).

    Examples
    --------
    >>> p = fit_moments(1.0, 2)
    >>> p.order, round(p.radius[0], 3), round(fit_moments(1.0, 4).radius[0], 4)
    (2, 0.175, 0.0085)
    """
    k = degree - degree % 2
    even, odd = _phi_ends(k, B)
    largest = even + odd
    taylor = [1 / math.factorial(t) for t in range(k)]
    if kappa and degree == 3:
        top, radius = [1 / 2, 1 / 6], (0.0, sum(_phi_ends(4, B)))
        alone = B * B * radius[1]
    elif kappa:
        constant, radius = _best_constant(k, B, kappa)
        top = [constant]
        alone = max(largest - constant, constant - (even - odd))
    elif degree == k:
        top, radius = [even], (odd, 0.0)
    else:
        slope = odd / B
        s, phi, gap = _phi_grid(k, B)
        least = float(np.min(phi - slope * s)) - gap
        top, radius = [0.5 * (even + least), slope], (0.5 * (even - least), 0.0)
    # The factors allow for the rounding of the top coefficients and of all sums of positive terms.
    if not kappa:
        alone = radius[0]
    radius = ((radius[0] + 16 * UNIT * largest) * (1 + 64 * UNIT), radius[1] * (1 + 64 * UNIT))
    alone = (alone + 16 * UNIT * largest) * (1 + 64 * UNIT)
    if degree != k:
        # For even g nothing is to be checked: T_{g-1} + c s^g >= T_g > 0. For odd g the values on a grid are: between
        # two points p differs from the straight line by at most step^2 / 8 max |p''|, the first term of `room`.
        s = np.linspace(-B, 0, 1025)
        bent = math.fsum(t * (t - 1) * abs(c) * B ** max(t - 2, 0) for t, c in enumerate([*taylor, *top]))
        room = (B / 1024) ** 2 / 8 * bent + 64 * UNIT * math.exp(B)
        if np.min(horner([*taylor, *top], s)) <= 1.001 * room:
            return None
    return MomentPolynomial(B, degree, (*taylor, *top), k, radius, alone)


def _phi_ends(k: int, B: float) -> tuple[float, float]:
    """The even and the odd part of phi_k(s) = sum_j s^j / (j + k)! at s = B."""
    terms = [1 / math.factorial(k)]
    while terms[-1] > 1e-18 * terms[0] or len(terms) < 2 * B:
        terms.append(terms[-1] * B / (k + len(terms)))
    # From the last term on each term is at most half of the one before it, so the sum of the terms that are left out is
    # less than the last one.
    return math.fsum(terms[0::2]) + terms[-1], math.fsum(terms[1::2]) + terms[-1]


def _phi_grid(k: int, B: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A grid on [-B, B], phi_k on it, and a bound of the distance of phi_k from straight lines between these points."""
    s = np.linspace(-B, B, 2049)
    terms = math.ceil(6 * B) + 24
    phi = horner([1 / math.factorial(k + j) for j in range(terms)], s)
    largest = sum(_phi_ends(k, B))
    step = 2 * B / (len(s) - 1)
    return s, phi, (step * step / 8 * 1.001 + 4 * terms * UNIT) * largest


def _best_constant(k: int, B: float, kappa: float) -> tuple[float, tuple[float, float]]:
    """c and (a, b) with |phi_k(s) - c| <= a + b s^2: the c for which the least such a with b = a kappa is smallest.

    By bisection: at the best c the largest and the smallest (phi_k(s) - c) / (1 + kappa s^2) are of equal size.
    """
    s, phi, gap = _phi_grid(k, B)
    weight = 1 + kappa * s * s
    low, high = float(phi[0]), float(phi[-1])
    for _ in range(60):
        c = 0.5 * (low + high)
        error = (phi - c) / weight
        if error.max() > -error.min():
            low = c
        else:
            high = c
    a = float(np.max(np.abs(phi - c) / weight)) * (1 + 16 * UNIT)
    # Between two points of the grid, phi_k differs from the straight line by at most gap, and a kappa s^2 by at most
    # step^2 / 4 a kappa. Both are added to a.
    step = 2 * B / (len(s) - 1)
    return c, (a + gap + step * step / 4 * 1.001 * a * kappa, a * kappa)
