"""Certificates from moments of the scores: most scores of a row are far below the largest one, which bounds them all.

Let p_i be the polynomial that row i has in the place of exp, with ``|p_i(s) - e^s| <= radius_i(s)``; h_i the sum of
radius_i over the keys of row i, divided by the row's denominator sum_j p_i(s_ij); and T_i the row that is computed.
Then

    |Attn_ic - T_ic| <= h_i / (1 - h_i) max_j |V_jc - T_ic|,

since sum_j p_i(s_ij) (V_j - T_i) = 0. The same holds for whole rows in any norm, with ||Attn_i - T_i|| and
||V_j - T_i||. The radius is a polynomial in s, so h_i needs only moments sum_j s_ij^k. The k-th moment is what the
terms of degree k add to the denominator, divided by their coefficient: the forward pass has it for every mask. The sums
over keys do not depend on p_i, so every row can have a polynomial for the size of its own scores, and one long query
does not make other rows less accurate.

Two things were tried with n = 65,536 and d = 64 and left out:

* Choosing the degree by errors of whole rows. They bound the errors of entries worse: by 5.7 times where the values are
  uniform, by 2.1 times where they are Gaussian.
* A polynomial of degree 2 that leaves out the products of the d - r coordinates (along eigenvectors of keys and
queries)
  that add least to the scores. With y_j the part of a score that they make, this adds ``c_2 sum_j y_j^2`` to h. If the
  certificate may be 1.25 times larger, 2,145 features become 93 to 254 without rotations (for eigenvalues falling as
  1/k to 1/k^2), 192 to 605 where half of the coordinates are rotated, but 1,064 to 2,100 where all are, because
  rotations average over the two coordinates of each pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

TILE = 48  # how many rows the exact engine computes together


class RowFits:
    """A polynomial of one degree for every row: that of `fit_moments` for the row's own bound, rounded up to a grid.

    Parameters
    ----------
    sizes : array
        B_i, the bound of the scores of each row, of any shape.
    degree : int
    kappa : float or array
        As in `fit_moments`, but for scores in units of B_i; one for all rows, or an array that is broadcast to `sizes`.
    """

    def __init__(self, sizes: np.ndarray, degree: int, kappa: float | np.ndarray) -> None:
        self.sizes, self._past = sizes, ~(sizes <= poly.MAX_BOUND)
        self._any_past = bool(self._past.any())
        # Queries that were normalised have one size. That is seen from the smallest and the largest, which is ten times
        # cheaper than placing every row on the grid.
        kappas, of_kappa = np.ravel(kappa)[:1], 0
        if np.any(kappa != kappas):
            kappas, of_kappa = np.unique(kappa, return_inverse=True)
            of_kappa = of_kappa.reshape(np.shape(kappa))
        ends = self._steps(np.array([sizes.min(), sizes.max()])) if sizes.size and not self._any_past else (0, 1)
        if ends[0] == ends[1] and len(kappas) == 1:
            there, self._index = ends[:1], np.broadcast_to(np.intp(0), sizes.shape)
        else:
            # A kind of rows is a step of the grid and a kappa.
            steps = np.where(self._past, 0, self._steps(sizes))
            kinds = steps if len(kappas) == 1 else steps * len(kappas) + of_kappa
            there = np.flatnonzero(np.bincount(kinds.reshape(-1)))
            place = np.zeros(there.max(initial=0) + 1, np.intp)
            place[there] = np.arange(len(there))
            self._index = place[kinds]
        self._fits = []
        for step, which in zip(*np.divmod(there, len(kappas)), strict=True):
            B = poly.B_grid(poly.MAX_BOUND * 2.0 ** (-step / poly.STEPS_PER_OCTAVE) * (1 - 1e-9))
            self._fits.append(fit_moments(B, degree, float(kappas[which]) / B**2))

    @staticmethod
    def _steps(sizes: np.ndarray) -> np.ndarray:
        """How many steps of the grid of bounds `sizes` lie below the largest one, MAX_BOUND, rounded down."""
        with np.errstate(divide="ignore", invalid="ignore"):
            # The 1e-6 of a step makes sure that rounding of the logarithm never gives a bound below the row's own.
            steps = poly.STEPS_PER_OCTAVE * np.log2(poly.MAX_BOUND / sizes) - 1e-6
            return np.clip(steps, 0, 45 * poly.STEPS_PER_OCTAVE).astype(np.intp)

    def of_rows(self, what) -> np.ndarray:
        """what(p) for the polynomial p of each row, read-only, in the shape of `sizes`; inf for a row that has none."""
        if len(self._fits) == 1 and self._fits[0] is not None and not self._any_past:
            return np.broadcast_to(np.float64(what(self._fits[0])), self.sizes.shape)
        found = np.array([math.inf if p is None else what(p) for p in self._fits])[self._index]
        found[self._past] = math.inf
        return found

    def ratio(self, polynomials: Sequence[MomentPolynomial], dtype: np.dtype) -> np.ndarray | None:
        """Factors that turn the two top coefficients of a slot's polynomial into those of each row, (2, H, G, n) (see
        c/monomials.h); `polynomials` are one for all slots or one for each.

        The second factor is relative to the first. None is returned where every row has that of all slots.
        """
        p, one = polynomials[0], len(set(polynomials)) == 1
        if one and all(fit in (None, p) for fit in self._fits):
            return None
        g, ratio = p.degree, np.ones((2, *self._index.shape), dtype)
        if one:
            below, top = (self.of_rows(lambda fit, t=t: fit.coefficients[t] / p.coefficients[t]) for t in (g - 1, g))
        else:
            own = (of_each(polynomials, lambda p, t=t: p.coefficients[t]) for t in (g - 1, g))
            fits = (self.of_rows(lambda fit, t=t: fit.coefficients[t]) for t in (g - 1, g))
            below, top = (X / of_slot for X, of_slot in zip(fits, own, strict=True))
        kept = np.isfinite(top)
        ratio[0, kept] = below[kept]
        ratio[1, kept] = (top[kept] / ratio[0, kept]).astype(dtype)
        return ratio


def of_each(polynomials: Sequence[MomentPolynomial], what: Callable[[MomentPolynomial], float]) -> np.ndarray:
    """what(p) for the polynomial p of each slot, (H, 1, 1), or (1, 1, 1) where all slots have one."""
    return np.array([what(p) for p in polynomials], np.float64)[:, None, None]


class Measured(Protocol):
    """What a forward pass measures of each row, (H, G, n) arrays (kernels/c/monomials.h).

    Attributes
    ----------
    moment : array
        What the terms of the top even degree add to the denominator, divided by the denominator.
    spread : array
        The largest distance of a value from the computed row, column by column, in units of the range of the column.
    inverse : array
        One over the denominator; 0 where a row sees no key.
    """

    moment: np.ndarray
    spread: np.ndarray
    inverse: np.ndarray


@dataclass(slots=True)
class MomentRule:
    """The choice of a polynomial for each row, and the bound of the error of each row after it is computed.

    Attributes
    ----------
    polynomials : tuple of MomentPolynomial
        One for all slots, or one for each, of one degree: that for the largest bound B among the rows of the slot that
        the polynomial engine keeps.
    kappa : float or (H,) array
        As in `RowFits`, for all slots or for each.
    scores : Scores
        Bounds and factors for the rows whose bound is at most the B of their slot.
    fourth : Fourth or None
        Bounds of fourth moments, if they are used.
    n_long : int
        How many rows have a bound past B; they are computed exactly.
    weights : tuple of MomentPolynomial or None
        The polynomials that backward has for its weights, of the same order; None without gradients. If they are given,
        all rows have those of `polynomials` in forward, because dV is made with the weights of forward.
    sizes : (H, G, n) array or None
        B_i of all rows; they are measured where it is None.
    """

    polynomials: tuple[MomentPolynomial, ...]
    kappa: float | np.ndarray
    scores: Scores
    fourth: Fourth | None = field(default=None, repr=False)
    n_long: int = 0
    weights: tuple[MomentPolynomial, ...] | None = None
    sizes: np.ndarray | None = field(default=None, repr=False)

    @property
    def degree(self) -> int:
        """The degree of the polynomials of forward."""
        return self.polynomials[0].degree

    @property
    def order(self) -> int:
        """The order of all polynomials."""
        return self.polynomials[0].order

    def fits(self, problem: Problem) -> RowFits:
        """The polynomial of every row."""
        sizes = self.scores.of_rows(problem) if self.sizes is None else self.sizes
        if self.weights is not None:
            sizes = np.maximum(sizes, self.scores.of_slots[:, None, None])
        return RowFits(sizes, self.degree, np.reshape(self.kappa, (-1, 1, 1)))

    def truncation(self, problem: Problem, fits: RowFits, measured: Measured) -> np.ndarray:
        """A bound of |T_ic - Attn_ic| / range_j(V_jc) for each row, (H, G, n) float64; inf where there is none.

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
        # A row is at least half of the range away from some value. Less was measured only where the values seen are all
        # equal, and then those of keys that were left out may still differ.
        share = np.clip(measured.spread * (1 + 8 * float(np.finfo(problem.dtype).eps)), 0.5, 1.0)
        with np.errstate(all="ignore"):
            return np.where(h < 1, np.where(inverse > 0, h / (1 - h) * share, 0.0), math.inf)

    def gradient(self, problem: Problem, fits: RowFits, measured: Measured) -> np.ndarray:
        """The error of gradients that each row accounts for, (H, G, n) float64, by `gradient_error`."""
        mean, factor = self._mean(fits, measured.moment), 16 * problem.unit
        radius = of_each(self.weights, lambda r: r.radius[0]) * mean
        radius = radius + of_each(self.weights, lambda r: factor * math.exp(r.B) * r.radius[0] * r.B**r.order)
        errors = gradient_error(self._radius(problem, fits, measured), radius)
        return np.where(measured.inverse > 0, errors, 0.0)

    def _mean(self, fits: RowFits, moment: np.ndarray) -> np.ndarray:
        """The moment sum_j s_ij^k divided by the denominator, for each row; k is the order of the polynomials."""
        with np.errstate(all="ignore"):
            return np.maximum(moment.astype(np.float64) / fits.of_rows(lambda p: p.coefficients[p.order]), 0.0)

    def _radius(self, problem: Problem, fits: RowFits, measured: Measured) -> np.ndarray:
        """h_i of the module's docstring: the sum over keys of a row's radius divided by its denominator, (H, G, n)."""
        k, unit, mean = self.order, problem.unit, self._mean(fits, measured.moment)
        inverse = measured.inverse
        with np.errstate(all="ignore"):
            # The second term covers the rounding of the coefficient that the moment was divided by.
            h = mean * fits.of_rows(lambda p: p.alone + 8 * unit * p.coefficients[k])
            if self.fourth is not None:
                far = far_keys(problem, np.arange(problem.sizes.n))
                kept = problem.mask.kept_before(far, problem.sizes.H)[:, None] * inverse.astype(np.float64)
                fourth = np.divide(mean**2, kept, out=np.zeros_like(mean), where=kept > 0)
                fourth += fits.sizes**4 * self.fourth.of_rows(far)[:, None] * inverse
                both = mean * fits.of_rows(lambda p: p.radius[0] + 8 * unit * p.coefficients[k])
                h = np.minimum(h, both + fourth * fits.of_rows(lambda p: p.radius[1]))
            # Moments are sums whose terms may cancel: their rounding is relative to the largest term, times m / Z.
            return h + fits.of_rows(
                lambda p: 16 * unit * math.exp(p.B) * max(p.alone, p.radius[0] + p.radius[1] * p.B**2) * p.B**k
            )


