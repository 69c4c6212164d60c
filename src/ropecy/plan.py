"""plan(): bounds -> degree -> engine -> cost; what will be computed, what it promises, and why."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from . import by_moments, moments
from .approximation import minimax as poly
from .approximation.moment_fit import MomentPolynomial, fit_moments
from .bounds import Measured, Scores, Values, measure, measure_values, polynomial_rounding, unbounded
from .certificate import AccuracyWarning, BoundedEntryError, Certificate, nothing_to_do, warn
from .costs import (
    TRANSFORMS,
    Work,
    cheaper,
    exact_bytes,
    exact_work,
    norms_work,
    operations_work,
    polynomial_work,
    sample_work,
    seconds_of,
)
from .engines import fft as fft_engine
from .engines import outliers
from .engines import polynomial as polynomial_engine
from .engines import scan as scan_engine
from .explain import explain
from .memory import fits, require
from .normal import normal_form
from .options import Options
from .problem import Problem, prepare_for
from .relative import RelativeFamily
from .rotary import Rotary
from .rounding import exact_rounding
from .sample import Sample
from .schedule import Choice, Plan, Promise

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MINUTE, _DAY = 60.0, 86400.0
# Seconds of exact work, as `costs` knows them, below which auto does not ask what transforms would cost.
_WORTH_ASKING = 0.02
# Seconds of looking for a degree that may do.
_LOOKING = 1e-4
# Rows that judge a degree by their error: tiles of the exact engine, as many for each of two or of four threads.
_SAMPLED_ROWS = 192
# What looking for outliers may cost, as a part of what is at hand without.
_LOOK_FOR_OUTLIERS = 0.02
# How many ways to split them off are tried, the cheapest first.
_OFFERS = 3


def plan(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike | None = None,
    R: Rotary | RelativeFamily | None = None,
    *,
    grad: bool = False,
    comm: Any = None,
    **options: Unpack[Options],
) -> Plan:
    """What `attention` would do with these arguments: the bound B of its scores, the degree, the engine, the cost; what
    the other engines would promise and cost; and what would bring the data into the regime.

    Parameters
    ----------
    Q, K, V, R, **options
        As in `attention`, without ``return_certificate`` and ``return_lse``; V may be left out.
    grad : bool
        Plan for `attention_vjp`.
    comm : mpi4py.MPI.Intracomm, optional
        Plan for `ropecy.mpi.attention`, Q, K and V being this rank's piece: as `ropecy.mpi.plan`.

    Returns
    -------
    Plan
        ``print(plan)`` explains itself; ``plan.alternatives`` and ``plan.advice`` are what it says. No attention is
        computed.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does.

    Notes
    -----
    Time O(n d), some passes over Q and K for each engine and each advice, and n d^2 in products of matrices, up to 80
    times each, where fourth moments count. Seconds are those of shipped constants, which choices go by too, times one
    factor of this machine.

    Examples
    --------
    >>> import numpy as np
    >>> Q, K = np.random.default_rng(0).uniform(-1, 1, (2, 5000, 4))
    >>> print(plan(Q, K, Rotary(4)))
    forward: 1 x 5,000 queries, 1 x 5,000 keys, d = 4, d_v = 1, float64, eps = 0.001
    scores    |s| <= ... (Cauchy-Schwarz), ...; root mean square of a row 0.17, at most 0.2...
       engine                   degree    features    error   seconds        MiB  pays from n
    ...
    -> polynomial, ...
    result    polynomial, degree ...
    because   the cheapest engine that certifies eps...
    """
    if isinstance(V, Rotary | RelativeFamily) and R is None:
        V, R = None, V
    if comm is not None:
        from . import mpi

        return mpi.plan(comm, Q, K, V, R, grad=grad, **options)
    call = prepare_for("plan", Q, K, V, R, options)
    how = {**call.how, "grad": grad}
    problem = call.problem if call.problem.empty else normal_form(call.problem, grad=grad).problem
    made = make_plan(problem, **how)
    explain(problem, made, how, choose_plan)
    made.certificate = made.certificate.stored(made.storing(call.dtype))
    return made


def make_plan(problem: Problem, **how: Any) -> Plan:
    """As `choose_plan`, with a `PerformanceWarning` where the work is predicted to take more than a minute, and an
    `AccuracyWarning` where auto found no engine that certifies eps.
    """
    made = choose_plan(problem, **how)
    seconds = made.seconds.get(made.engine, 0.0)
    if seconds > _MINUTE:
        degree = made.certificate.degree
        of_degree = "" if degree is None else f" of degree {degree}, {made.certificate.n_features:,} features,"
        warn(f"{made.engine} attention{of_degree} is predicted to take {seconds:,.0f} s: {made.reason}")
    eps, found_by_auto = how["eps"], how["method"] == "auto" and not how.get("each_weight")
    if made.engine == "exact" and found_by_auto and made.certificate.error > eps:
        cure = "; float64 holds more" if problem.q.dtype == np.float32 else ""
        warn(
            f"no engine certifies eps = {eps:g}: rounding in {problem.q.dtype} alone may be "
            f"{made.certificate.rounding:.2g} of the range of the values{cure}",
            AccuracyWarning,
        )
    return made


def choose_plan(
    problem: Problem,
    *,
    eps: float,
    certify: str,
    method: str,
    degree: int | None,
    seed: int | None,
    grad: bool,
    each_weight: bool = False,
    measured: Measured | None = None,
    piece: Problem | None = None,
) -> Plan:
    """The cheapest engine that certifies eps, or the one that was insisted on.

    Products with A (`each_weight`) ask that every weight be near exp: moments and samples, which speak of sums over
    keys, do not serve them; nor do samples serve gradients.

    A problem in pieces is planned as a whole, of which `measured` was found together; memory is that of a `piece`.
    """
    how = {"eps": eps, "method": method, "degree": degree, "seed": seed, "grad": grad, "each_weight": each_weight}
    how |= {"measured": measured, "piece": piece}
    sampling = certify == "sample" and method in ("auto", "polynomial") and not (grad or each_weight or problem.empty)
    if sampling and polynomial_engine.unsupported(problem) is None:
        try:
            # The price to beat. Moments take longer to look at than sampled rows to compute.
            proved = _at_once(problem, **how | {"each_weight": True})
        except BoundedEntryError:
            proved = None
        made = _by_sample(problem, proved, eps, degree, seed, measured, piece)
        if made is None:
            made = _by_proof(problem, **how)
        elif measured is None:
            made._proof = lambda problem: _by_proof(problem, **how)
        else:
            made._second = proved
    else:
        made = _by_proof(problem, **how)
    made.seconds = {engine: seconds_of(work, problem.threads, grad) for engine, work in made._works.items()}
    require(made.bytes.get(made.engine, 0.0), f"the {made.engine} engine, beyond inputs and outputs,")
    if made.engine == "exact" and method == "auto" and made.certificate.error > eps:
        made = _certified_by_another(problem, made, eps, seed, grad, measured, piece) or made
    return made


def _certified_by_another(
    problem: Problem,
    exact: Plan,
    eps: float,
    seed: int | None,
    grad: bool,
    measured: Measured | None,
    piece: Problem | None,
) -> Plan | None:
    """The plan of an engine that certifies eps where exact work rounds by more; None where none does, or it would take
    more than exact work and a minute.
    """
    how = {"degree": None, "certify": "proof", "each_weight": True, "measured": measured, "piece": piece}
    for method in ("polynomial", "fft"):
        try:
            made = choose_plan(problem, eps=eps, method=method, seed=seed, grad=grad, **how)
        except (BoundedEntryError, NotImplementedError, MemoryError):
            continue
        if made._works[made.engine].nominal <= max(exact._works["exact"].nominal, _MINUTE):
            made.reason = f"exact work rounds by {exact.certificate.rounding:.2g}, this certifies eps"
            return made
    return None


def _by_sample(
    problem: Problem,
    proved: Plan | None,
    eps: float,
    degree: int | None,
    seed: int | None,
    measured: Measured | None,
    piece: Problem | None,
) -> Plan | None:
    """Degrees to be tried whose work, all together, is below that of what is proved; None where there are none."""
    piece = piece or problem
    if proved is None:
        scores, values = _bounds(problem, measured)
        works, sizes = {}, {}
    else:
        scores, values, works, sizes = proved._scores, proved._values, dict(proved._works), dict(proved.bytes)
    rounding = polynomial_rounding(problem, scores.bound, values, scores.lost)
    if rounding >= eps or scores.bound > poly.MAX_BOUND:
        return None
    H, G, n, d = problem.q.shape
    rows = min(_SAMPLED_ROWS, H * G * n)
    # Where j - i matters, each row costs a tile.
    share = min(1.0, rows * (1 if problem.hi is None else moments.TILE) / (H * G * n))
    sampling = exact_work(problem, False).times(share) + sample_work(problem, False)
    limit = math.inf if proved is None else works[proved.engine].nominal
    if sampling.nominal > limit:
        return None
    B, trials, total = poly.B_grid(scores.bound), [], 0.0
    sample = measured.sample if measured else Sample(problem, scores, values)
    for g in [degree] if degree else range(1, by_moments.MOST + 1):
        line = MomentPolynomial(B, 1, (1.0, 1.0), 0, (0.0, 0.0), 0.0)
        p = line if g == 1 else fit_moments(B, g, sample.kappa() / B**2 * (g == 2))
        total += (polynomial_work(problem, g, False) + sampling).nominal
        if total >= limit or not fits(polynomial_engine.memory(piece, g, False)):
            break
        if p is not None:
            trials.append(p)
    if not trials:
        return None
    first = trials[0].degree
    works["polynomial"] = polynomial_work(problem, first, False) + sampling
    sizes["polynomial"] = polynomial_engine.memory(piece, first, False)
    certificate = Certificate(
        "polynomial",
        first,
        poly.n_features(d, first),
        scores.bound,
        "sampled",
        eps - rounding,
        rounding,
        seed=secrets.randbits(63) if seed is None else seed,
        n_sampled=rows,
    )
    reason = "the smallest degree whose error in sampled rows, doubled, is within eps"
    made = _plan(problem, "polynomial", scores, (certificate, values), False, reason, works, sizes, eps)
    made._trials, made._sample = trials, sample
    return made


def _by_proof(problem: Problem, **how: Any) -> Plan:
    """As `make_plan`, by proof: of the whole at once, or beside outliers where that costs less."""
    made = refusal = None
    try:
        made = _at_once(problem, **how)
    except BoundedEntryError as error:
        refusal = error
    able = how["method"] in ("auto", "polynomial") and how["measured"] is None and not problem.empty
    if able and polynomial_engine.unsupported(problem) is None:
        if made is None:
            most, scores, values = math.inf, measure(problem), measure_values(problem)
        else:
            most, scores, values = made._works[made.engine].nominal, made._scores, made._values
        made = _beside_outliers(problem, scores, values, most, **how) or made
    if made is None:
        raise refusal
    return made


def _at_once(
    problem: Problem,
    *,
    eps: float,
    method: str,
    degree: int | None,
    seed: int | None,
    grad: bool,
    each_weight: bool,
    measured: Measured | None,
    piece: Problem | None,
) -> Plan:
    """As `_by_proof`, without a look at outliers."""
    lacking = fft_engine.unsupported(problem) if measured is None else "a sequence in pieces"
    if method == "fft" and lacking:
        raise NotImplementedError(f"method='fft' does not do {lacking}; method='exact' and 'auto' do")
    missing = polynomial_engine.unsupported(problem)
    # A relative position that factors far out.
    relative = missing is not None and (missing := scan_engine.unsupported(problem)) is None
    if method == "polynomial" and missing:
        raise NotImplementedError(f"method='polynomial' does not do {missing}; method='exact' and 'auto' do")
    if problem.empty:
        scores = replace(unbounded(problem, 0.0), bound=0.0)
        certificate = nothing_to_do()
        return _plan(problem, "exact", scores, (certificate, None), grad, "no query sees a key", {}, {}, eps)

    piece = piece or problem
    works, sizes = {"exact": exact_work(problem, grad)}, {"exact": exact_bytes(piece, grad)}
    if method == "exact":
        scores = measured.scores if measured else measure(problem, centre=False)
        return _exactly(problem, scores, measured and measured.values, grad, "method='exact'", works, sizes, eps)
    plain, centre = not missing and not relative and method in ("auto", "polynomial"), True
    if plain and method == "auto" and degree is None:
        centre = partial(_hopeful, problem, works["exact"], eps, grad)
    scores, values = _bounds(problem, measured, centre)
    worst = chosen = by_scan = by_fft = None
    refusal = f"the polynomial engine does not do {missing}" if missing else None
    if scores.bound == math.inf > scores.plain:
        refusal = "the cheapest engine, whatever the degree"
    elif plain:
        worst, refusal = _by_worst_case(problem, scores, values, eps, degree, grad)
        chosen = worst
        at_hand = works["exact"], worst
        looked = not each_weight and by_moments.may_serve(problem, scores, values, eps, method, degree, grad, *at_hand)
        if looked:
            sample = measured and measured.sample
            found = by_moments.choose(problem, scores, values, eps, method, degree, seed, grad, *at_hand, sample)
            chosen = found or worst
        if chosen is None and (method == "polynomial" or degree is not None):
            raise BoundedEntryError(refusal)
    if chosen is not None:
        works["polynomial"] = chosen.work
        if looked and method == "polynomial":
            # auto looks only where that is next to nothing.
            works["polynomial"] += sample_work(problem, grad)
        sizes["polynomial"] = polynomial_engine.memory(piece, chosen.degree, grad, chosen.grad_degree)

    if relative and method in ("auto", "polynomial"):
        hidden = measured and measured.hidden
        by_scan, refusal = _scan_plan(problem, piece, hidden, scores, values, eps, degree, grad, method, works, sizes)
        if by_scan is not None and method == "auto" and not cheaper("polynomial", works, sizes):
            by_scan = None

    none_yet = chosen is None and by_scan is None
    if method == "fft" or (method == "auto" and not lacking and none_yet and works["exact"].nominal > _WORTH_ASKING):
        by_fft, no_fft = _fft_plan(problem, scores, values, eps, degree, grad, method, works, sizes)
        if method == "fft" and by_fft is None:
            raise BoundedEntryError(no_fft)

    def exactly(reason):
        return _exactly(problem, scores, values, grad, reason, works, sizes, eps)

    def by_polynomial(choice, reason):
        kept = scores if choice.rule is None else choice.rule.scores
        made = _polynomial_plan(problem, kept, values, choice, grad, reason, works, sizes, eps)
        if choice.rule is not None:
            if choice.rule.n_long:
                made.reason += f": {choice.rule.n_long:,} long queries exactly"
            affordable = worst is not None and fits(polynomial_engine.memory(piece, worst.degree, grad))
            if affordable and (method == "polynomial" or worst.work.nominal < works["exact"].nominal):
                made._second = by_polynomial(worst, reason)
            elif method == "auto":
                made._second = exactly("moments certify too few rows")
        return made

    if by_fft is not None and (method == "fft" or cheaper("fft", works, sizes)):
        made = by_fft
    elif by_scan is not None:
        made = by_scan
    elif chosen is not None and (method == "polynomial" or cheaper("polynomial", works, sizes)):
        insisted = "method='polynomial'" if method == "polynomial" else "the cheapest engine that certifies eps"
        made = by_polynomial(chosen, insisted)
    else:
        made = exactly(refusal or "the cheapest engine that certifies eps")
    return made


def _exactly(problem, scores, values, grad, reason, works, sizes, eps) -> Plan:
    """The plan of exact work. O needs a bound of the scores alone: values that are None are measured when what is
    promised of it is first asked for.
    """

    def promise() -> Promise:
        found = measure_values(problem) if values is None else values
        rounding = exact_rounding(problem, scores, found)
        return Certificate("exact", None, None, scores.plain, "exact", 0.0, rounding), found

    # A plan with what it promises can be sent to other ranks.
    return _plan(problem, "exact", scores, promise if values is None else promise(), grad, reason, works, sizes, eps)


def _beside_outliers(problem: Problem, scores: Scores, values: Values, most: float, **how: Any) -> Plan | None:
    """A few long keys and queries exactly, the rest by a polynomial; None where none costs less than `most` seconds."""
    eps, degree, grad = how["eps"], how["degree"], how["grad"]
    # Where nothing else is left, a look is worth it. Without a bound, work is too small or scores are too large.
    if scores.bound == math.inf or (most < math.inf and norms_work(problem).nominal > _LOOK_FOR_OUTLIERS * most):
        return None

    def cost(B: float, square: float) -> float:
        """Of the polynomial that is expected to do for scores within B, of that mean square."""
        square = None if how["each_weight"] else square
        g = by_moments.expected_degree(problem, scores, values, B, square, eps / 4 if grad else eps)
        return math.inf if g is None or g > (degree or g) else polynomial_work(problem, degree or g, grad).nominal

    norms, offers, unmasked = outliers.Norms(problem, scores), [], exact_work(replace(problem, hi=None), grad)
    found = list(norms.candidates())
    # Where the least of both is too much, nothing helps.
    if cost(min(B for *_, B, _ in found), min(square for *_, square in found)) >= most:
        return None
    for n_rows, n_keys, B, square in found:
        extra = outliers.work(problem, unmasked, n_rows, n_keys, grad)
        if (n_rows or n_keys) and extra.nominal < most and (total := extra.nominal + cost(B, square)) < most:
            offers.append((total, (n_rows, n_keys), extra))
    # Degrees are expected, not certified. Where nothing else is left, every offer is worth a try.
    offers.sort(key=lambda offer: offer[:2])
    for _, counts, extra in offers[: _OFFERS if most < math.inf else None]:
        made = _beside(problem, norms.split(*counts), extra, scores, values, most, **how)
        if made is not None:
            return made
    return None


def _beside(
    problem: Problem, split: outliers.Split, extra: Work, scores: Scores, values: Values, most: float, **how: Any
) -> Plan | None:
    """That of these long queries and keys exactly, which is `extra`, and the rest by a polynomial."""
    eps, grad, rounding = how["eps"], how["grad"], exact_rounding(problem, scores, values)
    try:
        rest = _at_once(split.rest, **how)
        more = rounding - rest.certificate.rounding
        if more > 0 and rest.certificate.truncation + rounding > eps:
            rest = _at_once(split.rest, **{**how, "eps": eps - more})
    except BoundedEntryError:
        return None
    if rest.engine != "polynomial":
        return None
    works = {"exact": exact_work(problem, grad), "polynomial": rest._choice.work + extra}
    if works["polynomial"].nominal >= most:
        return None
    sizes = {"exact": rest.bytes["exact"]}
    sizes["polynomial"] = rest.bytes["polynomial"] + outliers.memory(problem, split, grad)
    rounding = max(rest.certificate.rounding, rounding)
    if rest.certificate.truncation + rounding > eps:
        return None
    reason = f"{rest.reason}: {split}"
    made = _plan(problem, "polynomial", scores, (rest.certificate, values), grad, reason, works, sizes, eps)
    made.certificate = replace(rest.certificate, rounding=rounding)
    if grad:
        made.gradient_certificate = replace(rest.gradient_certificate, rounding=4 * rounding)
    made._outliers, made._rest, made._choice = split, rest, rest._choice
    return made


def _hopeful(problem: Problem, exact: Work, eps: float, grad: bool, least: float) -> bool:
    """Whether scores with no bound below `least` may have a degree that beats exact work, by more than a look costs."""
    degree = 1
    if least:
        if sample_work(problem, grad).nominal <= by_moments.LOOK_IF_EXPECTED * exact.nominal:
            return True
        degree = poly.smallest_degree(least, poly.relative_error_for(eps))
    return degree is not None and polynomial_work(problem, max(1, degree), grad).nominal + _LOOKING < exact.nominal


def _polynomial_plan(problem, scores, values, choice, grad, reason, works, sizes, eps) -> Plan:
    d, rule = fft_engine.terms(problem), choice.rule
    certificate = Certificate(
        "polynomial",
        choice.degree,
        poly.n_features(d, choice.degree),
        scores.bound,
        "worst case" if rule is None else "moments",
        choice.truncation,
        polynomial_rounding(problem, scores.bound, values, scores.lost),
        seed=None if rule is None or rule.fourth is None else rule.fourth.seed,
        failure=0.0 if rule is None or rule.fourth is None else moments.FAILURE,
    )
    made = _plan(problem, "polynomial", scores, (certificate, values), grad, reason, works, sizes, eps)
    made._choice = choice
    if grad:
        made.gradient_certificate = replace(
            certificate,
            degree=choice.grad_degree,
            n_features=poly.n_features(d, choice.grad_degree),
            truncation=choice.polynomial.error if rule is None else choice.gradient_truncation,
            rounding=4 * certificate.rounding,
        )
    return made


def _scan_plan(
    problem, piece, hidden, scores, values, eps, degree, grad, method, works, sizes
) -> tuple[Plan | None, str | None]:
    """The plan of a near field and decayed states; or None, and why there is none. Notes its work and bytes."""
    split, lacking = scan_engine.split(problem, poly.relative_error_for(eps) / 8, hidden)
    if split is None:
        if method == "polynomial":
            raise NotImplementedError(f"method='polynomial' does not do {lacking}; method='exact' and 'auto' do")
        return None, f"the polynomial engine does not do {lacking}"
    rounding = scan_engine.rounding(split, problem, scores, values)
    # Relative errors of a polynomial and of the sums of exponentials multiply.
    part = split.tail.error
    left = (poly.relative_error_for(max(eps - rounding, 1e-300)) - part) / (1 + part)
    certified = poly.tau(left) + rounding if left > 0 else rounding
    p, refusal = _certified(problem, scores, values, certified, degree, rounding)
    if p is None:
        if method == "polynomial" or degree is not None:
            raise BoundedEntryError(refusal)
        return None, refusal
    degree = max(1, p.degree)
    work = works["polynomial"] = scan_engine.work(split, problem, degree, grad)
    sizes["polynomial"] = scan_engine.memory(split, piece, degree, grad)
    error = (1 + p.error) * (1 + part) - 1
    insisted = "method='polynomial'" if method == "polynomial" else "the cheapest engine that certifies eps"
    reason = f"{insisted}: {split}"
    made = _polynomial_plan(
        problem, scores, values, Choice(p, poly.tau(error), work), grad, reason, works, sizes, eps
    )
    made._split = split
    made.certificate = replace(made.certificate, rounding=rounding)
    if grad:
        made.gradient_certificate = replace(made.gradient_certificate, truncation=error, rounding=4 * rounding)
    return made, None


def _fft_plan(problem, scores, values, eps, degree, grad, method, works, sizes) -> tuple[Plan | None, str | None]:
    """The plan of the fft engine; or None, and why there is none. Notes its work and bytes."""
    if fft_engine.unsupported(problem):
        return None, None
    base = fft_engine.base_rounding(problem, scores, values)
    # Transforms have an eighth of eps; rows to which they do more are computed exactly.
    p, refusal = _certified(problem, scores, values, eps, degree, base + eps / 8)
    if p is None:
        return None, refusal
    _price_fft(problem, max(1, p.degree), grad, works, sizes)
    if works["fft"].nominal > _DAY:
        degree, features = max(1, p.degree), poly.n_features(fft_engine.terms(problem), max(1, p.degree))
        return None, (
            f"{_where(scores)}: degree {degree} certifies eps = {eps:g}, and transforms of its {features:,} features "
            f"take {works['fft'].nominal:.1e} s; {_cure(problem, scores)}"
        )
    if method == "auto" and not cheaper("fft", works, sizes):
        return None, None
    symbol = fft_engine.survey(problem, p, eps / 8)
    # Rows that are computed exactly round as exact work does.
    of_exact = exact_rounding(problem, scores, values) if symbol.exact_rows else 0.0
    if poly.tau(p.error) + of_exact > eps:
        p, refusal = _certified(problem, scores, values, eps, degree, max(base + eps / 8, of_exact))
        if p is None:
            return None, refusal
        _price_fft(problem, max(1, p.degree), grad, works, sizes)
        symbol = fft_engine.survey(problem, p, eps / 8)
    n = problem.q.shape[2]
    rows = sum(last - first for first, last in symbol.exact_rows)
    choice = Choice(p, poly.tau(p.error), works["fft"])
    works["fft"] = works["fft"].times((1 + symbol.unseen) / 2) + works["exact"].times(rows / n)
    if rows > n / 2:
        given = [name for name in ("bias", "family") if getattr(problem, name) is not None]
        return None, (
            f"rounding of transforms passes an eighth of eps = {eps:.3g} in {rows:,} of {n:,} rows "
            f"({', '.join([f'B = {scores.bound:.4g}', f'degree {choice.degree}', *(f'a {name}' for name in given)])}); "
            f"method='exact' has no bound"
        )
    reason = "method='fft'" if method == "fft" else "the cheapest engine that certifies eps"
    made = _polynomial_plan(problem, scores, values, choice, grad, reason, works, sizes, eps)
    made.engine, made._symbol = "fft", symbol
    made.certificate = replace(made.certificate, engine="fft", rounding=max(base + symbol.rounding, of_exact))
    if grad:
        made.gradient_certificate = replace(
            made.gradient_certificate, engine="fft", rounding=4 * made.certificate.rounding
        )
    return made, None


def _price_fft(problem: Problem, degree: int, grad: bool, works: dict[str, Work], sizes: dict[str, float]) -> None:
    """Notes what the fft engine takes at that degree, but for exact rows."""
    works["fft"] = Work(TRANSFORMS) + operations_work(problem, fft_engine.operations(problem, degree, grad))
    sizes["fft"] = fft_engine.memory(problem, degree, grad)


def wants_sample(
    problem: Problem,
    scores: Scores,
    values: Values,
    *,
    eps: float,
    certify: str,
    method: str,
    degree: int | None,
    seed: int | None,
    grad: bool,
) -> bool:
    """Whether `make_plan` would look at a sample of rows and keys."""
    if method not in ("auto", "polynomial") or polynomial_engine.unsupported(problem) is not None:
        return False
    if certify == "sample" and not grad:
        return True
    worst, _ = _by_worst_case(problem, scores, values, eps, degree, grad)
    at_hand = exact_work(problem, grad), worst
    return by_moments.may_serve(problem, scores, values, eps, method, degree, grad, *at_hand)


def _bounds(problem, measured, centre: bool | Callable[[float], bool] = True) -> tuple[Scores, Values]:
    if measured is None:
        return measure(problem, centre=centre), measure_values(problem)
    return measured.scores, measured.values


def _plan(problem, engine, scores, promised, grad, reason, works, sizes, eps) -> Plan:
    shape = (*problem.q.shape, problem.k.shape[1], problem.v.shape[2], problem.q.dtype)
    made = Plan(engine, promised, None, reason, {}, sizes, shape, eps, scores, None, None, works)
    if grad:
        made.gradient_certificate = replace(made.certificate, rounding=4 * made.certificate.rounding)
    return made


def _by_worst_case(
    problem: Problem, scores: Scores, values: Values, eps: float, degree: int | None, grad: bool
) -> tuple[Choice | None, str | None]:
    """The smallest degree (or `degree`) that certifies eps for scores of size B; or None, and why there is none."""
    p, refusal = _certified(problem, scores, values, eps, degree)
    if p is None:
        return None, refusal
    return Choice(p, poly.tau(p.error), polynomial_work(problem, max(1, p.degree), grad)), None


def _where(scores: Scores) -> str:
    """What a refusal begins with."""
    return f"scores are bounded by B = {scores.bound:.4g} only (|scale| max ||q|| max ||k||)"


def _cure(problem: Problem, scores: Scores) -> str:
    """What a refusal ends with: what would make B smaller, if it is not so already."""
    d, scale = problem.q.shape[-1], abs(problem.scale)
    found = ["scale=1/d"] if scale > 1.01 / d else []
    # Of rows of root mean square 1 the bound is |scale| d.
    if scores.plain > 1.01 * scale * d:
        found.append("q and k normalised")
    smaller = f"{', or '.join(found)}, would make B smaller; " if found else ""
    return f"{smaller}method='exact' has no bound"


def _certified(
    problem: Problem, scores: Scores, values: Values, eps: float, degree: int | None, rounding: float | None = None
):
    """The polynomial of the smallest degree (or of `degree`) that certifies eps, and None; or None, and why not."""
    B, d = scores.bound, fft_engine.terms(problem)
    if rounding is None:
        rounding = polynomial_rounding(problem, B, values, scores.lost)
    where, cure = _where(scores), _cure(problem, scores)
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
        # smallest_degree speaks of a slightly larger bound, whose polynomials are in its cache. This one takes a
        # millisecond: only where its error, about (B / bound)^needed times that of the other, may do.
        bound = poly.B_grid(B)
        if poly.minimax(bound, needed - 1).error * (B / bound) ** needed <= 1.02 * e:
            p = poly.minimax(B, needed - 1)
            if p.error <= e:
                return p, None
    return poly.minimax(poly.B_grid(B), max(1, needed)), None
