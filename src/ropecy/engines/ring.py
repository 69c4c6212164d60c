"""Exact attention of a sequence in pieces: pieces go round a ring, and each pair of ranks meets once.

At step t rank r meets the piece of rank r - t, and computes what the two see of each other: its own rows over the
guest's keys, and the guest's rows over its own keys, whose results go home at once. After half a round every pair has
met, so ranks have equal work under a causal mask too; where two ranks meet twice, at the opposite ends of an even
ring, each takes half of the rows. Partial results are merged by their log-sums, in the order of steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bounds import Alone
from ..problem import Problem
from . import exact


@dataclass(slots=True)
class Layout:
    """Where the pieces lie: rank r has rows q_start[r] + arange(n[r]) and keys k_start[r] + arange(n_k[r]).

    `q_offset` is the index of the first row of all among the keys, and (lo, hi) the band of j - (i + q_offset) that
    rows see, None where it has no end.
    """

    n: list[int]
    n_k: list[int]
    q_start: list[int]
    k_start: list[int]
    q_offset: int
    lo: int | None
    hi: int | None

    @property
    def rows(self) -> list[int]:
        """Where rows are cut: rank r has [rows[r], rows[r + 1])."""
        return [*self.q_start, sum(self.n)]

    def rows_at_keys(self, shift: int = 0) -> list[int]:
        """Where rows are cut so that row i lies with the key of index i + q_offset + shift; rows before the first key
        with the first rank, those past the last with the last.
        """
        n = sum(self.n)
        return [0, *(min(max(start - self.q_offset - shift, 0), n) for start in self.k_start[1:]), n]

    @property
    def aligned(self) -> bool:
        """Whether every row lies with the key of its index, or beyond all keys with the first or the last."""
        keys = sum(self.n_k)
        for rank, (n, n_k, k_start) in enumerate(zip(self.n, self.n_k, self.k_start, strict=True)):
            offset = self.offset(rank, rank)
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
            first = self.q_offset + start + self.lo
            last = self.q_offset + start + n - 1 + self.hi
            if n and last >= 0 and first < keys:
                # Rank r has the keys from k_start[r] on.
                low, high = (max(0, bisect_right(self.k_start, key) - 1) for key in (first, last))
                farthest = max(farthest, abs(rank - low), abs(high - rank))
        return min(farthest, size // 2)

    def offset(self, rows: int, keys: int) -> int:
        """The index of the first row of one rank among the keys of another."""
        return self.q_offset + self.q_start[rows] - self.k_start[keys]

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
        offset = self.offset(rows, keys)
        least, most = -offset - (span.stop - 1), self.n_k[keys] - 1 - offset - span.start
        return (self.hi is None or least <= self.hi) and (self.lo is None or most >= self.lo)


class Ring:
    """One exact problem in pieces: forward, then backward as often as wanted. All ranks call the same methods.

    Parameters
    ----------
    problem : Problem
        This rank's rows and keys, with the band of the whole.
    layout : Layout
    ranks : ropecy._ranks.Ranks
    bound : float
        Of all scores, as `exact.forward` takes it.
    masked : bool
        Whether any rank hides keys.
    symbol : callable or None
        (first, last) -> the bias at these offsets.
    """

    def __init__(
        self,
        problem: Problem,
        layout: Layout,
        ranks: Any,
        bound: float,
        masked: bool,
        symbol: Callable[[int, int], np.ndarray] | None,
    ) -> None:
        self._problem, self._layout, self._ranks, self._bound, self._symbol = problem, layout, ranks, bound, symbol
        self._piece = [problem.q, problem.k, problem.v]
        if masked:
            mask = problem.key_mask
            self._piece.append(np.ones(problem.k.shape[:2], np.bool_) if mask is None else mask)
        self._o = self._lse = None

    def forward(self) -> tuple[np.ndarray, np.ndarray]:
        """O (H, G, n, d_v) and lse float64 (H, G, n)."""
        q, v = self._problem.q, self._problem.v
        o, lse = np.zeros(q.shape[:3] + v.shape[2:]), np.full(q.shape[:3], -np.inf)
        tasks = _Tasks()
        for step, guest, pieces in self._meetings(self._piece):
            away = []
            for rows, keys, span in self._layout.visible(self._ranks.rank, step):
                block = self._block(rows, keys, span, pieces)
                part = tasks.run(self._forward_block, block, failing=self._empty_rows(span))
                if rows == self._ranks.rank:
                    exact.merge(o[:, :, span], lse[:, :, span], *part)
                else:
                    away += part
            room, places = [], []
            host = (self._ranks.rank + step) % self._ranks.size
            for rows, _, span in self._layout.visible(host, step):
                if step and rows == self._ranks.rank:
                    room += self._empty_rows(span)
                    places.append(span)
            if step:
                self._ranks.wait(self._ranks.send_home(away, guest, room, host))
            for i, span in enumerate(places):
                exact.merge(o[:, :, span], lse[:, :, span], *room[2 * i : 2 * i + 2])
        self._ranks.together(tasks.check)
        self._o, self._lse = o.astype(q.dtype), lse
        return self._o, lse

    def resume(self, o: np.ndarray, lse: np.ndarray) -> None:
        """Take these for the results of a forward pass that had more keys."""
        self._o, self._lse, self._bound = o, lse, np.inf

    def backward(self, do: np.ndarray, shared: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """dq, dk, dv of ``<do, O>``. What this rank's blocks give of gradients that all ranks share goes to
        ``shared.add_diagonals(dsymbol, first)``, the bias's, and ``shared.add_scale_near(number)``.
        """
        rank = self._ranks.rank
        own = [np.zeros(X.shape) for X in self._piece[:3]]
        dq, dk, dv = own
        tasks = _Tasks()
        for step, guest, pieces in self._meetings([*self._piece, self._o, self._lse, do]):
            away = []
            for rows, keys, span in self._layout.visible(rank, step):
                block = self._block(rows, keys, span, pieces)
                results = [X[:, :, span] for X in pieces[rows][-3:]]
                failing = [self._empty_grad(span), *self._empty_keys(keys), None, 0.0]
                *parts, dsymbol, near = tasks.run(self._backward_block, block, *results, failing=failing)
                shared.add_scale_near(near)
                if dsymbol is not None:
                    shared.add_diagonals(dsymbol, -(block.q.shape[2] - 1) - block.q_offset)
                if rows == rank:
                    dq[:, :, span] += parts[0]
                else:
                    away.append(parts[0])
                if keys == rank:
                    dk += parts[1]
                    dv += parts[2]
                else:
                    away += parts[1:]
            room, places = [], []
            host = (rank + step) % self._ranks.size
            for rows, keys, span in self._layout.visible(host, step):
                if step and rows == rank:
                    room.append(self._empty_grad(span))
                    places.append(dq[:, :, span])
                elif step and keys == rank:
                    room += self._empty_keys(keys)
                    places += [dk, dv]
            if step:
                self._ranks.wait(self._ranks.send_home(away, guest, room, host))
            for place, part in zip(places, room, strict=True):
                place += part
        self._ranks.together(tasks.check)
        return tuple(X.astype(do.dtype) for X in own)

    def _meetings(self, piece: list[np.ndarray]) -> Iterator[tuple[int, int, dict[int, list[np.ndarray]]]]:
        """(step, guest, {rank: its arrays}) of every meeting; the next guest arrives while the caller computes."""
        rank, size = self._ranks.rank, self._ranks.size
        current = piece
        for step in range(self._layout.steps + 1):
            guest, requests, room = (rank - step) % size, [], None
            if step < self._layout.steps:
                coming = (guest - 1) % size
                room = [np.empty(self._shape_at(coming, i, X.shape), X.dtype) for i, X in enumerate(piece)]
                requests = self._ranks.pass_on(current, room)
            yield step, guest, {rank: piece, guest: current}
            self._ranks.wait(requests)
            current = room

    def _block(self, rows: int, keys: int, span: slice, pieces: dict[int, list[np.ndarray]]) -> Problem:
        q, (k, v, *mask) = pieces[rows][0], pieces[keys][1 : len(self._piece)]
        offset = self._layout.offset(rows, keys) + span.start
        n, n_k = span.stop - span.start, k.shape[1]
        return replace(
            self._problem,
            q=np.ascontiguousarray(q[:, :, span]),
            k=k,
            v=v,
            q_offset=offset,
            bias=None if self._symbol is None else self._symbol(-(n - 1) - offset, n_k - 1 - offset),
            key_mask=mask[0] if mask else None,
        )

    def _forward_block(self, block: Problem) -> list[np.ndarray]:
        o, lse, _ = exact.forward(block, self._bound, True)
        if np.isposinf(lse).any():
            raise OverflowError("scores past the largest float64 can't be merged between ranks")
        return [o, lse]

    def _backward_block(self, block: Problem, o: np.ndarray, lse: np.ndarray, do: np.ndarray) -> tuple:
        o, do = np.ascontiguousarray(o), np.ascontiguousarray(do)
        near = 0.0 if block.near is None else exact.near_scale_gradient(block, o, lse, do)
        return *exact.backward(block, exact.resume(block, self._bound, o, lse), do), near

    def _shape_at(self, rank: int, index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that what goes round at this index has on `rank`: (H, n_k, ...) of keys, (H, G, n, ...) of rows."""
        if 0 < index < len(self._piece):
            return (shape[0], self._layout.n_k[rank], *shape[2:])
        return (*shape[:2], self._layout.n[rank], *shape[3:])

    def _empty_rows(self, span: slice) -> list[np.ndarray]:
        (H, G), d_v = self._problem.q.shape[:2], self._problem.v.shape[2]
        rows = span.stop - span.start
        return [np.zeros((H, G, rows, d_v), self._problem.q.dtype), np.full((H, G, rows), -np.inf)]

    def _empty_grad(self, span: slice) -> np.ndarray:
        H, G, _, d = self._problem.q.shape
        return np.zeros((H, G, span.stop - span.start, d), self._problem.q.dtype)

    def _empty_keys(self, rank: int) -> list[np.ndarray]:
        H, n_k = self._problem.k.shape[0], self._layout.n_k[rank]
        return [np.zeros((H, n_k, X.shape[2]), X.dtype) for X in (self._problem.k, self._problem.v)]


