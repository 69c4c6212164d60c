"""The polynomial p nearest to exp on [-B, B] in relative error, and a proved bound of sup |p(s) e^{-s} - 1|.

Softmax needs a small relative error of every weight: with e = sup |p(s) e^{-s} - 1| < 1 over all scores s_ij, the
weights p(s_ij) are positive, and the rows that they average are off by at most tau(e) times the range of the values.

How the polynomial is found
---------------------------
p = T_g + q with T_g the Taylor polynomial of degree g. Then p(s) e^{-s} - 1 = q(s) e^{-s} - r(s), where the remainder
r(s) = 1 - T_g(s) e^{-s} is a series of terms of one sign. Nothing cancels in it, so that errors far below the unit
roundoff keep their digits, and a tiny B needs no case of its own. q is found by Remez exchange on a Chebyshev grid.

How its error is proved
-----------------------
In x = s/B = cos(theta), p(s) e^{-s} - 1 is a trigonometric polynomial of degree M = g + K plus a tail: p times what the
Chebyshev series of e^{-s} has past degree K. If the largest modulus of a trigonometric polynomial F of degree M is 1,
at theta_0, then |F(theta)| >= cos(M (theta - theta_0)) for |theta - theta_0| <= pi/M (M. Riesz). A grid of step pi/N
has a point within pi/(2N) of theta_0, so the sup is at most (largest modulus on the grid) / cos(pi M / (2N)), which is
1.3% more at N = 10 M. The bound holds for the float64 coefficients that are returned, and includes the rounding errors
of its own computation.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

__all__ = [
    "MAX_BOUND",
    "MAX_DEGREE",
    "B_grid",
    "Polynomial",
    "antiderivative",
    "fine_grid",
    "minimax",
    "n_features",
    "relative_error_for",
    "smallest_degree",
    "tau",
]

MAX_DEGREE = 40
# Rounding the coefficients to float64 changes p(s) e^{-s} by about 2^-53 e^{2B}, so that past B = 18.4 no float64
# coefficients are known to give e < 1. Bounds up to 32 leave a margin above that.
MAX_BOUND = 32.0

UNIT = 2.0**-53
STEPS_PER_OCTAVE = 24
_MANTISSAS = tuple(2.0 ** (k / STEPS_PER_OCTAVE - 1) for k in range(STEPS_PER_OCTAVE + 1))
_FINE_MANTISSAS = tuple(2.0 ** (k / (16 * STEPS_PER_OCTAVE) - 1) for k in range(16 * STEPS_PER_OCTAVE + 1))
_SMALLEST_BOUND = 2.0**-40
_POINTS_PER_DEGREE = 10
_MAX_EXCHANGES = 40


def tau(e: float) -> float:
    """tau(e) = e / (1 + sqrt(1 - e^2)): the error of a normalised row whose weights have relative errors up to e.

    Parameters
    ----------
    e : float
        Bound of ``|p(s) e^{-s} - 1|``, e >= 0.

    Returns
    -------
    float
        The sharp bound of ``|T_ic - Attn_ic| / range_j(V_jc)``; inf for e >= 1, where the weights need not be positive.

    Examples
    --------
    >>> tau(0.8)
    0.5
    """
    if e >= 1.0:
        return math.inf
    return e / (1.0 + math.sqrt((1.0 - e) * (1.0 + e)))


def relative_error_for(eps: float) -> float:
    """e = 2 eps / (1 + eps^2), the inverse of `tau`: the relative error that an output error of eps allows.

    Parameters
    ----------
    eps : float
        Error of the output in units of range(V), in (0, 1).

    Returns
    -------
    float
        The e with tau(e) = eps.

    Examples
    --------
    >>> relative_error_for(0.5)
    0.8
    """
    return 2.0 * eps / (1.0 + eps * eps)


def n_features(d: int, degree: int) -> int:
    """F = C(d + g, g), the number of monomials of degree at most g in d variables.

    Parameters
    ----------
    d : int
        Width of the rows that meet in a score.
    degree : int
        g.

    Returns
    -------
    int
        F.

    Examples
    --------
    >>> n_features(16, 4)
    4845
    """
    return math.comb(d + degree, degree)


@dataclass(frozen=True)
class Polynomial:
    """p(s) = sum_t c_t s^t with |p(s) e^{-s} - 1| <= error for every real s in [-B, B].

    Attributes
    ----------
    B : float
        Half-width of the interval.
    degree : int
        g.
    coefficients : tuple of float
        c_0, ..., c_g, exactly the float64 numbers that `error` is proved for.
    error : float
        Proved upper bound of ``sup |p(s) e^{-s} - 1|`` in exact arithmetic. It can be larger than 1. The error of
        evaluating p in floating point is not included: the caller bounds it with `absolute_sum`.
    absolute_sum : float
        Upper bound of ``sum_t |c_t| B^t``, hence of |p| on [-B, B].
    """

    B: float
    degree: int
    coefficients: tuple[float, ...]
    error: float
    absolute_sum: float

    @property
    def positive(self) -> bool:
        """Whether p > 0 on [-B, B] is proved (error < 1)."""
        return self.error < 1.0

    def __call__(self, s):
        """p(s) by Horner's rule, for a number or an array."""
        return horner(self.coefficients, s)


