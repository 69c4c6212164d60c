"""All keys and values of a text, kept where on_break is "exact", to answer queries when the bound is exceeded."""

from __future__ import annotations

import math

import numpy as np

from ..engines.exact import streaming
from ..machine.threads import default_threads
from ..problem.mask import Mask
from ..problem.near import Near
from ..problem.problem import Problem
from .arguments import DecodeOptions
from .bounds import Values


class History:
    """Rotated, scaled keys and values of a stream, in arrays that have room to grow.

    Parameters
    ----------
    keys, values : arrays
    near : (int, float or tuple of float)
        How many of the last tokens have scores that are multiplied, and by what, one for all query heads or for each.

    Attributes
    ----------
    keys, values : (H, capacity, d), (H, capacity, d_v) arrays
        In the dtype that exact attention computes in. H is the number of key heads. The number of tokens in the
        arrays is not kept here; the caller passes it to the methods.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray, near: tuple[int, float | tuple[float, ...]]) -> None:
        self.keys, self.values, self._near = keys, values, near

    @classmethod
    def empty(cls, heads: int, o: DecodeOptions, dtype: np.dtype) -> History:
        """A history without tokens."""
        return cls(np.empty((heads, 0, o.d), dtype), np.empty((heads, 0, o.d_v), dtype), o.stretched)

    def draft(self) -> History:
        """A second object with the same arrays. Tokens that it appends leave this object's tokens as they are."""
        return History(self.keys, self.values, self._near)

    def copy(self) -> History:
        """A second history with copies of the arrays."""
        return History(self.keys.copy(), self.values.copy(), self._near)

    def emptied(self) -> History:
        """A history without tokens."""
        return History(self.keys[:, :0].copy(), self.values[:, :0].copy(), self._near)

    def write(self, position: int, k: np.ndarray, v: np.ndarray) -> None:
        """Write keys (H, n, d) and values (H, n, d_v) as the tokens from `position` on. Capacity doubles when full."""
        self.keys, self.values = _written(self.keys, position, k), _written(self.values, position, v)

    def attend(self, rows: np.ndarray, length: int, seen: Values, slopes: np.ndarray) -> np.ndarray:
        """Exact attention (H, G, d_v) of rotated, scaled queries (H, G, d) over the first `length` tokens.

        The queries are at the position of the last of these tokens. Before attention each column of values is shifted
        and scaled by the least and the largest value in it, which `seen` holds, and the result is scaled and shifted
        back, so that neither an offset nor the size of values costs digits. The bias decays by `slopes`, (H, 1 or G).
        """
        k, values = self.keys[:, :length], self.values[:, :length]
        first, spread = seen.first[:, None], seen.spread[:, None]
        v = np.empty(values.shape, values.dtype)
        for own, of_head, *units in zip(v, values, first, spread, strict=True):
            own[...] = (of_head - units[0]) / units[1]
        q = rows.astype(k.dtype)[:, :, None]
        bias = -slopes[..., None] * np.arange(length - 1.0, -1.0, -1.0) if slopes.any() else None
        problem = Problem(
            q=q,
            k=np.ascontiguousarray(k),
            v=v,
            scale=1.0,
            mask=Mask(1, length, offset=length - 1),
            bias=bias,
            near=Near.of(*self._near, *rows.shape[:2]) if self._near[0] else None,
            threads=default_threads(),
        )
        o = streaming.forward(problem, math.inf, False)[0].reshape(*rows.shape[:2], -1)
        return first + spread * o


def _written(array: np.ndarray, position: int, rows: np.ndarray) -> np.ndarray:
    """`array` with these rows written from `position` on; a larger copy of it where they don't fit."""
    end = position + rows.shape[1]
    if end > array.shape[1]:
        larger = np.empty((array.shape[0], max(end, 2 * position), array.shape[2]), array.dtype)
        larger[:, :position] = array[:, :position]
        array = larger
    array[:, position:end] = rows
    return array
