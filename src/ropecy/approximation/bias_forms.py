"""The functions b_t of the offset t that a relative bias can be, their derivatives, and how exp(b_t) factors.

Each form has the same four methods (`Form`). Their argument `values` is the float64 array (h or 1, width) that a
`RelativeBias` was built from: one row of parameters for each of h heads, or one row for all heads.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .exponential_sums import fit

# Where exp(b_t) is approximated by a sum of exponentials, the approximation is used for distances |t| >= _NEAR.
_NEAR = 128


class Tail(NamedTuple):
    """exp(b_t) = sum_k exp(log_weight_k - rate_k |t|) up to a relative error, for all t <= -left and all t >= right.

    Attributes
    ----------
    left, right : int
        right is at least 1.
    log_weight, rate : (2, terms, h or 1) arrays
        Index 0 is the side t < 0, index 1 the side t > 0. Rates are at least 0.
    error : float
        Bound of the relative error.
    moments : bool
        Whether the gradient by the bias's parameters needs the sum of |t| dS over the pairs of a side.
    ratio : (2, terms, h) array or None
        For a bias of two parameters: ``sum_k ratio_pk exp(log_weight_k - rate_k |t|)`` is about exp(b_t) times the
        derivative of b_t by parameter p, p = 0, 1.
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
    """What the gradient by a bias is computed from when its far part was computed by its `Tail`.

    dS is the gradient by the scores.

    Attributes
    ----------
    symbol : (H, G, m) float64 array or None
        For the near part: the sum of dS over the pairs of each of m offsets, for H key heads of G query heads each.
    tail : Tail
    flow : (2, terms, slots) array
        For the far part: the sum of dS over the pairs of a side, split by the terms of the tail. A slot is a key head,
        or a query head where the heads of a key head have biases of their own; heads that share one are added up.
    moment : (2, slots) array
        The sum of |t| dS over the pairs of a side, where `Tail.moments` asks for it.
    """

    symbol: NDArray[np.float64] | None
    tail: Tail
    flow: NDArray[np.float64]
    moment: NDArray[np.float64]


class Form(Protocol):
    """The methods that `RelativeBias` calls."""

    def symbol(self, values: NDArray, t: NDArray[np.int64]) -> NDArray[np.float64]:
        """b_t at the offsets t: (h or 1, len(t))."""

    def gradient(self, values: NDArray, t: NDArray[np.int64], dsymbol: NDArray) -> NDArray[np.float64]:
        """The gradient by `values`, (h or 1, width), given the gradient by `symbol`, (h or 1, len(t))."""

    def tail(self, values: NDArray, longest: int, tolerance: float) -> Tail | None:
        """How exp(b_t) factors for distances up to `longest`, with a relative error of at most `tolerance`, or None.

        None means that it does not factor so.
        """

    def far_gradient(self, values: NDArray, far: FarGradient) -> NDArray[np.float64]:
        """The part of the gradient by `values` that comes from the far part; its slots are the heads of the bias."""


class _Gather:
    """Base of the forms where each b_t is one of the values: b_t = values[index(t)]."""

    def index(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index of the value at each offset t."""
        raise NotImplementedError

    def symbol(self, values, t):
        return values[:, self.index(t)]

    def gradient(self, values, t, dsymbol):
        width = values.shape[-1]
        return np.stack([np.bincount(self.index(t), weights=row, minlength=width) for row in dsymbol])

    def reach(self) -> tuple[int, int]:
        """(left, right) of `Tail`: all t <= -left have the same index, and so do all t >= right."""
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
    """A table of length 2T - 1: b_t = values[t + T - 1] for |t| < T, and the first or the last value for other t."""

    length: int

    def index(self, t):
        return np.clip(t + self.length // 2, 0, self.length - 1)

    def reach(self):
        return self.length // 2, max(1, self.length // 2)


@dataclass(frozen=True, slots=True)
class Buckets(_Gather):
    """The bias of T5: each short distance has a value of its own, longer ones share values on a logarithmic scale."""

    num_buckets: int
    max_distance: int
    bidirectional: bool

    def index(self, t):
        t = np.asarray(t)
        buckets = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        side = buckets * (t > 0) if self.bidirectional else 0
        distance = np.abs(t) if self.bidirectional else np.maximum(-t, 0)
        exact = buckets // 2
        # This is computed in float32 and truncated, as in the implementations that models with such buckets were
        # trained with.
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        share = ratio / np.float32(math.log(self.max_distance / exact))
        far = exact + (share * np.float32(buckets - exact)).astype(int)
        return side + np.where(distance < exact, distance, np.minimum(far, buckets - 1))

    def reach(self):
        left = self._last_begins(-1)
        return left, max(1, self._last_begins(1)) if self.bidirectional else 1

    def _last_begins(self, sign: int) -> int:
        """The least distance that is in the last bucket of a side.

        It is found by bisection, since the index of the bucket increases with the distance.
        """
        # The last bucket begins at max_distance, or a little later, depending on how its logarithm is rounded.
        distances = range(self.max_distance + 3)
        last = self.index(np.array([sign * distances[-1]]))[0]
        return bisect_left(distances, last, key=lambda distance: self.index(np.array([sign * distance]))[0])


class Linear:
    """The bias of ALiBi: b_t = -slope |t|."""

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
    """The logarithmic bias of KERPLE: b_t = -r_1 log(1 + r_2 |t|); `values` has the columns r_1, r_2."""

    def symbol(self, values, t):
        return -values[:, :1] * np.log1p(values[:, 1:] * np.abs(t))

    def derivatives(self, values, t):
        """The derivatives of b_t by r_1 and by r_2: (h, 2, len(t))."""
        grown = values[:, 1:] * np.abs(t)
        return np.stack([-np.log1p(grown), -values[:, :1] * np.abs(t) / (1 + grown)], axis=1)

    def gradient(self, values, t, dsymbol):
        return np.einsum("hpt,ht->hp", self.derivatives(values, t), dsymbol)

    def tail(self, values, longest, tolerance):
        return _fitted(self, values, longest, tolerance)

    def far_gradient(self, values, far):
        return np.einsum("pkh,skh->hp", far.tail.ratio, far.flow)


class Power(Logarithmic):
    """The power bias of KERPLE: b_t = -r_1 |t|^{r_2}; `values` has the columns r_1, r_2."""

    def symbol(self, values, t):
        return -values[:, :1] * np.abs(t).astype(np.float64) ** values[:, 1:]

    def derivatives(self, values, t):
        m = np.abs(t).astype(np.float64)
        grown = m ** values[:, 1:]
        return np.stack([-grown, -values[:, :1] * grown * np.log(np.maximum(m, 1e-300))], axis=1)

    def tail(self, values, longest, tolerance):
        # For r_2 > 1 no sum of exponentials with positive weights is near exp(b_t). For r_2 = 1, exp(b_t) is a single
        # exponential, but the derivative of b_t by r_2 times exp(b_t) is no multiple of it.
        return None if np.any(values[:, 1] >= 1) else _fitted(self, values, longest, tolerance)


def _fitted(form: Logarithmic, values: NDArray, longest: int, tolerance: float) -> Tail | None:
    """The tail from a sum of exponentials for each head; all are padded to the same number of terms."""
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
    """log w_k, r_k, the relative error and the ratios of `Tail` for one head with the parameters `row`.

    None where no sum of exponentials is within the tolerance.
    """
    values = np.array([row])
    fitted = fit(lambda m: form.symbol(values, m)[0], _NEAR, longest, tolerance)
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
