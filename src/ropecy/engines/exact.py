"""``O = D^-1 A V`` and its gradient by blocked streaming softmax: always right, never an n x n array."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..kernels import _exact, _rows
from ..problem import Problem
from . import family
from ._bias import from_the_largest

LOG2E = 1 / math.log(2)
# Below this, in units of log2, exp needs no running maximum: 2^60 and 2^-60 are far inside float32.
BOUNDED = 60.0
# Marked rows with fewer unmarked ones between are computed together: a call costs about as much as a tile.
_CLOSE = 16


@dataclass(slots=True)
class Tables:
    """What the kernels are told about scores beside q and k (see c/exact.h)."""

    lo: int
    hi: int
    scale: float
    gain: float
    bounded: bool
    everywhere: bool
    masked: bool
    grad_scale: float
    symbol: np.ndarray | None
    factor: np.ndarray | None
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
        most = np.finfo(self.q.dtype).maxexp - 4
        return math.ldexp(1.0, min(max(self.of_q + self.of_k + self.of_scale, -most), most))


@dataclass(slots=True)
class Saved:
    """What backward needs of forward: O, and maximum and inverse sum of every row (so no exp is taken twice)."""

    sized: Sized
    tables: Tables
    o: np.ndarray
    maximum: np.ndarray
    inverse: np.ndarray


def forward(problem: Problem, bound: float, want_lse: bool) -> tuple[np.ndarray, np.ndarray | None, Saved]:
    """O (H, G, n, d_v), lse float64 (H, G, n) or None, and what backward needs.

    Parameters
    ----------
    problem : Problem
    bound : float
        A bound on ``|scale <q, k>|``, or inf; where it is small no running maximum is kept.
    want_lse : bool

    Notes
    -----
    Time ``n n_k (2 d + 2 d_v + exp)`` for each query head; memory: packed keys (n_k d) and a tile a thread.
    """
    if problem.family is not None:
        return family.forward(problem, want_lse)
    sized = _sized(problem, bound)
    tables = _tables(problem, bound, sized)
    o, maximum, inverse, lse = _exact.forward(sized.q, sized.k, problem.v, tables, want_lse, problem.threads)
    if want_lse and problem.bias is not None:
        lse += tables.bias_shift
    return o, lse, Saved(sized, tables, o, maximum, inverse)


def backward(problem: Problem, saved: Saved, do: np.ndarray):
    """dq, dk, dv of ``<do, O>`` and the gradient of the symbol (H, G, n + n_k - 1), or None where there is no bias; and
    that of the family, where there is one (`family.backward`).

    Notes
    -----
    With P = D^-1 A: dv = P^T do, dS = P * (do V^T - rowsum(do * O)), dq = scale dS k, dk = scale dS^T q, and the
    symbol's gradient sums dS along diagonals. Five products in one pass over the keys.
    """
    if problem.family is not None:
        return family.backward(problem, saved, do)
    want = problem.bias is not None
    sized, tables = saved.sized, saved.tables
    dq, dk, dv, diagonals = _exact.backward(
        sized.q, sized.k, problem.v, tables, saved.o, saved.maximum, saved.inverse, do, want, problem.threads
    )
    if sized.of_q or sized.of_k or sized.of_scale:
        with np.errstate(over="ignore"):
            dq = np.ldexp(dq, sized.of_scale + sized.of_k)
            dk = np.ldexp(dk, sized.of_scale + sized.of_q)
    if not want:
        return dq, dk, dv, None
    _, block, _ = _exact.blocking(problem.q.dtype)
    length = problem.q.shape[2] + problem.k.shape[1] - 1
    return dq, dk, dv, diagonals[..., block : block + length][..., ::-1]


def forward_rows(problem: Problem, bound: float, rows: np.ndarray, o: np.ndarray, lse: np.ndarray | None) -> None:
    """Overwrites o, and lse unless None, in the rows that `rows` (H, G, n) marks.

    Notes
    -----
    Time ``n_k (2 d + 2 d_v + exp)`` a row. Where j - i matters, rows close to each other are one piece with those
    between, and a piece costs as much as a tile.
    """
    for head, group, piece, part in _pieces(problem, rows):
        exact, exact_lse, _ = forward(part, bound, lse is not None)
        marked = rows[head, group, piece]
        o[head, group, piece[marked]] = exact[0, 0, marked]
        if lse is not None:
            lse[head, group, piece[marked]] = exact_lse[0, 0, marked]


def backward_rows(
    problem: Problem,
    bound: float,
    rows: np.ndarray,
    o: np.ndarray,
    lse: np.ndarray,
    do: np.ndarray,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
) -> None:
    """Adds to dq, dk, dv what the rows that `rows` (H, G, n) marks have of them, o and lse being exact there.

    Notes
    -----
    As `forward_rows`, times 2.5.
    """
    for head, group, piece, part in _pieces(problem, rows):
        at = (slice(head, head + 1), slice(group, group + 1), piece)
        marked = rows[at][..., None]
        saved = resume(part, bound, o[at], lse[at])
        found = backward(part, saved, np.where(marked, do[at], 0))
        dq[at] += found[0]
        end = part.k.shape[1]
        dk[head, :end] += found[1][0]
        dv[head, :end] += found[2][0]


def _pieces(problem: Problem, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, Problem]]:
    """Head, group and indices of rows, marked ones and some between, and their problem with all keys they may see."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    by_offset = (problem.lo, problem.hi, problem.bias, problem.near, problem.family)
    anywhere = all(part is None for part in by_offset)
    for head, group in np.argwhere(rows.any(axis=2)):
        marked = np.flatnonzero(rows[head, group])
        if anywhere:
            pieces = [marked]
        else:
            cuts = np.flatnonzero(np.diff(marked) > _CLOSE) + 1
            pieces = [np.arange(part[0], part[-1] + 1) for part in np.split(marked, cuts)]
        for piece in pieces:
            # What no row of the piece sees is left out.
            end = n_k
            if problem.hi is not None:
                end = max(0, min(end, int(piece[-1]) + problem.q_offset + problem.hi + 1))
            bias = problem.bias
            if bias is not None:
                start = n - 1 - int(piece[-1])
                bias = bias[min(head, len(bias) - 1), min(group, bias.shape[1] - 1)]
                bias = np.ascontiguousarray(bias[start : start + len(piece) + end - 1])[None, None]
            part = replace(
                problem,
                q=np.ascontiguousarray(problem.q[head, group, piece])[None, None],
                k=problem.k[head : head + 1, :end],
                v=problem.v[head : head + 1, :end],
                q_offset=problem.q_offset + int(piece[0]),
                bias=bias,
                key_mask=None if problem.key_mask is None else problem.key_mask[head : head + 1, :end],
            )
            if not part.empty:
                yield int(head), int(group), piece, part


