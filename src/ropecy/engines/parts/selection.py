"""Which part of a problem is computed together, how its arrays are taken out, and where its results belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from ...approximation.bias_forms import FarGradient
from ...problem.input_gradients import SymbolGradient
from ...problem.mask import Mask
from ...problem.packed import Alike, stretches, taken
from ...problem.pieces import Pieces
from ...problem.problem import Outline, Problem, Slots


class Selection(Protocol):
    """A part of a problem of H slots of G query heads, n rows and n_k keys.

    Attributes
    ----------
    done : bool
        Whether its rows are computed elsewhere, exactly.
    """

    done: bool

    def problem(self, whole: Problem) -> Problem:
        """The part as a problem of its own."""

    def outline(self, whole: Outline) -> Outline:
        """The outline of that problem."""

    def pieces(self, pieces: Pieces) -> Pieces:
        """Where the part's pieces lie, if the sequence is in pieces."""

    def rows(self, X: np.ndarray) -> np.ndarray:
        """The part's rows of X (H, G, n, ...), contiguous."""

    def put_rows(self, into: np.ndarray, X: np.ndarray) -> None:
        """Writes the part's rows to their places."""

    def put_keys(self, into: np.ndarray, X: np.ndarray) -> None:
        """Writes what belongs to the part's keys to its places in an array (H, n_k, ...)."""

    def symbol(self, found: SymbolGradient, H: int) -> SymbolGradient:
        """The part's gradient of a bias, for all H slots of the whole."""

    def add_near(self, into: np.ndarray, X: np.ndarray) -> None:
        """Adds the part's gradient of the near field's scale to that of the whole, (H, G)."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Some of the slots."""

    slots: Slots

    done: ClassVar[bool] = False

    def problem(self, whole: Problem) -> Problem:
        return whole.slots(self.slots)

    def outline(self, whole: Outline) -> Outline:
        return Outline.slots(whole, self.slots)

    def pieces(self, pieces: Pieces) -> Pieces:
        whole = pieces.symbol
        if whole is None:
            return pieces

        def symbol(first: int, last: int) -> np.ndarray:
            found = whole(first, last)
            return found if len(found) == 1 else found[self.slots]

        return replace(pieces, symbol=symbol)

    def rows(self, X: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(X[self.slots])

    def put_rows(self, into: np.ndarray, X: np.ndarray) -> None:
        into[self.slots] = X

    def put_keys(self, into: np.ndarray, X: np.ndarray) -> None:
        into[self.slots] = X

    def symbol(self, found: SymbolGradient, H: int) -> SymbolGradient:
        """The gradient, which is 0 in the other slots."""
        slots = np.arange(H)[self.slots]

        def spread(X: np.ndarray, axis: int) -> np.ndarray:
            before, after = X.shape[:axis], X.shape[axis + 1 :]
            each = X.shape[axis] // len(slots)
            into = np.zeros((*before, H, each, *after), X.dtype)
            into[(slice(None),) * axis + (slots,)] = X.reshape(*before, len(slots), each, *after)
            return into.reshape(*before, H * each, *after)

        return _changed(found, spread)

    def add_near(self, into: np.ndarray, X: np.ndarray) -> None:
        into[self.slots] += X


@dataclass(frozen=True, slots=True)
class Sequences:
    """Packed sequences of one shape. Slot h of the whole becomes a slot for each of its m sequences, one by one."""

    alike: Alike

    @property
    def done(self) -> bool:
        return self.alike.done

    def problem(self, whole: Problem) -> Problem:
        outline, q, k, v = self.outline(whole), self.rows(whole.q), self._keys(whole.k), self._keys(whole.v)
        own = {name: getattr(outline, name) for name in ("mask", "near", "bias", "tail", "origin")}
        return replace(whole, q=q, k=k, v=v, **own)

    def outline(self, whole: Outline) -> Outline:
        H, m = whole.sizes.H, len(self.alike.which)
        axes = *(whole.origin.axes or (H,)), m
        mask, bias = whole.mask.of_sequences(self.alike), whole.bias
        if bias is not None:
            first = mask.least - whole.mask.least
            bias = np.ascontiguousarray(bias[..., first : first + mask.n + mask.n_k - 1])
        found = whole.outline(mask=Mask(mask.n, mask.n_k), bias=bias).slots(np.repeat(np.arange(H), m))
        own = {name: getattr(whole.origin, name) for name in ("largest", "varied")}
        own = {name: None if X is None else X[:, self.alike.which].reshape(-1) for name, X in own.items()}
        own["numbers"] = (np.arange(H)[:, None] * whole.mask.packed.size + self.alike.which).reshape(-1)
        origin = replace(found.origin, axes=axes, sequences=self.alike.which, alike=None, **own)
        return found.outline(sizes=found.sizes._replace(n=mask.n, n_k=mask.n_k), mask=mask, origin=origin)

    def pieces(self, pieces: Pieces) -> Pieces:
        return pieces

    def rows(self, X: np.ndarray) -> np.ndarray:
        return taken(X, self.alike.rows, self.alike.n, 2)

    def _keys(self, X: np.ndarray) -> np.ndarray:
        return taken(X, self.alike.keys, self.alike.n_k, 1)

    def put_rows(self, into: np.ndarray, X: np.ndarray) -> None:
        _put(into, X, self.alike.rows, self.alike.n, 2)

    def put_keys(self, into: np.ndarray, X: np.ndarray) -> None:
        _put(into, X, self.alike.keys, self.alike.n_k, 1)

    def symbol(self, found: SymbolGradient, H: int) -> SymbolGradient:
        """The gradient, summed over the sequences of each slot."""
        m = len(self.alike.which)

        def summed(X: np.ndarray, axis: int) -> np.ndarray:
            before, after = X.shape[:axis], X.shape[axis + 1 :]
            X = X.reshape(*before, H, m, -1, *after).sum(axis=axis + 1)
            return X.reshape(*before, -1, *after)

        return _changed(found, summed)

    def add_near(self, into: np.ndarray, X: np.ndarray) -> None:
        into += X.reshape(len(into), -1, into.shape[1]).sum(axis=1)


def parts_of(problem: Problem) -> Iterator[Selection]:
    """The parts of a problem for what knows no packed sequences: all of it, or the sequences of each shape."""
    packed = problem.mask.packed
    if packed is None:
        yield Heads(slice(None))
        return
    for alike in packed.alike:
        yield Sequences(alike)


def _changed(found: SymbolGradient, change: Callable[[np.ndarray, int], np.ndarray]) -> SymbolGradient:
    """The gradient of a bias with ``change(array, axis of the slots)`` in the place of each of its arrays."""
    far = found.values
    if not isinstance(far, FarGradient):
        return SymbolGradient(change(far, 0), found.first)
    near = None if far.symbol is None else change(far.symbol, 0)
    return SymbolGradient(
        replace(far, symbol=near, flow=change(far.flow, 2), moment=change(far.moment, 1)), found.first
    )


def _put(into: np.ndarray, X: np.ndarray, starts: np.ndarray, length: int, axis: int) -> None:
    """The inverse of `taken`."""
    index = (slice(None),) * axis + (stretches(starts, length),)
    if len(starts) == 1:
        into[index] = X
        return
    X = np.moveaxis(X.reshape(len(into), len(starts), *X.shape[1:]), 1, axis)
    into[index] = X.reshape(*into.shape[:axis], -1, *into.shape[axis + 1 :])
