"""A choice in words: what each engine would promise and cost, and which changes would let a polynomial certify eps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..certificate import BoundedEntryError, nothing_to_do
from ..certify.rounding import polynomial_rounding
from ..certify.sample import Sample
from ..certify.scores import Scores
from ..certify.values import measure_values
from ..engines.base import CHEAPEST, Context
from ..engines.exact.cost import seconds_of
from ..engines.polynomial.cost import Served, pays_from
from ..engines.polynomial.worst_case import WorstCase
from ..problem.problem import Outline, Problem
from ..problem.request import METHODS, Request
from .plan import Alternative, Plan
from .planner import Choice, choose, choose_and_warn

# A change is advised only if it makes a call that a polynomial serves already at least this many times faster.
_WORTH_CHANGING = 2.0
# A change is not advised if it pays only for sequences longer than this.
_LONGEST = 10**7


def plan_of(context: Context, choice: Choice, dtype: np.dtype, scores: Scores | None = None) -> Plan:
    """The report of a choice, for a call of this dtype; `scores` hold the bounds of scores that it mentions."""
    executable, grad = choice.executable, context.request.grad
    priced = choice.priced
    return Plan(
        executable.engine,
        executable.stored(executable.certificate, dtype),
        executable.gradient_certificate,
        choice.candidate.reason,
        {name: seconds_of(c.work, context.outline.threads, grad) for name, c in priced.items()},
        {name: c.bytes for name, c in priced.items()},
        _of=_header(context.outline, context.request, _said_of(scores or context.statistics.plain)),
    )


def plan_of_nothing(outline: Outline, request: Request) -> Plan:
    """The report where no query sees a key."""
    none = nothing_to_do()
    gradient = replace(none, rounding=4 * none.rounding) if request.grad else None
    header = _header(outline, request, f"|s| <= {0.0:.4g} (Cauchy-Schwarz)")
    return Plan("exact", none, gradient, "no query sees a key", {}, {}, _of=header)


def explained(problem: Problem, request: Request, dtype: np.dtype) -> Plan:
    """The plan of a problem with its alternatives and advice.

    Notes
    -----
    The problem is measured once. Each piece of advice is about a changed problem, which is measured too: this takes
    time O(n d), and 80 n d^2 where fourth moments are used.
    """
    if problem.empty:
        return plan_of_nothing(problem, request)
    context = Context.of(problem, request)
    choice = choose_and_warn(context)
    statistics = context.statistics
    made = plan_of(context, choice, dtype, statistics.scores)
    others = _Others(context, choice)
    found = (others.exact(), *others.mixed(), *others.polynomials(), *others.by_name())
    reason = made.reason
    if made.engine == "exact" and request.method == "auto":
        rounds = choice.executable.certificate.error > request.eps
        reason = _why_exact(made, found, f"eps = {request.eps:g}; rounding of exact work in {problem.dtype}" * rounds)
    spread = ""
    if statistics.scores.keys is not None:
        second = Sample(problem, statistics.scores, statistics.values).second
        of_row, most = float(np.sqrt(np.mean(second))), float(np.sqrt(np.max(second)))
        spread = f"; root mean square of a row {of_row:.2g}, at most {most:.2g}"
    header = _header(problem, request, _said_of(statistics.scores, centred=True) + spread)
    made = replace(made, alternatives=found, reason=reason, _of=header)
    if WorstCase().lacks(problem) is None and request.takes("polynomial"):
        advice = (_tried(name, changed) for name, changed in _changes(context))
        made = replace(made, advice=tuple(a for a in advice if _helps(a, made)))
    return made


class _Others:
    """What each engine would promise and cost. Engines that have answered are not asked again."""

    def __init__(self, context: Context, choice: Choice) -> None:
        self._context, self._choice = context, choice

    def exact(self) -> Alternative:
        return _tried("exact", self._context.asking(method="exact", degree=None))

    def mixed(self) -> Iterator[Alternative]:
        """Heads by different engines, where these are chosen."""
        if self._choice.candidate.engine == "mixed":
            yield _alternative("mixed", self._context, self._choice)

    def polynomials(self) -> Iterator[Alternative]:
        """The polynomial engine by the worst case, and by the rule that it would use, where that is another one."""
        yield _tried("polynomial, worst case", self._context.asking(method="polynomial", each_weight=True))
        best = self._insisted("polynomial")
        if best.certificate is not None and best.certificate.rule != "worst case":
            yield replace(best, name=f"polynomial, {best.certificate.rule}")

    def by_name(self) -> Iterator[Alternative]:
        """Each engine other than the exact and the polynomial one."""
        for name in METHODS:
            if name not in ("auto", "exact", "polynomial"):
                yield self._insisted(name)

    def _insisted(self, engine: str) -> Alternative:
        if self._choice.candidate.engine == engine:
            return _alternative(engine, self._context, self._choice)
        return _tried(engine, self._context.asking(method=engine))


def _tried(name: str, context: Context) -> Alternative:
    try:
        choice = choose(context)
    except (BoundedEntryError, NotImplementedError, MemoryError) as error:
        return Alternative(name, None, refusal=str(error).split(";")[0].split("): ")[-1])
    return _alternative(name, context, choice)


def _alternative(name: str, context: Context, choice: Choice) -> Alternative:
    outline, candidate, executable = context.outline, choice.candidate, choice.executable
    served = []
    for part, own in executable.leaves(outline) if WorstCase().lacks(outline) is None else ():
        if own.engine == "polynomial":
            certificate, gradient = own.certificate, own.gradient_certificate
            rule = {"moments": certificate.rule == "moments", "fourth": certificate.failure > 0}
            served.append(Served(part, certificate.degree, gradient and gradient.degree, **rule))
    least = pays_from(served) if served else None
    seconds = seconds_of(candidate.work, outline.threads, context.request.grad)
    return Alternative(name, executable.certificate, seconds, candidate.bytes, least)


def _why_exact(made: Plan, found: tuple[Alternative, ...], passed: str) -> str:
    """Why method="auto" takes the exact engine although others, where ``method=`` asks for them, certify eps.

    Where the exact engine's own rounding exceeds eps, `passed` names eps and that rounding; else it is empty.
    """
    others = [other for other in found[1:] if other.certificate is not None]
    if not others:
        return made.reason
    best = min(others, key=lambda other: other.seconds)
    if passed:
        return f"cheaper than {best.name}, which certifies {passed} passes it"
    if best.seconds < made.seconds["exact"] and made.reason != CHEAPEST:
        return (
            "no cheaper engine is found by a look that takes next to nothing beside exact work; a longer one, which "
            f"method={best.certificate.engine!r} takes, finds {best.name} in {best.seconds:.3g} s"
        )
    # This reason is the polynomial engine's refusal, which the table has in that engine's row already.
    return CHEAPEST if made.reason.startswith("scores are bounded") else made.reason


def _changes(context: Context) -> Iterator[tuple[str, Context]]:
    """Each change that may help, in words, and the context of the changed call, which engines are asked about."""
    problem, request, B = context.problem, context.request, context.statistics.scores.bound
    d, eps = problem.sizes.d, request.eps
    asking = replace(request, method="polynomial")
    here = context.asking(method="polynomial")
    if request.certify == "proof" and not request.grad:
        yield 'certify="sample"', here.asking(certify="sample")
    if eps <= 0.03:
        yield f"eps={10 * eps:g}", here.asking(eps=10 * eps)
    if abs(problem.scale) > 1.01 / d:
        yield "scale=1/d", Context.of(replace(problem, scale=math.copysign(1 / d, problem.scale)), asking)
    if B > 1.05:
        q, k = _normalised(problem.q), _normalised(problem.k)
        if not (_alike(q, problem.q) and _alike(k, problem.k)):
            changed = replace(problem, q=q, k=k, scale=1 / d)
            yield "q and k normalised to a root mean square of 1, scale=1/d", Context.of(changed, asking)
    if problem.dtype == np.float32 and polynomial_rounding(problem, B, measure_values(problem)) >= eps:
        q, k, v = (X.astype(np.float64) for X in (problem.q, problem.k, problem.v))
        yield "float64", Context.of(replace(problem, q=q, k=k, v=v), asking)


def _normalised(X: np.ndarray) -> np.ndarray:
    """X with rows scaled to root mean square 1; rows of zeros stay zeros."""
    size = np.sqrt(np.einsum("...d,...d->...", X, X, dtype=np.float64) / X.shape[-1])
    return (X / np.where(size > 0, size, 1)[..., None]).astype(X.dtype)


def _alike(X: np.ndarray, Y: np.ndarray) -> bool:
    """Whether X and Y differ in no entry by more than a hundredth of max |Y|."""
    return bool(np.abs(X - Y).max() <= 0.01 * np.abs(Y).max())


def _helps(alternative: Alternative, made: Plan) -> bool:
    """Whether a change allows a polynomial where there was none, or one that is much cheaper."""
    if alternative.certificate is None or alternative.pays_from is None:
        return False
    if made.engine != "exact":
        return alternative.seconds * _WORTH_CHANGING < made.seconds[made.engine]
    as_it_is = [other.pays_from or math.inf for other in made.alternatives if other.certificate is not None]
    return alternative.pays_from <= min(_LONGEST, *(least / _WORTH_CHANGING for least in as_it_is))


def _header(outline: Outline, request: Request, scores: str) -> tuple[str, str]:
    H, G, n, n_k, d, d_v = outline.sizes
    what = "forward and backward" if request.grad else "forward"
    return (
        f"{what}: {H * G} x {n:,} queries, {H} x {n_k:,} keys, d = {d}, d_v = {d_v}, {outline.dtype}, "
        f"eps = {request.eps:g}",
        f"scores    {scores}",
    )


def _said_of(scores: Scores, centred: bool = False) -> str:
    plain = f"|s| <= {scores.plain:.4g} (Cauchy-Schwarz)"
    return f"{plain}, {scores.bound:.4g} {scores.how}" if centred or scores.bound < scores.plain else plain
