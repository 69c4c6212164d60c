"""The state of fixed size that is kept of a stream: its last tokens, as they are, and sums over all earlier tokens."""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from ..engines.polynomial import features
from ..engines.polynomial.features import Monomials
from ..kernels import _decoding, _monomials
from .arguments import DecodeOptions

# How many tokens leave the ring together. Their sum is added to the state at once, with compensation, which takes no
# longer than adding each token without compensation. The ring has room for BLOCK tokens beside the window, and for one
# more, so that the next token's slot never holds a token that is seen. The time that a step takes for these is small
# beside that of reading the state.
BLOCK = 64
# Weights below e^-650 are taken as 0: they can't change a result, and products with them are subnormal, hence slow.
_VANISHED = -650.0
# ln 2 to 40 digits: splitting a power of two off a weight then changes it far less than rounding it to float64 does.
_LN2 = Fraction(decimal.Context(prec=40).ln(2))

Pieces = Iterable[tuple[np.ndarray, np.ndarray]]


class Sums:
    """sum_j e^{-slope age_j} phi(k_j) [v_j - centre, 1] over all tokens j of a stream but its last, kept in a ring.

    phi(k) are the monomials of a key, and age_j is the number of tokens that came after token j. The ring of a stream
    holds at least the last `window` tokens and BLOCK more at most. When it is full, its oldest BLOCK tokens leave it
    together, so that which tokens are exact depends only on the length of the stream, not on how it was cut into calls.

    A bias makes the sums decay. Multiplying them by e^-slope for every token would add a rounding error for each, all
    to the same side. Instead token j has the constant weight e^{slope j}, and since these weights grow with j, all are
    divided by a power of two, which is exact: with slope (folded - 1) = shift ln 2 + phase, 0 <= phase < ln 2, they are
    divided by 2^shift, so that the newest token in the sums has the weight e^phase between 1 and 2. Each key
    head has S slopes, and sums for each of them.

    The sums of a stream are an array of its own that is never written to: tokens make a new one. So streams, and copies
    of this object, may have the same array.

    Parameters
    ----------
    monomials : engines.polynomial.Monomials, for float64
    slopes : (H, S) array
        The rate of decay of each sum of a stream. S is 1, or the number of query heads of a key head where their slopes
        differ.
    options : DecodeOptions
        They say how many of the last tokens are exact, and what the scores of near ones are multiplied by.
    centre : (streams, H, d_v) array
        What is subtracted from values: the first value of each column.

    Attributes
    ----------
    sums : list
        Of each stream, (2, H S, d_v + 1, pitch): the sums, and the rounding errors of adding to them. `pitch` is the
        padded number of monomials. None for a stream that is `exact`.
    ring_keys, ring : (streams, H, d, ring_pitch), (streams, H, d_v + 1, ring_pitch) arrays
        Rotated keys, and [v - centre, 1] of each token, one token a column. The pitch is a whole number of vectors.
    length, folded : (streams,) intp arrays
        The number of tokens, and how many of them are in the sums and no longer in the ring.
    exact : (streams,) bool array
        Streams of which only the number of tokens is kept here.
    """

    def __init__(self, monomials: Monomials, slopes: np.ndarray, options: DecodeOptions, centre: np.ndarray) -> None:
        (streams, heads, d_v), lanes = centre.shape, _monomials.lanes_of(np.float64)
        self.monomials, self.slopes, self.centre = monomials, slopes, centre
        width, stretch = options.stretched
        self.window, self._near = options.recent, (width, of_key_heads(np.atleast_1d(stretch), heads))
        self.decays, self._capacity = bool(slopes.any()), self.window + BLOCK + 1
        pitch = -(-self._capacity // lanes) * lanes
        self._none = np.zeros((2, slopes.size, d_v + 1, monomials.pitch))
        self.ring_keys, self.ring = (np.zeros((streams, heads, rows, pitch)) for rows in (options.d, d_v + 1))
        self.ring[:, :, -1] = 1
        self.length = np.zeros(streams, np.intp)
        self.exact = np.zeros(streams, bool)
        self._has([self._none] * streams, np.zeros(streams, np.intp))

    def _has(self, sums: list[np.ndarray | None], folded: np.ndarray) -> None:
        """Let `sums` be the arrays of the sums, which are over so many tokens."""
        self.sums, self.folded = sums, folded
        # What a state is multiplied by when no token follows, as a logarithm.
        self._fall = np.where(folded[:, None, None] > 0, -self._phases(folded), -np.inf)
        ring = self.ring_keys, self.ring, self._capacity
        self._decoder = _decoding.Decoder(self.monomials, sums, ring, self.centre, self.slopes, self._near)

    def draft(self) -> Sums:
        """A second object with the same arrays. After `step` or `extend` of that object this one is still valid."""
        other = object.__new__(Sums)
        other.__dict__.update(self.__dict__)
        return other

    def select(self, streams: np.ndarray, centre: np.ndarray) -> Sums:
        """A second object with copies of these streams; `centre` is the copy of theirs that it is to use."""
        other = self.draft()
        other.centre, other.ring_keys, other.ring = centre, self.ring_keys[streams], self.ring[streams]
        other.length, other.exact = self.length[streams], self.exact[streams]
        other._has([self.sums[i] for i in streams], self.folded[streams])
        return other

    def forget(self, streams: np.ndarray) -> None:
        """Let these streams have no tokens."""
        sums, folded = list(self.sums), self.folded.copy()
        self.length, self.exact = self.length.copy(), self.exact.copy()
        for i in streams:
            sums[i] = self._none
        self.length[streams], self.exact[streams], folded[streams] = 0, False, 0
        self._has(sums, folded)

    def give_up(self, streams: np.ndarray) -> None:
        """Keep nothing of these streams from now on but the number of their tokens."""
        sums, self.exact = list(self.sums), self.exact.copy()
        self.exact[streams] = True
        for i in streams:
            sums[i] = None
        self._has(sums, self.folded)

    def step(self, rows: np.ndarray, v: np.ndarray | None, streams: np.ndarray, threads: int) -> np.ndarray:
        """Append a token to these streams, unless v is None, and return the results of attention, 0 for other streams.

        Parameters
        ----------
        rows : (streams, H, 1 + G, d) array
            The rotated key, then the rotated queries, of all streams; (streams, H, G, d), queries, where v is None.
        v : (streams, H, d_v) array or None
            The value of the token.
        streams : (m,) intp array
        threads : int

        Returns
        -------
        (streams, H, G, d_v) array
            Also 0 for streams that are `exact`.

        Notes
        -----
        Of the arrays that a draft shares with its original, only slots of the ring that no token is in are written.
        """
        summed = streams[~self.exact[streams]] if self.exact.any() else streams
        if v is not None:
            full = summed[self.length[summed] - self.folded[summed] == self.window + BLOCK]
            if full.size:
                self._fold(full, threads)
            self.length = self.length.copy()
            self.length[streams] += 1
        recent, fall = self.length - self.folded, self._fall
        if self.decays:
            fall = fall - self.slopes * recent[:, None, None]
        return self._decoder.step(rows, v, summed, (self.length, recent), fall, threads)

    def _fold(self, streams: np.ndarray, threads: int) -> None:
        """Take the oldest BLOCK tokens of these streams out of the ring, and add them to the sums."""
        sums, after = list(self.sums), self.folded.copy()
        folded = after[streams]
        grown = self._decoder.left((streams, folded), self._decay(folded, BLOCK), BLOCK, threads)
        for i, new in zip(streams, grown, strict=True):
            sums[i] = new
        after[streams] += BLOCK
        self._has(sums, after)

    def extend(self, groups: Iterable[tuple[np.ndarray, int, Pieces]], threads: int) -> None:
        """Append tokens to groups of streams.

        Each group is streams that have as many tokens each and as many of them in the sums, how many tokens come to
        each of them, and these in pieces of rotated keys (m H, n, d) and values (m H, n, d_v). The arrays that this
        object has are not written to, but replaced by new ones.
        """
        self.ring_keys, self.ring, self.length = self.ring_keys.copy(), self.ring.copy(), self.length.copy()
        sums, folded = list(self.sums), self.folded.copy()
        for streams, count, pieces in groups:
            first = streams[0]
            if self.exact[first]:
                for _ in pieces:
                    pass
            else:
                own, folded[streams] = self._extended(streams, count, pieces, threads)
                for i, new in zip(streams, own, strict=True):
                    sums[i] = new
            self.length[streams] += count
        self._has(sums, folded)

    def _extended(
        self, streams: np.ndarray, count: int, pieces: Pieces, threads: int
    ) -> tuple[list[np.ndarray | None], int]:
        """The sums of these streams with the tokens of all pieces, and how many are in them: others are in the ring."""
        length, folded = int(self.length[streams[0]]), int(self.folded[streams[0]])
        k, x = self._read(streams, np.broadcast_to(np.arange(folded, length), (len(streams), length - folded)))
        sums, centre = [self.sums[i] for i in streams], self.centre[streams].reshape(len(k), 1, -1)
        for new_k, new_v in pieces:
            k, x = np.concatenate([k, new_k], axis=1), np.concatenate([x, new_v - centre], axis=1)
            leaving = max(0, k.shape[1] - self.window) // BLOCK * BLOCK
            if leaving:
                before = np.full(len(streams), folded)
                sums = self._added(sums, before, k[:, :leaving], x[:, :leaving], threads)
                k, x, folded = k[:, leaving:], x[:, leaving:], folded + leaving
        self._write(streams, np.arange(folded, length + count), k, x)
        return sums, folded

    def _added(
        self, sums: list[np.ndarray], folded: np.ndarray, k: np.ndarray, x: np.ndarray, threads: int
    ) -> list[np.ndarray]:
        """The sums of m streams, over `folded` tokens each, with n more added to each of them, in new arrays.

        The new tokens have rotated keys k (m H, n, d) and values minus the centre x (m H, n, d_v).
        """
        factors, weights = self._decay(folded, k.shape[1])
        (rows, n, d_v), none = x.shape, np.zeros((len(k), x.shape[2]))
        if weights is None:
            columns = np.ascontiguousarray(x)
        else:
            # Each slope has columns of values of its own, weighted by its decay, so that monomials are computed once.
            columns = np.concatenate([x, np.ones((rows, n, 1))], axis=2)
            weights = weights.reshape(rows, -1, n).swapaxes(1, 2)
            columns = (weights[..., None] * columns[:, :, None]).reshape(rows, n, -1)
            none = np.zeros((rows, columns.shape[2]))
        added = features.key_states(np.ascontiguousarray(k), columns, self.monomials, none, threads)
        if weights is not None:
            # The kernel appends a column of ones without weights, which is left out.
            added = np.ascontiguousarray(added[:, :-1]).reshape(-1, d_v + 1, added.shape[2])
        return _decoding.add_block(sums, added, factors, threads)

    def _decay(self, folded: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray | None]:
        """What sums over `folded` tokens each are multiplied by when n more come, and the weights of these in them.

        They are (streams, H, S), powers of two, and (streams, H, S, n), or None where nothing decays.
        """
        shape = len(folded), *self.slopes.shape
        if not self.decays:
            return np.ones(shape), None
        frames = {count: self.frame(count) for count in {*folded.tolist(), *(folded + n).tolist()}}
        pairs = [zip(frames[a][0], frames[a + n][0], strict=True) for a in folded.tolist()]
        # Every float64 that occurs becomes 0 when divided by 2^1100: larger powers of two need not be told apart.
        factors = np.ldexp(1.0, [max(-1100, old - new) for shifts in pairs for old, new in shifts]).reshape(shape)
        phases = np.stack([frames[a + n][1] for a in folded.tolist()])
        with np.errstate(over="ignore"):
            exponents = phases[..., None] - self.slopes[..., None] * np.arange(n - 1.0, -1.0, -1.0)
        return factors, np.exp(exponents, where=exponents > _VANISHED, out=np.zeros_like(exponents))

    def frame(self, folded: int) -> tuple[list[int], np.ndarray]:
        """The shift of each sum of a stream, H S integers, and its phase, (H, S), when its sums hold `folded` tokens.

        They are computed with exact fractions.
        """
        if folded == 0 or not self.decays:
            return [0] * self.slopes.size, np.zeros_like(self.slopes)
        found = {slope: divmod(Fraction(slope) * (folded - 1), _LN2) for slope in set(self.slopes.ravel().tolist())}
        each = [found[slope] for slope in self.slopes.ravel().tolist()]
        phase = np.array([float(rest) for _, rest in each]).reshape(self.slopes.shape)
        return [int(whole) for whole, _ in each], phase

    def _phases(self, folded: np.ndarray) -> np.ndarray:
        """The phase of each sum, (streams, H, S), when the sums of the streams hold so many tokens."""
        if not self.decays:
            return np.zeros((len(folded), *self.slopes.shape))
        counts, own = np.unique(folded, return_inverse=True)
        return np.stack([self.frame(int(count))[1] for count in counts])[own]

    def weight(self, folded: int) -> np.ndarray:
        """The sum of the weights of all tokens in each sum of a stream, (H S,), when its sums hold `folded` tokens."""
        slopes, phase = self.slopes.ravel(), self.frame(folded)[1].ravel()
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.exp(phase) * np.expm1(-slopes * folded) / np.expm1(-slopes)
        return np.where(slopes > 0, sums, folded)

    # ---- the ring ----

    def _read(self, streams: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotated keys (m H, n, d) and values minus the centre (m H, n, d_v) of tokens (m, n) of these streams."""
        where = streams[:, None], slice(None), slice(None), tokens % self._capacity
        k, x = self.ring_keys[where].swapaxes(1, 2), self.ring[where][..., :-1].swapaxes(1, 2)
        shape = k.shape[0] * k.shape[1], k.shape[2]
        return k.reshape(*shape, k.shape[3]), x.reshape(*shape, x.shape[3])

    def _write(self, streams: np.ndarray, tokens: np.ndarray, k: np.ndarray, x: np.ndarray) -> None:
        """Write keys and values, as `_read` returns them, as these tokens (n,) of each of these streams."""
        shape = len(streams), len(self.slopes), len(tokens), -1
        where = streams[:, None], slice(None), slice(None), tokens % self._capacity
        if len(tokens):
            self.ring_keys[where] = k.reshape(shape).swapaxes(1, 2)
            self.ring[where] = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2).reshape(shape).swapaxes(1, 2)

    def arrays(self) -> list[np.ndarray]:
        """All arrays that the object keeps; those that streams have in common are there once for each of them."""
        return [self.ring_keys, self.ring, *(each for each in self.sums if each is not None)]

    # ---- the form of the arrays in files ----

    def saved(self) -> dict[str, np.ndarray]:
        """The arrays without their padding, which depends on the instruction set; rings from their oldest token on.

        The sums of one stream follow those of the one before, and so do the tokens of rings, along their last axis.
        """
        filled, streams = self._filled(), np.flatnonzero(~self.exact)
        sums = [self.sums[i][..., filled] for i in streams] or [self._none[:, :0, :, filled]]
        tokens = [self._read(streams[at : at + 1], self._recent(i)) for at, i in enumerate(streams)]
        widths = self.ring_keys.shape[2], self.centre.shape[2]
        none = tuple(np.zeros((len(self.slopes), 0, width)) for width in widths)
        k, x = (np.concatenate([each[i] for each in [none, *tokens]], axis=1).swapaxes(1, 2) for i in (0, 1))
        state, low = np.concatenate(sums, axis=1)
        return {"state": state, "low": low, "ring_keys": k, "ring": x}

    def restore(self, saved: dict[str, np.ndarray], length: np.ndarray, folded: np.ndarray) -> None:
        """Put back the arrays that `saved` returned, for streams of so many tokens, so many of them in the sums."""
        filled, sums, start = self._filled(), list(self.sums), 0
        self.length, self.folded = length, folded
        for at, i in enumerate(np.flatnonzero(~self.exact)):
            own = slice(at * self.slopes.size, (at + 1) * self.slopes.size)
            sums[i] = np.zeros_like(self._none)
            sums[i][0][..., filled], sums[i][1][..., filled] = saved["state"][own], saved["low"][own]
            tokens = self._recent(i)
            stop = start + tokens.size
            k, x = (saved[name][..., start:stop].swapaxes(1, 2) for name in ("ring_keys", "ring"))
            self._write(np.array([i]), tokens[0], k, x)
            start = stop
        self._has(sums, folded)

    def _recent(self, stream: int) -> np.ndarray:
        """The tokens that are in the ring of a stream, (1, n)."""
        return np.arange(self.folded[stream], self.length[stream])[None]

    def _filled(self) -> np.ndarray:
        """The indices in a row of the state where the monomials are, in the order of the monomials."""
        m = self.monomials
        sizes = m.count[:, -1]
        return np.concatenate([start + np.arange(size) for start, size in zip(m.offset, sizes, strict=True)])


def of_key_heads(numbers: np.ndarray, key_heads: int) -> np.ndarray:
    """Numbers of query heads, or one for all of them, as (key heads, S).

    S is 1 where all query heads of a key head have the same, and else the number of query heads of a key head.
    """
    each = numbers.reshape(1 if numbers.size == 1 else key_heads, -1)
    each = each[:, :1] if (each == each[:, :1]).all() else each
    return np.ascontiguousarray(np.broadcast_to(each, (key_heads, each.shape[1])))
