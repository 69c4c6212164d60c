"""The polynomial engine by moments of the scores: a degree is chosen by estimates from a sample of rows.

Rows are certified after they are computed (`certify.moments`). Those that fail are computed exactly, and if more fail
in a slot than was planned, another executable runs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...certify.fourth_moments import FAILURE
from ...certify.moments import MomentRule
from ..base import Candidate, Context, Engine, Executable, Refusal, Search
from ..cost import Work
from ..exact.cost import exact_work
from ..exact.engine import Exact
from . import features
from .cost import sample_work
from .executables import ByMoments
from .features import Expansion
from .moment_search import Slot, search
from .worst_case import SUPPORTS, certificate_of, insisted, of_gradient


class Moments(Engine):
    """Offers the cheapest degree below that of the worst case that moments are expected to certify."""

    name = "polynomial"
    SUPPORTS = SUPPORTS

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        if self.lacks(context.outline) or context.request.each_weight:
            return Refusal(self.name)
        worst = search.of_rule("worst case")
        slots = _of_one_kind(context, worst)
        outline, request = context.outline, context.request
        look = sample_work(outline, request.grad) if "sample" in vars(context.statistics) else Work()
        if slots is None:
            return Refusal(self.name, looked=look if request.method == "polynomial" else Work())
        executable = _executable(context, slots, self._fallback(context, worst))
        # method="auto" looks only where that costs next to nothing.
        works = [slot.work(context) for slot in slots]
        work = sum(works, Work()).times(1 / len(works)) + (look if request.method == "polynomial" else Work())
        degree = executable.certificate.degree
        backward = executable.gradient_certificate.degree if request.grad else None
        size = features.memory(context.piece, degree, request.grad, backward)
        reason, long = insisted(context), sum(slot.n_long for slot in slots)
        if long:
            reason += f": {long:,} long queries exactly"
        return Candidate(executable, work, size, reason)

    @staticmethod
    def _fallback(context: Context, worst: Candidate | None) -> Executable | None:
        """What runs if too many rows fail."""
        request, grad = context.request, context.request.grad
        if worst is not None and worst.fits:
            cheaper = worst.nominal < exact_work(context.outline, grad).nominal
            if request.method == "polynomial" or cheaper:
                return worst.executable
        return Exact(context.outline, context.statistics, grad) if request.method == "auto" else None


def _of_one_kind(context: Context, worst: Candidate | None) -> list[Slot] | None:
    """What moments are expected to certify in each slot, by polynomials of one degree; None if they are not in all."""
    if context.by_moments is not None:
        return None if None in context.by_moments else list(context.by_moments)
    degrees = [0 if worst is None else worst.executable.certificate.degree] * context.outline.sizes.H
    found, least = search(context, degrees), 2
    while None not in found and len({slot.key[:2] for slot in found}) > 1:
        # All are to have the degree that the worst of them needs.
        least = max(max(slot.p.degree for slot in found), least + 1)
        found = search(context, degrees, least)
    return None if None in found else found


def _executable(context: Context, slots: list[Slot], fallback: Executable | None) -> ByMoments:
    """Runs these polynomials, one for each slot."""
    outline, statistics, request = context.outline, context.statistics, context.request
    B, kappa, allowed, n_exact_rows = (
        np.array([getattr(slot, name) for slot in slots]) for name in ("B", "kappa", "allowed", "n_exact_rows")
    )
    scores, values = statistics.scores.within(B), statistics.values
    fourth = statistics.fourth(request.seed, kappa > 0) if kappa.any() else None
    p, r = tuple(slot.p for slot in slots), tuple(slot.r for slot in slots) if request.grad else None
    rule = MomentRule(p, kappa, scores, fourth, sum(slot.n_long for slot in slots), r, statistics.sample.every)
    degree, truncation = max(1, rule.degree), max(slot.truncation for slot in slots)
    certificate = certificate_of(outline, scores, values, degree, truncation, "moments")
    if fourth is not None:
        certificate = replace(certificate, seed=fourth.seed, failure=FAILURE * outline.share)
    gradient = None
    if request.grad:
        most = max(slot.of_gradient for slot in slots)
        gradient = of_gradient(outline, certificate, r[0].degree + 1, most)
    expansion = Expansion.of_slots(scores, values, p, r)
    return ByMoments(certificate, gradient, expansion, scores.plain_of_slots, rule, allowed, n_exact_rows, fallback)
