"""A sequence in pieces: which process has which rows and keys, and how it reaches the others."""

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

    `offset` is the index of the first row of all among the keys, and (lo, hi) the band of j - (i + offset) that
    rows see, None where it has no end.
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
        """Where rows are cut: rank r has [rows[r], rows[r + 1])."""
        return [*self.q_start, sum(self.n)]

    def rows_at_keys(self, shift: int = 0) -> list[int]:
        """Where rows are cut so that row i lies with the key of index i + offset + shift; rows before the first key
        with the first rank, those past the last with the last.
        """
        n = sum(self.n)
        return [0, *(min(max(start - self.offset - shift, 0), n) for start in self.k_start[1:]), n]

    @property
    def aligned(self) -> bool:
        """Whether every row lies with the key of its index, or beyond all keys with the first or the last."""
        keys = sum(self.n_k)
        for rank, (n, n_k, k_start) in enumerate(zip(self.n, self.n_k, self.k_start, strict=True)):
            offset = self.offset_between(rank, rank)
            if n and not ((offset >= 0 or k_start == 0) and (offset + n <= n_k or k_start + n_k == keys)):
                return False
        return True

    @property
    def steps(self) -> int:
        """How many meetings with guests there are: a band with two ends reaches the nearest ranks only."""
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
        """What `rank` computes at a step: (whose rows, whose keys, which of the rows)."""
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
    """What this process knows of the pieces of a sequence.

    Attributes
    ----------
    comm : Communicator
    layout : Layout or None
        None where one process has all of it.
    masked : bool
        Whether any process hides keys.
    symbol : callable or None
        (first, last) -> the bias at these offsets, as `Problem.bias` holds it; None where there is no bias.
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
    """A process's piece of a causal problem with the rows that lie where its keys do, and how rows go there and back.

    Of a problem without a causal mask, and where rows lie with their keys already, it is the piece itself.

    Attributes
    ----------
    problem : Problem
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
        """Rows, axis 2, of this process as they are at their keys."""
        return X if self._cuts is None else self._comm.recut(X, *self._cuts)

    def home(self, X: np.ndarray) -> np.ndarray:
        """Rows that were computed at their keys, where they came from."""
        return X if self._cuts is None else self._comm.recut(X, *self._cuts[::-1])
