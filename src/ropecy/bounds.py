"""What is measured of q, k, v: ``|scale <q_i, k_j - c>| <= |scale| max ||q_i|| max ||k_j - c||``, and the range of v.

With it goes a model of what rounding costs. Softmax ignores a constant added to a row, so keys may be centred on any c;
rotations keep norms.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .kernels import _rows
from .problem import Family, Problem

# How many rows are looked at together, and how wide a block of a family may be to have its powers taken.
_OFFSETS = 1024
_WIDE = 32
# Keys of a slot that say what no centre brings the bound below.
_FEW = 64
# Values of a column that have a median for all.
_MANY = 2**14


@dataclass(slots=True)
class Scores:
    """Bounds of the scores.

    Attributes
    ----------
    plain : float
        Bound of ``|scale <q_i, k_j>|``; inf where it is past the largest number. With a family, of ``sum_ab |scale q_a
        W_t[a, b] k_b|``, the size of what is added up.
    bound : float
        B, bound of ``|scale <q_i, k_j - centre>|``, the smaller of that for centre 0 and for the mean of the keys; or
        of ``|scale q_i W_t k_j^T|``.
    centre : (H, d) array or None
        None is 0.
    q_factor, k_factor : (H,) float64 arrays
        ``scale <q, k - c> = <q_factor q, k_factor (k - c)>``. What is multiplied is of one size in every slot, the root
        of the slot's own bound. With a family, their product is scale times the largest entry.
    of_slots : (H,) float64 array
        The bound of each slot.
    how : str
        How `bound` betters `plain`.
    keys : (H,) array or None
        The largest ``||k_j - centre||`` of each slot; None with a family.
    products : float
        `plain` without the scale.
    lost : float
        What rounding has done to these products at most when q and k were projected and rotated.
    """

    plain: float
    bound: float
    centre: np.ndarray | None
    q_factor: np.ndarray
    k_factor: np.ndarray
    of_slots: np.ndarray
    how: str = "with keys centred"
    keys: np.ndarray | None = None
    products: float = math.inf
    lost: float = 0.0

    def of_rows(self, problem: Problem) -> np.ndarray:
        """Of every row its own bound ``|scale| ||q_i|| max_j ||k_j - centre||``, (H, G, n) float64."""
        H, G, n, d = problem.q.shape
        factor = abs(problem.scale) * _room(problem.q) * self.keys
        with np.errstate(all="ignore"):
            return _rows.norms(problem.q.reshape(H, G * n, d), factor, problem.threads).reshape(H, G, n)

    def within(self, B: float) -> Scores:
        """The same for the rows whose bound is at most B, with factors for their sizes."""
        if B >= self.bound:
            return self
        of_slots = np.minimum(self.of_slots, B)
        balance = np.sqrt(np.divide(of_slots, self.of_slots, out=np.ones_like(of_slots), where=self.of_slots > 0))
        q_factor, k_factor = self.q_factor / balance, self.k_factor * balance
        how = f"{self.how}, but for the longest queries"
        return replace(self, bound=B, q_factor=q_factor, k_factor=k_factor, of_slots=of_slots, how=how)


@dataclass(slots=True)
class Values:
    """Where the values of kept keys lie.

    Attributes
    ----------
    middle : (H, d_v) array
        What is taken from v before it is summed: halfway between the least and the largest of a column, or, causal,
        the median where nearly all lie at one end. Later outliers then cost earlier rows no digits.
    offset : float
        What storing O costs, in units of rounding: max |v| in units of max_c range_j(v_jc) (1 where all columns are
        constant), of the values before their normal form; more where v itself carries rounding, or is subnormal.
    residual : float
        max |v| of the values as they are now, in units of max_c range_j(v_jc).
    varied, spread : float
        Of the values before their normal form: max |v| of the columns that are not constant, for a constant is what O
        is there and is stored as it is; and max_c range_j(v_jc), or max |v| where all are constant.
    low, high : (H, d_v) arrays
        The least and the largest of a column.
    mean : (H, d_v) float64 array
        Of a column.
    far : bool
        Whether a value may be as far as the range from `middle`, and not half of it.
    """

    middle: np.ndarray
    offset: float
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    far: bool = False
    residual: float = 1.0
    varied: float = 0.0
    spread: float = 0.0

    def storing(self, dtype: np.dtype) -> float:
        """What it costs to store O in a dtype, in units of max_c range_j(v_jc)."""
        return storing(dtype, self.varied) / self.spread if self.varied else 0.0

    @property
    def share(self) -> float:
        """How far from `middle` values are about, in units of the range: a half, and as much as their mean is off."""
        spread = (self.high - self.low).astype(np.float64)
        off = np.abs(self.mean - self.middle)
        return 0.5 + float(np.divide(off, spread, out=np.zeros_like(off), where=spread > 0).max(initial=0))


@dataclass(slots=True)
class Measured:
    """What those who hold the pieces of a problem have found of it together.

    Attributes
    ----------
    scores : Scores
    values : Values
    hidden : engines.scan.Hidden
    sample : sample.Sample or None
        Where moments may serve.
    """

    scores: Scores
    values: Values
    hidden: Any
    sample: Any = None


class Alone:
    """What one process knows is all there is; `ropecy._ranks.Ranks` asks the others."""

    rank = 0

    @staticmethod
    def largest(X: np.ndarray) -> np.ndarray:
        """The largest of every rank's X, entry by entry."""
        return X

    @staticmethod
    def total(X: np.ndarray) -> np.ndarray:
        """The sum of every rank's X."""
        return X

    @staticmethod
    def gather(value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        return [value]

    @staticmethod
    def joined(X: np.ndarray, axis: int) -> np.ndarray:
        """Every rank's X, in their order."""
        return X


def measure_values(problem: Problem, ranks: Any = Alone) -> Values:
    """Middle and offset of the values. Time O(n_k d_v)."""
    v = problem.v
    total, low, high = _rows.columns(v, problem.key_mask, problem.threads)
    total, low, high = ranks.total(total), -ranks.largest(-low), ranks.largest(high)
    if (empty := low > high).any():
        low[empty], high[empty] = 0, 0
    half_low, half_high = 0.5 * low, 0.5 * high
    middle = half_low + half_high
    spread = float((half_high - half_low).max())
    largest = max(float(high.max()), -float(low.min()))
    mean = total / kept_keys(problem, ranks)[:, None]
    far = False
    if problem.hi is not None and ranks is Alone:
        crowded = np.abs(mean - middle) > 0.9 * (half_high - half_low)
        if far := bool(crowded.any()):
            middle = np.where(crowded, medians(problem).astype(v.dtype), middle)
    found = Values(middle, 1.0, low, high, mean, far, 0.5 * largest / spread if spread else 1.0)
    origin, unit = problem.origin, float(np.finfo(v.dtype).eps) / 2
    found.varied = largest
    if origin.largest is not None:
        largest, found.varied = origin.largest, origin.varied
    # The range of float64 values may be past the largest number.
    found.spread = min(2 * math.ldexp(spread, origin.exponent), sys.float_info.max) or largest
    if found.spread:
        found.offset = (found.storing(v.dtype) + origin.v_lost * largest / found.spread) / unit
    return found


def storing(dtype: np.dtype, largest: float) -> float:
    """What rounding numbers of at most this size to a dtype does to one: half of the last place, and never less than
    half of the smallest number there is.
    """
    # NumPy does not know bfloat16.
    eps, tiny = (2.0**-7, 2.0**-133) if dtype.kind != "f" else (np.finfo(dtype).eps, np.finfo(dtype).smallest_subnormal)
    # Half of float64's smallest number would be 0 here.
    return max(float(eps) * largest / 2, float(tiny) / 2 or float(tiny))


def range_elsewhere(problem: Problem, ranks: Any = Alone) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest of the columns of v that all rows here see on other ranks, (H, d_v); inf and -inf where
    that is none.
    """
    if ranks is Alone:
        none = np.full((problem.v.shape[0], problem.v.shape[2]), np.inf, problem.v.dtype)
        return none, -none
    _, low, high = _rows.columns(problem.v, problem.key_mask, problem.threads)
    largest = ranks.largest if problem.hi is None else ranks.largest_before
    return -largest(-low), largest(high)


def medians(problem: Problem) -> np.ndarray:
    """Of the values of kept keys, or of every so many, column by column, which a few huge ones do not move: (H, d_v)
    float64.
    """

    def found(v):
        # Of halves: the two in the middle are added up.
        return 2 * np.median(0.5 * v[:: -(-len(v) // _MANY)], axis=0)

    if problem.key_mask is None:
        return np.array([found(v) for v in problem.v], np.float64)
    kept = zip(problem.v, problem.key_mask, strict=True)
    return np.array([found(v[keep] if keep.any() else v) for v, keep in kept], np.float64)


def kept_keys(problem: Problem, ranks: Any = Alone) -> np.ndarray:
    """How many keys of a slot key_mask keeps, and at least 1: (H,)."""
    H, n_k = problem.k.shape[:2]
    if problem.key_mask is None and ranks is Alone:
        return np.full(H, max(n_k, 1))
    kept = np.full(H, n_k) if problem.key_mask is None else problem.key_mask.sum(axis=1)
    return np.maximum(ranks.total(kept), 1)


def unbounded(problem: Problem, plain: float, **sizes: float) -> Scores:
    """Scores of which `plain`, and `products` and `lost` where these are given, is all that is known, for engines that
    need no more.
    """
    slots = np.ones((3, problem.k.shape[0]))
    slots[2] = math.inf
    return Scores(plain, math.inf, None, *slots, **sizes)


def measure(problem: Problem, ranks: Any = Alone, centre: bool | Callable[[float], bool] = True) -> Scores:
    """Bounds by Cauchy-Schwarz, from all queries and from the keys that key_mask keeps; the worst slot's.

    Parameters
    ----------
    problem : Problem
    ranks : Alone or Ranks
    centre : bool or callable
        Whether a bound is of use, which centred keys may better; `bound` is inf where not. A callable is asked about
        what no centre brings it below, 0 first.

    Notes
    -----
    Time O(n d): one read of q and k, and two more of k to see whether to centre it is better, in each slot by itself.
    Rounding of the norms is on the safe side.
    """
    if problem.family is not None:
        return _measure_family(problem)
    q, k, keep = problem.q, problem.k, problem.key_mask
    H, G, n, d = q.shape
    scale = abs(problem.scale)
    room = _room(q)
    with np.errstate(all="ignore"):
        q_norm = ranks.largest(_rows.largest_norms(q.reshape(H, G * n, d), None, None, problem.threads))
        plain_norm = ranks.largest(_rows.largest_norms(k, keep, None, problem.threads))
        products = float((q_norm * plain_norm).max()) * room
        plain = products * scale
        if not math.isfinite(plain):
            return unbounded(problem, math.inf)
        # Keys were rotated and projected before they were centred.
        before = problem.origin.k_norm
        lost = problem.origin.q_lost * products
        lost += problem.origin.k_lost * (products if before is None else float((q_norm * before).max()))
        sizes = {"products": products, "lost": lost}
        wanted = centre(0.0) and centre(scale * _least(problem, q_norm)) if callable(centre) else centre
        if not wanted:
            return unbounded(problem, plain, **sizes)
        total = ranks.total(_rows.columns(k, keep, problem.threads)[0])
        mean = (total / kept_keys(problem, ranks)[:, None]).astype(k.dtype)
        mean_norm = ranks.largest(_rows.largest_norms(k, keep, mean, problem.threads))
        # By the keys alone: gradients gain by it where queries are 0, too.
        nearer = mean_norm < plain_norm
        keys = np.where(nearer, mean_norm, plain_norm)
        of_slots = q_norm * keys * scale * room
    found = np.where(nearer[:, None], mean, k.dtype.type(0)) if nearer.any() else None
    factors = _factors(problem.scale, q_norm, keys, k.dtype)
    return Scores(plain, float(of_slots.max()), found, *factors, of_slots, keys=keys, **sizes)


def _least(problem: Problem, q_norm: np.ndarray) -> float:
    """max_h q_norm_h times the root mean square of the distances of a few keys to their mean: to any other point, some
    key is as far. 0, which is always true, with a key_mask.
    """
    if problem.key_mask is not None:
        return 0.0
    square = _rows.few_scatter(problem.k, -(-problem.k.shape[1] // _FEW))
    return math.sqrt(max(0.0, float((q_norm * q_norm * square).max())))


def _room(q: np.ndarray) -> float:
    """What rounding takes from products of two norms at most."""
    return 1 + 4 * (q.shape[-1] + 8) * float(np.finfo(q.dtype).eps)


def _measure_family(problem: Problem) -> Scores:
    """The smaller of ``max_t max|q|^T |W_t| max|k|``, entry by entry, and ``max ||q_i|| max_t ||W_t||_2 max ||k_j||``,
    with ``|W_t|`` in the place of W_t for `plain`. Nothing is centred: q_i W_t c is not the same for all keys.

    Notes
    -----
    Time O(n d + M |S|), and as much for each column that a block of the support has (`_norms`).
    """
    family, scale = problem.family, abs(problem.scale)
    first, last = problem.offsets
    with np.errstate(all="ignore"):
        # Rows that are hidden are 0.
        q_top, q_norm = _sizes(problem.q)
        k_top, k_norm = _sizes(problem.k)
        ends = q_top[:, family.left] * k_top[:, family.right]
        norms = q_norm * k_norm
        index = family.rows(first, last)
        largest, plain, bound, by_norm = 0.0, *np.zeros((3, len(norms)))
        for start in range(index[0], index[-1] + 1, _OFFSETS):
            values = family.values[start : min(start + _OFFSETS, index[-1] + 1)].astype(np.float64)
            size = np.abs(values)
            largest = max(largest, float(size.max()))
            by_entry = (ends @ size.T).max(axis=1)
            by_norm = np.maximum(by_norm, norms * _norms(size, family))
            plain = np.maximum(plain, np.minimum(by_entry, by_norm))
            bound = np.maximum(bound, np.minimum(by_entry, norms * _norms(values, family)))
        room = 1 + (8 * problem.q.shape[3] + len(family.left) + 64) * 2.0**-52
        of_slots = np.minimum(plain, bound) * scale * room
        products = float(plain.max()) * room
        plain = products * scale
    if not math.isfinite(plain):
        return unbounded(problem, math.inf)
    factors = _factors(problem.scale * (largest or 1.0), q_norm, k_norm, np.dtype(np.float64))
    # What is lost of a row may be anywhere in it, whatever the size of its entries.
    lost = (problem.origin.q_lost + problem.origin.k_lost) * float(by_norm.max()) * room
    how = "by the norms of its matrices"
    return Scores(plain, float(of_slots.max()), None, *factors, of_slots, how=how, products=products, lost=lost)


def largest_entries(problem: Problem) -> float:
    """The sum over the family's support of max |q_a| max_t |W_t[a, b]| max |k_b|, for the worst slot."""
    family = problem.family
    index = family.rows(*problem.offsets)
    values = family.values[index[0] : index[-1] + 1]
    with np.errstate(over="ignore"):
        W = np.maximum(values.max(axis=0), -values.min(axis=0)).astype(np.float64)
        q_top, k_top = _sizes(problem.q)[0], _sizes(problem.k)[0]
        return float((q_top[:, family.left] * W * k_top[:, family.right]).sum(axis=1).max())


def _sizes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest of each entry, (H, d), and of the norms of rows, (H,), float64; a block of rows at a time."""
    H, d = rows.shape[0], rows.shape[-1]
    rows = rows.reshape(H, -1, d)
    top, norm = np.zeros((H, d)), np.zeros(H)
    for start in range(0, rows.shape[1], _OFFSETS):
        part = np.abs(rows[:, start : start + _OFFSETS].astype(np.float64))
        peak = part.max(axis=(1, 2), initial=np.finfo(np.float64).tiny)
        top = np.maximum(top, part.max(axis=1))
        part /= peak[:, None, None]
        norm = np.maximum(norm, peak * np.sqrt(np.einsum("hid,hid->hi", part, part).max(axis=1)))
    return top, norm


def _norms(values: np.ndarray, family: Family) -> float:
    """Upper bound of ``max_t ||W_t||_2``, of float64 values (m, |S|).

    The largest of that of the blocks into which the support falls. Of a block X, with A = X^T X, it is
    ``||A^4||_inf^(1/8)``, which for orthogonal matrices is their norm, or ``sqrt(||X||_1 ||X||_inf)`` where X is wide.
    """
    found = 0.0
    for rows, columns, entries in _blocks(family):
        block = np.zeros((len(values), rows.max() + 1, columns.max() + 1))
        block[:, rows, columns] = values[:, entries]
        peak = np.abs(block).max(axis=(1, 2))
        size = np.abs(block)
        either = np.sqrt(size.sum(axis=1).max(axis=1)) * np.sqrt(size.sum(axis=2).max(axis=1))
        if max(block.shape[1:]) <= _WIDE:
            block /= np.maximum(peak, np.finfo(np.float64).tiny)[:, None, None]
            A = block.swapaxes(1, 2) @ block
            A = A @ A
            A = A @ A
            either = np.minimum(either, peak * np.abs(A).sum(axis=2).max(axis=1) ** 0.125)
        found = max(found, float(either.max(initial=0)))
    return found


def _blocks(family: Family) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Row and column, counted from 0 in each block, and index of the pairs that hang together by rows and columns."""
    block = np.arange(len(family.left))
    while True:
        least = block.copy()
        for ends in (family.left, family.right):
            of_end = np.full(ends.max() + 1, len(block))
            np.minimum.at(of_end, ends, least)
            least = of_end[ends]
        if np.array_equal(least, block):
            break
        block = least
    for name in np.unique(block):
        entries = np.flatnonzero(block == name)
        rows, columns = (np.unique(ends[entries], return_inverse=True)[1] for ends in (family.left, family.right))
        yield rows, columns, entries


def _factors(scale: float, q_norm: np.ndarray, k_norm: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What q and k of each slot are multiplied by, (H,): the scale is the product of both, and queries and keys come to
    one size. Monomials of either then stay below B^(degree/2), far from overflow and underflow.
    """
    size, largest = abs(scale), 2.0 ** (np.finfo(dtype).maxexp - 8)
    with np.errstate(all="ignore"):
        if not size:
            return np.zeros(len(k_norm)), np.where(k_norm > 0, 1 / k_norm, 1.0)
        # What is 0 is of any size, so that the other comes to 1.
        q = np.where(q_norm > 0, q_norm, np.where(k_norm > 0, 1 / (size * k_norm), 1.0))
        k = np.where(k_norm > 0, k_norm, 1 / (size * q))
        q_factor = np.clip(math.sqrt(size) * np.sqrt(k) / np.sqrt(q), 1 / largest, largest)
    return np.copysign(q_factor, scale), size / q_factor


def polynomial_rounding(problem: Problem, B: float, values: Values, lost: float = 0.0) -> float:
    """What rounding costs the polynomial engine, in units of max_c range_j(v_jc), for scores within B.

    Monomial sums cancel for negative scores: a few units times e^{2B}, measured (0.3 to 4, 11 where B is small).
    Values are centred, so that their offset costs no more than storing O does. `lost` is `Scores.lost`: scores that are
    off by so much times the scale move O by as much of the range, and never by more than the range.
    """
    unit = float(np.finfo(problem.q.dtype).eps) / 2
    sums = 12 + 4 * math.exp(min(2 * B, 700))
    return unit * (sums * (2 if values.far else 1) + 2 * values.offset) + moved(problem, lost)


def moved(problem: Problem, lost: float) -> float:
    """How far scores whose products are off by `lost` move O, in units of the range."""
    return min(1.0, abs(problem.scale) * lost) if lost else 0.0
