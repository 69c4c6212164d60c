"""What all engines have in common: they answer a request with a candidate or a refusal, and a candidate can be run.

The planner asks engines in order and takes the cheapest candidate that certifies eps. FFTW's planner is the model
(Frigo and Johnson, Proc. IEEE 93, 2005): a solver makes a plan for a problem or declines, and one that needs plans for
parts of the problem asks the planner for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np

from ..certificate import BoundedEntryError, Certificate
from ..certify.statistics import Statistics
from ..certify.values import Values
from ..machine.memory import fits
from ..problem.input_gradients import InputGradients
from ..problem.pieces import WHOLE, Pieces
from ..problem.problem import Outline, Problem, Slots
from ..problem.request import Request
from ..problem.traffic import Sender, Traffic
from .cost import Work

CHEAPEST = "the cheapest engine that certifies eps"
# How a refusal names a feature of a problem. A feature that is not listed here is called by its own name.
_WORDS = {
    "bias": "a bias",
    "family": "a RelativeFamily, whose W_{i-j} does not factor",
    "near": "a near field",
    "window": "a window",
    "causal": "a causal mask",
    "key_mask": "a key mask",
    "packed": "packed sequences",
}


@dataclass(frozen=True, slots=True)
class Context:
    """The problem, the request and the measurements that an engine is given when it is asked for an offer.

    Attributes
    ----------
    outline : Outline
        The outline of the whole problem; in one process the problem itself.
    request : Request
    statistics : Statistics
        What has been, or can be, measured of the numbers.
    piece : Outline
        The largest piece that one process has, by which memory is judged; in one process the problem itself.
    distributed : bool
        Whether the sequence is in pieces; then all statistics were measured before planning.
    by_moments : tuple or None
        What moments are expected to certify in each slot (`polynomial.moment_search`), None in a slot where nothing
        cheap; None as a whole where that has not been looked for.
    """

    outline: Outline
    request: Request
    statistics: Statistics
    piece: Outline
    distributed: bool = False
    by_moments: tuple[object | None, ...] | None = None

    @classmethod
    def of(cls, problem: Problem, request: Request) -> Context:
        """The context of a problem that is in one process as a whole."""
        return cls(problem, request, Statistics(problem), problem)

    @property
    def problem(self) -> Problem:
        """The problem with its numbers: all of it in one process, else this process's piece."""
        return self.statistics.problem

    def slots(self, which: Slots) -> Context:
        """The context of some of the slots alone."""
        if isinstance(which, slice) and which == slice(0, self.outline.sizes.H):
            return self
        statistics, own = self.statistics.slots(which), self.by_moments
        if own is not None:
            own = tuple(own[slot] for slot in np.arange(len(own))[which].tolist())
        outline = piece = statistics.problem
        if self.distributed:
            outline, piece = self.outline.slots(which), self.piece.slots(which)
        return replace(self, outline=outline, piece=piece, statistics=statistics, by_moments=own)

    def asking(self, **changes: object) -> Context:
        """The same context with these fields of the request changed."""
        return replace(self, request=replace(self.request, **changes), by_moments=None)


def gradient_of(certificate: Certificate) -> Certificate:
    """The certificate of gradients beside one of O: their rounding error is taken to be four times that of O."""
    return replace(certificate, rounding=4 * certificate.rounding)


def row_by_row(certificate: Certificate, of_slots: list[float], rows: tuple[int, int, int]) -> Certificate:
    """The certificate with the truncation of each of these (H, G, n) rows, which is that of its slot."""
    found = np.broadcast_to(np.array(of_slots)[:, None, None], rows)
    return replace(certificate, rows_truncation=found)