def gradient_error(h: np.ndarray, h_r: np.ndarray) -> np.ndarray:
    """The least e that a `Certificate` can state for the gradients, for each row.

    `h` and `h_r` are the radii of forward's polynomial p and backward's r, summed over the keys of the row and divided
    by its denominator.

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
    """How many rows a causal chunk of the polynomial engine has; pairs inside a chunk are computed exactly."""
    return _monomials.chunk_of(problem.dtype, problem.sizes.d, problem.mask.causal)


def far_keys(problem: Outline, rows: np.ndarray) -> np.ndarray:
    """How many keys these rows see through the polynomial: all keys, or, if causal, those before the row's chunk."""
    return problem.mask.stops_before_chunk(rows, chunk(problem))


def worst_case(problem: Outline, polynomials: Sequence[Polynomial]) -> np.ndarray:
    """A bound of |T_ic - Attn_ic| / range_j(V_jc) for each row, (H, 1, n) float64, for any scores within the bound B of
    the slot's polynomial p; `polynomials` are one for all slots or one for each.

    Where no key is hidden and there is one polynomial, all slots have the same, and H is 1.

    Notes
    -----
    Only the weights of far keys, those seen through p, are wrong: by a factor 1 + delta_j with |delta_j| <= e, the
    relative error of p. The computed weights w^ and the computed row T satisfy sum_j w^_j (V_j - T) = 0, so
    ``Z (Attn - T) = -sum_far delta_j w_j (V_j - T)``. Hence the error is at most e phi, where phi is the part of the
    row's weight that far keys have. It is largest where each far key weighs e^B and each near key e^-B. The bound is 0
    in the first chunk of a causal problem. Where nearly all keys are far, tau(e) is the smaller bound. Time O(n).
    """
    rows = np.arange(problem.sizes.n)
    stops = far_keys(problem, rows), problem.mask.stops(rows)
    slots = len(polynomials) if problem.mask.kept is None else problem.sizes.H
    far, seen = (problem.mask.kept_before(keys, slots).astype(np.float64) for keys in stops)
    error, heaviest, largest = (
        np.array([[of(p)] for p in polynomials])
        for of in (lambda p: p.error, lambda p: math.exp(min(2 * p.B, 700)), lambda p: poly.tau(p.error))
    )
    # In place: fresh memory for each of these took longer than the arithmetic.
    seen -= far
    weight = np.multiply(far, heaviest, out=far)
    total = np.add(seen, weight, out=seen)
    share = np.divide(weight, total, out=weight, where=total > 0)
    share *= error
    return np.minimum(share, largest, out=share)[:, None]


