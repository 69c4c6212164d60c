"""The polynomial engine by moments of the scores: a degree is chosen by estimates from a sample of rows.

Rows are certified after they are computed (`certify.moments`). Those that fail are computed exactly, and if more fail
than was planned, another executable runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...approximation import minimax as poly
from ...approximation.moment_fit import MomentPolynomial, fit_moments, taylor
from ...certify.fourth_moments import FAILURE, Fourth
from ...certify.moments import MomentRule
from ...certify.rounding import polynomial_rounding
from ..base import Candidate, Context, Engine, Executable, Refusal, Search
from ..cost import Work
from ..exact.cost import exact_work
from ..exact.engine import Exact
from . import features
from .cost import fourth_work, moments_work, polynomial_work, sample_work
from .executables import ByMoments
from .features import Expansion
from .worst_case import LOOK_IF_EXPECTED, SUPPORTS, certificate_of, insisted, of_gradient

MOST = 6  # the largest degree that is tried if the worst case has no degree at all
_LOOK = 0.03  # what looking at a sample may cost, as a part of the seconds of the best candidate
_LUCK = 4  # a degree is tried if its expected error is at most this many times eps


class Moments(Engine):
    """Offers the cheapest degree below that of the worst case that moments are expected to certify."""

    name = "polynomial"
    SUPPORTS = SUPPORTS

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        if self.lacks(context.outline) or context.request.each_weight:
            return Refusal(self.name)
        worst = search.of_rule("worst case")
        if not may_serve(context, worst):
            return Refusal(self.name)
        outline, request = context.outline, context.request
        look = sample_work(outline, request.grad)
        choice = _Search(context, worst).run()
        if choice is None:
            return Refusal(self.name, looked=look if request.method == "polynomial" else Work())
        executable = choice.executable(context, self._fallback(context, worst))
        # method="auto" looks only where that costs next to nothing.
        work = choice.work + look if request.method == "polynomial" else choice.work
        backward = choice.backward_degree if request.grad else None
        size = features.memory(context.piece, choice.degree, request.grad, backward)
        reason = insisted(context)
        if choice.rule.n_long:
            reason += f": {choice.rule.n_long:,} long queries exactly"
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


@dataclass(frozen=True, slots=True)
class _Choice:
    """A polynomial that is expected to certify eps.

    Attributes
    ----------
    rule : MomentRule
    truncation, gradient_truncation : float
        The expected truncation errors of O and of gradients, over the rows that are not computed exactly.
    work : Work
        The work, with that of the rows that are computed exactly.
    n_exact_rows : int
        How many rows, of all heads together, may be computed exactly because their certificate is too large.
    """

    rule: MomentRule
    truncation: float
    gradient_truncation: float
    work: Work
    n_exact_rows: int

    @property
    def degree(self) -> int:
        """The degree of forward's features."""
        return max(1, self.rule.polynomial.degree)

    @property
    def backward_degree(self) -> int:
        """The degree of backward's features."""
        weights = self.rule.weights
        return self.degree + 1 if weights is None else weights.degree + 1

    def executable(self, context: Context, fallback: Executable | None) -> ByMoments:
        rule, values, request = self.rule, context.statistics.values, context.request
        certificate = certificate_of(context.outline, rule.scores, values, self.degree, self.truncation, "moments")
        if rule.fourth is not None:
            certificate = replace(certificate, seed=rule.fourth.seed, failure=FAILURE)
        gradient = weights = None
        if request.grad:
            gradient = of_gradient(context.outline, certificate, self.backward_degree, self.gradient_truncation)
            weights = rule.weights or rule.polynomial
        return ByMoments(
            certificate,
            gradient,
            Expansion(rule.scores, values, rule.polynomial, weights),
            rule.scores.plain,
            rule,
            request.eps,
            self.n_exact_rows,
            fallback,
        )


def may_serve(context: Context, worst: Candidate | None) -> bool:
    """Whether there is a degree below that of the worst case to try, and trying it costs little."""
    outline, request, statistics = context.outline, context.request, context.statistics
    if _most(context, worst) < 2 or statistics.plain.plain == math.inf or (request.degree and worst):
        return False
    if request.method != "auto" or request.degree is not None:
        return True
    at_hand = min(_at_hand(context, worst))
    looking = sample_work(outline, request.grad).nominal
    least = 2
    if looking > _LOOK * at_hand:
        if looking > LOOK_IF_EXPECTED * at_hand:
            return False
        # This is the mean square of the scores if queries and keys have no preferred direction.
        square = statistics.scores.bound**2 / outline.sizes.d
        eps = request.eps / 4 if request.grad else request.eps
        least = expected_degree(context, statistics.scores.bound, square, eps)
        if least is None or (worst and least >= worst.executable.certificate.degree):
            return False
    work = polynomial_work(outline, least, request.grad, least) + moments_work(outline)
    return work.nominal + looking <= at_hand


def _most(context: Context, worst: Candidate | None) -> int:
    """The largest degree to try."""
    request = context.request
    return request.degree or (worst.executable.certificate.degree - (not request.grad) if worst else MOST)


def _at_hand(context: Context, worst: Candidate | None) -> list[float]:
    """The seconds of what may run otherwise; empty if there is nothing, as for a degree that was asked for."""
    request, found = context.request, []
    if worst is not None:
        found.append(worst.nominal)
    if request.method == "auto" and request.degree is None:
        found.append(exact_work(context.outline, request.grad).nominal)
    return found


