"""Products of the user's arrays, such as ``Q W_Q W``, and the gradients of their factors.

Both are computed in float64, for float32 arrays too, a few thousand rows at a time. Gradients are computed of factors
that a power of two has brought to about 1, and so is what comes from above: whatever their sizes are, a gradient is
finite, and has its digits, where the dtype can hold it.
"""

from __future__ import annotations

import math

import numpy as np

from .communicator import Communicator

# Rows that are multiplied together: float64 takes no more memory than this many rows do.
_ROWS = 4096
# Stands for the exponent of 0: less than that of any product of numbers.
_NONE = -(2**14)


def product(factors: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """The product of matrices, and what rounding has done to a row of it at most, relative to the longest row of the
    same head; of all heads the worst.

    Sums are float64 for float32 too, where then only the rounding of the result counts, however much cancels. In
    float64 an entry of ``x W`` is off by about a unit of ``||x||`` times the norm of the column, which is more than a
    unit of the result where terms cancel.
    """
    first, *others = factors
    wide = [W.astype(np.float64, copy=False) for W in others]
    norms, parts = [np.zeros(())] * len(factors), []
    with np.errstate(all="ignore"):
        for at in range(0, max(first.shape[-2], 1), _ROWS):
            X = first[..., at : at + _ROWS, :].astype(np.float64, copy=False)
            norms[0] = np.maximum(norms[0], _longest(X))
            for step, W in enumerate(wide, start=1):
                X = np.matmul(X, W)
                norms[step] = np.maximum(norms[step], _longest(X))
            parts.append(X.astype(first.dtype, copy=False))
        lost = np.zeros(())
        for W, before, after in zip(wide, norms, norms[1:], strict=False):
            size = before * _longest(W.reshape(*W.shape[:-2], 1, W.shape[-2] * W.shape[-1]))
            lost = (lost + 2.0**-53) * np.where(after > 0, size / after, 0)
    stored = 0.0 if first.dtype == np.float64 else float(np.finfo(first.dtype).eps) / 2
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
    return whole, float(lost.max(initial=0)) + stored


def gradients(
    factors: dict[str, np.ndarray], dX: np.ndarray, exponent: int, comm: Communicator
) -> dict[str, np.ndarray]:
    """The gradient of each factor of X, times 2^exponent, from that of X.

    That of the first factor is in its dtype; those of the others are float64, and of all pieces of a
    sequence together.
    """
    (name, first), *others = factors.items()
    powers = [_power(X) for X in factors.values()]
    wide = [np.ldexp(W.astype(np.float64), -power) for (_, W), power in zip(others, powers[1:], strict=True)]
    upstream = _power(dX)
    total = upstream + sum(powers)
    sums, parts = [0.0] * len(others), []
    for at in range(0, max(first.shape[-2], 1), _ROWS):
        lefts = [np.ldexp(first[..., at : at + _ROWS, :].astype(np.float64), -powers[0])]
        for W in wide[:-1]:
            lefts.append(np.matmul(lefts[-1], W))
        part = np.ldexp(dX[..., at : at + _ROWS, :].astype(np.float64), -upstream)
        for place in reversed(range(len(wide))):
            sums[place] = sums[place] + sum_to(np.matmul(lefts[place].swapaxes(-1, -2), part), wide[place].shape)
            part = np.matmul(part, wide[place].swapaxes(-1, -2))
        part = sum_to(part, first.shape[:-2] + part.shape[-2:])
        parts.append(np.ldexp(part, total - powers[0] + exponent).astype(first.dtype, copy=False))
    found = {name: parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)}
    for (name, _), dW, power in zip(others, sums, powers[1:], strict=True):
        own = np.ldexp(dW, total - power + exponent)
        found[name] = comm.total(own)
    return found


def sum_to(X: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The adjoint of broadcasting `shape` to the shape of X."""
    own = (1,) * (X.ndim - len(shape)) + shape
    repeated = tuple(a for a, size in enumerate(own) if size == 1 != X.shape[a])
    return (X.sum(axis=repeated) if repeated else X).reshape(shape)


def _power(X: np.ndarray) -> int:
    """The exponent of the power of two that is next above the largest entry."""
    largest = float(np.abs(X).max(initial=0))
    return math.frexp(largest)[1] if largest else _NONE


def _longest(X: np.ndarray) -> np.ndarray:
    """(...,): the largest norm of the rows of each matrix X (..., n, d), float64; neither overflows nor vanishes."""
    square = np.einsum("...d,...d->...", X, X).max(axis=-1, initial=0)
    if np.all((square > 1e-250) & (square < np.inf)):
        return np.sqrt(square)
    peak = np.abs(X).max(axis=(-2, -1), initial=0)
    X = X / np.where(peak > 0, peak, 1)[..., None, None]
    return peak * np.sqrt(np.einsum("...d,...d->...", X, X).max(axis=-1, initial=0))
