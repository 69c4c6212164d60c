"""plan(): bounds -> degree -> engine -> cost; what will be computed, what it promises, and why."""

from __future__ import annotations

import math
import os
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import moments
from . import polynomial as poly
from .bounds import Scores, Values, measure, measure_values
from .engines import exact as exact_engine
from .engines import polynomial as polynomial_engine
from .moments import MomentRule
from .problem import Problem, prepare_for
from .relative import RelativeFamily
from .rotary import Rotary

_MINUTE = 60.0
# Past this degree moments are not tried where the worst case has no degree at all.
_MOST_BY_MOMENTS = 6
# Of the rows may be expected to need exact work.
_FEW = 0.03
# Operations of exact attention below which looking at moments costs more than they save.
_TOO_SMALL = 2e7


class BoundedEntryError(ValueError):
    """A method or a degree that was insisted on can't certify eps for scores of this size."""


class PerformanceWarning(UserWarning):
    """Exact work that is predicted to take more than a minute."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is promised of a result.

    Attributes
    ----------
    engine : str
        "exact" or "polynomial".
    degree, n_features : int or None
        Of the polynomial.
    bound : float
        B, a bound of every (centred) score.
    rule : str
        What the bound of the truncation rests on: "exact" (there is none), "worst case" (every score may be B), or
        "moments" (of the scores of each row; proved once the row is computed).
    truncation : float
        Error of the polynomial, in units of max_c range_j(V_jc).
    rounding : float
        Of floating point, in the same units: a model of its size, not a proof.
    rows_truncation : (..., n) float64 array or None
        `truncation` row by row, in units of the range over the keys that the row sees; None in a plan.
    n_exact_rows : int
        How many rows were computed exactly, the polynomial's certificate being too large there.
    seed, failure : int or None, float
        Of the coins behind the rule, where coins were used (fourth moments of degrees 2 and 3), and the probability
        that they make it wrong.

    Notes
    -----
    Of a result O, ``|O_ic - Attn_ic| <= error * range_j(V_jc)``. Of gradients, with e = error, omega_i the range over j
    of <dO_i, V_j>, P the softmax weights, zeta = 2 e / (1 - e) and c = abs(scale): dQ_i is within
    ``c artanh(e) / 4 omega_i diam(K)``, dK_j within ``c zeta sum_i P_ij omega_i ||Q_i||``, and dV_jc within
    ``zeta sum_i P_ij |dO_ic|``.
    """

    engine: str
    degree: int | None
    n_features: int | None
    bound: float
    rule: str
    truncation: float
    rounding: float
    rows_truncation: np.ndarray | None = field(default=None, repr=False, compare=False)
    n_exact_rows: int = 0
    seed: int | None = None
    failure: float = 0.0

    @property
    def error(self) -> float:
        """truncation + rounding."""
        return self.truncation + self.rounding

    def __str__(self) -> str:
        how = self.engine
        if self.degree is not None:
            how += f", degree {self.degree} ({self.n_features:,} features)"
        coins = "" if self.seed is None else f" but for a probability of {self.failure:g} (seed {self.seed})"
        rows = f", {self.n_exact_rows:,} rows exactly" if self.n_exact_rows else ""
        return (
            f"{how}{rows}: error <= {self.error:.2g}{coins} ({self.rule}: truncation {self.truncation:.2g}, "
            f"rounding {self.rounding:.2g}), scores within {self.bound:.4g}"
        )


def nothing_to_do() -> Certificate:
    """The certificate of a result without a pair of a query and a key: exactly 0."""
    return Certificate("exact", None, None, 0.0, "exact", 0.0, float(np.finfo(np.float64).eps))


@dataclass(slots=True)
class Forward:
    """A forward pass and what backward needs of it."""

    o: np.ndarray
    lse: np.ndarray | None
    certificate: Certificate
    saved: Any


@dataclass(frozen=True, slots=True)
class Choice:
    """A polynomial that may run.

    Attributes
    ----------
    polynomial : Polynomial or MomentPolynomial
    truncation : float
        Proved ("worst case"), or expected of rows that are not computed exactly ("moments").
    operations : float
        As the exact engine counts them, of the rows computed exactly too.
    rule : MomentRule or None
        None is the worst case.
    n_exact_rows : int
        How many rows, all heads together, may be computed exactly where their certificate is too large.
    """

    polynomial: poly.Polynomial | poly.MomentPolynomial
    truncation: float
    operations: float
    rule: MomentRule | None = None
    n_exact_rows: int = 0

    @property
    def degree(self) -> int:
        """Of the features."""
        return max(1, self.polynomial.degree)


