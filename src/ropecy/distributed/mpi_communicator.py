"""What the ranks of an MPI communicator do together: sums in the order of ranks, a ring of messages, shared errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from ..certificate import BoundedEntryError
from ..problem.traffic import FEW
from .network import Network, measure

# When one rank has an error, all ranks raise one: of the first of these classes that the error is an instance of.
_ERRORS = (BoundedEntryError, NotImplementedError, MemoryError, TypeError, ValueError, ArithmeticError)

_RING, _HOME, _ROWS = 1, 2, 3


class MPICommunicator:
    """The ranks of a communicator, for the length of one call of the package.

    Methods are collective unless they say otherwise: all ranks call them in the same order. Sums are taken in the order
    of ranks, whatever algorithms the MPI library prefers, so that the same ranks give the same bits.

    Attributes
    ----------
    rank, size : int
        The number of this rank, from 0 on, and the number of ranks.
    sent : int
        Bytes of arrays that this rank has sent to others.
    """

    distributed = True

    def __init__(self, comm: MPI.Intracomm) -> None:
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm: got {type(comm).__name__}, wants an mpi4py.MPI.Intracomm")
        self._shared = _shared(comm)
        self._comm = self._shared.comm
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.sent = 0

    def together(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What function(...) returns on this rank. If it raises on one rank, all raise an error that names the rank."""
        result = failure = None
        try:
            result = function(*args, **options)
        except Exception as error:
            failure = error
        reports = self._comm.allgather(None if failure is None else (_kind(failure), str(failure)))
        for rank, report in enumerate(reports):
            if report is not None:
                kind, message = report
                raise kind(f"rank {rank}: {message}") from failure
        return result

    def first(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call function(...) on rank 0 only; all ranks return what it returns, or raise what it raises."""
        outcome = None
        if self.rank == 0:
            try:
                outcome = function(*args, **options), None
            except Exception as error:
                outcome = None, (_kind(error), str(error))
        result, failure = self._comm.bcast(outcome)
        if failure is not None:
            kind, message = failure
            raise kind(message)
        return result

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on every rank unless `facts` are the same on all ranks."""
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()
        if len(set(self._comm.allgather(digest))) == 1:
            return
        everyone = self._comm.allgather(facts)
        for name in facts:
            for rank, other in enumerate(everyone):
                if other.get(name) != everyone[0].get(name):
                    raise ValueError(
                        f"rank {rank}: {name}: got {other.get(name)}, wants {everyone[0].get(name)} as rank 0 has"
                    )

    def gather(self, value: Any) -> list[Any]:
        """The list of all ranks' values, in the order of ranks, on every rank."""
        return self._comm.allgather(value)

    def network(self) -> Network:
        """The time that messages between these ranks take, measured once for each communicator."""
        if self._shared.network is None:
            self._shared.network = measure(self._comm)
        return self._shared.network

    def largest(self, X: np.ndarray) -> np.ndarray:
        """The maximum of all ranks' X, entry by entry."""
        X = np.asarray(X, order="C")
        found = np.empty_like(X)
        self._comm.Allreduce(X, found, MPI.MAX)
        self.sent += X.nbytes * (self.size > 1)
        return found

    def largest_before(self, X: np.ndarray) -> np.ndarray:
        """The maximum of X over all lower ranks, entry by entry; -inf on rank 0."""
        X = np.asarray(X, order="C")
        found = np.full_like(X, -np.inf)
        self._comm.Exscan(X, found, MPI.MAX)
        self.sent += X.nbytes * (self.size > 1)
        return found if self.rank else np.full_like(X, -np.inf)

    def joined(self, X: np.ndarray, axis: int) -> np.ndarray:
        """All ranks' X, concatenated along `axis` in the order of ranks."""
        self.sent += X.nbytes * (self.size - 1)
        return np.concatenate(self._comm.allgather(X), axis)

    def total(self, X: np.ndarray) -> np.ndarray:
        """The sum of all ranks' X, in float64."""
        if X.size <= FEW:
            everyone = np.empty((self.size, X.size))
            self._comm.Allgather(X.reshape(-1).astype(np.float64), everyone)
            self.sent += everyone[0].nbytes * (self.size - 1)
            return np.cumsum(everyone, axis=0)[-1].reshape(X.shape)
        sums = self._running(X)
        found = np.empty(sums.shape)
        self._comm.Allgather(sums[-1], found)
        self.sent += sums[-1].nbytes * (self.size - 1)
        return self._joined(found, X.shape)

    def before(self, X: np.ndarray, fall: np.ndarray | None = None) -> np.ndarray:
        """The sum of X (H, ...) over all lower ranks, decayed where `fall` is given.

        fall[r], of shape (H,), is the factor by which the X of lower ranks are multiplied in passing rank r.
        """
        sums = self._running(X, fall)
        sums[1:] = sums[:-1]
        sums[0] = 0
        return self._joined(self._exchange(sums), X.shape)

    def after(self, X: np.ndarray, fall: np.ndarray | None = None) -> np.ndarray:
        """The sum of X over all higher ranks, decayed by `fall` as in `before`."""
        sums = self._running(X, fall, backwards=True)
        sums[:-1] = sums[1:]
        sums[-1] = 0
        return self._joined(self._exchange(sums), X.shape)

    def turned(self) -> Turned:
        """The same ranks in reverse order."""
        return Turned(self)

    def _running(self, X: np.ndarray, fall: np.ndarray | None = None, backwards: bool = False) -> np.ndarray:
        """Running sums of the part of X that this rank adds up: row r is the sum over ranks up to r.

        With `backwards` row r is the sum over the ranks from r on.
        """
        flat = np.zeros((self.size, -(-X.size // self.size)))
        flat.reshape(-1)[: X.size] = X.reshape(-1)
        parts = self._exchange(flat)
        order = slice(None, None, -1 if backwards else 1)
        if fall is None:
            np.cumsum(parts[order], axis=0, out=parts[order])
            return parts
        # For each number of the part, the index along the first axis of X that it belongs to.
        slot = (self.rank * parts.shape[1] + np.arange(parts.shape[1])) // (X.size // len(X))
        total = np.zeros(parts.shape[1])
        for part, own in zip(parts[order], fall[order], strict=True):
            total *= own[np.minimum(slot, len(X) - 1)]
            total += part
            part[:] = total
        return parts

    def _exchange(self, rows: np.ndarray) -> np.ndarray:
        """Send row r to rank r, and return the rows that all ranks sent to this one, in the order of ranks."""
        found = np.empty_like(rows)
        self._comm.Alltoall(rows, found)
        self.sent += rows.nbytes // self.size * (self.size - 1)
        return found

    @staticmethod
    def _joined(parts: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return parts.reshape(-1)[: int(np.prod(shape))].reshape(shape)

    def recut(self, X: np.ndarray, cuts: list[int], wanted: list[int]) -> np.ndarray:
        """This rank's rows after moving rows, along axis 2 of X, between ranks.

        Before, rank r has the rows [cuts[r], cuts[r + 1]) of the whole sequence, and afterwards it has
        [wanted[r], wanted[r + 1]). Only rows that change their rank are sent to other ranks.
        """
        first, last = wanted[self.rank : self.rank + 2]
        found = np.empty((*X.shape[:2], last - first, *X.shape[3:]), X.dtype)
        requests, arriving, leaving = [], [], []
        for other in range(self.size):
            start, stop = max(first, cuts[other]), min(last, cuts[other + 1])
            if start < stop:
                room = np.empty((*X.shape[:2], stop - start, *X.shape[3:]), X.dtype)
                arriving.append((slice(start - first, stop - first), room))
                requests.append(self._comm.Irecv(_bytes(room), other, _ROWS))
        for other in range(self.size):
            start, stop = max(cuts[self.rank], wanted[other]), min(cuts[self.rank + 1], wanted[other + 1])
            if start < stop:
                leaving.append(np.ascontiguousarray(X[:, :, start - cuts[self.rank] : stop - cuts[self.rank]]))
                requests.append(self._comm.Isend(_bytes(leaving[-1]), other, _ROWS))
                self.sent += leaving[-1].nbytes * (other != self.rank)
        self.wait(requests)
        for span, rows in arriving:
            found[:, :, span] = rows
        return found

    # Methods for the ring of ranks. They are not collective, but every rank calls them in the same order.

    def pass_on(self, arrays: list[np.ndarray], room: list[np.ndarray]) -> list[MPI.Request]:
        """Start to send `arrays` to the next rank, and to receive those of the rank before into `room`."""
        onward, back = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return self._start(arrays, onward, room, back, _RING)

    def send_home(
        self, arrays: list[np.ndarray], to: int, room: list[np.ndarray], source: int
    ) -> list[MPI.Request]:
        """Start to send to rank `to` what was computed for it, and to receive what `source` computed for this rank."""
        return self._start(arrays, to, room, source, _HOME)

    def _start(self, arrays, to, room, source, tag) -> list[MPI.Request]:
        # Messages of one pair of ranks and one tag arrive in the order in which they were sent.
        requests = [self._comm.Irecv(_bytes(X), source, tag) for X in room]
        requests += [self._comm.Isend(_bytes(X), to, tag) for X in arrays]
        self.sent += sum(X.nbytes for X in arrays)
        return requests

    @staticmethod
    def wait(requests: list[MPI.Request]) -> None:
        """Wait until all of these requests are done."""
        MPI.Request.Waitall(requests)


class Turned:
    """The ranks of a communicator in reverse order: its `before` is their `after`, and the other way round."""

    distributed = True

    def __init__(self, ranks: MPICommunicator) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self.before, self.after = ranks.after, ranks.before
        self.together, self.gather, self.recut = ranks.together, ranks.gather, ranks.recut


def _bytes(X: np.ndarray) -> list:
    flat = X.reshape(-1).view(np.uint8)
    return [flat, flat.size, MPI.BYTE]


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in _ERRORS if isinstance(error, kind)), RuntimeError)


@dataclass(slots=True)
class _Shared:
    """What all calls with one communicator share: a duplicate of it, and its network.

    Messages of the duplicate can't be mixed up with those of other users of the communicator.
    """

    comm: MPI.Intracomm
    network: Network | None = None


def _shared(comm: MPI.Intracomm) -> _Shared:
    """The `_Shared` of a communicator, which is made at its first use and kept."""
    found = comm.Get_attr(_key())
    if found is None:
        found = _Shared(comm.Dup())
        comm.Set_attr(_key(), found)
    return found


def _key() -> int:
    global _keyval
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval(delete_fn=lambda comm, key, shared: shared.comm.Free())
    return _keyval


_keyval: int | None = None
