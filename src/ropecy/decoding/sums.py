"""The state of fixed size that a text leaves: its last tokens, kept as they are, and sums over all earlier ones."""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from ..engines.polynomial import features
from ..engines.polynomial.features import Monomials
from ..kernels import _monomials

# How many tokens leave the ring together. Their sum is added to the state at once, with compensation, which takes no
# longer than adding each of them without. The ring has room for as many more tokens, which costs a step little beside
# reading the state.
BLOCK = 64
# Weights below e^-650 are taken as 0: they can't change a result, and products with them are subnormal, hence slow.
_VANISHED = -650.0
# ln 2 to 40 digits, so that splitting a power of two off a weight costs far less than rounding it to float64.
_LN2 = Fraction(decimal.Context(prec=40).ln(2))


class Sums:
    """sum_j e^{-slope age_j} phi(k_j) [v_j - centre, 1] over all tokens j but the last ones, which are kept in a ring.

    phi(k) are the monomials of a key, age_j is how many tokens came after j. The ring holds at least the last `window`
    tokens and has room for BLOCK more. When it is full, the oldest BLOCK leave it together, so which tokens are exact
    depends on the length of the text only, and not on how it was divided into calls.

    A bias makes the sums decay. Multiplying them by e^-slope for every token would round each time to the same side.
    Instead token j keeps its weight e^{slope j} for ever, and as these grow, all are divided by a power of two, which
    is exact. For S different slopes, slope (folded - 1) = shift ln 2 + phase with 0 <= phase < ln 2; all weights are
    divided by 2^shift, so that the newest token in the sums has a weight e^phase between 1 and 2.

    Parameters
    ----------
    monomials : engines.polynomial.Monomials, for float64
    slopes : (H, S) array
        The rate of decay of each sum. S is 1, or the number of query heads of a key head where their slopes differ.
    window : int
    centre : (H, d_v) array
        What is subtracted from values: the first value of each column.

    Attributes
    ----------
    state, low : (H S, d_v + 1, pitch) arrays
        The sums, and what rounding has taken from them.
    ring_keys, ring : (H, d, capacity in whole vectors), (H, d_v + 1, same) arrays
        Rotated keys; values without the centre, and 1 below them, or zeros where there is no token.
    length, folded : int
        The number of tokens, and how many of them are in the sums and no longer in the ring.
    """

    def __init__(self, monomials: Monomials, d: int, slopes: np.ndarray, window: int, centre: np.ndarray) -> None:
        heads, columns = slopes.shape[0], centre.shape[1] + 1
        lanes, _ = _monomials.blocking(np.float64)
        pitch = -(-(window + BLOCK) // lanes) * lanes
        self.monomials, self.slopes, self.window, self.centre = monomials, slopes, window, centre
        self.decays, self._ones = bool(slopes.any()), np.ones_like(slopes)
        self.state = np.zeros((slopes.size, columns, monomials.pitch))
        self.low = np.zeros_like(self.state)
        self.ring_keys, self.ring = np.zeros((heads, d, pitch)), np.zeros((heads, columns, pitch))
        self.length = 0
        self._has(self.state, self.low, 0)

    def _has(self, state: np.ndarray, low: np.ndarray, folded: int) -> None:
        """Take these arrays for the sums, which are over so many tokens."""
        self.state, self.low, self.folded = state, low, folded
        self.shift, self.phase = self.frame(folded)
        rings = self.ring_keys, self.ring
        self._decoder = _monomials.Decoder(self.monomials, state, *rings, self.centre, self.slopes, self.window + BLOCK)

    def draft(self) -> Sums:
        """The same arrays under an object of its own: what `step` and `extend` do to it leaves this one right."""
        other = object.__new__(Sums)
        other.__dict__.update(self.__dict__)
        return other

    def copy(self, centre: np.ndarray) -> Sums:
        """The same in arrays of its own; `centre` is the copy of its centre."""
        other = self.draft()
        other.centre, other.ring_keys, other.ring = centre, self.ring_keys.copy(), self.ring.copy()
        other._has(self.state.copy(), self.low.copy(), self.folded)
        return other

    def step(self, rows: np.ndarray, v: np.ndarray | None, threads: int) -> np.ndarray:
        """Append a token, unless v is None, and attend: o (H, G, d_v).

        Parameters
        ----------
        rows : (H, 1 + G, d) array
            The rotated key, then the rotated queries; (H, G, d), queries only, where v is None.
        v : (H, d_v) array or None
            The value of the token.
        threads : int

        Notes
        -----
        Arrays that another object shares are written to in one place only, where the next token comes.
        """
        full = self.length - self.folded == self.window + BLOCK
        if v is not None and full:
            k, x = self._recent()
            state, low = self._folded(self.state, self.low, self.folded, k[:, :BLOCK], x[:, :BLOCK], threads)
            self._replace(state, low, self.folded + BLOCK, k[:, BLOCK:], x[:, BLOCK:], self.length)
        elif v is None and not full:
            # A step that was interrupted may have written its token there.
            self.ring[..., self._slots(1, self.length + 1)] = 0
        length = self.length + (v is not None)
        far = self._ones
        if self.decays:
            with np.errstate(over="ignore"):
                far = np.exp(-(self.phase + self.slopes * (length - self.folded)))
        o = self._decoder.step(rows, v, (length - 1) % (self.window + BLOCK), far, threads)
        self.length = length
        return o

    def extend(self, pieces: Iterable[tuple[np.ndarray, np.ndarray]], threads: int) -> None:
        """Append the tokens of all pieces, rotated keys (H, n, d) and values (H, n, d_v); no array is written to."""
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
        """Sums over `folded` tokens and over keys (H, n, d) and values minus the centre (H, n, d_v), in new arrays."""
        (old, _), (new, phase) = self.frame(folded), self.frame(folded + k.shape[1])
        added = self._weighted_states(np.ascontiguousarray(k), np.ascontiguousarray(x), phase, threads)
        added = np.ascontiguousarray(added)
        # A number that is divided by 2^1100 becomes 0, as it does for every larger power.
        falls = [math.ldexp(1.0, max(-1100, before - after)) for before, after in zip(old, new, strict=True)]
        return added, _monomials.add_block(state, low, added, np.array(falls), threads)

    def frame(self, folded: int) -> tuple[list[int], np.ndarray]:
        """The shift of each sum, a list of H S integers, and the phase (H, S), for so many tokens in the sums.

        Computed with exact fractions.
        """
        if folded == 0 or not self.decays:
            return [0] * self.slopes.size, np.zeros_like(self.slopes)
        found = {slope: divmod(Fraction(slope) * (folded - 1), _LN2) for slope in set(self.slopes.ravel().tolist())}
        each = [found[slope] for slope in self.slopes.ravel().tolist()]
        phase = np.array([float(rest) for _, rest in each]).reshape(self.slopes.shape)
        return [int(whole) for whole, _ in each], phase

    def weight(self, folded: int) -> np.ndarray:
        """The sum of the weights of so many tokens in each sum, (H S,)."""
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
        # The sums of different slopes are computed as more columns of values, so that monomials are computed once.
        columns = np.concatenate([x, np.ones((heads, n, 1))], axis=2)
        columns = (weights[..., None] * columns[:, :, None]).reshape(heads, n, -1)
        none = np.zeros((heads, columns.shape[2]))
        added = features.key_states(k, columns, self.monomials, none, threads)
        # The kernel adds a last column of its own, which has no weights.
        return added[:, :-1].reshape(-1, d_v + 1, added.shape[2])

    def _slots(self, count: int, length: int) -> np.ndarray:
        """The places in the ring of the last `count` of `length` tokens."""
        return np.arange(length - count, length) % (self.window + BLOCK)

    def _recent(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens in the ring, the oldest first: rotated keys (H, m, d) and values minus the centre (H, m, d_v)."""
        slots = self._slots(self.length - self.folded, self.length)
        return self.ring_keys[..., slots].swapaxes(1, 2), self.ring[:, :-1, slots].swapaxes(1, 2)

    def _replace(
        self, state: np.ndarray, low: np.ndarray, folded: int, k: np.ndarray, x: np.ndarray, length: int
    ) -> None:
        """Take these arrays for the sums over `folded` of `length` tokens, and a new ring with the others."""
        slots = self._slots(k.shape[1], length)
        self.ring_keys, self.ring = np.zeros_like(self.ring_keys), np.zeros_like(self.ring)
        self.ring_keys[..., slots] = k.swapaxes(1, 2)
        self.ring[:, :-1, slots] = x.swapaxes(1, 2)
        self.ring[:, -1, slots] = 1
        self.length = length
        self._has(state, low, folded)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays that are kept, by name."""
        return {"state": self.state, "low": self.low, "ring_keys": self.ring_keys, "ring": self.ring}

    # ---- the form that they have in files ----

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
        """Go on from the arrays that `saved` gave."""
        filled, slots = self._filled(), self._slots(length - folded, length)
        self.state[..., filled], self.low[..., filled] = saved["state"], saved["low"]
        self.ring_keys[..., slots] = saved["ring_keys"]
        self.ring[:, :-1, slots] = saved["ring"]
        self.ring[:, -1, slots] = 1
        self.length = length
        self._has(self.state, self.low, folded)

    def _filled(self) -> np.ndarray:
        """The places of all monomials in a column of the state, in the order of the monomials."""
        m = self.monomials
        sizes = m.count[:, -1]
        return np.concatenate([start + np.arange(size) for start, size in zip(m.offset, sizes, strict=True)])


def slopes_of_key_heads(slopes: np.ndarray, key_heads: int) -> np.ndarray:
    """The slopes of a bias, one or one for each query head, as (1 or key heads, S).

    S is 1 where all query heads of a key head have the same slope, else their number.
    """
    each = slopes.reshape(1 if slopes.size == 1 else key_heads, -1)
    return np.ascontiguousarray(each[:, :1] if (each == each[:, :1]).all() else each)
