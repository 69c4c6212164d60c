"""What all engines have in common: they answer a request with a candidate or a refusal, and a candidate can be run.

The planner asks engines in order and takes the cheapest candidate that certifies eps. FFTW's planner is the model
(Frigo and Johnson, Proc. IEEE 93, 2005): a solver makes a plan for a problem or declines, and one that needs plans for
parts of the problem asks the planner for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from ..certificate import BoundedEntryError, Certificate
from ..certify.statistics import Statistics
from ..certify.values import Values
from ..machine.memory import fits
from ..problem.input_gradients import InputGradients
from ..problem.pieces import WHOLE, Pieces
from ..problem.problem import Outline, Problem
from ..problem.request import Request
from ..problem.traffic import Sender, Traffic
from .cost import Work

CHEAPEST = "the cheapest engine that certifies eps"
# Features in the words of a refusal; one that has no words of its own is called by its name.
_WORDS = {
    "bias": "a bias",
    "family": "a RelativeFamily, whose W_{i-j} does not factor",
    "near": "a near field",
    "window": "a window",
    "causal": "a causal mask",
    "key_mask": "a key mask",
}


@dataclass(frozen=True, slots=True)
class Context:
    """What engines are asked about.

    Attributes
    ----------
    outline : Outline
        Of the whole problem; in one process the problem itself.
    request : Request
    statistics : Statistics
        What has been, or can be, measured of the numbers.
    piece : Outline
        The largest piece that one process has, by which memory is judged; in one process the problem.
    distributed : bool
        Whether the sequence is in pieces: then statistics have been measured before anybody plans.
    """

    outline: Outline
    request: Request
    statistics: Statistics
    piece: Outline
    distributed: bool = False

    @classmethod
    def of(cls, problem: Problem, request: Request) -> Context:
        """That of a problem which one process has."""
        return cls(problem, request, Statistics(problem), problem)

    @property
    def problem(self) -> Problem:
        """The problem with its numbers: all of it in one process, else this process's piece."""
        return self.statistics.problem

    def asking(self, **changes: object) -> Context:
        """The same with another request."""
        return replace(self, request=replace(self.request, **changes))


def gradient_of(certificate: Certificate) -> Certificate:
    """What rounding does to gradients where it does so much to O."""
    return replace(certificate, rounding=4 * certificate.rounding)


class Executable(ABC):
    """A way to run one problem, and what it promises.

    Executables hold no results: one may be run from many threads, and is sent between processes.

    Attributes
    ----------
    engine : str
    certificate : Certificate
        Of O.
    gradient_certificate : Certificate or None
        Of gradients, where they were asked for.
    values : Values or None
        The range of values that errors are measured in; None where there are none.
    """

    engine: str
    certificate: Certificate
    gradient_certificate: Certificate | None
    values: Values | None

    @property
    def grad(self) -> bool:
        """Whether there will be a backward pass."""
        return self.gradient_certificate is not None

    @abstractmethod
    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        """O, and lse where it is wanted.

        Raises
        ------
        BoundedEntryError
            Rows are certified once they are computed, too many are not, and the engine was insisted on.
        """

    @abstractmethod
    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        """The gradients of ``<do, O>``."""

    def resume(self, problem: Problem, result: Result, o: np.ndarray, lse: np.ndarray) -> Result:
        """The result for `backward` where `problem` has some of the keys only and o and lse are those of all keys."""
        raise NotImplementedError(f"{self.engine} attention can't be resumed under a larger softmax")

    def measured_by(self, statistics: Statistics | None) -> Executable:
        """The same with what this process has measured; None takes it away, so that the rest can be sent."""
        return self

    def traffic(self, sender: Sender) -> Traffic:
        """What one process sends and receives in a call, no row failing its certificate."""
        return Traffic()

    def storing(self, dtype: np.dtype) -> float:
        """What storing O in the dtype of the call adds to its certificate: nothing but in half precision."""
        return self.values.storing(dtype) if dtype.itemsize == 2 and self.values is not None else 0.0


