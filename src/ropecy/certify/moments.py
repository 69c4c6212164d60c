"""Moments of the scores: what the bulk of the keys says of a row's error, where the largest score says too much.

With weights p_i(s), ``|p_i(s) - e^s| <= radius_i(s)``, h_i the sum of radius_i over the keys of row i divided by its
denominator, and T the row that is computed,

    |Attn_ic - T_ic| <= h_i / (1 - h_i) max_j |V_jc - T_ic|,

since sum_j p_i(s_ij) (V_j - T_i) = 0; whole rows too, in any norm, with ||Attn_i - T_i|| and ||V_j - T_i||. The radius
is a polynomial, so h_i takes moments of the scores: the k-th is the share of degree k in the denominator, right for
every mask. Keys' sums do not depend on p_i, so every row has its own, for the size of its own scores, and a long query
spoils no other row.

What was tried and left out, with n = 65,536 and d = 64:

* A degree chosen by errors of whole rows, which bound those of entries 5.7 (uniform V) and 2.1 times (Gaussian) worse.
* A polynomial of degree 2 without the products of the d - r coordinates (eigenvectors of the keys and queries) that
  scores have least of adds ``c_2 sum_j y_j^2`` to h, y their share of a score. At a certificate 1.25 times larger, that
  is 2,145 features down to 93 to 254 where nothing is rotated (eigenvalues falling as 1/k to 1/k^2), to 192 to 605
  where half of the coordinates are, and to 1,064 to 2,100 where all are: rotations average over each pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..approximation import minimax as poly
from ..approximation.minimax import Polynomial
from ..approximation.moment_fit import MomentPolynomial, fit_moments
from ..kernels import _monomials
from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline, Problem
from .scores import Scores
from .values import Values, range_elsewhere

if TYPE_CHECKING:
    from .fourth_moments import Fourth

TILE = 48  # rows, of the exact engine


class RowFits:
    """A polynomial for every row, of one degree: `polynomial.fit_moments` at the row's own bound, rounded up.

    Parameters
    ----------
    sizes : array
        B_i, of any shape.
    degree : int
    kappa : float
        As in `fit_moments`, for scores in units of B_i.
    """

    def __init__(self, sizes: np.ndarray, degree: int, kappa: float) -> None:
        self.sizes, self._past = sizes, ~(sizes <= poly.MAX_BOUND)
        self._any_past = bool(self._past.any())
        # Rows that are normalised are of one size: a look at both ends is ten times cheaper than one at all.
        ends = self._steps(np.array([sizes.min(), sizes.max()])) if sizes.size and not self._any_past else (0, 1)
        if ends[0] == ends[1]:
            there, self._index = ends[:1], np.broadcast_to(np.intp(0), sizes.shape)
        else:
            steps = np.where(self._past, 0, self._steps(sizes))
            there = np.flatnonzero(np.bincount(steps.reshape(-1)))
            place = np.zeros(there.max(initial=0) + 1, np.intp)
            place[there] = np.arange(len(there))
            self._index = place[steps]
        bounds = (poly.B_grid(poly.MAX_BOUND * 2.0 ** (-i / poly.STEPS_PER_OCTAVE) * (1 - 1e-9)) for i in there)
        self._fits = [fit_moments(B, degree, kappa / B**2) for B in bounds]

    @staticmethod
    def _steps(sizes: np.ndarray) -> np.ndarray:
        """How many steps of the grid the bounds are below the largest there is."""
        with np.errstate(divide="ignore", invalid="ignore"):
            # Rounding of the logarithm is far below the 1e-6 of a step that it is kept away from.
            steps = poly.STEPS_PER_OCTAVE * np.log2(poly.MAX_BOUND / sizes) - 1e-6
            return np.clip(steps, 0, 45 * poly.STEPS_PER_OCTAVE).astype(np.intp)

    def of_rows(self, what) -> np.ndarray:
        """what(p) by rows; inf where a row has no polynomial. Not to be written to."""
        if len(self._fits) == 1 and self._fits[0] is not None and not self._any_past:
            return np.broadcast_to(np.float64(what(self._fits[0])), self.sizes.shape)
        found = np.array([math.inf if p is None else what(p) for p in self._fits])[self._index]
        found[self._past] = math.inf
        return found

    def ratio(self, p: MomentPolynomial, dtype: np.dtype) -> np.ndarray | None:
        """What the two top degrees of p are multiplied by to be the row's (c/monomials.h); None where all are p."""
        if all(fit in (None, p) for fit in self._fits):
            return None
        g, ratio = p.degree, np.ones((2, *self._index.shape), dtype)
        below, top = (self.of_rows(lambda fit, t=t: fit.coefficients[t] / p.coefficients[t]) for t in (g - 1, g))
        kept = np.isfinite(top)
        ratio[0, kept] = below[kept]
        ratio[1, kept] = (top[kept] / ratio[0, kept]).astype(dtype)
        return ratio


