"""The polynomial engine for a bias or a scale that depends on the distance and factors at large distances."""

from __future__ import annotations

from dataclasses import replace

from ...approximation import minimax as poly
from ...problem.problem import Outline
from ..base import CHEAPEST, Candidate, Context, Engine, Refusal, Search
from ..polynomial.worst_case import WorstCase, certificate_of, certified, insisted, of_gradient
from .executable import NearFar
from .split import memory, rounding, split, work


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
        if WorstCase().lacks(outline) is None:
            # One polynomial serves all pairs, so the engine `WorstCase` does this problem.
            return Refusal(self.name)
        lacking = self.lacks(outline)
        if lacking:
            return self.unable(lacking)
        found, lacking = split(outline, poly.relative_error_for(request.eps) / 8, statistics)
        if found is None:
            return self.unable(lacking)
        own = rounding(found, outline, statistics)
        # Relative errors of a polynomial and of the sums of exponentials multiply.
        part = found.tail.error
        left = (poly.relative_error_for(max(request.eps - own, 1e-300)) - part) / (1 + part)
        polynomials, refusal = certified(context, own, poly.tau(left) + own if left > 0 else own)
        if polynomials is None:
            return Refusal(self.name, refusal)
        degree, error = max(1, polynomials[0].degree), max((1 + p.error) * (1 + part) - 1 for p in polynomials)
        certificate = certificate_of(outline, statistics.scores, statistics.values, degree, poly.tau(error))
        certificate = replace(certificate, rounding=own)
        gradient = of_gradient(outline, certificate, degree + 1, error) if request.grad else None
        executable = NearFar(certificate, gradient, found, statistics.scores, statistics.values, polynomials)
        size = memory(found, context.piece, degree, request.grad)
        reason = f"{insisted(context)}: {found}"
        candidate = Candidate(executable, work(found, outline, degree, request.grad), size, reason)
        if request.method == "auto" and not candidate.beats(search.exact):
            return Refusal(self.name, CHEAPEST, kind=None)
        return candidate
