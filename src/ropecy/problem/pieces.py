"""A sequence in pieces: which process has which rows and keys, and how rows go from one to another."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .communicator import SERIAL, Communicator
from .problem import Problem


@dataclass(slots=True)
class Layout:
    """Where the pieces lie: rank r has rows q_start[r] + arange(n[r]) and keys k_start[r] + arange(n_k[r]).

    `offset` is the index of the first row of the whole sequence among all keys. Rows see the keys with
    lo <= j - (i + offset) <= hi, where None is no bound.
    """

    n: list[int]
    n_k: list[int]
    q_start: list[int]
    k_start: list[int]
    offset: int
    lo: int | None
    hi: int | None

    @property
    def rows(self) -> list[int]:
        """Where rows are cut: rank r has the rows [rows[r], rows[r + 1])."""
        return [*self.q_start, sum(self.n)]

    def rows_at_keys(self, shift: int = 0) -> list[int]:
        """Where rows are cut if row i is to be at the rank that has the key of index i + offset + shift.

        Rows before the first key are at the first rank, rows past the last key at the last.
        """
        n = sum(self.n)
        return [0, *(min(max(start - self.offset - shift, 0), n) for start in self.k_start[1:]), n]

    @property
    def aligned(self) -> bool:
        """Whether every row is at the rank of the key of its index, or, beyond all keys, at the first or last key's."""
        keys = sum(self.n_k)
        for rank, (n, n_k, k_start) in enumerate(zip(self.n, self.n_k, self.k_start, strict=True)):
            offset = self.offset_between(rank, rank)
            if n and not ((offset >= 0 or k_start == 0) and (offset + n <= n_k or k_start + n_k == keys)):
                return False
        return True

    @property
    def steps(self) -> int:
        """How many steps of the ring there are; with a band that has two ends, only near ranks need to meet."""
        size, keys, farthest = len(self.n), sum(self.n_k), 0
        if self.lo is None or self.hi is None:
            return size // 2
        for rank, (n, start) in enumerate(zip(self.n, self.q_start, strict=True)):
            first = self.offset + start + self.lo
            last = self.offset + start + n - 1 + self.hi
            if n and last >= 0 and first < keys:
                # Rank r has the keys from k_start[r] on.
                low, high = (max(0, bisect_right(self.k_start, key) - 1) for key in (first, last))
                farthest = max(farthest, abs(rank - low), abs(high - rank))
        return min(farthest, size // 2)

    def offset_between(self, rows: int, keys: int) -> int:
        """The index of the first row of one rank among the keys of another."""
        return self.offset + self.q_start[rows] - self.k_start[keys]

    def visible(self, rank: int, step: int) -> list[tuple[int, int, slice]]:
        """What `rank` computes at a step of the ring: a list of (whose rows, whose keys, which of the rows)."""
        size = len(self.n)
        guest = (rank - step) % size
        twice = step and 2 * step == size
        half, half_guest = (self.n[r] // 2 if twice else 0 for r in (rank, guest))
        found = [(rank, guest, slice(half, self.n[rank]))]
        if step:
            found.append((guest, rank, slice(0, half_guest if twice else self.n[guest])))
        return [task for task in found if self._sees(*task)]

    def _sees(self, rows: int, keys: int, span: slice) -> bool:
        if span.start >= span.stop or not self.n_k[keys]:
            return False
        offset = self.offset_between(rows, keys)
        least, most = -offset - (span.stop - 1), self.n_k[keys] - 1 - offset - span.start
        return (self.hi is None or least <= self.hi) and (self.lo is None or most >= self.lo)


@dataclass(slots=True)
class Pieces:
    """What a process knows of the pieces of a sequence.

    Attributes
    ----------
    comm : Communicator
    layout : Layout or None
        Where the pieces lie; None if one process has the whole sequence.
    masked : bool
        Whether keys are hidden on any rank.
    symbol : callable or None
        ``symbol(first, last)`` is the bias at the offsets from first to last, as `Problem.bias` holds it; None if there
        is no bias.
    """

    comm: Communicator
    layout: Layout | None = None
    masked: bool = False
    symbol: Callable[[int, int], np.ndarray] | None = None

    @property
    def distributed(self) -> bool:
        return self.comm.distributed


WHOLE = Pieces(SERIAL)


class RowsAtKeys:
    """A piece of a causal problem with its rows at the ranks of the keys of their indices, and the way there and back.

    Without a causal mask, and if rows are at their keys already, it is the piece as it was.

    Attributes
    ----------
    problem : Problem
        The keys of this process, with the rows that belong to them.
    """

    def __init__(self, problem: Problem, pieces: Pieces) -> None:
        self.problem, self._comm, self._cuts = problem, pieces.comm, None
        layout, rank = pieces.layout, pieces.comm.rank
        if layout is not None and problem.mask.causal and not layout.aligned:
            self._cuts = layout.rows, layout.rows_at_keys()
            offset = layout.offset + self._cuts[1][rank] - layout.k_start[rank]
            q = self.there(problem.q)
            self.problem = replace(problem, q=q, mask=replace(problem.mask, n=q.shape[2], offset=offset))

    def there(self, X: np.ndarray) -> np.ndarray:
        """Rows (axis 2) of this process, sent to the ranks of their keys."""
        return X if self._cuts is None else self._comm.recut(X, *self._cuts)

    def home(self, X: np.ndarray) -> np.ndarray:
        """Rows (axis 2) that were computed at their keys, sent back to where they came from."""
        return X if self._cuts is None else self._comm.recut(X, *self._cuts[::-1])
