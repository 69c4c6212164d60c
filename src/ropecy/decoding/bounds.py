"""What a `DecodeState` promises and what it needs, before there are data: bounds, degree, rounding and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..approximation import minimax as poly
from ..certificate import BoundedEntryError, Certificate
from ..certify.rounding import sums_rounding
from ..certify.values import storing
from ..machine.memory import available_memory, fits
from .arguments import DecodeOptions
from .sums import BLOCK


def computed(dtype: np.dtype) -> np.dtype:
    """The dtype that exact attention computes in for data of this dtype: float64 for float64, float32 for others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@lru_cache(maxsize=16)
def limit(bound: float, d: int, dtype: np.dtype) -> float:
    """The largest |scale| ||x||^2 that is accepted: `bound`, and what rounding may add to it.

    A row that the user has scaled to the bound was rounded when its norm was computed, and once more when it was stored
    in its dtype.
    """
    unit = float(np.finfo(computed(dtype)).eps)
    # Storing changes an entry by half an epsilon of its dtype, relatively, and its square by one epsilon. Two are
    # allowed.
    stored = {2: 2.0**-7 if dtype.name == "bfloat16" else 2.0**-10}.get(dtype.itemsize, unit)
    return max(bound * (1 + 2 * stored + 4 * (d + 8) * unit), poly.B_grid(0.0))


def rounding(B: float) -> float:
    """The rounding error of results by sums in float64, in units of the range of values, for scores within [-B, B].

    This is the model of rounding of the polynomial engine. The first value is subtracted from all values, so that each
    is at most their range in size. A sum is made of blocks of at most 2^16 tokens. In the worst case all terms of a
    block are equal and each addition rounds to the same side, by half a unit: 96 terms are added up first, then 32 of
    these sums, then 22 of the sums of sums. Blocks are added with compensation and decays are exact, so that the length
    of the text doesn't matter.
    """
    unit = float(np.finfo(np.float64).eps) / 2
    return unit * (12 + (8 + 75) * math.exp(min(2 * B, 700)))


def rounding_of_near(o: DecodeOptions, B: float) -> float:
    """The rounding error that scores of near tokens add to results, in units of the range of values.

    They are within [-S, S], S = max |scale_near / scale| B, in float64, and each is off by (8 + sqrt(d) / 2) S units:
    rows are multiplied and rotated, products are summed and multiplied, and the largest exponent is taken from them.
    Where scores are off by e, a result moves by at most e times the range, and never by more than the range.
    """
    unit = float(np.finfo(np.float64).eps) / 2
    return min(1.0, unit * (8 + math.sqrt(o.d) / 2) * o.largest_stretch * B) if o.near else 0.0


def exact_rounding(o: DecodeOptions, dtype: np.dtype, slope: float, length: int, largest: float) -> float:
    """The rounding error of exact attention over a text, in units of the range of values.

    Scores s_j by `scale`, without their bias b_j, are within [-largest, largest], and n = `length`. Near ones are
    larger where scale_near is, and the bias falls by `slope` at most. Rounding changes a score in
    proportion to its size, and the result by the mean of these changes over the softmax weights P. The mean of |b_j|
    over P is at most 2 `largest` + log n, since P maximises sum_j P_j (s_j + b_j) + entropy(P), which is at least s_m
    for the last token m, whose bias is 0. However wrong the weights are, the result changes by no more than the range.
    What summation adds is that of the exact engine.
    """
    unit, size = float(np.finfo(computed(dtype)).eps) / 2, largest * max(1.0, o.largest_stretch)
    bias = min(slope * length, 2 * size + math.log(max(1, length)))
    return sums_rounding(computed(dtype), length) + min(1.0, unit * (2 + math.sqrt(o.d) / 2) * (size + bias))


