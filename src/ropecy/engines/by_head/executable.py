"""Attention whose slots are computed in groups, each by an executable of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...approximation.bias_forms import FarGradient
from ...certificate import Certificate, together
from ...certify.once import once
from ...certify.statistics import Statistics
from ...problem.input_gradients import InputGradients, SymbolGradient
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Origin, Problem, Sizes, Slots
from ..base import Executable, Result


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the slots, and what runs them."""

    slots: Slots
    executable: Executable


class ByHead(Executable):
    """Groups of slots, each with an executable of its own.

    Attributes
    ----------
    parts : tuple of Part
        Every slot is in one of them.
    names : tuple
        The slots of each part as the user knows them (`Origin.named`).
    """

    def __init__(self, parts: tuple[Part, ...], sizes: Sizes, origin: Origin, grad: bool) -> None:
        self.parts, self._grad = parts, grad
        self.names = tuple(origin.named(part.slots, sizes.H) for part in parts)

    @property
    def engine(self) -> str:
        engines = {part.executable.engine for part in self.parts}
        return engines.pop() if len(engines) == 1 else "mixed"

    @property
    def grad(self) -> bool:
        return self._grad

    @property
    def of_slots(self) -> tuple[tuple[Slots, Executable], ...]:
        return tuple((part.slots, part.executable) for part in self.parts)

    @once
    def certificate(self) -> Certificate:
        return together(self.names, [part.executable.certificate for part in self.parts])

    @once
    def gradient_certificate(self) -> Certificate | None:
        if not self._grad:
            return None
        return together(self.names, [part.executable.gradient_certificate for part in self.parts])

    def storing(self, dtype: np.dtype) -> float:
        return max(part.executable.storing(dtype) for part in self.parts)

    def measured_by(self, statistics: Statistics | None) -> ByHead:
        def measured(part: Part) -> Part:
            own = None if statistics is None else statistics.slots(part.slots)
            return replace(part, executable=part.executable.measured_by(own))

        found = object.__new__(ByHead)
        found.__dict__.update(self.__dict__)
        found.parts = tuple(measured(part) for part in self.parts)
        return found

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        rows = problem.q.shape[:3]
        o = np.empty((*rows, problem.sizes.d_v), problem.dtype)
        lse, found = np.empty(rows) if want_lse else None, []
        for part in self.parts:
            own = part.executable.forward(problem.slots(part.slots), want_lse, pieces)
            o[part.slots] = own.o
            if lse is not None:
                lse[part.slots] = own.lse
            found.append(own)
        return _Results(o, lse, self, found)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        found = InputGradients(*(np.empty_like(X) for X in (problem.q, problem.k, problem.v)))
        for part, own in zip(self.parts, result.saved, strict=True):
            slots = part.slots
            of_part = own.backward(problem.slots(slots), np.ascontiguousarray(do[slots]), pieces)
            found.dq[slots], found.dk[slots], found.dv[slots] = of_part.dq, of_part.dk, of_part.dv
            symbols = (_of_all(symbol, slots, problem.sizes.H) for symbol in of_part.symbol)
            found.symbol = (*found.symbol, *symbols)
            if of_part.scale_near is not None:
                found.scale_near = of_part.scale_near + (found.scale_near or 0.0)
        return found


@dataclass(slots=True)
class _Results(Result):
    """The results of all slots; `saved` is the list of the results of the parts."""

    @property
    def certificate(self) -> Certificate:
        return self._together([own.certificate for own in self.saved])

    @property
    def gradient_certificate(self) -> Certificate | None:
        return self._together([own.gradient_certificate for own in self.saved]) if self.executable.grad else None

    def _together(self, certificates: list[Certificate]) -> Certificate:
        """The certificate of all slots, each row with the truncation of its own part."""
        found, rows = together(self.executable.names, certificates), np.empty(self.o.shape[:3])
        for part, own in zip(self.executable.parts, certificates, strict=True):
            rows[part.slots] = own.truncation if own.rows_truncation is None else own.rows_truncation
        return replace(found, rows_truncation=rows)


def _of_all(symbol: SymbolGradient, slots: Slots, H: int) -> SymbolGradient:
    """The gradient of a bias by some slots as that of all H slots, which is 0 in the others."""
    values = symbol.values
    if not isinstance(values, FarGradient):
        return SymbolGradient(_spread(values, 0, slots, H), symbol.first)
    near = None if values.symbol is None else _spread(values.symbol, 0, slots, H)
    flow, moment = _spread(values.flow, 2, slots, H), _spread(values.moment, 1, slots, H)
    return SymbolGradient(replace(values, symbol=near, flow=flow, moment=moment), symbol.first)


def _spread(X: np.ndarray, axis: int, slots: Slots, H: int) -> np.ndarray:
    """X with the slots along `axis`, or the query heads of each slot, in their places among those of all H slots."""
    count = len(np.arange(H)[slots])
    before, after = X.shape[:axis], X.shape[axis + 1 :]
    each = X.shape[axis] // count
    found = np.zeros((*before, H, each, *after), X.dtype)
    found[(slice(None),) * axis + (slots,)] = X.reshape(*before, count, each, *after)
    return found.reshape(*before, H * each, *after)