class _Search:
    """The search for the cheapest degree, bound of the kept rows, and polynomial that are expected to certify eps.

    If the sequence is in pieces, all ranks have taken the sample before, and fourth moments are not used.
    """

    def __init__(self, context: Context, worst: Candidate | None) -> None:
        self._context, self._outline, self._grad = context, context.outline, context.request.grad
        self._sample, self._values = context.statistics.sample, context.statistics.values
        self._most = _most(context, worst)
        self._exact = exact_work(context.outline, self._grad)
        self._limit = min([*_at_hand(context, worst), math.inf])
        self._best: _Choice | None = None

    @property
    def _fourth(self) -> Fourth:
        """The bounds of fourth moments, which are measured once, when some degree first needs them."""
        return self._context.statistics.fourth(self._context.request.seed)

    def run(self) -> _Choice | None:
        sample, outline = self._sample, self._outline
        # Degrees for which most rows would fail even if the estimates are too large by a factor are not tried.
        usual = (float(np.median(x)) for x in (sample.sizes, sample.mean(outline, 2)))
        eps = self._context.request.eps
        least = self._context.request.degree or expected_degree(self._context, *usual, _LUCK * eps)
        for degree in range(max(2, least or MOST + 1), self._most + 1):
            # Higher degrees cost more than what there is already.
            if (polynomial_work(outline, degree, False) + moments_work(outline)).nominal >= self._limit:
                break
            self._try(degree, 0.0)
            if degree < 4 and not self._context.distributed and not self._grad:
                self._try(degree, sample.kappa())
        return self._best

    def _try(self, degree: int, kappa: float) -> None:
        """Tries this degree, with fourth moments if kappa is not 0."""
        sample, outline, fourth = self._sample, self._outline, None
        order, extra, cuts = degree - degree % 2, moments_work(outline), sample.cuts(self._scores.bound)
        if kappa:
            extra += fourth_work(outline)
            if (polynomial_work(outline, degree, self._grad) + extra).nominal >= self._limit:
                return
        h = sample.radius(outline, sample.fits(degree, kappa), order)
        if kappa:
            # Fourth moments are measured only if this degree would suffice for Gaussian scores, because they take long.
            if not any(sample.kept(outline, self._values, self._context.request.eps, B, h) for B in cuts):
                return
            fourth = self._fourth
            h = sample.radius(outline, sample.fits(degree, kappa), order, fourth)
        for B in cuts:
            if self._grad:
                h = sample.radius(outline, sample.fits(degree, kappa, B), order)
            for p, r in _weights(poly.B_grid(B), degree, kappa, self._grad):
                self._consider(MomentRule(p, kappa, self._scores.within(B), fourth, 0, r, sample.every), B, h, extra)

    def _consider(self, rule: MomentRule, B: float, h: np.ndarray, extra: Work) -> None:
        """Keeps this rule, for rows within B whose radii are h, if it is the cheapest so far; `extra` is added work."""
        sample, outline, r, degree = self._sample, self._outline, rule.weights, rule.polynomial.degree
        work = polynomial_work(outline, degree, self._grad, r.degree + 1 if self._grad else None) + extra
        if work.nominal >= self._limit:
            return
        h_r = r.radius[0] * sample.mean(outline, degree - degree % 2) if self._grad else None
        kept = sample.kept(outline, self._values, self._context.request.eps, B, h, h_r)
        if kept is None:
            return
        part, n_exact_rows, truncation, of_gradient = kept
        work += self._exact.times(part)
        if work.nominal < self._limit:
            self._limit, rule = work.nominal, replace(rule, n_long=sample.longer(B))
            self._best = _Choice(rule, truncation, of_gradient, work, n_exact_rows)

    @property
    def _scores(self):
        return self._context.statistics.scores


def expected_degree(context: Context, B: float, square: float | None, eps: float) -> int | None:
    """About the least degree that certifies eps, for scores within B: by the worst case or by moments.

    Moments count only if `square`, the largest mean square of a row's scores, is given.
    """
    values = context.statistics.values
    allowed = eps - polynomial_rounding(context.outline, B, values, context.statistics.scores.lost)
    if allowed <= 0 or B > poly.MAX_BOUND:
        return None
    degree = poly.smallest_degree(B, poly.relative_error_for(allowed))
    if square is not None:
        part = min(1.0, 1.1 * values.share)
        for g in range(2, min(degree or MOST, MOST) + 1):
            p = fit_moments(poly.B_grid(B), g)
            if p is not None:
                # The fourth moment of Gaussian scores is 3 times the square of the second.
                h = p.radius[0] * (1, 3, 15)[p.order // 2 - 1] * square ** (p.order // 2)
                if h < 1 and h / (1 - h) * part < allowed:
                    return g
    return None if degree is None else max(1, degree)


def _weights(
    B: float, degree: int, kappa: float, grad: bool
) -> Iterator[tuple[MomentPolynomial, MomentPolynomial | None]]:
    """The pairs of polynomials (of forward, of backward) to try at that degree; without `grad` the latter is None."""
    p = fit_moments(B, degree, kappa / B**2)
    if p is None:
        return
    if not grad:
        yield p, None
        return
    yield p, taylor(B, p.order)
    for g in (p.order, p.order + 1):
        r = fit_moments(B, g)
        if r is not None:
            yield p, r
