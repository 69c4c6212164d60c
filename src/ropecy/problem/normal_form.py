"""The normal form of a problem: keys and values near 0 and of a size that sums can hold, and the way back.

Softmax does not see what is added to every key, for it adds the same number to all scores of a row; and what is added
to every value is added to the result. So columns of keys and of values that lie farther from 0 than twice as far as
they spread are centred. Rounding is then in proportion to how far they spread, and not to how far away they are. A
power of two is taken from values so large that their sums would overflow, or so small that products with weights would
vanish; where gradients are wanted, another brings queries and keys of very unlike size to one size. Every engine
computes with what is left, whatever parts it cuts a problem into, and only the end result is turned back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..kernels import _rows
from .communicator import SERIAL, Communicator
from .input_gradients import Exponents
from .mask import Mask
from .problem import LIMITS, Problem

# Beside a bias values and gradients are brought to about 1 that are not within this power of two of it.
_NEAR_ONE = 8


class Balance(NamedTuple):
    """Powers of two: of the queries and of the keys of each slot, (H,) int arrays, and of both scales."""

    q: np.ndarray
    k: np.ndarray
    scale: int


@dataclass(slots=True)
class Normal:
    """A problem in normal form, and how to turn back what an engine makes of it.

    Attributes
    ----------
    problem : Problem
    key_centre : (H, d) array or None
        What was taken from keys; None is 0.
    value_centre : (H, d_v) array or None
        What was taken from values; None is 0.
    exponent : int
        Values were then multiplied by ``2^-exponent``.
    largest : float
        max |v| of the normal form.
    balance : Balance or None
        The powers of two that queries, keys and scales were multiplied with; None is 0.
    """

    problem: Problem
    key_centre: np.ndarray | None = None
    value_centre: np.ndarray | None = None
    exponent: int = 0
    largest: float = 0.0
    balance: Balance | None = None

    @property
    def needs_lse(self) -> bool:
        """Whether `output` has to be told the lse: a row that sees no key gives 0, and not the centre."""
        return self.value_centre is not None

    def output(self, o: np.ndarray, lse: np.ndarray | None) -> np.ndarray:
        """O of the problem as it was, from that of the normal form, (H, G, n, d_v).

        The true O lies between values. Where these are close to the largest number, rounding may carry o past it: such
        entries are the largest number, and not inf.
        """
        if not self.exponent and self.value_centre is None:
            return o
        with np.errstate(over="ignore"):
            if self.exponent:
                o = np.ldexp(o, self.exponent)
            if self.value_centre is not None:
                seen = ~np.isneginf(lse)[..., None]
                o = np.where(seen, o + self.value_centre[:, None, None], o)
        most = LIMITS[o.dtype].max
        return np.clip(o, -most, most) if self.problem.origin.largest > most / 2 else o

    def log_sums(self, lse: np.ndarray) -> np.ndarray:
        """lse of the problem as it was, from that of the normal form, (H, G, n) float64."""
        if self.key_centre is None:
            return lse
        q = self.problem.q
        common = np.einsum("hgna,ha->hgn", q, self.key_centre.astype(np.float64), dtype=np.float64)
        return lse + self.problem.scale * common

    def upstream(self, do: np.ndarray, largest: float) -> tuple[np.ndarray, int]:
        """``do 2^-exponent`` and that exponent, max |do| = largest.

        Gradients are linear in do. The power of two keeps ``<do, v>`` from overflow, where Inf - Inf would be NaN, and
        do and ``<do, v>`` from being so small that their products with weights vanish. Beside a bias do comes to about
        1, as values do.
        """
        if not largest:
            return do, 0
        most, size = np.finfo(do.dtype).maxexp, math.frexp(largest)[1]
        if self.problem.tail is not None:
            exponent = size if abs(size) > _NEAR_ONE else 0
        else:
            values = math.frexp(self.largest)[1]
            low, high = -(most // 3) - min(0, values), most // 2 - max(0, values)
            exponent = size - min(max(size, low), high)
        return (np.ldexp(do, -exponent), exponent) if exponent else (do, 0)

    def exponents(self, upstream: int) -> Exponents:
        """Of gradients for ``do 2^-upstream``, for those of the problem as it was."""
        scores = upstream + self.exponent
        if self.balance is None:
            return Exponents(scores, scores, scores, upstream, scores)
        q, k, scale = self.balance
        return Exponents(scores, scores + q, scores + k, upstream, scores + scale)


def normal_form(problem: Problem, grad: bool, comm: Communicator = SERIAL) -> Normal:
    """The normal form of a problem, the same on all ranks that hold pieces of it. Time O(n_k (d + d_v)), and O(n d)
    where gradients are wanted.

    Keys are left alone beside a `near` scale or a family, where what is added to all of them is not the same for all
    scores of a row.
    """
    balance = _balance(problem, comm) if grad else None
    if balance is not None:
        q, k = np.ldexp(problem.q, balance.q[:, None, None, None]), np.ldexp(problem.k, balance.k[:, None, None])
        scale, near = math.ldexp(problem.scale, balance.scale), problem.near
        near = near and (near[0], math.ldexp(near[1], balance.scale))
        problem = replace(problem, q=q, k=k, scale=scale, near=near)
    normal = Normal(problem, balance=balance)
    if problem.near is None and problem.family is None:
        low, high = _ends(problem.k, problem, comm)
        if _rows.far_from_zero(low, high):
            normal.key_centre = _centre(low, high)
            size = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
            k = _taken(problem.k, normal.key_centre, 0, problem.mask)
            origin = replace(problem.origin, k_norm=np.linalg.norm(size, axis=1))
            normal.problem = problem = replace(problem, k=k, origin=origin)
    ends = low, high = _ends(problem.v, problem, comm)
    if _rows.far_from_zero(low, high):
        normal.value_centre = _centre(low, high)
        low, high = low - normal.value_centre, high - normal.value_centre
    left = max(_rows.largest(low), _rows.largest(high))
    keys = sum(comm.gather(problem.mask.n_k))
    normal.exponent = _exponent(left, keys, problem.v.dtype, problem.tail is not None)
    normal.largest = math.ldexp(left, -normal.exponent)
    if normal.value_centre is not None or normal.exponent:
        v = _taken(problem.v, normal.value_centre, normal.exponent, problem.mask)
        # A constant is stored as it is, if the user gave it in the dtype of O, and it does not come of a projection.
        size, varied = np.maximum(*np.abs(ends)), (ends[0] < ends[1]) | (problem.origin.v_lost > 0)
        before = {"largest": float(size.max(initial=0)), "varied": float(size.max(initial=0, where=varied))}
        origin = replace(problem.origin, **before, exponent=normal.exponent)
        normal.problem = replace(problem, v=v, origin=origin)
    return normal


def _balance(problem: Problem, comm: Communicator) -> Balance | None:
    """The powers of two that bring the queries and the keys of each slot to one size, and scales to about 1; None where
    no slot's are so unlike, and no scale so far from 1, that the gradient of the one could overflow, or that of the
    other vanish, before projections and powers of two are undone.
    """
    far = np.finfo(problem.dtype).maxexp // 2
    scale = math.frexp(max(abs(problem.scale), 0 if problem.near is None else abs(problem.near[1])))[1]
    sizes = comm.largest(np.stack([_sizes(problem.q, problem.threads), _sizes(problem.k, problem.threads)]))
    of_q, of_k = np.frexp(sizes)[1]
    unlike = (sizes > 0).all(axis=0) & (np.abs(of_k - of_q) > far)
    if abs(scale) <= far and not unlike.any():
        return None
    q = np.where(unlike, (of_k - of_q) // 2, 0)
    # What is taken from scales is given to queries and keys, of which neither squares may overflow nor entries vanish.
    after = np.concatenate([of_q + q, of_k - q])[sizes.reshape(-1) > 0]
    room, depth = far - 8 - after.max(initial=0), far - 8 + after.min(initial=0)
    scale = int(np.clip(scale, -2 * max(depth, 0), 2 * max(room, 0))) if abs(scale) > far else 0
    return Balance(q + scale // 2, scale - scale // 2 - q, -scale)


def _sizes(X: np.ndarray, threads: int) -> np.ndarray:
    """The largest entry of each slot of X (H, ..., rows, d), (H,) float64; 0 where there are none."""
    _, low, high = _rows.columns(X.reshape(len(X), -1, X.shape[-1]), None, threads)
    return np.maximum(-low, high).max(axis=1, initial=0).astype(np.float64)


def _ends(X: np.ndarray, problem: Problem, comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest of the columns of X (H, n_k, m) over kept keys, (H, m); 0 where there are none."""
    kept = problem.mask.kept
    _, low, high = _rows.columns(X, kept, problem.threads)
    if kept is None and X.shape[1] and not comm.distributed:
        return low, high
    low, high = -comm.largest(-low), comm.largest(high)
    empty = low > high
    low[empty], high[empty] = 0, 0
    return low, high


