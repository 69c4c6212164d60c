"""Biases as the exact engines' tables hold them, in the dtype that scores are computed in."""

from __future__ import annotations

import numpy as np


def from_the_largest(bias: np.ndarray, factor: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """``factor (bias - largest)`` in a dtype, and the largest, (H or 1, G or 1, 1), of bias (H or 1, G or 1, offsets).

    Biases that matter are close to the largest, so float32 holds their differences from it, whatever their size.
    Differences that are too large for the dtype are clipped to a finite number, so that a row which sees only such keys
    still has a softmax.
    """
    if not bias.shape[-1]:
        return np.zeros(bias.shape, dtype), np.zeros((*bias.shape[:-1], 1))
    largest = bias.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        depth = (largest - bias) * factor
    return -np.minimum(depth, float(np.finfo(dtype).max) / 4).astype(dtype), largest
