"""One call from its plan to its results: forward, and backward as often as wanted, of a sequence in one process or
many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        Of this process's piece.
    whole : Outline
        Of the sequence.
    context : Context or None
        What engines were asked about; None where no query sees a key, and there is nothing to run.
    executable : Executable or None
        The same on all ranks.
    choice : Choice or None
        Where a search was made: over ranks, on the first.
    """

    normal: Normal
    whole: Outline
    context: Context | None = None
    executable: Executable | None = None
    choice: Choice | None = None


def planned(call: Call, pieces: Pieces, grad: bool) -> Planned:
    """The plan of a call; of a sequence in pieces, rank 0 plans by what all have measured."""
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
    # Rounding before the normal form is that of the worst rank.
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
    """What engines are asked about, everything that they may ask of statistics having been measured by all."""
    assert statistics.scores and statistics.values and statistics.hidden
    context = Context(whole, request, statistics, piece, True)
    if pieces.comm.first(looks_at_a_sample, context):
        assert statistics.sample
        return context
    return context.asking(each_weight=True)


def _outlines(call: Call, pieces: Pieces) -> tuple[Outline, Outline]:
    """The problem of all ranks and the largest piece of it, without rows."""
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
            origin=Origin(hidden=pieces.masked),
        )

    whole = outline(sum(layout.n), sum(layout.n_k), sum(threads))
    # Causal rows that the polynomial engine moves to their keys count where they are most.
    moved = whole.mask.causal and not layout.aligned
    rows = np.diff(layout.rows_at_keys()).tolist() if moved else []
    piece = outline(max(layout.n + rows), max(layout.n_k), max(threads))
    if a.bias is not None and not whole.empty:
        whole.bias, whole.tail = call.symbol(whole.mask.least, whole.mask.most), call.tail
    return whole, piece


class Evaluation:
    """A call's forward pass, and its backward pass as often as asked.

    Attributes
    ----------
    call : Call
    pieces : Pieces
    o : (H, G, n, d_v) array
    lse : array or None
        In the user's shape.
    """

    def __init__(self, call: Call, *, grad: bool = False, want_lse: bool = False, pieces: Pieces = WHOLE) -> None:
        self.call, self.pieces = call, pieces
        found = planned(call, pieces, grad)
        self._normal, self._executable = found.normal, found.executable
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
        """Of O, with rows_truncation in the user's shape."""
        if self._result is None:
            return nothing_to_do()
        found = self._result.certificate
        rows = found.rows_truncation
        if rows is None:
            rows = np.full(self._result.o.shape[:3], found.truncation)
        found = replace(found, rows_truncation=self.call.lse_to_user(rows))
        return found.stored(self._executable.storing(self.call.dtype))

    @property
    def gradient_certificate(self) -> Certificate:
        """Of gradients, with rows_truncation in the user's shape where there is one."""
        if self._result is None:
            return nothing_to_do()
        found = self._result.gradient_certificate
        if found.rows_truncation is None:
            return found
        return replace(found, rows_truncation=self.call.lse_to_user(found.rows_truncation))

    def gradients(self, dO: np.ndarray, largest: float) -> dict[str, np.ndarray]:
        """{"dQ": ..., ...} for dO in the shape of O, max |dO| = largest."""
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
        """O - E in the dtype computed in, for E in the shape of O, and its largest entry.

        Raises
        ------
        ValueError
            Some entry is past the largest number.
        """
        call = self.call
        with np.errstate(over="ignore"):
            dO = self.o[..., : call.shape[-1]].reshape(call.shape) - E.astype(self.o.dtype, copy=False)
        return dO, checks.check_finite("O - E", dO)
