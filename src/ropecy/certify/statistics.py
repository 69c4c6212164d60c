"""Measurements of a problem's numbers, each taken once, when it is first asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Problem, Slots
from .family_scores import measure_family
from .fourth_moments import Fourth, fourth_moments
from .hidden_keys import Hidden, hidden_keys
from .once import once
from .sample import Sample
from .scores import Norms, Scores, centred_scores, least_bounds, measure_norms, plain_scores
from .values import Values, measure_values


class Statistics:
    """Norms, bounds, ranges and samples of a problem.

    If the sequence is in pieces, `problem` is the piece of this process, while all measurements are of the whole
    sequence and the same on every rank. They need messages, so all ranks must ask for them in the same order.
    """

    def __init__(self, problem: Problem, comm: Communicator = SERIAL) -> None:
        self.problem, self._comm = problem, comm
        self._fourth: Fourth | None = None

    @once
    def _norms(self) -> Norms:
        return measure_norms(self.problem, self._comm)

    @once
    def plain(self) -> Scores:
        """Bounds of the scores by norms alone, for engines that need no more. Time O(n d)."""
        if self.problem.family is not None:
            return self.scores
        return plain_scores(self.problem, self._norms)

    @once
    def least_bounds(self) -> np.ndarray:
        """Numbers, (H,), that the bounds of the slots' scores exceed whatever the centres of their keys; inf where
        norms overflow.
        """
        if not math.isfinite(self.plain.plain):
            return np.full(self.problem.sizes.H, math.inf)
        return least_bounds(self.problem, self._norms.q)

    @once
    def scores(self) -> Scores:
        """Bounds of the scores, keys centred where that helps. Time O(n_k d) beside that of `plain`."""
        if self.problem.family is not None:
            return measure_family(self.problem)
        return centred_scores(self.problem, self._norms, self._comm)

    @once
    def values(self) -> Values:
        """Where the values lie. Time O(n_k d_v)."""
        return measure_values(self.problem, self._comm)

    @once
    def hidden(self) -> Hidden:
        """Runs of hidden keys. Time O(n_k)."""
        return hidden_keys(self.problem, self._comm)

    @once
    def sample(self) -> Sample:
        """Some rows and keys. Time O(n d), and d^2 for each of these."""
        return Sample(self.problem, self.scores, self.values, self._comm)

    def slots(self, which: Slots) -> Statistics:
        """The statistics of some of the slots; what has been measured of all is not measured again.

        If the sequence is in pieces, nothing is, so that no messages are needed.
        """
        found = Statistics(self.problem.slots(which), self._comm)
        found._norms = self._norms.slots(which)
        found.plain = plain_scores(found.problem, found._norms)
        found.scores = self.scores.slots(which, found.plain)
        if self._comm.distributed or "values" in vars(self):
            found.values = self.values.slots(which, found.problem)
        if self._comm.distributed or "hidden" in vars(self):
            found.hidden = self.hidden.slots(which)
        if "sample" in vars(self):
            found.sample = self.sample.slots(which)
        found._fourth = self._fourth and self._fourth.slots(which)
        return found

    def fourth(self, seed: int | None, which: np.ndarray) -> Fourth:
        """Bounds of fourth moments, at least in the slots that are True in `which`; inf where they were not measured.

        By random starts drawn from `seed`, at the first call for a slot. Time 40 n_k d^2 a slot.
        """
        known = self._fourth
        missing = which if known is None else which & np.isinf(known.largest).all(axis=1)
        if missing.any():
            slots = np.flatnonzero(missing)
            problem, scores = self.problem.slots(slots), self.scores.slots(slots, self.plain)
            found = fourth_moments(problem, scores, seed if known is None else known.seed)
            largest = np.full((len(which), len(found.stops)), np.inf) if known is None else known.largest.copy()
            largest[slots] = found.largest
            self._fourth = replace(found, largest=largest)
        return self._fourth
