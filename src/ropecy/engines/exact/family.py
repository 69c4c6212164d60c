"""Exact attention with matrices W_{i-j} between queries and keys, computed by blocks, without an n x n array.

A block of rows and one of keys, these in reverse order, see each offset along an anti-diagonal. So U_b[i, t] = sum_a
q_ia W_t[a, b], a product of matrices for each b, is read at t = i + j by strides alone:
s_ij = sum_b U_b[i, i + j] k_jb.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ...problem.input_gradients import InputGradients, SymbolGradient
from ...problem.problem import Outline, Problem
from .bias_table import from_the_largest
from .tasks import in_order

_ROWS = 64  # rows of a block: a few arrays of (64, 512) stay in the cache
_KEYS = 512  # keys of a block
_STRETCH = 96  # how many values are summed in their own dtype before float64: equal terms are all rounded to one side
_PARTS = 8  # into how many parts, each with gradients of its own, backward cuts all rows


@dataclass(slots=True)
class Saved:
    """What backward needs of forward."""

    tiles: Tiles
    o: np.ndarray
    maximum: np.ndarray
    inverse: np.ndarray


class Tiles:
    """q, reversed k, W and biases, each divided by a power of two so that no product overflows, and tiles of scores.

    The scores are ``2^gain_exponent`` times the numbers that `tile` returns.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, family = problem, problem.family
        dtype = problem.q.dtype
        # Offsets t = i + offset - j from `first` on.
        mask = problem.mask
        self.first = -mask.most
        t = np.arange(self.first, 1 - mask.least)
        # Rows of the factors of scores by offset that there are, and which row each slot and query head has.
        self.factors, self.which = np.full((1, len(t)), float(problem.scale)), np.zeros(problem.sizes[:2], np.intp)
        if problem.near is not None:
            scales, self.which = problem.near.distinct(*problem.sizes[:2])
            self.factors = np.where(np.abs(t) < problem.near.width, scales[:, None], self.factors)
        index = family.rows(t[0], t[-1])
        values = family.values[index[0] : index[-1] + 1]
        self.exponents = [_exponent(X) for X in (problem.q, problem.k, values, self.factors)]
        self.q = np.ldexp(problem.q, -self.exponents[0])
        self.k = np.ldexp(problem.k[:, ::-1], -self.exponents[1])
        self.v = problem.v[:, ::-1]
        self.factors = np.ldexp(self.factors, -self.exponents[3])
        self.gain_exponent = sum(self.exponents)
        # If this is clipped, then up to rounding all scores are 0, or they differ so much that weights are 0 or 1.
        clipped = min(max(self.gain_exponent, -64), np.finfo(dtype).maxexp - 2)
        self.gain = dtype.type(math.ldexp(1.0, clipped))

        first, stop = mask.seen
        allowed = (-t >= first) & (-t < stop)
        self.shift = self.largest_bias = None
        if problem.bias is not None or not allowed.all():
            bias = np.zeros((1, 1, len(t))) if problem.bias is None else problem.bias[..., ::-1]
            # Biases that no row may use must not be taken for the largest.
            bias = np.where(allowed, bias, bias[..., allowed].max(axis=-1, keepdims=True)) if allowed.any() else bias
            shift, self.largest_bias = from_the_largest(bias, math.ldexp(1.0, -clipped), dtype)
            self.shift = np.where(allowed, shift, dtype.type(-np.inf))
        self.hidden = None
        if mask.kept is not None:
            self.hidden = np.where(mask.kept[:, ::-1], 0, -np.inf).astype(dtype)
        # For each b of the support: its entries, and their a.
        self.columns = [(b, np.flatnonzero(family.right == b)) for b in np.unique(family.right)]

    def blocks(self, first: int, last: int) -> Iterator[tuple[slice, slice]]:
        """(reversed keys, offsets) of the blocks that rows [first, last) see, offsets as indices from `self.first`."""
        n_k = self.problem.sizes.n_k
        # Keys of the first row on, up to the end of the last row's.
        start, end = self.problem.mask.keys_of(first)[0], self.problem.mask.keys_of(last - 1)[1]
        for place in range(n_k - end, n_k - start, _KEYS):
            keys = slice(place, min(place + _KEYS, n_k - start))
            yield keys, slice(first + keys.start, last + keys.stop - 1)

    def factor(self, head: int, group: int, offsets: slice) -> np.ndarray:
        """What scores of a query head are multiplied by at these offsets, (m,)."""
        return self.factors[self.which[head, group], offsets]

    def entries(self, head: int, group: int, offsets: slice) -> np.ndarray:
        """The entries of factor_t W_t at these offsets, (|S|, m)."""
        family, dtype = self.problem.family, self.q.dtype
        values = family.values[family.rows(self.first + offsets.start, self.first + offsets.stop - 1)]
        values = np.ldexp(values, -self.exponents[2]) * self.factor(head, group, offsets)[:, None]
        return np.ascontiguousarray(values.T, dtype)

    def tile(self, head: int, group: int, rows: slice, keys: slice, offsets: slice) -> tuple[np.ndarray, ...]:
        """Scores s (rows, keys), -inf for hidden pairs; the entries of W, (|S|, m); and U_b for every b."""
        q, k = self.q[head, group, rows], self.k[head, keys]
        W = self.entries(head, group, offsets)
        left = self.problem.family.left
        U = np.empty((len(self.columns), len(q), W.shape[1]), q.dtype)
        s = np.zeros((len(q), len(k)), q.dtype)
        term = np.empty_like(s)
        for u, (b, entries) in zip(U, self.columns, strict=True):
            np.matmul(q[:, left[entries]], W[entries], out=u)
            np.multiply(_skewed(u, len(k)), k[:, b], out=term)
            s += term
        if self.shift is not None:
            shift = self.shift[min(head, len(self.shift) - 1), min(group, self.shift.shape[1] - 1), offsets]
            s += as_strided(shift, s.shape, 2 * shift.strides, writeable=False)
        if self.hidden is not None:
            s += self.hidden[head, keys]
        return s, W, U


