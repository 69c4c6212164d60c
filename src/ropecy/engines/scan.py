"""Attention whose bias factors past some distance: an exact near field, and decayed states for what lies beyond.

Where ``exp(b_t) = sum_k exp(c_k - r_k |t|)`` for t <= -left and t >= right, each term of a side is a causal polynomial
problem of its own, shifted so that a row sees the keys from that distance on, with weights that fall by exp(-r_k) a
token; the right side is the left one of the reversed sequences. The pairs between are the exact engine's. The parts,
each a softmax over its own keys, are merged by their lse. Nothing of this is in the papers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..bounds import Scores, Values, exact_rounding, polynomial_rounding
from ..costs import Work, exact_work, polynomial_work
from ..forms import FarGradient, Tail
from ..kernels import _monomials
from ..polynomial import Polynomial
from ..problem import Problem
from . import exact
from . import polynomial as polynomial_engine

# exp of this is far from underflow in float32; a row's nearest key may fade no further.
_FADED = 60.0
# Seconds of an entry of O that is merged with that of another part.
_MERGE = 4e-10


@dataclass(slots=True)
class Far:
    """One term of one side: keys at the distance `first` and beyond, with weights exp(log_weight - rate |t|).

    Attributes
    ----------
    problem : Problem
        Causal by its q_offset; both sequences reversed where `right`, as views until `forward`.
    right : bool
    term : int
    first : int
    log_weight : (H, G) float64 array
    rate : (H,) float64 array or None
        None is 0 everywhere.
    """

    problem: Problem
    right: bool
    term: int
    first: int
    log_weight: np.ndarray
    rate: np.ndarray | None


@dataclass(slots=True)
class Split:
    """A problem in parts.

    Attributes
    ----------
    whole : Problem
        With a slot for each query head where those of a group have tails of their own.
    near : Problem or None
        The band between the sides.
    far : list of Far
    tail : Tail
    """

    whole: Problem
    near: Problem | None
    far: list[Far]
    tail: Tail


    def __str__(self) -> str:
        exactly = "no near field" if self.near is None else f"an exact near field of {self.near.hi - self.near.lo + 1}"
        decayed = sum(far.rate is not None for far in self.far)
        states = f"{len(self.far)} state{'s' * (len(self.far) > 1)}, {decayed} of them decayed"
        return f"{exactly}, {states}"


@dataclass(slots=True)
class _Part:
    """What backward needs of a far part."""

    far: Far
    scan: _monomials.Scan
    inverse: np.ndarray
    own: np.ndarray | None  # its O and its share of the row, where the first moment of dS is asked for
    share: np.ndarray | None


@dataclass(slots=True)
class Saved:
    """What backward needs of forward."""

    split: Split
    centre: np.ndarray | None
    o: np.ndarray
    lse: np.ndarray
    parts: list[_Part]
    near_o: np.ndarray | None  # the near field's own O and lse, where keys are centred
    near_lse: np.ndarray | None


def unsupported(problem: Problem) -> str | None:
    """What of the problem this engine doesn't do whatever the bias, or None."""
    if problem.family is not None:
        return "a RelativeFamily, whose W_{i-j} does not factor"
    if problem.lo is not None or problem.hi not in (None, 0):
        return "a window"
    if problem.bias is not None and problem.tail is None:
        return "a bias that does not factor"
    return None


