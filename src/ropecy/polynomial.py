"""The polynomial p that stands for exp on [-B, B], and a proved bound of sup |p(s) e^{-s} - 1|. Scalars only.

The relative error is what softmax asks for: with e = sup |p(s) e^{-s} - 1| < 1 over all scores, the weights p(s_ij) are
positive and the normalised rows are off by at most tau(e) times the range of the values.

How the polynomial is found
---------------------------
p = T_g + q, T_g the Taylor polynomial of degree g. Then p(s) e^{-s} - 1 = q(s) e^{-s} - r(s), where the remainder
r(s) = 1 - T_g(s) e^{-s} is a series of terms of one sign. Nothing cancels, so errors far below the unit roundoff keep
their digits, and B -> 0 is no special case. q is found by Remez exchange on a Chebyshev grid.

How its error is proved
-----------------------
In x = s/B = cos(theta), p(s) e^{-s} - 1 is a trigonometric polynomial of degree M = g + K plus a tail: p times what the
Chebyshev series of e^{-s} has past degree K. If the largest modulus of a trigonometric polynomial F of degree M is 1,
at theta_0, then |F(theta)| >= cos(M (theta - theta_0)) for |theta - theta_0| <= pi/M (M. Riesz). A grid of step pi/N
has a point within pi/(2N) of theta_0, so the sup is at most (largest modulus on the grid) / cos(pi M / (2N)): 1.3% more
at N = 10 M. The proof concerns the float64 coefficients that are handed out, and counts its own rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

__all__ = [
    "MAX_BOUND",
    "MAX_DEGREE",
    "B_grid",
    "MomentPolynomial",
    "Polynomial",
    "antiderivative",
    "fit_moments",
    "minimax",
    "n_features",
    "relative_error_for",
    "smallest_degree",
    "tau",
]

MAX_DEGREE = 40
# Rounding the coefficients to float64 moves p(s) e^{-s} by about 2^-53 e^{2B}: past B = 18.4 no float64 coefficients
# are known to give e < 1. The rest is margin.
MAX_BOUND = 32.0

_UNIT = 2.0**-53
STEPS_PER_OCTAVE = 24
_MANTISSAS = tuple(2.0 ** (k / STEPS_PER_OCTAVE - 1) for k in range(STEPS_PER_OCTAVE + 1))
_SMALLEST_BOUND = 2.0**-40
_POINTS_PER_DEGREE = 10
_MAX_EXCHANGES = 40


def tau(e: float) -> float:
    """tau(e) = e / (1 + sqrt(1 - e^2)): what a relative error e of every weight costs a normalised row.

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
        Proved upper bound of ``sup |p(s) e^{-s} - 1|`` in exact arithmetic; what evaluating p in floating point adds
        is the caller's to count (`absolute_sum` is the number for it). May pass 1.
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
        return _horner(self.coefficients, s)


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

    A polynomial for a wider interval serves a narrower one, so measured bounds, which never repeat, are rounded up to
    a few hundred values whose polynomials are then found once. Powers of two are on the grid and stay as they are.

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
    return math.ldexp(next(m for m in _MANTISSAS if m >= mantissa), exponent)


