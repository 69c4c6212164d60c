"""The time that messages between ranks take, from a latency and a bandwidth, which are measured or given."""

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
    """A network where a message takes latency + bytes / bandwidth seconds.

    Parameters
    ----------
    latency : float
        Seconds for each message.
    bandwidth : float
        Bytes per second that one rank sends while all ranks send.

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
        """The seconds that these messages take one after the other while nothing is computed."""
        return self.latency * traffic.messages + max(traffic.sent, traffic.received) / self.bandwidth


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is sent between ranks by a plan, and how long that takes.

    Attributes
    ----------
    ranks : int
        The number of ranks.
    own, worst : Traffic
        The traffic of this rank, and for each of its numbers the largest of any rank.
    network : Network
    seconds : float
        The predicted time of the traffic `worst` on this network.
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
    """Measure the network between the ranks of a communicator. It is collective and takes some milliseconds.

    All ranks send messages of 8 bytes, and then of 1 MiB, to the next rank at the same time. For each rank the fastest
    of several rounds counts, and of all ranks the slowest, so that the result is the same on all.
    """
    if comm.size == 1:
        return Network(0.0, math.inf)
    small, large = (max(comm.allgather(_around(comm, size, *how))) for size, *how in ((_SMALL, 5, 8), (_LARGE, 3, 2)))
    return Network(small, _LARGE / max(large - small, 1e-9))


def _around(comm: MPI.Intracomm, size: int, rounds: int, times: int) -> float:
    """The seconds that one message takes when all ranks send `size` bytes to the next rank in the ring."""
    out, room = np.zeros(size, np.uint8), np.empty(size, np.uint8)
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            comm.Sendrecv(out, (comm.rank + 1) % comm.size, recvbuf=room, source=(comm.rank - 1) % comm.size)
        best = min(best, (time.perf_counter() - start) / times)
    return best
