"""Attention of a few queries over many keys, straight from the caller's arrays: decoding.

One query reads every key and value once, and everything else that could be done to them, a copy, a cast, a look at
their entries, costs as much as that. So this path is taken before any of these, with arguments whose forms alone have
been checked. Whether all entries are finite shows in the scores and in the sums over values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...certify.rounding import most_of_norms, sums_rounding
from ...kernels import _few, _halves
from ...machine.memory import require
from ...problem.arguments import Arguments
from ...problem.call import key_heads_of
from ...problem.mask import band_of_indices
from ...problem.request import Request
from ...problem.rows import contiguous, head_count, spread

LOG2E = 1 / math.log(2)
# Queries of a head, and of all heads that share a key head. The exact engine computes tiles of 16 to 48 queries of one
# head, whole or not, after it has copied the keys; this path's time grows with the number of queries.
MOST_QUERIES, MOST_ROWS = 8, 32


class Limits(NamedTuple):
    """What the kernel is told beside the arrays.

    Attributes
    ----------
    scale : float
        Scores in units of log2 are the scale times products of queries and keys.
    most : float
        In these units, the largest product of the norms of a query and a key that it may compute.
    keep : (..., n_k) bool or None
        False for keys that are not read; the last axis contiguous.
    n : int
        Queries of a head.
    band : (int, int)
        Query i sees the keys j with lo <= j - i <= hi.
    """

    scale: float
    most: float
    keep: np.ndarray | None
    n: int
    band: tuple[int, int]


def serves(a: Arguments, request: Request) -> bool:
    """Whether these arguments are few queries, and no more is asked of them than scores and masks, with an eps that
    rounding leaves room for: else "auto" has to look for another engine, or to warn.
    """
    if a.n > MOST_QUERIES or a.packed is not None or not asks_no_more(a, request):
        return False
    if request.method == "auto" and request.eps < sums_rounding(a.compute, a.n_k):
        return False
    return a.n * (a.heads // key_heads_of(a)) <= MOST_ROWS


def asks_no_more(a: Arguments, request: Request) -> bool:
    """Whether these arguments, of which some are not empty, ask for no more than scores and masks, by any engine."""
    if not a.plain or request.degree is not None or 0 in a.lead or 0 in (a.n, a.n_k, a.d_v):
        return False
    if not (a.Q.flags.aligned and a.K.flags.aligned and a.V.flags.aligned):
        return False
    return request.method in ("auto", "exact")


def forward(
    a: Arguments, request: Request, want_lse: bool
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """O (..., n, d_v) in the caller's dtype and lse (..., n) float64 or None; None where others have to look closer:
    some entry is not finite, or numbers are so large that rounding would show, and their normal form is wanted; or, for
    "auto", rounding of scores may pass eps, of which it has to warn.

    Raises
    ------
    MemoryError
        The result does not fit. Nothing else is as large: halves are not copied to float32.

    Notes
    -----
    Time: one read of K and V. Memory: O of every 512 keys.
    """
    shape = a.lead + (a.n, a.d_v)
    require(math.prod(shape) * a.compute.itemsize, f"the result, of shape {shape},")
    q, k, v, keep = by_slots(a)
    q = q.reshape(len(q), -1, a.d)
    band = band_of_indices(a.n + a.n_k, a.lo, a.hi, a.q_offset)
    limits = Limits(a.scale * LOG2E, most_of_scores(a, request, a.n_k), keep, a.n, band)
    found = _few.forward(q, k, v, limits, want_lse, a.threads)
    return None if found is None else to_user(a, *found)


def most_of_scores(a: Arguments, request: Request, n_k: int) -> float:
    """`Limits.most` for n_k keys; below 0 where, for "auto", rounding of their sums alone passes eps."""
    return math.inf if request.method == "exact" else LOG2E * most_of_norms(a.compute, n_k, a.d, request.eps)


def by_slots(a: Arguments) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Queries (slots, group, n, d), contiguous, and keys, values and what is kept of them where the caller has them."""
    key_heads = key_heads_of(a)
    slots, group = math.prod(a.batch) * key_heads, a.heads // key_heads
    q = contiguous(spread(a.Q, a.batch, a.heads)).reshape(slots, group, a.n, a.d)
    k, v = (_by_slot(X, a.batch, key_heads, 2) for X in (a.K, a.V))
    keep = None if a.key_mask is None else _by_slot(np.ascontiguousarray(a.key_mask), a.batch, key_heads, 1)
    return q, k, v, keep


def to_user(a: Arguments, o: np.ndarray, lse: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """O in the caller's shape and dtype, and lse in the caller's shape."""
    o = o.reshape(a.lead + (a.n, a.d_v))
    if o.dtype != a.dtype:
        o = _halves.narrowed(o, a.dtype, a.threads)
    return o, None if lse is None else lse.reshape(a.lead + (a.n,))


def _by_slot(X: np.ndarray, batch: tuple[int, ...], heads: int, inner: int) -> np.ndarray:
    """A view of X, whose last `inner` axes follow batch and head axes, with axes that come to batch times heads."""
    if X.shape[:-inner] == (*batch, heads):
        return X
    own = head_count(X, inner)
    X = np.expand_dims(X[None] if X.ndim == inner else X, -inner - 1)
    return np.broadcast_to(X, batch + (own, heads // own) + X.shape[-inner:])
