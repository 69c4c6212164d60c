"""The polynomial engine by a sample: degrees are tried in turn until rows drawn at random are within eps."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

from ...approximation import minimax as poly
from ...approximation.moment_fit import MomentPolynomial, fit_moments
from ...certificate import Certificate
from ...certify.moments import TILE
from ...certify.rounding import polynomial_rounding
from ...machine.memory import fits
from ..base import Candidate, Context, Engine, Executable, Refusal, Search
from ..cost import Work
from ..exact.cost import exact_work
from . import features
from .cost import polynomial_work, sample_work
from .executables import BySample
from .features import Expansion
from .moment_search import MOST
from .worst_case import SUPPORTS

# How many rows judge a degree by their error: four tiles of the exact engine, which two or four threads share evenly.
_SAMPLED_ROWS = 192


class Sampled(Engine):
    """Offers to try some degrees whose work, all together, is less than that of the best engine with a proof.

    The `search` that `offer` is given has asked engines that prove every weight, because looking at moments takes
    longer than computing the sampled rows.

    Parameters
    ----------
    prove : callable, optional
        Plans what runs if no degree suffices. By default that is the best candidate of `search`.
    """

    name = "polynomial"
    SUPPORTS = SUPPORTS

    def __init__(self, prove: Callable[[], Executable] | None = None) -> None:
        self._prove = prove

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        outline, request, statistics = context.outline, context.request, context.statistics
        scores, rounding, limit = statistics.scores, math.inf, math.inf
        if scores.bound <= poly.MAX_BOUND:
            rounding = polynomial_rounding(outline, scores.bound, statistics.values, scores.lost)
        if rounding >= request.eps:
            return Refusal(self.name)
        rows = min(_SAMPLED_ROWS, math.prod(outline.sizes[:3]))
        sampling = self._work(context, rows)
        proved = search.best
        if proved is not None:
            limit = proved.nominal
        if sampling.nominal > limit:
            return Refusal(self.name)
        trials = self._trials(context, sampling, limit)
        if not trials:
            return Refusal(self.name)
        degree, d = trials[0][0].degree, outline.sizes.d
        certificate = Certificate(
            "polynomial",
            degree,
            poly.n_features(d, degree),
            scores.bound,
            "sampled",
            request.eps - rounding,
            rounding,
            seed=secrets.randbits(62) if request.seed is None else request.seed,
            n_sampled=rows,
        )
        fallback = proved.executable if self._prove is None and proved is not None else None
        expansion = Expansion.of_slots(scores, statistics.values, trials[0])
        own = certificate, None, expansion, scores.plain_of_slots, trials, statistics.sample
        executable = BySample(*own, request.eps, fallback, self._prove)
        reason = "the smallest degree whose error in sampled rows, doubled, is within eps"
        work = polynomial_work(outline, degree, False) + sampling
        return Candidate(executable, work, features.memory(context.piece, degree, False), reason)

    @staticmethod
    def _work(context: Context, rows: int) -> Work:
        """The work of drawing so many rows and computing them exactly; if causal, each costs a whole tile."""
        outline = context.outline
        share = min(1.0, rows * (TILE if outline.mask.causal else 1) / math.prod(outline.sizes[:3]))
        return exact_work(outline, False).times(share) + sample_work(outline, False)

    @staticmethod
    def _trials(context: Context, sampling: Work, limit: float) -> list[tuple[MomentPolynomial, ...]]:
        """The polynomials of all slots to try, by degree, as long as trying all takes less than `limit` seconds."""
        outline, degree, sample = context.outline, context.request.degree, context.statistics.sample
        bounds, trials, total = [poly.B_grid(B) for B in context.statistics.scores.of_slots.tolist()], [], 0.0
        kappas = sample.kappa().tolist()
        for g in [degree] if degree else range(1, MOST + 1):
            p = tuple(_polynomial(g, B, kappa) for B, kappa in zip(bounds, kappas, strict=True))
            total += (polynomial_work(outline, g, False) + sampling).nominal
            if total >= limit or not fits(features.memory(context.piece, g, False)):
                break
            if None not in p:
                trials.append(p)
        return trials


def _polynomial(degree: int, B: float, kappa: float) -> MomentPolynomial | None:
    """The polynomial of this degree for scores within B; kappa is as in `Sample.kappa`."""
    if degree == 1:
        return MomentPolynomial(B, 1, (1.0, 1.0), 0, (0.0, 0.0), 0.0)
    return fit_moments(B, degree, kappa / B**2 * (degree == 2))
