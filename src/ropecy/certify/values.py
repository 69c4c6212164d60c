"""Where the values of kept keys lie, and what storing a result near them costs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from ..kernels import _rows
from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Problem, Slots

_MANY = 2**14  # the most values of a column that its median is taken of; of a longer column, some at equal distances


@dataclass(slots=True)
class Values:
    """Where the values of kept keys lie.

    Attributes
    ----------
    middle : (H, d_v) array
        What is subtracted from each column of v before it is summed: halfway between its least and largest value. In a
        causal problem it is the median where nearly all values lie at one end, so that outliers at later keys do not
        cost earlier rows digits.
    offset : float
        The error of storing O, in units of rounding times max_c range_j(v_jc): max |v| / max_c range_j(v_jc) for the
        values before their normal form (1 where all columns are constant), and more where v itself carries rounding
        errors or is subnormal.
    offsets : (H,) array
        `offset` of each slot, in units of the range of its own values.
    residual : float
        max |v| / max_c range_j(v_jc) for the values in their normal form.
    residuals : (H,) array
        `residual` of each slot, in units of the range of its own values.
    varied : float
        max |v| over the columns that are not constant, before the normal form: in a constant column O is that constant
        and is stored without an error.
    spread : float
        max_c range_j(v_jc) before the normal form, or max |v| where all columns are constant.
    low, high : (H, d_v) arrays
        The least and the largest value of each column.
    mean : (H, d_v) float64 array
        The mean of each column.
    exact : bool
        Whether all columns are constant and carry no rounding errors: what is left of them in the normal form is 0, so
        that O is exact but for storing it.
    far : (H,) bool array
        In which slots a value may be as far from `middle` as the whole range, instead of half of it.
    """

    middle: np.ndarray
    offset: float
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    far: np.ndarray
    offsets: np.ndarray | None = None
    residual: float = 1.0
    residuals: np.ndarray | None = None
    varied: float = 0.0
    spread: float = 0.0
    exact: bool = False

    def slots(self, which: Slots, problem: Problem) -> Values:
        """Those of some of the slots, of which `problem` consists."""
        ends = (X[which] for X in (self.low, self.high, self.mean))
        return _sized(Values(self.middle[which], 1.0, *ends, self.far[which]), problem)

    def storing(self, dtype: np.dtype) -> float:
        """The error of storing O in a dtype, in units of max_c range_j(v_jc)."""
        return storing(dtype, self.varied) / self.spread if self.varied else 0.0

    @property
    def share(self) -> np.ndarray:
        """About how far the values of each slot are from `middle`, in units of the range: a half plus the distance of
        their mean.
        """
        spread = (self.high - self.low).astype(np.float64)
        off = np.abs(self.mean - self.middle)
        return 0.5 + np.divide(off, spread, out=np.zeros_like(off), where=spread > 0).max(axis=1, initial=0)


def measure_values(problem: Problem, comm: Communicator = SERIAL) -> Values:
    """The `Values` of a problem, over all ranks. Time O(n_k d_v)."""
    v = problem.v
    total, low, high = _rows.columns(v, problem.mask.kept, problem.threads)
    total, low, high = comm.total(total), -comm.largest(-low), comm.largest(high)
    if (empty := low > high).any():
        low[empty], high[empty] = 0, 0
    half_low, half_high = 0.5 * low, 0.5 * high
    middle = half_low + half_high
    mean = total / kept_keys(problem, comm)[:, None]
    far = np.zeros(len(v), bool)
    if problem.mask.causal and not comm.distributed:
        crowded = np.abs(mean - middle) > 0.9 * (half_high - half_low)
        far = crowded.any(axis=1)
        if far.any():
            middle = np.where(crowded, medians(problem).astype(v.dtype), middle)
    return _sized(Values(middle, 1.0, low, high, mean, far), problem)


def _sized(found: Values, problem: Problem) -> Values:
    """The values with the numbers that follow from the ends of their columns."""
    spreads = (0.5 * found.high - 0.5 * found.low).max(axis=1).astype(np.float64)
    sizes = np.maximum(found.high.max(axis=1), -found.low.min(axis=1)).astype(np.float64)
    origin, spread, largest = problem.origin, float(spreads.max()), float(sizes.max())
    found.exact = not spread and not origin.v_lost
    found.residual, varied = 0.5 * largest / spread if spread else 1.0, sizes
    with np.errstate(over="ignore"):
        found.residuals = np.divide(0.5 * sizes, spreads, out=np.ones_like(sizes), where=spreads > 0)
    if origin.largest is not None:
        sizes, varied = (X.reshape(len(spreads), -1).max(axis=1) for X in (origin.largest, origin.varied))
        largest = float(sizes.max())
    found.varied = float(varied.max())
    # The range of float64 values may be past the largest number.
    with np.errstate(over="ignore"):
        ranges = np.minimum(np.ldexp(spreads, origin.exponent + 1), sys.float_info.max)
    ranges = np.where(ranges > 0, ranges, sizes)
    found.spread = float(ranges.max(where=spreads > 0, initial=0.0)) or largest
    size = largest if origin.v_size is None else origin.v_size
    found.offsets = _offsets(problem, varied, ranges, size)
    if found.spread:
        found.offset = (found.storing(problem.dtype) + origin.v_lost * size / found.spread) / problem.unit
    return found


def _offsets(problem: Problem, varied: np.ndarray, ranges: np.ndarray, size: float) -> np.ndarray:
    """`Values.offset` of slots whose values have these ranges and are at most `varied` where columns are not constant;
    what is lost is relative to `size`.
    """
    eps, tiny = np.finfo(problem.dtype).eps, np.finfo(problem.dtype).smallest_subnormal
    stored = np.where(varied > 0, np.maximum(float(eps) * varied / 2, float(tiny) / 2 or float(tiny)), 0.0)
    lost = stored + problem.origin.v_lost * size
    # One after the other: a range next to the least number times a unit would be 0.
    with np.errstate(over="ignore"):
        return np.divide(lost, ranges, out=np.full_like(ranges, problem.unit), where=ranges > 0) / problem.unit


def storing(dtype: np.dtype, largest: float) -> float:
    """The largest error of rounding a number of at most this size to a dtype.

    It is half of a unit in the last place, and never less than half of the smallest subnormal number.
    """
    # NumPy does not know bfloat16.
    eps, tiny = (2.0**-7, 2.0**-133) if dtype.kind != "f" else (np.finfo(dtype).eps, np.finfo(dtype).smallest_subnormal)
    # Half of float64's smallest number would be 0 here.
    return max(float(eps) * largest / 2, float(tiny) / 2 or float(tiny))


def range_elsewhere(problem: Problem, comm: Communicator = SERIAL) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value, column by column, of the keys on other ranks that all rows of this rank see.

    Two arrays (H, d_v); inf and -inf if there are no such keys.
    """
    if not comm.distributed:
        none = np.full((problem.v.shape[0], problem.v.shape[2]), np.inf, problem.v.dtype)
        return none, -none
    _, low, high = _rows.columns(problem.v, problem.mask.kept, problem.threads)
    largest = comm.largest_before if problem.mask.causal else comm.largest
    return -largest(-low), largest(high)


def medians(problem: Problem) -> np.ndarray:
    """The median of each column of the values of kept keys, which a few huge values do not move: (H, d_v) float64.

    Of more than `_MANY` keys, some at equal distances are taken.
    """

    def found(v):
        # The median is taken of halved values, because adding the two in the middle might overflow.
        return 2 * np.median(0.5 * v[:: -(-len(v) // _MANY)], axis=0)

    if problem.mask.kept is None:
        return np.array([found(v) for v in problem.v], np.float64)
    kept = zip(problem.v, problem.mask.kept, strict=True)
    return np.array([found(v[keep] if keep.any() else v) for v, keep in kept], np.float64)


def kept_keys(problem: Problem, comm: Communicator = SERIAL) -> np.ndarray:
    """How many keys key_mask keeps in each slot over all ranks, but at least 1: (H,)."""
    H, n_k = problem.k.shape[:2]
    if problem.mask.kept is None and not comm.distributed:
        return np.full(H, max(n_k, 1))
    kept = np.full(H, n_k) if problem.mask.kept is None else problem.mask.kept.sum(axis=1)
    return np.maximum(comm.total(kept), 1)
