"""How a problem is split into its few longest keys and queries and all the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...certify.moments import TILE
from ...certify.once import once
from ...certify.scores import Scores
from ...kernels import _quartic, _rows
from ...problem.mask import Mask
from ...problem.problem import Outline, Problem, Slots
from ..cost import Work
from ..exact.cost import exact_work

_CALL = 8e-5  # seconds that a call of the exact engine costs beside its pairs
_FEW = 1 / 32  # the largest part of the queries, or of the keys, that may be taken out


@dataclass(slots=True)
class Split:
    """A problem without its longest keys and queries, and which ones these are.

    Attributes
    ----------
    rest : Problem
        The problem with its long keys hidden and its long queries set to 0.
    keys : (H, m) intp array or None
        The indices of the long keys of every slot, ascending.
    rows : (H, G, n) bool array or None
        True for the long queries.
    """

    rest: Problem
    keys: np.ndarray | None
    rows: np.ndarray | None

    def __str__(self) -> str:
        long = [] if self.keys is None else [f"{self.keys.size:,} long keys"]
        long += [] if self.rows is None else [f"{np.count_nonzero(self.rows):,} long queries"]
        return f"{' and '.join(long)} exactly"


class Norms:
    """The norms of scaled queries and of centred, scaled keys, from which ways to split are made."""

    def __init__(self, problem: Problem, scores: Scores) -> None:
        H, d = problem.sizes.H, problem.sizes.d
        k = problem.k if scores.centre is None else problem.k - scores.centre[:, None]
        self._queries = _rows.norms(problem.q.reshape(H, -1, d), np.abs(scores.q_factor), problem.threads)
        self._keys = _rows.norms(k, scores.k_factor, problem.threads)
        if problem.mask.kept is not None:
            self._keys *= problem.mask.kept
        self._longest = _longest(self._queries), _longest(self._keys)
        self._problem, self._centred, self._k_factor = problem, k, scores.k_factor

    @once
    def _spread(self) -> np.ndarray:
        """The largest eigenvalue of the mean of k k^T over the keys that are left at least, for each slot, (H,)."""
        kept = self._keys <= self._longest[1][:, -1:]
        if self._problem.mask.kept is not None:
            kept &= self._problem.mask.kept
        rows = _quartic.Rows(self._centred, kept, None, self._k_factor, self._problem.threads)
        with np.errstate(all="ignore"):
            second = rows.apply([kept.shape[1]], None)[0][:, 0]
        # The squares of keys may overflow.
        finite, largest = np.isfinite(second).all(axis=(1, 2)), np.full(len(second), np.inf)
        largest[finite] = np.linalg.eigvalsh(second[finite])[:, -1]
        return largest / np.maximum(np.count_nonzero(kept, axis=1), 1)

    def slots(self, which: Slots) -> Norms:
        """Those of some of the slots."""
        found = object.__new__(Norms)
        found._queries, found._keys, found._spread = self._queries[which], self._keys[which], self._spread[which]
        found._longest = tuple(X[which] for X in self._longest)
        found._problem = self._problem.slots(which)
        return found

    def shortest(self) -> tuple[np.ndarray, np.ndarray]:
        """About the smallest B and the smallest square of `candidates` for each slot by itself, (H,) each."""
        queries, keys = (X[:, _counts(X.shape[1] - 1)[-1]] for X in self._longest)
        with np.errstate(all="ignore"):
            return queries * keys, queries**2 * self._spread

    def candidates(self) -> Iterator[tuple[int, int, float, float]]:
        """Ways to split, as (n_rows, n_keys, B, square).

        `n_rows` queries and `n_keys` keys are taken out of every slot. Of the rest, B bounds the scores, and `square`
        is about the largest mean square of the scores of a row.
        """
        queries, keys = self._longest
        least = np.inf
        for n_keys in _counts(keys.shape[1] - 1):
            best = np.inf
            for n_rows in _counts(queries.shape[1] - 1):
                with np.errstate(over="ignore"):
                    B = float((queries[:, n_rows] * keys[:, n_keys]).max())
                # Taking out more is worth a try only if it lowers the bound by more than 3%.
                if B < 0.97 * min(best, least if n_rows == 0 else np.inf):
                    best = B
                    with np.errstate(all="ignore"):
                        square = float((queries[:, n_rows] ** 2 * self._spread).max())
                    yield n_rows, n_keys, B, square
            least = min(least, best)

    def split(self, n_rows: int, n_keys: int) -> Split:
        """The problem split so that so many queries and keys of every slot are taken out."""
        problem = self._problem
        rest, keys, rows = problem, None, None
        queries, longest = self._longest
        if n_rows:
            rows = np.zeros(self._queries.shape, bool)
            np.put_along_axis(rows, _last(self._queries, queries[:, n_rows - 1], n_rows), True, axis=1)
            rows = rows.reshape(problem.q.shape[:3])
            rest = replace(rest, q=np.where(rows[..., None], 0, problem.q))
        if n_keys:
            keys = _last(self._keys, longest[:, n_keys - 1], n_keys)
            mask = np.ones(self._keys.shape, bool) if problem.mask.kept is None else problem.mask.kept.copy()
            np.put_along_axis(mask, keys, False, axis=1)
            k, v = (np.where(mask[..., None], X, 0) for X in (problem.k, problem.v))
            rest = replace(rest, k=k, v=v, mask=replace(problem.mask, kept=mask))
        return Split(rest, keys, rows)


def _longest(norms: np.ndarray) -> np.ndarray:
    """The largest norms of each slot in falling order: one more than may be taken out."""
    count = min(int(norms.shape[1] * _FEW) + 1, norms.shape[1])
    return np.sort(norms, axis=1)[:, : -count - 1 : -1]


def _last(norms: np.ndarray, least: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` largest norms of each slot, (H, count) ascending; of equal ones, the first.

    `least`, (H,), is the smallest of these norms.
    """
    found = []
    for row, bound in zip(norms, least, strict=True):
        longer, equal = np.flatnonzero(row > bound), np.flatnonzero(row == bound)
        found.append(np.sort(np.concatenate([longer, equal[: count - longer.size]])))
    return np.array(found)


