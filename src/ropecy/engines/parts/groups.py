"""Which slots of a problem are planned together, because polynomials of one degree serve all of them."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

import numpy as np

from ...problem.problem import Slots
from ..base import Context
from ..exact.cost import exact_work
from ..polynomial.cost import polynomial_work
from ..polynomial.moment_search import search
from ..polynomial.worst_case import WorstCase, left_by_rounding, of_each_slot, worth_measuring

# What planning one more group may cost, in seconds and as a part of the exact work of a slot.
_PLAN, _LOOK = 4e-4, 0.03
# Below so many pairs of rows and keys a slot is computed exactly, whatever its scores are.
_FEW_PAIRS = 2**14


def groups(context: Context) -> tuple[Context, list[Slots]]:
    """The context with what was found of moments, and the slots in groups, those of the lowest degrees first; one group
    where all are alike.

    The group of a slot depends on its own scores and values and on the shape of the call, never on other slots. In each
    group a slot has a polynomial for its own bound, rounded up.
    """
    outline, request = context.outline, context.request
    H, _, n, n_k, *_ = outline.sizes
    one = context, [slice(0, H)]
    if H < 2 or n * n_k < _FEW_PAIRS or outline.family is not None:
        return one
    if request.method == "exact" or request.degree is not None:
        return one
    exact = exact_work(outline, request.grad)
    if not worth_measuring(context, exact, any_slot=True):
        return one
    context = with_a_seed(context)
    limit = exact.nominal if request.method == "auto" else math.inf
    left = left_by_rounding(context)
    degrees = [0 if p is None else max(1, p.degree) for p in of_each_slot(context, left)]
    proof = request.certify == "proof" and request.takes("polynomial")
    if proof and WorstCase().lacks(outline) is None:
        context = replace(context, by_moments=tuple(search(context, degrees)))
    pays = {g for g in set(degrees) - {0} if polynomial_work(outline, g, request.grad).nominal < limit}
    of_slots = zip(degrees, left.tolist(), context.statistics.scores.of_slots.tolist(), strict=True)
    many, found = _LOOK * exact.nominal > H * _PLAN, {}
    for slot, (degree, allowed, B) in enumerate(of_slots):
        by_moments = context.by_moments and context.by_moments[slot]
        # Slots of one group have one fallback too.
        if by_moments:
            key = 0, *by_moments.key, degree
        elif degree in pays:
            key = 0, degree, 0, 0, -allowed, degree
        else:
            # Where no degree serves, a split of outliers may. Each slot is planned alone if that costs little beside
            # its exact work, and otherwise all are planned together.
            key = 1, slot if many and B < math.inf else 0, 0, 0, 0, 0
        found.setdefault(key, []).append(slot)
    return context, [in_order(np.array(slots)) for _, slots in sorted(found.items())]


def with_a_seed(context: Context) -> Context:
    """The context with a seed, one for all parts, so that what was drawn can be drawn again."""
    return context if context.request.seed is not None else context.asking(seed=secrets.randbits(62))


def in_order(slots: np.ndarray) -> Slots:
    """Ascending indices; a slice where they follow one another."""
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if last - first + 1 == len(slots) else slots
