"""Packed sequences in pieces: each process computes by itself those that lie within its piece, and all compute together
those that are cut, one after the other. Results, gradients and certificates are put together here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..certificate import Certificate, Entry, by_plan, nothing_to_do, together
from ..engines.base import Executable
from ..engines.parts.executable import InParts
from ..problem import checks
from ..problem.call import Call
from ..problem.pieces import Pieces
from .evaluation import Differentiable, Evaluation
from .plan import Plan


@dataclass(slots=True)
class Share:
    """Some sequences, and where they lie in this process's piece.

    Attributes
    ----------
    call : Call
    pieces : Pieces
        `WHOLE` for sequences that lie within the piece.
    rows, keys : slice
        Of the piece.
    first : int
        The number of the first of the sequences.
    """

    call: Call
    pieces: Pieces
    rows: slice
    keys: slice
    first: int

    @property
    def cut(self) -> bool:
        """Whether it is one sequence that all processes compute together."""
        return self.pieces.distributed

    @property
    def sequences(self) -> int:
        """How many there are."""
        return 1 if self.cut else self.call.problem.mask.packed.size

    def entries(self, certificate: Certificate, executable: Executable | None) -> Iterator[Entry]:
        """Which slots have which certificate, in units of what, where there is anything to do."""
        if executable is None:
            return
        problem = self.call.problem
        if not certificate.parts:
            heads = np.ndindex(problem.origin.axes)
            which = range(self.first, self.first + self.sequences)
            slots = tuple((*head, j) for head in heads for j in which)
            yield Entry(slots, replace(certificate, rows_truncation=None), executable.unit)
            return
        assert isinstance(executable, InParts)
        for (slots, own), unit in zip(certificate.parts, executable.units_of_parts, strict=True):
            slots = tuple((*slot, self.first) if self.cut else (*slot[:-1], self.first + slot[-1]) for slot in slots)
            yield Entry(slots, replace(own, rows_truncation=None), unit)


@dataclass(slots=True)
class Shares:
    """A call whose packed sequences are in pieces: what takes the place of its `Call`.

    Attributes
    ----------
    own : Share
        The sequences that lie within this process's piece; there may be none.
    cut : list of Share
        Those that are cut, in their order.
    shape : tuple of int
        The shape of the result for this process's rows.
    dtype, compute : numpy.dtype
        Of the user's arrays, and the one computed in.
    sizes : dict
        By name, the shapes of this process's pieces of Q, K and V.
    """

    own: Share
    cut: list[Share]
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: np.dtype
    sizes: dict[str, tuple[int, ...]]

    @property
    def all(self) -> list[Share]:
        return [self.own, *self.cut]

    def to_user(self, o: np.ndarray) -> np.ndarray:
        """A result in the dtype of the user's O."""
        with np.errstate(over="ignore"):
            return o.astype(self.dtype, copy=False)


