"""A plan: which engine runs, what it promises and why; and how its forward and backward passes run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import evidence, moments
from ._network import Exchange
from .approximation import minimax as poly
from .approximation.moment_fit import MomentPolynomial
from .bounds import Alone, Scores, Values
from .certificate import BoundedEntryError, Certificate
from .costs import Work
from .engines import exact as exact_engine
from .engines import fft as fft_engine
from .engines import outliers, ring
from .engines import polynomial as polynomial_engine
from .engines import scan as scan_engine
from .explain import Alternative, table
from .moments import MomentRule
from .problem import Problem
from .rounding import exact_rounding
from .sample import Sample

# What is promised of O, and where the values lie that this was found from; None where there is nothing to compute.
Promise = tuple[Certificate, Values | None]

_ENGINES = {"exact": exact_engine, "polynomial": polynomial_engine, "fft": fft_engine}


@dataclass(slots=True)
class Forward:
    """A forward pass, what backward needs of it, and the plan that made it."""

    o: np.ndarray
    lse: np.ndarray | None
    own: Certificate | None  # where the pass itself found more than the plan promised
    saved: Any
    plan: Plan
    gradient_certificate: Certificate | None = None
    exact_rows: np.ndarray | None = None  # (H, G, n), where there will be a backward pass

    @property
    def certificate(self) -> Certificate:
        """Of o."""
        return self.plan.certificate if self.own is None else self.own

    def backward(self, problem: Problem, do: np.ndarray, ranks: Any = Alone):
        """dq, dk, dv and the gradient of the bias's symbol, or None. `ranks` as in `Plan.forward_judged`."""
        return self.plan._backward(problem, self, do, ranks)


@dataclass(frozen=True, slots=True)
class Choice:
    """A polynomial that may run.

    Attributes
    ----------
    polynomial : Polynomial or MomentPolynomial
    truncation : float
        Proved ("worst case"), or expected of rows that are not computed exactly ("moments").
    work : Work
        That of the rows computed exactly too.
    rule : MomentRule or None
        None is the worst case.
    n_exact_rows : int
        How many rows, all heads together, may be computed exactly where their certificate is too large.
    gradient_truncation : float
        Of the gradient, expected of rows that are not computed exactly ("moments").
    """

    polynomial: poly.Polynomial | MomentPolynomial
    truncation: float
    work: Work
    rule: MomentRule | None = None
    n_exact_rows: int = 0
    gradient_truncation: float = 0.0

    @property
    def degree(self) -> int:
        """Of the features."""
        return max(1, self.polynomial.degree)

    @property
    def grad_degree(self) -> int:
        """Of backward's features."""
        weights = None if self.rule is None else self.rule.weights
        return self.degree + 1 if weights is None else weights.degree + 1