def forward_rows(
    problem: Problem, bound: float, rows: np.ndarray, o: np.ndarray, lse: np.ndarray | None, ranks: Any = Alone
) -> None:
    """`exact.forward_rows` of a sequence in pieces, without a bias and without a band but a causal one, rows being with
    the last keys that they see.

    Notes
    -----
    All ranks are told all rows that are marked and compute them over their own keys; then these parts are merged. Bytes
    a rank sends: about ``16 (d + d_v)`` for each row marked on any.
    """
    if ranks is Alone:
        exact.forward_rows(problem, bound, rows, o, lse)
        return
    found = _tell(problem, rows, [problem.q], ranks)
    if found is None:
        return
    part, part_lse = ranks.together(_forward_told, problem, bound, rows, found)
    top = ranks.largest(part_lse)
    weight = exact.share(part_lse, top)[:, None]
    sums = ranks.total(np.concatenate([weight * part, weight], axis=1))[found.own]
    den = sums[:, -1:]
    o[found.marked] = np.divide(sums[:, :-1], den, out=np.zeros_like(sums[:, :-1]), where=den > 0)
    if lse is not None:
        with np.errstate(divide="ignore"):
            lse[found.marked] = top[found.own] + np.log(den[:, 0])


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
    ranks: Any = Alone,
) -> None:
    """`exact.backward_rows` of a sequence in pieces, as `forward_rows`; dk and dv have what all ranks' rows give."""
    if ranks is Alone:
        exact.backward_rows(problem, bound, rows, o, lse, do, dq, dk, dv)
        return
    found = _tell(problem, rows, [problem.q, o, lse[..., None], do], ranks)
    if found is not None:
        part = ranks.together(_backward_told, problem, bound, rows, found, o, lse, do, dk, dv)
        dq[found.marked] += ranks.total(part)[found.own]


