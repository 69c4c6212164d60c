"""Who sees whom: the band of offsets that a row may see, the keys that are hidden, and all arithmetic on both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


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
    """

    n: int
    n_k: int
    lo: int | None = None
    hi: int | None = None
    offset: int = 0
    kept: np.ndarray | None = None

    @property
    def features(self) -> frozenset[str]:
        """The names of the fields that hide anything: what an engine must support."""
        found = set()
        if self.lo is not None or self.hi is not None:
            found |= {"causal"} if self.hi == 0 and self.lo is None else {"window"}
        if self.kept is not None:
            found |= {"key_mask"}
        return frozenset(found)

    @property
    def banded(self) -> bool:
        """Whether the band has an end."""
        return self.lo is not None or self.hi is not None

    @property
    def causal(self) -> bool:
        """Whether rows see no key past a distance ahead of them; of masks without a window that is the causal one."""
        return self.hi is not None

    @property
    def least(self) -> int:
        """The least t that there is, whatever the band allows."""
        return -(self.n - 1) - self.offset

    @property
    def most(self) -> int:
        """The largest t that there is, whatever the band allows."""
        return self.n_k - 1 - self.offset

    @property
    def seen(self) -> tuple[int, int]:
        """The first t that the band allows and one past the last; the first is no less where there is none."""
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
        if self.lo is None and self.hi is None:
            return False
        first, stop = self.seen
        return first >= stop

    @property
    def band_of_indices(self) -> tuple[int, int]:
        """The band of j - i, without the offset; an end that is not there lies past every j - i."""
        far = self.n + self.n_k
        lo = -far if self.lo is None else max(-far, self.lo + self.offset)
        return lo, far if self.hi is None else min(far, self.hi + self.offset)

    def simplified(self) -> Mask:
        """The same without ends of the band that hide nothing."""
        lo = None if self.lo is not None and self.lo <= self.least else self.lo
        hi = None if self.hi is not None and self.hi >= self.most else self.hi
        return self if (lo, hi) == (self.lo, self.hi) else replace(self, lo=lo, hi=hi)

    def without_band(self) -> Mask:
        """All kept keys for every row."""
        return Mask(self.n, self.n_k, kept=self.kept)

    def within(self, lo: int, hi: int | None) -> Mask:
        """The same with a band that is no wider than this one."""
        lo = lo if self.lo is None else max(self.lo, lo)
        if self.hi is not None:
            hi = self.hi if hi is None else min(self.hi, hi)
        return replace(self, lo=lo, hi=hi)

    def rows(self, first: int, stop: int) -> Mask:
        """That of the rows [first, stop)."""
        return replace(self, n=stop - first, offset=self.offset + first)

    def first_keys(self, stop: int) -> Mask:
        """That of the keys [0, stop)."""
        return replace(self, n_k=stop, kept=None if self.kept is None else self.kept[:, :stop])

    def slots(self, which: slice) -> Mask:
        """That of some slots."""
        return self if self.kept is None else replace(self, kept=self.kept[which])

    def repeated(self, times: int) -> Mask:
        """That of slots each of which stands `times` times in a row."""
        return self if self.kept is None else replace(self, kept=np.repeat(self.kept, times, axis=0))

    def transposed(self) -> Mask:
        """That of keys that see rows, both sequences reversed, nothing hidden: the band stays as it is."""
        return Mask(self.n_k, self.n, self.lo, self.hi, self.offset + self.n - self.n_k)

    def reversed(self) -> Mask:
        """That of both sequences from their ends: t becomes -t."""
        lo, hi = (None if end is None else -end for end in (self.hi, self.lo))
        kept = None if self.kept is None else np.ascontiguousarray(self.kept[:, ::-1])
        return Mask(self.n, self.n_k, lo, hi, self.n_k - self.n - self.offset, kept)

    def keys_of(self, row: int) -> tuple[int, int]:
        """The keys [first, stop) that the band lets a row see."""
        at = row + self.offset
        first = 0 if self.lo is None else min(max(at + self.lo, 0), self.n_k)
        return first, self.n_k if self.hi is None else min(max(at + self.hi + 1, first), self.n_k)

    def stops(self, rows: np.ndarray) -> np.ndarray:
        """One past the last key that the band lets these rows see, hidden or not."""
        if self.hi is None:
            return np.full(len(rows), self.n_k)
        return np.clip(rows + self.offset + self.hi + 1, 0, self.n_k)

    def stops_before_chunk(self, rows: np.ndarray, chunk: int) -> np.ndarray:
        """How many keys lie before the chunks of these rows, sequences being cut each `chunk` keys where the mask is
        causal: those that a polynomial serves. All keys where it is not.
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
        """How many pairs of a row and a key the band allows, of one head; with so many keys more for each row at the
        upper and at the lower end of the band, which tiles look at.
        """
        everything = float(self.n) * self.n_k
        if not self.banded:
            return everything
        before = 0 if self.lo is None else _clipped_sum(self.offset + self.lo, self.n, self.n_k)
        upto = self.n * self.n_k if self.hi is None else _clipped_sum(self.offset + self.hi + 1, self.n, self.n_k)
        more = (self.hi is not None) * ahead + (self.lo is not None) * behind
        return min(everything, float(upto - before) + self.n * more)


def _clipped_sum(start: int, n: int, most: int) -> int:
    """The sum over 0 <= i < n of start + i clipped to [0, most]."""
    rising, top = (min(max(edge, 0), n) for edge in (-start, most - start))
    return (top - rising) * (2 * start + rising + top - 1) // 2 + (n - top) * most
