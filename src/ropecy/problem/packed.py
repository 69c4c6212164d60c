"""Sequences packed side by side: where each lies among the rows and keys of an array, and which of them are alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .checks import check_integer, described


class Alike(NamedTuple):
    """Sequences of one shape: n rows and n_k keys each, the first row at the index `offset` among the keys.

    Attributes
    ----------
    n, n_k, offset : int
    rows, keys : (m,) int array
        Where the rows, and where the keys, of each of the m sequences begin.
    which : (m,) int array
        Which sequences they are.
    done : bool
        Whether their rows are computed elsewhere.
    """

    n: int
    n_k: int
    offset: int
    rows: np.ndarray
    keys: np.ndarray
    which: np.ndarray
    done: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The lengths of sequences that lie one after the other; each sees itself alone.

    Attributes
    ----------
    q_lengths, k_lengths : (s,) int64 arrays
        How many rows, and how many keys, each sequence has.
    offsets : (s,) int64 array
        The index of the first row of each sequence among its keys.
    done : (s,) bool array or None
        Which sequences have rows that are computed elsewhere, all exactly; None for no such sequence.
    alike : tuple of Alike
        The sequences that have rows and keys, those of one shape together. Found once, since sorting many shapes takes
        longer than computing short sequences.
    """

    q_lengths: np.ndarray
    k_lengths: np.ndarray
    offsets: np.ndarray
    done: np.ndarray | None = None
    alike: tuple[Alike, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alike", tuple(self._kinds()))

    @property
    def size(self) -> int:
        """How many sequences there are."""
        return len(self.q_lengths)

    @property
    def q_positions(self) -> np.ndarray:
        """The index of each row among the keys of its sequence, (n,)."""
        return counted(self.q_lengths) + np.repeat(self.offsets, self.q_lengths)

    @property
    def k_positions(self) -> np.ndarray:
        """The index of each key in its sequence, (n_k,)."""
        return counted(self.k_lengths)

    @property
    def of_rows(self) -> np.ndarray:
        """Which sequence each row is of, (n,)."""
        return np.repeat(np.arange(self.size), self.q_lengths)

    @property
    def of_keys(self) -> np.ndarray:
        """Which sequence each key is of, (n_k,)."""
        return np.repeat(np.arange(self.size), self.k_lengths)

    @property
    def least(self) -> int:
        """The least j - i - offset of a row and a key of one sequence."""
        return int(-(self.q_lengths - 1 + self.offsets).max(initial=0, where=self._both))

    @property
    def most(self) -> int:
        """The largest j - i - offset of a row and a key of one sequence."""
        return int((self.k_lengths - 1 - self.offsets).max(initial=0, where=self._both))

    @property
    def _both(self) -> np.ndarray:
        """Which sequences have both rows and keys."""
        return (self.q_lengths > 0) & (self.k_lengths > 0)

    def _kinds(self) -> Iterator[Alike]:
        done = np.zeros(self.size, np.int64) if self.done is None else self.done
        shapes = np.stack([self.q_lengths, self.k_lengths, self.offsets, done], axis=1)
        rows, keys = (np.cumsum(lengths) - lengths for lengths in (self.q_lengths, self.k_lengths))
        which = np.flatnonzero(self._both)
        kinds, kind = np.unique(shapes[which], axis=0, return_inverse=True)
        order = np.argsort(kind.reshape(-1), kind="stable")
        ends = np.cumsum(np.bincount(kind.reshape(-1), minlength=len(kinds)))
        for (*shape, elsewhere), first, last in zip(kinds.tolist(), [0, *ends], ends, strict=False):
            own = which[order[first:last]]
            yield Alike(*shape, rows[own], keys[own], own, bool(elsewhere))

    def some(self, first: int, stop: int) -> Packed:
        """The sequences [first, stop)."""
        return Packed(*(X[first:stop] for X in (self.q_lengths, self.k_lengths, self.offsets)))

    def transposed(self) -> Packed:
        """The same sequences with rows and keys exchanged, and all of them reversed; see `Mask.transposed`."""
        q, k = self.q_lengths[::-1], self.k_lengths[::-1]
        return Packed(k, q, self.offsets[::-1] + q - k)


class Cut:
    """Where the sequences of a packed row lie whose rows, or keys, are cut into pieces of these lengths.

    Attributes
    ----------
    rank : (s,) int array
        Whose piece each sequence lies in; -1 for one that is in several, and for one that is empty.
    """

    def __init__(self, lengths: np.ndarray, pieces: list[int]) -> None:
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._pieces = np.concatenate([[0], np.cumsum(pieces)])
        first, last = (np.searchsorted(self._pieces, at, "right") - 1 for at in (self._ends[:-1], self._ends[1:] - 1))
        self.rank = np.where((lengths > 0) & (first == last), first, -1)

    def of_rank(self, rank: int) -> slice:
        """The rows of a piece."""
        return slice(int(self._pieces[rank]), int(self._pieces[rank + 1]))

    def of(self, rank: int, first: int, stop: int) -> slice:
        """The rows of the sequences [first, stop) that are in a piece, counted from where it begins."""
        begin, end = (int(X) for X in self._pieces[rank : rank + 2])
        start = min(max(int(self._ends[first]), begin), end)
        return slice(start - begin, min(max(int(self._ends[stop]), start), end) - begin)


def stretches(starts: np.ndarray, length: int) -> slice | np.ndarray:
    """Where stretches of this length from these starts on lie; a slice where each begins where the last one ends."""
    if len(starts) == 1 or (np.diff(starts) == length).all():
        return slice(int(starts[0]), int(starts[0]) + len(starts) * length)
    return (starts[:, None] + np.arange(length)).reshape(-1)


def taken(X: np.ndarray, starts: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Stretches of X (H, ..., n, ...) along `axis` as slots of their own, (H m, ..., length, ...), contiguous."""
    found = X[(slice(None),) * axis + (stretches(starts, length),)]
    if len(starts) == 1:
        return np.ascontiguousarray(found)
    found = found.reshape(*X.shape[:axis], len(starts), length, *X.shape[axis + 1 :])
    found = np.ascontiguousarray(np.moveaxis(found, axis, 1))
    return found.reshape(-1, *found.shape[2:])


def counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... in each of these lengths."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def check_lengths(lengths: Any, q_offset: Any, n: int, n_k: int) -> Packed:
    """The packed sequences that `lengths` and `q_offset` say, of n rows and n_k keys in all.

    Parameters
    ----------
    lengths : (s,) integers, or a pair of such
        The lengths of sequences of as many rows as keys, or those of rows and those of keys.
    q_offset : int or (s,) integers
    """
    q, k = (_integers("lengths", part) for part in as_two(lengths))
    check_as_many(len(q), len(k))
    for own, rows, name in ((q, n, "queries"), (k, n_k, "keys")):
        if own.min(initial=0) < 0:
            raise ValueError(f"lengths: got {own.min()}, wants integers of at least 0")
        total = sum(own.tolist())
        if total != rows:
            raise ValueError(f"lengths: got {len(own)} that add up to {total}, wants {rows} as there are {name}")
    if np.ndim(q_offset) == 0:
        offsets = np.full(len(q), check_integer("q_offset", q_offset))
    else:
        offsets = _integers("q_offset", q_offset)
        if len(offsets) != len(q):
            raise ValueError(f"q_offset: got {len(offsets)} numbers, wants one, or {len(q)}, one for each sequence")
    return Packed(q, k, offsets)


def as_two(lengths: Any) -> tuple[Any, Any]:
    """The lengths of queries and those of keys, which may be one."""
    pair = isinstance(lengths, (tuple, list)) and len(lengths) == 2 and any(_is_vector(part) for part in lengths)
    return tuple(lengths) if pair else (lengths, lengths)


def check_vector(name: str, what: str, shape: tuple[int, ...]) -> None:
    """Refuse what is no vector; `what` is its kind in words."""
    if len(shape) != 1:
        raise ValueError(f"{name}: got {what} of shape {shape}, wants a vector of integers")


def check_integers(name: str, dtype: Any, integers: bool) -> None:
    """Refuse a dtype that is not one of `integers`."""
    if not integers:
        raise TypeError(f"{name}: got dtype {dtype}, wants integers")


def check_as_many(q: int, k: int) -> None:
    """Refuse another number of lengths of queries than of keys."""
    if q != k:
        raise ValueError(f"lengths: got {q} lengths of queries and {k} of keys, wants one of each a sequence")


def _is_vector(value: Any) -> bool:
    return isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) > 0


def _integers(name: str, value: Any) -> np.ndarray:
    """A vector of integers below 2^62 in size, as int64."""
    try:
        found = np.asarray(value)
    except ValueError:
        raise TypeError(f"{name}: got {described(value)} of unlike things, wants a vector of integers") from None
    check_vector(name, described(value), found.shape)
    check_integers(name, found.dtype, found.dtype.kind in "iu" or not found.size)
    for end in (found.min(initial=0), found.max(initial=0)):
        check_integer(name, int(end))
    return found.astype(np.int64)