def forward(problem: Problem, bound: float, want_lse: bool) -> tuple[np.ndarray, np.ndarray | None, Saved]:
    """O (H, G, n, d_v), lse float64 (H, G, n) or None, and what backward needs.

    Notes
    -----
    Time ``n n_k (2 |S| + 2 d_v)`` operations in products of matrices and ``n n_k (d + exp)`` entry by entry; memory a
    few blocks a thread.
    """
    tiles = Tiles(problem)
    H, G, n = problem.q.shape[:3]
    o = np.zeros((H, G, n, problem.v.shape[2]), problem.q.dtype)
    maximum, inverse = np.zeros(o.shape[:3], o.dtype), np.zeros(o.shape[:3], o.dtype)
    lse = np.full(o.shape[:3], -np.inf) if want_lse else None

    def rows_of(head: int, group: int, rows: slice) -> Generator[None, None, None]:
        count = rows.stop - rows.start
        top = np.full(count, -np.inf, o.dtype)
        total, sums = np.zeros(count), np.zeros((count, o.shape[3]))
        for keys, offsets in tiles.blocks(rows.start, rows.stop):
            with np.errstate(all="ignore"):
                s, _, _ = tiles.tile(head, group, rows, keys, offsets)
                new = np.maximum(top, s.max(axis=1))
                shift = np.where(np.isfinite(new), new, 0)
                weights = np.exp((s - shift[:, None]) * tiles.gain)
                fade = np.exp((top - shift) * tiles.gain).astype(np.float64)
                total = total * fade + weights.sum(axis=1)
                sums *= fade[:, None]
                v = tiles.v[head, keys]
                for some in range(0, len(v), _STRETCH):
                    sums += weights[:, some : some + _STRETCH] @ v[some : some + _STRETCH]
            top = new
            yield
        seen = total > 0
        maximum[head, group, rows] = np.where(seen, top, 0)
        reciprocal = np.divide(1, total, out=np.zeros(count), where=seen)
        inverse[head, group, rows] = reciprocal
        o[head, group, rows] = sums * reciprocal[:, None]
        if lse is not None:
            with np.errstate(over="ignore"):
                high = np.ldexp(top.astype(np.float64), tiles.gain_exponent)
                lse[head, group, rows] = np.where(seen, high + np.log(np.where(seen, total, 1)), -np.inf)

    tasks = [(h, g, rows) for h in range(H) for g in range(G) for rows in _cut(0, n)]
    for _ in in_order(rows_of, tasks, problem.threads):
        pass
    if want_lse and tiles.largest_bias is not None:
        lse += tiles.largest_bias
    return o, lse, Saved(tiles, o, maximum, inverse)


