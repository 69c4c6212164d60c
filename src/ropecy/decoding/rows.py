"""The user's keys, queries and values as float64 rows whose products are the scores, and results as users get them."""

from __future__ import annotations

import math

import numpy as np

from ..certificate import BoundedEntryError
from ..kernels import _rows
from ..machine.threads import default_threads
from ..rotary import Planes, rotate_rows
from .arguments import DecodeOptions
from .bounds import computed, largest_number, largest_score, limit

# The number of elements of an array that are worked on at a time.
PIECE = 2**21


class Rows:
    """What keys and queries are multiplied by: sqrt(|scale|), the attention factor of a Rotary, and its rotations.

    The key and the query of a score are each multiplied by sqrt(|scale|). H is the product of all leading axes of a
    state, G the number of query heads for each key head.
    """

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._R, self._sign = options.R, math.copysign(1.0, options.scale)
        self._root = np.full(options.d, math.sqrt(abs(options.scale)))
        if self._R is not None:
            theta, factor = self._R._frequencies(1)
            self._planes = Planes(theta, 1.0, self._R.pairing)
            self._root[: self._R.rotary_dim] *= factor

    def sizes(self, X: np.ndarray) -> np.ndarray:
        """|scale| ||x||^2 of each row x of X (..., d), of shape (...), after multiplying x by the attention factor."""
        rows = X.reshape(-1, X.shape[-1])
        sizes = np.empty(len(rows))
        step = max(1, PIECE // X.shape[-1])
        with np.errstate(over="ignore"):
            for start in range(0, len(rows), step):
                piece = rows[start : start + step].astype(np.float64) * self._root
                np.einsum("ia,ia->i", piece, piece, out=sizes[start : start + step])
        return sizes.reshape(X.shape[:-1])

    def within(self, name: str, sizes: np.ndarray, dtype: np.dtype) -> None:
        """BoundedEntryError where on_break does not allow one of the sizes of rows of this dtype."""
        o, largest, most = self._options, float(sizes.max(initial=0.0)), self._most(dtype)
        if largest > most:
            index = tuple(int(i) for i in np.unravel_index(sizes.argmax(), sizes.shape))
            wants = f"bound = {o.bound:g}; rows normalised, a larger bound, or on_break='exact' help"
            if o.on_break == "exact":
                wants = f"{most:.2g}, for exact attention in {computed(dtype)}"
            raise BoundedEntryError(
                f"{name}: got a row{f' at index {index}' if index else ''} with |scale| ||x||^2 = {largest:.6g}, wants "
                f"at most {wants}"
            )

    def _most(self, dtype: np.dtype) -> float:
        """The largest size that on_break allows."""
        o = self._options
        return largest_score(o, dtype) if o.on_break == "exact" else limit(o.bound, o.d, dtype)

    def keys(self, K: np.ndarray) -> np.ndarray:
        """Keys (..., d) as scaled float64 rows, not yet rotated."""
        return K.astype(np.float64, order="C") * self._root

    def of_step(self, q: np.ndarray, k: np.ndarray | None, lead: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scaled float64 rows (streams, H, 1 + G, d), the key of each head and its queries, not yet rotated.

        Without a key (streams, H, G, d). Queries are multiplied by the sign of the scale too. Beside the rows, their
        sizes, (streams, H, 1 + G), all of them `within` the bound.
        """
        streams, heads, d = math.prod(lead[:-1]), lead[-1] if lead else 1, q.shape[-1]
        parts = [("q", q, self._sign * self._root)]
        if k is not None:
            parts.insert(0, ("k", np.broadcast_to(k, (*lead, d)), self._root))
        groups = [X.size // (streams * heads * d) for _, X, _ in parts]
        rows = np.empty((streams * heads, sum(groups), d))
        sizes = np.empty(rows.shape[:2])
        for (_, X, factors), n, first in zip(parts, groups, (0, groups[0]), strict=False):
            X = np.ascontiguousarray(X, computed(X.dtype)).reshape(-1, n, d)
            _rows.scaled(X, factors, rows, sizes, first)
        if not sizes.max() <= self._most(q.dtype):
            for (name, X, _), n, first in zip(parts, groups, (0, groups[0]), strict=False):
                self.within(name, sizes[:, first : first + n].reshape(X.shape[:-1]), X.dtype)
        return rows.reshape(streams, heads, -1, d), sizes.reshape(streams, heads, -1)

    def rotated(self, rows: np.ndarray, positions: np.ndarray | np.int64) -> np.ndarray:
        """Rows (H, n, d), rotated in place by the angles of their positions; without a Rotary they stay as they are."""
        if self._R is None:
            return rows
        return rotate_rows(rows, positions, self._planes, threads=default_threads(), out=rows)


def stored(o: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Results o (H, G, d_v) with the leading axes and the dtype of their queries q.

    The true result lies between values that are finite in that dtype. Rounding may take the computed one past the
    largest finite number, so it is clipped there.
    """
    o = o.reshape(q.shape[:-1] + o.shape[-1:])
    if q.dtype == np.float64:
        return o
    most = largest_number(q.dtype)
    if _rows.largest(o) > most:
        o = np.clip(o, -most, most)
    return o.astype(q.dtype)
