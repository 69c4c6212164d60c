"""Predicted seconds, by constants in this file, so that all machines with one instruction set make the same choices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import numpy as np

from ..kernels import _exact
from ..problem.problem import Outline

# The problem on which this machine is compared with the table of speeds: how many queries and keys, and their width.
REFERENCE = 384, 32


@dataclass(frozen=True, slots=True)
class Speeds:
    """What each operation takes on one thread, in nanoseconds.

    Attributes
    ----------
    product : float
        A multiply-add in a product of matrices: for scores, for values, or for monomials with a state.
    pair, pair_grad : float
        What a pair of a query and a key costs the exact engine beside its products, mostly exp; forward and backward.
    near : float
        The same for a pair inside a causal chunk of the polynomial engine.
    feature : float
        Reading or differentiating one monomial of one token.
    pack : float
        Laying out one entry of a state for products.
    """

    product: float
    pair: float
    pair_grad: float
    near: float
    feature: float
    pack: float


# Fitted to times of one thread of an AMD EPYC (Zen 4) for 256 to 16,384 tokens, d = 8, 16, 32, 64 and degrees 2 to 6,
# forward and with gradient, causal or not. Of the predictions for 512 to 8,192 tokens, exact and of degrees 2 and 4,
# 96% are within a factor of 1.2 with v4 and v3 in float32, and all within 1.4; 98% with v4 in float64, where gradients
# of d = 64 take twice as long as predicted; 92% with baseline in float32, and all within 1.6.
_SPEEDS = {
    ("baseline", "float32"): Speeds(0.060, 0.67, 1.00, 1.49, 0.36, 0.3),
    ("baseline", "float64"): Speeds(0.131, 2.58, 3.93, 3.32, 0.55, 0.3),
    ("v3", "float32"): Speeds(0.0181, 0.22, 0.43, 0.46, 0.11, 0.3),
    ("v3", "float64"): Speeds(0.0420, 0.66, 1.05, 1.16, 0.22, 0.3),
    ("v4", "float32"): Speeds(0.0172, 0.14, 0.50, 0.54, 0.067, 0.3),
    ("v4", "float64"): Speeds(0.0389, 0.37, 0.68, 1.23, 0.137, 0.3),
}
_LEVELS = ("baseline", "v3", "v4")


class Work:
    """Predicted work, in seconds of one thread.

    Attributes
    ----------
    alone : float
        Seconds of work that one thread does while the others wait.
    parts : tuple of (float, float)
        (seconds, pieces) of work that is cut into equal pieces, each of which any thread may take.
    """

    __slots__ = ("_one", "_two", "alone", "parts")

    def __init__(self, alone: float = 0.0, parts: tuple[tuple[float, float], ...] = ()) -> None:
        self.alone, self.parts = alone, parts
        # The seconds with one thread and with two are kept, because planning adds and compares many works.
        self._one = self._two = alone
        if parts:
            self._one, self._two = self.seconds(1), self.seconds(2)

    def __add__(self, other: Work) -> Work:
        one, two = self._one + other._one, self._two + other._two
        return self._of(self.alone + other.alone, self.parts + other.parts, one, two)

    def times(self, factor: float) -> Work:
        """This work done `factor` times, or for a factor below 1 that share of it."""
        parts = tuple((seconds * factor, pieces) for seconds, pieces in self.parts)
        return self._of(self.alone * factor, parts, self._one * factor, self._two * factor)

    @classmethod
    def _of(cls, alone: float, parts: tuple[tuple[float, float], ...], one: float, two: float) -> Work:
        work = object.__new__(cls)
        work.alone, work.parts, work._one, work._two = alone, parts, one, two
        return work

    def seconds(self, threads: int) -> float:
        """The seconds that this work takes with that many threads, each of which takes whole pieces."""
        shared = 0.0
        for seconds, pieces in self.parts:
            shared += seconds * -(-pieces // threads) / pieces
        return self.alone + shared

    @property
    def nominal(self) -> float:
        """The seconds by which works are compared, whatever the number of threads.

        It is the geometric mean of the seconds with one thread and with two.
        """
        return math.sqrt(self._one * self._two)


def shared(work: Callable[..., Work]) -> Callable[..., Work]:
    """A decorator for ``work(outline, ...)``: the work of some slots is their share of that of all of their shape.

    So what is cheapest for a slot does not depend on how many others take the same.
    """

    @wraps(work)
    def of_share(problem: Outline, *arguments: object, **named: object) -> Work:
        share = problem.share
        if share == 1:
            return work(problem, *arguments, **named)
        every = problem.outline(sizes=problem.sizes._replace(H=problem.origin.alike))
        return work(every, *arguments, **named).times(share)

    return of_share


def speeds(dtype: np.dtype) -> Speeds:
    """The speeds of the instruction set in use, for float32 or float64."""
    # The name of a dtype takes NumPy microseconds to make.
    return _SPEEDS[_LEVELS[_exact.LEVEL], "float32" if dtype.itemsize == 4 else "float64"]


def operations_work(problem: Outline, operations: float) -> Work:
    """The work of so many floating-point operations: a multiply-add counts 2, exp 60 in float32 and 120 in float64."""
    s, keys = speeds(problem.dtype), 60 if problem.dtype == np.float32 else 120
    rate = (4 * REFERENCE[1] + keys) / (s.pair + 2 * REFERENCE[1] * s.product) * 1e9
    # The work can be cut evenly, so every thread gets the same number of pieces.
    return Work(0.0, ((operations / rate, 2 * problem.threads),))