class Executable(ABC):
    """A way to run one problem, and the certificates that it promises.

    An executable holds no results, so many threads may run it, and it can be sent between processes.

    Attributes
    ----------
    engine : str
        The name of its engine.
    certificate : Certificate
        The certificate of O.
    gradient_certificate : Certificate or None
        The certificate of gradients, if they were asked for.
    values : Values or None
        The ranges of the values, in units of which errors are given.
    """

    engine: str
    certificate: Certificate
    gradient_certificate: Certificate | None
    values: Values | None

    @property
    def grad(self) -> bool:
        """Whether there will be a backward pass."""
        return self.gradient_certificate is not None

    def leaves(self, outline: Outline) -> tuple[tuple[Outline, Executable], ...]:
        """The parts of a problem and their executables; the problem and this one alone where it runs the whole."""
        return ((outline, self),)

    @abstractmethod
    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        """The forward pass: a result with O, and with lse if it is wanted.

        Raises
        ------
        BoundedEntryError
            Too many rows turned out not to be certified after they were computed, and no other engine may run.
        """

    @abstractmethod
    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        """The gradients of ``<do, O>``, from what `forward` returned."""

    def resume(self, problem: Problem, result: Result, o: np.ndarray, lse: np.ndarray) -> Result:
        """The result that `backward` needs if `problem` has only some of the keys, and o and lse are of all keys."""
        raise NotImplementedError(f"{self.engine} attention can't be resumed under a larger softmax")

    def slots(self, which: Slots) -> Executable:
        """What runs some of the slots alone; its certificates are those of all."""
        raise NotImplementedError(f"{self.engine} attention can't be told to run some of the slots")

    def measured_by(self, statistics: Statistics | None) -> Executable:
        """This executable with the measurements of this process; with None without any, to be sent to other ranks."""
        return self

    def traffic(self, sender: Sender) -> Traffic:
        """What one process sends and receives in a call in which no row fails its certificate."""
        return Traffic()

    @property
    def unit(self) -> float:
        """The size of values that rounding is in units of, 0 where there is no rounding."""
        return 0.0 if self.values.exact else self.values.spread

    def storing(self, dtype: np.dtype) -> float:
        """What storing O in the dtype of the call adds to its error, in units of the range; 0 but in half precision."""
        return self.values.storing(dtype) if dtype.itemsize == 2 and self.values is not None else 0.0

    def stored(self, certificate: Certificate, dtype: np.dtype) -> Certificate:
        """The certificate of O stored in the dtype of the call."""
        return certificate.stored(self.storing(dtype))