class Measured(Protocol):
    """What a forward pass measures of each row, (H, G, n) arrays (kernels/c/monomials.h).

    Attributes
    ----------
    moment : array
        The share of the top even degree in the denominator.
    spread : array
        How far the values are from the row at most, in units of their range.
    inverse : array
        One over the denominator; 0 where a row sees no key.
    """

    moment: np.ndarray
    spread: np.ndarray
    inverse: np.ndarray


@dataclass(slots=True)
class MomentRule:
    """A family of polynomials, one for a row, and what certifies rows once they are computed.

    Attributes
    ----------
    polynomial : MomentPolynomial
        That of the largest bound of a row that is kept.
    kappa : float
        As in `RowFits`.
    scores : Scores
        For rows of such bounds.
    fourth : Fourth or None
    n_long : int
        How many rows are past that bound, and exact.
    weights : MomentPolynomial or None
        What backward has in the place of `polynomial`, of the same order. Then all rows have `polynomial` itself, for
        dV has its weights.
    sizes : (H, G, n) array or None
        B_i of all rows; they are measured where it is None.
    """

    polynomial: MomentPolynomial
    kappa: float
    scores: Scores
    fourth: Fourth | None = field(default=None, repr=False)
    n_long: int = 0
    weights: MomentPolynomial | None = None
    sizes: np.ndarray | None = field(default=None, repr=False)

    def fits(self, problem: Problem) -> RowFits:
        """Every row's polynomial."""
        sizes = self.scores.of_rows(problem) if self.sizes is None else self.sizes
        if self.weights is not None:
            sizes = np.maximum(sizes, self.scores.bound)
        return RowFits(sizes, self.polynomial.degree, self.kappa)

    def truncation(self, problem: Problem, fits: RowFits, measured: Measured) -> np.ndarray:
        """Bound of |T_ic - Attn_ic| / range_j(V_jc) by rows, (H, G, n) float64; inf where there is none.

        Parameters
        ----------
        problem : Problem
        fits : RowFits
            The polynomials that the rows were computed with.
        measured : Measured

        Notes
        -----
        Time O(n).
        """
        h, inverse = self._radius(problem, fits, measured), measured.inverse
        # At least half, but where all these values are equal: those of long keys may not be.
        share = np.clip(measured.spread * (1 + 8 * float(np.finfo(problem.dtype).eps)), 0.5, 1.0)
        with np.errstate(all="ignore"):
            return np.where(h < 1, np.where(inverse > 0, h / (1 - h) * share, 0.0), math.inf)

    def gradient(self, problem: Problem, fits: RowFits, measured: Measured) -> np.ndarray:
        """What a row does to the certificate of gradients, (H, G, n) float64: see `gradient_error`."""
        r, mean = self.weights, self._mean(fits, measured.moment)
        unit = problem.unit
        radius = r.radius[0] * mean + 16 * unit * math.exp(r.B) * r.radius[0] * r.B**r.order
        errors = gradient_error(self._radius(problem, fits, measured), radius)
        return np.where(measured.inverse > 0, errors, 0.0)

    def _mean(self, fits: RowFits, moment: np.ndarray) -> np.ndarray:
        """sum_j s^k / Z by rows."""
        with np.errstate(all="ignore"):
            return np.maximum(moment.astype(np.float64) / fits.of_rows(lambda p: p.coefficients[p.order]), 0.0)

    def _radius(self, problem: Problem, fits: RowFits, measured: Measured) -> np.ndarray:
        """The sum over keys of a row's radius by its denominator: (H, G, n)."""
        k, unit, mean = self.polynomial.order, problem.unit, self._mean(fits, measured.moment)
        inverse = measured.inverse
        with np.errstate(all="ignore"):
            # With the rounding of the coefficient that the moment was measured with.
            h = mean * fits.of_rows(lambda p: p.alone + 8 * unit * p.coefficients[k])
            if self.fourth is not None:
                far = far_keys(problem, np.arange(problem.sizes.n))
                kept = problem.mask.kept_before(far, problem.sizes.H)[:, None] * inverse.astype(np.float64)
                fourth = np.divide(mean**2, kept, out=np.zeros_like(mean), where=kept > 0)
                fourth += fits.sizes**4 * self.fourth.of_rows(far)[:, None] * inverse
                both = mean * fits.of_rows(lambda p: p.radius[0] + 8 * unit * p.coefficients[k])
                h = np.minimum(h, both + fourth * fits.of_rows(lambda p: p.radius[1]))
            # Moments are sums that may cancel: their rounding is in units of the largest term, times m / Z.
            return h + fits.of_rows(
                lambda p: 16 * unit * math.exp(p.B) * max(p.alone, p.radius[0] + p.radius[1] * p.B**2) * p.B**k
            )


