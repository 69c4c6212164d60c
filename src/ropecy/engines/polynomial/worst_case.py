"""The polynomial engine by its worst case: a polynomial whose error is proved for all scores within a bound."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ...approximation import minimax as poly
from ...approximation.minimax import Polynomial
from ...certificate import Certificate
from ...certify.rounding import polynomial_rounding, rounding_of_slots
from ...certify.scores import Scores
from ...certify.values import Values
from ...problem.problem import Outline
from ...problem.request import Request
from ..base import CHEAPEST, Alike, Candidate, Context, Engine, Refusal, Search
from ..cost import Work
from . import features
from .cost import LOOKING, polynomial_work, sample_work
from .executables import Polynomial as PolynomialExecutable
from .features import Expansion

# What a sample may cost, as a part of the seconds of the best candidate, if rows of no preferred direction would pay.
LOOK_IF_EXPECTED = 0.1
_LEFT = 64  # into how many steps what rounding leaves of eps is cut
SUPPORTS = frozenset({"causal", "key_mask"})  # the features that polynomial engines support


class WorstCase(Engine):
    """Offers the smallest degree (or the one that was asked for) that is proved for all scores within their bound."""

    name = "polynomial"
    SUPPORTS = SUPPORTS

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        lacking = self.lacks(context.outline)
        if lacking:
            return self.unable(lacking)
        if not worth_measuring(context, search.exact.work):
            return Refusal(self.name, "the cheapest engine, whatever the degree", hopeless=True)
        request, statistics = context.request, context.statistics
        found, refusal = certified(context)
        if found is None:
            return Refusal(self.name, refusal)
        degree, error = max(1, found[0].degree), max(p.error for p in found)
        certificate = certificate_of(context.outline, statistics.scores, statistics.values, degree, poly.tau(error))
        gradient = None
        if request.grad:
            gradient = of_gradient(context.outline, certificate, degree + 1, error)
        expansion = Expansion.of_slots(statistics.scores, statistics.values, found, found if request.grad else None)
        executable = PolynomialExecutable(certificate, gradient, expansion, statistics.scores.plain_of_slots)
        work = polynomial_work(context.outline, degree, request.grad)
        size = features.memory(context.piece, degree, request.grad)
        return Candidate(executable, work, size, insisted(context))

    def alike(self, context: Context, most: float) -> list[Alike | None]:
        """By what moments certify, where that is known, else by the degree and by what rounding leaves of eps."""
        outline, grad = context.outline, context.request.grad
        if self.lacks(outline) is not None:
            return super().alike(context, most)
        left, by_moments = left_by_rounding(context), context.by_moments or [None] * outline.sizes.H
        degrees = [0 if p is None else p.degree for p in of_each_slot(context, left)]
        seconds = {g: polynomial_work(outline, g, grad).nominal if g else math.inf for g in set(degrees)}
        keys: list[Alike | None] = []
        for found, degree, allowed in zip(by_moments, degrees, left.tolist(), strict=True):
            # Slots of one group have one fallback too.
            if found is not None:
                keys.append(Alike((*found.key, degree), found.work(context).nominal))
            else:
                own = Alike((degree, 0, 0, -allowed, degree), seconds[degree])
                keys.append(own if own.seconds < most else None)
        return keys


def insisted(context: Context) -> str:
    """The reason for taking a polynomial, in words."""
    return "method='polynomial'" if context.request.method == "polynomial" else CHEAPEST


def worth_measuring(context: Context, exact: Work, any_slot: bool = False) -> bool:
    """Whether it may pay to measure the bounds of the scores, for all slots or, if `any_slot`, for at least one.

    With method="auto" it may if some degree would beat exact attention by more than looking for it costs.
    """
    request, statistics, outline = context.request, context.statistics, context.outline
    if context.distributed or request.method != "auto" or request.degree is not None:
        return True
    if not math.isfinite(statistics.plain.plain):
        return not any_slot
    if not would_pay(outline, 1, exact, request.grad):
        return False
    bounds = statistics.least_bounds
    return may_pay(outline, request, exact, float(bounds.min() if any_slot else bounds.max()))


def may_pay(outline: Outline, request: Request, exact: Work, least: float) -> bool:
    """`worth_measuring` where degree 1 would pay and bounds of the scores are known to exceed `least`, 0 if unknown."""
    grad = request.grad
    if not least or sample_is_cheap(outline, exact, grad):
        return True
    degree = poly.smallest_degree(least, poly.relative_error_for(request.eps))
    return degree is not None and would_pay(outline, degree, exact, grad)


def sample_is_cheap(outline: Outline, exact: Work, grad: bool) -> bool:
    """Whether a sample of rows, which may show that the scores are small, costs little beside exact attention."""
    return sample_work(outline, grad).nominal <= LOOK_IF_EXPECTED * exact.nominal


def would_pay(outline: Outline, degree: int, exact: Work, grad: bool) -> bool:
    """Whether a polynomial of this degree would beat exact attention by more than looking for it costs."""
    return polynomial_work(outline, max(1, degree), grad).nominal + outline.share * LOOKING < exact.nominal


def certificate_of(
    outline: Outline, scores: Scores, values: Values, degree: int, truncation: float, rule: str = "worst case"
) -> Certificate:
    """The certificate of O for a polynomial of this degree and this truncation error."""
    rounding = polynomial_rounding(outline, scores.bound, values, scores.lost)
    n_features = poly.n_features(outline.terms, degree)
    return Certificate("polynomial", degree, n_features, scores.bound, rule, truncation, rounding)


def of_gradient(outline: Outline, certificate: Certificate, degree: int, truncation: float) -> Certificate:
    """The certificate of gradients beside that of O, with features of this degree and this truncation error."""
    n_features = poly.n_features(outline.terms, degree)
    rounding = 4 * certificate.rounding
    return replace(certificate, degree=degree, n_features=n_features, truncation=truncation, rounding=rounding)


def where(scores: Scores) -> str:
    """The beginning of a refusal: how large the scores may be."""
    return f"scores are bounded by B = {scores.bound:.4g} only (|scale| max ||q|| max ||k||)"


def cure(outline: Outline, scores: Scores) -> str:
    """The end of a refusal: what would make B smaller, unless it is done already."""
    d, scale = outline.sizes.d, abs(outline.scale)
    found = ["scale=1/d"] if scale > 1.01 / d else []
    # Queries and keys whose entries have a root mean square of 1 have the bound |scale| d.
    if scores.plain > 1.01 * scale * d:
        found.append("q and k normalised")
    smaller = f"{', or '.join(found)}, would make B smaller; " if found else ""
    return f"{smaller}method='exact' has no bound"


def certified(context: Context, allowed: np.ndarray | None = None) -> tuple[tuple[Polynomial, ...] | None, str | None]:
    """The polynomial of each slot, and None; or None, and why there is none.

    All are of one degree: the smallest (or the one that was asked for) that certifies eps in all slots.

    `allowed`, (H,), is what rounding leaves of eps for the truncation of each slot, by default in the polynomial
    engine.
    """
    outline, scores, degree = context.outline, context.statistics.scores, context.request.degree
    allowed, eps = left_by_rounding(context) if allowed is None else allowed, context.request.eps
    begins, ends = where(scores), cure(outline, scores)
    if allowed.min() <= 0:
        lost = f"rounding in {outline.dtype.name} alone is {eps - allowed.min():.2g}"
        return None, f"{begins}: no degree certifies eps = {eps:g}, {lost}; {ends}"
    found = of_each_slot(context, allowed, degree)
    if None not in found:
        most = max(p.degree for p in found)
        return tuple(p if p.degree == most else poly.minimax(poly.B_grid(p.B), most) for p in found), None
    if degree is not None:
        needed = poly.smallest_degree(scores.bound, poly.relative_error_for(float(allowed.min())))
        takes = _takes(needed, outline.terms)
        return None, f"{begins}: degree {degree} does not certify eps = {eps:g}; {takes}; {ends}"
    return None, f"{begins}: no degree certifies eps = {eps:g}; {ends}"


def left_by_rounding(context: Context, B: np.ndarray | None = None) -> np.ndarray:
    """What rounding leaves of eps for the truncation of each slot, (H,); 0 or less where it leaves nothing.

    Scores are within B, by default within the bound of each slot.
    """
    outline, statistics = context.outline, context.statistics
    B = statistics.scores.of_slots if B is None else B
    return left_by(context, rounding_of_slots(outline, statistics.scores, statistics.values, B))


def left_by(context: Context, rounding: np.ndarray) -> np.ndarray:
    """What these rounding errors leave of eps, (H,); 0 or less where they leave nothing.

    In a call of several slots it is rounded down to a multiple of a 64th of eps, so that slots differ in it only where
    rounding counts.
    """
    eps = context.request.eps
    with np.errstate(over="ignore"):  # counted in eps, rounding may be past the largest number
        left = 1 - rounding / eps
        return eps * (np.floor(_LEFT * left) / _LEFT if context.outline.several else left)


def of_each_slot(context: Context, allowed: np.ndarray, degree: int | None = None) -> list[Polynomial | None]:
    """For each slot the polynomial of the smallest degree, or of this degree, whose error for the slot's own scores is
    at most what is `allowed`; None where there is none.
    """
    of_slots = zip(context.statistics.scores.of_slots.tolist(), allowed.tolist(), strict=True)
    found = []
    for B, left in of_slots:
        if B > poly.MAX_BOUND or left <= 0:
            found.append(None)
        elif degree is None:
            found.append(_of_bound(poly.fine_grid(B), left))
        else:
            # One slot alone has the sharpest polynomial; those of several are few, and are made once.
            bounds = ([poly.B_grid(B)] if context.outline.several else []) + [poly.fine_grid(B)]
            made = (poly.minimax(bound, max(1, degree)) for bound in bounds)
            found.append(next((p for p in made if p.error <= poly.relative_error_for(left)), None))
    return found


@lru_cache(maxsize=4096)
def _of_bound(B: float, allowed: float) -> Polynomial | None:
    """The polynomial of the smallest degree for scores within B by which O is off by no more than is `allowed`."""
    e, bound = poly.relative_error_for(allowed), poly.B_grid(B)
    needed = poly.smallest_degree(B, e)
    if needed is None:
        return None
    # smallest_degree has rounded B up to the grid. For B itself one degree less may be enough. That polynomial takes a
    # millisecond to make, so it is made only if its error may suffice, which is about (B / bound)^needed times that for
    # the larger bound.
    if needed > 1 and poly.minimax(bound, needed - 1).error * (B / bound) ** needed <= 1.02 * e:
        p = poly.minimax(B, needed - 1)
        if p.error <= e:
            return p
    return poly.minimax(bound, max(1, needed))


def _takes(needed: int | None, d: int) -> str:
    """Which degree would certify eps, in words."""
    if needed is None:
        return "no degree does"
    return f"degree {max(1, needed)}, {poly.n_features(d, max(1, needed)):,} features, would do"
