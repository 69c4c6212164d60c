"""How a problem is split into an exact near field and polynomial problems for the far pairs.

Let ``exp(b_t) = sum_k exp(c_k - r_k |t|)`` for the offsets t <= -left and t >= right. Each term k of each side is then
a causal polynomial problem: it is shifted so that a row sees the keys from that distance on, and its weights fall by a
factor exp(-r_k) with each token. The right side is the left side of the reversed sequences. The exact engine computes
the pairs between. Each part is a softmax over its own keys, and all parts are merged by their lse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ...approximation.bias_forms import Tail
from ...certify.hidden_keys import Hidden
from ...certify.rounding import (
    Magnitudes,
    bias_reach,
    rounding_of_monomials,
    rounding_of_pairs,
    score_size,
    seen_bias,
)
from ...certify.statistics import Statistics
from ...problem.pieces import Layout
from ...problem.problem import Outline, Problem
from ..cost import Work
from ..exact.cost import exact_work
from ..polynomial import features
from ..polynomial.cost import polynomial_work

_FADED = 60.0  # the largest exponent by which the nearest key of a row may decay: exp(-60) is a normal float32
_MERGE = 4e-10  # seconds to merge an entry of O with that of another part

Part = TypeVar("Part", bound=Outline)


@dataclass(slots=True)
class Far:
    """One term of one side: keys at the distance `first` and beyond, with weights exp(log_weight - rate |t|).

    Attributes
    ----------
    right : bool
        Whether the keys lie after the row, at t > 0.
    term : int
        The index of the term in the sum of exponentials.
    first : int
    log_weight : (H, G) float64 array
    rate : (H,) float64 array or None
        None is 0 everywhere.
    """

    right: bool
    term: int
    first: int
    log_weight: np.ndarray
    rate: np.ndarray | None


@dataclass(slots=True)
class Split:
    """How a problem is split into a near field and far parts.

    Attributes
    ----------
    ungrouped : bool
        Whether every query head gets a slot of its own, because the heads of a group have different tails.
    near : (int, int) or None
        The band (lo, hi) of offsets between the two sides; None if there are no pairs in it.
    far : list of Far
    tail : Tail
        The sum of exponentials that stands for the bias at large distances.
    peak : (H or 1, G or 1) float64 array or None
        The largest bias that is seen. It is subtracted in all parts and added to the lse at the end: a large bias that
        all keys have, such as 1e9, would leave no digits for the differences of lse by which parts are merged.
    """

    ungrouped: bool
    near: tuple[int, int] | None
    far: list[Far]
    tail: Tail
    peak: np.ndarray | None = None

    def __str__(self) -> str:
        exactly = "no near field" if self.near is None else f"an exact near field of {self.near[1] - self.near[0] + 1}"
        decayed = sum(far.rate is not None for far in self.far)
        states = f"{len(self.far)} state{'s' * (len(self.far) > 1)}, {decayed} of them decayed"
        return f"{exactly}, {states}"

    def whole(self, problem: Problem) -> Problem:
        """The problem with a slot for each query head, if `ungrouped`, and with the peak subtracted from its bias."""
        whole = problem.ungrouped() if self.ungrouped else problem
        return whole if whole.bias is None else replace(whole, bias=self.below_peak(whole.bias))

    def outline(self, problem: Outline) -> Outline:
        """The outline of `whole`, with no keys hidden."""
        H, G = problem.sizes[:2]
        sizes = problem.sizes._replace(H=H * G, G=1) if self.ungrouped else problem.sizes
        return problem.outline(sizes=sizes, mask=replace(problem.mask, kept=None))

    def near_layout(self, layout: Layout) -> Layout:
        """The layout of a sequence in pieces, with the band of the near field."""
        return replace(layout, lo=self.near[0], hi=self.near[1])

    def near_part(self, whole: Part) -> Part:
        """The problem of the pairs between the sides."""
        return replace(whole, mask=replace(whole.mask, lo=self.near[0], hi=self.near[1]))

    def below_peak(self, bias: np.ndarray) -> np.ndarray:
        """A bias (H or 1, G or 1, m) less the peak."""
        return bias - self.peak[..., None]


def split(problem: Outline, tolerance: float) -> tuple[Split | None, str | None]:
    """The parts of a problem, and None; or None, and why it has none.

    The sums of exponentials have a relative error of at most `tolerance`.
    """
    H, G, mask = problem.sizes.H, problem.sizes.G, problem.mask
    longest = max(mask.most, -mask.least, 1)
    plain = Tail(0, 1, np.zeros((2, 1, 1)), np.zeros((2, 1, 1)))
    tail = plain if problem.bias is None else problem.tail(longest, tolerance)
    if tail is None:
        return None, f"a bias whose far field no sum of exponentials fits within {tolerance:.2g}"
    found = Split(tail.rate.shape[-1] > 1 and G > 1, None, [], tail)
    outline = found.outline(problem)
    H, G = outline.sizes[:2]
    left, right = tail.left, tail.right
    if problem.near is not None:
        left, right = max(left, problem.near.width), max(right, problem.near.width)
    rates = np.broadcast_to(tail.rate, (2, tail.rate.shape[1], H * G)).reshape(2, -1, H, G)[..., 0]
    weights = np.broadcast_to(tail.log_weight, rates.shape[:2] + (H * G,)).reshape(2, -1, H, G)
    if problem.bias is not None:
        found.peak = seen_bias(problem).max(axis=-1)
        if found.ungrouped:
            found.peak = found.peak.reshape(-1, 1)
        weights = weights - found.peak
    for side, first in enumerate((left, right)):
        if side == 1 and mask.causal:
            continue
        part = _far_outline(outline, first, side == 1)
        if part.empty:
            continue
        for term in range(rates.shape[1]):
            rate = rates[side, term]
            if not np.isfinite(weights[side, term]).any():
                continue
            found.far.append(Far(side == 1, term, first, weights[side, term], rate.copy() if rate.any() else None))
    if not found.far:
        return None, "a near field without a far one"
    found.near = (1 - left, 0 if mask.causal else right - 1)
    if found.near[0] > found.near[1] or found.near_part(outline).empty:
        found.near = None
    return found, None


def faded(found: Split, problem: Outline, statistics: Statistics) -> np.ndarray:
    """In which slots so many keys are hidden that a decayed state fades away before a row that sees it, (H,)."""
    outline, H = found.outline(problem), problem.sizes.H
    lost = np.zeros(H, bool)
    for far in found.far:
        if far.rate is not None:
            gap = _longest_gap(_far_outline(outline, far.first, far.right), statistics.hidden, far.right)
            lost |= (far.rate.reshape(H, -1) * gap[:, None] > _FADED).any(axis=1)
    return lost


def _far_outline(outline: Outline, first: int, right: bool) -> Outline:
    """The causal outline of one side, in which row i sees the keys j <= i + q_offset - first.

    For the right side it is that of the reversed sequences.
    """
    mask = outline.mask.reversed() if right else outline.mask
    return replace(outline, mask=replace(mask, lo=None, hi=0, offset=mask.offset - first), bias=None, near=None)


def _longest_gap(part: Outline, hidden: Hidden, right: bool) -> np.ndarray:
    """An upper bound, for each slot, of the distance between a row of a side and the last key that it sees, (H,)."""
    n, n_k = part.sizes.n, part.sizes.n_k
    start, end = (hidden.end, hidden.start) if right else (hidden.start, hidden.end)
    gap = np.maximum(hidden.between, np.maximum(0, end + n - 1 + part.mask.offset - (n_k - 1)))
    return np.where(start < n_k, gap, 0)


def rounding(split: Split, problem: Outline, m: Magnitudes) -> np.ndarray:
    """A bound of the rounding error of O: of the far parts, of the near field, and of merging them.

    Parts are merged by differences of lse, which are float64 numbers as large as the distance of a row's best key from
    the peak. Their rounding errors are independent, so they grow with the square root of the number of merges.
    """
    total = rounding_of_monomials(problem, m) + 2 * problem.unit * len(split.far) * (1 + m.offset)
    merges = len(split.far) + (split.near is not None) - 1
    if problem.bias is not None and merges:
        reach = bias_reach(problem, score_size(m))
        total = total + np.minimum(1.0, 2 * 2.0**-53 * math.sqrt(merges) * reach)
    if split.near is None:
        return total
    return total + rounding_of_pairs(split.near_part(problem), m, problem.sizes.n_k)


def work(split: Split, problem: Outline, degree: int, grad: bool) -> Work:
    """The work of forward, and of backward if `grad`."""
    outline = split.outline(problem)
    H, G, n, _, _, d_v = outline.sizes
    total = Work(H * G * n * (d_v + 4) * _MERGE * len(split.far))
    for far in split.far:
        total += polynomial_work(_far_outline(outline, far.first, far.right), degree, grad)
    return total if split.near is None else total + exact_work(split.near_part(outline), grad)


def memory(split: Split, problem: Outline, degree: int, grad: bool) -> float:
    """The bytes that a split needs beyond inputs and outputs."""
    outline = split.outline(problem)
    H, G, n, n_k, d, d_v = outline.sizes
    item = outline.dtype.itemsize
    rows, keys = H * G * n, H * n_k
    size = rows * (16 + d_v * item)
    if split.near is not None:
        size += (keys * d + rows * (2 * item + (2 * (d + d_v) if grad else 0))) * item
    if any(far.right for far in split.far):
        size += (rows * (d + d_v) + keys * (d + d_v)) * item
    each = rows * (8 + item) + (keys * (d + d_v) + rows * d) * item * grad
    state = features.memory(replace(outline, mask=replace(outline.mask, hi=0)), degree, grad)
    return size + state + len(split.far) * each