def antiderivative(r: Polynomial) -> tuple[float, ...]:
    """Coefficients of P with P' = r and P(0) = 0, of degree deg(r) + 1.

    Differentiating the features of P gives a backward pass whose weights are r(s).

    Parameters
    ----------
    r : Polynomial
        The weights that the backward pass is to have.

    Returns
    -------
    tuple of float
        ``(0, c_0, c_1/2, ..., c_g/(g+1))``.

    Examples
    --------
    >>> antiderivative(Polynomial(B=1.0, degree=1, coefficients=(1.0, 1.0), error=1.0, absolute_sum=2.0))
    (0.0, 1.0, 0.5)
    """
    return (0.0, *(c / (t + 1) for t, c in enumerate(r.coefficients)))


def B_grid(B: float) -> float:
    """The smallest number 2^{k/24} >= B (steps of 2.9%), and at least 2^-40.

    A polynomial for an interval serves every narrower one. Measured bounds never repeat, so they are rounded up to one
    of a few hundred values, and the polynomials of these values are computed once. Powers of two are among them.

    Parameters
    ----------
    B : float
        Bound of the scores, B >= 0 and finite.

    Returns
    -------
    float
        The rounded bound.

    Examples
    --------
    >>> B_grid(2.0), round(B_grid(1.99), 6)
    (2.0, 2.0)
    """
    if not 0.0 <= B < math.inf:
        raise ValueError(f"B must be a finite number >= 0, got {B!r}")
    if B <= _SMALLEST_BOUND:
        return _SMALLEST_BOUND
    mantissa, exponent = math.frexp(B)
    return math.ldexp(_MANTISSAS[bisect_left(_MANTISSAS, mantissa)], exponent)


def fine_grid(B: float) -> float:
    """The smallest number 2^{k/384} >= B (steps of 0.18%), and at least 2^-40, as `B_grid`."""
    if B <= _SMALLEST_BOUND:
        return _SMALLEST_BOUND
    mantissa, exponent = math.frexp(B)
    return math.ldexp(_FINE_MANTISSAS[bisect_left(_FINE_MANTISSAS, mantissa)], exponent)


def smallest_degree(B: float, e: float, max_degree: int = MAX_DEGREE) -> int | None:
    """Smallest g such that `minimax` at ``B_grid(B)`` proves sup |p(s) e^{-s} - 1| <= e.

    Parameters
    ----------
    B : float
        Bound of the scores, B >= 0.
    e : float
        Relative error allowed, in (0, 1); `relative_error_for` gives it from eps.
    max_degree : int, default 40
        The largest degree that is tried, at most 40.

    Returns
    -------
    int or None
        The degree g; its polynomial is ``minimax(B_grid(B), g)``. None where no degree up to max_degree suffices:
        B is too large, or e is below what float64 coefficients can reach (about 2^-53 e^{2B}).

    Notes
    -----
    One to three `minimax` calls the first time, a cache look-up afterwards.

    Examples
    --------
    >>> smallest_degree(1.0, 1e-3)
    4
    """
    if not 0.0 < e < 1.0:
        raise ValueError(f"e must be in (0, 1), got {e!r}")
    if not B <= MAX_BOUND:
        return None
    return _smallest_degree(B_grid(B), e, max_degree)


@lru_cache(maxsize=4096)
def _smallest_degree(B: float, e: float, max_degree: int) -> int | None:
    # The leading term of the minimax error gives a degree that is rarely off by more than one: search from there.
    degree = next((g for g in range(max_degree) if _leading_error(B, g) <= e), max_degree)
    error = minimax(B, degree).error
    while error > e:
        if degree == max_degree:
            return None
        degree, previous = degree + 1, error
        error = minimax(B, degree).error
        if error >= previous:  # rounding of the coefficients is most of the error, and a higher degree has as much
            return None
    while degree > 0 and minimax(B, degree - 1).error <= e:
        degree -= 1
    return degree


