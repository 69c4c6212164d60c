"""What a text leaves in a `DecodeState`: its last tokens, which are exact, and sums over all that came before them."""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from .engines import polynomial as polynomial_engine
from .engines.polynomial import Monomials
from .kernels import _monomials

# How many tokens leave the ring together. Their sum is then added to the state once, compensated, at the cost of an
# ordinary sum for each; the ring is longer by as many, which costs a step little beside reading the state.
BLOCK = 64
# Weights below e^-650 are 0: no result shows them, and their products are subnormal, which is slow.
_VANISHED = -650.0
# ln 2 to 40 digits: what a weight is off by when powers of two are split off is far below float64's rounding.
_LN2 = Fraction(decimal.Context(prec=40).ln(2))


class Sums:
    """sum_j e^{-slope age_j} phi(k_j) [v_j - centre, 1] over the tokens of a text but the last, which are in a ring.

    The ring holds at least the `window` last tokens and has room for BLOCK more. The oldest BLOCK leave it together
    when it is full, so which tokens are exact depends on the length of the text alone, and not on how they came.

    A bias makes the sums decay. They are not multiplied by e^-slope for every token, which would round each time to
    the same side: a token j has weight e^{slope j} for ever, but for a power of two that is taken from all of them as
    they grow, which is exact. So that the newest weighs between 1 and 2,
    slope (folded - 1) = shift ln 2 + phase, 0 <= phase < ln 2.

    Parameters
    ----------
    monomials : engines.polynomial.Monomials, for float64
    slopes : (H, S) array
        S is 1, or as many as a key head has queries.
    window : int
    centre : (H, d_v) array
        Taken from values: the first of each column.

    Attributes
    ----------
    state, low : (H S, d_v + 1, pitch) arrays
        The sums, and what rounding took from them.
    ring_keys, ring : (H, d, capacity in whole vectors), (H, d_v + 1, same) arrays
        Rotated keys; values without the centre, and 1 below them, or zeros where there is no token.
    length, folded : int
        How many tokens there have been, and how many of them are in the sums.
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
        """The sums are these, over so many tokens."""
        self.state, self.low, self.folded = state, low, folded
        self.shift, self.phase = self.frame(folded)
        rings = self.ring_keys, self.ring
        self._decoder = _monomials.Decoder(self.monomials, state, *rings, self.centre, self.slopes, self.window + BLOCK)

    def copy(self, centre: np.ndarray) -> Sums:
        """The same with arrays of its own, but for the centre, which is given."""
        other = object.__new__(Sums)
        other.__dict__.update(self.__dict__)
        other.centre, other.ring_keys, other.ring = centre, self.ring_keys.copy(), self.ring.copy()
        other._has(self.state.copy(), self.low.copy(), self.folded)
        return other

    def step(self, rows: np.ndarray, v: np.ndarray | None, threads: int) -> np.ndarray:
        """o (H, G, d_v) for rotated rows (H, 1 + G, d), k before q, and v (H, d_v), appended first; or for q alone."""
        if v is not None:
            if self.length - self.folded == self.window + BLOCK:
                k, x = self._recent()
                self._fold(self.state, self.low, self.folded, k[:, :BLOCK], x[:, :BLOCK], threads)
                self._has(self.state, self.low, self.folded + BLOCK)
                self._fill_ring(k[:, BLOCK:], x[:, BLOCK:], self.length)
        length = self.length + (v is not None)
        far = self._ones
        if self.decays:
            with np.errstate(over="ignore"):
                far = np.exp(-(self.phase + self.slopes * (length - self.folded)))
        o = self._decoder.step(rows, v, (length - 1) % (self.window + BLOCK), far, threads)
        self.length = length
        return o

    def extend(self, pieces: Iterable[tuple[np.ndarray, np.ndarray]], threads: int) -> None:
        """Append pieces of a text, rotated keys (H, n, d) and values (H, n, d_v): all, or none where interrupted."""
        k, x = self._recent()
        state, low, folded, length = self.state, self.low, self.folded, self.length
        for new_k, new_v in pieces:
            new_x = new_v - self.centre[:, None]
            k, x = np.concatenate([k, new_k], axis=1), np.concatenate([x, new_x], axis=1)
            length += new_k.shape[1]
            leaving = max(0, k.shape[1] - self.window) // BLOCK * BLOCK
            if leaving:
                if state is self.state:
                    state, low = self.state.copy(), self.low.copy()
                self._fold(state, low, folded, k[:, :leaving], x[:, :leaving], threads)
                k, x, folded = k[:, leaving:], x[:, leaving:], folded + leaving
        self._has(state, low, folded)
        self._fill_ring(k, x, length)
        self.length = length

    def _fold(
        self, state: np.ndarray, low: np.ndarray, folded: int, k: np.ndarray, x: np.ndarray, threads: int
    ) -> None:
        """Add keys and values without the centre to sums over `folded` tokens, in place."""
        (old, _), (new, phase) = self.frame(folded), self.frame(folded + k.shape[1])
        added = self._weighted_states(np.ascontiguousarray(k), np.ascontiguousarray(x), phase, threads)
        # What has fallen by 2^1100 is 0 in any case.
        falls = [math.ldexp(1.0, max(-1100, before - after)) for before, after in zip(old, new, strict=True)]
        _monomials.add_block(state, low, np.ascontiguousarray(added), np.array(falls), threads)

    def frame(self, folded: int) -> tuple[list[int], np.ndarray]:
        """Shift of each state and phase (H, S) for so many tokens in the sums; by exact fractions."""
        if folded == 0 or not self.decays:
            return [0] * self.slopes.size, np.zeros_like(self.slopes)
        found = {slope: divmod(Fraction(slope) * (folded - 1), _LN2) for slope in set(self.slopes.ravel().tolist())}
        each = [found[slope] for slope in self.slopes.ravel().tolist()]
        phase = np.array([float(rest) for _, rest in each]).reshape(self.slopes.shape)
        return [int(whole) for whole, _ in each], phase

    def weight(self, folded: int) -> np.ndarray:
        """The sum of the weights of so many tokens in each state, (H S,)."""
        slopes, phase = self.slopes.ravel(), self.frame(folded)[1].ravel()
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.exp(phase) * np.expm1(-slopes * folded) / np.expm1(-slopes)
        return np.where(slopes > 0, sums, folded)

    def _weighted_states(self, k: np.ndarray, x: np.ndarray, phase: np.ndarray, threads: int) -> np.ndarray:
        """sum_j e^{phase - slope (n - 1 - j)} phi(k_j) [x_j, 1], j < n, as the state has it."""
        heads, n, d_v = x.shape
        if not self.decays:
            return polynomial_engine.key_states(k, x, self.monomials, np.zeros((heads, d_v)), threads)
        with np.errstate(over="ignore"):
            exponents = phase[:, None] - self.slopes[:, None] * np.arange(n - 1.0, -1.0, -1.0)[:, None]
        weights = np.exp(exponents, where=exponents > _VANISHED, out=np.zeros_like(exponents))
        # States of different slopes are columns beside each other: features are made once.
        columns = np.concatenate([x, np.ones((heads, n, 1))], axis=2)
        columns = (weights[..., None] * columns[:, :, None]).reshape(heads, n, -1)
        none = np.zeros((heads, columns.shape[2]))
        added = polynomial_engine.key_states(k, columns, self.monomials, none, threads)
        # The last column is the kernel's own, without weights.
        return added[:, :-1].reshape(-1, d_v + 1, added.shape[2])

    def _slots(self, count: int, length: int) -> np.ndarray:
        """Where in the ring the last `count` of so many tokens are."""
        return np.arange(length - count, length) % (self.window + BLOCK)

    def _recent(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotated keys of the ring and values without the centre, from the oldest, (H, m, d) and (H, m, d_v)."""
        slots = self._slots(self.length - self.folded, self.length)
        return self.ring_keys[..., slots].swapaxes(1, 2), self.ring[:, :-1, slots].swapaxes(1, 2)

    def _fill_ring(self, k: np.ndarray, x: np.ndarray, length: int) -> None:
        """The ring holds these tokens and no others, the last of the `length` there are."""
        slots = self._slots(k.shape[1], length)
        self.ring[...] = 0
        self.ring_keys[..., slots] = k.swapaxes(1, 2)
        self.ring[:, :-1, slots] = x.swapaxes(1, 2)
        self.ring[:, -1, slots] = 1

    def arrays(self) -> dict[str, np.ndarray]:
        return {"state": self.state, "low": self.low, "ring_keys": self.ring_keys, "ring": self.ring}

    # ---- as files have it ----

    def saved(self) -> dict[str, np.ndarray]:
        """Arrays without padding, which depends on the instruction set; tokens of the ring from the oldest."""
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
        """Where in a column of the state the monomials are, in their order."""
        m = self.monomials
        sizes = m.count[:, -1]
        return np.concatenate([start + np.arange(size) for start, size in zip(m.offset, sizes, strict=True)])