@dataclass(slots=True, repr=False)
class Plan:
    """Which engine runs, what it promises, and why; ``print(plan)`` explains itself.

    Attributes
    ----------
    engine : str
        "exact", "polynomial" or "fft".
    certificate : Certificate
        Of O.
    gradient_certificate : Certificate or None
        Of gradients, where they were asked for.
    reason : str
        Why this engine.
    seconds, bytes : dict
        By engine: predicted time on this machine, and memory beyond inputs and outputs. Over MPI ranks: that of all
        threads together, and the most of a rank.
    alternatives : tuple of Alternative
        What `plan` found of each engine, with its ``name``, ``certificate`` (None where it has none, and why as
        ``refusal``), ``seconds``, ``bytes``, and ``pays_from``, the n from which it beats exact attention.
    advice : tuple of Alternative
        What would let a polynomial in, or a cheaper one, and what that comes to.
    exchange : Exchange or None
        Over MPI ranks: bytes that this rank (`exchange.own`) and the worst one (`exchange.worst`) send and receive, and
        the seconds that this takes by `exchange.network`.
    """

    engine: str
    _promised: Promise | Callable[[], Promise]  # or what measures it when it is first asked for
    gradient_certificate: Certificate | None
    reason: str
    seconds: dict[str, float]
    bytes: dict[str, float]
    shape: tuple[int, ...]
    eps: float
    _scores: Scores
    _choice: Choice | None
    _second: Plan | None  # what runs where too many rows fail
    _works: dict[str, Work]  # by engine, whatever the threads
    _trials: list[MomentPolynomial] | None = None  # to be judged by sampled rows
    _sample: Sample | None = None
    _proof: Callable[[Problem], Plan] | None = None  # where these refuse them
    _symbol: fft_engine.Symbol | None = None
    _split: scan_engine.Split | None = None
    alternatives: tuple[Alternative, ...] = ()
    advice: tuple[Alternative, ...] = ()
    _shown: Scores | None = None  # what is said of the scores, beside the root mean square of a row's and the largest
    _spread: tuple[float, float] | None = None
    _outliers: outliers.Split | None = None
    _rest: Plan | None = None  # of what is left without outliers
    exchange: Exchange | None = None

    @property
    def certificate(self) -> Certificate:
        return self._promise()[0]

    @certificate.setter
    def certificate(self, certificate: Certificate) -> None:
        self._promised = certificate, self._values

    @property
    def _values(self) -> Values | None:
        return self._promise()[1]

    def _promise(self) -> Promise:
        if callable(self._promised):
            self._promised = self._promised()
        return self._promised

    def forward(self, problem: Problem, want_lse: bool) -> Forward:
        """O, and lse where it is wanted.

        Raises
        ------
        BoundedEntryError
            More rows than planned are not certified by moments, or sampled rows by no degree, and the polynomial engine
            was insisted on.
        """
        grad = self.gradient_certificate is not None
        if self.judged:
            return self.forward_judged(problem, want_lse) or self._second.forward(problem, want_lse)
        if self._outliers is not None:
            return self._forward_beside_outliers(problem)
        if self.engine == "exact":
            o, lse, saved = exact_engine.forward(problem, self._scores.plain, want_lse)
            return self._result(o, lse, saved)
        if self.engine == "fft":
            o, lse, saved = fft_engine.forward(problem, self._scores, self._choice.polynomial, self._symbol, want_lse)
            return self._result(o, lse, saved)
        if self._split is not None:
            o, lse, saved = scan_engine.forward(
                problem, self._split, self._scores, self._values, self._choice.polynomial, grad, want_lse
            )
            return self._result(o, lse, saved)
        o, lse, saved = polynomial_engine.forward(
            problem, self._scores, self._values, self._choice.polynomial, grad, want_lse
        )
        found = self._result(o, lse, saved)
        if problem.hi is not None:
            rows = np.broadcast_to(moments.worst_case(problem, self._choice.polynomial), o.shape[:3])
            found.own = replace(self.certificate, truncation=float(rows.max()), rows_truncation=rows)
        return found

    def _result(self, o: np.ndarray, lse: np.ndarray | None, saved: Any) -> Forward:
        """What is certified before it is computed."""
        return Forward(o, lse, None, saved, self, self.gradient_certificate)

    def storing(self, dtype: np.dtype) -> float:
        """What storing O in the dtype of the call adds to its certificate: nothing but in half precision."""
        return self._values.storing(dtype) if self._values is not None and dtype.itemsize == 2 else 0.0

    @property
    def judged(self) -> bool:
        """Whether rows are certified once they are computed: by moments, or by a sample of them."""
        by_moments = self._outliers is None and self._choice is not None and self._choice.rule is not None
        return self._trials is not None or by_moments

    def forward_judged(self, problem: Problem, want_lse: bool, ranks: Any = Alone) -> Forward | None:
        """`forward` where rows are judged; None where they fail and there is a second choice for all.

        `ranks` hold other pieces of the sequence, where `problem` is one; of them, what is said is of the whole but for
        `rows_truncation`, and rows must be with the last keys that they see.
        """
        judge = self._forward_by_moments if self._trials is None else self._forward_by_sample
        return judge(problem, want_lse, ranks)

    def _forward_by_moments(self, problem: Problem, want_lse: bool, ranks: Any) -> Forward | None:
        """The polynomial's rows, those exactly whose certificate is too large."""
        scores, rule, certificate = self._scores, self._choice.rule, self.certificate
        grad = self.gradient_certificate is not None
        reach = moments.reach(problem, self._values, polynomial_engine.chunk(problem), ranks)
        fits = rule.fits(problem)
        o, lse, saved = polynomial_engine.forward(
            problem,
            scores,
            self._values,
            rule.polynomial,
            grad,
            want_lse or grad,
            reach,
            fits.ratio(rule.polynomial, problem.q.dtype),
            ranks,
            weights=rule.weights,
        )
        rows = rule.truncation(problem, fits, saved.moment, saved.spread, saved.inverse)
        rows[fits.sizes > scores.bound] = np.inf
        failed = ~(rows <= self.eps - certificate.rounding)
        if grad:
            of_gradient = rule.gradient(problem, fits, saved.moment, saved.inverse)
            failed |= ~(of_gradient <= 2 * (self.eps - certificate.rounding))
        n_failed, n_rows = (sum(counts) for counts in zip(*ranks.gather((int(failed.sum()), rows.size)), strict=True))
        if n_failed > self._choice.n_exact_rows:
            if self._second is not None:
                return None
            raise BoundedEntryError(
                f"degree {rule.polynomial.degree} does not certify eps = {self.eps:g} by moments for {n_failed:,} "
                f"of {n_rows:,} rows, past the {self._choice.n_exact_rows:,} planned to be exact, and by the bound "
                f"B = {scores.bound:.4g} of the scores no degree does; method='exact' has no bound"
            )
        rounding = certificate.rounding
        if n_failed:
            ring.forward_rows(problem, scores.plain, failed, o, lse, ranks)
            rows[failed] = 0.0
            rounding = max(rounding, exact_rounding(problem, scores, self._values, ranks))
        found = replace(certificate, rounding=rounding, n_exact_rows=n_failed)
        truncation = max(ranks.gather(float(rows.max(initial=0))))
        certificate = replace(found, truncation=truncation, rows_truncation=rows)
        if not grad:
            return Forward(o, lse, certificate, saved, self)
        of_gradient[failed] = 0.0
        # To the polynomial's backward pass these rows are not there.
        saved.inverse[failed] = 0.0
        gradient = replace(
            self.gradient_certificate,
            truncation=max(ranks.gather(float(of_gradient.max(initial=0)))),
            rounding=4 * rounding,
            rows_truncation=of_gradient,
            n_exact_rows=n_failed,
        )
        return Forward(o, lse, certificate, saved, self, gradient, failed if n_failed else None)

    def _forward_beside_outliers(self, problem: Problem) -> Forward:
        """The rest by its own plan, merged with the long keys; and the long queries."""
        split, grad = self._outliers, self.gradient_certificate is not None
        rest = self._rest.forward(split.rest, True)
        o, lse = rest.o, rest.lse
        own, own_lse = (o.copy(), lse.copy()) if grad else (None, None)
        outliers.merge(problem, split, self._scores.plain, o, lse)
        gradient = rest.gradient_certificate
        if grad:
            rest.lse = lse
            if rest.plan.engine == "exact":
                rest.saved = exact_engine.resume(split.rest, np.inf, o, lse)
            else:
                inverse = rest.saved.inverse * exact_engine.share(own_lse, lse)
                rest.saved = replace(rest.saved, o=o, inverse=inverse.astype(problem.q.dtype))
            gradient = replace(gradient, rounding=max(gradient.rounding, self.gradient_certificate.rounding))
        certificate = replace(rest.certificate, rounding=max(rest.certificate.rounding, self.certificate.rounding))
        if split.rows is not None:
            count = certificate.n_exact_rows + int(np.count_nonzero(split.rows))
            certificate = replace(certificate, n_exact_rows=count)
        return Forward(o, lse, certificate, outliers.Saved(rest, own, own_lse, o, lse), self, gradient)

    def _forward_by_sample(self, problem: Problem, want_lse: bool, ranks: Any) -> Forward | None:
        """The first degree whose error in sampled rows, doubled, is within eps."""
        scores, certificate = self._scores, self.certificate
        rng = np.random.default_rng(certificate.seed)
        unit = float(np.finfo(problem.q.dtype).eps) / 2
        for p in self._trials:
            o, lse, saved = polynomial_engine.forward(
                problem, scores, self._values, p, False, want_lse, ranks=ranks
            )
            risk = self._sample.risk(problem, scores, saved.inverse, ranks)
            chosen = evidence.draw(risk, certificate.n_sampled, rng, ranks)
            errors = evidence.row_errors(problem, o, chosen, unit, scores.plain, ranks)
            truncation = 2 * max(ranks.gather(float(errors.max(initial=0))))
            if truncation <= self.eps - certificate.rounding:
                n_features = poly.n_features(problem.q.shape[-1], p.degree)
                found = replace(certificate, degree=p.degree, n_features=n_features, truncation=truncation)
                return Forward(o, lse, found, saved, self)
        if self._second is not None:
            return None
        refusal = None
        try:
            if self._proof is not None:
                return self._proof(problem).forward(problem, want_lse)
        except BoundedEntryError as error:
            refusal = error
        raise BoundedEntryError(
            f"twice the error of {certificate.n_sampled} sampled rows is {truncation:.2g} at degree {p.degree}, past "
            f"eps = {self.eps:g}, and no proof certifies it for scores within B = {scores.bound:.4g}; method='exact' "
            "has no bound"
        ) from refusal

    def _backward(self, problem: Problem, forward: Forward, do: np.ndarray, ranks: Any):
        if self._outliers is not None:
            return outliers.backward(problem, self._outliers, self._rest._scores.centre, forward.saved, do)
        if self._split is not None:
            return scan_engine.backward(problem, forward.saved, do)
        if self.engine != "polynomial":
            return _ENGINES[self.engine].backward(problem, forward.saved, do)
        found = polynomial_engine.backward(problem, forward.saved, do, ranks)
        rows = forward.exact_rows
        if rows is not None:
            ring.backward_rows(problem, self._scores.plain, rows, forward.o, forward.lse, do, *found[:3], ranks)
        return found

    def __str__(self) -> str:
        return table(self)

    def __repr__(self) -> str:
        return f"Plan({self.certificate}; {self.seconds.get(self.engine, 0.0):.2g} s)"