@lru_cache(maxsize=8192)
def minimax(B: float, degree: int) -> Polynomial:
    """p of degree g with the least sup over [-B, B] of |p(s) e^{-s} - 1|, within 2% and rounding.

    Parameters
    ----------
    B : float
        Half-width of the interval, in (0, 32]. For measured bounds pass ``B_grid(B)``: results are cached.
    degree : int
        g, 0 to 40.

    Returns
    -------
    Polynomial
        p with its proved error, which includes that of rounding the coefficients to float64. For a large B or a tiny
        error that is most of it, and for B above about 18 it is more than 1.

    Raises
    ------
    ValueError
        B or degree out of range.

    Notes
    -----
    Remez exchange in relative error on 10 (g + K) Chebyshev points is followed by the proof on the same points (see the
    module's docstring). Both take about a millisecond and O(g + K + g^2) numbers of memory. The polynomial method is
    that of arXiv 2412.17316 and 2505.11892, with relative error instead of their additive one, since rows are
    normalised. For B above 12 and degrees above 20 the allowance for rounding in the proof can be a hundred times the
    true error.

    Examples
    --------
    >>> p = minimax(1.0, 4)
    >>> p.degree, p.positive, p.error < 6e-4
    (4, True, True)
    """
    if not 0.0 < B <= MAX_BOUND:
        raise ValueError(f"B must be in (0, {MAX_BOUND:g}], got {B!r}")
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree must be in 0..{MAX_DEGREE}, got {degree!r}")
    g = degree
    n_series = _series_length(B, g)
    x = _chebyshev_points(_POINTS_PER_DEGREE * (g + n_series))
    s = B * x
    weight = np.exp(-s)
    remainder = _taylor_remainder(B, g, x)
    scale = B ** (g + 1) / math.factorial(g + 1)

    correction = _exchange(B, x, weight, remainder, g)
    taylor = [Fraction(1, math.factorial(t)) for t in range(g + 1)]
    # scale / B^t is written as one power, because scale or B^t by itself could underflow or overflow.
    powers = [B ** (g + 1 - t) / math.factorial(g + 1) for t in range(g + 1)]
    coefficients = tuple(float(a + Fraction(float(q) * b)) for a, q, b in zip(taylor, correction, powers, strict=True))

    # The proof begins here. From here on q is the difference between the rounded coefficients and Taylor's, and each of
    # its coefficients is correctly rounded.
    q = [float(Fraction(c) - a) for c, a in zip(coefficients, taylor, strict=True)]
    absolute_sum = math.fsum(abs(c) * B**t for t, c in enumerate(coefficients)) * (1 + 8 * UNIT)
    remainder = scale * remainder
    value = np.abs(weight * horner(q, s) - remainder)
    # Rounding errors in units of UNIT: Horner's rule has at most 2 g times the sum of the moduli of its terms, the
    # series of the remainder 5 for each term, and its power of s 1 for each factor. 40 covers exp, pow, the sums around
    # them and all terms of second order; 1e-300 covers underflow.
    rounding = weight * horner(np.abs(q), np.abs(s)) * (2 * g + 40)
    rounding += np.abs(remainder) * (5 * _remainder_length(B) + g + 40)
    on_grid = float(np.max(value + UNIT * rounding)) + 1e-300
    tail = absolute_sum * _exponential_tail(B, n_series)
    # Rounding x changes theta by at most 4 N UNIT.
    n = len(x) - 1
    reach = (g + n_series) * (math.pi / (2 * n) + 4 * n * UNIT)
    error = ((on_grid + tail) / math.cos(reach) + tail) * (1 + 8 * UNIT)
    return Polynomial(B, g, coefficients, error, absolute_sum)


