"""Exact attention of a sequence in pieces: pieces go round a ring, and each pair of ranks meets once.

At step t rank r meets the piece of rank r - t, and computes what the two see of each other: its own rows over the
guest's keys, and the guest's rows over its own keys, whose results go home at once. After half a round every pair has
met, so ranks have equal work under a causal mask too; where two ranks meet twice, at the opposite ends of an even
ring, each takes half of the rows. Partial results are merged by their log-sums, in the order of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ParamSpec, TypeVar

import numpy as np

from ...problem.input_gradients import InputGradients
from ...problem.mask import Mask
from ...problem.pieces import Pieces
from ...problem.problem import Problem
from ..merge import merge
from . import attention

P, T = ParamSpec("P"), TypeVar("T")


class Ring:
    """One exact problem in pieces: forward, then backward as often as wanted. All ranks call the same methods.

    Parameters
    ----------
    problem : Problem
        This rank's rows and keys, with the band of the whole.
    pieces : Pieces
    bound : float
        A bound of all scores, as `attention.forward` takes it.
    """

    def __init__(self, problem: Problem, pieces: Pieces, bound: float) -> None:
        self._problem, self._layout, self._ranks = problem, pieces.layout, pieces.comm
        self._bound, self._symbol = bound, pieces.symbol
        self._piece = [problem.q, problem.k, problem.v]
        if pieces.masked:
            kept = problem.mask.kept
            self._piece.append(np.ones(problem.k.shape[:2], np.bool_) if kept is None else kept)
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
                    merge(o[:, :, span], lse[:, :, span], *part)
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
                merge(o[:, :, span], lse[:, :, span], *room[2 * i : 2 * i + 2])
        self._ranks.together(tasks.check)
        self._o, self._lse = o.astype(q.dtype), lse
        return self._o, lse

    def resume(self, o: np.ndarray, lse: np.ndarray) -> None:
        """Sets O and lse for `backward` to the results of a forward pass that had more keys."""
        self._o, self._lse, self._bound = o, lse, np.inf

    def backward(self, do: np.ndarray) -> InputGradients:
        """The gradients of ``<do, O>``; those of the bias and of the near field's scale are this rank's parts."""
        rank = self._ranks.rank
        dq, dk, dv = own = [np.zeros(X.shape) for X in self._piece[:3]]
        symbol, near = [], self._problem.near
        scale_near = None if near is None else np.zeros(self._problem.sizes[:2])
        tasks = _Tasks()
        for step, guest, pieces in self._meetings([*self._piece, self._o, self._lse, do]):
            away = []
            for rows, keys, span in self._layout.visible(rank, step):
                block = self._block(rows, keys, span, pieces)
                results = [X[:, :, span] for X in pieces[rows][-3:]]
                failing = InputGradients(self._empty_grad(span), *self._empty_keys(keys))
                part = tasks.run(self._backward_block, block, *results, failing=failing)
                symbol += part.symbol
                if part.scale_near is not None:
                    scale_near += part.scale_near
                if rows == rank:
                    dq[:, :, span] += part.dq
                else:
                    away.append(part.dq)
                if keys == rank:
                    dk += part.dk
                    dv += part.dv
                else:
                    away += [part.dk, part.dv]
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
        return InputGradients(*(X.astype(do.dtype) for X in own), tuple(symbol), scale_near=scale_near)

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
        lo, hi = self._problem.mask.lo, self._problem.mask.hi
        offset = self._layout.offset_between(rows, keys) + span.start
        seen = Mask(span.stop - span.start, k.shape[1], lo, hi, offset, mask[0] if mask else None)
        return replace(
            self._problem,
            q=np.ascontiguousarray(q[:, :, span]),
            k=k,
            v=v,
            mask=seen,
            bias=None if self._symbol is None else self._symbol(seen.least, seen.most),
        )

    def _forward_block(self, block: Problem) -> list[np.ndarray]:
        o, lse, _ = attention.forward(block, self._bound, True)
        if np.isposinf(lse).any():
            raise OverflowError("scores past the largest float64 can't be merged between ranks")
        return [o, lse]

    def _backward_block(self, block: Problem, o: np.ndarray, lse: np.ndarray, do: np.ndarray) -> InputGradients:
        o, do = np.ascontiguousarray(o), np.ascontiguousarray(do)
        near = None if block.near is None else attention.near_scale_gradient(block, o, lse, do)
        found = attention.backward(block, attention.resume(block, self._bound, o, lse), do)
        return replace(found, scale_near=near)

    def _shape_at(self, rank: int, index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on `rank` of the array at this index of what goes round: (H, n_k, ...) or (H, G, n, ...)."""
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
    """Work between messages. Where it fails it gives an empty result, so that no rank waits for it; `check` raises."""

    def __init__(self) -> None:
        self._failure: Exception | None = None

    def run(self, function: Callable[P, T], *args: P.args, failing: T) -> T:
        if self._failure is None:
            try:
                return function(*args)
            except Exception as error:
                self._failure = error
        return failing

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
