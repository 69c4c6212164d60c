"""Moments of the scores: what the bulk of the keys says of a row's error, where the largest score says too much.

With weights p(s), ``|p(s) - e^s| <= radius(s)``, h_i the sum of radius over the keys of row i divided by its
denominator, and T the row that is computed,

    |Attn_ic - T_ic| <= h_i / (1 - h_i) max_j |V_jc - T_ic|,

since sum_j p(s_ij) (V_j - T_i) = 0. The radius is a polynomial, so h_i takes moments of the scores: the k-th is the
share of degree k in the denominator, right for every mask, and the fourth is bounded by the largest eigenvalue of the
covariance of the matrices k_j k_j^T. Nothing of this is in the papers.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field

import numpy as np

from .bounds import Scores, Values, kept_keys
from .polynomial import MomentPolynomial
from .problem import Problem

# Lanczos: steps, and the probability that its bound fails, over all slots of a call.
STEPS = 20
FAILURE = 1e-6

SAMPLED_KEYS = 4096
SAMPLED_ROWS = 2048
_BLOCK = 2048


@dataclass(slots=True)
class MomentRule:
    """A polynomial, and what certifies its rows once they are computed.

    Attributes
    ----------
    polynomial : MomentPolynomial
    fourth : (H,) array or None
        Bound of the variance over j of <X, y_j y_j^T>, ||X||_F = 1, y the keys as used: for fourth moments.
    seed : int or None
        Of the coins behind `fourth`.
    weights : MomentPolynomial or None
        What backward has in the place of `polynomial`, of the same order.
    """

    polynomial: MomentPolynomial
    fourth: np.ndarray | None = field(default=None, repr=False)
    seed: int | None = None
    weights: MomentPolynomial | None = None

    def truncation(
        self, problem: Problem, scores: Scores, moment: np.ndarray, spread: np.ndarray, inverse: np.ndarray
    ) -> np.ndarray:
        """Bound of |T_ic - Attn_ic| / range_j(V_jc) by rows, (H, G, n) float64; inf where there is none.

        Parameters
        ----------
        problem : Problem
        scores : Scores
        moment, spread, inverse : (H, G, n) arrays
            As `engines.polynomial.forward` measures them.

        Notes
        -----
        Time O(n), with fourth moments O(n d).
        """
        h = self._radius(self.polynomial, problem, scores, moment, inverse)
        share = np.minimum(spread * (1 + 8 * float(np.finfo(problem.q.dtype).eps)), 1.0)
        with np.errstate(all="ignore"):
            return np.where(h < 1, np.where(inverse > 0, h / (1 - h) * share, 0.0), math.inf)

    def gradient(self, problem: Problem, scores: Scores, moment: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        """What a row does to the certificate of gradients, (H, G, n) float64: see `gradient_error`."""
        radii = (self._radius(p, problem, scores, moment, inverse) for p in (self.polynomial, self.weights))
        return np.where(inverse > 0, gradient_error(*radii), 0.0)

    def _radius(
        self, r: MomentPolynomial, problem: Problem, scores: Scores, moment: np.ndarray, inverse: np.ndarray
    ) -> np.ndarray:
        """The sum over keys of the radius of r by the denominator of `polynomial`: (H, G, n)."""
        p, (a, b) = self.polynomial, r.radius
        # sum_j s^k / Z. Moments are sums that may cancel: their rounding is in units of the largest term, times m / Z.
        mean = np.maximum(moment.astype(np.float64) / p.coefficients[p.order], 0.0)
        unit = float(np.finfo(problem.q.dtype).eps) / 2
        h = a * mean + 16 * unit * math.exp(p.B) * (a + b * p.B**2) * p.B**p.order
        if self.fourth is not None:
            per_key = inverse * kept_keys(problem)[:, None, None].astype(np.float64)
            size = np.einsum("hgnd,hgnd->hgn", problem.q, problem.q, dtype=np.float64) * scores.q_factor**2
            second = np.divide(mean, per_key, out=np.zeros_like(mean), where=per_key > 0)
            h += b * per_key * (second**2 + size**2 * self.fourth[:, None, None])
        return h


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


def reach(problem: Problem, values: Values, chunk: int) -> np.ndarray:
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
        low = np.minimum.accumulate(np.minimum.reduceat(least, starts, axis=1), axis=1).astype(np.float64)
        high = np.maximum.accumulate(np.maximum.reduceat(most, starts, axis=1), axis=1).astype(np.float64)
        seen = high >= low
        low, high = np.where(seen, low, 0), np.where(seen, high, 0)
        before = np.concatenate([np.zeros_like(low[:, :1]), (high - low)[:, :-1]], axis=1)
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


class Sample:
    """What some rows and some keys say of moments before the work: for choosing a degree, not for certifying one."""

    def __init__(self, problem: Problem, scores: Scores, values: Values) -> None:
        H, G, n, d = problem.q.shape
        key_step = max(1, problem.k.shape[1] // SAMPLED_KEYS)
        row_step = max(1, n // max(16, SAMPLED_ROWS // (H * G)))
        y = problem.k[:, ::key_step].astype(np.float64)
        y = (y if scores.centre is None else y - scores.centre[:, None]) * scores.k_factor
        count = np.full(H, y.shape[1])
        if problem.key_mask is not None:
            keep = problem.key_mask[:, ::key_step]
            y *= keep[..., None]
            count = np.maximum(keep.sum(axis=1), 1)
        x = (problem.q[:, :, ::row_step].astype(np.float64) * scores.q_factor).reshape(H, -1, d)
        self._x, self._y, self._count = x, y, count
        self._products = y.swapaxes(1, 2) @ y / count[:, None, None]
        self.second = np.einsum("hrd,hrd->hr", x @ self._products, x)
        with np.errstate(over="ignore"):
            self._inverse = np.exp(-np.einsum("hrd,hd->hr", x, y.sum(axis=1) / count[:, None]))
        self.size = np.einsum("hrd,hrd->hr", x, x)
        spread = (values.high - values.low).astype(np.float64)
        off = np.abs(values.mean - values.middle)
        self.share = 0.5 + float(np.divide(off, spread, out=np.zeros_like(off), where=spread > 0).max(initial=0))
        self._tails: dict[int, float] = {}

    def risk(self, problem: Problem, scores: Scores, inverse: np.ndarray, chunk: int) -> np.ndarray:
        """What the certificates of rows grow with, about: far keys times their second moment by the denominator.

        (H, G, n). inf where the denominator is not positive though the row sees keys.
        """
        H, G, n, d = problem.q.shape
        x = problem.q.reshape(H, G * n, d) * problem.q.dtype.type(scores.q_factor)
        second = np.einsum("hrd,hrd->hr", x @ self._products.astype(x.dtype), x).reshape(H, G, n)
        n_k = problem.k.shape[1]
        ends = n_k if problem.hi is None else np.arange(n) + problem.q_offset + problem.hi + 1
        far = n_k if problem.hi is None else np.clip((ends - 1) // chunk * chunk, 0, n_k)
        if problem.key_mask is None:
            sees = np.broadcast_to(ends > 0, (H, 1, n))
        else:
            kept = np.cumsum(problem.key_mask, axis=1)
            sees = (np.broadcast_to(ends, n) > 0) & (kept[:, np.clip(ends, 1, n_k) * np.ones(n, int) - 1] > 0)
            sees = sees[:, None]
        return np.where(inverse > 0, far * second * inverse, np.where(sees, np.inf, 0.0))

    def _tail(self, k: int) -> float:
        """max_i m_k(i) / m_2(i)^(k/2) over a few rows and keys."""
        if k == 2:
            return 1.0
        if k not in self._tails:
            x = self._x[:, :: max(1, self._x.shape[1] // 64)]
            y = self._y[:, :: max(1, self._y.shape[1] // 1024)]
            s = x @ y.swapaxes(1, 2)
            square = s * s
            second, power = np.mean(square, axis=2), square
            for _ in range(k // 2 - 1):  # pow is fifty times slower than a product
                power = power * square
            with np.errstate(all="ignore"):
                self._tails[k] = float(np.nanmax(np.mean(power, axis=2) / second ** (k // 2), initial=1.0))
        return self._tails[k]

    def truncation(self, p: MomentPolynomial, fourth: np.ndarray | None) -> np.ndarray:
        """About what `MomentRule.truncation` will find for the sampled rows; fourth None stands for Gaussian scores."""
        h = self.radius(p, fourth)
        return np.where(h < 1, h / np.maximum(1 - h, 1e-300) * min(1.0, 1.1 * self.share), math.inf)

    def radius(self, p: MomentPolynomial, fourth: np.ndarray | None = None) -> np.ndarray:
        """About a sampled row's sum of radii by its denominator."""
        a, b = p.radius
        R = a * self._tail(p.order) * self.second ** (p.order // 2)
        if b:
            R += b * (3 * self.second**2 if fourth is None else self.second**2 + self.size**2 * fourth[:, None])
        with np.errstate(over="ignore", invalid="ignore"):
            return R * self._inverse

    def kappa(self) -> float:
        """The second moment over the fourth of the worst row, were scores Gaussian; rounded to a power of 2."""
        second = float(self.second.max())
        return 2.0 ** min(40, max(-40, round(math.log2(1 / (3 * second))))) if second > 0 else 1.0


def fourth_moments(problem: Problem, scores: Scores, seed: int | None) -> tuple[np.ndarray, int]:
    """(H,): lam >= the variance over j of <X, y_j y_j^T>, for all ||X||_F = 1, y the keys as used; and the seed.

    So that mean_j s_ij^4 <= (mean_j s_ij^2)^2 + ||x_i||^4 lam.

    Notes
    -----
    20 steps of Lanczos for X -> mean_j (y_j^T X y_j - mean) y_j y_j^T on symmetric matrices from a Gaussian start. Its
    largest Ritz value theta has theta >= (1 - e) lam for all data but with probability 1.648 sqrt(N)
    exp(-sqrt(e) (2 k - 1)) over its own coins, N = d (d + 1) / 2 (Kuczynski and Wozniakowski 1992): e is where that is
    1e-6, shared by the slots. Time 80 n_k d^2 in products of matrices, memory n_k d.
    """
    if seed is None:
        seed = secrets.randbits(63)
    rng = np.random.default_rng(seed)
    H, _, d = problem.k.shape
    # More steps than dimensions change nothing, so the statement for STEPS holds for fewer too.
    room = math.log(1.648 * math.sqrt(d * (d + 1) / 2) * H / FAILURE) / (2 * STEPS - 1)
    unit = float(np.finfo(problem.k.dtype).eps)
    found = np.empty(H)
    for head in range(H):
        y = problem.k[head]
        if problem.key_mask is not None:
            y = y[problem.key_mask[head]]
        y = (y if scores.centre is None else y - scores.centre[head]) * y.dtype.type(scores.k_factor)
        found[head] = _largest_variance(y, min(STEPS, d * (d + 1) // 2), rng) / (1 - room * room)
        # Products are in the data's precision.
        found[head] += 64 * unit * float(np.einsum("md,md->m", y, y).max(initial=0)) ** 2
    return found, seed


def _largest_variance(y: np.ndarray, steps: int, rng: np.random.Generator) -> float:
    """The largest Ritz value after `steps` steps of Lanczos, every vector made orthogonal to all before it."""
    m, d = y.shape
    if m == 0:
        return 0.0
    start = rng.standard_normal((d, d))
    X = start + start.T  # Gaussian in an orthonormal basis of symmetric matrices
    basis, diagonal, beside = [], [], []
    norm = np.linalg.norm(X)
    for _ in range(steps):
        X = X / norm
        basis.append(X)
        image = np.zeros((d, d))
        total, plain = 0.0, np.zeros((d, d))
        small = X.astype(y.dtype)
        for first in range(0, m, _BLOCK):
            rows = y[first : first + _BLOCK]
            values = np.einsum("md,md->m", rows @ small, rows)
            image += (values[:, None] * rows).T @ rows
            plain += rows.T @ rows if len(basis) == 1 else 0
            total += float(values.sum(dtype=np.float64))
        if len(basis) == 1:
            mean = plain / m
        image = image / m - total / m * mean
        diagonal.append(float(np.vdot(image, X)))
        for _ in range(2):
            for other in basis:
                image -= np.vdot(image, other) * other
        norm = np.linalg.norm(image)
        beside.append(norm)
        if norm <= 1e-14 * max(1e-300, abs(diagonal[0])):
            break
        X = 0.5 * (image + image.T)
    k = len(diagonal)
    T = np.diag(diagonal) + np.diag(beside[: k - 1], 1) + np.diag(beside[: k - 1], -1)
    return max(0.0, float(np.linalg.eigvalsh(T)[-1]))