class SharedEvaluation(Differentiable):
    """The forward pass of `Shares`, and its backward pass as often as asked, as `Evaluation` has them.

    Attributes
    ----------
    call : Shares
    pieces : Pieces
    o : (..., n, d_v) array
        The rows of this process, in the dtype computed in.
    lse : (..., n) float64 array or None
    """

    def __init__(self, call: Shares, *, grad: bool = False, want_lse: bool = False, pieces: Pieces) -> None:
        self.call, self.pieces = call, pieces
        how = {"grad": grad, "want_lse": want_lse}
        own = pieces.comm.together(Evaluation, call.own.call, **how)
        self._evaluations = [own, *(Evaluation(share.call, **how, pieces=share.pieces) for share in call.cut)]
        self.o = np.zeros(call.shape, call.compute)
        self.lse = np.full(call.shape[:-1], -np.inf) if want_lse else None
        for share, found in self._both():
            self.o[..., share.rows, :] = found.o[..., : call.shape[-1]].reshape(share.call.shape)
            if self.lse is not None:
                self.lse[..., share.rows] = found.lse

    def _both(self) -> Iterator[tuple[Share, Evaluation]]:
        return zip(self.call.all, self._evaluations, strict=True)

    @property
    def certificate(self) -> Certificate:
        """The certificate of O, the same on all processes but for rows_truncation. It is collective, as all here is."""
        return self._together([found.certificate for found in self._evaluations])

    @property
    def gradient_certificate(self) -> Certificate:
        return self._together([found.gradient_certificate for found in self._evaluations])

    def _together(self, certificates: list[Certificate]) -> Certificate:
        rows = np.zeros(self.call.shape[:-1])
        for share, certificate in zip(self.call.all, certificates, strict=True):
            of_rows = certificate.rows_truncation
            rows[..., share.rows] = certificate.truncation if of_rows is None else of_rows
        executables = [found.executable for found in self._evaluations]
        return replace(merged(self.call, self.pieces, certificates, executables), rows_truncation=rows)

    def gradients(self, dO: np.ndarray, largest: float) -> dict[str, np.ndarray]:
        """The gradients by name, {"dQ": ..., ...}, for dO in the shape of O."""
        comm, found = self.pieces.comm, []
        for share, evaluation in self._both():
            do = dO[..., share.rows, :]
            size = float(np.abs(do).max(initial=0))
            alone = (evaluation.gradients, do, size)
            found.append(evaluation.gradients(do, size) if share.cut else comm.together(*alone))
        gradients = {}
        for name, own in found[0].items():
            if name in ("dQ", "dK", "dV"):
                gradients[name] = np.zeros(self.call.sizes[name[1:]], own.dtype)
                for share, each in zip(self.call.all, found, strict=True):
                    gradients[name][..., share.rows if name == "dQ" else share.keys, :] = each[name]
                continue
            # Those of what is cut are sums over all processes already.
            whole = comm.total(np.asarray(own, np.float64)) + sum(np.float64(each[name]) for each in found[1:])
            with np.errstate(over="ignore"):
                gradients[name] = np.asarray(whole).astype(own.dtype)[()]
        return gradients

    def difference(self, E: np.ndarray) -> tuple[np.ndarray, float]:
        """`Evaluation.difference`."""
        with np.errstate(over="ignore"):
            dO = self.o - E.astype(self.o.dtype, copy=False)
        return dO, checks.check_finite("O - E", dO)


def merged(
    shares: Shares, pieces: Pieces, certificates: list[Certificate], executables: list[Executable | None]
) -> Certificate:
    """The certificate of all sequences on all processes, given those of this process's shares."""
    entries: list[Entry] = []
    for share, certificate, executable in zip(shares.all, certificates, executables, strict=True):
        # All processes have the same of what they compute together.
        if not share.cut or pieces.comm.rank == 0:
            entries += share.entries(certificate, executable)
    everyone = [entry for one in pieces.comm.gather(entries) for entry in one]
    if not everyone:
        return nothing_to_do()
    largest = max(entry.unit for entry in everyone) or 1.0
    parts = by_plan(everyone)
    found = together([entry.certificate for entry in everyone], [entry.unit / largest for entry in everyone])
    return replace(found, parts=parts, packed=bool(parts))


def plan_of_shares(
    shares: Shares, pieces: Pieces, plans: list[Plan], executables: list[Executable | None]
) -> Plan:
    """The plan of all sequences on all processes, given those of this process's shares."""
    comm, (own, *cut) = pieces.comm, plans
    certificate = merged(shares, pieces, [plan.certificate for plan in plans], executables)
    gradient = None
    if own.gradient_certificate is not None:
        gradient = merged(shares, pieces, [plan.gradient_certificate for plan in plans], executables)
    costs = [(plan.seconds.get(plan.engine, 0.0), plan.bytes.get(plan.engine, 0.0)) for plan in plans]
    sizes = shares.own.call.problem.sizes
    everyone = comm.gather((costs[0], own.reason, executables[0] is None, shares.shape[-2], shares.own.sequences))
    of_own, reasons, idle, rows, count = zip(*everyone, strict=True)
    reasons = [reason for reason, nothing in zip(reasons, idle, strict=True) if not nothing]
    reasons += [plan.reason for plan in cut]
    header = (
        f"{'forward' if gradient is None else 'forward and backward'}: {sizes.H * sizes.G} x {sum(rows):,} queries of "
        f"{sum(count) + len(cut):,} packed sequences, {len(cut):,} of them cut between ranks, d = {sizes.d}, "
        f"d_v = {sizes.d_v}, {shares.compute}"
    )
    return Plan(
        certificate.engine,
        certificate,
        gradient,
        "; ".join(dict.fromkeys(reasons)) or own.reason,
        # Processes work side by side on what is their own, and together on what is cut.
        {certificate.engine: max(seconds for seconds, _ in of_own) + sum(seconds for seconds, _ in costs[1:])},
        {certificate.engine: max(size for _, size in (*of_own, *costs[1:]))},
        _of=(header,),
    )