def resume(problem: Problem, bound: float, o: np.ndarray, lse: np.ndarray) -> Saved:
    """What `backward` needs of a forward pass that had more keys than `problem`, of which o and lse are the results."""
    tiles = Tiles(problem)
    lse = np.where(np.isfinite(lse), lse, np.inf) - (0 if tiles.largest_bias is None else tiles.largest_bias)
    maximum = np.where(np.isinf(lse), 0, np.ldexp(lse, -tiles.gain_exponent)).astype(o.dtype)
    # `inverse` is computed with the maximum as it was rounded, so that the product of both is right.
    inverse = np.exp(np.ldexp(maximum.astype(np.float64), tiles.gain_exponent) - lse).astype(o.dtype)
    return Saved(tiles, o, maximum, inverse)


def backward(problem: Problem, saved: Saved, do: np.ndarray) -> InputGradients:
    """The gradients of ``<do, O>``, with that of the family and, if there is a bias, of the bias.

    Notes
    -----
    With dS as in exact attention: dq_i = scale sum_j dS_ij W_t k_j, dk_j likewise, dW_t[a, b] = scale sum_{i - j = t}
    dS_ij q_ia k_jb. Two to three times the time of forward. Memory: the gradients, once for each of 8 parts.
    """
    tiles, family = saved.tiles, problem.family
    H, G, n, d = problem.q.shape
    n_k, d_v = problem.v.shape[1:]
    length = n + n_k - 1
    left = family.left

    def part(head: int, group: int, start: int, stop: int) -> Generator[None, None, tuple[Any, ...]]:
        dq, dk, dv = np.zeros((stop - start, d)), np.zeros((n_k, d)), np.zeros((n_k, d_v))
        dW = np.zeros((len(left), stop - start + n_k - 1))
        dsymbol = np.zeros(dW.shape[1]) if problem.bias is not None else None
        for rows in _cut(start, stop):
            own = slice(rows.start - start, rows.stop - start)
            q, grad = tiles.q[head, group, rows], do[head, group, rows]
            delta = np.einsum("ic,ic->i", grad, saved.o[head, group, rows])
            for keys, offsets in tiles.blocks(rows.start, rows.stop):
                here = slice(offsets.start - start, offsets.stop - start)
                k, v = tiles.k[head, keys], tiles.v[head, keys]
                with np.errstate(all="ignore"):
                    s, W, U = tiles.tile(head, group, rows, keys, offsets)
                    P = np.exp((s - saved.maximum[head, group, rows, None]) * tiles.gain)
                    P *= saved.inverse[head, group, rows, None]
                    dS = P * (grad @ v.T - delta[:, None])
                    dv[keys] += P.T @ grad
                    spread = np.zeros((len(q), W.shape[1]), q.dtype)
                    window = _skewed(spread, len(k), writeable=True)
                    if dsymbol is not None:
                        window[...] = dS
                        dsymbol[here] += spread.sum(axis=0)
                    for u, (b, entries) in zip(U, tiles.columns, strict=True):
                        dk[keys, b] += np.einsum("ij,ij->j", dS, _skewed(u, len(k)))
                        np.multiply(dS, k[:, b], out=window)
                        dq[own, left[entries]] += spread @ W[entries].T
                        dW[entries, here] += q[:, left[entries]].T @ spread
                yield
        return dq, dk, dv, dW, dsymbol

    dq, dk, dv = np.zeros((H, G, n, d)), np.zeros((H, n_k, d)), np.zeros((H, n_k, d_v))
    dfamily = np.zeros((len(left), length))
    dsymbol = None if problem.bias is None else np.zeros((H, G, length))
    ends = np.linspace(0, n, segments(problem) + 1).astype(int).tolist()
    tasks = [(h, g, a, b) for h in range(H) for g in range(G) for a, b in pairwise(ends)]
    for (h, g, start, stop), found in zip(tasks, in_order(part, tasks, problem.threads), strict=True):
        dq[h, g, start:stop] = found[0]
        dk[h] += found[1][::-1]
        dv[h] += found[2][::-1]
        seen = slice(start, stop + n_k - 1)
        dfamily[:, seen] += found[3] * tiles.factor(h, g, seen)
        if dsymbol is not None:
            dsymbol[h, g, seen] += found[4]
    of_q, of_k, of_w, of_factor = tiles.exponents
    with np.errstate(over="ignore"):
        dq = np.ldexp(dq, of_k + of_w + of_factor).astype(problem.q.dtype)
        dk = np.ldexp(dk, of_q + of_w + of_factor).astype(problem.q.dtype)
        dfamily = np.ldexp(dfamily, of_q + of_k + of_factor)
    found = InputGradients(dq, dk, dv.astype(problem.dtype), family=dfamily)
    if dsymbol is not None:
        found.symbol = (SymbolGradient(dsymbol[..., ::-1], problem.mask.least),)
    return found


