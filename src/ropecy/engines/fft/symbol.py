"""T, the matrix of the weights of offsets, cut into levels; and which of its rows transforms compute well enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...approximation.minimax import Polynomial
from ...problem.problem import Problem, Slots, in_order
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


class Run(NamedTuple):
    """The rows [first, last) of some of the slots."""

    slots: Slots
    first: int
    last: int

    @property
    def at(self) -> tuple[Slots, slice, slice]:
        """Their index in an array (H, G, n, ...)."""
        return self.slots, slice(None), slice(self.first, self.last)


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
    exact_rows : list of Run
        The rows that the exact engine computes.
    rounding : (H,) array
        By how much transforms may be off in all other rows of each slot, in units of the range of the values.
    block : int
        T is applied in blocks of this many rows and columns.
    """

    peak: np.ndarray
    levels: np.ndarray
    top: np.ndarray
    exact_rows: list[Run]
    rounding: np.ndarray
    block: int

    @property
    def unseen(self) -> int:
        """The value of `top` for a row that sees no key: the number of levels."""
        return self.levels.shape[2]

    @property
    def n_levels(self) -> np.ndarray:
        """Into how many levels the biases of each slot are cut, (H,)."""
        used = self.levels.any(axis=(1, 3))
        return np.broadcast_to(self.unseen - used[:, ::-1].argmax(axis=1), self.rounding.shape)

    @property
    def n_exact_rows(self) -> np.ndarray:
        """How many rows of each slot the exact engine computes, (H,)."""
        found = np.zeros(len(self.rounding), int)
        for run in self.exact_rows:
            found[run.slots] += run.last - run.first
        return found

    @property
    def gain(self) -> np.ndarray | None:
        """The factor of each level in each row, (H or 1, G or 1, levels, n); None where all are 1."""
        if self.unseen == 1:
            return None
        levels = np.arange(self.unseen)[:, None]
        return np.where(levels >= self.top[:, :, None], np.exp(-_LEVEL * levels), 0)


def survey(problem: Problem, polynomials: Sequence[Polynomial], allowance: float) -> Symbol:
    """Cut T into levels, and find the rows whose rounding passes the allowance, for a polynomial of each slot.

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
    if mask.kept is not None and depth.max(where=np.isfinite(depth), initial=0) > _SPREAD:
        # The keys of a slot decide on its levels.
        depth = np.broadcast_to(depth, (problem.sizes.H, *depth.shape[1:]))
    block, noise = block_size(problem, int(allowed.sum())), _noise(problem, polynomials, int(allowed.sum()))

    seen = _row_sums(np.broadcast_to(allowed.astype(float), depth.shape), mask.kept, n) > 0.5
    t, tops, floor = _levels(depth, seen, lambda t: _row_sums(t, mask.kept, n))
    # In units of the level where a row begins, every later level counts exp(-12) of the one before.
    norms = np.sqrt((t * t).sum(axis=-1))
    for level in range(norms.shape[-1] - 2, -1, -1):
        norms[..., level] += math.exp(-_LEVEL) * norms[..., level + 1]
    reach = np.broadcast_to(norms[..., None, :], tops.shape + norms.shape[-1:])
    error = np.take_along_axis(reach, np.maximum(tops, 0)[..., None], axis=-1)[..., 0]
    least = np.array([math.exp(-p.B) * (1 - min(p.error, 0.5)) for p in polynomials])[:, None, None]
    with np.errstate(divide="ignore"):
        error = np.where(tops >= 0, noise * error / (floor * least), np.inf)
    error = np.where(seen, error, 0.0)
    runs = _runs((error > allowance).any(axis=1), max(16, n // 64))
    for run in runs:
        error[run.at] = 0
    return Symbol(
        peak=peak,
        levels=t,
        top=np.where(seen, np.maximum(tops, 0), t.shape[2]),
        exact_rows=runs,
        rounding=error.max(axis=(1, 2), initial=0),
        block=block,
    )


def _noise(problem: Problem, polynomials: Sequence[Polynomial], allowed: int) -> np.ndarray:
    """The error of a row's sums for ``||t||_2 = 1``, (H, 1, 1); the band allows so many offsets."""
    block, n_k = block_size(problem, allowed), problem.sizes.n_k
    keys = min(n_k, allowed + 2 * block)
    if problem.family is None:
        sums = np.array([p.absolute_sum for p in polynomials])
    else:
        # The size of a column is that of all its keys, seen or not. All slots have one polynomial.
        keys, sums = n_k, np.full(len(polynomials), family.absolute_sum(problem, polynomials[0]) * family.TOGETHER)
    return (_NOISE * _UNIT * math.log2(2 * block) * math.sqrt(keys) * sums)[:, None, None]


def _levels(
    depth: np.ndarray, seen: np.ndarray, row_sums: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T cut into levels, as `Symbol` has them; the first level of which each row sees an entry, -1 where there is none;
    and what it sees of that level.

    Each bias is cut up by itself: one that spreads little is all in the first level.
    """
    one = np.where(np.isfinite(depth), depth, 0).max(axis=-1) <= _SPREAD
    levels, tops, floor = [], np.full(seen.shape, -1), np.zeros(seen.shape)
    left = np.ones(one.shape, bool)
    for level in range(_MOST_LEVELS):
        start = _LEVEL * level
        ends = np.where(one, _SPREAD + 1, start + _LEVEL)[..., None]
        with np.errstate(under="ignore"):
            t = np.where((depth >= start) & left[..., None], np.exp(np.minimum(start - depth, 0)), 0)
        sums = row_sums(np.where(depth < ends, t, 0))
        new = (tops < 0) & (sums > 0.5 * np.exp(start - ends))
        tops[new], floor[new] = level, sums[new]
        # Nothing lies deeper that a row needs by itself, so the last level of a bias takes all that is left.
        last = one
        if not one.all():
            last = one | ((tops >= 0) | ~seen).all(axis=-1) | (level == _MOST_LEVELS - 1)
        levels.append(np.where((depth < ends) | (last & ~one)[..., None], t, 0))
        left &= ~last
        if not left.any():
            break
    return np.stack(levels, axis=2), tops, floor


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


def _runs(rows: np.ndarray, gap: int) -> list[Run]:
    """The runs of True in the rows of each slot, (H, n), those less than a gap apart joined."""
    found: dict[tuple[int, int], list[int]] = {}
    for slot in np.flatnonzero(rows.any(axis=1)).tolist():
        where = np.flatnonzero(rows[slot])
        breaks = np.flatnonzero(np.diff(where) > gap)
        firsts, lasts = where[np.append(0, breaks + 1)], where[np.append(breaks, where.size - 1)] + 1
        for run in zip(firsts.tolist(), lasts.tolist(), strict=True):
            found.setdefault(run, []).append(slot)
    return [Run(in_order(np.array(slots)), *run) for run, slots in sorted(found.items())]
