"""What a `DecodeState` keeps of its streams from the first tokens on, and what it promises of their results."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..certificate import Certificate
from ..engines.polynomial import features
from ..machine.threads import default_threads
from . import bounds
from .arguments import DecodeOptions
from .history import History
from .rows import PIECE, Rows
from .sums import Sums, of_key_heads

# The largest number of tokens that `extend` works on at a time; `bounds.rounding` assumes blocks of that size.
_TOKENS = 2**16


class Streams:
    """The sums, the ranges of values and, where on_break is "exact", the history of each stream.

    A stream is an index of all leading axes but the last, which is that of its H key heads.

    Attributes
    ----------
    lead : tuple of int
        All leading axes.
    dtype : dtype
    polynomial : approximation.minimax.Polynomial
    values : bounds.Values
    sums : Sums
    histories : list of History
        One for each stream; none unless on_break is "exact".
    largest, asked : (streams,) float64 arrays
        |scale| ||x||^2: the largest of all keys, and that of the last query if it was answered from the history. 0
        without histories.
    """

    def __init__(
        self, o: DecodeOptions, rows: Rows, lead: tuple[int, ...], dtype: np.dtype, degree: int | None = None
    ) -> None:
        self._o, self._rows, self.lead, self.dtype = o, rows, lead, dtype
        streams, heads = math.prod(lead[:-1]), lead[-1] if lead else 1
        slopes = np.zeros(1) if o.bias is None else np.atleast_1d(o.bias._values)
        slopes = of_key_heads(slopes, heads)
        self.polynomial = bounds.polynomial(o, dtype, degree)
        bounds.check_memory(o, self.polynomial.degree, streams * heads, slopes.shape[1])
        self.values = bounds.Values.none((streams, heads, o.d_v))
        monomials = features.decoding_monomials(o.d, self.polynomial)
        self.sums = Sums(monomials, slopes, o, self.values.first)
        remembered = streams if o.on_break == "exact" else 0
        self.histories = [History.empty(heads, o, bounds.computed(dtype)) for _ in range(remembered)]
        self.largest, self.asked = np.zeros(streams), np.zeros(streams)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each stream has had, of the shape of all leading axes but the last."""
        return self.sums.length.reshape(self.lead[:-1])

    @property
    def limit(self) -> float:
        """The largest |scale| ||x||^2 of a key or a query that the sums answer."""
        return bounds.limit(self._o.bound, self._o.d, self.dtype)

    def draft(self) -> Streams:
        """A second object with the same arrays, on which a call that may be interrupted works."""
        other = object.__new__(Streams)
        other.__dict__.update(self.__dict__)
        other.values, other.sums = self.values.draft(), self.sums.draft()
        other.histories = [history.draft() for history in self.histories]
        return other

    def select(self, chosen: np.ndarray) -> Streams:
        """A second object with copies of these streams, (...): an index of each in its order."""
        other, streams = self.draft(), chosen.reshape(-1)
        other.lead = (*chosen.shape, *self.lead[-1:])
        other.values = self.values.of(streams)
        other.sums = self.sums.select(streams, other.values.first)
        other.histories = [self.histories[i].copy() for i in streams] if self.histories else []
        other.largest, other.asked = self.largest[streams], self.asked[streams]
        return other

    def reset(self, streams: np.ndarray) -> None:
        """Let these streams have no tokens."""
        self.sums.forget(streams)
        self.values.forget(streams)
        self.largest, self.asked = self.largest.copy(), self.asked.copy()
        self.largest[streams] = self.asked[streams] = 0.0
        for i in streams if self.histories else ():
            self.histories[i] = self.histories[i].emptied()

    def extend(self, K: np.ndarray, V: np.ndarray, counts: np.ndarray, largest: np.ndarray) -> None:
        """Append the first `counts` of keys (..., n, d) and values (..., n, d_v) to each stream, not all of them 0.

        `largest` (...) is the largest |scale| ||k||^2 of the keys of each head.
        """
        streams = np.flatnonzero(counts)
        self._meet(streams, self._by_stream(largest[..., None, None]))
        K, V = self._by_stream(K), self._by_stream(V)
        self._begin(streams, V[:, :, 0])
        # What is worked on together has as many tokens everywhere.
        kinds = np.stack([self.sums.length, self.sums.folded, self.sums.exact, counts], axis=1)[streams]
        kind = np.unique(kinds, axis=0, return_inverse=True)[1].reshape(-1)
        groups = [streams[kind == i] for i in range(kind.max() + 1)]
        told = ((own, n := int(counts[own[0]]), self._pieces(K[:, :, :n], V[:, :, :n], own)) for own in groups)
        self.sums.extend(told, default_threads())

    def _pieces(self, K: np.ndarray, V: np.ndarray, streams: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rotated keys (m H, n, d) and values (m H, n, d_v) of m streams of one length, piece by piece.

        Each piece is also written into the histories, if there are any, and its values update the ranges of columns.
        """
        o, n, length, slots = self._o, K.shape[2], int(self.sums.length[streams[0]]), len(streams) * K.shape[1]
        rows = PIECE // (slots * o.d + len(streams) * self.sums.slopes.size * o.d_v)
        rows = min(_TOKENS, max(1024, rows))
        chosen = slice(None) if len(streams) == len(K) else streams
        for start in range(0, n, rows):
            piece = slice(start, min(n, start + rows))
            k = self._rows.keys(K[chosen, :, piece]).reshape(slots, -1, o.d)
            v = np.array(V[chosen, :, piece], np.float64, order="C")
            k = self._rows.rotated(k, np.arange(piece.start, piece.stop) + length)
            self._take(k.reshape(*v.shape[:3], o.d), v, streams, length + start)
            yield k, v.reshape(slots, -1, o.d_v)

    def step(self, rows: np.ndarray, v: np.ndarray | None, streams: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """o (streams, H, G, d_v) of the queries, 0 but for the streams that are named, which first take a token.

        The rows and their sizes are those of `Rows.of_step`, and rows are overwritten: keys and queries, or queries
        alone where no token comes and v is None. v (..., d_v) are its values.
        """
        count, d, position = len(rows), self._o.d, self.sums.length
        queries = slice(0 if v is None else 1, None)
        if v is None:
            position = position - 1
        rows = self._rows.rotated(rows.reshape(count, -1, d), position[:, None]).reshape(rows.shape)
        if v is not None:
            v = np.array(self._by_stream(v[..., None, :]), np.float64, order="C")
            self._meet(streams, sizes[:, :, :1])
            self._begin(streams, v[:, :, 0])
            if len(streams) == count:
                self._take(rows[:, :, :1], v, streams, position)
            else:
                self._take(rows[streams, :, :1], v[streams], streams, position)
            v = v[:, :, 0]
        if not self.histories:
            return self.sums.step(rows, v, streams, default_threads())
        largest = sizes[:, :, queries].max(axis=(1, 2))
        past = streams[self.sums.exact[streams] | (largest[streams] > self.limit)]
        asked, self.asked = rows[past, :, queries], self.asked.copy()
        self.asked[streams] = 0.0
        self.asked[past] = largest[past]
        # What sums make of a query past the bound is not used, but is to be a number.
        rows[past, :, queries] = 0.0
        o = self.sums.step(rows, v, streams, default_threads())
        for i, own in zip(past, asked, strict=True):
            length = int(self.sums.length[i])
            o[i] = self.histories[i].attend(own, length, self.values.of(i), self.sums.slopes)
        return o

    def _begin(self, streams: np.ndarray, v: np.ndarray) -> None:
        """Note the first values, v (streams, H, d_v), of those of these streams that have no tokens."""
        new = streams[self.sums.length[streams] == 0]
        if new.size:
            self.values.first[new] = v[new]

    def _meet(self, streams: np.ndarray, sizes: np.ndarray) -> None:
        """Be told |scale| ||k||^2 of new keys of these streams, (streams, ...): past the bound, sums end.

        Without histories no key is past it.
        """
        if not self.histories:
            return
        most, self.largest = sizes[streams].reshape(len(streams), -1).max(axis=1), self.largest.copy()
        self.largest[streams] = np.maximum(self.largest[streams], most)
        past = streams[(most > self.limit) & ~self.sums.exact[streams]]
        if past.size:
            self.sums.give_up(past)

    def _take(self, k: np.ndarray, v: np.ndarray, streams: np.ndarray, positions: np.ndarray | int) -> None:
        """See values v (m, H, n, d_v), and keep them and the keys k (m, H, n, d) in histories, if there are any."""
        self.values.see(v, streams)
        if self.histories:
            positions = np.broadcast_to(positions, len(self.histories))
            for i, own_k, own_v in zip(streams, k, v, strict=True):
                self.histories[i].write(int(positions[i]), own_k, own_v)

    def _by_stream(self, X: np.ndarray) -> np.ndarray:
        """X (..., n, width) as (streams, H, n, width), its leading axes broadcast."""
        if X.shape[:-2] != self.lead:
            X = np.broadcast_to(X, self.lead + X.shape[-2:])
        return X.reshape(*self.values.first.shape[:2], *X.shape[-2:])

    def certificate(self, i: int) -> Certificate:
        """What is promised of a stream's last result, in units of max_c range_j(v_jc) over its tokens and heads."""
        o, dtype, seen, half = self._o, self.dtype, self.values.of(i), 0.0
        length, asked, largest = int(self.sums.length[i]), float(self.asked[i]), float(self.largest[i])
        if length:
            # The first value is added to the result in float64, and that sum is rounded.
            stored = 2 * seen.storing(np.dtype(np.float64))
            if dtype.itemsize == 4:
                stored += seen.storing(dtype)
            elif dtype.itemsize == 2:
                half = seen.storing(dtype)
        else:
            stored = float(np.finfo(bounds.computed(dtype)).eps)
        if not (self.sums.exact[i] or asked):
            return bounds.certificate(o, self.polynomial, dtype, stored).stored(half)
        size = math.sqrt(largest * (asked or largest))
        rounding = bounds.exact_rounding(o, dtype, float(self.sums.slopes.max()), length, size)
        return Certificate("exact", None, None, size, "exact", 0.0, rounding + stored).stored(half)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; of sums that streams share, those that they take once each has its own."""
        arrays = [*self.values.arrays().values(), *self.sums.arrays()]
        arrays += [array for history in self.histories for array in (history.keys, history.values)]
        return sum(array.nbytes for array in arrays)
