"""The planner: engines are asked in turn, and the cheapest candidate that certifies eps is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

from ..certificate import AccuracyWarning, BoundedEntryError, warn
from ..engines.base import Candidate, Context, Engine, Executable, Refusal, Search
from ..engines.exact.cost import seconds_of
from ..engines.exact.engine import Exact, ExactEngine
from ..engines.fft.engine import FFTEngine
from ..engines.near_far.engine import NearFarEngine
from ..engines.outliers.engine import Outliers
from ..engines.parts.engine import BySequence, by_head
from ..engines.parts.groups import Groups, groups
from ..engines.polynomial.by_moments import Moments
from ..engines.polynomial.by_sample import Sampled
from ..engines.polynomial.moment_search import may_serve
from ..engines.polynomial.worst_case import WorstCase, left_by_rounding, of_each_slot
from ..machine.memory import require
from ..problem.request import METHODS

_MINUTE = 60.0
_SECOND = 1.0
# So many multiply-adds take far less than a minute, and little memory, on any machine.
_SMALL = 2**28

# Engines are asked in this order. Each sees the earlier answers, and looks closer only where it can still be cheaper.
ENGINES: list[Engine] = []


def register(engine: Engine) -> None:
    """Let the planner ask this engine too, after all others; ``method=`` then accepts the engine's name."""
    ENGINES.append(engine)
    if engine.name not in METHODS:
        METHODS.append(engine.name)


_EXACT = ExactEngine()
for _engine in (_EXACT, WorstCase(), Moments(), NearFarEngine(), FFTEngine()):
    register(_engine)


@dataclass(slots=True)
class Choice:
    """The candidate that the planner has chosen, and what engines have answered on the way."""

    candidate: Candidate
    search: Search = field(repr=False)

    @property
    def executable(self) -> Executable:
        return self.candidate.executable

    @property
    def priced(self) -> dict[str, Candidate]:
        """By name of the engine, the last candidate of each that had one; for the chosen engine, the chosen one."""
        found = {a.engine: a for a in self.search.answers if isinstance(a, Candidate)}
        return found | {self.candidate.engine: self.candidate}


def choose(context: Context) -> Choice:
    """The cheapest engine that certifies eps, or the one that ``method=`` asks for.

    In the problem some row must see a key.

    Raises
    ------
    BoundedEntryError, NotImplementedError
        No engine that may run has a candidate.
    MemoryError
        The engine that is chosen needs more memory than there is.
    """
    if context.outline.mask.packed is not None:
        return _by_sequence(context)
    slots = groups(context)
    found = _of_one_plan(context) if slots is None else _by_head(slots)
    require(found.candidate.bytes, f"the {found.candidate.engine} engine, beyond inputs and outputs,")
    return found


def _of_one_plan(context: Context, split: bool = True) -> Choice:
    """`choose`, with one plan for all heads, out of which outliers may be taken only if `split`."""
    found = _by_sample(context, split) or _by_proof(context, split)
    if found.candidate.engine == "exact" and context.request.method == "auto":
        if found.executable.certificate.error > context.request.eps:
            found = _certified_by_another(context, found) or found
    return found


def exactly(context: Context) -> Executable | None:
    """The exact engine, where method="exact" asks for it and the problem is small; else None.

    For a small problem time and memory need not be predicted, so nothing is measured.
    """
    H, G, n, n_k, d, d_v = context.outline.sizes
    if context.request.method != "exact" or H * G * n * n_k * (d + d_v) > _SMALL:
        return None
    if _EXACT.lacks(context.outline) is not None:
        return None
    return Exact(context.outline, context.statistics, context.request.grad)


