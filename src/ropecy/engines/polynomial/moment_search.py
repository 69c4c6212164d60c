"""Which polynomial moments are expected to certify in each slot, by estimates from a sample of its rows.

What is found for a slot depends on its own numbers and on the shape of the call, never on other slots. All slots are
searched at once, with arrays of one entry for each, since they may be hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...approximation import minimax as poly
from ...approximation.moment_fit import MomentPolynomial, fit_moments, taylor
from ...certify.once import once
from ...certify.sample import Kept, Sample
from ..base import Context
from ..cost import Work
from ..exact.cost import exact_work
from .cost import fourth_work, moments_work, polynomial_work, sample_work
from .worst_case import LOOK_IF_EXPECTED, left_by_rounding

MOST = 6  # the largest degree that is tried if the worst case has no degree at all
_LOOK = 0.03  # what looking at a sample may cost, as a part of the seconds of the best candidate
_LUCK = 4  # a degree is tried if its expected error is at most this many times what is allowed


class Slot(NamedTuple):
    """A polynomial that is expected to certify eps in a slot.

    Attributes
    ----------
    p : MomentPolynomial
        The weights of forward.
    r : MomentPolynomial or None
        The weights of backward, without gradients None.
    kappa : float
        As in `MomentRule`; above 0 where fourth moments are used.
    B : float
        The bound of the rows that are kept.
    allowed : float
        What rounding leaves of eps.
    truncation, of_gradient : float
        The expected truncation errors of O and of gradients, over the rows that are not computed exactly.
    share : float
        The part of the exact work of the slot that rows take which are left to the exact engine.
    n_exact_rows : int
        How many rows of the slot may be computed exactly because their certificate is too large.
    n_long : int
        How many rows have a bound past B.
    """

    p: MomentPolynomial
    r: MomentPolynomial | None
    kappa: float
    B: float
    allowed: float
    truncation: float
    of_gradient: float
    share: float
    n_exact_rows: int
    n_long: int

    @property
    def key(self) -> tuple[float, ...]:
        """What slots share that are computed together."""
        return self.p.degree, 0 if self.r is None else self.r.degree, float(self.kappa > 0), -self.allowed

    def work(self, context: Context) -> Work:
        """The work of all slots if they were like this one, with that of the rows that are computed exactly."""
        outline, grad = context.outline, context.request.grad
        work = polynomial_work(outline, self.p.degree, grad, self.r.degree + 1 if grad else None)
        work += moments_work(outline) + exact_work(outline, grad).times(self.share)
        return work + fourth_work(outline) if self.kappa else work


def may_serve(context: Context, worst: Sequence[int]) -> np.ndarray:
    """For which slots there is a degree below that of the worst case to try, where trying it costs little: (H,) bools.

    `worst` is the degree of the worst case in each slot, 0 where there is none.
    """
    outline, request, statistics = context.outline, context.request, context.statistics
    H, found = outline.sizes.H, np.zeros(outline.sizes.H, bool)
    if request.each_weight or statistics.plain.plain == math.inf:
        return found
    look, B = sample_work(outline, request.grad).nominal, statistics.scores.of_slots
    expected = None
    for degree in set(worst):
        own = np.asarray(worst) == degree
        if _most(context, degree) < 2 or (request.degree and degree):
            continue
        if request.method != "auto" or request.degree is not None:
            found |= own
            continue
        at_hand, least = min(_at_hand(context, degree)), np.full(H, 2)
        if look > _LOOK * at_hand:
            if look > LOOK_IF_EXPECTED * at_hand:
                continue
            if expected is None:
                # This is the mean square of the scores if queries and keys have no preferred direction.
                allowed = left_by_rounding(context) / (4 if request.grad else 1)
                expected = expected_degrees(B, B**2 / outline.sizes.d, allowed, statistics.values.share)
            least = expected
            own &= (least > 0) & ((least < degree) if degree else True)
        for g in set(least[own].tolist()):
            work = polynomial_work(outline, g, request.grad, g) + moments_work(outline)
            if work.nominal + look <= at_hand:
                found |= own & (least == g)
    return found


def search(context: Context, worst: Sequence[int], least: int = 2) -> list[Slot | None]:
    """The cheapest polynomial that is expected to certify eps by moments in each slot, of degree `least` or more; None
    where there is none that is cheaper than the others at hand.
    """
    serves = may_serve(context, worst)
    if not serves.any():
        return [None] * len(serves)
    return _Search(context, worst, serves).run(least)


def expected_degrees(B: np.ndarray, square: np.ndarray | None, allowed: np.ndarray, share: np.ndarray) -> np.ndarray:
    """About the least degree by which errors are within what is `allowed`, for scores within B: by the worst case or by
    moments; 0 where there is none. All are arrays of one entry a slot.

    Moments count only if `square`, the largest mean square of a row's scores, is given.
    """
    found, usable = np.zeros(len(B), int), (allowed > 0) & (B <= poly.MAX_BOUND)
    for slot in np.flatnonzero(usable).tolist():
        degree = poly.smallest_degree(float(B[slot]), poly.relative_error_for(float(allowed[slot])))
        found[slot] = 0 if degree is None else max(1, degree)
    if square is None:
        return found
    part = np.minimum(1.0, 1.1 * share)
    for g in range(MOST, 1, -1):
        fits = _each(lambda bound, g=g: fit_moments(poly.B_grid(bound), g), np.where(usable, B, np.nan))
        radius = _of_each(fits, lambda p: p.radius[0])
        with np.errstate(all="ignore"):
            # The fourth moment of Gaussian scores is 3 times the square of the second.
            h = radius * (1, 3, 15)[g // 2 - 1] * square ** (g // 2)
            serves = usable & (h < 1) & (h / (1 - h) * part < allowed) & ((found == 0) | (g <= found))
        found[serves] = g
    return found


def _most(context: Context, worst: int) -> int:
    """The largest degree to try where the worst case has this one."""
    request = context.request
    return request.degree or (worst - (not request.grad) if worst else MOST)


def _at_hand(context: Context, worst: int) -> list[float]:
    """The seconds of what may run otherwise, inf where nothing may."""
    request, found = context.request, [math.inf]
    if worst:
        found.append(polynomial_work(context.outline, worst, request.grad).nominal)
    if request.method == "auto" and request.degree is None:
        found.append(exact_work(context.outline, request.grad).nominal)
    return found


class _Search:
    """The search for the cheapest degree, bound of the kept rows, and polynomial of each slot.

    If the sequence is in pieces, all ranks have taken the sample before, and fourth moments are not used.
    """

    def __init__(self, context: Context, worst: Sequence[int], serves: np.ndarray) -> None:
        self._context, self._outline, self._grad = context, context.outline, context.request.grad
        self._sample: Sample = context.statistics.sample
        self._most = np.array([_most(context, degree) for degree in worst])
        limits = {degree: min(_at_hand(context, degree)) for degree in set(worst)}
        self._limit = np.where(serves, [limits[degree] for degree in worst], -math.inf)
        self._exact = exact_work(self._outline, self._grad).nominal
        self._best: list[Slot | None] = [None] * len(serves)

    def run(self, least: int) -> list[Slot | None]:
        sample, outline, statistics = self._sample, self._outline, self._context.statistics
        # Degrees for which most rows would fail even if the estimates are too large by a factor are not tried.
        B, square = sample.usual(outline)
        left = left_by_rounding(self._context, B) + (_LUCK - 1) * self._context.request.eps
        lowest = expected_degrees(B, square, left, statistics.values.share)
        lowest = np.where(lowest > 0, np.maximum(lowest, 2), MOST + 1)
        if self._context.request.degree:
            lowest[:] = self._context.request.degree
        lowest = np.maximum(lowest, least)
        for degree in range(int(max(2, lowest.min())), int(self._most.max()) + 1):
            # Higher degrees cost more than what there is already.
            tried = (lowest <= degree) & (degree <= self._most)
            tried &= (polynomial_work(outline, degree, False) + moments_work(outline)).nominal < self._limit
            if not tried.any():
                continue
            self._try(degree, np.zeros(len(tried)), tried)
            if degree < 4 and not self._context.distributed and not self._grad:
                self._try(degree, sample.kappa(), tried)
        return self._best

    def _cost(self, degree: int, extra: Work, grad_degree: int | None = None) -> float:
        return (polynomial_work(self._outline, degree, self._grad, grad_degree) + extra).nominal

    def _try(self, degree: int, kappa: np.ndarray, tried: np.ndarray) -> None:
        """Tries this degree in these slots, with fourth moments if kappa is not 0."""
        sample, outline, fourth = self._sample, self._outline, None
        order, extra = degree - degree % 2, moments_work(outline)
        if kappa.any():
            extra += fourth_work(outline)
            tried = tried & (self._cost(degree, extra) < self._limit)
            if not tried.any():
                return
        h = sample.radius(outline, sample.fits(degree, kappa), order)
        if kappa.any():
            # Fourth moments are measured only if this degree would suffice for Gaussian scores, because they take long.
            few = ~tried
            for cut in self._cuts:
                few = few | (cut.there & sample.kept(outline, cut.allowed, cut.B, h).few)
                if few.all():
                    break
            tried = tried & few
            if not tried.any():
                return
            fourth = self._context.statistics.fourth(self._context.request.seed, tried)
            h = sample.radius(outline, sample.fits(degree, kappa), order, fourth)
        for cut in self._cuts:
            own = tried & cut.there
            if self._grad and own.any():
                h = sample.radius(outline, sample.fits(degree, kappa, cut.grid), order)
            for p, r in self._weights(np.where(own, cut.grid, np.nan), degree, kappa) if own.any() else ():
                self._consider(p, r, kappa, cut, h, extra)

    @once
    def _cuts(self) -> list[_Cut]:
        """The bounds to try."""
        found = []
        for B in self._sample.cuts(self._context.statistics.scores.of_slots):
            there = ~np.isnan(B)
            grid = np.array([poly.B_grid(own) for own in np.where(there, B, 0.0).tolist()])
            found.append(_Cut(B, there, grid, left_by_rounding(self._context, B)))
        return found

    def _weights(
        self, grid: np.ndarray, degree: int, kappa: np.ndarray
    ) -> Iterator[tuple[list[MomentPolynomial | None], list[MomentPolynomial | None]]]:
        """The polynomials (of forward, of backward) of all slots to try at that degree; None where the bound is NaN or
        there is no polynomial, and without gradients for backward.
        """
        p = _each(lambda bound, of_kappa: fit_moments(bound, degree, of_kappa / bound**2), grid, kappa)
        if not self._grad:
            yield p, [None] * len(p)
            return
        order = degree - degree % 2
        yield p, _each(lambda bound: taylor(bound, order), grid)
        for g in (order, order + 1):
            yield p, _each(lambda bound, g=g: fit_moments(bound, g), grid)

    def _consider(
        self,
        p: list[MomentPolynomial | None],
        r: list[MomentPolynomial | None],
        kappa: np.ndarray,
        cut: _Cut,
        h: np.ndarray,
        extra: Work,
    ) -> None:
        """Keeps these polynomials, for rows within B whose radii are h, where they are the cheapest so far; `extra` is
        added work.
        """
        sample, outline = self._sample, self._outline
        there = np.array([own is not None for own in p])
        if self._grad:
            there &= np.array([own is not None for own in r])
        if not there.any():
            return
        degree = next(own for own in p if own is not None).degree
        grad_degree = next(own for own in r if own is not None).degree + 1 if self._grad else None
        cost = self._cost(degree, extra, grad_degree)
        if not (there & (cost < self._limit)).any():
            return
        h_r = None
        if self._grad:
            radius = sample.of_rows(_of_each(r, lambda own: own.radius[0]))
            with np.errstate(all="ignore"):
                h_r = radius * sample.mean(outline, degree - degree % 2)
        kept = sample.kept(outline, cut.allowed, cut.B, h, h_r)
        total = cost + self._exact * kept.share
        better, longer = there & kept.few & (total < self._limit), None
        for slot in np.flatnonzero(better).tolist():
            longer = sample.longer(cut.B) if longer is None else longer
            self._limit[slot] = total[slot]
            numbers = float(kappa[slot]), float(cut.B[slot]), float(cut.allowed[slot]), *_of(kept, slot)
            self._best[slot] = Slot(p[slot], r[slot], *numbers, int(longer[slot]))


class _Cut(NamedTuple):
    """Bounds B of the rows that are kept, one for each slot: (H,) arrays.

    Attributes
    ----------
    B : array
        NaN where none is to be tried.
    there : bool array
        Where there is one.
    grid : array
        B rounded up to the grid.
    allowed : array
        What rounding leaves of eps.
    """

    B: np.ndarray
    there: np.ndarray
    grid: np.ndarray
    allowed: np.ndarray


def _of(kept: Kept, slot: int) -> tuple[float, float, float, int]:
    """What `Slot` says of the rows that are kept."""
    numbers = (float(X[slot]) for X in (kept.truncation, kept.of_gradient, kept.share))
    return *numbers, int(kept.n_exact_rows[slot])


def _each(make: Callable[..., MomentPolynomial | None], *of_slots: np.ndarray) -> list[MomentPolynomial | None]:
    """make(...) of the numbers of each slot, each once; None where the first number is NaN."""
    made: dict[tuple[float, ...], MomentPolynomial | None] = {}
    found = []
    for own in zip(*(X.tolist() for X in of_slots), strict=True):
        if math.isnan(own[0]):
            found.append(None)
            continue
        if own not in made:
            made[own] = make(*own)
        found.append(made[own])
    return found


def _of_each(polynomials: Sequence[MomentPolynomial | None], what: Callable[[MomentPolynomial], float]) -> np.ndarray:
    """what(p) of each slot, inf where there is no p."""
    return np.array([math.inf if p is None else what(p) for p in polynomials])