@dataclass(slots=True)
class Plan:
    """Which engine runs, what it promises, and why; ``print(plan)`` explains itself.

    Attributes
    ----------
    engine : str
        "exact" or "polynomial".
    certificate : Certificate
        Of O.
    gradient_certificate : Certificate or None
        Of gradients, where they were asked for.
    reason : str
        Why this engine.
    seconds, bytes : dict
        By engine: predicted time on this machine, and memory beyond inputs and outputs.
    """

    engine: str
    certificate: Certificate
    gradient_certificate: Certificate | None
    reason: str
    seconds: dict[str, float]
    bytes: dict[str, float]
    shape: tuple[int, ...]
    eps: float
    _scores: Scores = field(repr=False)
    _values: Values | None = field(repr=False)
    _choice: Choice | None = field(repr=False)
    _second: Plan | None = field(repr=False)  # what runs where the moments' certificate fails for too many rows

    def forward(self, problem: Problem, want_lse: bool) -> Forward:
        """O, and lse where it is wanted.

        Raises
        ------
        BoundedEntryError
            More rows than planned are not certified by moments, and the polynomial engine was insisted on.
        """
        if self.engine == "exact":
            o, lse, saved = exact_engine.forward(problem, self._scores.plain, want_lse)
            return Forward(o, lse, self.certificate, saved)
        if self._choice.rule is not None:
            return self._forward_by_moments(problem, want_lse)
        grad = self.gradient_certificate is not None
        o, lse, saved = polynomial_engine.forward(
            problem, self._scores, self._values, self._choice.polynomial, grad, want_lse
        )
        return Forward(o, lse, self.certificate, saved)

    def _forward_by_moments(self, problem: Problem, want_lse: bool) -> Forward:
        """The polynomial's rows, those exactly whose certificate is too large; or all by the second choice."""
        scores, rule, certificate = self._scores, self._choice.rule, self.certificate
        reach = moments.reach(problem, self._values, polynomial_engine.chunk(problem))
        o, lse, saved = polynomial_engine.forward(
            problem, scores, self._values, rule.polynomial, False, want_lse, reach
        )
        rows = rule.truncation(problem, scores, saved.moment, saved.spread, saved.inverse)
        failed = ~(rows <= self.eps - certificate.rounding)
        n_failed = int(np.count_nonzero(failed))
        if n_failed > self._choice.n_exact_rows:
            if self._second is not None:
                return self._second.forward(problem, want_lse)
            raise BoundedEntryError(
                f"degree {rule.polynomial.degree} does not certify eps = {self.eps:g} by moments for {n_failed:,} "
                f"of {rows.size:,} rows, past the {self._choice.n_exact_rows:,} planned to be exact, and by the bound "
                f"B = {scores.bound:.4g} of the scores no degree does; method='exact' has no bound"
            )
        rounding = certificate.rounding
        if n_failed:
            exact_engine.forward_rows(problem, scores.plain, failed, o, lse)
            rows[failed] = 0.0
            rounding = max(rounding, _exact_rounding(problem, scores.plain, self._values))
        certificate = replace(
            certificate,
            truncation=float(rows.max()),
            rounding=rounding,
            rows_truncation=rows,
            n_exact_rows=n_failed,
        )
        return Forward(o, lse, certificate, saved)

    def backward(self, problem: Problem, forward: Forward, do: np.ndarray):
        """dq, dk, dv and the gradient of the bias's symbol, or None."""
        engine = exact_engine if self.engine == "exact" else polynomial_engine
        return engine.backward(problem, forward.saved, do)

    def __str__(self) -> str:
        H, G, n, d, n_k, d_v, dtype = self.shape
        what = "forward and backward" if self.gradient_certificate else "forward"
        lines = [
            f"{what}: {H * G} x {n:,} queries, {H} x {n_k:,} keys, d = {d}, d_v = {d_v}, {dtype}, eps = {self.eps:g}",
            f"scores    |s| <= {self._scores.plain:.4g} (Cauchy-Schwarz), {self._scores.bound:.4g} with keys centred",
        ]
        for engine in self.seconds:
            mark = "->" if engine == self.engine else "  "
            lines.append(f"{mark} {engine:<10} {self.seconds[engine]:9.3g} s {self.bytes[engine] / 2**20:10,.1f} MiB")
        lines.append(f"result    {self.certificate}")
        if self.gradient_certificate:
            lines.append(f"gradient  {self.gradient_certificate}")
        lines.append(f"because   {self.reason}")
        return "\n".join(lines)