def split(problem: Problem, tolerance: float) -> tuple[Split | None, str | None]:
    """The parts, sums of exponentials being right within `tolerance`, relatively; or None, and why there are none."""
    H, G, n, _ = problem.q.shape
    n_k = problem.k.shape[1]
    longest = max(n_k - 1 - problem.q_offset, n - 1 + problem.q_offset, 1)
    plain = Tail(0, 1, np.zeros((2, 1, 1)), np.zeros((2, 1, 1)))
    tail = plain if problem.bias is None else problem.tail(longest, tolerance)
    if tail is None:
        return None, f"a bias whose far field no sum of exponentials fits within {tolerance:.2g}"
    heads = tail.rate.shape[-1]
    if heads > 1 and G > 1:
        problem = problem.ungrouped()
        H, G = H * G, 1
    left, right = tail.left, tail.right
    if problem.near is not None:
        left, right = max(left, problem.near[0]), max(right, problem.near[0])
    rates = np.broadcast_to(tail.rate, (2, tail.rate.shape[1], H * G)).reshape(2, -1, H, G)[..., 0]
    weights = np.broadcast_to(tail.log_weight, rates.shape[:2] + (H * G,)).reshape(2, -1, H, G)
    far = []
    for side, first in enumerate((left, right)):
        if side == 1 and problem.hi is not None:
            continue
        part = _shifted(problem if side == 0 else _reversed(problem), first)
        if part.empty:
            continue
        for term in range(rates.shape[1]):
            rate = rates[side, term]
            if not np.isfinite(weights[side, term]).any():
                continue
            if np.any(rate * _longest_gap(part) > _FADED):
                return None, "keys that are hidden for so long that a decayed state fades away"
            far.append(Far(part, side == 1, term, first, weights[side, term], rate.copy() if rate.any() else None))
    if not far:
        return None, "a near field without a far one"
    near = replace(problem, lo=1 - left, hi=right - 1 if problem.hi is None else 0)
    if problem.near is not None and problem.near[0] >= max(left, right if problem.hi is None else 0):
        near = replace(near, scale=problem.near[1], near=None)
    if near.lo > near.hi or near.empty:
        near = None
    return Split(problem, near, far, tail), None


def _shifted(problem: Problem, first: int) -> Problem:
    """Row i sees the keys j <= i + q_offset - first, with no bias."""
    return replace(problem, lo=None, hi=0, q_offset=problem.q_offset - first, bias=None, near=None)


