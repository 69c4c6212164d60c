"""One call from its plan to its results: a forward pass, and backward passes as often as wanted.

The sequence is held by one process, or in pieces by several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..certificate import Certificate, nothing_to_do
from ..certify.statistics import Statistics
from ..engines.base import Context, Executable, Result
from ..problem import checks
from ..problem.call import Call
from ..problem.input_gradients import InputGradients
from ..problem.mask import Mask
from ..problem.normal_form import Normal, normal_form
from ..problem.pieces import WHOLE, Pieces
from ..problem.problem import Origin, Outline
from ..problem.request import Request
from .planner import Choice, choose_and_warn, exactly, looks_at_a_sample


@dataclass(slots=True)
class Planned:
    """A call's problem in normal form, and what is to run it.

    Attributes
    ----------
    normal : Normal
        The problem of this process's piece of the sequence, in normal form.
    whole : Outline
        The outline of the problem of the whole sequence.
    context : Context or None
        What engines were asked about; None where no query sees a key, so that there is nothing to run.
    executable : Executable or None
        What runs, the same on all ranks; None where there is nothing to run.
    choice : Choice or None
        The planner's choice, where it made a search. Of several ranks only rank 0 has it.
    """

    normal: Normal
    whole: Outline
    context: Context | None = None
    executable: Executable | None = None
    choice: Choice | None = None


def planned(call: Call, pieces: Pieces, grad: bool) -> Planned:
    """The plan of a call. For a sequence in pieces, rank 0 makes the plan from what all ranks have measured."""
    problem, request, comm = call.problem, call.request, pieces.comm
    if request.grad != grad:
        request = replace(request, grad=grad)
    if not pieces.distributed:
        if problem.empty:
            return Planned(Normal(problem), problem)
        normal = normal_form(problem, grad)
        context = Context.of(normal.problem, request)
        executable = exactly(context)
        if executable is not None:
            return Planned(normal, problem, context, executable)
        choice = choose_and_warn(context)
        return Planned(normal, problem, context, choice.executable, choice)
    whole, piece = _outlines(call, pieces)
    problem = replace(problem, mask=replace(problem.mask, lo=whole.mask.lo, hi=whole.mask.hi))
    if whole.empty:
        return Planned(Normal(problem), whole)
    # What rounding changed before the normal form counts as much as on the rank where it is largest.
    own = problem.origin
    lost = comm.largest(np.array([own.q_lost, own.k_lost, own.v_lost])).tolist()
    normal = normal_form(replace(problem, origin=Origin(*lost)), grad, comm)
    whole = replace(whole, scale=normal.problem.scale, near=normal.problem.near)
    context = _measured_together(whole, piece, request, Statistics(normal.problem, comm), pieces)
    choices: list[Choice] = []

    def on_first() -> Executable:
        choices.append(choose_and_warn(context))
        return choices[0].executable.measured_by(None)

    executable = comm.first(on_first).measured_by(context.statistics)
    return Planned(normal, whole, context, executable, choices[0] if choices else None)


def _measured_together(
    whole: Outline, piece: Outline, request: Request, statistics: Statistics, pieces: Pieces
) -> Context:
    """What engines are asked about, after all ranks have measured every statistic that an engine may ask for.

    Measuring is collective, but only rank 0 asks the engines.
    """
    assert statistics.scores and statistics.values and statistics.hidden
    context = Context(whole, request, statistics, piece, True)
    if pieces.comm.first(looks_at_a_sample, context):
        assert statistics.sample
        return context
    return context.asking(each_weight=True)


def _outlines(call: Call, pieces: Pieces) -> tuple[Outline, Outline]:
    """The outlines, which hold no rows, of the problem of the whole sequence and of the largest piece of it."""
    own, layout, a, comm = call.problem, pieces.layout, call.arguments, pieces.comm
    everyone = comm.gather((own.threads, own.mask.kept is None or bool(own.mask.kept.any())))
    threads, kept = zip(*everyone, strict=True)
    any_kept = any(k and n_k for k, n_k in zip(kept, layout.n_k, strict=True))

    def outline(n: int, n_k: int, threads: int) -> Outline:
        nothing = None if any_kept else np.zeros((own.sizes.H, n_k), np.bool_)
        return Outline(
            sizes=own.sizes._replace(n=n, n_k=n_k),
            dtype=own.dtype,
            scale=own.scale,
            mask=Mask(n, n_k, a.lo, a.hi, layout.offset, nothing).simplified(),
            near=own.near,
            threads=threads,
            origin=Origin(hidden=pieces.masked, axes=own.origin.axes),
        )

    whole = outline(sum(layout.n), sum(layout.n_k), sum(threads))
    # The polynomial engine moves rows of causal problems to the ranks of their keys. The piece is as large as on the
    # rank that then has the most rows.
    moved = whole.mask.causal and not layout.aligned
    rows = np.diff(layout.rows_at_keys()).tolist() if moved else []
    piece = outline(max(layout.n + rows), max(layout.n_k), max(threads))
    if a.bias is not None and not whole.empty:
        whole.bias, whole.tail = call.symbol(whole.mask.least, whole.mask.most), call.tail
    return whole, piece


class Differentiable(ABC):
    """A forward pass of which gradients are wanted.

    Attributes
    ----------
    call : Call, or what takes its place
    pieces : Pieces
    o : array
        The result, of the dtype computed in.
    """

    call: Any
    pieces: Pieces
    o: np.ndarray

    @property
    def output(self) -> np.ndarray:
        """O as the user has it: a copy, for gradients need O as it is and users subtract targets in place."""
        return self.call.to_user(self.o.copy())

    def vjp(self, dO: Any) -> dict[str, np.ndarray]:
        """The gradients by name for this dO, which is checked to be like O and finite, on all ranks."""

        def checked() -> tuple[np.ndarray, float]:
            X = checks.check_like("dO", dO, self.call.dtype, self.call.shape)
            return X, checks.check_finite("dO", X)

        return self.gradients(*self.pieces.comm.together(checked))

    @abstractmethod
    def gradients(self, dO: np.ndarray, largest: float) -> dict[str, np.ndarray]:
        """The gradients by name for dO in the shape of O with max |dO| = `largest`."""


class Evaluation(Differentiable):
    """A call's forward pass, and its backward pass as often as asked.

    Attributes
    ----------
    call : Call
    pieces : Pieces
    o : (H, G, n, d_v) array
        The result, for H key heads of G query heads each.
    executable : Executable or None
        What runs; None where there is nothing to run.
    lse : array or None
        The logarithm of the sum of each row's weights, in the user's shape, where it was wanted.
    """

    def __init__(self, call: Call, *, grad: bool = False, want_lse: bool = False, pieces: Pieces = WHOLE) -> None:
        self.call, self.pieces = call, pieces
        found = planned(call, pieces, grad)
        self._normal, self.executable = found.normal, found.executable
        self._result: Result | None = None
        problem = found.normal.problem
        if found.executable is None:
            self.o = np.zeros(problem.q.shape[:3] + problem.v.shape[2:], problem.dtype)
            lse = np.full(problem.q.shape[:3], -np.inf) if want_lse else None
        else:
            self._result = result = found.executable.forward(problem, want_lse or self._normal.needs_lse, pieces)
            self.o = self._normal.output(result.o, result.lse)
            lse = self._normal.log_sums(result.lse) if want_lse else None
        self.lse = call.lse_to_user(lse) if want_lse else None

    @property
    def certificate(self) -> Certificate:
        """The certificate of O, with rows_truncation in the user's shape."""
        if self._result is None:
            return replace(nothing_to_do(), rows_truncation=np.zeros(self.call.shape[:-1]))
        found = self._result.certificate
        rows = found.rows_truncation
        if rows is None:
            rows = np.full(self._result.o.shape[:3], found.truncation)
        found = replace(found, rows_truncation=self.call.lse_to_user(rows))
        return self.executable.stored(found, self.call.dtype)

    @property
    def gradient_certificate(self) -> Certificate:
        """The certificate of gradients, with rows_truncation in the user's shape where it is not None."""
        if self._result is None:
            return nothing_to_do()
        found = self._result.gradient_certificate
        if found.rows_truncation is None:
            return found
        return replace(found, rows_truncation=self.call.lse_to_user(found.rows_truncation))

    def gradients(self, dO: np.ndarray, largest: float) -> dict[str, np.ndarray]:
        """The gradients by name, {"dQ": ..., ...}, for dO in the shape of O with max |dO| = `largest`."""
        normal, comm = self._normal, self.pieces.comm
        problem = normal.problem
        if self._result is None:
            found = InputGradients(*(np.zeros_like(X) for X in (problem.q, problem.k, problem.v)))
            return self.call.gradients(found, comm=comm)
        largest = float(comm.largest(np.array(largest)))
        do, exponent = normal.upstream(self.call.from_user(dO), largest)
        found = self._result.backward(problem, do, self.pieces)
        return self.call.gradients(found, normal.exponents(exponent), comm)

    def difference(self, E: np.ndarray) -> tuple[np.ndarray, float]:
        """O - E in the dtype computed in, for E in the shape of O, and max |O - E|.

        Raises
        ------
        ValueError
            Some entry of O - E overflows.
        """
        call = self.call
        with np.errstate(over="ignore"):
            dO = self.o[..., : call.shape[-1]].reshape(call.shape) - E.astype(self.o.dtype, copy=False)
        return dO, checks.check_finite("O - E", dO)