def smallest_degree(B: float, e: float, max_degree: int = MAX_DEGREE) -> int | None:
    """Smallest g such that `minimax` at ``B_grid(B)`` proves sup |p(s) e^{-s} - 1| <= e.

    Parameters
    ----------
    B : float
        Bound of the scores, B >= 0.
    e : float
        Relative error allowed, in (0, 1); `relative_error_for` gives it from eps.
    max_degree : int, default 40
        Largest degree tried, at most 40.

    Returns
    -------
    int or None
        The degree g; its polynomial is ``minimax(B_grid(B), g)``. None where no degree up to max_degree does:
        too large a B, or an e that float64 coefficients cannot hold (about 2^-53 e^{2B}).

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
    # The leading term of the minimax error is rarely off by more than one degree; walk from there.
    degree = next((g for g in range(max_degree) if _leading_error(B, g) <= e), max_degree)
    error = minimax(B, degree).error
    while error > e:
        if degree == max_degree:
            return None
        degree, previous = degree + 1, error
        error = minimax(B, degree).error
        if error >= previous:  # rounded coefficients rule, which more degrees do not cure
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
        With its proved error. Where the coefficients' rounding rules (B large, or the error tiny) the error says so;
        past B of about 18 it passes 1.

    Raises
    ------
    ValueError
        B or degree out of range.

    Notes
    -----
    Remez exchange in relative error on 10 (g + K) Chebyshev points, then the proof on the same points (see the module's
    docstring). About a millisecond; O(g + K + g^2) numbers of memory. The polynomial method is that of arXiv 2412.17316
    and 2505.11892; relative error in the place of their additive one is what normalised rows ask for. From B = 12 on
    and degrees past 20 the allowance for the proof's own rounding can be a hundred times the true error.

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
    # scale / B^t as one power: neither factor under- or overflows alone
    powers = [B ** (g + 1 - t) / math.factorial(g + 1) for t in range(g + 1)]
    coefficients = tuple(float(a + Fraction(float(q) * b)) for a, q, b in zip(taylor, correction, powers, strict=True))

    # From here on the proof: q is what the rounded coefficients leave over Taylor's, each within one rounding.
    q = [float(Fraction(c) - a) for c, a in zip(coefficients, taylor, strict=True)]
    absolute_sum = math.fsum(abs(c) * B**t for t, c in enumerate(coefficients)) * (1 + 8 * _UNIT)
    remainder = scale * remainder
    value = np.abs(weight * _horner(q, s) - remainder)
    # Horner loses at most 2g roundings of the absolute sum. The remainder's series loses 5 per term, and its power of s
    # one per factor. 40 covers exp, pow, the sums around them and every second-order term; 1e-300 covers underflow.
    rounding = weight * _horner(np.abs(q), np.abs(s)) * (2 * g + 40)
    rounding += np.abs(remainder) * (5 * _remainder_length(B) + g + 40)
    on_grid = float(np.max(value + _UNIT * rounding)) + 1e-300
    tail = absolute_sum * _exponential_tail(B, n_series)
    # x is rounded, which moves theta by at most 4 N u
    n = len(x) - 1
    reach = (g + n_series) * (math.pi / (2 * n) + 4 * n * _UNIT)
    error = ((on_grid + tail) / math.cos(reach) + tail) * (1 + 8 * _UNIT)
    return Polynomial(B, g, coefficients, error, absolute_sum)


@dataclass(frozen=True)
class MomentPolynomial:
    """p with |p(s) - e^s| <= radius[0] s^k + radius[1] s^(k+2), k = order even, and p(s) > 0, for |s| <= B.

    The mean over keys of the right side, hence of the errors of their weights, is known from moments of the scores.

    Attributes
    ----------
    B : float
        Half-width of the interval.
    degree : int
        g.
    coefficients : tuple of float
        c_0, ..., c_g. Those below `order` are Taylor's, but for their own rounding, which is the caller's to count.
    order : int
        k, even: the largest number <= g of that kind, or g + 1.
    radius : (float, float)
        The second is 0 where no moment past k is used.
    alone : float
        The radius that does without it: |p(s) - e^s| <= alone s^k.
    """

    B: float
    degree: int
    coefficients: tuple[float, ...]
    order: int
    radius: tuple[float, float]
    alone: float


@lru_cache(maxsize=1024)
def taylor(B: float, order: int) -> MomentPolynomial:
    """T_{k-1}, whose error s^k phi_k(s) is at most s^k phi_k(B), k = `order` even: weights for a backward pass, which
    may be negative.
    """
    largest = sum(_phi_ends(order, B)) * (1 + 80 * _UNIT)
    coefficients = tuple(1 / math.factorial(t) for t in range(order))
    return MomentPolynomial(B, order - 1, coefficients, order, (largest, 0.0), largest)


@lru_cache(maxsize=1024)
def fit_moments(B: float, degree: int, kappa: float = 0.0) -> MomentPolynomial | None:
    """p = T_{k-1} + s^k q(s) for scores whose moments, not whose largest size, is what counts; q of degree g - k <= 1.

    Parameters
    ----------
    B : float
        Bound of the scores, in (0, 32].
    degree : int
        g, at least 2.
    kappa : float
        0: only moment k is known. For g = 2, 3: the second moment over the fourth, about; both are known.

    Returns
    -------
    MomentPolynomial or None
        None where p > 0 on [-B, B] is not proved: B is too large for an odd degree.

    Notes
    -----
    phi_k(s) = (e^s - T_{k-1}(s)) / s^k = int_0^1 (1-u)^{k-1} e^{us} du / (k-1)! is positive, increasing and convex, so
    its best constant is the middle of its ends, its best line has the slope of its chord, and 0 < phi_k'' <= phi_k(B)
    bounds what happens between the points of a grid. Sums of one sign only: no digits are lost at small B. For even g,
    p > 0 everywhere. With kappa, the constant for g = 2 is the best under the weight 1 + kappa s^2, and p = T_3 for
    g = 3, where e^s - T_3 = s^4 phi_4(s).

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
    # Rounding of the top coefficients and of all sums of positive terms.
    if not kappa:
        alone = radius[0]
    radius = ((radius[0] + 16 * _UNIT * largest) * (1 + 64 * _UNIT), radius[1] * (1 + 64 * _UNIT))
    alone = (alone + 16 * _UNIT * largest) * (1 + 64 * _UNIT)
    if degree != k:
        # Even degrees need no look: T_{g-1} + c s^g >= T_g > 0. Between points p leaves its polygon by at most this.
        s = np.linspace(-B, 0, 1025)
        bent = math.fsum(t * (t - 1) * abs(c) * B ** max(t - 2, 0) for t, c in enumerate([*taylor, *top]))
        room = (B / 1024) ** 2 / 8 * bent + 64 * _UNIT * math.exp(B)
        if np.min(_horner([*taylor, *top], s)) <= 1.001 * room:
            return None
    return MomentPolynomial(B, degree, (*taylor, *top), k, radius, alone)


