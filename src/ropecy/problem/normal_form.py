"""The normal form of a problem, with keys and values near 0 and of moderate size, and the way back.

A vector that is added to every key adds the same number to all scores of a row, which does not change the softmax; a
vector that is added to every value is added to the result. So columns of keys and values whose distance from 0 is more
than twice their range are centred, in each packed sequence by itself. Rounding errors are then in proportion to the
range of a column, and not to its distance from 0. Values so large that their sums would overflow, or so small that
products with weights would vanish, are multiplied by a power of two. If gradients are wanted, powers of two also bring
queries and keys of very different sizes to one size. Every engine computes with the normal form, and only the end
result is turned back.
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
from .packed import taken
from .problem import LIMITS, Problem

# If there is a bias, values and gradients outside [2^-8, 2^8] are brought to a size of about 1.
_NEAR_ONE = 8
# Gradients are sums of fewer than 2^_SUMS terms.
_SUMS = 40


class Balance(NamedTuple):
    """The exponents of two that queries and keys of each slot, (H,) int arrays, and both scales are multiplied by."""

    q: np.ndarray
    k: np.ndarray
    scale: int


@dataclass(slots=True)
class Normal:
    """A problem in normal form, and the way back from its results.

    Attributes
    ----------
    problem : Problem
    key_centre : (H, s, d) array or None
        What was subtracted from the keys of each of s packed sequences, or of the only one; None is 0.
    value_centre : (H, s, d_v) array or None
        What was subtracted from values; None is 0.
    exponent : int
        Values were then multiplied by ``2^-exponent``.
    largest : float
        max |v| of the normal form.
    balance : Balance or None
        The powers of two that queries, keys and scales were multiplied by; None if they were not.
    growth : int
        The exponent of two of the largest entry of q and k, times the larger scale; 0 where no gradient is wanted.
    """

    problem: Problem
    key_centre: np.ndarray | None = None
    value_centre: np.ndarray | None = None
    exponent: int = 0
    largest: float = 0.0
    balance: Balance | None = None
    growth: int = 0

    @property
    def needs_lse(self) -> bool:
        """Whether `output` needs the lse, to know which rows see no key: they give 0, and not the centre."""
        return self.value_centre is not None

    def output(self, o: np.ndarray, lse: np.ndarray | None) -> np.ndarray:
        """O of the problem as it was, (H, G, n, d_v), from that of the normal form.

        The true O lies between the least and the largest value. If values are close to the largest number of the dtype,
        rounding might make an entry overflow: it is then set to the largest number.
        """
        if not self.exponent and self.value_centre is None:
            return o
        with np.errstate(over="ignore"):
            if self.exponent:
                o = np.ldexp(o, self.exponent)
            if self.value_centre is not None:
                seen = ~np.isneginf(lse)[..., None]
                centre = _of_each(self.value_centre, self.problem.mask, keys=False)
                o = np.where(seen, o + centre[:, None], o)
        most = LIMITS[o.dtype].max
        return np.clip(o, -most, most) if self.problem.origin.largest.max(initial=0) > most / 2 else o

    def log_sums(self, lse: np.ndarray) -> np.ndarray:
        """lse of the problem as it was, (H, G, n) float64, from that of the normal form."""
        if self.key_centre is None:
            return lse
        q, centre = self.problem.q, _of_each(self.key_centre.astype(np.float64), self.problem.mask, keys=False)
        common = np.einsum("hgna,hna->hgn", q, np.broadcast_to(centre, (len(q), *q.shape[2:])), dtype=np.float64)
        return lse + self.problem.scale * common

    def upstream(self, do: np.ndarray, largest: float) -> tuple[np.ndarray, int]:
        """``do 2^-exponent`` and that exponent; `largest` is max |do|.

        Gradients are linear in do. The power of two keeps ``<do, v>`` from overflow, after which Inf - Inf would be
        NaN, and keeps products of do and ``<do, v>`` with weights from vanishing. If there is a bias, do is brought to
        a size of about 1, as values are.
        """
        if not largest:
            return do, 0
        most, size = np.finfo(do.dtype).maxexp, math.frexp(largest)[1]
        if self.problem.tail is not None:
            exponent = size if abs(size) > _NEAR_ONE else 0
        else:
            values = math.frexp(self.largest)[1]
            low, high = -(most // 3) - min(0, values), most // 2 - max(0, values)
            if size > _NEAR_ONE:
                high = max(low, min(high, most - _SUMS - max(0, values) - self.growth))
            exponent = size - min(max(size, low), high)
        return (np.ldexp(do, -exponent), exponent) if exponent else (do, 0)

    def exponents(self, upstream: int) -> Exponents:
        """The exponents by which gradients for ``do 2^-upstream`` become those of the problem as it was, for do."""
        scores = upstream + self.exponent
        if self.balance is None:
            return Exponents(scores, scores, scores, upstream, scores)
        q, k, scale = self.balance
        return Exponents(scores, scores + q, scores + k, upstream, scores + scale)


def normal_form(problem: Problem, grad: bool, comm: Communicator = SERIAL) -> Normal:
    """The normal form of a problem, with the same centres and exponents on all ranks that hold pieces of it.

    Keys are not centred if there is a `near` scale or a family, because a vector added to all keys does not change all
    scores of a row alike then. Time O(n_k (d + d_v)), and O(n d) more if gradients are wanted.
    """
    balance, growth = _balance(problem, comm) if grad else (None, 0)
    if balance is not None:
        q, k = np.ldexp(problem.q, balance.q[:, None, None, None]), np.ldexp(problem.k, balance.k[:, None, None])
        scale = math.ldexp(problem.scale, balance.scale)
        problem = replace(problem, q=q, k=k, scale=scale, near=problem.near and problem.near.times_power(balance.scale))
    normal = Normal(problem, balance=balance, growth=growth)
    if problem.near is None and problem.family is None:
        low, high = _ends(problem.k, problem, comm)
        if _rows.far_from_zero(low, high):
            normal.key_centre = _centre(low, high)
            size = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
            k = _taken(problem.k, normal.key_centre, 0, problem.mask)
            origin = replace(problem.origin, k_norm=np.linalg.norm(size, axis=2).max(axis=1))
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
        # A constant column is stored without an error, unless it is the result of a projection.
        size, varied = np.maximum(*np.abs(ends)), (ends[0] < ends[1]) | (problem.origin.v_lost > 0)
        largest, varied = size.max(axis=2, initial=0), size.max(axis=2, initial=0, where=varied)
        if problem.mask.packed is None:
            largest, varied = largest[:, 0], varied[:, 0]
        before = {"largest": largest.astype(np.float64), "varied": varied.astype(np.float64)}
        origin = replace(problem.origin, **before, exponent=normal.exponent)
        normal.problem = replace(problem, v=v, origin=origin)
    return normal


def _balance(problem: Problem, comm: Communicator) -> tuple[Balance | None, int]:
    """The powers of two that bring the queries and the keys of each slot to one size, and scales to about 1; and the
    exponent of two of the largest of all these entries, times the larger scale.

    The former is None if no slot's queries and keys differ so much in size, and no scale is so far from 1, that a
    gradient could overflow or vanish before it has been brought back to the sizes that the user gave.
    """
    far = np.finfo(problem.dtype).maxexp // 2
    scale = math.frexp(problem.largest_scale)[1]
    sizes = comm.largest(np.stack([_sizes(problem.q, problem.threads), _sizes(problem.k, problem.threads)]))
    of_q, of_k = np.frexp(sizes)[1]
    unlike = (sizes > 0).all(axis=0) & (np.abs(of_k - of_q) > far)
    kept = sizes.reshape(-1) > 0
    if abs(scale) <= far and not unlike.any():
        return None, scale + int(np.concatenate([of_q, of_k])[kept].max(initial=-_SUMS))
    q = np.where(unlike, (of_k - of_q) // 2, 0)
    # The power of two of the scales goes to queries and keys, whose squares must not overflow nor their entries vanish.
    after = np.concatenate([of_q + q, of_k - q])[kept]
    room, depth = far - 8 - after.max(initial=0), far - 8 + after.min(initial=0)
    taken_away = int(np.clip(scale, -2 * max(depth, 0), 2 * max(room, 0))) if abs(scale) > far else 0
    half = taken_away // 2
    largest = int(after.max(initial=-_SUMS)) + taken_away - half
    return Balance(q + half, taken_away - half - q, -taken_away), scale - taken_away + largest


def _sizes(X: np.ndarray, threads: int) -> np.ndarray:
    """The largest entry of each slot of X (H, ..., rows, d), (H,) float64; 0 where there are none."""
    _, low, high = _rows.columns(X.reshape(len(X), -1, X.shape[-1]), None, threads)
    return np.maximum(-low, high).max(axis=1, initial=0).astype(np.float64)


def _ends(X: np.ndarray, problem: Problem, comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest entry of each column of X (H, n_k, m) over kept keys, (H, s, m) for each of s packed
    sequences, or for the only one; 0 if there are none.
    """
    if problem.mask.packed is not None:
        return _ends_of_sequences(X, problem)
    if problem.mask.kept is None and X.shape[1] and not comm.distributed:
        _, low, high = _rows.columns(X, None, problem.threads)
    else:
        low, high = _ends_of_slots(X, problem.mask.kept, problem.threads, comm)
    return low[:, None], high[:, None]


