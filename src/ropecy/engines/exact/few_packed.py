"""Attention of few queries of each of many sequences, over keys that lie side by side or in pages: batched decoding.

It is the path of `few_queries` for sequences of different lengths, in one call. Nothing of a sequence's result depends
on the sequences beside it, on where its keys lie, or on how many threads there are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...certify.rounding import most_of_norms, sums_rounding
from ...kernels import _few
from ...machine.memory import require
from ...problem.request import Request
from .few_queries import LOG2E, MOST_QUERIES, MOST_ROWS

# Farther than any key is from any query, and far from the largest integer.
_FAR = 2**60


class Sequences(NamedTuple):
    """Where each of s sequences has its queries and its keys, and what these see of each other.

    Attributes
    ----------
    q_starts : (s + 1,) intp
        The queries of sequence s are those from q_starts[s] to q_starts[s + 1].
    k_starts, n_k : (s,) intp
        Its first key among the rows of its pages, and how many keys it has.
    pages : (s, m) int32
        The numbers of its pages, in their order.
    band : (int or None, int or None)
        Query i of n sees the keys with lo <= j - (i + n_k - n) <= hi: the last query stands at the last key.
    scale : float
    """

    q_starts: np.ndarray
    k_starts: np.ndarray
    n_k: np.ndarray
    pages: np.ndarray
    band: tuple[int | None, int | None]
    scale: float


class Packed(NamedTuple):
    """What the kernel is told of sequences that it takes.

    Attributes
    ----------
    rows : (s, 6) intp
        Of each the number of its queries and of the keys that they see, lo and hi with lo <= j - i <= hi for those that
        query i sees, its first query, and its first key among the rows of its pages.
    pages : (s, m) int32
    most : (s,) float64
        As in `few_queries.Limits`.
    scale : float
        As in `few_queries.Limits`.
    """

    rows: np.ndarray
    pages: np.ndarray
    most: np.ndarray
    scale: float


def forward(
    Q: np.ndarray, K: np.ndarray, V: np.ndarray, sequences: Sequences, request: Request, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """O (T, heads, d_v) in the dtype computed in, lse (T, heads) float64, and of which sequences, (s,) bool, these are
    right: not of those that have more queries than a few, nor where `few_queries.forward` returns None.

    Parameters
    ----------
    Q : (T, heads, d) array
        As it is stored: of two bytes an entry, it is float16 if NumPy says so, else bfloat16.
    K, V : (pages, page, key heads, d) and (pages, page, key heads, d_v) arrays
        Stored as Q is. What no query sees is not read.
    sequences : Sequences
    request : Request
        Its eps, and its method, "auto" or "exact".
    threads : int

    Raises
    ------
    MemoryError
        O does not fit.

    Notes
    -----
    Time: one read of the keys and values that are seen. Memory: O of every 512 keys of a sequence.
    """
    T, heads, d = Q.shape
    compute = np.dtype(np.float64 if Q.itemsize == 8 else np.float32)
    require(T * heads * V.shape[-1] * compute.itemsize, f"the result, of shape {(T, heads, V.shape[-1])},")
    n = np.diff(sequences.q_starts)
    first, last, lo, hi = _seen(n, sequences)
    seen = last - first
    most = np.full(len(n), math.inf)
    if request.method == "auto":
        # By the number of keys, of which there are often few different ones.
        found = {m: _most(compute, m, d, request.eps) for m in set(seen.tolist())}
        most = np.array([found[m] for m in seen.tolist()], np.float64)
    right = (n <= MOST_QUERIES) & (n * (heads // K.shape[2]) <= MOST_ROWS) & (most >= 0)
    taken = np.flatnonzero(right & (n > 0))
    rows = np.stack([n, seen, lo - first, hi - first, sequences.q_starts[:-1], sequences.k_starts + first], axis=1)
    packed = Packed(rows[taken], sequences.pages[taken], most[taken], sequences.scale * LOG2E)
    o, lse, right[taken] = _few.forward_packed(np.ascontiguousarray(Q), K, V, packed, True, threads)
    return o, lse, right


def _seen(n: np.ndarray, sequences: Sequences) -> tuple[np.ndarray, ...]:
    """Of each sequence the first key that a query sees and the one after the last, and lo and hi of j - i."""
    left, right = sequences.band
    offset, n_k = sequences.n_k - n, sequences.n_k
    lo = offset + max(-_FAR, -_FAR if left is None else left)
    hi = offset + min(_FAR, _FAR if right is None else right)
    first = np.clip(lo, 0, n_k)
    return first, np.clip(hi + n, first, n_k), lo, hi


def _most(compute: np.dtype, n_k: int, d: int, eps: float) -> float:
    """`few_queries.Limits.most`, below 0 where rounding of sums alone passes eps."""
    return -1.0 if eps < sums_rounding(compute, n_k) else LOG2E * most_of_norms(compute, n_k, d, eps)
