"""Bounds of the scores ``scale q_i W_{i-j} k_j^T`` of a family, which has a matrix W_t for each offset t = i - j."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..problem.family import Family
from ..problem.problem import Problem
from .scores import Scores, balancing_factors, unbounded

_OFFSETS = 1024  # how many offsets, or rows of q or k, are read at a time, so that little memory is used
_WIDE = 32  # the widest block of a family whose spectral norm is bounded by powers of X^T X


def measure_family(problem: Problem) -> Scores:
    """Bounds of the scores of a family, slot by slot.

    Each is the smaller of two: ``max_t max|q|^T |W_t| max|k|``, where max|q| and max|k| are taken entry by entry, and
    ``max ||q_i|| max_t ||W_t||_2 max ||k_j||``. `Scores.plain` has ``|W_t|`` in the place of W_t. Keys are not centred,
    since q_i W_t c depends on the offset t and so is not the same for all keys of a row.

    Notes
    -----
    Time O(n d + M |S|) for M offsets and a support of |S| entries; the second term is multiplied by the number of
    columns of a block of the support (`_norms`).
    """
    family, scale = problem.family, abs(problem.scale)
    first, last = problem.mask.distances
    with np.errstate(all="ignore"):
        # Keys that key_mask hides have been set to 0, so they do not count here.
        q_top, q_norm = _sizes(problem.q)
        k_top, k_norm = _sizes(problem.k)
        ends = q_top[:, family.left] * k_top[:, family.right]
        norms = q_norm * k_norm
        index = family.rows(first, last)
        largest, plain, bound, by_norm = 0.0, *np.zeros((3, len(norms)))
        for start in range(index[0], index[-1] + 1, _OFFSETS):
            values = family.values[start : min(start + _OFFSETS, index[-1] + 1)].astype(np.float64)
            size = np.abs(values)
            largest = max(largest, float(size.max()))
            by_entry = (ends @ size.T).max(axis=1)
            by_norm = np.maximum(by_norm, norms * _norms(size, family))
            plain = np.maximum(plain, np.minimum(by_entry, by_norm))
            bound = np.maximum(bound, np.minimum(by_entry, norms * _norms(values, family)))
        room = 1 + (8 * problem.sizes.d + len(family.left) + 64) * 2.0**-52
        of_slots = np.minimum(plain, bound) * scale * room
        each = plain * room
        products = float(each.max())
        plain = products * scale
    if not math.isfinite(plain):
        return unbounded(problem, math.inf)
    factors = balancing_factors(problem.scale * (largest or 1.0), q_norm, k_norm, np.dtype(np.float64))
    # The rounding error of a row of q or k is bounded in norm only: it may sit in any entry, so norms multiply it.
    lost = (problem.origin.q_lost + problem.origin.k_lost) * float(by_norm.max()) * room
    how = "by the norms of its matrices"
    more = {"how": how, "products": products, "products_of_slots": each, "lost_of_slots": lost}
    return Scores(plain, float(of_slots.max()), None, *factors, of_slots, **more)


def largest_entries(problem: Problem) -> float:
    """The sum over the family's support of max |q_a| max_t |W_t[a, b]| max |k_b|, for the worst slot."""
    family = problem.family
    index = family.rows(*problem.mask.distances)
    values = family.values[index[0] : index[-1] + 1]
    with np.errstate(over="ignore"):
        W = np.maximum(values.max(axis=0), -values.min(axis=0)).astype(np.float64)
        q_top, k_top = _sizes(problem.q)[0], _sizes(problem.k)[0]
        return float((q_top[:, family.left] * W * k_top[:, family.right]).sum(axis=1).max())


def _sizes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest absolute value in each column, (H, d), and the largest norm of a row, (H,), both in float64."""
    H, d = rows.shape[0], rows.shape[-1]
    rows = rows.reshape(H, -1, d)
    top, norm = np.zeros((H, d)), np.zeros(H)
    for start in range(0, rows.shape[1], _OFFSETS):
        part = np.abs(rows[:, start : start + _OFFSETS].astype(np.float64))
        peak = part.max(axis=(1, 2), initial=np.finfo(np.float64).tiny)
        top = np.maximum(top, part.max(axis=1))
        part /= peak[:, None, None]
        norm = np.maximum(norm, peak * np.sqrt(np.einsum("hid,hid->hi", part, part).max(axis=1)))
    return top, norm


def _norms(values: np.ndarray, family: Family) -> float:
    """An upper bound of ``max_t ||W_t||_2`` for m matrices with the entries `values`, (m, |S|) float64.

    The norm of W_t is the largest norm of the blocks into which its support falls. The norm of a block X is bounded by
    ``sqrt(||X||_1 ||X||_inf)`` and, where X is not wider than `_WIDE`, also by ``||A^4||_inf^(1/8)`` with A = X^T X,
    which is exact where X is orthogonal.
    """
    found = 0.0
    for rows, columns, entries in _blocks(family):
        block = np.zeros((len(values), rows.max() + 1, columns.max() + 1))
        block[:, rows, columns] = values[:, entries]
        peak = np.abs(block).max(axis=(1, 2))
        size = np.abs(block)
        either = np.sqrt(size.sum(axis=1).max(axis=1)) * np.sqrt(size.sum(axis=2).max(axis=1))
        if max(block.shape[1:]) <= _WIDE:
            block /= np.maximum(peak, np.finfo(np.float64).tiny)[:, None, None]
            A = block.swapaxes(1, 2) @ block
            A = A @ A
            A = A @ A
            either = np.minimum(either, peak * np.abs(A).sum(axis=2).max(axis=1) ** 0.125)
        found = max(found, float(either.max(initial=0)))
    return found


def _blocks(family: Family) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The blocks of a family's support; entries that share a row or a column are in one block.

    Yields (row, column, entry) of each block, index arrays of equal length: rows and columns are numbered from 0 within
    the block, `entry` is the index into the support.
    """
    block = np.arange(len(family.left))
    while True:
        least = block.copy()
        for ends in (family.left, family.right):
            of_end = np.full(ends.max() + 1, len(block))
            np.minimum.at(of_end, ends, least)
            least = of_end[ends]
        if np.array_equal(least, block):
            break
        block = least
    for name in np.unique(block):
        entries = np.flatnonzero(block == name)
        rows, columns = (np.unique(ends[entries], return_inverse=True)[1] for ends in (family.left, family.right))
        yield rows, columns, entries
