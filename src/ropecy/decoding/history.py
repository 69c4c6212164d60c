"""All keys and values of a text, by which queries past the bound are answered where on_break is "exact"."""

from __future__ import annotations

import math

import numpy as np

from ..engines.exact import streaming
from ..machine.threads import default_threads
from ..problem.mask import Mask
from ..problem.problem import Problem
from .bounds import Values


class History:
    """Rotated, scaled keys and values of a text, in arrays that have room to grow.

    Attributes
    ----------
    keys, values : (H, capacity, d), (H, capacity, d_v) arrays
        Of the dtype that exact attention computes in. How many tokens there are, the caller knows.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def empty(cls, heads: int, d: int, d_v: int, dtype: np.dtype) -> History:
        """Before the first token."""
        return cls(np.empty((heads, 0, d), dtype), np.empty((heads, 0, d_v), dtype))

    def draft(self) -> History:
        """The same arrays under an object of its own: what is written past the end leaves this one right."""
        return History(self.keys, self.values)

    def copy(self) -> History:
        """The same in arrays of its own."""
        return History(self.keys.copy(), self.values.copy())

    def arrays(self, length: int | None = None) -> dict[str, np.ndarray]:
        """The arrays by name: whole, or without the room past `length` tokens."""
        return {"keys": self.keys[:, :length], "values": self.values[:, :length]}

    def write(self, position: int, k: np.ndarray, v: np.ndarray) -> None:
        """Write keys (H, n, d) and values (H, n, d_v) of the tokens from `position` on; capacity doubles when full."""
        self.keys, self.values = _written(self.keys, position, k), _written(self.values, position, v)

    def attend(self, rows: np.ndarray, length: int, seen: Values, slopes: np.ndarray) -> np.ndarray:
        """Exact attention (H, G, d_v) of rotated, scaled queries (H, G, d) over `length` tokens, the last at the query.

        Before attention values are shifted and scaled by the ends of their columns, and afterwards the result is scaled
        and shifted back, so that neither an offset nor the size of values costs digits. Slopes (H, 1 or G) are those
        of the decay.
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
            threads=default_threads(),
        )
        o = streaming.forward(problem, math.inf, False)[0].reshape(*rows.shape[:2], -1)
        return first + spread * o


def _written(array: np.ndarray, position: int, rows: np.ndarray) -> np.ndarray:
    """`array`, or one with room for more that holds the same up to `position`, with these rows from there on."""
    end = position + rows.shape[1]
    if end > array.shape[1]:
        larger = np.empty((array.shape[0], max(end, 2 * position), array.shape[2]), array.dtype)
        larger[:, :position] = array[:, :position]
        array = larger
    array[:, position:end] = rows
    return array