def plan(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike | None = None,
    R: Rotary | RelativeFamily | None = None,
    *,
    grad: bool = False,
    **options: Any,
) -> Plan:
    """What `attention` would do with these arguments: the bound B of its scores, the degree, the engine, the cost.

    Parameters
    ----------
    Q, K, V, R, **options
        As in `attention`, without ``return_certificate`` and ``return_lse``; V may be left out.
    grad : bool
        Plan for `attention_vjp`.

    Returns
    -------
    Plan
        ``print(plan)`` explains itself. No attention is computed.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does.

    Notes
    -----
    Time O(n d): the norms of Q and K.

    Examples
    --------
    >>> Q, K = np.random.default_rng(0).uniform(-1, 1, (2, 5000, 4))
    >>> plan(Q, K, Rotary(4)).engine
    'polynomial'
    """
    if isinstance(V, Rotary | RelativeFamily) and R is None:
        V, R = None, V
    call = prepare_for("plan", Q, K, V, R, options)
    return make_plan(call.problem, grad=grad, **call.how)


def make_plan(
    problem: Problem,
    *,
    eps: float,
    certify: str,
    method: str,
    degree: int | None,
    seed: int | None,
    grad: bool,
    each_weight: bool = False,
) -> Plan:
    """The cheapest engine that certifies eps, or the one that was insisted on.

    Gradients and products with A (`each_weight`) ask that every weight be near exp: moments, which speak of sums over
    keys, do not serve them. A proof serves ``certify="sample"`` too, so `certify` changes nothing yet.
    """
    if method == "fft":
        raise NotImplementedError("method='fft' comes with the fft engine, which this version does not have")
    missing = polynomial_engine.unsupported(problem)
    if method == "polynomial" and missing:
        raise NotImplementedError(f"method='polynomial' does not do {missing}; method='exact' and 'auto' do")
    if problem.empty:
        scores = Scores(0.0, 0.0, None, 1.0, 1.0)
        certificate = nothing_to_do()
        return _plan(problem, "exact", scores, None, certificate, grad, "no query sees a key", {}, {}, eps)

    scores, values = measure(problem), measure_values(problem)
    rate = _rate(problem.q.dtype.name) * problem.threads
    seconds = {"exact": _exact_operations(problem, grad) / rate}
    sizes = {"exact": _exact_bytes(problem, grad)}
    worst = chosen = None
    refusal = f"the polynomial engine does not do {missing}" if missing else None
    if not missing and method != "exact":
        worst, refusal = _by_worst_case(problem, scores, values, eps, degree, grad)
        chosen = worst
        if not (grad or each_weight):
            chosen = _by_moments(problem, scores, values, eps, method, degree, seed, worst) or worst
        if chosen is None and (method == "polynomial" or degree is not None):
            raise BoundedEntryError(refusal)
    if chosen is not None:
        seconds["polynomial"] = chosen.operations / rate
        sizes["polynomial"] = polynomial_engine.memory(problem, chosen.degree, grad)

    def exactly(reason):
        certificate = Certificate(
            "exact", None, None, scores.plain, "exact", 0.0, _exact_rounding(problem, scores.plain, values)
        )
        return _plan(problem, "exact", scores, values, certificate, grad, reason, seconds, sizes, eps)

    def by_polynomial(choice, reason):
        made = _polynomial_plan(problem, scores, values, choice, grad, reason, seconds, sizes, eps)
        if choice.rule is not None:
            fits = worst is not None and _fits(polynomial_engine.memory(problem, worst.degree, grad))
            if fits and (method == "polynomial" or worst.operations / rate < seconds["exact"]):
                made._second = by_polynomial(worst, reason)
            elif method == "auto":
                made._second = exactly("moments certify too few rows")
        return made

    if chosen is not None and (method == "polynomial" or _cheaper(seconds, sizes)):
        insisted = "method='polynomial'" if method == "polynomial" else "the cheapest engine that certifies eps"
        made = by_polynomial(chosen, insisted)
    else:
        insisted = "method='exact'" if method == "exact" else refusal or "the cheapest engine that certifies eps"
        made = exactly(insisted)
    if not _fits(sizes[made.engine]):
        available = _available_memory()
        raise MemoryError(
            f"the {made.engine} engine needs {sizes[made.engine] / 2**30:.3g} GiB beyond inputs and outputs, "
            f"and {available / 2**30:.3g} GiB are available"
        )
    if made.engine == "exact" and method == "auto" and seconds["exact"] > _MINUTE:
        warnings.warn(
            f"exact attention is predicted to take {seconds['exact']:.0f} s: {made.reason}",
            PerformanceWarning,
            stacklevel=5,
        )
    return made


