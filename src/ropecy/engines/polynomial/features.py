"""Polynomial attention: ``exp(s) ~ p(s) = phi(q) diag(w) phi(k)^T``, so that n n_k pairs become (n + n_k) F features.

This is the algorithm of arXiv:2412.17316 and arXiv:2505.11892 for positions that factor, ``R_{j-i} = R_i^T R_j``:
rotated rows meet in an inner product, so no FFT is needed. The gradient is computed differently than in the papers: the
features are differentiated and no n x (d d_v) matrices are formed, which saves a factor d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ...approximation.minimax import Polynomial, antiderivative, n_features
from ...approximation.moment_fit import MomentPolynomial
from ...certify.scores import Scores
from ...certify.values import Values
from ...kernels import _monomials
from ...problem.communicator import SERIAL, Communicator
from ...problem.input_gradients import InputGradients
from ...problem.mask import Mask
from ...problem.problem import Outline, Problem, Sizes, Slots
from ..kept import kept_below

# How many segments there are at most, over all slots: enough to keep many threads busy.
_SEGMENTS = 16
_STATE_BYTES = 256 * 2**20  # how much memory the states of all segments may take


@dataclass(slots=True)
class Monomials:
    """The monomials of a state: their degrees, their places and their weights, one row for all slots or one for each
    (see c/monomials.h).
    """

    degree: int
    grad_degree: int
    state_degree: int
    offset: np.ndarray
    count: np.ndarray
    pitch: int
    weights: np.ndarray
    grad_weights: np.ndarray | None


@dataclass(slots=True)
class Saved:
    """What backward needs of forward, and what certifies its rows if that was measured (see c/monomials.h)."""

    scan: _monomials.Scan
    states: np.ndarray  # sums of keys, as forward used them
    o: np.ndarray
    inverse: np.ndarray
    moment: np.ndarray | None
    spread: np.ndarray | None
    fall: np.ndarray | None = None  # what the length of each rank's keys does to a decayed state


class Frame(NamedTuple):
    """What rows are centred on and multiplied by before their monomials are taken.

    Attributes
    ----------
    centre : (H, d) array or None
        What is taken from keys; None is 0.
    middle : (H, d_v) array
        What is taken from values.
    q_factor, k_factor : (H,) float64 arrays
    """

    centre: np.ndarray | None
    middle: np.ndarray
    q_factor: np.ndarray
    k_factor: np.ndarray


@dataclass(slots=True)
class Expansion:
    """How scores are brought into the interval of a polynomial, and which polynomial stands for exp there.

    Attributes
    ----------
    scores : Scores
        The centre of the keys and the factors of q and k, by which all scores are within ``[-p.B, p.B]``.
    values : Values
        Its `middle` is subtracted from v and added to O, so that rounding is in proportion to the range of the values,
        however far from 0 they lie.
    p : Polynomial or MomentPolynomial
        The weights of forward.
    of_gradient : Polynomial or MomentPolynomial, optional
        The weights of backward; None if there is no backward pass.
    each : tuple of (tuple of Polynomial), optional
        Those of each slot, of one degree, in the place of p and, where there is a backward pass, of `of_gradient`.
    """

    scores: Scores
    values: Values
    p: Polynomial | MomentPolynomial
    of_gradient: Polynomial | MomentPolynomial | None = None
    each: tuple[tuple[Polynomial | MomentPolynomial, ...] | None, ...] = (None, None)

    @classmethod
    def of_slots(
        cls,
        scores: Scores,
        values: Values,
        p: tuple[Polynomial | MomentPolynomial, ...],
        of_gradient: tuple[Polynomial | MomentPolynomial, ...] | None = None,
    ) -> Expansion:
        """The expansion with a polynomial for each slot, all of one degree."""
        alike = all(own is p[0] for own in p) and (of_gradient is None or all(r is of_gradient[0] for r in of_gradient))
        r = None if of_gradient is None else of_gradient[0]
        return cls(scores, values, p[0], r, (None, None) if alike else (p, of_gradient))

    def slots(self, which: Slots) -> Expansion:
        """The expansion of some of the slots."""
        of_slots = ("q_factor", "k_factor", "of_slots", "keys", "centre")
        scores = {name: getattr(self.scores, name) for name in of_slots}
        scores = {name: None if X is None else X[which] for name, X in scores.items()}
        each = tuple(None if own is None else tuple(np.array(own, object)[which]) for own in self.each)
        values = replace(self.values, middle=self.values.middle[which])
        return replace(self, scores=replace(self.scores, **scores), values=values, each=each)

    @property
    def polynomials(self) -> tuple[Polynomial | MomentPolynomial, ...]:
        """The weights of forward, one for all slots or one for each."""
        return self.each[0] or (self.p,)


@dataclass(slots=True)
class Judged:
    """What forward measures so that rows can be certified by moments.

    Attributes
    ----------
    distances : array
        What `moments.value_distances` returns.
    ratio : (2, H, G, n) array or None
        What `moments.RowFits.ratio` returns: the factors by which every row has a polynomial of its own.
    """

    distances: np.ndarray
    ratio: np.ndarray | None


def forward(
    problem: Problem,
    expansion: Expansion,
    want_lse: bool,
    comm: Communicator = SERIAL,
    *,
    judged: Judged | None = None,
    decay: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None, Saved]:
    """O (H, G, n, d_v), lse float64 or None, and what backward needs.

    Parameters
    ----------
    problem : Problem
    expansion : Expansion
    want_lse : bool
    comm : Communicator
        The processes that hold the other pieces of the sequence; one state goes between them.
    judged : Judged, optional
        If given, the moment and the spread of every row are measured too; p must be a MomentPolynomial.
    decay : (H,) float64 array, optional
        If given, in a causal problem, weights are multiplied by exp(-decay (i + offset - j)).

    Notes
    -----
    Time ``4 n F (d_v + 1)`` operations for each query head, F = C(d + g, g); grouped queries share the half of it that
    concerns keys. In a causal problem pairs inside chunks of one or two hundred tokens are exact; threads that have no
    head take a share of the columns of another's, or, where these are few, a first pass sums up the keys of segments
    that threads would wait for, up to half as much again.
    Memory: some states of ``F (d_v + 1)`` float64.
    """
    mask, scores = problem.mask, expansion.scores
    monomials = _monomials_for(problem, expansion.p, expansion.of_gradient, expansion.each)
    frame = Frame(scores.centre, expansion.values.middle, scores.q_factor, scores.k_factor)
    scan = _monomials.Scan(problem, frame, monomials, segments(problem, monomials.state_degree), decay)
    asked = want_lse, 0, None, None
    if judged is not None:
        asked = want_lse, expansion.p.order, judged.distances, judged.ratio
    fall = None
    if not comm.distributed:
        o, inverse, lse, moment, spread, states = scan.forward(*asked)
    else:
        if decay is not None:
            fall = np.array(comm.gather(np.exp(-decay * problem.sizes.n_k)))
        states, own = comm.together(scan.key_states)
        start = comm.before(own, fall) if mask.causal else comm.total(own)
        o, inverse, lse, moment, spread, states = comm.together(scan.forward, *asked, states, start)
    return o, lse, Saved(scan, states, o, inverse, moment, spread, fall)


def backward(
    problem: Problem,
    saved: Saved,
    do: np.ndarray,
    comm: Communicator = SERIAL,
    key_sums: np.ndarray | None = None,
) -> InputGradients:
    """The gradients of ``<do, O>``. If `key_sums` (H, n_k) is given, sum_i dS_ij is added to it.

    Notes
    -----
    With S = phi(k)^T [v 1], dN = [do, -<do, o>] / den: dphi(q) = dN (w S)^T, dS = phi(q)^T dN,
    dphi(k) = [v 1] (w dS)^T, dv = phi(k) dS; dq and dk follow by the derivatives of the features. For dq and dk the
    features are those of an antiderivative of p, of one degree more, so that pairs have the weights p(s_ij) / den_i
    there too, which are positive. With a polynomial r of its own in the place of p, dS = r / den (do v^T - <do, o>)
    need not add up to 0 over a row. Four products of the size of forward's at that degree, five if causal.
    """
    scan, results = saved.scan, (saved.o, saved.inverse, do)
    if not comm.distributed:
        dq, dk, dv = scan.backward(saved.states, *results, key_sums)
    else:
        grad_states, own = comm.together(scan.query_states, *results)
        start = comm.after(own, saved.fall) if problem.mask.causal else comm.total(own)
        dq, dk, dv = comm.together(scan.backward, saved.states, *results, key_sums, grad_states, start)
    if problem.mask.kept is not None:
        # phi(k) dS was computed for every key, but a hidden key has no weight.
        dv[~problem.mask.kept] = 0
    return InputGradients(dq, dk, dv)


def decoding_monomials(d: int, p: Polynomial) -> Monomials:
    """The monomials of a decoding state, which is float64 whatever the dtype of the data."""
    return _monomials_for(_no_rows(Sizes(1, 1, 0, 0, d, d)), p, None)


def key_states(k: np.ndarray, v: np.ndarray, monomials: Monomials, middle: np.ndarray, threads: int) -> np.ndarray:
    """sum_j phi(k_j) [v_j - middle, 1], (H, d_v + 1, pitch), of float64 rows k (H, n, d) and v (H, n, d_v).

    Notes
    -----
    Time ``2 n F (d_v + 1)`` operations a head.
    """
    q = np.empty((k.shape[0], 1, 0, k.shape[2]))
    ones = np.ones(k.shape[0])
    keys = Problem(q=q, k=k, v=v, threads=threads)
    scan = _monomials.Scan(keys, Frame(None, middle, ones, ones), monomials, segments(keys, monomials.state_degree))
    _, total = scan.key_states()
    return total


def _no_rows(sizes: Sizes) -> Outline:
    """The outline of a problem of keys alone, in float64."""
    return Outline(sizes=sizes, dtype=np.dtype(np.float64), mask=Mask(sizes.n, sizes.n_k))


def memory(problem: Outline, degree: int, grad: bool, grad_degree: int | None = None) -> float:
    """Bytes beyond inputs and outputs."""
    H, G, n, _, d, d_v = problem.sizes
    most = max(degree, grad_degree or degree + 1) if grad else degree
    state = n_features(d, most) * (d_v + 1)
    item = problem.dtype.itemsize
    states = state * 8 * H * segments(problem, most) * (2 if grad else 1)
    workspaces = problem.threads * state * (8 + (4 if grad else 3) * item)
    return states + workspaces + (2 if grad else 1) * H * state * item + H * G * n * (8 + item)


def state_size(problem: Outline, state_degree: int) -> int:
    """How many numbers the states of all heads have, which go between the ranks that hold a sequence in pieces."""
    lanes = _monomials.lanes_of(problem.dtype)
    _, _, pitch, _ = _layout(problem.sizes.d, state_degree, lanes)
    return problem.sizes.H * (problem.sizes.d_v + 1) * pitch


def segments(problem: Outline, state_degree: int) -> int:
    """Into how many segments the sequence is cut, each with a state. It depends on shapes, never on threads."""
    H, _, n, n_k, d, d_v = problem.sizes
    features = n_features(d, state_degree)
    state = 8 * (problem.origin.alike or H) * features * (d_v + 1)
    # Adding up states costs little; but if causal, and with more threads than heads, keys are read once more.
    least = max(1024, features) if problem.mask.causal else max(512, features // 4)
    return max(1, min(-(-_SEGMENTS // problem.cut_for), max(n, n_k) // least, _STATE_BYTES // state))


def _monomials_for(
    problem: Outline,
    p: Polynomial | MomentPolynomial,
    r: Polynomial | MomentPolynomial | None,
    each: tuple[tuple[Polynomial | MomentPolynomial, ...] | None, ...] = (None, None),
) -> Monomials:
    """The monomials of a forward pass with weights p and, unless r is None, of a backward pass with weights r; if slots
    have weights of their own, `each`, these take the place of both.
    """
    lanes = _monomials.lanes_of(problem.dtype)
    degree = max(1, p.degree)
    grad_degree = 0 if r is None else max(1, r.degree) + 1
    state_degree = max(degree, grad_degree)
    offset, count, pitch, multinomials = _layout(problem.sizes.d, state_degree, lanes)
    degrees = np.repeat(np.arange(state_degree + 1), np.diff(np.append(offset, pitch)))

    def weigh(coefficients):
        padded = np.zeros((len(coefficients), state_degree + 1))
        for slot, of_slot in enumerate(coefficients):
            padded[slot, : len(of_slot)] = of_slot
        return np.ascontiguousarray(multinomials * padded[:, degrees], problem.dtype)

    return Monomials(
        degree=degree,
        grad_degree=grad_degree,
        state_degree=state_degree,
        offset=offset,
        count=count,
        pitch=pitch,
        weights=weigh([own.coefficients for own in each[0] or (p,)]),
        grad_weights=None if r is None else weigh([antiderivative(own) for own in each[1] or (r,)]),
    )


@kept_below(lambda d, degree, lanes: n_features(d, degree), most=2**20)
def _layout(d: int, degree: int, lanes: int):
    """Where the monomials stand in a state: offset [s], count [s, m], pitch, and |a|! / a! of each (0 in padding).

    s is a degree, m a number of variables; see c/monomials.h.
    """
    count = np.array([[math.comb(m - 1 + s, s) if m else int(s == 0) for m in range(d + 1)] for s in range(degree + 1)])
    offset = np.zeros(degree + 1, np.intp)
    offset[1:] = np.cumsum(count[:-1, d])
    offset[degree] = -(-offset[degree] // lanes) * lanes
    # A whole number of vectors, and an odd one, so that columns don't fall on the same cache sets.
    vectors = -(-(offset[degree] + count[degree, d]) // lanes)
    pitch = int(vectors | 1) * lanes
    multinomials = np.zeros(pitch)
    multinomials[0] = 1
    # The power of the last variable in each monomial: x_m^k has |a|! / a! = that of x_m^(k-1) times |a| / k.
    power, last = np.zeros(pitch, int), np.full(pitch, -1)
    for s in range(1, degree + 1):
        for m in range(d):
            source = slice(offset[s - 1], offset[s - 1] + count[s - 1, m + 1])
            target = slice(offset[s] + count[s, m], offset[s] + count[s, m] + count[s - 1, m + 1])
            power[target] = np.where(last[source] == m, power[source] + 1, 1)
            last[target] = m
            multinomials[target] = multinomials[source] * s / power[target]
    return offset.astype(np.intp), np.ascontiguousarray(count, np.intp), pitch, multinomials
