"""What is measured of q, k, v: ``|scale <q_i, k_j - c>| <= |scale| max ||q_i|| max ||k_j - c||``, and the range of v.

With it goes a model of what rounding costs. Softmax ignores a constant added to a row, so keys may be centred on any c;
rotations keep norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .kernels import _rows
from .problem import Problem


@dataclass(slots=True)
class Scores:
    """Bounds of the scores.

    Attributes
    ----------
    plain : float
        Bound of ``|scale <q_i, k_j>|``; inf where it is past the largest number.
    bound : float
        B, bound of ``|scale <q_i, k_j - centre>|``, the smaller of that for centre 0 and for the mean of the keys.
    centre : (H, d) array or None
        None is 0.
    q_factor, k_factor : float
        ``scale <q, k - c> = <q_factor q, k_factor (k - c)>``, both factors of size at most sqrt(B).
    """

    plain: float
    bound: float
    centre: np.ndarray | None
    q_factor: float
    k_factor: float


@dataclass(slots=True)
class Values:
    """Where the values of kept keys lie.

    Attributes
    ----------
    middle : (H, d_v) array
        Halfway between the least and the largest of a column.
    offset : float
        max |v| in units of max_c range_j(v_jc); 1 where all columns are constant.
    low, high : (H, d_v) arrays
        The least and the largest of a column.
    mean : (H, d_v) float64 array
        Of a column.
    """

    middle: np.ndarray
    offset: float
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray


class Alone:
    """What one process knows is all there is; `ropecy._ranks.Ranks` asks the others."""

    @staticmethod
    def largest(X: np.ndarray) -> np.ndarray:
        """The largest of every rank's X, entry by entry."""
        return X

    @staticmethod
    def total(X: np.ndarray) -> np.ndarray:
        """The sum of every rank's X."""
        return X


def measure_values(problem: Problem, ranks: Any = Alone) -> Values:
    """Middle and offset of the values. Time O(n_k d_v)."""
    v = problem.v
    total, low, high = _rows.columns(v, problem.key_mask, problem.threads)
    total, low, high = ranks.total(total), -ranks.largest(-low), ranks.largest(high)
    empty = low > high
    low[empty], high[empty] = 0, 0
    middle = (0.5 * low + 0.5 * high).astype(v.dtype)
    spread = float((0.5 * high - 0.5 * low).max())
    largest = float(np.maximum(np.abs(low), np.abs(high)).max())
    mean = total / kept_keys(problem, ranks)[:, None]
    return Values(middle, 0.5 * largest / spread if spread else 1.0, low, high, mean)


def kept_keys(problem: Problem, ranks: Any = Alone) -> np.ndarray:
    """How many keys of a slot key_mask keeps, and at least 1: (H,)."""
    H, n_k = problem.k.shape[:2]
    kept = np.full(H, n_k) if problem.key_mask is None else problem.key_mask.sum(axis=1)
    return np.maximum(ranks.total(kept), 1)


def measure(problem: Problem, ranks: Any = Alone) -> Scores:
    """Bounds by Cauchy-Schwarz, from all queries and from the keys that key_mask keeps; the worst slot's.

    Notes
    -----
    Time O(n d): three reads of k, one of q. Rounding of the norms is on the safe side.
    """
    q, k, keep = problem.q, problem.k, problem.key_mask
    H, G, n, d = q.shape
    scale = abs(problem.scale)
    room = 1 + 4 * (d + 8) * float(np.finfo(q.dtype).eps)
    with np.errstate(all="ignore"):
        q_norm = ranks.largest(_rows.largest_norms(q.reshape(H, G * n, d), None, None, problem.threads))
        plain_norm = ranks.largest(_rows.largest_norms(k, keep, None, problem.threads))
        plain = float((q_norm * plain_norm).max()) * scale * room
        total = ranks.total(_rows.columns(k, keep, problem.threads)[0])
        mean = (total / kept_keys(problem, ranks)[:, None]).astype(k.dtype)
        mean_norm = ranks.largest(_rows.largest_norms(k, keep, mean, problem.threads))
        shifted = float((q_norm * mean_norm).max()) * scale * room
    if not math.isfinite(plain):
        return Scores(math.inf, math.inf, None, 1.0, 1.0)
    if shifted < plain:
        return Scores(plain, shifted, mean, *_factors(problem.scale, float(q_norm.max()), float(mean_norm.max())))
    return Scores(plain, plain, None, *_factors(problem.scale, float(q_norm.max()), float(plain_norm.max())))


def _factors(scale: float, q_norm: float, k_norm: float) -> tuple[float, float]:
    if not (q_norm and k_norm and scale):
        return scale, 1.0
    # Equal sizes: monomials of either then stay below B^(degree/2), far from overflow and underflow.
    balance = math.sqrt(abs(scale)) * math.sqrt(q_norm) * math.sqrt(k_norm)
    return math.copysign(balance / q_norm, scale), balance / k_norm


def polynomial_rounding(problem: Problem, B: float, values: Values) -> float:
    """Monomial sums cancel for negative scores: a few units times e^{2B}, measured (0.3 to 4, 11 where B is small).

    Values are centred, so that their offset costs no more than storing O does.
    """
    unit = float(np.finfo(problem.q.dtype).eps) / 2
    return unit * (12 + 4 * math.exp(min(2 * B, 700)) + 2 * values.offset)


def exact_rounding(problem: Problem, bound: float, values: Values) -> float:
    """Scores of size S carry (2 + sqrt(d) / 2) S units; sums over blocks of keys the square root of their number.

    Weights that are off by that move O by as much of the range; sums are off in units of max |V|.
    """
    unit = float(np.finfo(problem.q.dtype).eps) / 2
    d, n_k = problem.q.shape[-1], problem.k.shape[1]
    if problem.bias is not None:
        bound += float(np.abs(problem.bias).max())
    if problem.near is not None and problem.scale:
        bound *= max(1.0, abs(problem.near[1] / problem.scale))
    return min(1.0, unit * ((16 + math.sqrt(n_k / 96)) * max(1.0, values.offset) + (2 + math.sqrt(d) / 2) * bound))
