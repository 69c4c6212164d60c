"""The exact engine: it takes every problem, needs no bound of the scores, and others are compared with it."""

from __future__ import annotations

import numpy as np

from ...certificate import Certificate
from ...certify.once import once
from ...certify.rounding import exact_rounding
from ...certify.scores import Scores, largest_scores
from ...certify.statistics import Statistics
from ...certify.values import Values
from ...problem.input_gradients import InputGradients
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Outline, Problem, Slots
from ...problem.traffic import Sender, Traffic, ring
from ..base import CHEAPEST, Candidate, Context, Engine, Executable, Refusal, Result, Search, gradient_of
from . import attention
from .cost import exact_bytes, exact_work
from .ring import Ring


class Exact(Executable):
    """Exact attention over all pairs that the mask allows.

    The rounding error is measured only when the certificate is asked for, since O does not depend on it.
    """

    engine = "exact"

    def __init__(self, outline: Outline, statistics: Statistics, grad: bool) -> None:
        self._outline: Outline | None = outline
        self._statistics: Statistics | None = statistics
        self._grad = grad

    @property
    def grad(self) -> bool:
        return self._grad

    @once
    def _scores(self) -> Scores:
        return self._statistics.plain

    @once
    def values(self) -> Values:
        return self._statistics.values

    @once
    def certificate(self) -> Certificate:
        rounding = exact_rounding(self._outline, self._scores, self.values)
        return Certificate("exact", None, None, self._scores.plain, "exact", 0.0, rounding)

    @property
    def gradient_certificate(self) -> Certificate | None:
        return gradient_of(self.certificate) if self._grad else None

    def measured_by(self, statistics: Statistics | None) -> Exact:
        if statistics is None:
            # What has been measured goes along, so that the numbers themselves need not.
            assert self.certificate is not None
        found = object.__new__(Exact)
        found.__dict__.update(self.__dict__)
        found._statistics, found._outline = statistics, None
        return found

    def slots(self, which: Slots) -> Exact:
        return self

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        if pieces.distributed:
            ring = Ring(problem, pieces, self._scores.plain)
            o, lse = ring.forward()
            return Result(o, lse, self, ring)
        # The gradient of the near field's scale needs the lse of the rows.
        want_lse = want_lse or (self._grad and problem.near is not None)
        # The kernels for families use no bounds.
        bounds = largest_scores(problem) if problem.family is None else np.inf
        o, lse, saved = attention.forward(problem, bounds, want_lse)
        return Result(o, lse, self, saved)

    def resume(self, problem: Problem, result: Result, o: np.ndarray, lse: np.ndarray) -> Result:
        return Result(o, lse, self, attention.resume(problem, np.inf, o, lse), result.found, result.gradient_found)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        if pieces.distributed:
            return result.saved.backward(do)
        near = None
        if problem.near is not None:
            near = attention.near_scale_gradient(problem, result.o, result.lse, do)
        found = attention.backward(problem, result.saved, do)
        found.scale_near = near
        return found

    def traffic(self, sender: Sender) -> Traffic:
        return ring(sender, sender.layout)


class ExactEngine(Engine):
    """Offers exact attention of any problem."""

    name = "exact"
    SUPPORTS = frozenset({"bias", "family", "near", "window", "causal", "key_mask"})
    needs_bound = False

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        lacking = self.lacks(context.outline)
        if lacking:
            return self.unable(lacking)
        request = context.request
        executable = Exact(context.outline, context.statistics, request.grad)
        reason = "method='exact'" if request.method == "exact" else CHEAPEST
        work = exact_work(context.outline, request.grad)
        return Candidate(executable, work, exact_bytes(context.piece, request.grad), reason)