def segments(problem: Outline) -> int:
    """Into how many parts backward cuts the rows of a head. It depends on shapes, never on the number of threads."""
    H, G, n = problem.sizes[:3]
    return max(1, min(_PARTS // (H * G), -(-n // _ROWS)))


def operations(problem: Outline, grad: bool) -> float:
    """Floating-point operations over all heads; what is done entry by entry counts by the time that it takes."""
    pairs = problem.sizes.H * problem.sizes.G * problem.mask.pairs()
    entries, d_v = len(problem.family.left), problem.sizes.d_v
    columns = len(np.unique(problem.family.right))
    per_pair = 10 * (entries + d_v) + 230 * columns + 1850
    return pairs * per_pair * (2.8 if grad else 1)


def memory(problem: Outline, grad: bool) -> float:
    """The bytes needed beyond inputs and outputs."""
    H, G, n, n_k, d, d_v = problem.sizes
    entries, item = len(problem.family.left), problem.dtype.itemsize
    arrays = len(np.unique(problem.family.right)) + (14 if grad else 10)
    block = (_ROWS + _KEYS) * (_ROWS * arrays * item + 24 * entries)
    size = (H * G * n * (d + 2) + H * n_k * d) * item + 24 * (n + n_k) + problem.threads * block
    if grad:
        length = n + n_k - 1
        part = 8 * (n_k * (d + d_v) + entries * length)
        size += (problem.threads + 2) * part + 8 * (H * G * n * d + H * n_k * (d + d_v) + 2 * entries * length)
    return float(size)


def _skewed(u: np.ndarray, width: int, writeable: bool = False) -> np.ndarray:
    """A view (rows, width) of u that has u[i, i + j] at (i, j)."""
    along, across = u.strides
    return as_strided(u, (len(u), width), (along + across, across), writeable=writeable)


def _cut(start: int, stop: int) -> list[slice]:
    return [slice(at, min(at + _ROWS, stop)) for at in range(start, stop, _ROWS)]


def _exponent(X: np.ndarray) -> int:
    """The exponent e with max |X| in [2^(e-1), 2^e), or 0 if X is 0."""
    return math.frexp(float(max(X.max(initial=0), -X.min(initial=0))))[1]
