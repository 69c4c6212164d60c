"""Which slots of a problem are to be planned together, because about the same polynomial suffices for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ...approximation.minimax import MAX_DEGREE, B_grid
from ...problem.problem import Slots
from ..base import Context
from ..exact.cost import exact_work
from ..polynomial.by_moments import expected_degree
from ..polynomial.cost import polynomial_work
from ..polynomial.worst_case import WorstCase, worth_measuring

_PLAN = 4e-4  # seconds that planning and calling one more group takes
_PART = 4  # slots are told apart where this pays if the groups differ in every so many of them
_LOOK = 0.03  # what planning one more group may cost, as a part of its exact work
# Bounds that differ by less than this factor are no reason to tell slots apart: what a look at the bound alone expects
# is not what is planned in the end, by moments.
_ALIKE = 1.1
# Below so many pairs of rows and keys a slot is computed exactly, whatever its scores are.
_FEW_PAIRS = 2**14


def groups(context: Context) -> list[Slots]:
    """The slots in groups, those with the smallest scores first; one group if it does not pay to tell them apart.

    The group of a slot depends on the bound of its own scores and on the shape of the call; only a slot whose bound is
    nearly that of the next group joins it, if there is one. By the worst case each slot of a group has a polynomial for
    its own bound, rounded up: its bits depend on the others by the degree, and by the largest bound of the group where
    its own rounds up to that. By moments, and by a sample, the bound up to which rows are kept, how many rows may be
    exact, and which rows are drawn are those of all slots of a group.
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
    bounds = context.statistics.scores.of_slots
    if bounds.max() <= _ALIKE * bounds.min():
        return one
    limit = exact.nominal if request.method == "auto" else math.inf
    keys = _keys(context, limit, _LOOK * exact.nominal > _PART * _PLAN)
    return [in_order(np.sort(slots)) for _, slots in sorted(keys.items())]


def _keys(context: Context, limit: float, many: bool) -> dict[tuple[int, float], list[int]]:
    """The slots by (0, a degree that serves them for less than `limit` seconds), or by (1, the size of their scores).

    Where no degree serves, slots are told apart by the power of two that their scores are within, if `many` are to be
    told apart: moments, or a split of outliers, may serve some of them.
    """
    bounds = context.statistics.scores.of_slots
    degrees = {B: _degree(context, B) for B in {_rounded(B) for at in bounds.tolist() for B in (at, _ALIKE * at)}}
    needed = {degree for degree in degrees.values() if degree is not None}
    steps = list(_steps(context, limit)) if len(needed) > 1 else list(needed)

    def key(B: float) -> tuple[int, float]:
        degree = degrees[_rounded(B)]
        step = None if degree is None else next((step for step in steps if step >= degree), None)
        if step is not None:
            return 0, float(step)
        return 1, float(math.frexp(B)[1]) if many and B < math.inf else 0.0

    found: dict[tuple[int, float], list[int]] = {}
    for slot in np.argsort(-bounds, kind="stable").tolist():
        own, above = (key(float(factor * bounds[slot])) for factor in (1, _ALIKE))
        joined = min((other for other in found if own <= other <= above), default=own)
        found.setdefault(joined, []).append(slot)
    return found


def _rounded(B: float) -> float:
    return B_grid(B) if B < math.inf else B


def _degree(context: Context, B: float) -> int | None:
    """About the degree that serves scores within B, as a look at the bound alone tells; None if none does."""
    request, outline = context.request, context.outline
    moments = WorstCase().lacks(outline) is None and not request.each_weight
    # This is the mean square of the scores if queries and keys have no preferred direction.
    square = B**2 / outline.sizes.d if moments and B < math.inf else None
    return expected_degree(context, B, square, request.eps / 4 if request.grad else request.eps)


def _steps(context: Context, limit: float) -> Iterator[int]:
    """Degrees, ascending, so far apart that it pays to compute slots of one apart from slots of the next."""
    outline, grad = context.outline, context.request.grad
    seconds = []
    for degree in range(1, MAX_DEGREE + 1):
        seconds.append(polynomial_work(outline, degree, grad).nominal)
        if seconds[-1] >= limit:
            break
    found, price = [], math.inf
    for degree, own in reversed(list(enumerate(seconds, start=1))):
        if own < limit and (not found or own + _PART * _PLAN <= price):
            found.append(degree)
            price = own
    return reversed(found)


def in_order(slots: np.ndarray) -> Slots:
    """Ascending indices; a slice where they follow one another."""
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if last - first + 1 == len(slots) else slots