def resume(problem: Problem, bound: float, o: np.ndarray, lse: np.ndarray) -> Saved:
    """What `backward` needs of a forward pass that had more keys than `problem`, of which o and lse are the results."""
    if problem.family is not None:
        return family.resume(problem, o, lse)
    sized = _sized(problem, bound)
    tables, gain = _tables(problem, bound, sized), sized.gain
    log2_sum = np.where(np.isfinite(lse), (lse - tables.bias_shift) * LOG2E, 0)
    # What rounding the maximum loses, its partner keeps.
    maximum = (log2_sum / gain).astype(o.dtype)
    with np.errstate(over="ignore"):
        # A sum below the smallest number has an inverse past the largest.
        inverse = np.where(np.isfinite(lse), np.exp2(maximum.astype(np.float64) * gain - log2_sum), 0).astype(o.dtype)
    return Saved(sized, tables, o, maximum, inverse)


def merge(o: np.ndarray, lse: np.ndarray, part: np.ndarray, part_lse: np.ndarray) -> None:
    """Softmax over two sets of keys from softmax over each, in place."""
    both = np.logaddexp(lse, part_lse)
    o *= share(lse, both).astype(o.dtype)[..., None]
    o += share(part_lse, both).astype(o.dtype)[..., None] * part
    lse[...] = both


def share(lse: np.ndarray, both: np.ndarray) -> np.ndarray:
    """exp(lse - both), of a row's weight what some keys have; 0 where they are not seen."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(lse), 0, np.exp(lse - both))


def near_scale_gradient(problem: Problem, o: np.ndarray, lse: np.ndarray, do: np.ndarray) -> np.float64:
    """d<do, O> / d scale_near = sum of dS_ij <q_i, k_j> over the pairs of the near field, of any engine's o and lse.

    Notes
    -----
    sum_i <q_i, sum_j dS_ij k_j>: the near field's own backward pass, in time ``n (2 w - 1)`` pairs.
    """
    width, scale_near = problem.near
    lo = 1 - width if problem.lo is None else max(problem.lo, 1 - width)
    hi = width - 1 if problem.hi is None else min(problem.hi, width - 1)
    # The scale goes to q but for a power of two: so dq is the sum over keys where scale_near is 0, too.
    mantissa, exponent = math.frexp(scale_near)
    q = problem.q * problem.q.dtype.type(mantissa)
    band = replace(problem, q=q, scale=math.ldexp(1.0, exponent), lo=lo, hi=hi, near=None)
    if lo > hi or band.empty:
        return np.float64(0)
    # Weights come of the band's own sums: computed from lse, those of huge scores would be Inf by rounding alone.
    _, own, saved = forward(band, math.inf, True)
    with np.errstate(over="ignore"):
        inverse = (saved.inverse * np.minimum(share(own, lse), 1)).astype(o.dtype)
    dq = backward(band, replace(saved, o=o, inverse=inverse), do)[0]
    with np.errstate(over="ignore"):
        return np.ldexp(np.einsum("hgid,hgid->", problem.q, dq, dtype=np.float64), -exponent)


def pairs(problem: Problem) -> float:
    """How many pairs of a query and a key the band lets a head see, the work of exact attention."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    if problem.lo is None and problem.hi is None:
        return float(n) * n_k
    before = 0 if problem.lo is None else _clipped_sum(problem.q_offset + problem.lo, n, n_k)
    upto = n * n_k if problem.hi is None else _clipped_sum(problem.q_offset + problem.hi + 1, n, n_k)
    return float(upto - before)


