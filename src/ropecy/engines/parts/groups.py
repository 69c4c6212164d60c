"""Which slots of a problem are planned together, because polynomials of one degree serve all of them."""

from __future__ import annotations

import math

import numpy as np

from ...problem.problem import Slots
from ..base import Context
from ..exact.cost import exact_work
from ..polynomial.cost import polynomial_work
from ..polynomial.worst_case import left_by_rounding, of_each_slot, worth_measuring

# What planning one more group may cost, in seconds and as a part of the exact work of a slot.
_PLAN, _LOOK = 4e-4, 0.03
# Below so many pairs of rows and keys a slot is computed exactly, whatever its scores are.
_FEW_PAIRS = 2**14


def groups(context: Context) -> list[Slots]:
    """The slots in groups, those with the smallest scores first; one group where all are alike.

    The group of a slot depends on its own scores and values and on the shape of the call, never on other slots. In each
    group a slot has a polynomial for its own bound, rounded up.
    """
    outline, request = context.outline, context.request
    H, _, n, n_k, *_ = outline.sizes
    one = [slice(0, H)]
    if H < 2 or n * n_k < _FEW_PAIRS or outline.family is not None:
        return one
    if request.method == "exact" or request.degree is not None:
        return one
    exact = exact_work(outline, request.grad)
    if not worth_measuring(context, exact, any_slot=True):
        return one
    limit = exact.nominal if request.method == "auto" else math.inf
    many = _LOOK * exact.nominal > H * _PLAN
    found: dict[tuple[int, float, float], list[int]] = {}
    for slot, key in enumerate(_keys(context, limit, many)):
        found.setdefault(key, []).append(slot)
    return [in_order(np.array(slots)) for _, slots in sorted(found.items())]


def _keys(context: Context, limit: float, many: bool) -> list[tuple[int, float, float]]:
    """What slots of one group share: (0, a degree that serves them for less than `limit` seconds, what rounding leaves of
    eps), or (1, the size of their scores, 0).

    Where no degree serves, slots are told apart by the power of two that their scores are within, if `many` are to be
    told apart: moments, or a split of outliers, may serve some of them.
    """
    outline, scores, grad = context.outline, context.statistics.scores, context.request.grad
    left = left_by_rounding(context)
    polynomials = of_each_slot(scores, left)
    degrees = {max(1, p.degree) for p in polynomials if p is not None}
    pays = {degree for degree in degrees if polynomial_work(outline, degree, grad).nominal < limit}

    def key(slot: int) -> tuple[int, float, float]:
        p, B = polynomials[slot], float(scores.of_slots[slot])
        degree = 0 if p is None else max(1, p.degree)
        if degree in pays:
            return 0, float(degree), float(left[slot])
        return 1, float(math.frexp(B)[1]) if many and B < math.inf else 0.0, 0.0

    return [key(slot) for slot in range(outline.sizes.H)]


def in_order(slots: np.ndarray) -> Slots:
    """Ascending indices; a slice where they follow one another."""
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if last - first + 1 == len(slots) else slots
