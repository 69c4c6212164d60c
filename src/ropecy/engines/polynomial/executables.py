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
from ...problem.communicator import Communicator
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

    def _beside(
        self, problem: Problem, result: Result, left: np.ndarray, other: Executable | None, pieces: Pieces
    ) -> Result:
        """The result with that of another executable in the slots that are left to it."""
        if not left.any():
            return result
        slots = np.flatnonzero(left)
        own = other.slots(slots).forward(problem.slots(slots), result.lse is not None, pieces)
        result.saved.left = Left(slots, own)
        result.o[slots] = own.o
        if result.lse is not None:
            result.lse[slots] = own.lse
        result.found = _both(result.found, own.certificate, slots)
        if self.grad:
            result.gradient_found = _both(result.gradient_found, own.gradient_certificate, slots)
        return result

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
            return self._beside(problem, self._result(saved, want_lse, found), left, self.fallback, pieces)
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
        return self._beside(problem, self._result(saved, want_lse, found, gradient), left, self.fallback, pieces)

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


Trial = tuple[MomentPolynomial | None, ...]  # a polynomial for each slot, of one degree; None where there is none
Prove = Callable[[int], Executable]


@dataclass(slots=True)
class BySample(Polynomial):
    """In each slot the first of some degrees for which twice the error of rows sampled from it is within eps.

    Attributes
    ----------
    trials : list of Trial
        The polynomials to try; those of `expansion` are not used.
    allowed : (H,) array
        What rounding leaves of eps for the truncation of each slot.
    sample : Sample or None
        None while the executable is sent between processes, each of which has the sample already.
    fallback : Executable or None
        What runs where no degree suffices.
    prove : callable or None
        ``prove(slot)`` plans what runs then in a slot, if there is no `fallback`.
    """

    trials: list[Trial]
    allowed: np.ndarray
    sample: Sample | None
    fallback: Executable | None = None
    prove: Prove | None = None

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        if not self.trials:
            return self._proved(problem, want_lse, pieces)
        at, (polynomials, *others) = RowsAtKeys(problem, pieces), self.trials
        some = next(p for p in polynomials if p is not None)
        # A slot that has no polynomial of this degree is computed with that of another, and not accepted.
        each = tuple(some if p is None else p for p in polynomials)
        expansion = Expansion.of_slots(self.expansion.scores, self.values, each)
        o, lse, measured = features.forward(at.problem, expansion, want_lse, pieces.comm)
        truncation = 2 * self._errors(at.problem, o, measured.inverse, some.degree, pieces.comm)
        left = ~(truncation <= self.allowed) | [p is None for p in polynomials]
        rest = replace(self, trials=others)
        if left.all():
            return rest.forward(problem, want_lse, pieces)
        truncation[left] = 0.0
        result, count = self._result(Saved(measured, at, o, lse), want_lse), n_features(problem.sizes.d, some.degree)
        found = replace(self.certificate, degree=some.degree, n_features=count, truncation=float(truncation.max()))
        rows = np.broadcast_to(truncation[:, None, None], result.o.shape[:3])
        result.found = replace(found, rows_truncation=rows)
        return self._beside(problem, result, left, rest, pieces)

    def _errors(
        self, problem: Problem, o: np.ndarray, inverse: np.ndarray, degree: int, comm: Communicator
    ) -> np.ndarray:
        """The largest error of the rows that are drawn from each slot for this degree, (H,)."""
        seed, (H, G, n) = self.certificate.seed, o.shape[:3]
        draws = [np.random.default_rng([seed, degree, number]) for number in problem.numbers.tolist()]
        risk = self.sample.risk(problem, self.expansion.scores, inverse, comm)
        chosen = np.flatnonzero(draw(risk, self.certificate.n_sampled, draws, comm))
        found, errors = np.zeros(H), row_errors(problem, o, chosen, problem.unit, bound=self.plain, comm=comm)
        np.maximum.at(found, chosen // max(1, G * n), errors)
        return comm.largest(found)

    def slots(self, which: Slots) -> BySample:
        def own(slot: int) -> Executable:
            return self.prove(slots[slot])

        slots = np.arange(len(self.plain))[which].tolist()
        found = super(BySample, self).slots(which)
        return replace(
            found,
            trials=[trial for p in self.trials if any(trial := tuple(p[slot] for slot in slots))],
            allowed=self.allowed[which],
            sample=self.sample.slots(which),
            fallback=self.fallback and self.fallback.slots(which),
            prove=self.prove and own,
        )

    def _proved(self, problem: Problem, want_lse: bool, pieces: Pieces) -> Result:
        """The result where no degree suffices: by the fallback, or by what is planned for each slot."""
        if self.fallback is not None:
            return self.fallback.forward(problem, want_lse, pieces)
        if self.prove is None:
            raise self._refusal
        found = []
        try:
            for slot in range(problem.sizes.H):
                part = problem.slots(slice(slot, slot + 1))
                found.append(self.prove(slot).forward(part, want_lse, pieces))
        except BoundedEntryError as error:
            raise self._refusal from error
        o, certificates = np.concatenate([own.o for own in found]), [own.certificate for own in found]
        rows = np.empty(o.shape[:3])
        for into, own in zip(rows, certificates, strict=True):
            into[:] = own.truncation if own.rows_truncation is None else own.rows_truncation[0]
        lse = np.concatenate([own.lse for own in found]) if want_lse else None
        return Result(o, lse, self, found=replace(together(certificates, [1.0] * len(found)), rows_truncation=rows))

    @property
    def _refusal(self) -> BoundedEntryError:
        rows, allowed, B = self.certificate.n_sampled, self.allowed.min(), self.expansion.scores.bound
        return BoundedEntryError(
            f"certify='sample': twice the error of {rows} sampled rows is past {allowed:.3g} at all degrees that were "
            f"tried, which is what rounding leaves of eps, and no proof certifies eps for scores within B = {B:.4g}; "
            "method='exact' has no bound"
        )

    def measured_by(self, statistics: Statistics | None) -> BySample:
        fallback = self.fallback and self.fallback.measured_by(statistics)
        return replace(self, sample=statistics and statistics.sample, fallback=fallback)

    def traffic(self, sender: Sender) -> Traffic:
        """The traffic if the first degree suffices; the sampled rows are computed exactly over all ranks' keys."""
        outline, slots = sender.outline, sender.outline.sizes.H
        rows, found = slots * self.certificate.n_sampled, state_traffic(sender, self._degree_of_state(), 0)
        found += _range_traffic(outline, sender.size) + maxima(8 * rows, sender.size) + maxima(8 * slots, sender.size)
        for width in (outline.sizes.d + 1, outline.sizes.d_v + 1):
            found += totals(rows * width, sender.size)
        return found