def _clipped_sum(start: int, n: int, most: int) -> int:
    """The sum over 0 <= i < n of start + i clipped to [0, most]."""
    rising, top = (min(max(edge, 0), n) for edge in (-start, most - start))
    return (top - rising) * (2 * start + rising + top - 1) // 2 + (n - top) * most


def segments(problem: Problem) -> int:
    """Into how many parts backward cuts the keys."""
    return _exact.segments_of(problem.k.shape[0], problem.k.shape[1], problem.q.dtype)


def _sized(problem: Problem, bound: float) -> Sized:
    """q, k and scales, by powers of two, so that no score overflows (entries of 1e155 in float64, a scale of 1e38 in
    float32) and no scale is subnormal.
    """
    q, k, near = problem.q, problem.k, problem.near
    info = np.finfo(q.dtype)
    scale = max(abs(problem.scale), 0 if near is None else abs(near[1]))
    power = math.frexp(scale)[1]
    power = power if abs(power) > 3 * info.maxexp // 4 else 0
    sized = Sized(q, k)
    if bound < 1e30 and near is None and not power:
        return sized
    largest = float(info.max) / 16
    top_q, top_k = (float(max(abs(x.max(initial=0)), abs(x.min(initial=0)))) for x in (q, k))
    if power:
        # All to a size of about 1.
        of_q, of_k = math.frexp(top_q)[1], math.frexp(top_k)[1]
        return Sized(np.ldexp(q, -of_q), np.ldexp(k, -of_k), of_q, of_k, power)
    room = math.log2(largest) - math.log2(max(1.0, scale) * q.shape[-1]) - 1
    over = math.log2(top_q or 1) + math.log2(top_k or 1) - room
    if over > 0:
        # An exponent each, proportional to its own size; the gain must itself be a finite number of the dtype.
        over = min(math.ceil(over), int(math.log2(largest)))
        part_q = min(over, max(0, math.ceil(over / 2 + (math.log2(top_q or 1) - math.log2(top_k or 1)) / 2)))
        sized = Sized(np.ldexp(q, -part_q), np.ldexp(k, part_q - over), part_q, over - part_q, 0)
    return sized


def _tables(problem: Problem, bound: float, sized: Sized) -> Tables:
    gain, scale = sized.gain, math.ldexp(problem.scale, -sized.of_scale)
    dtype = problem.q.dtype
    tile, block, _ = _exact.blocking(dtype)
    heads, n_k = problem.k.shape[:2]
    n = problem.q.shape[2]
    far = n + n_k  # past every j - i
    lo = -far if problem.lo is None else max(-far, problem.lo + problem.q_offset)
    hi = far if problem.hi is None else min(far, problem.hi + problem.q_offset)

    symbol, bias_shift = None, 0.0
    reach = bound
    if problem.bias is not None or problem.lo is not None or problem.hi is not None:
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
            reach += -float(inside.min(initial=0)) * gain / LOG2E
    factor = None
    if problem.near is not None:
        width, scale_near = problem.near[0], math.ldexp(problem.near[1], -sized.of_scale)
        offset = (n_k - 1) - np.arange(n + n_k - 1)  # j - i at u = i - j + n_k - 1
        near = np.abs(offset - problem.q_offset) < width
        factor = np.pad(np.where(near, scale_near, scale) * LOG2E, (block, tile)).astype(dtype)
        reach = math.inf
    key_shift = np.full((heads, -(-n_k // block) * block), -np.inf, dtype)
    key_shift[:, :n_k] = 0 if problem.key_mask is None else np.where(problem.key_mask, 0, -np.inf)
    bounded = gain == 1 and reach * LOG2E <= BOUNDED
    bounded = bounded and _rows.largest(problem.v) * 2**BOUNDED * max(n_k, 1) < float(np.finfo(dtype).max)
    return Tables(
        lo=lo,
        hi=hi,
        scale=scale,
        gain=gain,
        bounded=bounded,
        everywhere=problem.bias is not None or problem.near is not None,
        masked=problem.key_mask is not None,
        grad_scale=math.log(2) if problem.near is not None else scale,
        symbol=symbol,
        factor=factor,
        key_shift=key_shift,
        bias_shift=bias_shift,
    )
