"""``O = D^-1 A V`` and its gradient by blocked streaming softmax: right for all scores, never an n x n array."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...kernels import _exact, _exact_gradient, _rows
from ...problem.input_gradients import InputGradients, SymbolGradient
from ...problem.problem import LIMITS, Outline, Problem
from .bias_table import from_the_largest

LOG2E = 1 / math.log(2)
# Below this, in units of log2, exp needs no running maximum: 2^60 and 2^-60 are far inside float32.
BOUNDED = 60.0


@dataclass(slots=True)
class Tables:
    """What the kernels are told about scores beside q and k (see c/exact.h)."""

    lo: int
    hi: int
    scale: float
    gain: float
    bounded: np.ndarray  # (H,) bool
    everywhere: bool
    masked: bool
    grad_scale: float
    symbol: np.ndarray | None
    factor: np.ndarray | None
    factor_start: np.ndarray | None  # (H, G): where in `factor` the table of a head begins
    key_shift: np.ndarray
    bias_shift: np.ndarray | float  # what was taken from every bias, (H or 1, G or 1, 1)


@dataclass(slots=True)
class Sized:
    """q, k and scales after powers of two, with these exponents, were taken from them."""

    q: np.ndarray
    k: np.ndarray
    of_q: int = 0
    of_k: int = 0
    of_scale: int = 0

    @property
    def gain(self) -> float:
        """What scores of these are to be multiplied with: a finite number of the dtype, where it has to be clipped
        weights are 0 or 1 whatever it is.
        """
        exponent = self.of_q + self.of_k + self.of_scale
        if not exponent:
            return 1.0
        most = LIMITS[self.q.dtype].maxexp - 4
        return math.ldexp(1.0, min(max(exponent, -most), most))


@dataclass(slots=True)
class Saved:
    """What backward needs of forward: O, and maximum and inverse sum of every row (so no exp is taken twice)."""

    sized: Sized
    tables: Tables
    o: np.ndarray
    maximum: np.ndarray
    inverse: np.ndarray


def forward(problem: Problem, bound: float | np.ndarray, want_lse: bool) -> tuple[np.ndarray, np.ndarray | None, Saved]:
    """O (H, G, n, d_v), lse float64 (H, G, n) or None, and what backward needs.

    Parameters
    ----------
    problem : Problem
    bound : float or (H,) array
        A bound on ``|scale <q, k>|``, or inf; in slots where it is small no running maximum is kept.
    want_lse : bool

    Notes
    -----
    Time ``n n_k (2 d + 2 d_v + exp)`` for each query head; memory: packed keys (n_k d) and a tile a thread.
    """
    sized = _sized(problem, bound)
    tables = _tables(problem, bound, sized)
    o, maximum, inverse, lse = _exact.forward(sized.q, sized.k, problem.v, tables, want_lse, problem.threads)
    if want_lse and problem.bias is not None:
        lse += tables.bias_shift
    return o, lse, Saved(sized, tables, o, maximum, inverse)


def backward(problem: Problem, saved: Saved, do: np.ndarray) -> InputGradients:
    """The gradients of ``<do, O>``, with the bias's where there is one.

    Notes
    -----
    With P = D^-1 A: dv = P^T do, dS = P * (do V^T - rowsum(do * O)), dq = scale dS k, dk = scale dS^T q, and the
    symbol's gradient sums dS along diagonals. Five products in one pass over the keys.
    """
    want = problem.bias is not None
    sized = saved.sized
    dq, dk, dv, diagonals = _exact_gradient.backward(saved, problem.v, do, want, segments(problem), problem.threads)
    if sized.of_q or sized.of_k or sized.of_scale:
        with np.errstate(over="ignore"):
            dq = np.ldexp(dq, sized.of_scale + sized.of_k)
            dk = np.ldexp(dk, sized.of_scale + sized.of_q)
    found = InputGradients(dq, dk, dv)
    if want:
        _, block, _ = _exact.blocking(problem.dtype)
        by_offset = diagonals[..., block : block + problem.sizes.n + problem.sizes.n_k - 1][..., ::-1]
        found.symbol = (SymbolGradient(by_offset, problem.mask.least),)
    return found


def resume(problem: Problem, bound: float, o: np.ndarray, lse: np.ndarray) -> Saved:
    """What `backward` needs of a forward pass that had more keys than `problem`, of which o and lse are the results."""
    sized = _sized(problem, bound)
    tables, gain = _tables(problem, bound, sized), sized.gain
    log2_sum = np.where(np.isfinite(lse), (lse - tables.bias_shift) * LOG2E, 0)
    # What rounding the maximum loses, its partner keeps.
    maximum = (log2_sum / gain).astype(o.dtype)
    with np.errstate(over="ignore"):
        # A sum below the smallest number has an inverse past the largest.
        inverse = np.where(np.isfinite(lse), np.exp2(maximum.astype(np.float64) * gain - log2_sum), 0).astype(o.dtype)
    return Saved(sized, tables, o, maximum, inverse)


def segments(problem: Outline) -> int:
    """Into how many parts backward cuts the keys."""
    return _exact_gradient.segments_of(problem.cut_for, problem.sizes.n_k, problem.dtype)


def _sized(problem: Problem, bound: float | np.ndarray) -> Sized:
    """q, k and scales, by powers of two, so that no score overflows (entries of 1e155 in float64, a scale of 1e38 in
    float32) and no scale is subnormal.
    """
    q, k, near, scale = problem.q, problem.k, problem.near, problem.largest_scale
    info = LIMITS[q.dtype]
    power = power_of_scale(problem)
    sized = Sized(q, k)
    most = bound if type(bound) is float else _rows.largest(bound)
    largest = float(info.max) / 16
    if most < 1e30 and near is None and not power:
        # Queries are multiplied by the scale before anything else, and keys may be as small as this is large.
        over = scale > 0.5 and _excess(_rows.largest(q, problem.threads), scale, largest)
        return Sized(np.ldexp(q, -over), np.ldexp(k, over), over, -over) if over else sized
    top_q, top_k = (float(max(abs(x.max(initial=0)), abs(x.min(initial=0)))) for x in (q, k))
    if power:
        # All to a size of about 1.
        of_q, of_k = math.frexp(top_q)[1], math.frexp(top_k)[1]
        return Sized(np.ldexp(q, -of_q), np.ldexp(k, -of_k), of_q, of_k, power)
    room = math.log2(largest) - math.log2(max(1.0, scale) * q.shape[-1]) - 1
    over = max(0, math.ceil(math.log2(top_q or 1) + math.log2(top_k or 1) - room))
    # An exponent each, proportional to its own size.
    part_q = min(over, max(0, math.ceil(over / 2 + (math.log2(top_q or 1) - math.log2(top_k or 1)) / 2)))
    part_q += _excess(math.ldexp(top_q, -part_q), scale, largest)
    if part_q or over:
        sized = Sized(np.ldexp(q, -part_q), np.ldexp(k, part_q - over), part_q, over - part_q, 0)
    return sized


def _excess(top: float, scale: float, largest: float) -> int:
    """By which power of two numbers up to `top`, times the scale in units of log2, are past the largest."""
    return max(0, math.ceil(math.log2(top or 1) + math.log2(max(scale, 1) * LOG2E) - math.log2(largest)))


def power_of_scale(problem: Outline) -> int:
    """The power of two that is taken from scales, 0 unless they are so large or small that scores might overflow."""
    power = math.frexp(problem.largest_scale)[1]
    return power if abs(power) > 3 * LIMITS[problem.dtype].maxexp // 4 else 0


def most_of_sums(dtype: np.dtype) -> float:
    """What the sum of a column's values must be below, so that no running maximum is needed for their weights."""
    return float(LIMITS[dtype].max) / 2**BOUNDED