def _reversed(problem: Problem) -> Problem:
    """Both sequences from their ends, as views: t becomes -t."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    mask = problem.key_mask
    return replace(
        problem,
        q=problem.q[:, :, ::-1],
        k=problem.k[:, ::-1],
        v=problem.v[:, ::-1],
        key_mask=None if mask is None else mask[:, ::-1],
        q_offset=n_k - n - problem.q_offset,
    )


def _contiguous(problem: Problem) -> Problem:
    """With copies of what are views, as kernels take them."""
    mask = problem.key_mask
    return replace(
        problem,
        q=np.ascontiguousarray(problem.q),
        k=np.ascontiguousarray(problem.k),
        v=np.ascontiguousarray(problem.v),
        key_mask=None if mask is None else np.ascontiguousarray(mask),
    )


def _longest_gap(part: Problem) -> np.ndarray:
    """The most tokens between a row of a causal problem and the last key it sees: (H,)."""
    n, (H, n_k) = part.q.shape[2], part.k.shape[:2]
    end = n - 1 + part.q_offset
    if part.key_mask is None:
        return np.full(H, max(0, end - (n_k - 1)))
    index = np.arange(n_k)
    last = np.maximum.accumulate(np.where(part.key_mask, index, -1), axis=1)
    gap = np.where(last >= 0, index - last, 0)[:, : end + 1].max(axis=1, initial=0)
    return np.maximum(gap, np.where(last[:, -1] >= 0, end - last[:, -1], 0) if end >= n_k else 0)


def rounding(split: Split, scores: Scores, values: Values) -> float:
    """Of the far parts, of the near one, and of merging them."""
    whole, near = split.whole, split.near
    unit = float(np.finfo(whole.q.dtype).eps) / 2
    total = polynomial_rounding(whole, scores.bound, values) + 2 * unit * len(split.far) * (1 + values.offset)
    if near is None:
        return total
    bound = scores.plain * max(1.0, abs(near.scale / whole.scale)) if whole.scale else scores.plain
    first = whole.q.shape[2] - 1 + whole.q_offset
    if near.bias is not None:
        # Only what the band reads of it.
        near = replace(near, bias=near.bias[..., max(0, near.lo + first) : near.hi + first + 1])
    return total + exact_rounding(near, bound, values)


def work(split: Split, degree: int, grad: bool) -> Work:
    """Of forward, and of backward where grad."""
    H, G, n, _ = split.whole.q.shape
    total = Work(H * G * n * (split.whole.v.shape[2] + 4) * _MERGE * len(split.far))
    for far in split.far:
        total += polynomial_work(far.problem, degree, grad)
    return total if split.near is None else total + exact_work(split.near, grad)


def memory(split: Split, degree: int, grad: bool) -> float:
    """Bytes beyond inputs and outputs."""
    H, G, n, d = split.whole.q.shape
    n_k, d_v = split.whole.v.shape[1:]
    item = split.whole.q.itemsize
    rows, keys = H * G * n, H * n_k
    size = rows * (16 + d_v * item)
    if split.near is not None:
        size += (keys * d + rows * (2 * item + (2 * (d + d_v) if grad else 0))) * item
    if any(far.right for far in split.far):
        size += (rows * (d + d_v) + keys * (d + d_v)) * item
    each = rows * (8 + item) + (keys * (d + d_v) + rows * d) * item * grad
    states = [polynomial_engine.memory(far.problem, degree, grad) for far in split.far]
    return size + max(states, default=0.0) + len(split.far) * each


def forward(
    problem: Problem,
    split: Split,
    scores: Scores,
    values: Values,
    p: Polynomial,
    grad: bool,
    want_lse: bool,
) -> tuple[np.ndarray, np.ndarray | None, Saved | None]:
    """O (H, G, n, d_v), lse float64 or None, and what backward needs.

    Parameters
    ----------
    problem : Problem
    split : Split
        Of the problem.
    scores : Scores
        Centre and sizes of q and k, so that all scores are within ``[-p.B, p.B]``.
    values : Values
    p : Polynomial
    grad : bool
        Whether there will be a backward pass.
    want_lse : bool

    Notes
    -----
    Time: that of a causal polynomial problem for each term of a side, and of the exact band.
    """
    whole = split.whole
    o, lse = None, None
    if split.near is not None:
        o, lse, _ = exact.forward(split.near, _near_bound(split.near, scores, problem), True)
    scores, values = _spread(scores, values, whole.k.shape[0])
    parts, own_lse = [], []
    near_o, near_lse = (o.copy(), lse.copy()) if grad and o is not None and scores.centre is not None else (None, None)
    # A plan copies nothing, for the scan may not be what is chosen.
    turned = None
    for far in split.far:
        if far.right:
            far.problem = turned = turned or _contiguous(far.problem)
        part_o, part_lse, saved = polynomial_engine.forward(far.problem, scores, values, p, grad, True, decay=far.rate)
        part_lse += far.log_weight[..., None]
        if far.rate is not None:
            part_lse -= (far.rate * far.first)[:, None, None]
        if far.right:
            part_o, part_lse = part_o[:, :, ::-1], part_lse[..., ::-1]
        if grad:
            kept = part_o if split.tail.moments and (split.near is not None or len(split.far) > 1) else None
            parts.append(_Part(far, saved.scan, saved.inverse, kept, None))
            own_lse.append(part_lse)
        if o is None:
            o, lse = (part_o.copy() if grad else part_o), part_lse.copy()
        else:
            exact.merge(o, lse, part_o, part_lse)
    o = np.ascontiguousarray(o)
    for part, part_lse in zip(parts, own_lse, strict=True):
        share = exact.share(part_lse, lse)
        if part.own is not None:
            part.share = share
        part.inverse = part.inverse * (share[..., ::-1] if part.far.right else share)
        part.inverse = np.ascontiguousarray(part.inverse, whole.q.dtype)
    saved = Saved(split, scores.centre, o, lse, parts, near_o, near_lse) if grad else None
    shape = problem.q.shape[:3]
    return o.reshape(shape + o.shape[3:]), lse.reshape(shape) if want_lse else None, saved


def _near_bound(near: Problem, scores: Scores, problem: Problem) -> float:
    """Of |scale <q, k>| in the near field, whose scale may be its own."""
    return scores.plain if near.scale == problem.scale else np.inf


def _spread(scores: Scores, values: Values, slots: int) -> tuple[Scores, Values]:
    """With a slot for each query head, where the parts have that."""
    repeats = slots // values.middle.shape[0]
    if repeats == 1:
        return scores, values
    centre = None if scores.centre is None else np.repeat(scores.centre, repeats, axis=0)
    return replace(scores, centre=centre), replace(values, middle=np.repeat(values.middle, repeats, axis=0))


def backward(problem: Problem, saved: Saved, do: np.ndarray):
    """dq, dk, dv of ``<do, O>``; and the gradient of the bias: of its symbol in the near field, and a `FarGradient`.

    Notes
    -----
    Every part's backward pass, with the whole's O and denominators: ``dS = P (do V^T - <do, O>)`` splits over keys.
    """
    split, whole = saved.split, saved.split.whole
    H, G, n, d = whole.q.shape
    do = do.reshape(H, G, n, -1)
    dq, dk, dv = np.zeros_like(whole.q), np.zeros_like(whole.k), np.zeros_like(whole.v)
    dsymbol = None
    if split.near is not None:
        near = exact.resume(split.near, np.inf, saved.o, saved.lse)
        dq, dk, dv, dsymbol = exact.backward(split.near, near, do)
        if saved.near_o is not None:
            # Far keys are centred, which a row's gradient forgets where dS sums to 0: it does over near and far only.
            near_sum = _row_sums(do, saved.near_o, saved.o, exact.share(saved.near_lse, saved.lse))
            dq -= (whole.scale * near_sum[..., None] * saved.centre[:, None, None]).astype(dq.dtype)
    terms = split.tail.rate.shape[1]
    far_gradient = FarGradient(dsymbol, split.tail, np.zeros((2, terms, H * G)), np.zeros((2, H * G)))
    backwards = None
    for part in saved.parts:
        far, o, grad = part.far, saved.o, do
        if far.right:
            backwards = backwards or tuple(np.ascontiguousarray(X[:, :, ::-1]) for X in (o, do))
            o, grad = backwards
        sums = np.zeros(far.problem.k.shape[:2]) if problem.bias is not None else None
        found = part.scan.backward(o, part.inverse, grad, key_sums=sums)
        if far.problem.key_mask is not None:
            found[2][~far.problem.key_mask] = 0
        for total, X in zip((dq, dk, dv), found, strict=True):
            total += X[..., ::-1, :] if far.right else X
        if sums is not None:
            far_gradient.flow[int(far.right), far.term] = sums.sum(axis=1)
            if split.tail.moments:
                far_gradient.moment[int(far.right)] += _moment(part, sums, saved, do)
    if H != problem.q.shape[0]:
        H, G = problem.q.shape[:2]
        dq = dq.reshape(problem.q.shape)
        dk, dv = (X.reshape(H, G, *X.shape[1:]).sum(axis=1) for X in (dk, dv))
    return dq, dk, dv, far_gradient if problem.bias is not None else None


def _moment(part: _Part, sums: np.ndarray, saved: Saved, do: np.ndarray) -> np.ndarray:
    """sum_ij |t_ij| dS_ij of one side, (H,): from sums over queries and sums over keys, the latter <do, own O - O>
    times the side's share of the row.
    """
    far, n = part.far, part.far.problem.q.shape[2]
    j = np.arange(sums.shape[1], dtype=np.float64)
    total = -(sums @ j)
    if part.own is not None:
        rows = _row_sums(do, part.own, saved.o, part.share)
        rows = rows[..., ::-1] if far.right else rows
        i = np.arange(n) + float(far.problem.q_offset + far.first)
        total += rows.sum(axis=1) @ i
    return total


def _row_sums(do: np.ndarray, own: np.ndarray, o: np.ndarray, share: np.ndarray) -> np.ndarray:
    """sum_j dS_ij over the keys of a part, of which `own` is the O and which has that share of the row: (H, G, n)."""
    return np.einsum("hgnc,hgnc->hgn", do, own - o, dtype=np.float64) * share