def _polynomial_plan(problem, scores, values, choice, grad, reason, seconds, sizes, eps) -> Plan:
    d, rule = problem.q.shape[-1], choice.rule
    certificate = Certificate(
        "polynomial",
        choice.degree,
        poly.n_features(d, choice.degree),
        scores.bound,
        "worst case" if rule is None else "moments",
        choice.truncation,
        _polynomial_rounding(problem, scores.bound, values),
        seed=None if rule is None else rule.seed,
        failure=0.0 if rule is None or rule.seed is None else moments.FAILURE,
    )
    made = _plan(problem, "polynomial", scores, values, certificate, grad, reason, seconds, sizes, eps)
    made._choice = choice
    if grad:
        made.gradient_certificate = replace(
            certificate,
            degree=choice.degree + 1,
            n_features=poly.n_features(d, choice.degree + 1),
            truncation=choice.polynomial.error,
            rounding=4 * certificate.rounding,
        )
    return made


def _by_moments(
    problem: Problem,
    scores: Scores,
    values: Values,
    eps: float,
    method: str,
    degree: int | None,
    seed: int | None,
    worst: Choice | None,
) -> Choice | None:
    """The cheapest degree below that of the worst case that moments are expected to certify, or None."""
    most = degree or (worst.degree - 1 if worst else _MOST_BY_MOMENTS)
    allowed = eps - _polynomial_rounding(problem, scores.bound, values)
    exact = _exact_operations(problem, False)
    if most < 2 or allowed <= 0 or scores.bound > poly.MAX_BOUND or (degree and worst):
        return None
    if method == "auto" and exact < _TOO_SMALL:
        return None
    H, G, n, _ = problem.q.shape
    sample = moments.Sample(problem, scores, values)
    B = poly.B_grid(scores.bound)
    best, fourth = None, None
    for g in range(degree or 2, most + 1):
        # Nothing dearer than what is already at hand.
        limit = min([c.operations for c in (worst, best) if c is not None], default=math.inf)
        base = polynomial_engine.operations(problem, g, False)
        if base >= limit:
            break
        for kappa in (0.0, sample.kappa()) if g < 4 and problem.hi is None else (0.0,):
            p = poly.fit_moments(B, g, kappa)
            if p is None:
                continue
            operations, rule = base, MomentRule(p)
            expected = sample.truncation(p, None)
            if kappa:
                operations += moments.fourth_operations(problem)
                if operations >= limit or np.mean(expected > allowed) > _FEW:
                    continue
                fourth = fourth or moments.fourth_moments(problem, scores, seed)
                rule = MomentRule(p, *fourth)
                expected = sample.truncation(p, rule.fourth)
            share = float(np.mean(expected > allowed))
            if share > _FEW:
                continue
            rows = math.ceil(H * G * n * (1.5 * share + 1 / 512)) + 8
            operations += rows * exact / (H * G * n)
            if operations < limit:
                truncation = float(np.max(expected, where=expected <= allowed, initial=0.0))
                best, limit = Choice(p, truncation, operations, rule, rows), operations
    return best


def _plan(problem, engine, scores, values, certificate, grad, reason, seconds, sizes, eps) -> Plan:
    shape = (*problem.q.shape, problem.k.shape[1], problem.v.shape[2], problem.q.dtype.name)
    gradient = replace(certificate, rounding=4 * certificate.rounding) if grad else None
    return Plan(engine, certificate, gradient, reason, seconds, sizes, shape, eps, scores, values, None, None)


def _by_worst_case(
    problem: Problem, scores: Scores, values: Values, eps: float, degree: int | None, grad: bool
) -> tuple[Choice | None, str | None]:
    """The smallest degree (or `degree`) that certifies eps for scores of size B; or None, and why there is none."""
    p, refusal = _certified(problem, scores, values, eps, degree)
    if p is None:
        return None, refusal
    operations = polynomial_engine.operations(problem, max(1, p.degree), grad)
    return Choice(p, poly.tau(p.error), operations), None


