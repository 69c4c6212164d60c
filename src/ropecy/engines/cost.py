"""Predicted work: seconds by shipped constants, so that choices are the same on every machine of an instruction set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..kernels import _exact
from ..problem.problem import Outline

# Keys and queries, and the width, of the problem that this machine is compared with the table by.
REFERENCE = 384, 32


@dataclass(frozen=True, slots=True)
class Speeds:
    """Nanoseconds of one thread.

    Attributes
    ----------
    product : float
        A multiply-add of a product of matrices, of scores, of values or of monomials with a state.
    pair, pair_grad : float
        What a pair of the exact engine costs beside its products, forward and backward: exp.
    near : float
        Likewise of a pair in a causal chunk of the polynomial engine.
    feature : float
        A monomial of a token, read or differentiated.
    pack : float
        An entry of a state that is laid out for products.
    """

    product: float
    pair: float
    pair_grad: float
    near: float
    feature: float
    pack: float


# Fitted to 128 to 32,768 tokens, d = 8, 16, 64 and degrees 1 to 9, forward and with gradient, causal or not, of one
# thread of an AMD EPYC (Zen 4): v4 in float32 from 512 tokens on within 1.2 times in 95%, the others less closely, down
# to half (`asv run --bench Worst`).
_SPEEDS = {
    ("baseline", "float32"): Speeds(0.059, 1.00, 1.22, 1.36, 0.36, 2.7),
    ("baseline", "float64"): Speeds(0.128, 2.85, 3.73, 3.15, 0.57, 2.9),
    ("v3", "float32"): Speeds(0.0197, 0.33, 0.40, 0.66, 0.14, 2.0),
    ("v3", "float64"): Speeds(0.0423, 0.80, 1.04, 1.14, 0.23, 2.1),
    ("v4", "float32"): Speeds(0.0176, 0.168, 0.61, 0.90, 0.16, 1.7),
    ("v4", "float64"): Speeds(0.041, 0.35, 0.51, 1.08, 0.17, 2.9),
}
_LEVELS = ("baseline", "v3", "v4")


class Work:
    """Seconds of one thread: `alone`, and `parts` (seconds, pieces), whose pieces threads share."""

    __slots__ = ("_one", "_two", "alone", "parts")

    def __init__(self, alone: float = 0.0, parts: tuple[tuple[float, float], ...] = ()) -> None:
        self.alone, self.parts = alone, parts
        # Sums of works, of which a plan compares many, are sums of these.
        self._one = self._two = alone
        if parts:
            self._one, self._two = self.seconds(1), self.seconds(2)

    def __add__(self, other: Work) -> Work:
        one, two = self._one + other._one, self._two + other._two
        return self._of(self.alone + other.alone, self.parts + other.parts, one, two)

    def times(self, factor: float) -> Work:
        """Work that is done `factor` times, or that share of it."""
        parts = tuple((seconds * factor, pieces) for seconds, pieces in self.parts)
        return self._of(self.alone * factor, parts, self._one * factor, self._two * factor)

    @classmethod
    def _of(cls, alone: float, parts: tuple[tuple[float, float], ...], one: float, two: float) -> Work:
        work = object.__new__(cls)
        work.alone, work.parts, work._one, work._two = alone, parts, one, two
        return work

    def seconds(self, threads: int) -> float:
        """With that many threads, each of which takes whole pieces."""
        shared = 0.0
        for seconds, pieces in self.parts:
            shared += seconds * -(-pieces // threads) / pieces
        return self.alone + shared

    @property
    def nominal(self) -> float:
        """What choices go by, whatever the number of threads: the geometric mean of the seconds of one and of two."""
        return math.sqrt(self._one * self._two)


def speeds(dtype: np.dtype) -> Speeds:
    """Of the instruction set in use."""
    # The name of a dtype takes NumPy microseconds to make.
    return _SPEEDS[_LEVELS[_exact.LEVEL], "float32" if dtype.itemsize == 4 else "float64"]


def operations_work(problem: Outline, operations: float) -> Work:
    """Of so many multiply-adds times 2, exp counted as 60 in float32 and as 120 in float64."""
    s, keys = speeds(problem.dtype), 60 if problem.dtype == np.float32 else 120
    rate = (4 * REFERENCE[1] + keys) / (s.pair + 2 * REFERENCE[1] * s.product) * 1e9
    # Pieces of which any number of threads that is asked about has as many.
    return Work(0.0, ((operations / rate, 2 * problem.threads),))
