"""The polynomial engine with a few long keys and queries taken out, because they raise the bound of all scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...certificate import BoundedEntryError
from ...certify.rounding import exact_rounding, rounding_of_slots
from ...certify.statistics import Statistics
from ...problem.problem import in_order
from ..base import Candidate, Context, gradient_of
from ..cost import Work
from ..polynomial.cost import norms_work, polynomial_work
from ..polynomial.moment_search import expected_degrees
from ..polynomial.worst_case import WorstCase
from .executable import BesideOutliers
from .split import Norms, Split, memory, work

_LOOK = 0.02  # what looking for outliers may cost, as a part of the best candidate's seconds
_OFFERS = 3  # how many ways to split are tried, the cheapest first
_ALONE = 4e-3  # seconds that planning a split takes, which a slot must be expected to save by it


@dataclass(slots=True)
class Outliers:
    """Offers to compute long keys and queries exactly and the rest by a polynomial.

    Parameters
    ----------
    plan : callable
        ``plan(context)`` is the planner's candidate for the rest, without a look at outliers.
    """

    plan: Callable[[Context], Candidate]

    def offer(self, context: Context, most: float) -> Candidate | None:
        """The candidate, if there is one that takes less than `most` seconds."""
        if context.statistics.scores.bound == math.inf or not _looks(context, most):
            return None
        norms = Norms(context.problem, context.statistics.scores)
        for counts, extra in _splits(context, norms, most)[: _OFFERS if most < math.inf else None]:
            found = self._beside(context, norms.split(*counts), extra, most)
            if found is not None:
                return found
        return None

    def _beside(self, context: Context, split: Split, extra: Work, most: float) -> Candidate | None:
        """The candidate for this split, if there is one cheaper than `most`; `extra` is the work of the exact parts."""
        request, statistics, rest_of = context.request, context.statistics, split.rest
        rounding = exact_rounding(context.outline, statistics.scores, statistics.values)
        statistics_of_rest = Statistics(rest_of)
        own = replace(context, outline=rest_of, piece=rest_of, statistics=statistics_of_rest, by_moments=None)
        try:
            rest = self.plan(own)
            certificate = rest.executable.certificate
            more = rounding - certificate.rounding
            if more > 0 and certificate.truncation + rounding > request.eps:
                rest = self.plan(own.asking(eps=request.eps - more))
                certificate = rest.executable.certificate
        except BoundedEntryError:
            return None
        if rest.engine != "polynomial":
            return None
        total = rest.work + extra
        rounding = max(certificate.rounding, rounding)
        if total.nominal >= most or certificate.truncation + rounding > request.eps:
            return None
        certificate = replace(certificate, rounding=rounding)
        gradient = None
        if request.grad:
            gradient = replace(rest.executable.gradient_certificate, rounding=gradient_of(certificate).rounding)
        plain = statistics.scores.plain_of_slots
        executable = BesideOutliers(certificate, gradient, statistics.values, split, rest.executable, plain)
        size = rest.bytes + memory(context.outline, split, request.grad)
        return Candidate(executable, total, size, f"{rest.reason}: {split}")


def worth_splitting(context: Context, most: Sequence[float]) -> list[bool]:
    """In which slots a split is expected to save so many of these seconds that the slot is worth a plan of its own.

    The seconds of a slot are what it would take otherwise if all slots were like it. What is found of a slot depends on
    no other slot.
    """
    found, H, outline = [False] * len(most), context.outline.sizes.H, context.outline
    bounds, least = context.statistics.scores.of_slots, polynomial_work(outline, 1, context.request.grad).nominal
    looks = {seconds: least < seconds - H * _ALONE and _looks(context, seconds) for seconds in set(most)}
    looked = [slot for slot in np.flatnonzero(bounds < math.inf).tolist() if looks[most[slot]]]
    if not looked:
        return found
    own = context.slots(in_order(np.array(looked)))
    scores, values = own.statistics.scores, own.statistics.values
    norms = Norms(own.problem, scores)
    B, square = norms.shortest()
    allowed = _part_of_eps(own) - rounding_of_slots(own.outline, scores, values, B)
    seconds = _seconds(context, np.array([B, square, allowed, values.share])).tolist()
    for place, slot in enumerate(looked):
        each = most[slot] / H - _ALONE
        if seconds[place] / H < each:
            which = slice(place, place + 1)
            found[slot] = bool(_splits(own.slots(which), norms.slots(which), each))
    return found


def _looks(context: Context, most: float) -> bool:
    """Whether to look for outliers, if what is at hand takes so many seconds."""
    if context.distributed or not context.request.takes("polynomial") or WorstCase().lacks(context.outline):
        return False
    # Where nothing else is left, a look is worth it.
    return most == math.inf or norms_work(context.outline).nominal <= _LOOK * most


def _splits(context: Context, norms: Norms, most: float) -> list[tuple[tuple[int, int], Work]]:
    """How many queries and keys of a slot to take out and what these cost, the cheapest way first, where it is expected
    to take less than `most` seconds.

    Degrees are expected, not certified. If no other engine has a candidate, every way is worth a try.
    """
    outline, request, statistics = context.outline, context.request, context.statistics
    found = list(norms.candidates())
    # If even the smallest bound and the smallest mean square together are too dear, no split is cheap enough.
    found.append((0, 0, min(B for *_, B, _ in found), min(square for *_, square in found)))
    bounds, squares = np.array([own[2:] for own in found]).T
    rounding = rounding_of_slots(outline, statistics.scores, statistics.values, bounds[:, None]).max(axis=1)
    share = np.full(len(found), statistics.values.share.max())
    seconds = _seconds(context, np.array([bounds, squares, _part_of_eps(context) - rounding, share])).tolist()
    if seconds.pop() >= most:
        return []
    offers = []
    for (n_rows, n_keys, *_), rest in zip(found, seconds, strict=False):
        extra = work(outline, n_rows, n_keys, request.grad)
        if (n_rows or n_keys) and (total := extra.nominal + rest) < most:
            offers.append((total, (n_rows, n_keys), extra))
    offers.sort(key=lambda offer: offer[:2])
    return [offer[1:] for offer in offers]


def _part_of_eps(context: Context) -> float:
    """The part of eps that is expected to suffice."""
    return context.request.eps / 4 if context.request.grad else context.request.eps


def _seconds(context: Context, sizes: np.ndarray) -> np.ndarray:
    """The seconds of the polynomials that are expected to suffice, inf where none is.

    `sizes`, (4, m), are the bounds of the scores, their mean squares, what is allowed, and how far values are from
    their middle.
    """
    request, (B, square, allowed, share) = context.request, sizes
    degrees = expected_degrees(B, None if request.each_weight else square, allowed, share)
    served = [g for g in set(degrees.tolist()) if g and g <= (request.degree or g)]
    works = {g: polynomial_work(context.outline, request.degree or g, request.grad).nominal for g in served}
    return np.array([works.get(g, math.inf) for g in degrees.tolist()])
