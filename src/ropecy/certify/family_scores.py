"""Bounds of scores ``scale q_i W_{i-j} k_j^T``, with a matrix for each offset."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..problem.family import Family
from ..problem.problem import Problem
from .scores import Scores, balancing_factors, unbounded

# How many offsets, or rows, are looked at together, and how wide a block of a family may be to have its powers taken.
_OFFSETS = 1024
_WIDE = 32


def measure_family(problem: Problem) -> Scores:
    """The smaller of ``max_t max|q|^T |W_t| max|k|``, entry by entry, and ``max ||q_i|| max_t ||W_t||_2 max ||k_j||``,
    with ``|W_t|`` in the place of W_t for `plain`. Nothing is centred: q_i W_t c is not the same for all keys.

    Notes
    -----
    Time O(n d + M |S|), and as much for each column that a block of the support has (`_norms`).
    """
    family, scale = problem.family, abs(problem.scale)
    first, last = problem.mask.distances
    with np.errstate(all="ignore"):
        # Rows that are hidden are 0.
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
        products = float(plain.max()) * room
        plain = products * scale
    if not math.isfinite(plain):
        return unbounded(problem, math.inf)
    factors = balancing_factors(problem.scale * (largest or 1.0), q_norm, k_norm, np.dtype(np.float64))
    # What is lost of a row may be anywhere in it, whatever the size of its entries.
    lost = (problem.origin.q_lost + problem.origin.k_lost) * float(by_norm.max()) * room
    how = "by the norms of its matrices"
    return Scores(plain, float(of_slots.max()), None, *factors, of_slots, how=how, products=products, lost=lost)


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
    """The largest of each entry, (H, d), and of the norms of rows, (H,), float64; a block of rows at a time."""
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
    """Upper bound of ``max_t ||W_t||_2``, of float64 values (m, |S|).

    The largest of that of the blocks into which the support falls. Of a block X, with A = X^T X, it is
    ``||A^4||_inf^(1/8)``, which for orthogonal matrices is their norm, or ``sqrt(||X||_1 ||X||_inf)`` where X is wide.
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
    """Row and column, counted from 0 in each block, and index of the pairs that hang together by rows and columns."""
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
