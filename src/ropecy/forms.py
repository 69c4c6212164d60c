"""The forms of a bias b_t: what it is at each offset, how its gradient comes back, and how exp(b_t) factors far out.

Every form reads `values` (h or 1, width) float64, what `RelativeBias` was built of, a row for each head.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import exponentials

# Where the far field of a bias that is fitted begins.
_NEAR = 128


class Tail(NamedTuple):
    """exp(b_t) = sum_k exp(log_weight_k - rate_k |t|), within `error` relatively, where t <= -left or t >= right >= 1.

    Attributes
    ----------
    left, right : int
    log_weight, rate : (2, terms, h or 1) arrays
        Of the left side and of the right one; a rate is at least 0.
    error : float
    moments : bool
        Whether the gradient of what the bias was built of asks for sums of |t| dS over a side.
    ratio : (2, terms, h) array or None
        ``sum_k ratio_pk exp(log_weight_k - rate_k |t|)`` is exp(b_t) times the derivative of b_t by parameter p.
    """

    left: int
    right: int
    log_weight: NDArray[np.float64]
    rate: NDArray[np.float64]
    error: float = 0.0
    moments: bool = False
    ratio: NDArray[np.float64] | None = None


@dataclass(slots=True)
class FarGradient:
    """The gradient of a bias of which a far part was computed by its tail.

    Attributes
    ----------
    symbol : (H, G, m) float64 array or None
        In the near field, at all offsets.
    tail : Tail
    flow : (2, terms, slots) array
        The sum of dS over the pairs of a side, by terms. Query heads that share a slot's keys share the bias, and are
        added up.
    moment : (2, slots) array
        The sum of |t| dS over the pairs of a side, where the tail asks for it.
    """

    symbol: NDArray[np.float64] | None
    tail: Tail
    flow: NDArray[np.float64]
    moment: NDArray[np.float64]


class Form(Protocol):
    """What `RelativeBias` asks of each."""

    def symbol(self, values: NDArray, t: NDArray[np.int64]) -> NDArray[np.float64]:
        """b_t, (h or 1, len(t))."""

    def gradient(self, values: NDArray, t: NDArray[np.int64], dsymbol: NDArray) -> NDArray[np.float64]:
        """The adjoint of `symbol`'s derivative: (h or 1, width) from (h or 1, len(t))."""

    def tail(self, values: NDArray, longest: int, tolerance: float) -> Tail | None:
        """How exp(b_t) factors up to \\|t\\| = longest, or None where it does not."""

    def far_gradient(self, values: NDArray, far: FarGradient) -> NDArray[np.float64]:
        """(h or 1, width) from sums over a far field, its heads already those of the bias."""


