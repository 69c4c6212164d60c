"""Exact computation of some rows of a problem, the others being computed by a polynomial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...problem.communicator import SERIAL, Communicator
from ...problem.input_gradients import InputGradients
from ...problem.problem import Problem
from . import attention

# Marked rows with at most this many rows from one to the next are computed together, since a call costs as much as a
# tile.
_CLOSE = 16


@dataclass(slots=True)
class ExactRows:
    """The marked rows of a problem, to be computed exactly.

    If anything depends on j - i, rows close to each other are computed in one piece with those between, and each piece
    costs as much as a tile of the exact engine.

    Attributes
    ----------
    problem : Problem
    bound : float or (H,) array
        A bound of the scores, or one a slot, as `attention.forward` takes it.
    marked : (H, G, n) bool array
    """

    problem: Problem
    bound: float | np.ndarray
    marked: np.ndarray

    def forward(self, o: np.ndarray, lse: np.ndarray | None) -> None:
        """Overwrites o, and lse unless it is None, in the marked rows. Time ``n_k (2 d + 2 d_v + exp)`` a row."""
        for head, group, piece, part in self._pieces():
            exact, exact_lse, _ = attention.forward(part, self._bound(head), lse is not None)
            marked = self.marked[head, group, piece]
            o[head, group, piece[marked]] = exact[0, 0, marked]
            if lse is not None:
                lse[head, group, piece[marked]] = exact_lse[0, 0, marked]

    def backward(self, o: np.ndarray, lse: np.ndarray, do: np.ndarray, into: InputGradients) -> None:
        """Adds the gradients of the marked rows, where o and lse are exact, to dq, dk and dv of `into`.

        It takes two and a half times as long as forward.
        """
        for head, group, piece, part in self._pieces():
            at = (slice(head, head + 1), slice(group, group + 1), piece)
            marked = self.marked[at][..., None]
            saved = attention.resume(part, self._bound(head), o[at], lse[at])
            found = attention.backward(part, saved, np.where(marked, do[at], 0))
            into.dq[at] += found.dq
            stop = part.sizes.n_k
            into.dk[head, :stop] += found.dk[0]
            into.dv[head, :stop] += found.dv[0]

    def _bound(self, head: int) -> float:
        return float(np.broadcast_to(self.bound, len(self.marked))[head])

    def _pieces(self) -> Iterator[tuple[int, int, np.ndarray, Problem]]:
        """(slot, query head, indices of rows, problem of these rows) for all marked rows, with some between them."""
        for head, group in np.argwhere(self.marked.any(axis=2)):
            rows = np.flatnonzero(self.marked[head, group])
            pieces = [rows]
            if self._by_offset:
                cuts = np.flatnonzero(np.diff(rows) > _CLOSE) + 1
                pieces = [np.arange(part[0], part[-1] + 1) for part in np.split(rows, cuts)]
            for piece in pieces:
                part = self._part(int(head), int(group), piece)
                if not part.empty:
                    yield int(head), int(group), piece, part

    @property
    def _by_offset(self) -> bool:
        """Whether anything depends on j - i."""
        problem = self.problem
        return problem.mask.banded or any(x is not None for x in (problem.bias, problem.near, problem.family))

    def _part(self, head: int, group: int, piece: np.ndarray) -> Problem:
        problem, n = self.problem, self.problem.sizes.n
        first, stop = int(piece[0]), int(piece[-1]) + 1
        # Keys past all that any of these rows sees are left out.
        keys = problem.mask.keys_of(stop - 1)[1]
        bias = problem.bias
        if bias is not None:
            bias = bias[min(head, len(bias) - 1), min(group, bias.shape[1] - 1)]
            bias = np.ascontiguousarray(bias[n - stop : n - stop + len(piece) + keys - 1])[None, None]
        one = slice(head, head + 1), slice(group, group + 1)
        mask = problem.mask.rows(first, first + len(piece)).first_keys(keys).slots(one[0])
        return replace(
            problem,
            q=np.ascontiguousarray(problem.q[head, group, piece])[None, None],
            k=problem.k[head : head + 1, :keys],
            v=problem.v[head : head + 1, :keys],
            near=problem.near and problem.near.at(one),
            bias=bias,
            mask=mask,
        )


class ExactRowsOfPieces(ExactRows):
    """The marked rows of a sequence in pieces, without a bias, and with no band or a causal one.

    Rows are at the ranks that hold the last keys that they see. All ranks are told all marked rows and compute them
    over their own keys; then these parts are merged. So dk and dv have the gradients by the rows of all ranks. A rank
    sends about ``16 (d + d_v)`` bytes for each row that is marked on any rank.
    """

    __slots__ = ("_comm",)

    def __init__(self, problem: Problem, bound: float | np.ndarray, marked: np.ndarray, comm: Communicator) -> None:
        super().__init__(problem, bound, marked)
        self._comm = comm

    def forward(self, o: np.ndarray, lse: np.ndarray | None) -> None:
        told = _tell(self, [self.problem.q], self._comm)
        if told is None:
            return
        part, part_lse = self._comm.together(self._forward_told, told)
        top = self._comm.largest(part_lse)
        weight = attention.share(part_lse, top)[:, None]
        sums = self._comm.total(np.concatenate([weight * part, weight], axis=1))[told.own]
        den = sums[:, -1:]
        o[told.marked] = np.divide(sums[:, :-1], den, out=np.zeros_like(sums[:, :-1]), where=den > 0)
        if lse is not None:
            with np.errstate(divide="ignore"):
                lse[told.marked] = top[told.own] + np.log(den[:, 0])

    def backward(self, o: np.ndarray, lse: np.ndarray, do: np.ndarray, into: InputGradients) -> None:
        told = _tell(self, [self.problem.q, o, lse[..., None], do], self._comm)
        if told is not None:
            part = self._comm.together(self._backward_told, told, o, lse, do, into)
            into.dq[told.marked] += self._comm.total(part)[told.own]

    def _forward_told(self, told: _Told) -> tuple[np.ndarray, np.ndarray]:
        """O and lse, over the keys of this rank, of the marked rows of all ranks."""
        marked = self.marked
        part, part_lse = np.zeros((len(told.slot), self.problem.sizes.d_v)), np.full(len(told.slot), -np.inf)
        o, lse = np.zeros(marked.shape + part.shape[1:], self.problem.dtype), np.full(marked.shape, -np.inf)
        super().forward(o, lse)
        part[told.own], part_lse[told.own] = o[marked], lse[marked]
        for here, head, block in told.blocks(self.problem):
            block_o, block_lse, _ = attention.forward(block, self._bound(head.start), True)
            part[here], part_lse[here] = block_o[0, 0], block_lse[0, 0]
        return part, part_lse

    def _backward_told(
        self, told: _Told, o: np.ndarray, lse: np.ndarray, do: np.ndarray, into: InputGradients
    ) -> np.ndarray:
        """dq, over the keys of this rank, of the marked rows of all ranks; dk and dv of these keys are added to."""
        own = replace(into, dq=np.zeros_like(self.problem.q))
        super().backward(o, lse, do, own)
        part = np.zeros((len(told.slot), self.problem.sizes.d))
        part[told.own] = own.dq[self.marked]
        for here, head, block in told.blocks(self.problem):
            block_o, block_do = (told.column(index, here, self.problem.dtype) for index in (1, 3))
            block_lse = told.column(2, here, np.dtype(float))[..., 0]
            saved = attention.resume(block, self._bound(head.start), block_o, block_lse)
            found = attention.backward(block, saved, block_do)
            part[here] = found.dq[0, 0]
            into.dk[head] += found.dk
            into.dv[head] += found.dv
        return part


@dataclass(slots=True)
class _Told:
    """The marked rows of all ranks.

    Attributes
    ----------
    marked : tuple of arrays
        The indices of this rank's marked rows.
    own : slice
        Where they stand among the marked rows of all ranks.
    elsewhere : bool array
        Which rows of other ranks see the keys of this rank; they see all of them.
    slot : int array
        The slot and query head of each row, as one index.
    columns : list of arrays
        What was told of each row.
    """

    marked: tuple[np.ndarray, ...]
    own: slice
    elsewhere: np.ndarray
    slot: np.ndarray
    columns: list[np.ndarray]

    def blocks(self, problem: Problem) -> Iterator[tuple[np.ndarray, slice, Problem]]:
        """(indices of rows, slot of their keys, problem) for the rows of other ranks that see keys of this rank."""
        G = problem.sizes.G
        for slot in np.unique(self.slot[self.elsewhere]):
            here = np.flatnonzero(self.elsewhere & (self.slot == slot))
            head = slice(slot // G, slot // G + 1)
            mask = replace(problem.mask.without_band().slots(head), n=len(here))
            q = self.column(0, here, problem.dtype)
            block = replace(problem, q=q, k=problem.k[head], v=problem.v[head], mask=mask)
            if not block.empty:
                yield here, head, block

    def column(self, index: int, here: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """One of the arrays for these rows, (1, 1, rows, width)."""
        return np.ascontiguousarray(self.columns[index][here], dtype)[None, None]


def _tell(rows: ExactRows, arrays: list[np.ndarray], comm: Communicator) -> _Told | None:
    """The marked rows of all ranks with the entries of these arrays (H, G, n, width); None if no row is marked."""
    marked, mask = np.nonzero(rows.marked), rows.problem.mask
    counts = comm.gather(len(marked[0]))
    first, total = sum(counts[: comm.rank]), sum(counts)
    if total == 0:
        return None
    own = slice(first, first + len(marked[0]))
    widths = [X.shape[3] for X in arrays]
    told = np.zeros((total, sum(widths) + 1))
    told[own] = np.column_stack([*(X[marked] for X in arrays), marked[0] * rows.problem.sizes.G + marked[1]])
    told = comm.total(told)
    elsewhere = np.ones(total, bool)
    elsewhere[: own.stop if mask.causal else 0] = False
    elsewhere[own] = False
    *columns, slot = np.split(told, np.cumsum(widths), axis=1)
    return _Told(marked, own, elsewhere, slot[:, 0].astype(int), columns)


def exact_rows(
    problem: Problem, bound: float | np.ndarray, marked: np.ndarray, comm: Communicator = SERIAL
) -> ExactRows:
    """The marked rows of this problem, which over several processes is a piece of a longer sequence."""
    return ExactRowsOfPieces(problem, bound, marked, comm) if comm.distributed else ExactRows(problem, bound, marked)
