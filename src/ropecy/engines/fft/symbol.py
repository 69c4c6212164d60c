"""T, the matrix of the weights of offsets, cut into levels; and which of its rows transforms compute well enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...approximation.minimax import Polynomial
from ...problem.problem import Problem
from . import family
from .blocks import block_size

# A bias that spreads over no more nats than _SPREAD is one level. Else each level spans _LEVEL nats, and there are at
# most _MOST_LEVELS of them.
_SPREAD = 14.0
_LEVEL = 12.0
_MOST_LEVELS = 6
# A product of T and x by transforms is off by at most _NOISE u log2(length) ||t||_2 ||x||_2: measured, not proved; the
# largest factor that was seen is 0.33.
_NOISE = 0.5
_UNIT = 2.0**-53


@dataclass(slots=True)
class Symbol:
    """T, cut into levels, and what its rows can be promised.

    Attributes
    ----------
    peak : (H or 1, G or 1) array
        The largest bias, max_m b_m; T has the entries exp(b_m - peak).
    levels : (H or 1, G or 1, levels, n + n_k - 1) array
        t_m exp(12 l) at the index of the offset m where level l holds it, and 0 elsewhere.
    top : (H or 1, G or 1, n) int array
        The first level of which a row sees an entry; `unseen` for a row that sees no key.
    exact_rows : list of (int, int)
        Runs of rows that the exact engine computes.
    rounding : float
        By how much transforms may be off in all other rows, in units of the range of the values.
    block : int
        T is applied in blocks of this many rows and columns.
    """

    peak: np.ndarray
    levels: np.ndarray
    top: np.ndarray
    exact_rows: list[tuple[int, int]]
    rounding: float
    block: int

    @property
    def unseen(self) -> int:
        """The value of `top` for a row that sees no key: the number of levels."""
        return self.levels.shape[2]

    @property
    def gain(self) -> np.ndarray | None:
        """The factor of each level in each row, (H or 1, G or 1, levels, n); None where all are 1."""
        if self.unseen == 1:
            return None
        levels = np.arange(self.unseen)[:, None]
        return np.where(levels >= self.top[:, :, None], np.exp(-_LEVEL * levels), 0)


def survey(problem: Problem, p: Polynomial, allowance: float) -> Symbol:
    """Cut T into levels, and find the rows whose rounding passes the allowance.

    Notes
    -----
    The error of a row's sums is at most ``K u log2(2b) sum_l exp(-12 l) ||t_l||_2 sqrt(n_k) sum_t |c_t| B^t``, over the
    levels l from its first one on, and its denominator at least ``min p`` times what it sees of that level. A family
    has as many T_ab as pairs of monomials, with ``||T_ab||_2 <= ||t_l||_2`` times what |W| makes of a pair at most, so
    that q^a, T_ab and k^b add up to no more than `family.absolute_sum`; and what a transform takes is larger than
    the column by `family.TOGETHER`. Time O(n log n) for each bias.
    """
    n, n_k, mask = problem.sizes.n, problem.sizes.n_k, problem.mask
    allowed = np.zeros(n + n_k - 1, bool)
    allowed[mask.seen_symbol] = True
    bias = np.zeros((1, 1, n + n_k - 1)) if problem.bias is None else problem.bias
    peak = np.where(allowed, bias, -np.inf).max(axis=-1)
    depth = np.where(allowed, peak[..., None] - bias, np.inf)
    block = block_size(problem, int(allowed.sum()))
    absolute_sum = p.absolute_sum if problem.family is None else family.absolute_sum(problem, p)

    seen = _row_sums(np.broadcast_to(allowed.astype(float), depth.shape), mask.kept, n) > 0.5
    spread = float(depth[np.isfinite(depth)].max())
    levels, tops = [], np.full(seen.shape, -1)
    floor = np.zeros(seen.shape)
    for level in range(1 if spread <= _SPREAD else _MOST_LEVELS):
        start = _LEVEL * level
        end = start + (_SPREAD + 1 if spread <= _SPREAD else _LEVEL)
        with np.errstate(under="ignore"):
            t = np.where((depth >= start) & (depth < end), np.exp(np.minimum(start - depth, 0)), 0)
        levels.append(t)
        sums = _row_sums(t, mask.kept, n)
        new = (tops < 0) & (sums > 0.5 * math.exp(start - end))
        tops[new], floor[new] = level, sums[new]
        if np.all((tops >= 0) | ~seen):
            break
    if spread > _SPREAD:
        # Nothing lies deeper that a row needs by itself, so the last level takes all that is left.
        start = _LEVEL * (len(levels) - 1)
        with np.errstate(under="ignore"):
            levels[-1] = np.where(depth >= start, np.exp(np.minimum(start - depth, 0)), 0)
    t = np.stack(levels, axis=2)

    keys = min(n_k, int(allowed.sum()) + 2 * block)
    if problem.family is not None:
        # The size of a column is that of all its keys, seen or not.
        keys, absolute_sum = n_k, absolute_sum * family.TOGETHER
    noise = _NOISE * _UNIT * math.log2(2 * block) * math.sqrt(keys) * absolute_sum
    # In units of the level where a row begins, every later level counts exp(-12) of the one before.
    norms = np.sqrt((t * t).sum(axis=-1))
    for level in range(len(levels) - 2, -1, -1):
        norms[..., level] += math.exp(-_LEVEL) * norms[..., level + 1]
    reach = np.broadcast_to(norms[..., None, :], tops.shape + norms.shape[-1:])
    error = noise * np.take_along_axis(reach, np.maximum(tops, 0)[..., None], axis=-1)[..., 0]
    least = math.exp(-p.B) * (1 - min(p.error, 0.5))
    error = np.divide(error, floor * least, out=np.full(tops.shape, np.inf), where=tops >= 0)
    error[~seen] = 0
    failing = error > allowance
    runs = _runs(failing.any(axis=(0, 1)), max(16, n // 64))
    for first, last in runs:
        error[..., first:last] = 0
    return Symbol(
        peak=peak,
        levels=t,
        top=np.where(seen, np.maximum(tops, 0), len(levels)),
        exact_rows=runs,
        rounding=float(error.max(initial=0)),
        block=block,
    )


def _row_sums(t: np.ndarray, kept: np.ndarray | None, n: int) -> np.ndarray:
    """sum_j t_{j-i} over the keys that are kept: (H or 1, G or 1, n) of t (H or 1, G or 1, n + n_k - 1)."""
    n_k = t.shape[-1] - n + 1
    if kept is None:
        total = np.zeros((*t.shape[:-1], t.shape[-1] + 1))
        np.cumsum(t, axis=-1, out=total[..., 1:])
        return (total[..., n_k:] - total[..., :n])[..., ::-1]
    length = 1 << (t.shape[-1] + n_k - 1).bit_length()
    spectrum = np.fft.rfft(kept[:, None, ::-1].astype(float), length)
    return np.fft.irfft(np.fft.rfft(t, length) * spectrum, length)[..., n_k - 1 : n_k - 1 + n][..., ::-1]


def _runs(rows: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """[first, last) of the runs of True, those less than a gap apart joined."""
    where = np.flatnonzero(rows)
    if where.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(where) > gap)
    firsts, lasts = where[np.append(0, breaks + 1)], where[np.append(breaks, where.size - 1)]
    return [(int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True)]