class _Gather:
    """b_t is one of the values: ``values[index(t)]``."""

    def index(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the values b_t is, at each offset."""
        raise NotImplementedError

    def symbol(self, values, t):
        return values[:, self.index(t)]

    def gradient(self, values, t, dsymbol):
        width = values.shape[-1]
        return np.stack([np.bincount(self.index(t), weights=row, minlength=width) for row in dsymbol])

    def reach(self) -> tuple[int, int]:
        """The left and right of `Tail`: past them, the index does not change."""
        raise NotImplementedError

    def tail(self, values, longest, tolerance):
        left, right = self.reach()
        ends = np.stack([values[:, self.index(np.array([end]))].T for end in (-left, right)])
        return Tail(left, right, ends, np.zeros_like(ends))

    def far_gradient(self, values, far):
        gradient = np.zeros(values.shape)
        for side, end in enumerate((-far.tail.left, far.tail.right)):
            gradient[:, self.index(np.array([end]))[0]] += far.flow[side].sum(axis=0)
        return gradient


@dataclass(frozen=True, slots=True)
class Table(_Gather):
    """b_t = values[t + T - 1], the ends going on: the bias itself."""

    length: int

    def index(self, t):
        return np.clip(t + self.length // 2, 0, self.length - 1)

    def reach(self):
        return self.length // 2, max(1, self.length // 2)


@dataclass(frozen=True, slots=True)
class Buckets(_Gather):
    """T5's: short distances have a value each, longer ones share them by the logarithm of the distance."""

    num_buckets: int
    max_distance: int
    bidirectional: bool

    def index(self, t):
        t = np.asarray(t)
        buckets = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        side = buckets * (t > 0) if self.bidirectional else 0
        distance = np.abs(t) if self.bidirectional else np.maximum(-t, 0)
        exact = buckets // 2
        # In float32 and truncated, as in the implementations that tables are trained with.
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        share = ratio / np.float32(math.log(self.max_distance / exact))
        far = exact + (share * np.float32(buckets - exact)).astype(int)
        return side + np.where(distance < exact, distance, np.minimum(far, buckets - 1))

    def reach(self):
        left = self._last_begins(-1)
        return left, max(1, self._last_begins(1)) if self.bidirectional else 1

    def _last_begins(self, sign: int) -> int:
        """The distance from which on a side has its last bucket: halving finds it, for buckets rise with distance."""
        # Distances a little past max_distance, for what rounding does to its logarithm.
        distances = range(self.max_distance + 3)
        last = self.index(np.array([sign * distances[-1]]))[0]
        return bisect_left(distances, last, key=lambda distance: self.index(np.array([sign * distance]))[0])


class Linear:
    """ALiBi's: b_t = -slope |t|."""

    def symbol(self, values, t):
        return values * -np.abs(t)

    def gradient(self, values, t, dsymbol):
        return -(dsymbol * np.abs(t)).sum(axis=1, keepdims=True)

    def tail(self, values, longest, tolerance):
        if np.any(values < 0):
            return None
        rate = np.stack([values.T, values.T])
        return Tail(0, 1, np.zeros_like(rate), rate, moments=True)

    def far_gradient(self, values, far):
        return -far.moment.sum(axis=0)[:, None]


class Logarithmic:
    """KERPLE's: b_t = -r_1 log(1 + r_2 |t|), values being r_1, r_2."""

    def symbol(self, values, t):
        return -values[:, :1] * np.log1p(values[:, 1:] * np.abs(t))

    def derivatives(self, values, t):
        """Of b_t by r_1 and r_2: (h, 2, len(t))."""
        grown = values[:, 1:] * np.abs(t)
        return np.stack([-np.log1p(grown), -values[:, :1] * np.abs(t) / (1 + grown)], axis=1)

    def gradient(self, values, t, dsymbol):
        return np.einsum("hpt,ht->hp", self.derivatives(values, t), dsymbol)

    def tail(self, values, longest, tolerance):
        return _fitted(self, values, longest, tolerance)

    def far_gradient(self, values, far):
        return np.einsum("pkh,skh->hp", far.tail.ratio, far.flow)


class Power(Logarithmic):
    """KERPLE's: b_t = -r_1 |t|^{r_2}, values being r_1, r_2."""

    def symbol(self, values, t):
        return -values[:, :1] * np.abs(t).astype(np.float64) ** values[:, 1:]

    def derivatives(self, values, t):
        m = np.abs(t).astype(np.float64)
        grown = m ** values[:, 1:]
        return np.stack([-grown, -values[:, :1] * grown * np.log(np.maximum(m, 1e-300))], axis=1)

    def tail(self, values, longest, tolerance):
        # Past 1 no sum of positive exponentials is near; at 1 the bias has one rate, of which no sum is the derivative.
        return None if np.any(values[:, 1] >= 1) else _fitted(self, values, longest, tolerance)


def _fitted(form: Logarithmic, values: NDArray, longest: int, tolerance: float) -> Tail | None:
    """Sums of exponentials for every head, padded to one number of terms."""
    longest = 1 << max(8, int(longest - 1).bit_length())
    tolerance = 2.0 ** math.floor(math.log2(tolerance))
    terms = [_fitted_head(form, tuple(map(float, row)), longest, tolerance) for row in values]
    if any(term is None for term in terms):
        return None
    most = max(len(rate) for _, rate, _, _ in terms)
    log_weight, rate = np.full((2, most, len(terms)), -np.inf), np.zeros((2, most, len(terms)))
    ratio = np.zeros((2, most, len(terms)))
    for head, (w, r, _, s) in enumerate(terms):
        log_weight[:, : len(w), head], rate[:, : len(r), head], ratio[:, : len(r), head] = w, r, s
    error = max(error for _, _, error, _ in terms)
    return Tail(_NEAR, _NEAR, log_weight, rate, error, ratio=ratio)


@lru_cache(maxsize=64)
def _fitted_head(form, row, longest, tolerance):
    """log weights, rates, error and ratios of one head."""
    values = np.array([row])
    fitted = exponentials.fit(lambda m: form.symbol(values, m)[0], _NEAR, longest, tolerance)
    if fitted is None:
        return None
    w, r, error = fitted
    m = np.unique(np.round(np.geomspace(_NEAR, longest, 400)))
    columns = np.exp(w - np.outer(m, r) - form.symbol(values, m).T)
    derivatives = form.derivatives(values, m)[0]
    size = np.abs(derivatives).max(axis=1, keepdims=True)
    ratio = np.linalg.lstsq(columns, (derivatives / size).T, rcond=None)[0].T
    if np.abs(ratio @ columns.T - derivatives / size).max() > 16 * tolerance:
        return None
    return w, r, error, ratio * size