def _ends_of_sequences(X: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`_ends` of packed sequences: what one of them has depends on no other."""
    packed = problem.mask.packed
    low, high = np.zeros((2, len(X), packed.size, X.shape[2]), X.dtype)
    for alike in packed.alike:
        kept = problem.mask.of_sequences(alike).kept
        found = _ends_of_slots(taken(X, alike.keys, alike.n_k, 1), kept, problem.threads, SERIAL)
        for ends, of_alike in zip((low, high), found, strict=True):
            ends[:, alike.which] = of_alike.reshape(len(X), -1, X.shape[2])
    return low, high


def _ends_of_slots(
    X: np.ndarray, kept: np.ndarray | None, threads: int, comm: Communicator
) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest entry of each column of X (H, n_k, m) over kept keys, (H, m); 0 if there are none."""
    _, low, high = _rows.columns(X, kept, threads)
    low, high = -comm.largest(-low), comm.largest(high)
    empty = low > high
    low[empty], high[empty] = 0, 0
    return low, high


def _centre(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The middle of each column whose distance from 0 is more than twice its range, and 0 for the other columns.

    All entries of such a column are within a factor of two of the middle, so subtracting it is exact.
    """
    half_low, half_high = 0.5 * low.astype(np.float64), 0.5 * high.astype(np.float64)
    with np.errstate(over="ignore"):
        far = np.maximum(np.abs(half_low), np.abs(half_high)) > 2 * (half_high - half_low)
    return np.where(far, half_low + half_high, 0).astype(low.dtype)


def _exponent(largest: float, keys: int, dtype: np.dtype, biased: bool) -> int:
    """The exponent e such that values of at most this size, summed over so many keys, are multiplied by 2^-e.

    It is 0 wherever products with weights are far from underflow and sums far from overflow, and no larger than needed
    otherwise, because columns may differ much in size. If there is a bias, all weights of a row may be as small as
    exp(-60), and gradients divide by their sum. Values are then brought to a size of about 1, so that in float32
    neither the products underflow nor the quotients overflow.
    """
    if not largest:
        return 0
    size = math.frexp(largest)[1]
    if biased:
        return size if abs(size) > _NEAR_ONE else 0
    lowest, highest = usual_exponents(dtype, keys)
    if size > highest:
        return size - highest
    return size if size < lowest else 0


def usual_exponents(dtype: np.dtype, keys: int) -> tuple[int, int]:
    """(e, f): values of so many keys whose largest has an exponent of two from e to f need no power of two, if there is
    no bias.
    """
    most = LIMITS[dtype].maxexp
    return -(most // 2), 3 * most // 4 - math.frexp(keys)[1]


def _of_each(centre: np.ndarray, mask: Mask, *, keys: bool) -> np.ndarray:
    """The centre (H, s, m) of the sequence of each key, or of each row, (H, n_k or n or 1, m)."""
    if mask.packed is None:
        return centre
    return centre[:, mask.packed.of_keys if keys else mask.packed.of_rows]


def _taken(X: np.ndarray, centre: np.ndarray | None, exponent: int, mask: Mask) -> np.ndarray:
    """``(X - centre) 2^-exponent`` in the kept rows of X (H, n_k, m), and 0 in the others."""
    X = X if centre is None else X - _of_each(centre, mask, keys=True)
    X = np.ldexp(X, -exponent) if exponent else X
    return mask.hide(X)
