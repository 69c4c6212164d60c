"""Which degree moments of the scores are expected to certify, before the work; `moments` certifies rows after it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from . import moments
from .approximation import minimax as poly
from .approximation.moment_fit import MomentPolynomial, fit_moments, taylor
from .bounds import Scores, Values, polynomial_rounding
from .costs import Work, fourth_work, moments_work, polynomial_work, sample_work
from .moments import MomentRule
from .problem import Problem
from .sample import Sample
from .schedule import Choice

# Past this degree moments are not tried where the worst case has no degree at all.
MOST = 6
# What looking may cost, as a part of what is at hand without; and where scores of any direction would do.
_LOOK, LOOK_IF_EXPECTED = 0.03, 0.1
# How many times less than expected the error of a degree may be that is looked at.
_LUCK = 4


def may_serve(
    problem: Problem,
    scores: Scores,
    values: Values,
    eps: float,
    method: str,
    degree: int | None,
    grad: bool,
    exact: Work,
    worst: Choice | None,
) -> bool:
    """Whether there is a degree below that of the worst case to look at, and a look costs little of what is at hand."""
    if _most(degree, grad, worst) < 2 or scores.plain == math.inf or (degree and worst):
        return False
    if method != "auto" or degree is not None:
        return True
    at_hand = min(_at_hand(method, degree, exact, worst))
    looking = sample_work(problem, grad).nominal
    least = 2
    if looking > _LOOK * at_hand:
        if looking > LOOK_IF_EXPECTED * at_hand:
            return False
        # Rows and keys of no direction that counts more have this mean square.
        square = scores.bound**2 / problem.q.shape[3]
        least = expected_degree(problem, scores, values, scores.bound, square, eps / 4 if grad else eps)
        if least is None or (worst and least >= worst.degree):
            return False
    work = polynomial_work(problem, least, grad, least) + moments_work(problem)
    return work.nominal + looking <= at_hand


def _most(degree: int | None, grad: bool, worst: Choice | None) -> int:
    """The largest degree to look at."""
    return degree or (worst.degree - (not grad) if worst else MOST)


def _at_hand(method: str, degree: int | None, exact: Work, worst: Choice | None) -> list[float]:
    """Of what would be done otherwise; a degree that was asked for is looked at, whatever it costs."""
    free = method == "auto" and degree is None
    return [work.nominal for work in (worst and worst.work, free and exact) if work]


def choose(
    problem: Problem,
    scores: Scores,
    values: Values,
    eps: float,
    method: str,
    degree: int | None,
    seed: int | None,
    grad: bool,
    exact: Work,
    worst: Choice | None,
    pieces: Sample | None,
) -> Choice | None:
    """The cheapest degree below that of the worst case that moments are expected to certify, or None, where they
    `may_serve`.

    Of a problem in pieces the sample is given, and there are no fourth moments.
    """
    sample = pieces or Sample(problem, scores, values)
    cuts = sample.cuts(scores.bound)
    best, fourth = None, None
    # None that most rows would fail, were they lucky too.
    usual = (float(np.median(x)) for x in (sample.sizes, sample.mean(problem, 2)))
    least = degree or expected_degree(problem, scores, values, *usual, _LUCK * eps)
    for g in range(max(2, least or MOST + 1), _most(degree, grad, worst) + 1):
        # Nothing dearer than what is already at hand.
        limit = min([*_at_hand(method, degree, exact, worst), math.inf if best is None else best.work.nominal])
        if (polynomial_work(problem, g, False) + moments_work(problem)).nominal >= limit:
            break
        for kappa in (0.0, sample.kappa()) if g < 4 and pieces is None and not grad else (0.0,):
            order, extra = g - g % 2, moments_work(problem)
            if kappa:
                extra += fourth_work(problem)
                if (polynomial_work(problem, g, grad) + extra).nominal >= limit:
                    continue
            h = sample.radius(problem, sample.fits(g, kappa), order)
            if kappa:
                # Gaussian scores must do, for the moments themselves take longer.
                if not any(sample.kept(problem, values, eps, B, h) for B in cuts):
                    continue
                fourth = fourth or moments.fourth_moments(problem, scores, seed)
                h = sample.radius(problem, sample.fits(g, kappa), order, fourth)
            for B in cuts:
                if grad:
                    h = sample.radius(problem, sample.fits(g, kappa, B), order)
                for p, r in _weights(poly.B_grid(B), g, kappa, grad):
                    h_r = r.radius[0] * sample.mean(problem, order) if grad else None
                    work = polynomial_work(problem, g, grad, r.degree + 1 if grad else None) + extra
                    kept = sample.kept(problem, values, eps, B, h, h_r) if work.nominal < limit else None
                    if kept is None:
                        continue
                    part, rows, truncation, of_gradient = kept
                    work += exact.times(part)
                    if work.nominal < limit:
                        limit, n_long = work.nominal, sample.longer(B)
                        of_keys = fourth if kappa else None
                        rule = MomentRule(p, kappa, scores.within(B), of_keys, n_long, r, sample.every)
                        best = Choice(p, truncation, work, rule, rows, of_gradient)
    return best


def expected_degree(
    problem: Problem, scores: Scores, values: Values, B: float, square: float | None, eps: float
) -> int | None:
    """About the least degree that certifies eps by the worst case, or by moments, the scores' mean square being at most
    `square` where that counts.
    """
    allowed = eps - polynomial_rounding(problem, B, values, scores.lost)
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
    """What forward may have for weights at that degree, and with each what backward may have."""
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
