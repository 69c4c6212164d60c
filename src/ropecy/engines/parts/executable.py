"""Attention whose parts are computed one after the other, each by an executable of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ...certificate import Certificate, Entry, Indices, in_one, plan_key, together
from ...certify.once import once
from ...certify.statistics import Statistics
from ...certify.values import Values
from ...problem.input_gradients import InputGradients
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Outline, Problem
from ...problem.traffic import Sender, Traffic
from ..base import Executable, Result
from .selection import Selection, Sequences


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a problem, and what runs it.

    Attributes
    ----------
    selection : Selection
    executable : Executable
    named : callable
        ``named()`` are the slots that it has, as users know them.
    planned : (Problem, Problem) or None
        The whole and the part for which the executable was planned; None where they are in another process.
    """

    selection: Selection
    executable: Executable
    named: Callable[[], Indices]
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
        return self._together(certificates, self._units, self.unit or 1.0)

    def together_of_gradients(self, certificates: list[Certificate]) -> Certificate:
        """The certificate of the gradients of the whole. Their rounding is in units of each row's own values."""
        return self._together(certificates, [1.0] * len(self._ways), 1.0)

    def _together(self, certificates: list[Certificate], units: list[float], whole: float) -> Certificate:
        """The certificate of the whole from those of the parts, given the unit of the rounding of each way."""
        many, found = len(self._groups) > 1, []
        for part, certificate in zip(self.parts, certificates, strict=True):
            # To name thousands of slots takes time.
            found += certificate.parts or [(part.named() if many else (), certificate)]
        entries = [Entry(*own, unit) for own, unit in zip(found, units, strict=True)]
        parts = tuple(in_one([entries[way] for way in group]) for group in self._groups) if many else ()
        certificate = together([own for _, own in found], [unit / whole for unit in units], parts)
        return replace(certificate, packed=many and self._packed)

    @property
    def _packed(self) -> bool:
        return any(isinstance(part.selection, Sequences) for part in self.parts)

    @property
    def _ways(self) -> list[Executable]:
        """What runs each part, or the parts of a part."""
        found: list[Executable] = []
        for own in (part.executable for part in self.parts):
            found += own._ways if isinstance(own, InParts) else [own]
        return found

    @property
    def _units(self) -> list[float]:
        """The unit of the rounding of each way."""
        return [own.unit for own in self._ways]

    @once
    def _groups(self) -> list[list[int]]:
        """The ways that are one part of a certificate: of sequences those of one plan; heads are grouped already."""
        found: dict[object, list[int]] = {}
        for way, own in enumerate(self._ways):
            found.setdefault(plan_key(own.certificate) if self._packed else way, []).append(way)
        return list(found.values())

    @property
    def units_of_parts(self) -> list[float]:
        """The unit of the rounding of each part of a certificate."""
        units = self._units
        return [max(units[way] for way in group) for group in self._groups]

    def storing(self, dtype: np.dtype) -> float:
        whole = self.unit or 1.0
        return max(unit / whole * own.storing(dtype) for unit, own in zip(self._units, self._ways, strict=True))

    def stored(self, certificate: Certificate, dtype: np.dtype) -> Certificate:
        lost, parts = [unit * own.storing(dtype) for unit, own in zip(self._units, self._ways, strict=True)], []
        # Where there is one part it has no name.
        for (slots, found), group, unit in zip(certificate.parts, self._groups, self.units_of_parts, strict=False):
            parts.append((slots, found.stored(max(lost[way] for way in group) / (unit or 1.0))))
        return replace(certificate.stored(self.storing(dtype)), parts=tuple(parts))

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
            if selection.done:
                nothing = np.empty((*selection.rows(problem.q).shape[:3], 0), problem.dtype)
                found.append(Result(nothing, None, part.executable))
                continue
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
        if problem.near is not None:
            found.scale_near = np.zeros(problem.sizes[:2])
        for part, own in zip(self.parts, result.saved, strict=True):
            selection = part.selection
            of_part = own.backward(part.problem(problem), selection.rows(do), selection.pieces(pieces))
            selection.put_rows(found.dq, of_part.dq)
            selection.put_keys(found.dk, of_part.dk)
            selection.put_keys(found.dv, of_part.dv)
            found.symbol += tuple(selection.symbol(symbol, problem.sizes.H) for symbol in of_part.symbol)
            if of_part.scale_near is not None:
                selection.add_near(found.scale_near, of_part.scale_near)
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
