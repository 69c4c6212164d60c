"""The rows of q, k or v: products of the user's arrays, rotated and laid out slot by slot.

The adjoint of these steps takes gradients back to the user's arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import checks, projections
from .communicator import Communicator
from .projections import sum_to

# How many unit roundoffs, relative to its norm, a rotation changes a row by at most. Cosines and sines are rounded, and
# each entry is a sum of two products.
_ROTATED = 2.0


@dataclass(slots=True)
class Rows:
    """One of q, k, v.

    Attributes
    ----------
    factors : dict
        The arrays whose product the rows are, by the names of the arguments: first the rows, then projections.
    batch, heads
        The axes of the batch, and the number of heads. There is a slot for each head of each batch element.
    positions : array or None
        The positions by which rows are rotated; None where they are not rotated.
    rotate : callable or None
        ``rotate(X, positions)`` rotates rows; with ``adjoint=True`` it is the adjoint of that.
    shape : tuple of int
        The shape of the product of the factors; `slots` sets it.
    lost : float
        By how much rounding has changed a row at most, relative to the norm of the longest row of its head; `slots`
        sets it.
    """

    factors: dict[str, np.ndarray]
    batch: tuple[int, ...]
    heads: int
    positions: np.ndarray | None = None
    rotate: Callable[..., np.ndarray] | None = None
    shape: tuple[int, ...] = field(init=False)
    lost: float = 0.0

    def slots(self) -> np.ndarray:
        """The rows as a C-contiguous array (batch * heads, rows, width).

        It is the user's own memory where the user's array needs no product, rotation, repetition or copy.
        """
        X, *others = self.factors.values()
        if others:
            # Products of contiguous arrays are bitwise the same whatever the layout of what the user passed.
            self.factors = {name: contiguous(factor) for name, factor in self.factors.items()}
            X, *others = self.factors.values()
            X, self.lost = projections.product([X, *others])
            checks.check_finite(" @ ".join(self.factors), X)
        if self.positions is not None:
            self.lost += _ROTATED * float(np.finfo(X.dtype).eps) / 2
        self.shape = X.shape
        if self.positions is None:
            X = spread(X, self.batch, self.heads)
        elif self.positions.ndim == 1:
            # X is rotated before it is repeated for heads and batch elements, so that each row is rotated once.
            X = spread(self.rotate(X, self.positions), self.batch, self.heads)
        else:
            X = spread(X, self.batch, self.heads)
            X = self.rotate(X, self._slot_positions())
        return contiguous(X)

    def gradients(self, dX: np.ndarray, exponent: int | np.ndarray, comm: Communicator) -> dict[str, np.ndarray]:
        """The gradient of each factor, by name, times 2^exponent, from dX, the gradient of the slots.

        dX is overwritten. `exponent` is one number, or one for each slot.
        """
        if np.ndim(exponent):
            largest = int(exponent.max())
            dX, exponent = np.ldexp(dX.astype(np.float64), (exponent - largest)[:, None, None]), largest
        if self.positions is not None and self.positions.ndim > 1:
            dX = self._rotate_back(dX, self._slot_positions())
        dX = _gather(dX, self.batch, self.heads, self.shape)
        if self.positions is not None and self.positions.ndim == 1:
            dX = self._rotate_back(dX, self.positions)
        if len(self.factors) > 1:
            return projections.gradients(self.factors, dX, exponent, comm)
        ((name, X),) = self.factors.items()
        dX = sum_to(dX, X.shape)
        return {name: np.ldexp(dX, exponent) if exponent else dX}

    def _rotate_back(self, dX: np.ndarray, positions: np.ndarray) -> np.ndarray:
        dX = np.require(dX, requirements=["C", "A", "W"])
        return self.rotate(dX, positions, adjoint=True, out=dX)

    def _slot_positions(self) -> np.ndarray:
        return spread(self.positions[..., None], self.batch, self.heads)[..., 0]


def head_count(X: np.ndarray, inner: int) -> int:
    """The size of the axis of heads, which is followed by `inner` other axes; 1 where X has no axis of heads."""
    return X.shape[-1 - inner] if X.ndim > inner else 1


def spread(X: np.ndarray, batch: tuple[int, ...], heads: int) -> np.ndarray:
    """X (..., h, a, b) as (batch * heads, a, b), each of its h heads repeated for heads // h consecutive heads."""
    tail = X.shape[-2:]
    if not batch and X.shape == (heads,) + tail:
        return X
    if X.shape[:-2] != batch + (heads,):
        own = head_count(X, 2)
        X = X.reshape(X.shape[:-3] + (own, 1) + tail)
        X = np.broadcast_to(X, batch + (own, heads // max(own, 1)) + tail)
    return X.reshape((math.prod(batch) * heads,) + tail)


def _gather(dX: np.ndarray, batch: tuple[int, ...], heads: int, shape: tuple[int, ...]) -> np.ndarray:
    """The adjoint of `spread` for an array of this shape: dX summed over the copies that `spread` made."""
    own = shape[-3] if len(shape) > 2 else 1
    dX = dX.reshape(batch + (own, heads // max(own, 1)) + dX.shape[-2:])
    dX = dX.sum(axis=-3) if dX.shape[-3] != 1 else dX[..., 0, :, :]
    return sum_to(dX, shape)


def contiguous(X: np.ndarray) -> np.ndarray:
    """X itself where it is C-contiguous and aligned, which engines require; else a copy of X that is."""
    return X if X.flags.c_contiguous and X.flags.aligned else X.copy()
