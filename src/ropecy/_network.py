"""What ranks send one another, by formula, and how long that takes by a latency and a bandwidth."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

# Numbers that are summed up everywhere, where each rank sends all it has to all: fewer messages, more bytes.
FEW = 512
_SMALL, _LARGE = 8, 2**20


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one rank: bytes of arrays that it sends and receives, and messages that it sends.

    What its ranks say of their arguments is not counted: some hundred bytes from each to each.
    """

    sent: int = 0
    received: int = 0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received, self.messages + other.messages)


@dataclass(frozen=True, slots=True)
class Network:
    """What a message costs: latency + bytes / bandwidth.

    Parameters
    ----------
    latency : float
        Seconds a message.
    bandwidth : float
        Bytes a second, of one rank while all send.

    Raises
    ------
    ValueError
        A latency below 0 or a bandwidth that is not above 0.

    Examples
    --------
    >>> Network(latency=1.0, bandwidth=4.0).seconds(Traffic(sent=8, received=6, messages=3))
    5.0
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"latency: got {self.latency!r}, wants seconds, 0 or more")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth: got {self.bandwidth!r}, wants bytes a second, more than 0")

    def seconds(self, traffic: Traffic) -> float:
        """Of messages one after the other, while nothing is computed."""
        return self.latency * traffic.messages + max(traffic.sent, traffic.received) / self.bandwidth


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a plan sends between ranks.

    Attributes
    ----------
    ranks : int
    own, worst : Traffic
        Of this rank, and the largest numbers of any.
    network : Network
    seconds : float
        Of the worst, by the network.
    """

    ranks: int
    own: Traffic
    worst: Traffic
    network: Network

    @property
    def seconds(self) -> float:
        return self.network.seconds(self.worst)

    def __str__(self) -> str:
        own, worst, network = self.own, self.worst, self.network
        return (
            f"{self.ranks:,} ranks; this one sends {own.sent:,} bytes and receives {own.received:,}, the worst "
            f"{worst.sent:,} and {worst.received:,} in {worst.messages:,} messages: {self.seconds:.3g} s at "
            f"{network.latency * 1e6:.3g} us a message and {network.bandwidth / 1e9:.3g} GB/s"
        )


def measure(comm: Any) -> Network:
    """The network between the ranks of a communicator, the same on all: collective, some milliseconds.

    All ranks send to the next at once, 8 bytes and 1 MiB; the best of some rounds counts, and the slowest rank.
    """
    if comm.size == 1:
        return Network(0.0, math.inf)
    small, large = (max(comm.allgather(_around(comm, size, *how))) for size, *how in ((_SMALL, 5, 8), (_LARGE, 3, 2)))
    return Network(small, _LARGE / max(large - small, 1e-9))


def _around(comm: Any, size: int, rounds: int, times: int) -> float:
    """Seconds a message takes round the ring of ranks."""
    out, room = np.zeros(size, np.uint8), np.empty(size, np.uint8)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            comm.Sendrecv(out, (comm.rank + 1) % comm.size, recvbuf=room, source=(comm.rank - 1) % comm.size)
        best = min(best, (time.perf_counter() - start) / times)
    return best


def sums(size: int, ranks: int) -> Traffic:
    """Of a sum of `size` float64 over the ranks before or after, as `Ranks` makes it.

    About ``16 size (ranks - 1) / ranks`` bytes: each rank adds up one part for all. An MPI library may send small parts
    in fewer messages than these, and more bytes.
    """
    sent = 2 * 8 * -(-size // ranks) * (ranks - 1)
    return Traffic(sent, sent, 2 * (ranks - 1))


def totals(size: int, ranks: int) -> Traffic:
    """Of a sum of `size` float64 over all ranks."""
    if size > FEW:
        return sums(size, ranks)
    sent = 8 * size * (ranks - 1)
    return Traffic(sent, sent, math.ceil(math.log2(ranks)))


def maxima(size: int, ranks: int) -> Traffic:
    """Of the largest of every rank's arrays of `size` bytes."""
    return Traffic(size, size, 2 * math.ceil(math.log2(ranks))) if ranks > 1 else Traffic()


def joined(sizes: list[int], rank: int) -> Traffic:
    """Of arrays that every rank tells all, of so many bytes."""
    others = len(sizes) - 1
    return Traffic(sizes[rank] * others, sum(sizes) - sizes[rank], math.ceil(math.log2(len(sizes))))


def bounds(shape: tuple[int, int, int], item: int, ranks: int, near: bool) -> Traffic:
    """Of the normal form, of norms, means and ranges, shape = (H, d, d_v): what every rank knows before there is a
    plan. Beside a near scale keys have no normal form.
    """
    H, d, d_v = shape
    found = maxima(24, ranks)
    ends = [H * d_v * item] * 2
    for size in (8 * H, 8 * H, 8 * H, *ends, *ends, *([] if near else [H * d * item] * 2)):
        found += maxima(size, ranks)
    for size in (H * d, H, H * d_v, H):
        found += totals(size, ranks)
    return found


def recut(cuts: list[int], wanted: list[int], rank: int, row: int) -> Traffic:
    """Of rows of `row` bytes, of which rank r has [cuts[r], cuts[r + 1]) before and [wanted[r], ...) after."""

    def leaving(a: list[int], b: list[int]) -> list[int]:
        shared = (min(a[rank + 1], b[r + 1]) - max(a[rank], b[r]) for r in range(len(a) - 1) if r != rank)
        return [rows for rows in shared if rows > 0]

    out, back = leaving(cuts, wanted), leaving(wanted, cuts)
    return Traffic(row * sum(out), row * sum(back), len(out))


def ring(
    layout: Any, rank: int, shape: tuple[int, int, int, int], item: int, masked: bool, grad: bool
) -> Traffic:
    """Of the exact engine, shape = (H, G, d, d_v): pieces go on, and what was computed for others goes home.

    Forward alone, or forward and backward. O(ranks) steps.
    """
    H, G, d, d_v = shape
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
                # Of rows: O in float64 and lse, then dQ; of keys: dK and dV.
                home = length * (8 * result + lse + grad * row) if rows != host else 0
                messages = (2 + grad) * (rows != host)
                if grad and keys != host:
                    home, messages = home + layout.n_k[keys] * key, messages + 2
                total += Traffic(home, 0, messages) if host == rank else Traffic(0, home, 0)
    return total
