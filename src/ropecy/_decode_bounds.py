"""What `DecodeState` promises before there are data: the bound of rows, the degree, and models of rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ._validate_decode import DecodeOptions
from .approximation import minimax as poly
from .bounds import storing
from .certificate import BoundedEntryError
from .rounding import sums_rounding


def computed(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@lru_cache(maxsize=16)
def limit(bound: float, d: int, dtype: np.dtype) -> float:
    """The bound and the rounding of rows that were scaled to it: in what they are computed in, then stored in."""
    unit = float(np.finfo(computed(dtype)).eps)
    # An entry is off by half its dtype's epsilon, its square by one; twice that is allowed.
    stored = {2: 2.0**-7 if dtype.name == "bfloat16" else 2.0**-10}.get(dtype.itemsize, unit)
    return max(bound * (1 + 2 * stored + 4 * (d + 8) * unit), poly.B_grid(0.0))


def rounding(B: float) -> float:
    """Of sums and results in float64, in units of the range: the model of plan.py, values being off by a range.

    A sum is made of blocks of at most 2^16 tokens. Where its terms are all equal a block is rounded to one side, by
    half a unit for each of the 96 that are added up first, of the 32 of their sums, and of the 22 sums of those.
    Blocks are added without such a loss, and decays are exact, however long the text.
    """
    unit = float(np.finfo(np.float64).eps) / 2
    return unit * (12 + (8 + 75) * math.exp(min(2 * B, 700)))


def exact_rounding(d: int, dtype: np.dtype, slopes: np.ndarray, length: int, largest: float) -> float:
    """Of exact attention over such a text, in units of the range, scores being within `largest` beside their bias.

    A score is off in proportion to its size, and the result by the mean over the weights P. Of the bias that is at most
    2 `largest` + log n: P maximises sum_j P_j (s_j + b_j) + entropy(P), which is s_m at least, m the last token.
    Weights that are off move the result by no more than the range. Sums are the exact engine's, of values whose first
    is taken from all.
    """
    unit = float(np.finfo(computed(dtype)).eps) / 2
    bias = min(float(slopes.max()) * length, 2 * largest + math.log(max(1, length)))
    return sums_rounding(computed(dtype), length) + min(1.0, unit * (2 + math.sqrt(d) / 2) * (largest + bias))


@dataclass(slots=True)
class Values:
    """Where the values of all tokens lie.

    Attributes
    ----------
    first, least, most : (H, d_v) float64 arrays
    """

    first: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def none(cls, heads: int, d_v: int) -> Values:
        """Before the first token."""
        return cls(np.zeros((heads, d_v)), np.full((heads, d_v), math.inf), np.full((heads, d_v), -math.inf))

    def see(self, v: np.ndarray) -> None:
        """Tokens (H, n, d_v) have come."""
        low, high = (v[:, 0], v[:, 0]) if v.shape[1] == 1 else (v.min(axis=1), v.max(axis=1))
        self.least, self.most = np.minimum(self.least, low), np.maximum(self.most, high)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"first": self.first, "least": self.least, "most": self.most}

    def copy(self) -> Values:
        return Values(self.first.copy(), self.least.copy(), self.most.copy())

    @property
    def spread(self) -> np.ndarray:
        """The range of each column, 1 where it is constant."""
        return np.where(self.most > self.least, self.most - self.least, 1.0)

    def storing(self, dtype: np.dtype) -> float:
        """What storing a result in `dtype` costs, in units of the largest range; of max |v| where all are constant.

        A constant column loses nothing, being its first value and 0. In the others results lie between the ends.
        """
        spread, size = self.most - self.least, np.maximum(np.abs(self.least), np.abs(self.most))
        unit = float(spread.max(initial=0.0)) or float(size.max(initial=0.0)) or 1.0
        return storing(dtype, float(size.max(initial=0.0, where=spread > 0))) / unit


def largest_number(dtype: np.dtype) -> float:
    # NumPy does not know bfloat16.
    return float(np.finfo(dtype).max) if dtype.kind == "f" else (2 - 2.0**-7) * 2.0**127


def largest_score(dtype: np.dtype) -> float:
    """What exact attention takes: far from where products and sums of what makes a score overflow."""
    return largest_number(computed(dtype)) * 2.0**-20


def polynomial(o: DecodeOptions, dtype: np.dtype, degree: int | None = None) -> poly.Polynomial:
    """That of the smallest degree that certifies eps for what is within the bound; or that of `degree`, if it does.

    Rounding to a dtype narrower than float32 is no part of eps: it would leave nothing of it.
    """
    B = limit(o.bound, o.d, dtype)
    lost = rounding(B) + float(np.finfo(computed(dtype)).eps)
    if lost < o.eps:
        e = poly.relative_error_for(o.eps - lost)
        needed = degree or poly.smallest_degree(B, e)
        if needed is not None:
            degrees = [degree] if degree else range(max(1, needed - 1), max(1, needed) + 1)
            made = [poly.minimax(B, each) for each in degrees] + [poly.minimax(poly.B_grid(B), max(1, needed))]
            if found := next((p for p in made if p.error <= e), None):
                return found
    which = f"degree {degree} does not certify" if degree else "no degree certifies"
    raise BoundedEntryError(
        f"bound: got {o.bound:g}, for which {which} eps = {o.eps:g} ({dtype}: rounding alone is {lost:.2g}); wants a "
        "smaller bound, or a larger eps"
    )
