"""Attention of packed sequences of a few queries each, as `few_queries` computes one of them alone, in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ...kernels import _few
from ...machine.memory import require
from ...problem.arguments import Arguments
from ...problem.call import key_heads_of
from ...problem.mask import Mask
from ...problem.request import Request
from .few_queries import LOG2E, MOST_QUERIES, MOST_ROWS, asks_no_more, by_slots, most_of_scores, to_user


class Stretches(NamedTuple):
    """What the kernel is told beside the arrays.

    Attributes
    ----------
    scale, keep
        As in `few_queries.Limits`.
    rows : (s, 6) intp
        Of each sequence the number of its queries and of its keys, lo and hi with lo <= j - i <= hi for the keys that
        query i sees, its first query and its first key.
    most : (s,) float64
        As in `few_queries.Limits`.
    """

    scale: float
    keep: np.ndarray | None
    rows: np.ndarray
    most: np.ndarray


class Found(NamedTuple):
    """O (..., n, d_v) in the caller's dtype and lse (..., n) float64 or None, of the rows of those sequences that are
    `done`, (s,) bool.
    """

    O: np.ndarray
    lse: np.ndarray | None
    done: np.ndarray

    def left(self, a: Arguments) -> Arguments:
        """The arguments, of which the other rows are left to compute."""
        return replace(a, packed=replace(a.packed, done=self.done))

    def put(self, into: np.ndarray, lse: np.ndarray | None, a: Arguments) -> None:
        """Writes the rows that are done to their places."""
        rows = np.repeat(self.done, a.packed.q_lengths)
        into[..., rows, :] = self.O[..., rows, :]
        if lse is not None:
            lse[..., rows] = self.lse[..., rows]


def forward(a: Arguments, request: Request, want_lse: bool) -> Found | None:
    """What `few_queries.forward` gives of each packed sequence of a few queries; None where there is no such sequence.

    Raises
    ------
    MemoryError
        The result does not fit.

    Notes
    -----
    Nothing of a sequence's result depends on the sequences beside it. Time: one read of K and V. Memory: O once more.
    """
    if not asks_no_more(a, request):
        return None
    found: Found | None = None
    for own, which in _kinds(a):
        most = _most(own, request)
        few = which & (own.packed.q_lengths * (a.heads // key_heads_of(own)) <= MOST_ROWS) & (most >= 0)
        if not few.any():
            continue
        of_kind = _forward(own, np.flatnonzero(few), most[few], want_lse)
        if found is not None:
            found.put(of_kind.O, of_kind.lse, a)
            of_kind = of_kind._replace(done=of_kind.done | found.done)
        found = of_kind
    return found


def _kinds(a: Arguments) -> Iterator[tuple[Arguments, np.ndarray]]:
    """The sequences of a few queries, (s,) bool, in which no key is hidden, and those in which some are.

    Alone, the former have no key mask, whose heads might end the sharing of keys.
    """
    packed = a.packed
    few = (packed.q_lengths > 0) & (packed.q_lengths <= MOST_QUERIES) & (packed.k_lengths > 0)
    if a.key_mask is None:
        yield a, few
        return
    hidden = np.zeros(packed.size, np.bool_)
    hidden[packed.of_keys[~a.key_mask.reshape(-1, a.n_k).all(axis=0)]] = True
    yield replace(a, key_mask=None), few & ~hidden
    yield a, few & hidden


def _most(a: Arguments, request: Request) -> np.ndarray:
    """`few_queries.Limits.most` of each sequence."""
    lengths = a.packed.k_lengths.tolist()
    found = {n_k: most_of_scores(a, request, n_k) for n_k in set(lengths)}
    return np.array([found[n_k] for n_k in lengths])


def _forward(a: Arguments, which: np.ndarray, most: np.ndarray, want_lse: bool) -> Found:
    """What the kernel finds of these sequences."""
    shape, packed = a.lead + (a.n, a.d_v), a.packed
    require(2 * math.prod(shape) * a.compute.itemsize, f"the result, of shape {shape}, and as much beside it")
    q, k, v, keep = by_slots(a)
    starts = (np.cumsum(lengths) - lengths for lengths in (packed.q_lengths, packed.k_lengths))
    n, n_k, offset = (X[which] for X in (packed.q_lengths, packed.k_lengths, packed.offsets))
    shapes = zip(n.tolist(), n_k.tolist(), offset.tolist(), strict=True)
    bands = np.array([Mask(n, n_k, a.lo, a.hi, offset).band_of_indices for n, n_k, offset in shapes])
    rows = [n, n_k, *bands.T, *(start[which] for start in starts)]
    rows = np.stack(rows, axis=1).astype(np.intp)
    stretches = Stretches(a.scale * LOG2E, keep, rows, most)
    o, lse, right = _few.forward_stretches(q, k, v, stretches, want_lse, a.threads)
    done = np.zeros(packed.size, np.bool_)
    done[which] = right
    return Found(*to_user(a, o, lse), done)
