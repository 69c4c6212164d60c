"""Exact attention of a sequence in pieces: pieces go round a ring, and each pair of ranks meets once.

At step t rank r meets the piece of rank r - t, and computes what the two see of each other: its own rows over the
guest's keys, and the guest's rows over its own keys, whose results go home at once. After half a round every pair has
met, so ranks have equal work under a causal mask too; where two ranks meet twice, at the opposite ends of an even
ring, each takes half of the rows. Partial results are merged by their log-sums, in the order of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..problem import Problem
from . import exact


@dataclass(slots=True)
class Layout:
    """Where the pieces lie: rank r has rows q_start[r] + arange(n[r]) and keys k_start[r] + arange(n_k[r]).

    `q_offset` is the index of the first row of all among the keys.
    """

    n: list[int]
    n_k: list[int]
    q_start: list[int]
    k_start: list[int]
    q_offset: int


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
            for rows, keys, span in self._visible(self._ranks.rank, step):
                block = self._block(rows, keys, span, pieces)
                part = tasks.run(self._forward_block, block, failing=self._empty_rows(span))
                if rows == self._ranks.rank:
                    exact.merge(o[:, :, span], lse[:, :, span], *part)
                else:
                    away += part
            room, places = [], []
            host = (self._ranks.rank + step) % self._ranks.size
            for rows, _, span in self._visible(host, step):
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

    def backward(
        self, do: np.ndarray, diagonals: Callable[[np.ndarray, int], None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.float64]:
        """dq, dk, dv of ``<do, O>``, and by scale_near what this rank's blocks give; ``diagonals(dsymbol, first)`` is
        given the bias's gradient block by block.
        """
        rank = self._ranks.rank
        own = [np.zeros(X.shape) for X in self._piece[:3]]
        dq, dk, dv = own
        dscale_near = np.float64(0)
        tasks = _Tasks()
        for step, guest, pieces in self._meetings([*self._piece, self._o, self._lse, do]):
            away = []
            for rows, keys, span in self._visible(rank, step):
                block = self._block(rows, keys, span, pieces)
                results = [X[:, :, span] for X in pieces[rows][-3:]]
                failing = [self._empty_grad(span), *self._empty_keys(keys), None, 0.0]
                *parts, dsymbol, near = tasks.run(self._backward_block, block, *results, failing=failing)
                dscale_near += near
                if dsymbol is not None:
                    diagonals(dsymbol, -(block.q.shape[2] - 1) - block.q_offset)
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
            for rows, keys, span in self._visible(host, step):
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
        return *(X.astype(do.dtype) for X in own), dscale_near

    def _meetings(self, piece: list[np.ndarray]) -> Iterator[tuple[int, int, dict[int, list[np.ndarray]]]]:
        """(step, guest, {rank: its arrays}) of every meeting; the next guest arrives while the caller computes."""
        rank, size = self._ranks.rank, self._ranks.size
        current = piece
        for step in range(size // 2 + 1):
            guest, requests, room = (rank - step) % size, [], None
            if step < size // 2:
                coming = (guest - 1) % size
                room = [np.empty(self._shape_at(coming, i, X.shape), X.dtype) for i, X in enumerate(piece)]
                requests = self._ranks.pass_on(current, room)
            yield step, guest, {rank: piece, guest: current}
            self._ranks.wait(requests)
            current = room

    def _visible(self, rank: int, step: int) -> list[tuple[int, int, slice]]:
        """What `rank` computes at a step: (whose rows, whose keys, which of the rows)."""
        size, layout = self._ranks.size, self._layout
        guest = (rank - step) % size
        twice = step and 2 * step == size
        half, half_guest = (layout.n[r] // 2 if twice else 0 for r in (rank, guest))
        found = [(rank, guest, slice(half, layout.n[rank]))]
        if step:
            found.append((guest, rank, slice(0, half_guest if twice else layout.n[guest])))
        return [task for task in found if self._sees(*task)]

    def _sees(self, rows: int, keys: int, span: slice) -> bool:
        layout = self._layout
        if span.start >= span.stop or not layout.n_k[keys]:
            return False
        offset = self._offset(rows, keys)
        lo, hi = self._problem.lo, self._problem.hi
        least, most = -offset - (span.stop - 1), layout.n_k[keys] - 1 - offset - span.start
        return (hi is None or least <= hi) and (lo is None or most >= lo)

    def _offset(self, rows: int, keys: int) -> int:
        return self._layout.q_offset + self._layout.q_start[rows] - self._layout.k_start[keys]

    def _block(self, rows: int, keys: int, span: slice, pieces: dict[int, list[np.ndarray]]) -> Problem:
        q, (k, v, *mask) = pieces[rows][0], pieces[keys][1 : len(self._piece)]
        offset = self._offset(rows, keys) + span.start
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
