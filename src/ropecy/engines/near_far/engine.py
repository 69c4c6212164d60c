"""The polynomial engine for a bias or a scale that depends on the distance and factors at large distances."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ...approximation import minimax as poly
from ...certify.rounding import largest, of_slots
from ...problem.problem import Outline
from ..base import CHEAPEST, Alike, Candidate, Context, Engine, Refusal, Search
from ..polynomial.worst_case import WorstCase, certificate_of, certified, insisted, left_by, of_each_slot, of_gradient
from .executable import NearFar
from .split import Split, faded, memory, rounding, split, work


class NearFarEngine(Engine):
    """An exact near field, and far parts by a polynomial that is proved for all scores within their bound."""

    name = "polynomial"
    SUPPORTS = frozenset({"bias", "near", "causal", "key_mask"})

    def lacks(self, outline: Outline) -> str | None:
        lacking = super().lacks(outline)
        if lacking is None and outline.bias is not None and outline.tail is None:
            return "a bias that does not factor"
        return lacking

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        outline, request, statistics = context.outline, context.request, context.statistics
        scores, values = statistics.scores, statistics.values
        if WorstCase().lacks(outline) is None:
            # One polynomial serves all pairs, so the engine `WorstCase` does this problem.
            return Refusal(self.name)
        lacking = self.lacks(outline)
        if lacking:
            return self.unable(lacking)
        found, lacking = _split(context)
        if found is None:
            return self.unable(lacking)
        if faded(found, outline, statistics).any():
            return self.unable("keys that are hidden for so long that a decayed state fades away")
        polynomials, refusal = certified(context, _allowed(context, found))
        if polynomials is None:
            return Refusal(self.name, refusal)
        part = found.tail.error
        degree, error = max(1, polynomials[0].degree), max((1 + p.error) * (1 + part) - 1 for p in polynomials)
        certificate = certificate_of(outline, scores, values, degree, poly.tau(error))
        own = float(np.max(rounding(found, outline, largest(outline, scores, values))))
        certificate = replace(certificate, rounding=own)
        gradient = of_gradient(outline, certificate, degree + 1, error) if request.grad else None
        executable = NearFar(certificate, gradient, found, scores, values, polynomials)
        size = memory(found, context.piece, degree, request.grad)
        reason = f"{insisted(context)}: {found}"
        candidate = Candidate(executable, work(found, outline, degree, request.grad), size, reason)
        if request.method == "auto" and not candidate.beats(search.exact):
            return Refusal(self.name, CHEAPEST, kind=None)
        return candidate

    def alike(self, context: Context, most: float) -> list[Alike | None]:
        outline, request = context.outline, context.request
        found = None
        if WorstCase().lacks(outline) is not None and self.lacks(outline) is None:
            found, _ = _split(context)
        if found is None:
            return super().alike(context, most)
        allowed = _allowed(context, found)
        allowed[faded(found, outline, context.statistics)] = 0.0
        degrees = [0 if p is None else p.degree for p in of_each_slot(context, allowed)]
        seconds = {g: work(found, outline, g, request.grad).nominal if g else math.inf for g in set(degrees)}
        each = zip(degrees, allowed.tolist(), strict=True)
        return [Alike((g, -left), seconds[g]) if seconds[g] < most else None for g, left in each]


def _split(context: Context) -> tuple[Split | None, str | None]:
    return split(context.outline, poly.relative_error_for(context.request.eps) / 8)


def _allowed(context: Context, found: Split) -> np.ndarray:
    """What rounding and the sums of exponentials leave of eps for the truncation of each slot's polynomial, (H,)."""
    outline, statistics, part = context.outline, context.statistics, found.tail.error
    left = left_by(context, rounding(found, outline, of_slots(outline, statistics.scores, statistics.values)))
    for slot in np.flatnonzero(left > 0).tolist():
        # Relative errors of a polynomial and of the sums of exponentials multiply.
        error = (poly.relative_error_for(float(left[slot])) - part) / (1 + part)
        left[slot] = poly.tau(error) if error > 0 else 0.0
    return left