@dataclass(slots=True)
class Values:
    """The first, the least and the largest value of each column over all tokens of a stream.

    Attributes
    ----------
    first, least, most : (streams, H, d_v) float64 arrays
    """

    first: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def none(cls, shape: tuple[int, int, int]) -> Values:
        """The object before the first token."""
        return cls(np.zeros(shape), np.full(shape, math.inf), np.full(shape, -math.inf))

    def see(self, v: np.ndarray, streams: np.ndarray) -> None:
        """Take the values (m, H, n, d_v) of new tokens of these streams into account."""
        low, high = (v[:, :, 0], v[:, :, 0]) if v.shape[2] == 1 else (v.min(axis=2), v.max(axis=2))
        if len(streams) == len(self.least):
            self.least, self.most = np.minimum(self.least, low), np.maximum(self.most, high)
            return
        least, most = self.least.copy(), self.most.copy()
        least[streams], most[streams] = np.minimum(least[streams], low), np.maximum(most[streams], high)
        self.least, self.most = least, most

    def arrays(self) -> dict[str, np.ndarray]:
        """The three arrays by name."""
        return {"first": self.first, "least": self.least, "most": self.most}

    def of(self, streams: np.ndarray | int) -> Values:
        """An object with copies of the values of these streams, (m, H, d_v), or of one, (H, d_v)."""
        return Values(*(array[streams].copy() for array in self.arrays().values()))

    def forget(self, streams: np.ndarray) -> None:
        """Let these streams have no tokens."""
        self.least, self.most = self.least.copy(), self.most.copy()
        self.least[streams], self.most[streams] = math.inf, -math.inf

    def draft(self) -> Values:
        """A second object with the same arrays: when it sees further values, this one does not change."""
        return Values(self.first, self.least, self.most)

    @property
    def spread(self) -> np.ndarray:
        """The range of each column; 1 where the column is constant."""
        return np.where(self.most > self.least, self.most - self.least, 1.0)

    def storing(self, dtype: np.dtype) -> float:
        """The error of storing a result in `dtype`, in units of the largest range of a column.

        Where all columns are constant, the unit is max |v|. A constant column loses nothing, since its results are its
        first value. In other columns results lie between the least and the largest value, which bounds their rounding.
        """
        spread, size = self.most - self.least, np.maximum(np.abs(self.least), np.abs(self.most))
        unit = float(spread.max(initial=0.0)) or float(size.max(initial=0.0)) or 1.0
        return storing(dtype, float(size.max(initial=0.0, where=spread > 0))) / unit


def largest_number(dtype: np.dtype) -> float:
    """The largest finite number of a dtype."""
    # np.finfo does not know bfloat16.
    return float(np.finfo(dtype).max) if dtype.kind == "f" else (2 - 2.0**-7) * 2.0**127


def largest_score(o: DecodeOptions, dtype: np.dtype) -> float:
    """The largest |scale| ||x||^2 that exact attention accepts: no part of a score comes near overflow below it."""
    return largest_number(computed(dtype)) * 2.0**-20 / max(1.0, o.largest_stretch)


def polynomial(o: DecodeOptions, dtype: np.dtype, degree: int | None = None) -> poly.Polynomial:
    """The polynomial of the smallest degree that certifies eps within the bound, or of `degree` if that certifies it.

    Rounding results to float16 or bfloat16 is not counted against eps, since it alone can be larger than eps.
    """
    B = limit(o.bound, o.d, dtype)
    lost = rounding(B) + rounding_of_near(o, B) + float(np.finfo(computed(dtype)).eps)
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


def certificate(o: DecodeOptions, p: poly.Polynomial, dtype: np.dtype, stored: float) -> Certificate:
    """What is promised of a result by sums, whose storing adds the error `stored`."""
    B = limit(o.bound, o.d, dtype)
    return Certificate(
        engine="polynomial",
        degree=p.degree,
        n_features=poly.n_features(o.d, p.degree),
        bound=p.B,
        rule="worst case",
        truncation=poly.tau(p.error),
        rounding=rounding(B) + rounding_of_near(o, B) + stored,
    )


def check_memory(o: DecodeOptions, degree: int, heads: int, states: int, remembered: float = 0) -> None:
    """MemoryError where a state doesn't fit into what the machine has left.

    Parameters
    ----------
    o : DecodeOptions
    degree : int
        The degree of the polynomial.
    heads : int
        H, the product of all leading axes.
    states : int
        The number of sums for each head: as many as there are different slopes, or 1.
    remembered : float
        The mean number of tokens in the history of a stream; 0 without a history.
    """
    features = poly.n_features(o.d, degree)
    ring = (o.recent + BLOCK + 1) * (o.d + o.d_v + 1)
    size = 8.0 * heads * (2 * (o.d_v + 1) * states * features + ring)
    if o.on_break == "exact":
        size += float(heads) * remembered * (o.d + o.d_v) * computed(o.dtype or np.dtype(np.float32)).itemsize
    if not fits(size):
        raise MemoryError(
            f"the state needs {size / 2**30:.3g} GiB ({heads * states} x {features:,} features, degree "
            f"{degree}), and {available_memory() / 2**30:.3g} GiB are available"
        )
