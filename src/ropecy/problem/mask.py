"""Which keys each row sees: the band of offsets, the hidden keys, and all arithmetic on both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .packed import Alike, Packed


@dataclass(frozen=True, slots=True)
class Mask:
    """Row i sees key j where ``lo <= t <= hi`` with ``t = j - i - offset``, and where key j is kept.

    Attributes
    ----------
    n, n_k : int
        How many rows and how many keys there are.
    lo, hi : int or None
        The ends of the band; None where it has no end on that side. A causal mask has ``hi = 0``.
    offset : int
        The index of row 0 among the keys.
    kept : (H, n_k) bool array or None
        True for the keys of a slot that are not hidden; None where all are kept.
    packed : Packed or None
        Where rows and keys are sequences packed side by side: row i sees keys of its own sequence alone, and t counts
        within it, from the sequence's own offset.
    """

    n: int
    n_k: int
    lo: int | None = None
    hi: int | None = None
    offset: int = 0
    kept: np.ndarray | None = None
    packed: Packed | None = None

    @property
    def features(self) -> frozenset[str]:
        """The names of the masks that hide anything, which an engine must support."""
        found = set()
        if self.lo is not None or self.hi is not None:
            found |= {"causal"} if self.hi == 0 and self.lo is None else {"window"}
        if self.kept is not None:
            found |= {"key_mask"}
        if self.packed is not None:
            found |= {"packed"}
        return frozenset(found)

    @property
    def banded(self) -> bool:
        """Whether the band has an end."""
        return self.lo is not None or self.hi is not None

    @property
    def causal(self) -> bool:
        """Whether the band has an upper end, so that rows see no key farther ahead; without a window, it is causal."""
        return self.hi is not None

    @property
    def least(self) -> int:
        """The least t of any row and key, whether or not the band allows it."""
        if self.packed is not None:
            return self.packed.least
        return -(self.n - 1) - self.offset

    @property
    def most(self) -> int:
        """The largest t of any row and key, whether or not the band allows it."""
        if self.packed is not None:
            return self.packed.most
        return self.n_k - 1 - self.offset

    @property
    def seen(self) -> tuple[int, int]:
        """The first t that the band allows, and one past the last; if it allows none, the first is no less."""
        first = self.least if self.lo is None else max(self.least, self.lo)
        return first, (self.most if self.hi is None else min(self.most, self.hi)) + 1

    @property
    def distances(self) -> tuple[int, int]:
        """The least and the largest i + offset - j that the band allows."""
        first, stop = self.seen
        return 1 - stop, -first

    @property
    def seen_symbol(self) -> slice:
        """Where the offsets that the band allows lie in an array over t from `least` to `most`."""
        first, stop = self.seen
        return slice(first - self.least, max(0, stop - self.least))

    @property
    def empty(self) -> bool:
        """Whether no row sees a key, or there are no rows."""
        if self.n == 0 or self.n_k == 0 or (self.kept is not None and not self.kept.any()):
            return True
        if self.packed is not None:
            return all(self.of_sequences(alike).empty for alike in self.packed.alike)
        if self.lo is None and self.hi is None:
            return False
        first, stop = self.seen
        return first >= stop

    @property
    def band_of_indices(self) -> tuple[int, int]:
        """The band (lo, hi) of j - i, with the offset included; an end that is None becomes one past every j - i."""
        return band_of_indices(self.n + self.n_k, self.lo, self.hi, self.offset)

    def simplified(self) -> Mask:
        """The same mask, without those ends of the band that hide nothing."""
        lo = None if self.lo is not None and self.lo <= self.least else self.lo
        hi = None if self.hi is not None and self.hi >= self.most else self.hi
        return self if (lo, hi) == (self.lo, self.hi) else replace(self, lo=lo, hi=hi)

    def without_band(self) -> Mask:
        """The mask by which every row sees all kept keys."""
        return Mask(self.n, self.n_k, kept=self.kept)

    def diagonal(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For the first `count` rows i: t of key i, and whether the band, and packed sequences, let row i see key i."""
        if self.packed is None:
            t, one = np.full(count, -self.offset), np.ones(count, np.bool_)
        else:
            t = self.packed.k_positions[:count] - self.packed.q_positions[:count]
            one = self.packed.of_rows[:count] == self.packed.of_keys[:count]
        first, stop = self.seen
        return t, one & (first <= t) & (t < stop)

    def within(self, lo: int, hi: int | None) -> Mask:
        """The same mask, with the part of its band that lies in [lo, hi]."""
        lo = lo if self.lo is None else max(self.lo, lo)
        if self.hi is not None:
            hi = self.hi if hi is None else min(self.hi, hi)
        return replace(self, lo=lo, hi=hi)

    def rows(self, first: int, stop: int) -> Mask:
        """The mask of the rows [first, stop)."""
        return replace(self, n=stop - first, offset=self.offset + first)

    def first_keys(self, stop: int) -> Mask:
        """The mask of the keys [0, stop)."""
        return replace(self, n_k=stop, kept=None if self.kept is None else self.kept[:, :stop])

    def of_sequences(self, alike: Alike) -> Mask:
        """The mask of packed sequences that are alike; each slot has all of them, one after the other."""
        kept = None
        if self.kept is not None:
            kept = np.ascontiguousarray(self.kept[:, alike.keys[:, None] + np.arange(alike.n_k)])
            kept = kept.reshape(-1, alike.n_k)
        return Mask(alike.n, alike.n_k, self.lo, self.hi, alike.offset, kept).simplified()

    def slots(self, which: slice | np.ndarray) -> Mask:
        """The mask of some of the slots."""
        return self if self.kept is None else replace(self, kept=self.kept[which])

    def repeated(self, times: int) -> Mask:
        """The mask of slots each of which is repeated `times` times."""
        return self if self.kept is None else replace(self, kept=np.repeat(self.kept, times, axis=0))

    def transposed(self) -> Mask:
        """The mask with rows and keys exchanged and both sequences reversed, which keeps the band; no key is hidden."""
        packed = None if self.packed is None else self.packed.transposed()
        return Mask(self.n_k, self.n, self.lo, self.hi, self.offset + self.n - self.n_k, packed=packed)

    def reversed(self) -> Mask:
        """The mask of both sequences reversed, so that t becomes -t."""
        lo, hi = (None if end is None else -end for end in (self.hi, self.lo))
        kept = None if self.kept is None else np.ascontiguousarray(self.kept[:, ::-1])
        return Mask(self.n, self.n_k, lo, hi, self.n_k - self.n - self.offset, kept)

    def keys_of(self, row: int) -> tuple[int, int]:
        """The keys [first, stop) that the band lets a row see, as (first, stop)."""
        at = row + self.offset
        first = 0 if self.lo is None else min(max(at + self.lo, 0), self.n_k)
        return first, self.n_k if self.hi is None else min(max(at + self.hi + 1, first), self.n_k)

    def stops(self, rows: np.ndarray) -> np.ndarray:
        """One past the last key that the band lets these rows see, hidden or not."""
        if self.hi is None:
            return np.full(len(rows), self.n_k)
        return np.clip(rows + self.offset + self.hi + 1, 0, self.n_k)

    def stops_before_chunk(self, rows: np.ndarray, chunk: int) -> np.ndarray:
        """How many keys lie before the chunk of each of these rows, if the mask is causal; else all keys.

        Sequences are cut into chunks of `chunk` keys. A polynomial serves the keys before a row's chunk.
        """
        if self.hi is None:
            return np.full(len(rows), self.n_k)
        return np.clip((rows + self.offset) // chunk * chunk, 0, self.n_k)

    def kept_before(self, stops: np.ndarray, slots: int) -> np.ndarray:
        """How many of the first `stops` keys are kept in each slot, (slots, len(stops))."""
        if self.kept is None:
            return np.broadcast_to(stops, (slots, len(stops)))
        return np.pad(np.cumsum(self.kept, axis=1), ((0, 0), (1, 0)))[:, stops]

    def hide(self, X: np.ndarray) -> np.ndarray:
        """X (H, n_k, m) with 0 in the rows of hidden keys."""
        return X if self.kept is None else np.where(self.kept[..., None], X, X.dtype.type(0))

    def pairs(self, ahead: float = 0.0, behind: float = 0.0) -> float:
        """How many pairs of a row and a key the band allows, in one head.

        For each row, `ahead` more keys are counted if the band has an upper end, and `behind` more if it has a lower
        end: kernels compute whole tiles.
        """
        everything = float(self.n) * self.n_k
        if not self.banded:
            return everything
        before = 0 if self.lo is None else _clipped_sum(self.offset + self.lo, self.n, self.n_k)
        upto = self.n * self.n_k if self.hi is None else _clipped_sum(self.offset + self.hi + 1, self.n, self.n_k)
        more = (self.hi is not None) * ahead + (self.lo is not None) * behind
        return min(everything, float(upto - before) + self.n * more)


def _clipped_sum(start: int, n: int, most: int) -> int:
    """The sum over 0 <= i < n of start + i, each clipped to [0, most]."""
    rising, top = (min(max(edge, 0), n) for edge in (-start, most - start))
    return (top - rising) * (2 * start + rising + top - 1) // 2 + (n - top) * most


def band_of_indices(far: int, lo: int | None, hi: int | None, offset: int) -> tuple[int, int]:
    """The band (lo, hi) of j - i, with the offset included; `far`, past every j - i, stands for an end that is None."""
    return -far if lo is None else max(-far, lo + offset), far if hi is None else min(far, hi + offset)
