"""The state of fixed size that is kept of a text: its last tokens, as they are, and sums over all earlier tokens."""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from ..engines.polynomial import features
from ..engines.polynomial.features import Monomials
from ..kernels import _monomials
from .arguments import DecodeOptions

# How many tokens leave the ring together. Their sum is added to the state at once, with compensation, which takes no
# longer than adding each token without compensation. The ring has room for BLOCK tokens beside the window. The time
# that a step takes for these is small beside that of reading the state.
BLOCK = 64
# Weights below e^-650 are taken as 0: they can't change a result, and products with them are subnormal, hence slow.
_VANISHED = -650.0
# ln 2 to 40 digits: splitting a power of two off a weight then changes it far less than rounding it to float64 does.
_LN2 = Fraction(decimal.Context(prec=40).ln(2))


class Sums:
    """sum_j e^{-slope age_j} phi(k_j) [v_j - centre, 1] over all tokens j but the last ones, which are kept in a ring.

    phi(k) are the monomials of a key, and age_j is the number of tokens that came after token j. The ring holds at
    least the last `window` tokens and has room for BLOCK more. When it is full, its oldest BLOCK tokens leave it
    together, so that which tokens are exact depends only on the length of the text, not on how it was cut into calls.

    A bias makes the sums decay. Multiplying them by e^-slope for every token would add a rounding error for each, all
    to the same side. Instead token j has the constant weight e^{slope j}, and since these weights grow with j, all are
    divided by a power of two, which is exact: with slope (folded - 1) = shift ln 2 + phase, 0 <= phase < ln 2, they are
    divided by 2^shift, so that the newest token in the sums has the weight e^phase between 1 and 2. Each key
    head has S slopes, and sums for each of them.

    Parameters
    ----------
    monomials : engines.polynomial.Monomials, for float64
    slopes : (H, S) array
        The rate of decay of each sum. S is 1, or the number of query heads of a key head where their slopes differ.
    options : DecodeOptions
        They say how many of the last tokens are exact, and what the scores of near ones are multiplied by.
    centre : (H, d_v) array
        What is subtracted from values: the first value of each column.

    Attributes
    ----------
    state, low : (H S, d_v + 1, pitch) arrays
        The sums, and the rounding errors of adding to them. `pitch` is the padded number of monomials.
    ring_keys, ring : (H, d, capacity), (H, d_v + 1, capacity) arrays
        Rotated keys, and [v - centre, 1] of each token, one token a column. The capacity is a whole number of vectors.
    length, folded : int
        The number of tokens, and how many of them are in the sums and no longer in the ring.
    """

    def __init__(
        self, monomials: Monomials, slopes: np.ndarray, options: DecodeOptions, centre: np.ndarray
    ) -> None:
        heads, columns = slopes.shape[0], centre.shape[1] + 1
        lanes, _ = _monomials.blocking(np.float64)
        self.monomials, self.slopes, self.centre = monomials, slopes, centre
        self.window, self._near = options.recent, options.stretched
        pitch = -(-(self.window + BLOCK) // lanes) * lanes
        self.decays = bool(slopes.any())
        self.state = np.zeros((slopes.size, columns, monomials.pitch))
        self.low = np.zeros_like(self.state)
        self.ring_keys, self.ring = np.zeros((heads, options.d, pitch)), np.zeros((heads, columns, pitch))
        self.ring[:, -1] = 1
        self.length = 0
        self._has(self.state, self.low, 0)

    def _has(self, state: np.ndarray, low: np.ndarray, folded: int) -> None:
        """Let `state` and `low` be the arrays of the sums, which are over `folded` tokens."""
        self.state, self.low, self.folded = state, low, folded
        self.phase = self.frame(folded)[1]
        ring = self.ring_keys, self.ring, self.window + BLOCK
        self._decoder = _monomials.Decoder(self.monomials, state, ring, self.centre, self.slopes, self._near)

    def draft(self) -> Sums:
        """A second object with the same arrays. After `step` or `extend` of that object this one is still valid."""
        other = object.__new__(Sums)
        other.__dict__.update(self.__dict__)
        return other

    def copy(self, centre: np.ndarray) -> Sums:
        """A second object with copies of the arrays; `centre` is the copy of the centre that it is to use."""
        other = self.draft()
        other.centre, other.ring_keys, other.ring = centre, self.ring_keys.copy(), self.ring.copy()
        other._has(self.state.copy(), self.low.copy(), self.folded)
        return other

    def step(self, rows: np.ndarray, v: np.ndarray | None, threads: int) -> np.ndarray:
        """Append a token, unless v is None, and return the results of attention, (H, G, d_v).

        Parameters
        ----------
        rows : (H, 1 + G, d) array
            The rotated key, then the rotated queries; (H, G, d), queries only, where v is None.
        v : (H, d_v) array or None
            The value of the token.
        threads : int

        Notes
        -----
        Of the arrays that a draft shares with its original, only the slot of the ring for the next token is written.
        """
        if v is not None and self.length - self.folded == self.window + BLOCK:
            k, x = self._recent()
            state, low = self._folded(self.state, self.low, self.folded, k[:, :BLOCK], x[:, :BLOCK], threads)
            self._replace(state, low, self.folded + BLOCK, k[:, BLOCK:], x[:, BLOCK:], self.length)
        length = self.length + (v is not None)
        recent = length - self.folded
        fall = -(self.phase + self.slopes * recent) if self.folded else np.full_like(self.slopes, -np.inf)
        o = self._decoder.step(rows, v, length - 1, recent, fall, threads)
        self.length = length
        return o

    def extend(self, pieces: Iterable[tuple[np.ndarray, np.ndarray]], threads: int) -> None:
        """Append the tokens of all pieces, each of rotated keys (H, n, d) and values (H, n, d_v).

        The arrays that this object has are not written to, but replaced by new ones.
        """
        k, x = self._recent()
        state, low, folded, length = self.state, self.low, self.folded, self.length
        for new_k, new_v in pieces:
            new_x = new_v - self.centre[:, None]
            k, x = np.concatenate([k, new_k], axis=1), np.concatenate([x, new_x], axis=1)
            length += new_k.shape[1]
            leaving = max(0, k.shape[1] - self.window) // BLOCK * BLOCK
            if leaving:
                state, low = self._folded(state, low, folded, k[:, :leaving], x[:, :leaving], threads)
                k, x, folded = k[:, leaving:], x[:, leaving:], folded + leaving
        self._replace(state, low, folded, k, x, length)

    def _folded(
        self, state: np.ndarray, low: np.ndarray, folded: int, k: np.ndarray, x: np.ndarray, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sums `state` and `low` over `folded` tokens with n more added to them, in new arrays.

        The new tokens have rotated keys k (H, n, d) and values minus the centre x (H, n, d_v).
        """
        (old, _), (new, phase) = self.frame(folded), self.frame(folded + k.shape[1])
        added = self._weighted_states(np.ascontiguousarray(k), np.ascontiguousarray(x), phase, threads)
        added = np.ascontiguousarray(added)
        # Every float64 that occurs becomes 0 when divided by 2^1100, so larger powers of two need not be distinguished.
        falls = [math.ldexp(1.0, max(-1100, before - after)) for before, after in zip(old, new, strict=True)]
        return added, _monomials.add_block(state, low, added, np.array(falls), threads)

    def frame(self, folded: int) -> tuple[list[int], np.ndarray]:
        """The shift of each sum, a list of H S integers, and its phase, (H, S), when the sums hold `folded` tokens.

        They are computed with exact fractions.
        """
        if folded == 0 or not self.decays:
            return [0] * self.slopes.size, np.zeros_like(self.slopes)
        found = {slope: divmod(Fraction(slope) * (folded - 1), _LN2) for slope in set(self.slopes.ravel().tolist())}
        each = [found[slope] for slope in self.slopes.ravel().tolist()]
        phase = np.array([float(rest) for _, rest in each]).reshape(self.slopes.shape)
        return [int(whole) for whole, _ in each], phase

    def weight(self, folded: int) -> np.ndarray:
        """The sum of the weights of all tokens in each sum, (H S,), when the sums hold `folded` tokens."""
        slopes, phase = self.slopes.ravel(), self.frame(folded)[1].ravel()
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.exp(phase) * np.expm1(-slopes * folded) / np.expm1(-slopes)
        return np.where(slopes > 0, sums, folded)

    def _weighted_states(self, k: np.ndarray, x: np.ndarray, phase: np.ndarray, threads: int) -> np.ndarray:
        """sum_j e^{phase - slope (n - 1 - j)} phi(k_j) [x_j, 1] over j < n, in the layout of `state`."""
        heads, n, d_v = x.shape
        if not self.decays:
            return features.key_states(k, x, self.monomials, np.zeros((heads, d_v)), threads)
        with np.errstate(over="ignore"):
            exponents = phase[:, None] - self.slopes[:, None] * np.arange(n - 1.0, -1.0, -1.0)[:, None]
        weights = np.exp(exponents, where=exponents > _VANISHED, out=np.zeros_like(exponents))
        # Each slope has columns of values of its own, weighted by its decay, so that monomials are computed only once.
        columns = np.concatenate([x, np.ones((heads, n, 1))], axis=2)
        columns = (weights[..., None] * columns[:, :, None]).reshape(heads, n, -1)
        none = np.zeros((heads, columns.shape[2]))
        added = features.key_states(k, columns, self.monomials, none, threads)
        # The kernel appends a column of ones without weights, which is left out.
        return added[:, :-1].reshape(-1, d_v + 1, added.shape[2])

    def _slots(self, count: int, length: int) -> np.ndarray:
        """The indices of the slots in the ring where the last `count` of `length` tokens are."""
        return np.arange(length - count, length) % (self.window + BLOCK)

    def _recent(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens in the ring, the oldest first: rotated keys (H, m, d) and values minus the centre (H, m, d_v)."""
        slots = self._slots(self.length - self.folded, self.length)
        return self.ring_keys[..., slots].swapaxes(1, 2), self.ring[:, :-1, slots].swapaxes(1, 2)

    def _replace(
        self, state: np.ndarray, low: np.ndarray, folded: int, k: np.ndarray, x: np.ndarray, length: int
    ) -> None:
        """Let `state` and `low` be the sums over the first `folded` of `length` tokens, and fill a new ring.

        The ring receives the other tokens: rotated keys k (H, m, d) and values minus the centre x (H, m, d_v).
        """
        slots = self._slots(k.shape[1], length)
        self.ring_keys, self.ring = np.zeros_like(self.ring_keys), np.ones_like(self.ring)
        self.ring_keys[..., slots] = k.swapaxes(1, 2)
        self.ring[:, :-1, slots] = x.swapaxes(1, 2)
        self.length = length
        self._has(state, low, folded)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays that the object keeps, by name."""
        return {"state": self.state, "low": self.low, "ring_keys": self.ring_keys, "ring": self.ring}

    # ---- the form of the arrays in files ----

    def saved(self) -> dict[str, np.ndarray]:
        """The arrays without their padding, which depends on the instruction set; the ring from its oldest token on."""
        filled, slots = self._filled(), self._slots(self.length - self.folded, self.length)
        return {
            "state": self.state[..., filled],
            "low": self.low[..., filled],
            "ring_keys": self.ring_keys[..., slots],
            "ring": self.ring[:, :-1, slots],
        }

    def restore(self, saved: dict[str, np.ndarray], length: int, folded: int) -> None:
        """Put back the arrays that `saved` returned, for a text of `length` tokens, `folded` of them in the sums."""
        filled, slots = self._filled(), self._slots(length - folded, length)
        self.state[..., filled], self.low[..., filled] = saved["state"], saved["low"]
        self.ring_keys[..., slots] = saved["ring_keys"]
        self.ring[:, :-1, slots] = saved["ring"]
        self.length = length
        self._has(self.state, self.low, folded)

    def _filled(self) -> np.ndarray:
        """The indices in a row of the state where the monomials are, in the order of the monomials."""
        m = self.monomials
        sizes = m.count[:, -1]
        return np.concatenate([start + np.arange(size) for start, size in zip(m.offset, sizes, strict=True)])


def slopes_of_key_heads(slopes: np.ndarray, key_heads: int) -> np.ndarray:
    """The slopes of a bias, one or one for each query head, as (1 or key heads, S).

    S is 1 where all query heads of a key head have the same slope, and else the number of query heads of a key head.
    """
    each = slopes.reshape(1 if slopes.size == 1 else key_heads, -1)
    return np.ascontiguousarray(each[:, :1] if (each == each[:, :1]).all() else each)
