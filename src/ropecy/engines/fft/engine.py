"""The fft engine: a bias, a mask or a family of any form, as long as the scores are bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...approximation import minimax as poly
from ...approximation.minimax import Polynomial
from ...certificate import Certificate
from ...certify.family_scores import largest_entries
from ...certify.rounding import Magnitudes, largest, moved, of_slots, rounding_of_pairs
from ...certify.scores import Scores
from ...certify.values import Values
from ...problem.input_gradients import InputGradients
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Problem
from ..base import CHEAPEST, Alike, Candidate, Context, Engine, Executable, Refusal, Result, Search, row_by_row
from ..cost import Work, operations_work
from ..exact.cost import exact_work
from ..polynomial.worst_case import certificate_of, certified, cure, left_by, of_each_slot, of_gradient, where
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
    """Monomials between which T is applied by transforms.

    Attributes
    ----------
    polynomials : tuple of Polynomial
        The polynomial of each slot.
    """

    certificate: Certificate
    gradient_certificate: Certificate | None
    scores: Scores
    values: Values
    polynomials: tuple[Polynomial, ...]
    symbol: Symbol

    engine = "fft"

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        o, lse, saved = attention.forward(problem, self.scores, self.polynomials, self.symbol, want_lse)
        errors = [p.error for p in self.polynomials]
        found = row_by_row(self.certificate, [poly.tau(e) for e in errors], o.shape[:3])
        gradient = self.gradient_certificate and row_by_row(self.gradient_certificate, errors, o.shape[:3])
        return Result(o, lse, self, saved, found, gradient)

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
        found, refusal = _certified(context)
        if found is None:
            return Refusal(self.name, refusal)
        degree = max(1, found[0].degree)
        work = _work(context, degree)
        if work.nominal > _DAY:
            return Refusal(self.name, self._too_long(context, degree, work))
        size = memory(context.outline, degree, context.request.grad)
        exact = search.exact
        if not insisted and not Candidate(exact.executable, work, size, "").beats(exact):
            return Refusal(self.name)
        return self._candidate(context, found, work)

    def _candidate(self, context: Context, found: tuple[Polynomial, ...], work: Work) -> Candidate | Refusal:
        """Of these polynomials, where not too many rows are exact."""
        outline, request, statistics = context.outline, context.request, context.statistics
        degree, n = max(1, found[0].degree), outline.sizes.n
        symbol = survey(context.problem, found, _share(context))
        if symbol.n_exact_rows.max() > n / 2:
            return Refusal(self.name, self._too_many(context, int(symbol.n_exact_rows.max()), degree))
        scores, values = statistics.scores, statistics.values
        error = max(p.error for p in found)
        certificate = certificate_of(outline, scores, values, degree, poly.tau(error))
        own, of_exact = _roundings(context, largest(outline, scores, values))
        rounding = float(np.max(own)) + float(symbol.rounding.max())
        if symbol.exact_rows:
            rounding = max(rounding, float(np.max(of_exact)))
        certificate = replace(certificate, engine="fft", rounding=rounding)
        gradient = of_gradient(outline, certificate, degree + 1, error) if request.grad else None
        executable = FFT(certificate, gradient, scores, values, found, symbol)
        work = work.times((1 + symbol.unseen) / 2)
        work += exact_work(outline, request.grad).times(float(symbol.n_exact_rows.mean()) / n)
        size = memory(outline, degree, request.grad)
        return Candidate(executable, work, size, "method='fft'" if request.method == "fft" else CHEAPEST)

    def alike(self, context: Context, most: float) -> list[Alike | None]:
        """By the degree, by what rounding leaves of eps, by levels, and by whether too many rows would be exact."""
        outline, request = context.outline, context.request
        worth = request.method == "fft" or exact_work(outline, request.grad).nominal > _WORTH_ASKING
        if context.distributed or self.lacks(outline) or not worth:
            return super().alike(context, most)
        allowed = _allowed(context)
        found = of_each_slot(context, allowed)
        works = {g: _work(context, g).nominal for g in {p.degree for p in found if p is not None}}
        if min(works.values(), default=math.inf) >= most:
            return super().alike(context, most)
        symbol = _surveyed(context, found)
        exact, n, keys = exact_work(outline, request.grad).nominal, outline.sizes.n, []
        each = zip(found, allowed.tolist(), symbol.n_levels.tolist(), symbol.n_exact_rows.tolist(), strict=True)
        for p, left, levels, rows in each:
            price = math.inf if p is None else works[p.degree] * (1 + levels) / 2 + exact * rows / n
            keys.append(Alike((p.degree, -left, levels, rows > n / 2), price) if price < most else None)
        return keys

    @staticmethod
    def _too_long(context: Context, degree: int, work: Work) -> str:
        outline, scores = context.outline, context.statistics.scores
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


def _certified(context: Context) -> tuple[tuple[Polynomial, ...] | None, str | None]:
    """The polynomial of each slot, or why there is none. Slots that share a family share the polynomial."""
    found, refusal = certified(context, _allowed(context))
    if found is not None and context.outline.family is not None:
        found = (max(found, key=lambda p: p.B),) * len(found)
    return found, refusal


def _share(context: Context) -> float:
    """What transforms may take of eps: rows to which they do more are computed exactly."""
    return context.request.eps / 8


def _allowed(context: Context) -> np.ndarray:
    """What rounding leaves of eps for the truncation of each slot's polynomial, (H,)."""
    outline, statistics = context.outline, context.statistics
    base, of_exact = _roundings(context, of_slots(outline, statistics.scores, statistics.values))
    of_transforms = base + _share(context)
    left = left_by(context, of_transforms)
    more = of_exact > of_transforms
    if more.any():
        # Rows that are computed exactly round as exact work does.
        found = of_each_slot(context, left)
        if any(p is not None for p in found):
            more &= _surveyed(context, found).n_exact_rows > 0
            left = np.where(more, left_by(context, of_exact), left)
    return left


def _surveyed(context: Context, polynomials: Sequence[Polynomial | None]) -> Symbol:
    """The survey for polynomials that only some of the slots have; what it says of the others means nothing."""
    another = next(p for p in polynomials if p is not None)
    return survey(context.problem, [another if p is None else p for p in polynomials], _share(context))


def _roundings(context: Context, m: Magnitudes) -> tuple[np.ndarray, np.ndarray]:
    """Rounding beside that of the transforms (monomials that cancel, in float64, storing O in its dtype, and what
    scores carry of projections and rotations), and that of rows that are computed exactly.
    """
    outline = context.outline
    # What is added up in a family's scores may pass the scores themselves.
    added = m.bound if outline.family is None else abs(outline.scale) * largest_entries(context.problem)
    monomials = _UNIT * (12 + 4 * np.exp(np.minimum(m.bound + added, 700)))
    stored = float(np.finfo(outline.dtype).eps) * (1 + m.offset)
    exact = rounding_of_pairs(outline, m, outline.sizes.n_k)
    return stored + moved(outline, m.lost) + monomials, exact


def _work(context: Context, degree: int) -> Work:
    """Of transforms, but for exact rows."""
    outline = context.outline
    count = operations(outline, degree, context.request.grad)
    return Work(outline.share * _CALL) + operations_work(outline, count)
