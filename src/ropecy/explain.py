"""A plan in words: what each engine would promise and cost, and what would bring the data into the regime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .bounds import measure, measure_values, polynomial_rounding
from .certificate import BoundedEntryError, Certificate
from .costs import pays_from
from .engines import polynomial as polynomial_engine
from .problem import Problem
from .sample import Sample

if TYPE_CHECKING:
    from .schedule import Plan

# Advice to one whose call is served by a polynomial must make it this many times faster.
_WORTH_CHANGING = 2.0
# No advice is given to those who would need longer sequences.
_LONGEST = 10**7
_CHEAPEST = "the cheapest engine that certifies eps"


@dataclass(frozen=True, slots=True)
class Alternative:
    """What another engine, or another call, would promise and cost; `certificate` is None where it certifies nothing.

    Attributes
    ----------
    name : str
        The engine and its rule, or what would have to change.
    certificate : Certificate or None
    seconds, bytes : float
        inf where there is no certificate.
    pays_from : int or None
        The n from which it is predicted to beat exact attention, both sequences being of that length; None where that
        is never, or for the exact engine.
    refusal : str or None
        Why there is no certificate.
    """

    name: str
    certificate: Certificate | None
    seconds: float = math.inf
    bytes: float = math.inf
    pays_from: int | None = None
    refusal: str | None = None


def explain(problem: Problem, made: Plan, how: dict[str, Any], make: Callable[..., Plan]) -> None:
    """Give a plan its `alternatives` and its `advice`.

    Parameters
    ----------
    problem : Problem
    made : Plan
        That of the problem.
    how : dict
        With which keyword arguments it was made.
    make : callable
        ``make(problem, **how)`` is a plan.

    Notes
    -----
    Some more plans are made: time O(n d) each, and where fourth moments count, 80 n d^2.
    """
    if problem.empty:
        return
    # A plan that is exact need not know what centring does.
    made._shown = measure(problem)
    if made._shown.keys is not None:
        second = Sample(problem, made._shown, made._values).second
        made._spread = float(np.sqrt(np.mean(second))), float(np.sqrt(np.max(second)))

    def polynomial(name: str, problem: Problem = problem, **changes: Any) -> Alternative:
        return _tried(name, problem, lambda: make(problem, **{**how, "method": "polynomial", **changes}))

    found = [_tried("exact", problem, lambda: make(problem, **how | {"method": "exact", "degree": None}))]
    found.append(polynomial("polynomial, worst case", each_weight=True))
    best = _tried("", problem, partial(_forced, "polynomial", problem, made, how, make))
    if best.certificate is not None and best.certificate.rule != "worst case":
        found.append(replace(best, name=f"polynomial, {best.certificate.rule}"))
    found.append(_tried("fft", problem, partial(_forced, "fft", problem, made, how, make)))
    made.alternatives = tuple(found)
    if made.engine == "exact" and how["method"] == "auto":
        made.reason = _why_exact(made)
    if polynomial_engine.unsupported(problem) is None and how["method"] in ("auto", "polynomial"):
        now = made.seconds[made.engine]
        changes = _changes(problem, how, made._shown.bound)
        tried = (polynomial(name, changed, **options) for name, changed, options in changes)
        made.advice = tuple(a for a in tried if _helps(a, made, now))


def _why_exact(made: Plan) -> str:
    """Why auto takes exact work, beside what engines that were insisted on certify."""
    others = [other for other in made.alternatives[1:] if other.certificate is not None]
    if not others:
        return made.reason
    best = min(others, key=lambda other: other.seconds)
    if made.certificate.error > made.eps:
        return (
            f"cheaper than {best.name}, which certifies eps = {made.eps:g}; rounding of exact work in {made.shape[-1]} "
            "passes it"
        )
    if best.seconds < made.seconds["exact"] and made.reason != _CHEAPEST:
        return (
            "no cheaper engine is found by a look that takes next to nothing beside exact work; a longer one, which "
            f"method={best.certificate.engine!r} takes, finds {best.name} in {best.seconds:.3g} s"
        )
    # A refusal is the polynomial engine's, and stands in its row.
    return _CHEAPEST if made.reason.startswith("scores are bounded") else made.reason


def _tried(name: str, problem: Problem, make: Callable[[], Plan]) -> Alternative:
    try:
        made = make()
    except (BoundedEntryError, NotImplementedError, MemoryError) as error:
        return Alternative(name, None, refusal=str(error).split(";")[0].split("): ")[-1])
    certificate, gradient, least = made.certificate, made.gradient_certificate, None
    if made.engine == "polynomial" and polynomial_engine.unsupported(problem) is None:
        rule = {"moments": certificate.rule == "moments", "fourth": certificate.failure > 0}
        least = pays_from(problem, certificate.degree, gradient and gradient.degree, **rule)
    engine = made.engine
    return Alternative(name, certificate, made.seconds[engine], made.bytes[engine], least)


def _forced(engine: str, problem: Problem, made: Plan, how: dict[str, Any], make: Callable[..., Plan]) -> Plan:
    """The plan of an engine, which `made` may be."""
    return made if made.engine == engine else make(problem, **how | {"method": engine})


def _changes(problem: Problem, how: dict[str, Any], B: float) -> Iterator[tuple[str, Problem, dict[str, Any]]]:
    """What may be changed where scores are within B: in words, the problem, and the keyword arguments."""
    d, eps = problem.q.shape[-1], how["eps"]
    if how["certify"] == "proof" and not how["grad"]:
        yield 'certify="sample"', problem, {"certify": "sample"}
    if eps <= 0.03:
        yield f"eps={10 * eps:g}", problem, {"eps": 10 * eps}
    if abs(problem.scale) > 1.01 / d:
        yield "scale=1/d", replace(problem, scale=math.copysign(1 / d, problem.scale)), {}
    if B > 1.05:
        q, k = _normalised(problem.q), _normalised(problem.k)
        changed = replace(problem, q=q, k=k, scale=1 / d)
        if not (_alike(q, problem.q) and _alike(k, problem.k)):
            yield "q and k normalised to a root mean square of 1, scale=1/d", changed, {}
    if problem.q.dtype == np.float32 and polynomial_rounding(problem, B, measure_values(problem)) >= eps:
        q, k, v = (X.astype(np.float64) for X in (problem.q, problem.k, problem.v))
        yield "float64", replace(problem, q=q, k=k, v=v), {}


def _normalised(X: np.ndarray) -> np.ndarray:
    """Rows of root mean square 1; rows of 0 stay."""
    size = np.sqrt(np.einsum("...d,...d->...", X, X, dtype=np.float64) / X.shape[-1])
    return (X / np.where(size > 0, size, 1)[..., None]).astype(X.dtype)


def _alike(X: np.ndarray, Y: np.ndarray) -> bool:
    """Whether entries differ by a hundredth of the largest at most."""
    return bool(np.abs(X - Y).max() <= 0.01 * np.abs(Y).max())


def _helps(alternative: Alternative, made: Plan, now: float) -> bool:
    """Whether a change lets in a polynomial, or makes the one there is much cheaper."""
    if alternative.certificate is None or alternative.pays_from is None:
        return False
    if made.engine != "exact":
        return alternative.seconds * _WORTH_CHANGING < now
    as_it_is = [other.pays_from or math.inf for other in made.alternatives if other.certificate is not None]
    return alternative.pays_from <= min(_LONGEST, *(least / _WORTH_CHANGING for least in as_it_is))


def table(plan: Plan) -> str:
    """What ``print(plan)`` shows."""
    H, G, n, d, n_k, d_v, dtype = plan.shape
    what = "forward and backward" if plan.gradient_certificate else "forward"
    known = plan._shown or plan._scores
    scores = f"|s| <= {known.plain:.4g} (Cauchy-Schwarz)"
    if plan._shown is not None or known.bound < known.plain:
        scores += f", {known.bound:.4g} {known.how}"
    if plan._spread is not None:
        scores += f"; root mean square of a row {plan._spread[0]:.2g}, at most {plan._spread[1]:.2g}"
    lines = [
        f"{what}: {H * G} x {n:,} queries, {H} x {n_k:,} keys, d = {d}, d_v = {d_v}, {dtype}, eps = {plan.eps:g}",
        f"scores    {scores}",
        *(_engines(plan) if plan.alternatives else _seconds(plan)),
        *([] if plan.exchange is None else [f"exchange  {plan.exchange}"]),
        f"result    {plan.certificate}",
    ]
    if plan.gradient_certificate:
        lines.append(f"gradient  {plan.gradient_certificate}")
    lines.append(f"because   {plan.reason}")
    lines += [_advice(place, alternative) for place, alternative in enumerate(plan.advice)]
    return "\n".join(lines)


def _engines(plan: Plan) -> Iterator[str]:
    yield f"   {'engine':<24} {'degree':>6} {'features':>11} {'error':>8} {'seconds':>9} {'MiB':>10}  pays from n"
    taken = {plan.engine, f"{plan.engine}, {plan.certificate.rule}"}
    for other in plan.alternatives:
        mark, certificate = "->" if other.name in taken else "  ", other.certificate
        if certificate is None:
            yield f"{mark} {other.name:<24} no: {other.refusal}"
            continue
        degree = "-" if certificate.degree is None else certificate.degree
        features = "-" if certificate.degree is None else f"{certificate.n_features:,}"
        least = "-" if other.pays_from is None else f"{other.pays_from:,}"
        yield (
            f"{mark} {other.name:<24} {degree:>6} {features:>11} {certificate.error:8.1e} {other.seconds:9.3g} "
            f"{other.bytes / 2**20:10,.1f}  {least:>11}"
        )


def _seconds(plan: Plan) -> Iterator[str]:
    for engine, seconds in plan.seconds.items():
        mark = "->" if engine == plan.engine else "  "
        yield f"{mark} {engine:<10} {seconds:9.3g} s {plan.bytes[engine] / 2**20:10,.1f} MiB"


def _advice(place: int, alternative: Alternative) -> str:
    certificate = alternative.certificate
    proved = "not proved" if certificate.rule == "sampled" else f"error <= {certificate.error:.1e}"
    least = "" if alternative.pays_from is None else f", pays from n = {alternative.pays_from:,}"
    return (
        f"{'' if place else 'instead':<9} {alternative.name}: degree {certificate.degree}, {certificate.n_features:,} "
        f"features, B = {certificate.bound:.3g}, {proved}, {alternative.seconds:.3g} s{least}"
    )
