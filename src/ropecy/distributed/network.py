"""What messages between ranks take: a latency and a bandwidth, measured or given."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..problem.traffic import Traffic

if TYPE_CHECKING:
    from mpi4py import MPI

_SMALL, _LARGE = 8, 2**20


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


def measure(comm: MPI.Intracomm) -> Network:
    """The network between the ranks of a communicator, the same on all: collective, some milliseconds.

    All ranks send to the next at once, 8 bytes and 1 MiB; the best of some rounds counts, and the slowest rank.
    """
    if comm.size == 1:
        return Network(0.0, math.inf)
    small, large = (max(comm.allgather(_around(comm, size, *how))) for size, *how in ((_SMALL, 5, 8), (_LARGE, 3, 2)))
    return Network(small, _LARGE / max(large - small, 1e-9))


def _around(comm: MPI.Intracomm, size: int, rounds: int, times: int) -> float:
    """Seconds a message takes round the ring of ranks."""
    out, room = np.zeros(size, np.uint8), np.empty(size, np.uint8)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            comm.Sendrecv(out, (comm.rank + 1) % comm.size, recvbuf=room, source=(comm.rank - 1) % comm.size)
        best = min(best, (time.perf_counter() - start) / times)
    return best