def choose_and_warn(context: Context) -> Choice:
    """`choose`, with a `PerformanceWarning` where the work is predicted to take more than a minute, and an
    `AccuracyWarning` where method="auto" found no engine that certifies eps.
    """
    found, request, outline = choose(context), context.request, context.outline
    candidate = found.candidate
    seconds = seconds_of(candidate.work, outline.threads, request.grad)
    if seconds > _MINUTE:
        certificate = candidate.executable.certificate
        degree = certificate.degree
        of_degree = "" if degree is None else f" of degree {degree}, {certificate.n_features:,} features,"
        warn(f"{candidate.engine} attention{of_degree} is predicted to take {seconds:,.0f} s: {candidate.reason}")
    if request.method == "auto" and not request.each_weight:
        if candidate.executable.certificate.error > request.eps:
            _warn_of_rounding(context, candidate.executable)
    return found


def _warn_of_rounding(context: Context, executable: Executable) -> None:
    """Warn where some part is past eps: the whole may be by the largest truncation and the largest rounding of two."""
    outline, eps = context.outline, context.request.eps
    leaves = [own.certificate for _, own in executable.leaves(outline)]
    certificate = max(leaves, key=lambda found: found.error)
    if certificate.error > eps:
        cure = "; float64 holds more" if outline.dtype.itemsize == 4 else ""
        warn(
            f"no engine certifies eps = {eps:g}: rounding in {outline.dtype} alone may be "
            f"{certificate.rounding:.2g} of the range of the values{cure}",
            AccuracyWarning,
        )


def looks_at_a_sample(context: Context) -> bool:
    """Whether `choose` would look at a sample of rows and keys.

    Ranks that hold the pieces of a sequence need to know this beforehand, since taking the sample is collective.
    """
    request = context.request
    if not request.takes("polynomial") or WorstCase().lacks(context.outline) is not None:
        return False
    if request.certify == "sample" and not request.grad:
        return True
    found = of_each_slot(context, left_by_rounding(context), request.degree)
    return bool(may_serve(context, [0 if p is None else max(1, p.degree) for p in found]).any())


def _by_sequence(context: Context) -> Choice:
    """The choice of a plan for each shape of packed sequences."""
    search = Search(context.request)
    answer = BySequence(plan=lambda own: choose(own).candidate).offer(context, search)
    if isinstance(answer, Refusal):
        search.answers.append(answer)
        raise _error(search, answer)
    require(answer.bytes, "the sequences, beyond inputs and outputs,")
    return _answered(search, answer)


def _by_head(slots: Groups) -> Choice:
    """The choice of a plan for each of these groups of heads, or of one for all where only that fits in memory."""
    context, choices = slots.context, []

    def plan(own: Context) -> Candidate:
        choices.append(_of_one_plan(own, split=False))
        return choices[-1].candidate

    def split(own: Context, seconds: float) -> Candidate | None:
        answer = _OUTLIERS.offer(own, seconds)
        return answer if isinstance(answer, Candidate) else None

    found = by_head(slots, plan, split)
    if choices and found is choices[-1].candidate:
        return choices[-1]
    if context.request.method == "auto" and not found.fits:
        return _of_one_plan(replace(context, by_moments=None))
    return _answered(Search(context.request, [_EXACT.offer(context, Search(context.request))]), found)


def _by_sample(context: Context, split: bool) -> Choice | None:
    """The choice of a polynomial whose error is judged by sampled rows, or None.

    It is made where the caller asked for certify="sample" and trying degrees in this way costs less than the cheapest
    engine with a proved error.
    """
    request = context.request
    if request.certify != "sample" or request.grad or request.each_weight or not request.takes("polynomial"):
        return None
    if WorstCase().lacks(context.outline) is not None:
        return None
    try:
        # The cost to beat is that of engines that need no moments: to measure moments takes longer than to compute
        # sampled rows.
        search = _at_once(context.asking(each_weight=True)).search
    except BoundedEntryError:
        search = Search(request)
    if any(refusal.hopeless for refusal in search.refusals):
        return None
    prove = None if context.distributed else partial(_prove, context, split)
    return _answered(search, Sampled(prove).offer(context, search))


def _prove(context: Context, split: bool, slot: int) -> Executable:
    """What runs one of the slots with a proved error."""
    return _by_proof(context.slots(slice(slot, slot + 1)), split).executable


