"""What `DecodeState` promises before there are data: the bound of rows, the degree, and models of rounding."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from . import polynomial as poly
from ._validate_decode import DecodeOptions
from .certificate import BoundedEntryError

# How long a text the certificate's rounding speaks of.
_TOKENS = 10**7


def computed(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@lru_cache(maxsize=16)
def limit(bound: float, d: int, dtype: np.dtype) -> float:
    """The bound and the rounding of rows that were scaled to it: in what they are computed in, then stored in."""
    unit = float(np.finfo(computed(dtype)).eps)
    # An entry is off by half its dtype's epsilon, its square by one; twice that is allowed.
    stored = {2: 2.0**-7 if dtype.name == "bfloat16" else 2.0**-10}.get(dtype.itemsize, unit)
    return max(bound * (1 + 2 * stored + 4 * (d + 8) * unit), poly.B_grid(0.0))


def rounding(B: float, dtype: np.dtype, slopes: np.ndarray) -> float:
    """Of results, for values that are no larger than their range: the model of plan.py with values off by a range.

    Sums of n terms in float64 are off by sqrt(n / 3) units as a rule. A decay is off by a unit, the same at every
    token, and a product with it by another: 2 t for a token that is t back. In the mean over geometric weights t is at
    most 1 / slope, and e^{2B} times that under scores. The last term is the dtype's own.
    """
    unit = float(np.finfo(np.float64).eps) / 2
    cancelling = math.exp(min(2 * B, 700))
    decays = 2 * min(_TOKENS, 1 / float(np.min(slopes, where=slopes > 0, initial=math.inf)))
    return unit * (12 + (8 + math.sqrt(_TOKENS / 3) + decays) * cancelling) + float(np.finfo(computed(dtype)).eps)


def exact_rounding(d: int, dtype: np.dtype, slopes: np.ndarray, length: int, largest: float) -> float:
    """Of exact attention over a text of this length, scores being within `largest` beside their bias.

    A score is off in proportion to its size, and the result by the mean over the weights P. Of the bias that is at most
    2 `largest` + log n: P maximises sum_j P_j (s_j + b_j) + entropy(P), which is s_m at least, m the last token.
    """
    unit = float(np.finfo(computed(dtype)).eps) / 2
    bias = min(float(slopes.max()) * length, 2 * largest + math.log(length))
    return min(1.0, unit * (16 + math.sqrt(length / 96) + (2 + math.sqrt(d) / 2) * (largest + bias)))


def polynomial(o: DecodeOptions, dtype: np.dtype, slopes: np.ndarray) -> poly.Polynomial:
    """That of the smallest degree that certifies eps for what is within the bound."""
    B = limit(o.bound, o.d, dtype)
    lost = rounding(B, dtype, slopes)
    if lost < o.eps:
        e = poly.relative_error_for(o.eps - lost)
        needed = poly.smallest_degree(B, e)
        if needed is not None:
            degrees = range(max(1, needed - 1), max(1, needed) + 1)
            made = (poly.minimax(B, degree) for degree in degrees)
            return next((p for p in made if p.error <= e), poly.minimax(poly.B_grid(B), max(1, needed)))
    raise BoundedEntryError(
        f"bound: got {o.bound:g}, for which no degree certifies eps = {o.eps:g} ({dtype}: rounding alone is "
        f"{lost:.2g}); wants a smaller bound, or a larger eps"
    )