def _exchange(B: float, x: np.ndarray, weight: np.ndarray, remainder: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients, in powers of x, of the q for which max |weight q - remainder| over the grid is least (Remez).

    The exchange ends when the error alternates and its extrema agree within 0.1%. The best q of all rounds is
    returned, which is q = 0, hence Taylor's polynomial, where rounding prevents anything better.
    """
    n_points = degree + 2
    # The first reference points are those where cos((g + 1) theta + B sin theta) is 1 or -1, x = -cos theta. About
    # there are the extrema of the error under the weight e^{-Bx}; they crowd towards x = -1 as B grows. With a B above
    # g + 1 the phase would no longer increase up to the right end, so B is cut there.
    theta = np.linspace(0.0, math.pi, len(x))
    phase = (degree + 1) * theta + min(B, degree + 1) * np.sin(theta)
    nearest = np.interp(np.arange(n_points) * math.pi, phase, np.arange(len(x)))
    reference = np.round(nearest).astype(int)
    signs = np.where(np.arange(n_points) % 2, -1.0, 1.0)
    best = np.zeros(degree + 1)
    best_sup = np.max(np.abs(remainder))
    for _ in range(_MAX_EXCHANGES):
        system = np.empty((n_points, n_points))
        system[:, :-1] = weight[reference, None] * np.vander(x[reference], degree + 1, increasing=True)
        system[:, -1] = signs
        target = remainder[reference]
        try:
            # The weights of the rows differ by factors up to e^{2B}. One step of iterative refinement makes elimination
            # stable for each row (Skeel), also for the rows whose weight is small.
            solution = np.linalg.solve(system, target)
            solution += np.linalg.solve(system, target - system @ solution)
        except np.linalg.LinAlgError:
            break
        *q, level = solution
        error = weight * horner(q, x) - remainder
        sup = np.max(np.abs(error))
        if sup < best_sup:
            best, best_sup = np.array(q), sup
        if sup <= 1.001 * abs(level):
            break
        # The next reference is the extremum of each run of equal signs. In exact arithmetic there are degree + 2 runs;
        # where rounding makes another number of them, the exchange can't go on.
        cuts = np.flatnonzero(np.diff(np.signbit(error))) + 1
        if len(cuts) != n_points - 1:
            break
        runs = zip([0, *cuts], [*cuts, len(x)], strict=True)
        previous, reference = reference, np.array([a + np.argmax(np.abs(error[a:b])) for a, b in runs])
        if np.array_equal(reference, previous):
            break
    return best


def _taylor_remainder(B: float, degree: int, x: np.ndarray) -> np.ndarray:
    """(1 - T_g(s) e^{-s}) (g+1)! / B^{g+1} at s = B x, to full relative accuracy.

    It is x^{g+1} e^{-s} M(1, g+2, s) with Kummer's M, and for s < 0 Kummer's transformation
    M(1, g+2, s) = e^s M(g+1, g+2, -s) turns the alternating series into a positive one.
    """
    a = np.abs(x) * B
    terms = range(1, _remainder_length(B) + 1)
    right = left = 1.0
    for k in reversed(terms):  # Horner: M(1, g+2, a) and M(g+1, g+2, a)
        right = 1.0 + right * (a / (degree + 1 + k))
        left = 1.0 + left * (a * ((degree + k) / ((degree + 1 + k) * k)))
    return x ** (degree + 1) * np.where(x >= 0, np.exp(-a) * right, left)


def _remainder_length(B: float) -> int:
    """The number of terms after which the rest of the series of `_taylor_remainder` is below half a unit roundoff."""
    n = math.ceil(2 * B)
    while n * math.log(B) - math.lgamma(n + 1) > math.log(UNIT / 4):
        n += 1
    return n


def _chebyshev_points(n: int) -> np.ndarray:
    """-cos(j pi / n) for j = 0, ..., n: symmetric about 0, and exactly -1 and 1 at the ends."""
    return np.sin(np.arange(-n, n + 1, 2) * (math.pi / (2 * n)))


def _leading_error(B: float, degree: int) -> float:
    """2 (B/2)^{g+1} / (g+1)!, the leading term of the minimax error as B -> 0 (an estimate, not a bound)."""
    return 2.0 * (B / 2) ** (degree + 1) / math.factorial(degree + 1)


def _exponential_tail(B: float, n: int) -> float:
    """A bound over [-B, B] of |e^{-s} - its Chebyshev series up to degree n|; n + 2 must be above B / 2.

    The tail is at most the sum over k > n of 2 I_k(B), with I_k(B) <= (B/2)^k / k! exp(B^2 / (4 (k + 1))).
    """
    growth = B * B / (4 * (n + 2)) - math.log1p(-B / (2 * (n + 2)))
    return math.exp(math.log(2.0) + (n + 1) * math.log(B / 2) - math.lgamma(n + 2) + growth) * (1 + 1e-9)


def _series_length(B: float, degree: int) -> int:
    """A degree K so high that terms past K of the Chebyshev series of e^{-s} add little to the error of degree g."""
    allowed = 1e-3 * min(_leading_error(B, degree), 1.0) * math.exp(-B)
    n = max(degree, math.ceil(B))
    while _exponential_tail(B, n) > max(allowed, 1e-300):
        n += 1
    return n


def horner(coefficients, s):
    """sum_t coefficients[t] s^t."""
    value = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        value = value * s + c
    return value
