"""Attention whose parts are computed one after the other, each by an executable of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ...certificate import Certificate, together
from ...certify.once import once
from ...certify.statistics import Statistics
from ...certify.values import Values
from ...problem.input_gradients import InputGradients
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Outline, Problem
from ...problem.traffic import Sender, Traffic
from ..base import Executable, Result
from .selection import Selection


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a problem, and what runs it.

    Attributes
    ----------
    selection : Selection
    executable : Executable
    heads : tuple of tuple of int
        The heads that it has, as users know them; () where it is not some heads.
    planned : (Problem, Problem) or None
        The whole and the part for which the executable was planned; None where they are in another process.
    """

    selection: Selection
    executable: Executable
    heads: tuple[tuple[int, ...], ...] = ()
    planned: tuple[Problem, Problem] | None = field(default=None, repr=False)

    def problem(self, whole: Problem) -> Problem:
        """The part of a problem; it is not taken out twice."""
        if self.planned is not None and self.planned[0] is whole:
            return self.planned[1]
        return self.selection.problem(whole)


class InParts(Executable):
    """Parts of a problem, each with an executable of its own. Rows that are in no part see no key.

    Attributes
    ----------
    parts : tuple of Part
    """

    def __init__(self, parts: tuple[Part, ...], statistics: Statistics, grad: bool) -> None:
        self.parts, self._grad = parts, grad
        self._statistics: Statistics | None = statistics

    @once
    def values(self) -> Values:
        return self._statistics.values

    @once
    def unit(self) -> float:
        unit = self._statistics.problem.origin.unit
        return super().unit if unit is None else unit

    @property
    def engine(self) -> str:
        engines = {part.executable.engine for part in self.parts}
        return engines.pop() if len(engines) == 1 else "mixed"

    @property
    def grad(self) -> bool:
        return self._grad

    def leaves(self, outline: Outline) -> tuple[tuple[Outline, Executable], ...]:
        return sum((part.executable.leaves(part.selection.outline(outline)) for part in self.parts), ())

    @once
    def certificate(self) -> Certificate:
        return self.together([part.executable.certificate for part in self.parts])

    @once
    def gradient_certificate(self) -> Certificate | None:
        if not self._grad:
            return None
        return self.together_of_gradients([part.executable.gradient_certificate for part in self.parts])

    def together(self, certificates: list[Certificate]) -> Certificate:
        """The certificate of O of the whole, given those of the parts."""
        return together([part.heads for part in self.parts], certificates, self._weights)

    def together_of_gradients(self, certificates: list[Certificate]) -> Certificate:
        """The certificate of the gradients of the whole. Their rounding is in units of each row's own values."""
        return together([part.heads for part in self.parts], certificates, [1.0] * len(certificates))

    @property
    def _weights(self) -> list[float]:
        """The unit of each part's rounding, in units of that of the whole."""
        whole = self.unit or 1.0
        return [part.executable.unit / whole for part in self.parts]

    def storing(self, dtype: np.dtype) -> float:
        parts = zip(self.parts, self._weights, strict=True)
        return max(weight * part.executable.storing(dtype) for part, weight in parts)

    def stored(self, certificate: Certificate, dtype: np.dtype) -> Certificate:
        own = [part.executable for part in self.parts if part.heads]
        pairs = zip(certificate.parts, own, strict=True)
        parts = tuple((heads, executable.stored(found, dtype)) for (heads, found), executable in pairs)
        return replace(certificate.stored(self.storing(dtype)), parts=parts)

    def measured_by(self, statistics: Statistics | None) -> InParts:
        def measured(part: Part) -> Part:
            own = None if statistics is None else statistics.slots(part.selection.slots)
            return replace(part, executable=part.executable.measured_by(own), planned=None)

        assert self.unit is not None
        found = object.__new__(InParts)
        found.__dict__.update(self.__dict__)
        found.parts, found._statistics = tuple(measured(part) for part in self.parts), statistics
        return found

    def traffic(self, sender: Sender) -> Traffic:
        own = (replace(sender, outline=part.selection.outline(sender.outline)) for part in self.parts)
        return sum((part.executable.traffic(of) for part, of in zip(self.parts, own, strict=True)), Traffic())

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        rows = problem.q.shape[:3]
        o = np.zeros((*rows, problem.sizes.d_v), problem.dtype)
        lse, found = np.full(rows, -np.inf) if want_lse else None, []
        for part in self.parts:
            selection = part.selection
            own = part.executable.forward(part.problem(problem), want_lse, selection.pieces(pieces))
            selection.put_rows(o, own.o)
            if lse is not None:
                selection.put_rows(lse, own.lse)
            if not self._grad and type(own) is Result:
                # What the part computed is in its place already.
                own = replace(own, o=np.empty((*own.o.shape[:3], 0), own.o.dtype), lse=None, saved=None)
            found.append(own)
        return _Results(o, lse, self, found)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        found = InputGradients(*(np.zeros_like(X) for X in (problem.q, problem.k, problem.v)))
        for part, own in zip(self.parts, result.saved, strict=True):
            selection = part.selection
            of_part = own.backward(part.problem(problem), selection.rows(do), selection.pieces(pieces))
            selection.put_rows(found.dq, of_part.dq)
            selection.put_keys(found.dk, of_part.dk)
            selection.put_keys(found.dv, of_part.dv)
            found.symbol += tuple(selection.symbol(symbol, problem.sizes.H) for symbol in of_part.symbol)
            if of_part.scale_near is not None:
                found.scale_near = of_part.scale_near + (found.scale_near or 0.0)
        return found


@dataclass(slots=True)
class _Results(Result):
    """The results of all parts; `saved` is the list of the results of each."""

    @property
    def certificate(self) -> Certificate:
        certificates = [own.certificate for own in self.saved]
        return self._with_rows(self.executable.together(certificates), certificates)

    @property
    def gradient_certificate(self) -> Certificate | None:
        if not self.executable.grad:
            return None
        certificates = [own.gradient_certificate for own in self.saved]
        return self._with_rows(self.executable.together_of_gradients(certificates), certificates)

    def _with_rows(self, found: Certificate, certificates: list[Certificate]) -> Certificate:
        """The certificate of the whole with the truncation of each row, which is that of its part."""
        rows = np.zeros(self.o.shape[:3])
        for part, result, own in zip(self.executable.parts, self.saved, certificates, strict=True):
            of_rows = own.rows_truncation
            part.selection.put_rows(rows, np.full(result.o.shape[:3], own.truncation) if of_rows is None else of_rows)
        return replace(found, rows_truncation=rows)