def _centre(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Halfway between the ends of a column that is farther from 0 than twice the distance between them, and 0 for the
    others. All of such a column is within a factor of two: to take the centre from it is exact.
    """
    half_low, half_high = 0.5 * low.astype(np.float64), 0.5 * high.astype(np.float64)
    with np.errstate(over="ignore"):
        far = np.maximum(np.abs(half_low), np.abs(half_high)) > 2 * (half_high - half_low)
    return np.where(far, half_low + half_high, 0).astype(low.dtype)


def _exponent(largest: float, keys: int, dtype: np.dtype, biased: bool) -> int:
    """The power of two to be taken from values up to this size, which are summed over so many keys: 0 wherever products
    with weights are far from underflow and sums far from overflow. Columns may differ by much: no more than is needed.

    Beside a bias all of a row's weights may be as small as exp(-60), and what gradients divide by as large: values come
    to about 1 there, and neither those products underflow in float32 nor these quotients overflow.
    """
    if not largest:
        return 0
    most, size = LIMITS[dtype].maxexp, math.frexp(largest)[1]
    if biased:
        return size if abs(size) > _NEAR_ONE else 0
    highest = 3 * most // 4 - math.frexp(keys)[1]
    if size > highest:
        return size - highest
    return size if size < -(most // 2) else 0


def _taken(X: np.ndarray, centre: np.ndarray | None, exponent: int, mask: Mask) -> np.ndarray:
    """``(X - centre) 2^-exponent`` of kept rows of X (H, n_k, m), and 0 for the others."""
    X = X if centre is None else X - centre[:, None]
    X = np.ldexp(X, -exponent) if exponent else X
    return mask.hide(X)
