"""The keys and values of streams, kept for exact attention: what a layer without a bound has for a `DecodeState`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..attention import attention
from ..rotary import Rotary


class KeyValues:
    """o = sum_j a_j v_j / sum_j a_j, a_j = exp(scale q R_{j-m} k_j^T), over all tokens j of a stream, exactly.

    It has the methods of `ropecy.DecodeState` that a layer calls, with one axis of streams before that of key heads.
    Keys are kept rotated, halves in float32, in arrays that are as long as the longest stream, and at most twice that.

    Parameters
    ----------
    shape : (int, int, int)
        Streams, key heads, and the width of keys and values.
    R : Rotary
    scale : float
    dtype : dtype
        float32 or float64.
    """

    def __init__(self, shape: tuple[int, int, int], R: Rotary, scale: float, dtype: np.dtype) -> None:
        streams, heads, width = shape
        self._R, self._scale = R, scale
        self._keys, self._values = (np.zeros((streams, heads, 0, width), dtype) for _ in range(2))
        self.lengths = np.zeros(streams, np.intp)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._keys.nbytes + self._values.nbytes

    def extend(self, K: np.ndarray, V: np.ndarray, *, lengths: np.ndarray) -> None:
        """Append the first `lengths` of keys and values (streams, heads, n, width) to each stream."""
        dtype, n = self._keys.dtype, K.shape[2]
        positions = self.lengths[:, None] + np.arange(n)
        K = self._R.rotate(K.astype(dtype), positions[:, None])
        self._make_room(int((self.lengths + lengths).max()))
        taken = np.arange(n) < lengths[:, None]
        stream, row = np.nonzero(taken)
        self._keys[stream, :, positions[taken]] = K[stream, :, row]
        self._values[stream, :, positions[taken]] = V[stream, :, row]
        self.lengths = self.lengths + lengths

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, active: np.ndarray) -> np.ndarray:
        """Append a token to the streams that are `active`, then attend with q (streams, query heads, width) there.

        The result has q's shape and the dtype of the arrays, and is 0 where a stream is not active.
        """
        self.extend(k[:, :, None], v[:, :, None], lengths=active.astype(np.intp))
        most = int(self.lengths.max())
        last = np.maximum(self.lengths - 1, 0)
        q = self._R.rotate(q.astype(self._keys.dtype)[:, :, None], last[:, None, None])
        mask = np.arange(most) < np.where(active, self.lengths, 0)[:, None]
        mask = None if mask.all() else mask[:, None]
        K, V = self._keys[:, :, :most], self._values[:, :, :most]
        return attention(q, K, V, scale=self._scale, key_mask=mask, method="exact")[:, :, 0]

    def reset(self, streams: Any = ...) -> None:
        """Let streams have no tokens."""
        self.lengths = self.lengths.copy()
        self.lengths[streams] = 0

    def select(self, streams: Any) -> KeyValues:
        """A second object of these streams."""
        other = object.__new__(KeyValues)
        other.__dict__.update(self.__dict__)
        other._keys, other._values = self._keys[streams].copy(), self._values[streams].copy()
        other.lengths = self.lengths[streams].copy()
        return other

    def copy(self) -> KeyValues:
        """A second object with the same contents."""
        return self.select(slice(None))

    def _make_room(self, tokens: int) -> None:
        """Let there be room for so many tokens of a stream; where it grows, it doubles at least."""
        room = self._keys.shape[2]
        if tokens > room:
            more = max(tokens, 2 * room) - room
            self._keys, self._values = (
                np.concatenate([X, np.zeros((*X.shape[:2], more, X.shape[3]), X.dtype)], axis=2)
                for X in (self._keys, self._values)
            )