@dataclass(slots=True)
class _Told:
    """Marked rows of all ranks: where this rank's own are, and which others see its keys, all of them."""

    marked: tuple[np.ndarray, ...]
    own: slice
    elsewhere: np.ndarray
    slot: np.ndarray
    columns: list[np.ndarray]

    def blocks(self, problem: Problem) -> Iterator[tuple[np.ndarray, slice, Problem]]:
        """Which rows from elsewhere, which head's keys, and their problem."""
        G = problem.q.shape[1]
        for slot in np.unique(self.slot[self.elsewhere]):
            here = np.flatnonzero(self.elsewhere & (self.slot == slot))
            head = slice(slot // G, slot // G + 1)
            block = replace(
                problem,
                q=self.column(0, here, problem.q.dtype),
                k=problem.k[head],
                v=problem.v[head],
                hi=None,
                q_offset=0,
                key_mask=None if problem.key_mask is None else problem.key_mask[head],
            )
            if not block.empty:
                yield here, head, block

    def column(self, index: int, here: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Of these rows, (1, 1, rows, width)."""
        return np.ascontiguousarray(self.columns[index][here], dtype)[None, None]


def _tell(problem: Problem, rows: np.ndarray, arrays: list[np.ndarray], ranks: Any) -> _Told | None:
    """What these arrays (H, G, n, width) have in the rows that are marked on any rank; None where none is."""
    marked = np.nonzero(rows)
    counts = ranks.gather(len(marked[0]))
    first, total = sum(counts[: ranks.rank]), sum(counts)
    if total == 0:
        return None
    own = slice(first, first + len(marked[0]))
    widths = [X.shape[3] for X in arrays]
    told = np.zeros((total, sum(widths) + 1))
    told[own] = np.column_stack([*(X[marked] for X in arrays), marked[0] * problem.q.shape[1] + marked[1]])
    told = ranks.total(told)
    elsewhere = np.ones(total, bool)
    elsewhere[: own.stop if problem.hi is not None else 0] = False
    elsewhere[own] = False
    *columns, slot = np.split(told, np.cumsum(widths), axis=1)
    return _Told(marked, own, elsewhere, slot[:, 0].astype(int), columns)


def _forward_told(problem: Problem, bound: float, rows: np.ndarray, found: _Told) -> tuple[np.ndarray, np.ndarray]:
    """O and lse of all rows told of, over this rank's keys: its own as they see them, and those elsewhere."""
    part, part_lse = np.zeros((len(found.slot), problem.v.shape[2])), np.full(len(found.slot), -np.inf)
    o, lse = np.zeros(rows.shape + part.shape[1:], problem.q.dtype), np.full(rows.shape, -np.inf)
    exact.forward_rows(problem, bound, rows, o, lse)
    part[found.own], part_lse[found.own] = o[rows], lse[rows]
    for here, _, block in found.blocks(problem):
        block_o, block_lse, _ = exact.forward(block, bound, True)
        part[here], part_lse[here] = block_o[0, 0], block_lse[0, 0]
    return part, part_lse


def _backward_told(problem, bound, rows, found, o, lse, do, dk, dv) -> np.ndarray:
    """dq of all rows told of, over this rank's keys, whose dk and dv are added to."""
    part, own = np.zeros((len(found.slot), problem.q.shape[3])), np.zeros_like(problem.q)
    exact.backward_rows(problem, bound, rows, o, lse, do, own, dk, dv)
    part[found.own] = own[rows]
    for here, head, block in found.blocks(problem):
        block_o, block_do = (found.column(index, here, problem.q.dtype) for index in (1, 3))
        saved = exact.resume(block, bound, block_o, found.column(2, here, np.dtype(float))[..., 0])
        block_dq, block_dk, block_dv, _ = exact.backward(block, saved, block_do)
        part[here] = block_dq[0, 0]
        dk[head] += block_dk
        dv[head] += block_dv
    return part


class _Tasks:
    """Work between messages: what fails gives an empty result, so that no rank waits for it, and tells at the end."""

    def __init__(self) -> None:
        self._failure: Exception | None = None

    def run(self, function: Callable[..., Any], *args: Any, failing: Any) -> Any:
        if self._failure is None:
            try:
                return function(*args)
            except Exception as error:
                self._failure = error
        return failing

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
