"""Products of the user's arrays, such as ``Q W_Q W``, and the gradients of their factors.

Both are computed in float64, for float32 arrays too, a few thousand rows at a time. For gradients, powers of two first
bring all factors and the incoming gradient to a size of about 1. So, whatever their sizes, a gradient is finite and
accurate if the dtype can hold it.
"""

from __future__ import annotations

import math

import numpy as np

from .communicator import Communicator

_ROWS = 4096  # how many rows are multiplied at a time, so that float64 copies take little memory
_NONE = -(2**14)  # stands for the exponent of 0, and is less than that of any product of numbers


def product(factors: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """The product of matrices, and a bound of the rounding error of its rows, for the worst head.

    The error is relative to the longest row of the same head. For float32 arrays sums are float64, so only the rounding
    of the result counts, however much cancels. For float64 arrays an entry of ``x W`` is off by about a unit of
    rounding times ``||x||`` times the norm of the column, which is much relative to the result if terms cancel.
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
    """The gradient of each factor of the product X, times 2^exponent, from the gradient dX of the product.

    The gradient of the first factor has its dtype. Those of the others are float64 and summed over all pieces of the
    sequence.
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
    """X summed to `shape`, over all axes along which `shape` was broadcast: the adjoint of broadcasting."""
    own = (1,) * (X.ndim - len(shape)) + shape
    repeated = tuple(a for a, size in enumerate(own) if size == 1 != X.shape[a])
    return (X.sum(axis=repeated) if repeated else X).reshape(shape)


def _power(X: np.ndarray) -> int:
    """The least e with max |X| < 2^e; `_NONE` if X is 0."""
    largest = float(np.abs(X).max(initial=0))
    return math.frexp(largest)[1] if largest else _NONE


def _longest(X: np.ndarray) -> np.ndarray:
    """The largest norm of a row of each matrix X (..., n, d), (...,) float64, without overflow and underflow."""
    square = np.einsum("...d,...d->...", X, X).max(axis=-1, initial=0)
    if np.all((square > 1e-250) & (square < np.inf)):
        return np.sqrt(square)
    peak = np.abs(X).max(axis=(-2, -1), initial=0)
    X = X / np.where(peak > 0, peak, 1)[..., None, None]
    return peak * np.sqrt(np.einsum("...d,...d->...", X, X).max(axis=-1, initial=0))
