"""The polynomial engine by a sample: degrees are tried in turn until rows drawn at random are within eps."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

import numpy as np

from ...approximation import minimax as poly
from ...approximation.moment_fit import MomentPolynomial, fit_moments
from ...certify.moments import TILE
from ...machine.memory import fits
from ...problem.problem import Outline
from ..base import Candidate, Context, Engine, Refusal, Search
from ..cost import Work
from ..exact.cost import exact_work
from . import features
from .cost import polynomial_work, sample_work
from .executables import BySample, Prove, Trial
from .features import Expansion
from .moment_search import MOST
from .worst_case import SUPPORTS, certificate_of, left_by_rounding

# How many rows judge a degree by their error, all slots of a call together: four tiles of the exact engine, which two
# or four threads share evenly. Each slot has a tile at least, since the rows of another say nothing of it.
_SAMPLED_ROWS = 4 * TILE


class Sampled(Engine):
    """Offers to try some degrees whose work, all together, is less than that of the best engine with a proof.

    The `search` that `offer` is given has asked engines that prove every weight, because looking at moments takes
    longer than computing the sampled rows.

    Parameters
    ----------
    prove : callable, optional
        Plans what runs where no degree suffices. By default that is the best candidate of `search`.
    """

    name = "polynomial"
    SUPPORTS = SUPPORTS

    def __init__(self, prove: Prove | None = None) -> None:
        self._prove = prove

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        outline, request, statistics = context.outline, context.request, context.statistics
        allowed, rows, proved = left_by_rounding(context), _sampled_rows(outline), search.best
        sampling, limit = self._work(context, rows), math.inf if proved is None else proved.nominal
        if sampling.nominal > limit or not (allowed > 0).any():
            return Refusal(self.name)
        trials = self._trials(context, allowed, sampling, limit)
        if not trials:
            return Refusal(self.name)
        first = next(p for p in trials[0] if p is not None)
        scores, values, degree = statistics.scores, statistics.values, first.degree
        certificate = certificate_of(outline, scores, values, degree, float(allowed.max()), "sampled")
        seed = secrets.randbits(62) if request.seed is None else request.seed
        certificate = replace(certificate, seed=seed, n_sampled=rows)
        fallback = proved.executable if self._prove is None and proved is not None else None
        own = certificate, None, Expansion(scores, values, first), scores.plain_of_slots
        executable = BySample(*own, trials, allowed, statistics.sample, fallback, self._prove)
        reason = "the smallest degree whose error in sampled rows, doubled, is within eps"
        work = polynomial_work(outline, degree, False) + sampling
        return Candidate(executable, work, features.memory(context.piece, degree, False), reason)

    @staticmethod
    def _work(context: Context, rows: int) -> Work:
        """The work of drawing so many rows of each slot and computing them exactly; if causal, each costs a tile."""
        outline = context.outline
        share = min(1.0, rows * (TILE if outline.mask.causal else 1) / math.prod(outline.sizes[1:3]))
        return exact_work(outline, False).times(share) + sample_work(outline, False)

    @staticmethod
    def _trials(context: Context, allowed: np.ndarray, sampling: Work, limit: float) -> list[Trial]:
        """The polynomials of the slots to try, by degree, as long as trying all takes less than `limit` seconds."""
        outline, degree, statistics = context.outline, context.request.degree, context.statistics
        bounds = np.where(allowed > 0, statistics.scores.of_slots, np.inf).tolist()
        kappas, trials, total = statistics.sample.kappa().tolist(), [], 0.0
        for g in [degree] if degree else range(1, MOST + 1):
            p = tuple(_polynomial(g, *own) for own in zip(bounds, kappas, strict=True))
            total += (polynomial_work(outline, g, False) + sampling).nominal
            if total >= limit or not fits(features.memory(context.piece, g, False)):
                break
            if any(own is not None for own in p):
                trials.append(p)
        return trials


def _sampled_rows(outline: Outline) -> int:
    """How many rows of each slot judge its polynomial."""
    slots, rows = outline.origin.alike or outline.sizes.H, math.prod(outline.sizes[1:3])
    return min(rows, max(_SAMPLED_ROWS // slots, TILE))


def _polynomial(degree: int, B: float, kappa: float) -> MomentPolynomial | None:
    """The polynomial of this degree for scores within B, if there is one; kappa is as in `Sample.kappa`."""
    if B > poly.MAX_BOUND:
        return None
    B = poly.B_grid(B)
    if degree == 1:
        return MomentPolynomial(B, 1, (1.0, 1.0), 0, (0.0, 0.0), 0.0)
    return fit_moments(B, degree, kappa / B**2 * (degree == 2))
