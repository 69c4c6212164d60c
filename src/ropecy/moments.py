"""Moments of the scores: what the bulk of the keys says of a row's error, where the largest score says too much.

With weights p_i(s), ``|p_i(s) - e^s| <= radius_i(s)``, h_i the sum of radius_i over the keys of row i divided by its
denominator, and T the row that is computed,

    |Attn_ic - T_ic| <= h_i / (1 - h_i) max_j |V_jc - T_ic|,

since sum_j p_i(s_ij) (V_j - T_i) = 0; whole rows too, in any norm, with ||Attn_i - T_i|| and ||V_j - T_i||. The radius
is a polynomial, so h_i takes moments of the scores: the k-th is the share of degree k in the denominator, right for
every mask. Keys' sums do not depend on p_i, so every row has its own, for the size of its own scores, and a long query
spoils no other row.

Fourth moments, of degrees 2 and 3, come from an eigenvalue. For any matrix M, with a = x^T M x and m keys,
s^2 = a + <x x^T, y y^T - M>, hence

    sum_j s_j^4 = 2 a sum_j s_j^2 - m a^2 + sum_j <x x^T, y_j y_j^T - M>^2 <= (sum_j s_j^2)^2 / m + ||x||^4 Lambda,

where Lambda is the largest eigenvalue of the last sum over symmetric matrices. M being the mean over a longer stretch
of keys, and Lambda the sum over that stretch, it holds for the keys that come first as well: causal rows share a few
prefixes. Nothing of this is in the papers.

What was tried and left out, with n = 65,536 and d = 64:

* A degree chosen by errors of whole rows, which bound those of entries 5.7 (uniform V) and 2.1 times (Gaussian) worse.
* A polynomial of degree 2 without the products of the d - r coordinates (eigenvectors of the keys and queries) that
  scores have least of adds ``c_2 sum_j y_j^2`` to h, y their share of a score. At a certificate 1.25 times larger, that
  is 2,145 features down to 93 to 254 where nothing is rotated (eigenvalues falling as 1/k to 1/k^2), to 192 to 605
  where half of the coordinates are, and to 1,064 to 2,100 where all are: rotations average over each pair.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from . import polynomial as poly
from .bounds import Alone, Scores, Values, polynomial_rounding, range_elsewhere
from .engines import exact as exact_engine
from .engines import polynomial as engine
from .kernels import _quartic, _rows
from .polynomial import MomentPolynomial
from .problem import Problem

# Lanczos: steps, and the probability that its bound fails, over all slots of a call.
STEPS = 20
FAILURE = 1e-6

SAMPLED_KEYS = 4096
SAMPLED_ROWS = 2048
# Of the rows, or of the work, may be expected to be exact beside a polynomial; and rows of a tile of the exact engine.
_FEW = 0.03
TILE = 48
_CUT = 0.5  # of the sampled rows, at most, are left out for their size
_SHORTEST_PREFIX = 1536  # of causal keys that have fourth moments of their own


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
        self._fits = [poly.fit_moments(B, degree, kappa / B**2) for B in bounds]

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


@dataclass(slots=True)
class Fourth:
    """Sums over the first keys of a slot that stand in for fourth moments.

    Attributes
    ----------
    stops : (L,) int array
        Increasing; the last is the number of keys.
    largest : (H, L) array
        Lambda of the first `stops` keys, in units of the fourth power of the largest: with B_i in the place of ||x||.
    seed : int
        Of the coins behind it.
    """

    stops: np.ndarray
    largest: np.ndarray
    seed: int

    def of_rows(self, far: np.ndarray) -> np.ndarray:
        """Lambda for rows that see the first `far` keys (n,) by polynomial: (H, n)."""
        return self.largest[:, np.searchsorted(self.stops, far)]


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

    def truncation(
        self, problem: Problem, fits: RowFits, moment: np.ndarray, spread: np.ndarray, inverse: np.ndarray
    ) -> np.ndarray:
        """Bound of |T_ic - Attn_ic| / range_j(V_jc) by rows, (H, G, n) float64; inf where there is none.

        Parameters
        ----------
        problem : Problem
        fits : RowFits
            The polynomials that the rows were computed with.
        moment, spread, inverse : (H, G, n) arrays
            As `engines.polynomial.forward` measures them.

        Notes
        -----
        Time O(n).
        """
        h = self._radius(problem, fits, moment, inverse)
        # At least half, but where all these values are equal: those of long keys may not be.
        share = np.clip(spread * (1 + 8 * float(np.finfo(problem.q.dtype).eps)), 0.5, 1.0)
        with np.errstate(all="ignore"):
            return np.where(h < 1, np.where(inverse > 0, h / (1 - h) * share, 0.0), math.inf)

    def gradient(self, problem: Problem, fits: RowFits, moment: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        """What a row does to the certificate of gradients, (H, G, n) float64: see `gradient_error`."""
        r, mean = self.weights, self._mean(fits, moment)
        unit = float(np.finfo(problem.q.dtype).eps) / 2
        radius = r.radius[0] * mean + 16 * unit * math.exp(r.B) * r.radius[0] * r.B**r.order
        errors = gradient_error(self._radius(problem, fits, moment, inverse), radius)
        return np.where(inverse > 0, errors, 0.0)

    def _mean(self, fits: RowFits, moment: np.ndarray) -> np.ndarray:
        """sum_j s^k / Z by rows."""
        with np.errstate(all="ignore"):
            return np.maximum(moment.astype(np.float64) / fits.of_rows(lambda p: p.coefficients[p.order]), 0.0)

    def _radius(self, problem: Problem, fits: RowFits, moment: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        """The sum over keys of a row's radius by its denominator: (H, G, n)."""
        k, unit, mean = self.polynomial.order, float(np.finfo(problem.q.dtype).eps) / 2, self._mean(fits, moment)
        with np.errstate(all="ignore"):
            # With the rounding of the coefficient that the moment was measured with.
            h = mean * fits.of_rows(lambda p: p.alone + 8 * unit * p.coefficients[k])
            if self.fourth is not None:
                far = far_keys(problem, np.arange(problem.q.shape[2]))
                kept = kept_before(problem, far)[:, None] * inverse.astype(np.float64)
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
    of a_i. Then (certificates.md 2)

        dS^_ij - dS_ij = delta_ij / Z^_i (a_ij - a^_i) + P_ij ((Z / Z^ - 1) (a_ij - abar_i) + Z / Z^ (abar_i - a^_i)),

    with Z / Z^ |abar_i - a^_i| <= h omega_i and sum_j P_ij |a_ij - abar_i| <= omega_i / 2. So dQ_i is off by
    ``c omega_i max ||k_j|| (h_r + 3/2 h)``, keys centred as they are used, and dK, over the keys, by no more than
    ``c omega_i ||q_i|| (h_r + 2 h)`` a row. dV has p's own weights: off by 2 h. e is the least for which these are
    ``c artanh(e) / 2 omega_i max ||k_j||`` and ``2 e / (1 - e)``.
    """
    with np.errstate(all="ignore"):
        zeta = h_r + 2 * h
        return np.where(h < 1, np.maximum(np.tanh(2 * h_r + 3 * h), zeta / (2 + zeta)), math.inf)


def far_keys(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """How many keys these rows see by polynomial: all there are, or, causal, those before their chunk's first."""
    n_k = problem.k.shape[1]
    if problem.hi is None:
        return np.full(len(rows), n_k)
    chunk = engine.chunk(problem)
    return np.clip((rows + problem.q_offset) // chunk * chunk, 0, n_k)


def kept_before(problem: Problem, ends: np.ndarray) -> np.ndarray:
    """How many of the first `ends` keys key_mask keeps, (H, len(ends))."""
    if problem.key_mask is None:
        return np.broadcast_to(ends, (problem.k.shape[0], len(ends)))
    return np.pad(np.cumsum(problem.key_mask, axis=1), ((0, 0), (1, 0)))[:, ends]


def reach(problem: Problem, values: Values, chunk: int, ranks: Any = Alone) -> np.ndarray:
    """middle - value_centre, half, 1 / range of every column, (H, 1 or chunks, 3, d_v) (kernels/c/monomials.h).

    Causal: values of the keys up to a chunk's end are within half of middle, and a row of the chunk sees at least the
    range of the keys before it.
    """
    v, dtype = problem.v, problem.q.dtype
    low, high = values.low[:, None].astype(np.float64), values.high[:, None].astype(np.float64)
    before = high - low
    if problem.hi is not None:
        least, most = v, v
        if problem.key_mask is not None:
            keep = problem.key_mask[..., None]
            least, most = np.where(keep, v, np.inf), np.where(keep, v, -np.inf)
        starts = np.arange(0, v.shape[1], chunk)
        low, high = (X[:, None] for X in range_elsewhere(problem, ranks))
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


def steps(problem: Problem, n: int, n_k: int) -> tuple[int, int]:
    """Of so many rows and keys, each of how many is in a `Sample`."""
    H, G = problem.q.shape[:2]
    return max(1, n // max(16, SAMPLED_ROWS // (H * G))), max(1, n_k // SAMPLED_KEYS)


class Sample:
    """What some rows and some keys say of moments before the work: for choosing a degree, not for certifying one.

    Rows are every so many, and those that are longer than all of these; over ranks, the former alone.

    Attributes
    ----------
    index, weight, sizes : (R,) arrays
        Flat indices into (H, G, n), increasing, how many rows each stands for, and the rows' bounds B_i.
    n_rows : int
        How many rows there are.
    every : (H, G, n) array or None
        The bounds of all rows; None over ranks.
    """

    def __init__(self, problem: Problem, scores: Scores, values: Values, ranks: Any = Alone) -> None:
        H, G, n, d = problem.q.shape
        lengths = ranks.gather((n, problem.k.shape[1]))
        total, n_k = np.sum(lengths, axis=0)
        row_step, key_step = steps(problem, total, n_k)
        own, count = self._some_keys(problem, scores, key_step)
        self._y, count = ranks.joined(own, 1), np.maximum(ranks.total(count), 1)
        rows = _quartic.Rows(self._y, None, None, 1.0, problem.threads)
        self._products = rows.apply([self._y.shape[1]], None)[0][:, 0] / count[:, None, None]

        sizes = scores.of_rows(problem).reshape(H * G, n)
        some = (np.arange(H * G)[:, None] * n + np.arange(0, n, row_step)).reshape(-1)
        few, n_longer = np.empty(0, int), 0
        if ranks is Alone:
            longer = np.flatnonzero(sizes > 1.01 * sizes.reshape(-1)[some].max(initial=0))
            few, n_longer = longer[:: max(1, len(longer) // SAMPLED_ROWS)], len(longer)
        n_some = sum(ranks.gather(len(some)))
        weights = (H * G * total - n_longer) / max(1, n_some), n_longer / max(1, len(few))
        own = np.concatenate([some, few])
        lane, row = np.divmod(own, max(1, n))
        first = sum(rows for rows, _ in lengths[: ranks.rank])
        # A sampled row: its place among all, how many it stands for, its bound.
        weights = np.repeat(weights, [len(some), len(few)])
        sample = np.array([lane * total + first + row, weights, sizes.reshape(-1)[own]])
        sample, x = ranks.joined(sample, 1), ranks.joined(problem.q.reshape(-1, d)[own], 0)
        order = np.argsort(sample[0], kind="stable")
        index, self.weight, self.sizes = sample[:, order]
        self.index = index.astype(np.intp)
        self.n_rows = int(H * G * total)
        self.every = sizes.reshape(H, G, n) if ranks is Alone else None
        self._head, self._row = self.index // max(1, G * total), self.index % max(1, total)
        self._x = np.multiply(x[order], scores.q_factor, dtype=np.float64)
        self.second, self.first = np.empty((2, len(self.index)))
        mean = _rows.columns(self._y, None, problem.threads)[0] / count[:, None]
        for head, rows in self._by_head():
            x = self._x[rows]
            self.second[rows] = _rows.quadratic(x[None], self._products[head : head + 1], problem.threads)[0]
            self.first[rows] = x @ mean[head]
        self._share = values.share
        self._means: dict[int, np.ndarray] = {}
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    @staticmethod
    def _some_keys(problem: Problem, scores: Scores, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Every so many keys as they are used, and of how many a slot keeps."""
        y = problem.k[:, ::step]
        y = (y if scores.centre is None else y - scores.centre[:, None]) * problem.k.dtype.type(scores.k_factor)
        count = np.full(len(y), y.shape[1])
        if problem.key_mask is not None:
            mask = problem.key_mask[:, ::step]
            y, count = y * mask[..., None], mask.sum(axis=1)
        return np.ascontiguousarray(y), count

    def _by_head(self) -> Iterator[tuple[int, slice]]:
        cuts = np.searchsorted(self._head, np.arange(len(self._y) + 1))
        return ((head, slice(*ends)) for head, ends in enumerate(itertools.pairwise(cuts)))

    def longer(self, B: float) -> int:
        """How many rows are past that bound: over ranks, about."""
        if self.every is None:
            return math.ceil(self.weight[self.sizes > B].sum())
        return int(np.count_nonzero(self.every > B))

    def risk(self, problem: Problem, scores: Scores, inverse: np.ndarray, ranks: Any = Alone) -> np.ndarray:
        """What errors of rows grow with, about: the root of their far keys, for errors of both signs add up, times the
        second moment by the denominator.

        (H, G, n). inf where the denominator is not positive though the row sees keys.
        """
        H, G, n, d = problem.q.shape
        products = self._products * scores.q_factor**2
        second = _rows.quadratic(problem.q.reshape(H, G * n, d), products, problem.threads).reshape(H, G, n)
        n_k = problem.k.shape[1]
        kept = np.full((H, n_k), 1) if problem.key_mask is None else problem.key_mask
        kept = np.pad(np.cumsum(kept, axis=1), ((0, 0), (1, 0)))
        others = ranks.gather((n_k, kept[:, -1]))
        if problem.hi is None:
            far = sum(length for length, _ in others)
            sees = sum(count for _, count in others)[:, None, None] > 0
        else:
            ends = np.arange(n) + problem.q_offset + problem.hi + 1
            before = others[: ranks.rank]
            far = sum(length for length, _ in before) + far_keys(problem, np.arange(n))
            seen = kept[:, np.clip(ends, 0, n_k)] + sum((count for _, count in before), np.zeros(H, int))[:, None]
            sees = seen[:, None] > 0
        return np.where(inverse > 0, np.sqrt(far) * second * inverse, np.where(sees, np.inf, 0.0))

    @cached_property
    def _squares(self) -> list[np.ndarray]:
        """Scores of a few rows and keys, squared, by the row's mean of these: an array a head."""
        found = []
        for head, rows in self._by_head():
            x, y = self._x[rows], self._y[head, :: max(1, self._y.shape[1] // 1024)]
            square = (x[:: max(1, len(x) // 64)] @ y.T.astype(np.float64)) ** 2
            found.append(square / np.mean(square, axis=1, keepdims=True))
        return found

    def _tail(self, k: int) -> float:
        """max_i m_k(i) / m_2(i)^(k/2) over a few rows and keys."""
        found = 1.0
        with np.errstate(all="ignore"):
            for square in self._squares if k > 2 else []:
                power = square
                for _ in range(k // 2 - 2):  # pow is fifty times slower than a product
                    power = power * square
                found = np.nanmax(np.einsum("rj,rj->r", power, square) / square.shape[1], initial=found)
        return float(found)

    def fits(self, degree: int, kappa: float, least: float = 0.0) -> RowFits:
        """The polynomials of the sampled rows, whose bounds are taken to be at least that."""
        return RowFits(np.maximum(self.sizes, least), degree, kappa)

    def mean(self, problem: Problem, order: int) -> np.ndarray:
        """About the sum of scores to the power `order` by the denominator, of sampled rows."""
        if order not in self._means:
            far, seen = self._keys_of(problem)
            with np.errstate(over="ignore"):
                mean = far / np.maximum(seen, 1) * self._tail(order) * self.second ** (order // 2)
                self._means[order] = mean * np.exp(-self.first)
        return self._means[order]

    def _keys_of(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        """How many keys sampled rows see by polynomial, and how many in all."""
        if self._seen is None:
            self._seen = far_keys(problem, self._row), seen_keys(problem, self._row)
        return self._seen

    def radius(self, problem: Problem, fits: RowFits, order: int, fourth: Fourth | None = None) -> np.ndarray:
        """About a sampled row's sum of radii by its denominator; fourth None stands for Gaussian scores."""
        mean = self.mean(problem, order)
        with np.errstate(all="ignore"):
            h = fits.of_rows(lambda p: p.alone) * mean
            b = fits.of_rows(lambda p: p.radius[1])
            if np.any(b > 0):
                m4 = 3 * self.second**2
                if fourth is not None:
                    far, _ = self._keys_of(problem)
                    largest = fourth.largest[self._head, np.searchsorted(fourth.stops, far)]
                    m4 = self.second**2 + fits.sizes**4 * largest / np.maximum(far, 1)
                h = np.fmin(h, (fits.of_rows(lambda p: p.radius[0]) + b * m4 / self.second) * mean)
        return h

    def truncation(self, h: np.ndarray) -> np.ndarray:
        """About what `MomentRule.truncation` makes of such radii."""
        with np.errstate(all="ignore"):
            return np.where(h < 1, h / np.maximum(1 - h, 1e-300) * min(1.0, 1.1 * self._share), math.inf)

    def kept(
        self, problem: Problem, values: Values, eps: float, B: float, h: np.ndarray, h_r: np.ndarray | None = None
    ) -> tuple[float, int, float, float] | None:
        """Where rows within B are kept: the part of all exact work that the others are, how many of these there may be,
        and the truncation of the kept and of their gradient. None where others are too many.

        Rows fail that are past the bound, of which all are known but over ranks, and rows whose truncation is past what
        rounding leaves of eps, for which the sample speaks, whose radii are h and in backward h_r.
        """
        G, n = problem.q.shape[1:3]
        grad, total = h_r is not None, self.n_rows
        allowed = eps - polynomial_rounding(problem, B, values)
        expected = self.truncation(h)
        of_gradient = gradient_error(h, h_r) if grad else np.zeros_like(h)
        long = self.sizes > B
        others = ~(long | ((expected <= allowed) & (of_gradient <= 2 * allowed)))
        pairs = max(1.0, len(problem.k) * G * exact_engine.pairs(problem))
        work = self.weight * self._keys_of(problem)[1] / pairs
        if problem.hi is not None:
            # A row that fails alone costs a tile.
            rows, beside = long | others, np.zeros(len(long), bool)
            beside[1:] = rows[:-1]
            beside[:-1] |= rows[1:]
            work *= np.where(beside, 1.0, TILE)
        share = work[long].sum() + 1.5 * work[others].sum()
        count = self.longer(B) + 1.5 * self.weight[others].sum()
        if count > _FEW * total and share > _FEW:
            return None
        truncation = (float(np.max(errors, where=~(long | others), initial=0.0)) for errors in (expected, of_gradient))
        # Where too many fail, all is done again: room for what a sample misses, above all the first rows where causal.
        return float(share), math.ceil(count + total / 256) + TILE, *truncation

    def cuts(self, bound: float) -> list[float]:
        """Bounds of the rows that may be kept: `bound`, and lower ones that leave out 1, 2, 4, ... sampled rows."""
        sizes = np.sort(self.sizes)[::-1]
        found = [bound]
        for count in 2 ** np.arange(int(_CUT * len(sizes)).bit_length()):
            # Less than a step of the grid changes nothing.
            if sizes[count] < 0.97 * found[-1]:
                found.append(float(sizes[count]))
        return [B for B in found if B <= poly.MAX_BOUND]

    def kappa(self) -> float:
        """B_i^2 over three times the second moment for the worst row: the ratio of the second moment and the fourth,
        in units of B_i, were scores Gaussian; rounded to a power of 2.
        """
        worst = int(self.second.argmax())
        second, size = float(self.second[worst]), float(self.sizes[worst])
        if not 0 < second < math.inf or not 0 < size < math.inf:
            return 1.0
        return 2.0 ** min(40, max(-1, round(2 * math.log2(size) - math.log2(3 * second))))


def seen_keys(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """How many keys these rows see, masked or not."""
    n_k = problem.k.shape[1]
    if problem.hi is None:
        return np.full(len(rows), n_k)
    return np.clip(rows + problem.q_offset + problem.hi + 1, 0, n_k)


def prefixes(problem: Problem) -> np.ndarray:
    """How many keys have fourth moments together: all, and, causal, halves of halves too."""
    n_k, chunk = problem.k.shape[1], engine.chunk(problem)
    stops = [n_k]
    while problem.hi is not None and stops[-1] > 2 * _SHORTEST_PREFIX:
        stops.append(-(-stops[-1] // (2 * chunk)) * chunk)
    return np.array(stops[::-1])


def fourth_moments(problem: Problem, scores: Scores, seed: int | None) -> Fourth:
    """Lambda >= the sum over j of <X, y_j y_j^T - mean>^2, for all symmetric X of norm 1, of each stretch of keys.

    Notes
    -----
    20 steps of Lanczos for X -> sum_j (y_j^T X y_j - mean) y_j y_j^T on symmetric matrices from a Gaussian start. Its
    largest Ritz value theta has theta >= (1 - e) Lambda for all data but with probability 1.648 sqrt(N)
    exp(-sqrt(e) (2 k - 1)) over its own coins, N = d (d + 1) / 2 (Kuczynski and Wozniakowski 1992): e is where that is
    1e-6, shared by the slots and stretches. Time 40 n_k d^2 in products of matrices, twice that where causal; memory
    2 n_k d.
    """
    if seed is None:
        seed = secrets.randbits(63)
    rng = np.random.default_rng(seed)
    H, _, d = problem.k.shape
    stops = prefixes(problem)
    rows = _quartic.Rows(problem.k, problem.key_mask, scores.centre, scores.k_factor, problem.threads)
    steps = min(STEPS, d * (d + 1) // 2)
    theta = _largest_variance(rows, stops, kept_before(problem, stops), steps, rng)
    # More steps than dimensions change nothing, so the statement for STEPS holds for fewer too.
    room = math.log(1.648 * math.sqrt(d * (d + 1) / 2) * theta.size / FAILURE) / (2 * STEPS - 1)
    size = (scores.keys * abs(scores.k_factor))[:, None] ** 4
    largest = np.divide(theta / (1 - room * room), size, out=np.zeros_like(theta), where=size > 0)
    # Products are in the data's precision.
    return Fourth(stops, largest + 64 * float(np.finfo(problem.k.dtype).eps) * stops, seed)


def _largest_variance(rows: _quartic.Rows, stops: np.ndarray, kept: np.ndarray, steps: int, rng) -> np.ndarray:
    """The largest Ritz values after `steps` steps of Lanczos, every vector made orthogonal to all before it: (H, L)."""
    products = rows.apply(stops, None)[0]
    H, L, d, _ = products.shape
    # With einsum: products of BLAS leave threads behind that spin.
    start = rng.standard_normal((H, L, d, d))
    X = start + start.swapaxes(2, 3)  # Gaussian in an orthonormal basis of symmetric matrices
    X /= np.linalg.norm(X, axis=(2, 3), keepdims=True)
    basis, T = np.empty((steps, H, L, d, d)), np.zeros((H, L, steps, steps))
    for k in range(steps):
        basis[k] = X
        image, total = rows.apply(stops, X)
        image -= (total / np.maximum(kept, 1))[..., None, None] * products
        T[..., k, k] = np.einsum("hlab,hlab->hl", image, X)
        for _ in range(2):
            part = np.einsum("khlab,hlab->khl", basis[: k + 1], image)
            image -= np.einsum("khl,khlab->hlab", part, basis[: k + 1])
        norm = np.sqrt(np.einsum("hlab,hlab->hl", image, image))
        # A space that is exhausted goes on with 0.
        norm[norm <= 1e-14 * np.abs(T[..., 0, 0])] = 0
        if k + 1 < steps:
            T[..., k, k + 1] = T[..., k + 1, k] = norm
            image += image.swapaxes(2, 3)
            X = 0.5 * np.divide(image, norm[..., None, None], out=np.zeros_like(image), where=norm[..., None, None] > 0)
    return np.maximum(np.linalg.eigvalsh(T)[..., -1], 0)