@dataclass(slots=True)
class Result:
    """The results of a forward pass, and what backward needs of them.

    Attributes
    ----------
    o : (H, G, n, d_v) array
    lse : (H, G, n) float64 array or None
    executable : Executable
        The executable that really ran; it may be a fallback of the one that was asked.
    saved : object
        What the backward pass of that executable needs.
    found, gradient_found : Certificate or None
        Certificates that were found in the pass itself, instead of those that were promised before it.
    """

    o: np.ndarray
    lse: np.ndarray | None
    executable: Executable
    saved: object = None
    found: Certificate | None = None
    gradient_found: Certificate | None = None

    @property
    def certificate(self) -> Certificate:
        """The certificate of o."""
        return self.executable.certificate if self.found is None else self.found

    @property
    def gradient_certificate(self) -> Certificate | None:
        """The certificate of gradients, if they were asked for."""
        return self.executable.gradient_certificate if self.gradient_found is None else self.gradient_found

    def backward(self, problem: Problem, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        """The gradients of ``<do, O>``."""
        return self.executable.backward(problem, self, do, pieces)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine's offer: an executable that certifies what is asked, and its price.

    Attributes
    ----------
    executable : Executable
    work : Work
        The predicted work, from which the seconds for any number of threads follow.
    bytes : float
        The memory that it needs beyond inputs and outputs.
    reason : str
        Why it should be taken, in words.
    """

    executable: Executable
    work: Work
    bytes: float
    reason: str

    @property
    def engine(self) -> str:
        return self.executable.engine

    @property
    def nominal(self) -> float:
        """The predicted seconds by which candidates are compared; they do not depend on the number of threads."""
        return self.work.nominal

    @property
    def fits(self) -> bool:
        """Whether the machine has the memory that it needs."""
        return fits(self.bytes)

    def beats(self, other: Candidate) -> bool:
        """Whether it is predicted to be faster than another candidate and its memory is there."""
        return self.nominal < other.nominal and self.fits


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an engine has no candidate.

    Attributes
    ----------
    engine : str
    reason : str or None
        The reason in words; None where the caller need not be told.
    kind : type or None
        The type of the error that is raised if the caller insisted on this engine; None if the engine could compute the
        problem, but only at a higher price than another.
    looked : Work
        The work of finding out, where that counts in the price of the call.
    hopeless : bool
        Whether measuring a bound of the scores cannot pay for any engine.
    """

    engine: str
    reason: str | None = None
    kind: type[Exception] | None = BoundedEntryError
    looked: Work = field(default_factory=Work)
    hopeless: bool = False


@dataclass(slots=True)
class Search:
    """The answers that engines have given so far.

    Attributes
    ----------
    request : Request
    answers : list of Candidate and Refusal
        In the order in which they were given.
    """

    request: Request
    answers: list[Candidate | Refusal] = field(default_factory=list)

    @property
    def candidates(self) -> list[Candidate]:
        """The candidates of engines that the request lets run."""
        return [a for a in self.answers if isinstance(a, Candidate) and self.request.takes(a.engine)]

    @property
    def refusals(self) -> list[Refusal]:
        return [a for a in self.answers if isinstance(a, Refusal)]

    @property
    def exact(self) -> Candidate | None:
        """The candidate of the exact engine, with which others are compared even where it may not run."""
        return next((a for a in self.answers if isinstance(a, Candidate) and a.engine == "exact"), None)

    @property
    def best(self) -> Candidate | None:
        """The cheapest candidate that may run. With method="auto" one that is not exact must also fit in memory."""
        # A later candidate of an engine is better than its earlier ones.
        found = {c.engine: c for c in self.candidates}.values()
        if self.request.method == "auto":
            found = [c for c in found if c.engine == "exact" or c.fits]
        return min(found, key=lambda c: (c.nominal, c.engine != "exact"), default=None)

    def of_rule(self, rule: str) -> Candidate | None:
        """The candidate of the polynomial engine whose certificate has this rule."""
        polynomials = (a for a in self.answers if isinstance(a, Candidate) and a.engine == "polynomial")
        return next((a for a in polynomials if a.executable.certificate.rule == rule), None)


class Alike(NamedTuple):
    """How an engine would compute a slot.

    Attributes
    ----------
    key : tuple of numbers
        Slots of one key are computed together; those of smaller keys come first.
    seconds : float
        What it would take if all slots were like this one.
    """

    key: tuple[float, ...]
    seconds: float


class Engine(ABC):
    """A solver, which offers a candidate for a problem or says why it has none.

    Attributes
    ----------
    name : str
        The name by which ``method=`` insists on it; several engines may share one.
    SUPPORTS : frozenset of str
        The features of problems (`Outline.features`) that it handles. Any other feature is refused.
    needs_bound : bool
        Whether it needs a bound of the scores; it is not asked where measuring one cannot pay.
    """

    name: ClassVar[str]
    SUPPORTS: ClassVar[frozenset[str]]
    needs_bound: ClassVar[bool] = True

    def lacks(self, outline: Outline) -> str | None:
        """A feature of the problem that this engine does not support, in words; None if it supports all."""
        missing = outline.features - self.SUPPORTS
        if not missing:
            return None
        return next(_WORDS.get(name, name) for name in [*_WORDS, *sorted(missing)] if name in missing)

    def unable(self, lacking: str) -> Refusal:
        """The refusal of a problem that has what this engine does not do."""
        return Refusal(self.name, lacking, NotImplementedError)

    def alike(self, context: Context, most: float) -> list[Alike | None]:
        """How this engine would compute each slot; None where it has nothing that takes less than `most` seconds.

        That of a slot depends on its own numbers and on the shape of the call, never on other slots.
        """
        return [None] * context.outline.sizes.H

    @abstractmethod
    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        """A candidate, or why there is none.

        Finding out must cost little compared with the work that other engines have already offered.
        """
