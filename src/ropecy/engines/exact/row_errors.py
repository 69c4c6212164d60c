"""The errors of some rows of a result, measured by computing the same rows exactly."""

from __future__ import annotations

import numpy as np

from ...certify.values import range_elsewhere
from ...kernels import _rows
from ...problem.communicator import SERIAL, Communicator
from ...problem.problem import Problem
from .rows import exact_rows


def row_errors(
    problem: Problem,
    o: np.ndarray,
    chosen: np.ndarray,
    unit: float,
    *,
    bound: float | np.ndarray = np.inf,
    comm: Communicator = SERIAL,
) -> np.ndarray:
    """max_c |o_ic - Attn_ic| / range_j(v_jc) for the rows `chosen`, flat indices into (H, G, n).

    A column that is constant over the keys of a row may be off by 64 `unit` of its value. `bound` is a bound of the
    scores. If the sequence is in pieces, each process judges its own rows.
    """
    H, G, n = problem.sizes[:3]
    marked = np.zeros(H * G * n, bool)
    marked[chosen] = True
    exact = np.zeros(o.shape, o.dtype)  # by calloc: most rows are never touched
    if comm.distributed or not problem.empty:
        exact_rows(problem, bound, marked.reshape(H, G, n), comm).forward(exact, None)
    found = np.empty(len(chosen))
    ranges = _Ranges(problem, comm)
    for at, (head, group, row) in enumerate(zip(*np.unravel_index(chosen, (H, G, n)), strict=True)):
        low, high = ranges.of(int(head), int(row))
        off = np.abs(o[head, group, row] - exact[head, group, row])
        constant = high <= low
        # A row that sees no key is 0.
        allowed = 64 * unit * np.where(np.isfinite(high[constant]), np.abs(high[constant]), 0)
        with np.errstate(over="ignore"):
            ratio = np.max(off[~constant] / (high - low)[~constant], initial=0.0)
        found[at] = np.inf if np.any(off[constant] > allowed) else ratio
    return found


class _Ranges:
    """The least and the largest value of every column over the keys that a row sees; rows are asked for in order."""

    def __init__(self, problem: Problem, comm: Communicator) -> None:
        self._problem = problem
        self._elsewhere = range_elsewhere(problem, comm)
        self._seen, self._low, self._high = (-1, 0, 0), None, None  # of which keys of which head the ends are known
        if not problem.mask.banded:
            _, low, high = _rows.columns(problem.v, problem.mask.kept, problem.threads)
            self._lows, self._highs = np.minimum(low, self._elsewhere[0]), np.maximum(high, self._elsewhere[1])

    def of(self, head: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest values, (d_v,) each; inf and -inf if the row sees no key."""
        mask = self._problem.mask
        if not mask.banded:
            return self._lows[head], self._highs[head]
        first, last = mask.keys_of(row)
        start = first
        if self._seen[:2] == (head, first) and self._seen[2] <= last:
            start = self._seen[2]  # only what is new is looked at
        else:
            self._low, self._high = (X[head] for X in self._elsewhere)
        v = self._problem.v[head, start:last]
        if mask.kept is not None:
            v = v[mask.kept[head, start:last]]
        self._low = np.minimum(self._low, v.min(axis=0, initial=np.inf))
        self._high = np.maximum(self._high, v.max(axis=0, initial=-np.inf))
        self._seen = (head, first, last)
        return self._low, self._high