@dataclass(slots=True)
class Result:
    """A forward pass, and what backward needs of it.

    Attributes
    ----------
    o : (H, G, n, d_v) array
    lse : (H, G, n) float64 array or None
    executable : Executable
        The one that really ran.
    saved : object
        What its backward pass needs.
    found, gradient_found : Certificate or None
        Where the pass itself found more than was promised.
    """

    o: np.ndarray
    lse: np.ndarray | None
    executable: Executable
    saved: object = None
    found: Certificate | None = None
    gradient_found: Certificate | None = None

    @property
    def certificate(self) -> Certificate:
        """Of o."""
        return self.executable.certificate if self.found is None else self.found

    @property
    def gradient_certificate(self) -> Certificate | None:
        """Of gradients."""
        return self.executable.gradient_certificate if self.gradient_found is None else self.gradient_found

    def backward(self, problem: Problem, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        """The gradients of ``<do, O>``."""
        return self.executable.backward(problem, self, do, pieces)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An executable that certifies what is asked, and its price.

    Attributes
    ----------
    executable : Executable
    work : Work
        Beside which seconds of any number of threads are known.
    bytes : float
        Beyond inputs and outputs.
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
        """Predicted seconds that choices go by, whatever the number of threads."""
        return self.work.nominal

    @property
    def fits(self) -> bool:
        """Whether there is memory for it."""
        return fits(self.bytes)

    def beats(self, other: Candidate) -> bool:
        """Whether it is predicted to be faster than another, in the memory there is."""
        return self.nominal < other.nominal and self.fits


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an engine has no candidate.

    Attributes
    ----------
    engine : str
    reason : str or None
        In words; None where the engine found nothing worth a word.
    kind : type or None
        Of the error that a caller gets who insisted; None where the engine could, but not for less than another.
    looked : Work
        What it costs to find out, where that is part of a call's price.
    hopeless : bool
        Whether no bound of the scores is worth measuring, by any engine.
    """

    engine: str
    reason: str | None = None
    kind: type[Exception] | None = BoundedEntryError
    looked: Work = field(default_factory=Work)
    hopeless: bool = False


@dataclass(slots=True)
class Search:
    """What engines have answered so far.

    Attributes
    ----------
    request : Request
    answers : list of Candidate and Refusal
    """

    request: Request
    answers: list[Candidate | Refusal] = field(default_factory=list)

    @property
    def candidates(self) -> list[Candidate]:
        """Those that may run."""
        return [a for a in self.answers if isinstance(a, Candidate) and self.request.takes(a.engine)]

    @property
    def refusals(self) -> list[Refusal]:
        return [a for a in self.answers if isinstance(a, Refusal)]

    @property
    def exact(self) -> Candidate | None:
        """The exact engine's, which others are compared with even where it may not run."""
        return next((a for a in self.answers if isinstance(a, Candidate) and a.engine == "exact"), None)

    @property
    def best(self) -> Candidate | None:
        """The cheapest that may run. Beside exact work, others are taken only where they are cheaper and there is
        memory for them; of those that are insisted on, the cheapest.
        """
        # Of one engine, a later candidate betters an earlier one.
        found = {c.engine: c for c in self.candidates}.values()
        if self.request.method == "auto":
            found = [c for c in found if c.engine == "exact" or c.fits]
        return min(found, key=lambda c: (c.nominal, c.engine != "exact"), default=None)

    def of_rule(self, rule: str) -> Candidate | None:
        """The polynomial engine's candidate by a rule of certificate."""
        polynomials = (a for a in self.answers if isinstance(a, Candidate) and a.engine == "polynomial")
        return next((a for a in polynomials if a.executable.certificate.rule == rule), None)


class Engine(ABC):
    """A solver: it makes a candidate for a problem or says why not.

    Attributes
    ----------
    name : str
        What ``method=`` says to insist on it; several engines may have one name.
    SUPPORTS : frozenset of str
        The features of problems (`Outline.features`) that it handles. Whatever is not named here is refused.
    needs_bound : bool
        Whether it needs a bound of the scores; it is not asked where none is worth measuring.
    """

    name: ClassVar[str]
    SUPPORTS: ClassVar[frozenset[str]]
    needs_bound: ClassVar[bool] = True

    def lacks(self, outline: Outline) -> str | None:
        """What of the problem this engine does not do, in words, or None."""
        missing = outline.features - self.SUPPORTS
        if not missing:
            return None
        return next(_WORDS.get(name, name) for name in [*_WORDS, *sorted(missing)] if name in missing)

    def unable(self, lacking: str) -> Refusal:
        """The refusal of a problem that has what this engine does not do."""
        return Refusal(self.name, lacking, NotImplementedError)

    @abstractmethod
    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        """A candidate, or why there is none; to find out whether there is one that betters what others have answered
        must cost little beside what they offer.
        """