def _tables(problem: Problem, bound: float | np.ndarray, sized: Sized) -> Tables:
    largest: float | np.ndarray = _rows.largest(problem.v, problem.threads)
    if largest * problem.sizes.n_k >= most_of_sums(problem.dtype) and problem.sizes.H > 1:
        _, low, high = _rows.columns(problem.v, None, problem.threads)
        largest = np.maximum(-low, high).max(axis=1, initial=0).astype(np.float64)
    return tables_of(problem, bound, largest, sized.gain, sized.of_scale)


def tables_of(
    problem: Outline, bound: float | np.ndarray, largest: float | np.ndarray, gain: float = 1.0, of_scale: int = 0
) -> Tables:
    """What the kernels are told about scores within `bound` and values up to `largest`, each one or one a slot.

    `gain` and `of_scale` are those of `Sized`, if powers of two were taken from queries, keys and scales.
    """
    dtype, scale = problem.dtype, math.ldexp(problem.scale, -of_scale)
    tile, block, _ = _exact.blocking(dtype)
    mask, heads, n, n_k = problem.mask, problem.sizes.H, problem.sizes.n, problem.sizes.n_k
    lo, hi = mask.band_of_indices

    symbol, bias_shift = None, 0.0
    reach = bound
    if problem.bias is not None or mask.banded:
        lead = (1, 1) if problem.bias is None else problem.bias.shape[:2]
        symbol = np.full((*lead, block + n + n_k - 1 + tile), -np.inf, dtype)
        # Offsets fall with the index.
        first, last = (min(max(n_k - 1 - edge, 0), n + n_k - 1) for edge in (hi, lo - 1))
        inside = symbol[..., block + first : block + last]
        if problem.bias is None:
            inside[...] = 0
        else:
            bias = problem.bias[..., ::-1][..., first:last]
            inside[...], bias_shift = from_the_largest(bias, LOG2E / gain, dtype)
            reach = reach - inside.min(axis=(1, 2), initial=0).astype(np.float64) * gain / LOG2E
    factor = start = None
    if problem.near is not None:
        scales, which = problem.near.times_power(-of_scale).distinct(heads, problem.sizes.G)
        offset = (n_k - 1) - np.arange(n + n_k - 1)  # j - i at u = i - j + n_k - 1
        near = np.abs(offset - mask.offset) < problem.near.width
        each = np.where(near, scales[:, None], scale) * LOG2E
        factor = np.pad(each, ((0, 0), (block, tile))).astype(dtype)
        start = which * factor.shape[1]
        reach = math.inf
    key_shift = np.zeros((heads, -(-n_k // block) * block), dtype)
    key_shift[:, n_k:] = -np.inf
    if mask.kept is not None:
        key_shift[:, :n_k][~mask.kept] = -np.inf
    bounded = (gain == 1) & (largest * n_k < most_of_sums(dtype)) & (reach * LOG2E <= BOUNDED)
    return Tables(
        lo=lo,
        hi=hi,
        scale=scale,
        gain=gain,
        bounded=bounded if np.shape(bounded) == (heads,) else np.full(heads, bounded, np.bool_),
        everywhere=problem.bias is not None or problem.near is not None,
        masked=mask.kept is not None,
        grad_scale=math.log(2) if problem.near is not None else scale,
        symbol=symbol,
        factor=factor,
        factor_start=start,
        key_shift=key_shift,
        bias_shift=bias_shift,
    )