def value_distances(problem: Problem, values: Values, comm: Communicator = SERIAL) -> np.ndarray:
    """How far a column's values may be from a row, (H, 1 or chunks, 3, d_v), as kernels/c/monomials.h wants it.

    The three numbers of each column are: the middle of its values less `values.middle`; the largest distance of a value
    from that middle; and one over the range. In a causal problem each chunk has its own: the first two are of the keys
    up to the chunk's end, the range is that of the keys before the chunk, which every row of it sees.
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
        # `before` is the range of the keys before each chunk; low and high are of the keys up to its end.
        before = (high - low)[:, : max(1, starts.size)]
        low, high = (X[:, -max(1, starts.size) :] for X in (low, high))
    table = np.empty((*low.shape[:2], 3, v.shape[2]), dtype)
    centre = values.middle[:, None].astype(np.float64)
    table[:, :, 0] = 0.5 * low + 0.5 * high - centre
    # Distances are measured from the middle as it was rounded when it was stored.
    middle = table[:, :, 0] + centre
    half = np.maximum(high - middle, middle - low)
    table[:, :, 1] = half
    largest = float(np.finfo(dtype).max) / 4
    with np.errstate(divide="ignore"):
        table[:, :, 2] = np.where(half > 0, np.minimum(1 / before, largest), 0)
    return table
