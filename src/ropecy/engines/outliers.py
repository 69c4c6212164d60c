"""Attention with a few long keys and queries: these exactly, so that they do not set the bound of everybody's scores.

Rows of q and k of the largest norms are taken out. What is left is a problem of its own, for the polynomial; the long
keys are a second softmax for every row, merged by its lse; the rows of long queries are computed exactly. A weight
that is exact is within any relative error, so the worst case's certificate is that of the whole. So is that of
moments: let h be a row's sum of radii by its denominator, s the share that the kept keys have of it, D the range of
all values and r D >= h / (1 - h) max_j |V_j - T| the certificate over the kept keys, r (1 - h) >= h / 2 whatever V
is. With T' the merged row

    h s / (1 - h s) max_j |V_j - T'| <= s h / (1 - h) (s max_j |V_j - T| + (1 - s) D) <= r s (2 - s) D <= r D.

Nothing of this is in the papers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..bounds import Scores
from ..costs import Work
from ..kernels import _quartic, _rows
from ..moments import TILE
from ..problem import Problem
from . import exact

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


@dataclass(slots=True)
class Saved:
    """What backward needs of forward: a forward pass of the rest with the whole's results, and its own results."""

    rest: Any
    own: np.ndarray | None
    own_lse: np.ndarray | None
    o: np.ndarray
    lse: np.ndarray


class Norms:
    """Norms of queries and of keys about their centre, as they are used, and those of the longest in order."""

    def __init__(self, problem: Problem, scores: Scores) -> None:
        H, _, _, d = problem.q.shape
        k = problem.k if scores.centre is None else problem.k - scores.centre[:, None]
        self._queries = _rows.norms(problem.q.reshape(H, -1, d), np.abs(scores.q_factor), problem.threads)
        self._keys = _rows.norms(k, scores.k_factor, problem.threads)
        if problem.key_mask is not None:
            self._keys *= problem.key_mask
        self._longest = _longest(self._queries), _longest(self._keys)
        self._problem, self._centred, self._k_factor = problem, k, scores.k_factor

    @cached_property
    def _spread(self) -> np.ndarray:
        """The largest mean square of a direction of the keys that are left when most are taken out, (H,)."""
        kept = self._keys <= self._longest[1][:, -1:]
        if self._problem.key_mask is not None:
            kept &= self._problem.key_mask
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
            mask = np.ones(self._keys.shape, bool) if problem.key_mask is None else problem.key_mask.copy()
            np.put_along_axis(mask, keys, False, axis=1)
            k, v = (np.where(mask[..., None], X, 0) for X in (problem.k, problem.v))
            rest = replace(rest, k=k, v=v, key_mask=mask)
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


def work(problem: Problem, unmasked: Work, n_rows: int, n_keys: int, grad: bool) -> Work:
    """Of what is exact; `unmasked` is that of every row and key."""
    H, G, n, _ = problem.q.shape
    n_k, causal = problem.k.shape[1], problem.hi is not None
    # A row of a causal problem costs a tile, and rows see the long keys before them by calls of their own.
    rows = n_rows * (TILE if causal else 1) / (G * n)
    calls = H * ((n_keys if causal else 1) * (n_keys > 0) + (n_rows if causal else G) * (n_rows > 0))
    return unmasked.times(rows + n_keys / n_k) + Work(calls * _CALL * (3 if grad else 1))


def memory(problem: Problem, split: Split, grad: bool) -> float:
    """Bytes beyond those of the rest."""
    H, G, n, d = problem.q.shape
    n_k, d_v = problem.v.shape[1:]
    item = problem.q.itemsize
    copies = (split.rows is not None) * H * G * n * d + (split.keys is not None) * H * n_k * (d + d_v)
    return (copies + H * G * n * (d_v + 4) * (3 if grad else 1)) * item + H * n_k


def merge(problem: Problem, split: Split, bound: float, o: np.ndarray, lse: np.ndarray) -> None:
    """o and lse of the rest become those of the whole, in place.

    Parameters
    ----------
    problem : Problem
        The whole.
    split : Split
    bound : float
        A bound on ``|scale <q, k>|``, or inf.
    o, lse : (H, G, n, d_v), (H, G, n) float64 arrays

    Notes
    -----
    Time: n pairs for every long key, n_k for every long query.
    """
    for rows, _, part in _parts(problem, split):
        part_o, part_lse, _ = exact.forward(part, bound, True)
        exact.merge(o[rows], lse[rows], part_o, part_lse)
    if split.rows is not None:
        exact.forward_rows(problem, bound, split.rows, o, lse)


def backward(problem: Problem, split: Split, centre: np.ndarray | None, saved: Saved, do: np.ndarray):
    """dq, dk, dv of ``<do, O>``, and None, for there is no bias.

    Notes
    -----
    Each part's backward pass, with the whole's O and denominators: ``dS = P (do V^T - <do, O>)`` splits over keys and
    over rows.
    """
    short = do if split.rows is None else np.where(split.rows[..., None], 0, do)
    dq, dk, dv, _ = saved.rest.backward(split.rest, short)
    if split.keys is not None and centre is not None and saved.rest.plan.engine == "polynomial":
        # The polynomial's keys are centred, which a row's gradient forgets where dS sums to 0.
        share = exact.share(saved.own_lse, saved.lse)
        sums = np.einsum("hgnc,hgnc->hgn", short, saved.own - saved.o, dtype=np.float64) * share
        if saved.rest.exact_rows is not None:
            sums[saved.rest.exact_rows] = 0
        dq += (problem.scale * sums[..., None] * centre[:, None, None]).astype(dq.dtype)
    for rows, (head, keys), part in _parts(problem, split):
        o, lse, part_do = (np.ascontiguousarray(X[rows]) for X in (saved.o, saved.lse, short))
        found = exact.backward(part, exact.resume(part, np.inf, o, lse), part_do)
        dq[rows] += found[0]
        dk[head, keys] += found[1]
        dv[head, keys] += found[2]
    if split.rows is not None:
        exact.backward_rows(problem, np.inf, split.rows, saved.o, saved.lse, do, dq, dk, dv)
    return dq, dk, dv, None


def _parts(problem: Problem, split: Split) -> Iterator[tuple[tuple, tuple, Problem]]:
    """Rows, slots with their long keys, and the problem of these without a mask: causal, rows are cut at these keys."""
    if split.keys is None:
        return
    H, _, n, _ = problem.q.shape
    head = np.arange(H)[:, None]
    if problem.hi is None:
        yield (slice(None),) * 3, (head, split.keys), _part(problem, problem.q, head, split.keys)
        return
    for h in range(H):
        cuts = np.clip(split.keys[h] - problem.q_offset, 0, n)
        for count, (first, last) in enumerate(zip(cuts, [*cuts[1:], n], strict=True), start=1):
            if first < last:
                keys = split.keys[h : h + 1, :count]
                q = np.ascontiguousarray(problem.q[h : h + 1, :, first:last])
                rows = (slice(h, h + 1), slice(None), slice(first, last))
                yield rows, (head[h : h + 1], keys), _part(problem, q, head[h : h + 1], keys)


def _part(problem: Problem, q: np.ndarray, head: np.ndarray, keys: np.ndarray) -> Problem:
    mask = None if problem.key_mask is None else problem.key_mask[head, keys]
    return replace(problem, q=q, k=problem.k[head, keys], v=problem.v[head, keys], hi=None, q_offset=0, key_mask=mask)
