"""The polynomial engine with a few long keys and queries taken out, because they raise the bound of all scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ...certificate import BoundedEntryError
from ...certify.rounding import exact_rounding, polynomial_rounding
from ...certify.statistics import Statistics
from ..base import Candidate, Context, Engine, Refusal, Search, gradient_of
from ..cost import Work
from ..polynomial.cost import norms_work, polynomial_work
from ..polynomial.moment_search import expected_degrees
from ..polynomial.worst_case import SUPPORTS
from .executable import BesideOutliers
from .split import Norms, Split, memory, work

_LOOK = 0.02  # what looking for outliers may cost, as a part of the best candidate's seconds
_OFFERS = 3  # how many ways to split are tried, the cheapest first


@dataclass(slots=True)
class Outliers(Engine):
    """Offers to compute long keys and queries exactly and the rest by a polynomial.

    Parameters
    ----------
    plan : callable
        ``plan(context)`` is the planner's candidate for the rest, without a look at outliers.
    """

    plan: Callable[[Context], Candidate]

    name: ClassVar[str] = "polynomial"
    SUPPORTS: ClassVar[frozenset[str]] = SUPPORTS

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        if context.distributed or self.lacks(context.outline):
            return Refusal(self.name)
        most = math.inf if search.best is None else search.best.nominal
        outline, scores = context.outline, context.statistics.scores
        # Where nothing else is left, a look is worth it.
        if scores.bound == math.inf or (most < math.inf and norms_work(outline).nominal > _LOOK * most):
            return Refusal(self.name)
        norms = Norms(context.problem, scores)
        for counts, extra in self._splits(context, norms, most):
            found = self._beside(context, norms.split(*counts), extra, most)
            if found is not None:
                return found
        return Refusal(self.name)

    def _splits(self, context: Context, norms: Norms, most: float) -> list[tuple[tuple[int, int], Work]]:
        """How many queries and keys of a slot to take out and what these cost, the cheapest way first."""
        outline, request, offers, statistics = context.outline, context.request, [], context.statistics
        share = statistics.values.share.max(keepdims=True)

        def allowed(B: float) -> np.ndarray:
            """What rounding leaves of the part of eps that is expected to suffice."""
            eps = request.eps / 4 if request.grad else request.eps
            rounding = polynomial_rounding(outline, B, statistics.values, statistics.scores.lost)
            return np.array([eps - rounding])

        def cost(B: float, square: float) -> float:
            """The seconds of the polynomial that is expected to suffice for scores within B and of this mean square."""
            own = None if request.each_weight else np.array([square])
            g = int(expected_degrees(np.array([B]), own, allowed(B), share)[0])
            if not g or g > (request.degree or g):
                return math.inf
            return polynomial_work(outline, request.degree or g, request.grad).nominal

        found = list(norms.candidates())
        # If even the smallest bound and the smallest mean square together are too dear, no split is cheap enough.
        if cost(min(B for *_, B, _ in found), min(square for *_, square in found)) >= most:
            return []
        for n_rows, n_keys, B, square in found:
            extra = work(outline, n_rows, n_keys, request.grad)
            if (n_rows or n_keys) and extra.nominal < most and (total := extra.nominal + cost(B, square)) < most:
                offers.append((total, (n_rows, n_keys), extra))
        # Degrees are expected, not certified. If no other engine has a candidate, every offer is worth a try.
        offers.sort(key=lambda offer: offer[:2])
        return [offer[1:] for offer in offers[: _OFFERS if most < math.inf else None]]

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
        executable = BesideOutliers(
            certificate,
            gradient,
            statistics.values,
            split,
            rest.executable,
            statistics.scores.plain,
        )
        size = rest.bytes + memory(context.outline, split, request.grad)
        return Candidate(executable, total, size, f"{rest.reason}: {split}")