def _phi_ends(k: int, B: float) -> tuple[float, float]:
    """The even and the odd part of phi_k(s) = sum_j s^j / (j + k)! at s = B."""
    terms = [1 / math.factorial(k)]
    while terms[-1] > 1e-18 * terms[0] or len(terms) < 2 * B:
        terms.append(terms[-1] * B / (k + len(terms)))
    # What is left out is below the last term: its successors at least halve.
    return math.fsum(terms[0::2]) + terms[-1], math.fsum(terms[1::2]) + terms[-1]


def _phi_grid(k: int, B: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A grid on [-B, B], phi_k there, and what phi_k differs from its interpolating polygon at most, with rounding."""
    s = np.linspace(-B, B, 2049)
    terms = math.ceil(6 * B) + 24
    phi = _horner([1 / math.factorial(k + j) for j in range(terms)], s)
    largest = sum(_phi_ends(k, B))
    step = 2 * B / (len(s) - 1)
    return s, phi, (step * step / 8 * 1.001 + 4 * terms * _UNIT) * largest


def _best_constant(k: int, B: float, kappa: float) -> tuple[float, tuple[float, float]]:
    """c, and (a, b) with |phi_k(s) - c| <= a + b s^2, b = a kappa but for the grid: the least a, by bisection."""
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
    a = float(np.max(np.abs(phi - c) / weight)) * (1 + 16 * _UNIT)
    # Between points, phi and a kappa s^2 leave their polygons by at most gap and step^2 / 4 a kappa.
    step = 2 * B / (len(s) - 1)
    return c, (a + gap + step * step / 4 * 1.001 * a * kappa, a * kappa)


def _exchange(B: float, x: np.ndarray, weight: np.ndarray, remainder: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of q in powers of x with max over the grid of |weight q - remainder| least (Remez).

    Ends when the error alternates within 0.1%, and returns the best q seen: q = 0 (Taylor's polynomial) if rounding
    lets nothing better be found.
    """
    n_points = degree + 2
    # Where cos((g + 1) theta + B sin theta) is +-1, x = -cos theta: the extrema of polynomials against e^{-Bx}, which
    # crowd towards x = -1 as B grows. Past B = g + 1 they would leave the right end.
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
            # Weights span e^{2B}. A step of refinement makes elimination stable row by row (Skeel), as small rows need.
            solution = np.linalg.solve(system, target)
            solution += np.linalg.solve(system, target - system @ solution)
        except np.linalg.LinAlgError:
            break
        *q, level = solution
        error = weight * _horner(q, x) - remainder
        sup = np.max(np.abs(error))
        if sup < best_sup:
            best, best_sup = np.array(q), sup
        if sup <= 1.001 * abs(level):
            break
        # One extremum in every run of equal signs; exact arithmetic makes degree + 2 runs, no more and no less.
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
    """Number of terms after which the series of `_taylor_remainder` has a tail below half a roundoff."""
    n = math.ceil(2 * B)
    while n * math.log(B) - math.lgamma(n + 1) > math.log(_UNIT / 4):
        n += 1
    return n


def _chebyshev_points(n: int) -> np.ndarray:
    """-cos(j pi / n) for j = 0..n, symmetric, ends exact."""
    return np.sin(np.arange(-n, n + 1, 2) * (math.pi / (2 * n)))


def _leading_error(B: float, degree: int) -> float:
    """2 (B/2)^{g+1} / (g+1)!, what the minimax error tends to as B -> 0 (an estimate, not a bound)."""
    return 2.0 * (B / 2) ** (degree + 1) / math.factorial(degree + 1)


def _exponential_tail(B: float, n: int) -> float:
    """Bound of sup over [-B, B] of |e^{-s} - its Chebyshev series up to degree n|, n + 2 > B / 2.

    The tail is at most the sum over k > n of 2 I_k(B), with I_k(B) <= (B/2)^k / k! exp(B^2 / (4 (k + 1))).
    """
    growth = B * B / (4 * (n + 2)) - math.log1p(-B / (2 * (n + 2)))
    return math.exp(math.log(2.0) + (n + 1) * math.log(B / 2) - math.lgamma(n + 2) + growth) * (1 + 1e-9)


def _series_length(B: float, degree: int) -> int:
    """A K for which the tail of e^{-s} past K adds little to the error that degree g may have."""
    allowed = 1e-3 * min(_leading_error(B, degree), 1.0) * math.exp(-B)
    n = max(degree, math.ceil(B))
    while _exponential_tail(B, n) > max(allowed, 1e-300):
        n += 1
    return n


def _horner(coefficients, s):
    """sum_t coefficients[t] s^t."""
    value = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        value = value * s + c
    return value
