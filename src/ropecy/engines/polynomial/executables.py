"""Ways to run the polynomial engine: certified before the work, or row by row after it, by moments or by a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ...approximation.minimax import n_features
from ...approximation.moment_fit import MomentPolynomial
from ...certificate import BoundedEntryError, Certificate, together
from ...certify import moments
from ...certify.moments import MomentRule
from ...certify.rounding import exact_rounding
from ...certify.sample import Sample, draw
from ...certify.statistics import Statistics
from ...certify.values import Values
from ...problem.input_gradients import InputGradients
from ...problem.pieces import WHOLE, Pieces, RowsAtKeys
from ...problem.problem import Outline, Problem, Slots
from ...problem.traffic import Sender, Traffic, maxima, sums, totals
from ..base import Executable, Result
from ..exact.row_errors import row_errors
from ..exact.rows import exact_rows
from ..merge import row_sums, share
from . import features
from .features import Expansion


@dataclass(slots=True)
class Saved:
    """What backward needs of forward.

    Attributes
    ----------
    features : features.Saved
    at_keys : RowsAtKeys
    o, lse : arrays
        The results, at the ranks where they were computed.
    exact : (H, G, n) bool array or None
        Which of these rows were computed exactly.
    left : Left or None
        The slots that another executable has computed.
    own, own_share : arrays or None
        Where the problem has been resumed under the softmax of more keys, so that o and lse are those of all keys: O of
        its own keys, and what they have of the weight of each row.
    """

    features: features.Saved
    at_keys: RowsAtKeys
    o: np.ndarray
    lse: np.ndarray | None
    exact: np.ndarray | None = None
    own: np.ndarray | None = None
    own_share: np.ndarray | None = None
    left: Left | None = None


class Left(NamedTuple):
    """Some slots whose rows fail too often, and their results by another executable."""

    slots: np.ndarray
    result: Result


@dataclass(slots=True)
class Polynomial(Executable):
    """One polynomial for all scores, which is certified before the work.

    Attributes
    ----------
    expansion : Expansion
    plain : (H,) array
        A bound of the scores of each slot, as the exact engine takes it.
    """

    certificate: Certificate
    gradient_certificate: Certificate | None
    expansion: Expansion
    plain: np.ndarray

    engine = "polynomial"

    @property
    def values(self) -> Values:
        return self.expansion.values

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        at = RowsAtKeys(problem, pieces)
        o, lse, saved = features.forward(at.problem, self.expansion, want_lse, pieces.comm)
        result = self._result(Saved(saved, at, o, lse), want_lse)
        polynomials = self.expansion.polynomials
        if (problem.mask.causal or len(polynomials) > 1) and not pieces.distributed:
            rows = moments.worst_case(problem, polynomials)
            largest, rows = float(rows.max()), np.broadcast_to(rows, o.shape[:3])
            result.found = replace(self.certificate, truncation=largest, rows_truncation=rows)
        if self.grad and len(polynomials) > 1 and not pieces.distributed:
            errors = np.array([p.error for p in polynomials])[:, None, None]
            rows = np.broadcast_to(errors, o.shape[:3])
            result.gradient_found = replace(self.gradient_certificate, rows_truncation=rows)
        return result

    def slots(self, which: Slots) -> Polynomial:
        return replace(self, expansion=self.expansion.slots(which), plain=self.plain[which])

    def _result(self, saved: Saved, want_lse: bool, *found: Certificate | None) -> Result:
        """The result, with all rows and their certificates sent back to the ranks that they came from."""
        home = saved.at_keys.home

        def at_home(certificate: Certificate | None) -> Certificate | None:
            if certificate is None or certificate.rows_truncation is None:
                return certificate
            return replace(certificate, rows_truncation=home(certificate.rows_truncation))

        certificates = [at_home(certificate) for certificate in found]
        return Result(home(saved.o), home(saved.lse) if want_lse else None, self, saved, *certificates)

    def resume(self, problem: Problem, result: Result, o: np.ndarray, lse: np.ndarray) -> Result:
        own, own_share = result.saved, share(result.saved.lse, lse)
        inverse = (own.features.inverse * own_share).astype(problem.dtype)
        resumed = replace(own.features, o=o, inverse=inverse)
        saved = replace(own, features=resumed, o=o, lse=lse, own=own.o, own_share=own_share)
        return replace(result, o=o, lse=lse, saved=saved)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        saved = result.saved
        at, do = saved.at_keys, saved.at_keys.there(do)
        found = features.backward(at.problem, saved.features, do, pieces.comm)
        if saved.exact is not None:
            rows = exact_rows(at.problem, self.plain, saved.exact, pieces.comm)
            rows.backward(saved.o, saved.lse, do, found)
        centre = self.expansion.scores.centre
        if saved.own is not None and centre is not None:
            # Keys are centred. That changes dq by the centre times the sum of a row's dS over them, which is 0 over all
            # keys only. Rows that are exact have keys as they are.
            sums = row_sums(do, saved.own, saved.o, saved.own_share)
            if saved.exact is not None:
                sums[saved.exact] = 0
            found.dq += (problem.scale * sums[..., None] * centre[:, None, None]).astype(found.dq.dtype)
        found.dq = at.home(found.dq)
        return found

    def traffic(self, sender: Sender) -> Traffic:
        degree = self._degree_of_state()
        return state_traffic(sender, degree, 0)

    def _degree_of_state(self) -> int:
        backward = self.gradient_certificate.degree if self.grad else 0
        return max(self.certificate.degree, backward)


def state_traffic(sender: Sender, degree: int, judgements: int) -> Traffic:
    """The traffic of one state in each direction and of rows that go to their keys.

    `judgements` is how many float64 come back with each row to certify it.
    """
    outline, grad, found = sender.outline, sender.grad, Traffic()
    summed = sums if outline.mask.causal else totals
    for _ in range(1 + grad):
        found += summed(features.state_size(outline, degree), sender.size)
    if sender.rows_at_keys:
        there = sender.rows_at_keys
        d, d_v = (width * outline.dtype.itemsize for width in (outline.sizes.d, outline.sizes.d_v))
        for width, cuts in ((d, there), (d_v, there[::-1]), (d_v, there), (d, there[::-1]))[: 2 + 2 * grad]:
            found += sender.moved(cuts, width)
        for _ in range(judgements):
            found += sender.moved(there[::-1], 8)
    return found


def _range_traffic(outline: Outline, ranks: int) -> Traffic:
    """The traffic of finding the least and the largest values on lower ranks."""
    ends = maxima(outline.sizes.H * outline.sizes.d_v * outline.dtype.itemsize, ranks)
    return ends + ends


@dataclass(slots=True)
class ByMoments(Polynomial):
    """A polynomial for each row, certified by moments of the scores after the row is computed; the others are exact.

    Attributes
    ----------
    rule : MomentRule
    allowed : (H,) array
        What rounding leaves of eps for the truncation of the rows of each slot.
    n_exact_rows : (H,) int array
        How many rows of each slot may be computed exactly because their certificate is too large.
    fallback : Executable or None
        What runs if more rows fail; None if the polynomial engine is insisted on and nothing else certifies eps.
    """

    rule: MomentRule
    allowed: np.ndarray
    n_exact_rows: np.ndarray
    fallback: Executable | None = None

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        at, comm, rule = RowsAtKeys(problem, pieces), pieces.comm, self.rule
        piece, certificate = at.problem, self.certificate
        fits = rule.fits(piece)
        judged = features.Judged(
            moments.value_distances(piece, self.values, comm), fits.ratio(rule.polynomials, piece.dtype)
        )
        o, lse, measured = features.forward(piece, self.expansion, want_lse or self.grad, comm, judged=judged)
        rows = rule.truncation(piece, fits, measured)
        # Both are products of the same numbers, rounded in another order.
        rows[fits.sizes > self.expansion.scores.of_slots[:, None, None] * (1 + 1e-12)] = np.inf
        allowed = self.allowed[:, None, None]
        failed = ~(rows <= allowed)
        of_gradient = None
        if self.grad:
            of_gradient = rule.gradient(piece, fits, measured)
            failed |= ~(of_gradient <= 2 * allowed)
        of_slots = np.sum(comm.gather(np.count_nonzero(failed, axis=(1, 2))), axis=0)
        left = of_slots > self.n_exact_rows
        if left.any() and self.fallback is None:
            raise self._too_many(int(of_slots.sum()), sum(comm.gather(rows.size)))
        if left.all():
            return self.fallback.forward(problem, want_lse, pieces)
        failed[left], rows[left] = False, 0.0
        n_failed = int(of_slots[~left].sum())
        rounding = certificate.rounding
        if n_failed:
            exact_rows(piece, self.plain, failed, comm).forward(o, lse)
            rows[failed] = 0.0
            rounding = max(rounding, exact_rounding(piece, self.expansion.scores, self.values, comm))
        found = replace(certificate, rounding=rounding, n_exact_rows=n_failed)
        found = replace(found, truncation=max(comm.gather(float(rows.max(initial=0)))), rows_truncation=rows)
        saved = Saved(measured, at, o, lse)
        if not self.grad:
            return self._beside(problem, self._result(saved, want_lse, found), left, pieces)
        of_gradient[failed] = of_gradient[left] = 0.0
        # With an inverse of 0 the polynomial's backward pass leaves these rows out.
        measured.inverse[failed] = measured.inverse[left] = 0.0
        saved.exact = failed if n_failed else None
        gradient = replace(
            self.gradient_certificate,
            truncation=max(comm.gather(float(of_gradient.max(initial=0)))),
            rounding=4 * rounding,
            rows_truncation=of_gradient,
            n_exact_rows=n_failed,
        )
        return self._beside(problem, self._result(saved, want_lse, found, gradient), left, pieces)

    def _beside(self, problem: Problem, result: Result, left: np.ndarray, pieces: Pieces) -> Result:
        """The result with that of the fallback in the slots that are left to it."""
        if not left.any():
            return result
        slots = np.flatnonzero(left)
        own = self.fallback.slots(slots).forward(problem.slots(slots), result.lse is not None, pieces)
        result.saved.left = Left(slots, own)
        result.o[slots] = own.o
        if result.lse is not None:
            result.lse[slots] = own.lse
        result.found = _both(result.found, own.certificate, slots)
        if self.grad:
            result.gradient_found = _both(result.gradient_found, own.gradient_certificate, slots)
        return result

    def resume(self, problem: Problem, result: Result, o: np.ndarray, lse: np.ndarray) -> Result:
        resumed, left = super(ByMoments, self).resume(problem, result, o, lse), result.saved.left
        if left is not None:
            problem, own = problem.slots(left.slots), left.result
            own = own.executable.resume(problem, own, o[left.slots], lse[left.slots])
            resumed.saved.left = Left(left.slots, own)
        return resumed

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        found, left = super(ByMoments, self).backward(problem, result, do, pieces), result.saved.left
        if left is not None:
            own = left.result.backward(problem.slots(left.slots), do[left.slots], pieces)
            found.dq[left.slots], found.dk[left.slots], found.dv[left.slots] = own.dq, own.dk, own.dv
        return found

    def measured_by(self, statistics: Statistics | None) -> ByMoments:
        return replace(self, fallback=self.fallback and self.fallback.measured_by(statistics))

    def _too_many(self, n_failed: int, n_rows: int) -> BoundedEntryError:
        return BoundedEntryError(
            f"degree {self.rule.degree} does not certify a truncation of {self.allowed.min():.3g} by moments for "
            f"{n_failed:,} of {n_rows:,} rows, past the {np.sum(self.n_exact_rows):,} planned to be exact, and by the "
            f"bound B = {self.expansion.scores.bound:.4g} of the scores no degree does; method='exact' has no bound"
        )

    def traffic(self, sender: Sender) -> Traffic:
        found = state_traffic(sender, self._degree_of_state(), 1 + sender.grad)
        return found + _range_traffic(sender.outline, sender.size) if sender.outline.mask.causal else found


def _both(certificate: Certificate, own: Certificate, slots: np.ndarray) -> Certificate:
    """The certificate of all slots, given that of the others and that of these."""
    rows = certificate.rows_truncation.copy()
    rows[slots] = own.truncation if own.rows_truncation is None else own.rows_truncation
    return replace(together([certificate, own], [1.0, 1.0]), rows_truncation=rows)


@dataclass(slots=True)
class BySample(Polynomial):
    """The first of some degrees for which twice the error of sampled rows is within eps.

    Slots are decided on together here: the sampled rows are those of all slots, and by what they show all slots take
    one degree. The evidence about a slot alone would want as many rows of it as there are of all.

    Attributes
    ----------
    trials : list of (tuple of MomentPolynomial)
        The polynomials of all slots to try, by degree; `expansion` and `certificate` are those of the first.
    sample : Sample or None
        None while the executable is sent between processes, each of which has the sample already.
    eps : float
    fallback : Executable or None
        What runs if no degree suffices.
    prove : callable or None
        Plans what runs then, if there is no `fallback`.
    """

    trials: list[tuple[MomentPolynomial, ...]]
    sample: Sample | None
    eps: float
    fallback: Executable | None = None
    prove: Callable[[], Executable] | None = None

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        at, comm, certificate = RowsAtKeys(problem, pieces), pieces.comm, self.certificate
        piece, scores = at.problem, self.expansion.scores
        rng = np.random.default_rng(certificate.seed)
        for polynomials in self.trials:
            expansion, degree = Expansion.of_slots(scores, self.values, polynomials), polynomials[0].degree
            o, lse, saved = features.forward(piece, expansion, want_lse, comm)
            risk = self.sample.risk(piece, scores, saved.inverse, comm)
            chosen = draw(risk, certificate.n_sampled, rng, comm)
            errors = row_errors(piece, o, chosen, piece.unit, bound=self.plain, comm=comm)
            truncation = 2 * max(comm.gather(float(errors.max(initial=0))))
            if truncation <= self.eps - certificate.rounding:
                count = n_features(piece.sizes.d, degree)
                found = replace(certificate, degree=degree, n_features=count, truncation=truncation)
                return self._result(Saved(saved, at, o, lse), want_lse, found)
        refusal = None
        if self.fallback is not None:
            return self.fallback.forward(problem, want_lse, pieces)
        try:
            if self.prove is not None:
                return self.prove().forward(problem, want_lse, pieces)
        except BoundedEntryError as error:
            refusal = error
        raise BoundedEntryError(
            f"twice the error of {certificate.n_sampled} sampled rows is {truncation:.2g} at degree {degree}, past "
            f"eps = {self.eps:g}, and no proof certifies it for scores within B = {scores.bound:.4g}; method='exact' "
            "has no bound"
        ) from refusal

    def measured_by(self, statistics: Statistics | None) -> BySample:
        fallback = self.fallback and self.fallback.measured_by(statistics)
        return replace(self, sample=statistics and statistics.sample, fallback=fallback)

    def traffic(self, sender: Sender) -> Traffic:
        """The traffic if the first degree suffices; the sampled rows are computed exactly over all ranks' keys."""
        outline, rows = sender.outline, self.certificate.n_sampled
        found = state_traffic(sender, self._degree_of_state(), 0)
        found += _range_traffic(outline, sender.size) + maxima(8 * rows, sender.size)
        for width in (outline.sizes.d + 1, outline.sizes.d_v + 1):
            found += totals(rows * width, sender.size)
        return found