def _certified(problem: Problem, scores: Scores, values: Values, eps: float, degree: int | None):
    """The polynomial of the smallest degree (or of `degree`) that certifies eps, and None; or None, and why not."""
    B, d = scores.bound, problem.q.shape[-1]
    rounding = _polynomial_rounding(problem, B, values)
    where = f"scores are bounded by B = {B:.4g} only (|scale| max ||q|| max ||k||)"
    cure = "scale=1/d, or q and k normalised, make B smaller; method='exact' has no bound"
    if rounding >= eps:
        lost = f"rounding in {problem.q.dtype.name} alone is {rounding:.2g}"
        return None, f"{where}: no degree certifies eps = {eps:g}, {lost}; {cure}"
    e = poly.relative_error_for(eps - rounding)
    needed = poly.smallest_degree(B, e)
    takes = (
        "no degree does"
        if needed is None
        else f"degree {max(1, needed)}, {poly.n_features(d, max(1, needed)):,} features, would do"
    )
    if degree is not None:
        if B <= poly.MAX_BOUND:
            p = poly.minimax(max(B, poly.B_grid(0.0)), max(1, degree))
            if p.error <= e:
                return p, None
        return None, f"{where}: degree {degree} does not certify eps = {eps:g}; {takes}; {cure}"
    if needed is None:
        return None, f"{where}: no degree certifies eps = {eps:g}; {cure}"
    if needed > 1:
        # smallest_degree speaks of a slightly larger bound, whose polynomial is in its cache.
        p = poly.minimax(B, needed - 1)
        if p.error <= e:
            return p, None
    return poly.minimax(poly.B_grid(B), max(1, needed)), None


def _cheaper(seconds: dict[str, float], sizes: dict[str, float]) -> bool:
    return seconds["polynomial"] < seconds["exact"] and _fits(sizes["polynomial"])


def _polynomial_rounding(problem: Problem, B: float, values: Values) -> float:
    """Monomial sums cancel for negative scores: a few units times e^{2B}, measured (0.3 to 4, 11 where B is small).

    Values are centred, so that their offset costs no more than storing O does.
    """
    unit = float(np.finfo(problem.q.dtype).eps) / 2
    return unit * (12 + 4 * math.exp(min(2 * B, 700)) + 2 * values.offset)


def _exact_rounding(problem: Problem, bound: float, values: Values) -> float:
    """Scores of size S carry (2 + sqrt(d) / 2) S units; sums over blocks of keys the square root of their number.

    Weights that are off by that move O by as much of the range; sums are off in units of max |V|.
    """
    unit = float(np.finfo(problem.q.dtype).eps) / 2
    d, n_k = problem.q.shape[-1], problem.k.shape[1]
    if problem.bias is not None:
        bound += float(np.abs(problem.bias).max())
    if problem.near is not None and problem.scale:
        bound *= max(1.0, abs(problem.near[1] / problem.scale))
    return min(1.0, unit * ((16 + math.sqrt(n_k / 96)) * max(1.0, values.offset) + (2 + math.sqrt(d) / 2) * bound))


def _exact_operations(problem: Problem, grad: bool) -> float:
    H, G, n, d = problem.q.shape
    d_v = problem.v.shape[2]
    exp = 60 if problem.q.dtype == np.float32 else 120
    pairs = H * G * exact_engine.pairs(problem)
    per_pair = 2 * (d + d_v) + exp
    if grad:
        per_pair += 2 * (3 * d + 2 * d_v) + 2 * exp
    return pairs * per_pair + 60.0 * H * (G * n + problem.k.shape[1]) * (d + d_v)


def _exact_bytes(problem: Problem, grad: bool) -> float:
    H, G, n, d = problem.q.shape
    n_k, d_v = problem.v.shape[1:]
    item = problem.q.itemsize
    size = H * n_k * d * item + H * G * n * 2 * item
    if grad:
        # Transposed and padded copies of q and do, and a dq for each segment of keys.
        size += (H * G * n * (2 * (d + d_v) + d * exact_engine.segments(problem)) + H * n_k * d_v) * item
    return size


@lru_cache(maxsize=4)
def _rate(dtype: str) -> float:
    """Operations a second of one thread, measured once a process in about a millisecond."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 384, 32)).astype(dtype)
    problem = Problem(q=q[None], k=k, v=v, scale=1 / 32, threads=1)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        exact_engine.forward(problem, 1.0, False)
        best = min(best, time.perf_counter() - start)
    return _exact_operations(problem, False) / best


def _fits(size: float) -> bool:
    # Asking the system costs as much as a small call.
    return size < 2**26 or size <= _available_memory()


def _available_memory() -> float:
    """Bytes that can be had without swapping, where the system tells; else inf."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return math.inf
