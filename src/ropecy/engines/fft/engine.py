"""The fft engine: a bias, a mask or a family of any form, as long as the scores are bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ...approximation import minimax as poly
from ...approximation.minimax import Polynomial
from ...certificate import Certificate
from ...certify.family_scores import largest_entries
from ...certify.rounding import exact_rounding, moved
from ...certify.scores import Scores
from ...certify.values import Values
from ...problem.input_gradients import InputGradients
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Problem
from ..base import CHEAPEST, Candidate, Context, Engine, Executable, Refusal, Result, Search
from ..cost import Work, operations_work
from ..exact.cost import exact_work
from ..polynomial.worst_case import certificate_of, certified, cure, of_gradient, where
from . import attention
from .cost import memory, operations
from .symbol import Symbol, survey

# Seconds of a call beside its transforms.
_CALL = 4e-4
# Seconds of exact work, as costs know them, below which auto does not ask what transforms would cost.
_WORTH_ASKING = 0.02
_DAY = 86400.0
_UNIT = 2.0**-53


@dataclass(slots=True)
class FFT(Executable):
    """Monomials between which T is applied by transforms."""

    certificate: Certificate
    gradient_certificate: Certificate | None
    scores: Scores
    values: Values
    polynomial: Polynomial
    symbol: Symbol

    engine = "fft"

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        o, lse, saved = attention.forward(problem, self.scores, self.polynomial, self.symbol, want_lse)
        return Result(o, lse, self, saved)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        return attention.backward(problem, result.saved, do)


class FFTEngine(Engine):
    """The smallest degree (or the one that was asked for) that is proved for all scores within their bound."""

    name = "fft"
    SUPPORTS = frozenset({"bias", "family", "window", "causal", "key_mask"})

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        insisted = context.request.method == "fft"
        lacking = "a sequence in pieces" if context.distributed else self.lacks(context.outline)
        if lacking:
            return self.unable(lacking)
        worth = search.exact.nominal > context.outline.share * _WORTH_ASKING
        if not insisted and (not worth or any(c.engine == "polynomial" for c in search.candidates)):
            return Refusal(self.name)
        base = base_rounding(context)
        # Transforms have an eighth of eps; rows to which they do more are computed exactly.
        share = context.request.eps / 8
        p, refusal = _certified(context, base + share)
        if p is None:
            return Refusal(self.name, refusal)
        work = _work(context, p)
        if work.nominal > _DAY:
            return Refusal(self.name, self._too_long(context, p, work))
        size = memory(context.outline, max(1, p.degree), context.request.grad)
        exact = search.exact
        if not insisted and not Candidate(exact.executable, work, size, "").beats(exact):
            return Refusal(self.name)
        symbol, of_exact = survey(context.problem, p, share), 0.0
        if symbol.exact_rows:
            # They round as exact work does.
            statistics = context.statistics
            of_exact = exact_rounding(context.outline, statistics.scores, statistics.values)
            if poly.tau(p.error) + of_exact > context.request.eps:
                p, refusal = _certified(context, max(base + share, of_exact))
                if p is None:
                    return Refusal(self.name, refusal)
                work, symbol = _work(context, p), survey(context.problem, p, share)
        return self._candidate(context, p, symbol, max(base + symbol.rounding, of_exact), work)

    def _candidate(
        self, context: Context, p: Polynomial, symbol: Symbol, rounding: float, work: Work
    ) -> Candidate | Refusal:
        """Of this polynomial, where not too many rows are exact."""
        outline, request, statistics = context.outline, context.request, context.statistics
        degree, n = max(1, p.degree), outline.sizes.n
        rows = sum(last - first for first, last in symbol.exact_rows)
        if rows > n / 2:
            return Refusal(self.name, self._too_many(context, rows, degree))
        certificate = certificate_of(outline, statistics.scores, statistics.values, degree, poly.tau(p.error))
        certificate = replace(certificate, engine="fft", rounding=rounding)
        gradient = of_gradient(outline, certificate, degree + 1, p.error) if request.grad else None
        executable = FFT(certificate, gradient, statistics.scores, statistics.values, p, symbol)
        work = work.times((1 + symbol.unseen) / 2) + exact_work(outline, request.grad).times(rows / n)
        size = memory(outline, degree, request.grad)
        return Candidate(executable, work, size, "method='fft'" if request.method == "fft" else CHEAPEST)

    @staticmethod
    def _too_long(context: Context, p: Polynomial, work: Work) -> str:
        outline, scores, degree = context.outline, context.statistics.scores, max(1, p.degree)
        features = poly.n_features(outline.terms, degree)
        return (
            f"{where(scores)}: degree {degree} certifies eps = {context.request.eps:g}, and transforms of its "
            f"{features:,} features take {work.nominal:.1e} s; {cure(outline, scores)}"
        )

    @staticmethod
    def _too_many(context: Context, rows: int, degree: int) -> str:
        outline = context.outline
        given = [name for name in ("bias", "family") if getattr(outline, name) is not None]
        what = [f"B = {context.statistics.scores.bound:.4g}", f"degree {degree}", *(f"a {name}" for name in given)]
        return (
            f"rounding of transforms passes an eighth of eps = {context.request.eps:.3g} in {rows:,} of "
            f"{outline.sizes.n:,} rows ({', '.join(what)}); method='exact' has no bound"
        )


def _certified(context: Context, rounding: float) -> tuple[Polynomial | None, str | None]:
    """The polynomial for the largest scores of all slots, or why there is none."""
    found, refusal = certified(context, rounding)
    return found and max(found, key=lambda p: p.B), refusal


def base_rounding(context: Context) -> float:
    """Rounding beside that of the transforms: monomials that cancel, in float64, storing O in its dtype, and what
    scores carry of projections and rotations.
    """
    outline, scores = context.outline, context.statistics.scores
    stored = float(np.finfo(outline.dtype).eps) * (1 + context.statistics.values.offset)
    # What is added up in a family's scores may pass the scores themselves.
    largest = scores.bound if outline.family is None else abs(outline.scale) * largest_entries(context.problem)
    return stored + moved(outline, scores.lost) + _UNIT * (12 + 4 * math.exp(min(scores.bound + largest, 700)))


def _work(context: Context, p: Polynomial) -> Work:
    """Of transforms, but for exact rows."""
    outline = context.outline
    count = operations(outline, max(1, p.degree), context.request.grad)
    return Work(outline.share * _CALL) + operations_work(outline, count)
