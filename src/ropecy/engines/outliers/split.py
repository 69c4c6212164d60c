"""A problem without its few longest keys and queries, and these by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...certify.moments import TILE
from ...certify.once import once
from ...certify.scores import Scores
from ...kernels import _quartic, _rows
from ...problem.mask import Mask
from ...problem.problem import Outline, Problem
from ..cost import Work
from ..exact.cost import exact_work

# Seconds that a call of the exact engine costs beside its pairs.
_CALL = 8e-5
# At most this part of the rows may be long.
_FEW = 1 / 32


@dataclass(slots=True)
class Split:
    """A problem in parts.

    Attributes
    ----------
    rest : Problem
        Long keys hidden, long queries 0.
    keys : (H, m) intp array or None
        The long keys of every slot, ascending.
    rows : (H, G, n) bool array or None
        The long queries.
    """

    rest: Problem
    keys: np.ndarray | None
    rows: np.ndarray | None

    def __str__(self) -> str:
        long = [] if self.keys is None else [f"{self.keys.size:,} long keys"]
        long += [] if self.rows is None else [f"{np.count_nonzero(self.rows):,} long queries"]
        return f"{' and '.join(long)} exactly"


class Norms:
    """Norms of queries and of keys about their centre, as they are used, and those of the longest in order."""

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
        """The largest mean square of a direction of the keys that are left when most are taken out, (H,)."""
        kept = self._keys <= self._longest[1][:, -1:]
        if self._problem.mask.kept is not None:
            kept &= self._problem.mask.kept
        rows = _quartic.Rows(self._centred, kept, None, self._k_factor, self._problem.threads)
        with np.errstate(all="ignore"):
            second = rows.apply([kept.shape[1]], None)[0][:, 0]
        # Squares of keys may be past the largest number.
        finite, largest = np.isfinite(second).all(axis=(1, 2)), np.full(len(second), np.inf)
        largest[finite] = np.linalg.eigvalsh(second[finite])[:, -1]
        return largest / np.maximum(np.count_nonzero(kept, axis=1), 1)

    def candidates(self) -> Iterator[tuple[int, int, float, float]]:
        """How many queries and how many keys of a slot to take out, the bound B of the other scores, and about the
        largest mean square of a row of these.
        """
        queries, keys = self._longest
        least = np.inf
        for n_keys in _counts(keys.shape[1] - 1):
            best = np.inf
            for n_rows in _counts(queries.shape[1] - 1):
                with np.errstate(over="ignore"):
                    B = float((queries[:, n_rows] * keys[:, n_keys]).max())
                # A longer list must do more than a shorter one.
                if B < 0.97 * min(best, least if n_rows == 0 else np.inf):
                    best = B
                    with np.errstate(all="ignore"):
                        square = float((queries[:, n_rows] ** 2 * self._spread).max())
                    yield n_rows, n_keys, B, square
            least = min(least, best)

    def split(self, n_rows: int, n_keys: int) -> Split:
        """The problem without so many queries and keys of every slot."""
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
    """The largest in falling order, one more than may be taken out."""
    count = min(int(norms.shape[1] * _FEW) + 1, norms.shape[1])
    return np.sort(norms, axis=1)[:, : -count - 1 : -1]


def _last(norms: np.ndarray, least: np.ndarray, count: int) -> np.ndarray:
    """Where the largest are, (H, count) ascending, the least of them being `least` (H,); of equals the first."""
    found = []
    for row, bound in zip(norms, least, strict=True):
        longer, equal = np.flatnonzero(row > bound), np.flatnonzero(row == bound)
        found.append(np.sort(np.concatenate([longer, equal[: count - longer.size]])))
    return np.array(found)


def _counts(most: int) -> list[int]:
    """0 and powers of 2."""
    return [0, *(2**k for k in range(most.bit_length()))]


def work(problem: Outline, n_rows: int, n_keys: int, grad: bool) -> Work:
    """Of what is exact."""
    (H, G, n, n_k, *_), causal = problem.sizes, problem.mask.causal
    unmasked = exact_work(problem.outline(mask=problem.mask.without_band()), grad)
    # A row of a causal problem costs a tile, and rows see the long keys before them by calls of their own.
    rows = n_rows * (TILE if causal else 1) / (G * n)
    calls = H * ((n_keys if causal else 1) * (n_keys > 0) + (n_rows if causal else G) * (n_rows > 0))
    return unmasked.times(rows + n_keys / n_k) + Work(calls * _CALL * (3 if grad else 1))


def memory(problem: Outline, split: Split, grad: bool) -> float:
    """Bytes beyond those of the rest."""
    H, G, n, n_k, d, d_v = problem.sizes
    item = problem.dtype.itemsize
    copies = (split.rows is not None) * H * G * n * d + (split.keys is not None) * H * n_k * (d + d_v)
    return (copies + H * G * n * (d_v + 4) * (3 if grad else 1)) * item + H * n_k


def parts(problem: Problem, split: Split) -> Iterator[tuple[tuple, tuple, Problem]]:
    """Rows, slots with their long keys, and the problem of these without a mask: causal, rows are cut at these keys."""
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