def _by_proof(context: Context, split: bool) -> Choice:
    """The choice among engines with a proved error.

    It is the cheapest engine for the whole problem, or, where that costs less, a polynomial for most rows and keys with
    the outliers among them computed exactly.
    """
    found = refusal = None
    search = Search(context.request)
    try:
        found = _at_once(context)
        search = found.search
    except BoundedEntryError as error:
        refusal = error
    if split and not any(answer.hopeless for answer in search.refusals):
        most = math.inf if search.best is None else search.best.nominal
        found = _answered(search, _OUTLIERS.offer(context, most)) or found
    if found is None:
        raise refusal
    return found


_OUTLIERS = Outliers(plan=lambda rest: _at_once(rest).candidate)


def _answered(search: Search, answer: Candidate | Refusal) -> Choice | None:
    """The answer as a choice that also holds all answers before it; None where the answer is a refusal."""
    return Choice(answer, Search(search.request, [*search.answers, answer])) if isinstance(answer, Candidate) else None


def _at_once(context: Context) -> Choice:
    """The choice among the engines in ENGINES for the whole problem, without treating outliers separately.

    Raises
    ------
    BoundedEntryError, NotImplementedError
        No engine that may run has a candidate, or no polynomial of the degree that was asked for certifies eps.
    """
    request = context.request
    search = Search(request)
    for engine in ENGINES:
        if engine.needs_bound and any(refusal.hopeless for refusal in search.refusals):
            continue
        # The exact engine is always asked, since the costs of others are compared with its cost.
        if engine.name == "exact" or request.takes(engine.name):
            search.answers.append(engine.offer(context, search))
    best, refusal = search.best, _refusal(search)
    refused = request.degree is not None and refusal is not None and refusal.kind is BoundedEntryError
    if best is None or refused:
        raise _error(search, refusal)
    if best.engine == "exact" and request.method == "auto" and refusal is not None:
        best = replace(best, reason=_why(refusal))
    looked = [r.looked for r in search.refusals if r.engine == best.engine]
    return Choice(replace(best, work=sum(looked, best.work)) if looked else best, search)


def _refusal(search: Search) -> Refusal | None:
    """The last refusal with a reason by the engine that ``method=`` asks for, or by the polynomial engine for "auto".

    None where that engine has a candidate.
    """
    name = "polynomial" if search.request.method == "auto" else search.request.method
    if any(isinstance(a, Candidate) and a.engine == name for a in search.answers):
        return None
    return next((r for r in reversed(search.refusals) if r.engine == name and r.reason is not None), None)


def _why(refusal: Refusal) -> str:
    """The reason that the plan gives for taking the exact engine where another engine refused with this refusal."""
    if refusal.kind is NotImplementedError:
        return f"the {refusal.engine} engine does not do {refusal.reason}"
    return refusal.reason


def _error(search: Search, refusal: Refusal | None) -> Exception:
    """The error that is raised where no engine that may run has a candidate."""
    if refusal is None:
        refusal = next(r for r in search.refusals if r.reason is not None)
    if refusal.kind is NotImplementedError and search.request.method in ("auto", "exact"):
        return NotImplementedError(f"no engine does {refusal.reason}")
    if refusal.kind is NotImplementedError:
        return NotImplementedError(
            f"method={search.request.method!r} does not do {refusal.reason}; method='exact' and 'auto' do"
        )
    return refusal.kind(refusal.reason)


def _certified_by_another(context: Context, exact: Choice) -> Choice | None:
    """The choice of another engine that certifies eps, for problems where the exact engine's rounding exceeds eps.

    None where no such engine takes at most as long as the exact engine, or at most a second.
    """
    for method in ("polynomial", "fft"):
        try:
            found = choose(context.asking(method=method, degree=None, certify="proof", each_weight=True))
        except (BoundedEntryError, NotImplementedError, MemoryError):
            continue
        if found.candidate.nominal <= max(exact.candidate.nominal, _SECOND):
            reason = f"exact work rounds by {exact.executable.certificate.rounding:.2g}, this certifies eps"
            found.candidate = replace(found.candidate, reason=reason)
            return found
    return None