def gradient_error(h: np.ndarray, h_r: np.ndarray) -> np.ndarray:
    """The least e that `Certificate` may say of gradients, by rows: h and h_r are the radii of p and r, their sum over
    keys divided by the denominator.

    Notes
    -----
    Forward gives Z^ and T^, with |Z / Z^ - 1| <= h; backward's weights are r(s_ij) / Z^_i, off by delta_ij / Z^_i.
    Let a_ij = <dO_i, V_j>, abar_i their mean under P_i, and a^_i = <dO_i, T^_i>, which p > 0 keeps in the range omega_i
    of a_i. Then

        dS^_ij - dS_ij = delta_ij / Z^_i (a_ij - a^_i) + P_ij ((Z / Z^ - 1) (a_ij - abar_i) + Z / Z^ (abar_i - a^_i)),

    with Z / Z^ |abar_i - a^_i| <= h omega_i and sum_j P_ij |a_ij - abar_i| <= omega_i / 2. So dQ_i is off by
    ``c omega_i max ||k_j|| (h_r + 3/2 h)``, keys centred as they are used, and dK, over the keys, by no more than
    ``c omega_i ||q_i|| (h_r + 2 h)`` a row. dV has p's own weights: off by 2 h. e is the least for which these are
    ``c artanh(e) / 2 omega_i max ||k_j||`` and ``2 e / (1 - e)``.
    """
    with np.errstate(all="ignore"):
        zeta = h_r + 2 * h
        return np.where(h < 1, np.maximum(np.tanh(2 * h_r + 3 * h), zeta / (2 + zeta)), math.inf)


def chunk(problem: Outline) -> int:
    """Rows of a causal chunk of the polynomial engine, inside which pairs are exact."""
    return _monomials.blocking(problem.dtype)[1]


def far_keys(problem: Outline, rows: np.ndarray) -> np.ndarray:
    """How many keys these rows see by polynomial: all there are, or, causal, those before their chunk's first."""
    return problem.mask.stops_before_chunk(rows, chunk(problem))


def worst_case(problem: Outline, p: Polynomial) -> np.ndarray:
    """Bound of |T_ic - Attn_ic| / range_j(V_jc) by rows, (H, 1, n) float64, for any scores within p's bound B.

    Notes
    -----
    Weights are off by a factor within 1 +- e in far keys alone, e the error of p. Since the computed weights w^ have
    sum_j w^_j (V_j - T) = 0, T being the computed row, ``Z (Attn - T) = -sum_far delta_j w_j (V_j - T)``. Hence the
    error is at most e phi, phi the far keys' share of the row: no more than that of m_far keys of weight e^B beside
    m_near keys of weight e^-B. It is 0 in the first chunk of a causal problem; where nearly all keys are far, tau(e)
    is less. Time O(n).
    """
    rows = np.arange(problem.sizes.n)
    stops = far_keys(problem, rows), problem.mask.stops(rows)
    far, seen = (problem.mask.kept_before(keys, problem.sizes.H).astype(np.float64) for keys in stops)
    weight = far * math.exp(min(2 * p.B, 700))
    total = weight + (seen - far)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return np.minimum(poly.tau(p.error), p.error * share)[:, None]


def reach(problem: Problem, values: Values, comm: Communicator = SERIAL) -> np.ndarray:
    """middle - value_centre, half, 1 / range of every column, (H, 1 or chunks, 3, d_v) (kernels/c/monomials.h).

    Causal: values of the keys up to a chunk's end are within half of middle, and a row of the chunk sees at least the
    range of the keys before it.
    """
    v, dtype = problem.v, problem.dtype
    low, high = values.low[:, None].astype(np.float64), values.high[:, None].astype(np.float64)
    before = high - low
    if problem.mask.causal:
        least, most = v, v
        if problem.mask.kept is not None:
            keep = problem.mask.kept[..., None]
            least, most = np.where(keep, v, np.inf), np.where(keep, v, -np.inf)
        starts = np.arange(0, v.shape[1], chunk(problem))
        low, high = (X[:, None] for X in range_elsewhere(problem, comm))
        if starts.size:
            low = np.concatenate([low, np.minimum.reduceat(least, starts, axis=1)], axis=1)
            high = np.concatenate([high, np.maximum.reduceat(most, starts, axis=1)], axis=1)
        low = np.minimum.accumulate(low, axis=1).astype(np.float64)
        high = np.maximum.accumulate(high, axis=1).astype(np.float64)
        seen = high >= low
        low, high = np.where(seen, low, 0), np.where(seen, high, 0)
        # What is up to a chunk's end, and what is before it.
        before = (high - low)[:, : max(1, starts.size)]
        low, high = (X[:, -max(1, starts.size) :] for X in (low, high))
    table = np.empty((*low.shape[:2], 3, v.shape[2]), dtype)
    centre = values.middle[:, None].astype(np.float64)
    table[:, :, 0] = 0.5 * low + 0.5 * high - centre
    # Measured from the middle as it is stored.
    middle = table[:, :, 0] + centre
    half = np.maximum(high - middle, middle - low)
    table[:, :, 1] = half
    largest = float(np.finfo(dtype).max) / 4
    with np.errstate(divide="ignore"):
        table[:, :, 2] = np.where(half > 0, np.minimum(1 / before, largest), 0)
    return table
