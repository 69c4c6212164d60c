"""Formulas for the bytes and messages that ranks send to one another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .pieces import Layout
from .problem import Outline

# Up to so many numbers are summed by sending all of them to all ranks, which takes fewer messages and more bytes.
FEW = 512


@dataclass(frozen=True, slots=True)
class Traffic:
    """The bytes of arrays that one rank sends and receives, and the number of messages that it sends.

    The comparison of the ranks' arguments is not counted: it takes some hundred bytes between any two.
    """

    sent: int = 0
    received: int = 0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received, self.messages + other.messages)


@dataclass(frozen=True, slots=True)
class Sender:
    """One rank of a call, whose traffic is asked for.

    Attributes
    ----------
    outline : Outline
        The outline of its piece.
    layout : Layout
    rank : int
    masked : bool
        Whether any rank hides keys.
    grad : bool
        Whether there is a backward pass.
    """

    outline: Outline
    layout: Layout
    rank: int
    masked: bool
    grad: bool

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.layout.n)

    @property
    def rows_at_keys(self) -> tuple[list[int], list[int]] | None:
        """Where causal rows are cut, and where they are cut at their keys; None if they need not move."""
        moves = self.outline.mask.causal and not self.layout.aligned
        return (self.layout.rows, self.layout.rows_at_keys()) if moves else None

    def moved(self, cuts: tuple[list[int], list[int]], width: int, heads: int | None = None) -> Traffic:
        """The traffic of rows, `width` bytes for each head, that are cut at cuts[0] and then at cuts[1]."""
        heads = heads or self.outline.sizes.H * self.outline.sizes.G
        return recut(*cuts, self.rank, heads * width)


def sums(size: int, ranks: int) -> Traffic:
    """The traffic of summing `size` float64 over the ranks before or after, as `MPICommunicator` does.

    It is about ``16 size (ranks - 1) / ranks`` bytes, since each rank adds up one part for all. An MPI library may send
    small parts in fewer messages and more bytes.
    """
    sent = 2 * 8 * -(-size // ranks) * (ranks - 1)
    return Traffic(sent, sent, 2 * (ranks - 1))


def totals(size: int, ranks: int) -> Traffic:
    """The traffic of summing `size` float64 over all ranks."""
    if size > FEW:
        return sums(size, ranks)
    sent = 8 * size * (ranks - 1)
    return Traffic(sent, sent, math.ceil(math.log2(ranks)))


def maxima(size: int, ranks: int) -> Traffic:
    """The traffic of taking the largest, entry by entry, of an array of `size` bytes of every rank."""
    return Traffic(size, size, 2 * math.ceil(math.log2(ranks))) if ranks > 1 else Traffic()


def joined(sizes: list[int], rank: int) -> Traffic:
    """The traffic of one rank when every rank sends its array to all; `sizes` are the bytes of these arrays."""
    others = len(sizes) - 1
    return Traffic(sizes[rank] * others, sum(sizes) - sizes[rank], math.ceil(math.log2(len(sizes))))


def bounds(outline: Outline, ranks: int) -> Traffic:
    """The traffic before planning: for the normal form, norms, means and ranges.

    With a near scale, keys are not centred, which saves a part of it.
    """
    H, d, d_v, item = outline.sizes.H, outline.sizes.d, outline.sizes.d_v, outline.dtype.itemsize
    found = maxima(24, ranks)
    ends = [H * d_v * item] * 2
    for size in (8 * H, 8 * H, 8 * H, *ends, *ends, *([] if outline.near is not None else [H * d * item] * 2)):
        found += maxima(size, ranks)
    for size in (H * d, H, H * d_v, H):
        found += totals(size, ranks)
    return found


def recut(cuts: list[int], wanted: list[int], rank: int, row: int) -> Traffic:
    """The traffic of moving rows of `row` bytes, cut among the ranks at `cuts`, to where they are cut at `wanted`."""

    def leaving(a: list[int], b: list[int]) -> list[int]:
        shared = (min(a[rank + 1], b[r + 1]) - max(a[rank], b[r]) for r in range(len(a) - 1) if r != rank)
        return [rows for rows in shared if rows > 0]

    out, back = leaving(cuts, wanted), leaving(wanted, cuts)
    return Traffic(row * sum(out), row * sum(back), len(out))


def ring(sender: Sender, layout: Layout) -> Traffic:
    """The traffic of the exact engine's ring: pieces go on, and what was computed for other ranks goes home.

    It is that of forward, and of backward too if `sender.grad`.
    """
    H, G, _, _, d, d_v = sender.outline.sizes
    item, rank, masked, grad = sender.outline.dtype.itemsize, sender.rank, sender.masked, sender.grad
    row, result, lse = H * G * d * item, H * G * d_v, H * G * 8
    key = H * (d + d_v) * item

    def forward(r: int) -> int:
        return layout.n[r] * row + layout.n_k[r] * (key + H * masked)

    def backward(r: int) -> int:
        return forward(r) + layout.n[r] * (2 * result * item + lse)

    passes = [(forward, 3 + masked)] + ([(backward, 6 + masked)] if grad else [])
    size = len(layout.n)
    total = Traffic()
    steps = layout.steps
    for step in range(steps + 1):
        if step < steps:
            for piece, arrays in passes:
                total += Traffic(piece((rank - step) % size), piece((rank - step - 1) % size), arrays)
        for host in (rank, (rank + step) % size) if step else ():
            for rows, keys, span in layout.visible(host, step):
                length = span.stop - span.start
                # For rows O in float64 and lse go home, then dQ; for keys dK and dV.
                home = length * (8 * result + lse + grad * row) if rows != host else 0
                messages = (2 + grad) * (rows != host)
                if grad and keys != host:
                    home, messages = home + layout.n_k[keys] * key, messages + 2
                total += Traffic(home, 0, messages) if host == rank else Traffic(0, home, 0)
    return total