def _counts(most: int) -> list[int]:
    """0 and the powers of 2 up to `most`."""
    return [0, *(2**k for k in range(most.bit_length()))]


def work(problem: Outline, n_rows: int, n_keys: int, grad: bool) -> Work:
    """The work of computing the long queries and keys exactly."""
    (H, G, n, n_k, *_), causal = problem.sizes, problem.mask.causal
    unmasked = exact_work(problem.outline(mask=problem.mask.without_band()), grad)
    # In a causal problem a single row costs a whole tile, and the rows between two long keys need a call of their own.
    rows = n_rows * (TILE if causal else 1) / (G * n)
    calls = H * ((n_keys if causal else 1) * (n_keys > 0) + (n_rows if causal else G) * (n_rows > 0))
    return unmasked.times(rows + n_keys / n_k) + Work(calls * _CALL * (3 if grad else 1))


def memory(problem: Outline, split: Split, grad: bool) -> float:
    """The bytes needed beyond those for the rest."""
    H, G, n, n_k, d, d_v = problem.sizes
    item = problem.dtype.itemsize
    copies = (split.rows is not None) * H * G * n * d + (split.keys is not None) * H * n_k * (d + d_v)
    return (copies + H * G * n * (d_v + 4) * (3 if grad else 1)) * item + H * n_k


def parts(problem: Problem, split: Split) -> Iterator[tuple[tuple, tuple, Problem]]:
    """The problems, without a band, of rows with the long keys that they see.

    Yields (index of the rows in (H, G, n), index of the keys in (H, n_k), problem). In a causal problem the rows are
    cut at the long keys, so that all rows of a part see the same ones.
    """
    if split.keys is None:
        return
    H, n = problem.sizes.H, problem.sizes.n
    head = np.arange(H)[:, None]
    if not problem.mask.causal:
        yield (slice(None),) * 3, (head, split.keys), _part(problem, problem.q, head, split.keys)
        return
    for h in range(H):
        cuts = np.clip(split.keys[h] - problem.mask.offset, 0, n)
        for count, (first, last) in enumerate(zip(cuts, [*cuts[1:], n], strict=True), start=1):
            if first < last:
                keys = split.keys[h : h + 1, :count]
                q = np.ascontiguousarray(problem.q[h : h + 1, :, first:last])
                rows = (slice(h, h + 1), slice(None), slice(first, last))
                yield rows, (head[h : h + 1], keys), _part(problem, q, head[h : h + 1], keys)


def _part(problem: Problem, q: np.ndarray, head: np.ndarray, keys: np.ndarray) -> Problem:
    kept = None if problem.mask.kept is None else problem.mask.kept[head, keys]
    mask = Mask(q.shape[2], keys.shape[1], kept=kept)
    return replace(problem, q=q, k=problem.k[head, keys], v=problem.v[head, keys], mask=mask)
