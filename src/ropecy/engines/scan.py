"""Attention whose bias factors past some distance: an exact near field, and decayed states for what lies beyond.

Where ``exp(b_t) = sum_k exp(c_k - r_k |t|)`` for t <= -left and t >= right, each term of a side is a causal polynomial
problem of its own, shifted so that a row sees the keys from that distance on, with weights that fall by exp(-r_k) a
token; the right side is the left one of the reversed sequences. The pairs between are the exact engine's. The parts,
each a softmax over its own keys, are merged by their lse. Nothing of this is in the papers.

Of a sequence in pieces, the states go from rank to rank, decayed by each piece's length; rows first go to the rank that
has the last key they see, as many as a side begins further out; and the near field is the ring's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..approximation.bias_forms import FarGradient, Tail
from ..approximation.minimax import Polynomial
from ..bounds import Alone, Scores, Values, polynomial_rounding
from ..costs import Work, exact_work, polynomial_work
from ..problem import Problem
from ..rounding import bias_reach, exact_rounding, score_size, seen_bias
from . import exact
from . import polynomial as polynomial_engine
from .ring import Layout, Ring

# exp of this is far from underflow in float32; a row's nearest key may fade no further.
_FADED = 60.0
# Seconds of an entry of O that is merged with that of another part.
_MERGE = 4e-10


@dataclass(slots=True)
class Far:
    """One term of one side: keys at the distance `first` and beyond, with weights exp(log_weight - rate |t|).

    Attributes
    ----------
    right : bool
    term : int
    first : int
    log_weight : (H, G) float64 array
    rate : (H,) float64 array or None
        None is 0 everywhere.
    """

    right: bool
    term: int
    first: int
    log_weight: np.ndarray
    rate: np.ndarray | None


@dataclass(slots=True)
class Split:
    """How a problem falls into parts.

    Attributes
    ----------
    ungrouped : bool
        Whether every query head has a slot of its own, those of a group having tails of their own.
    near : (int, int) or None
        The band between the sides.
    far : list of Far
    tail : Tail
    peak : (H or 1, G or 1) float64 array or None
        The largest bias that is seen. It is taken from both parts and given back to the lse: a bias of 1e9 that all
        keys have would drown what the parts are merged by.
    """

    ungrouped: bool
    near: tuple[int, int] | None
    far: list[Far]
    tail: Tail
    peak: np.ndarray | None = None

    def __str__(self) -> str:
        exactly = "no near field" if self.near is None else f"an exact near field of {self.near[1] - self.near[0] + 1}"
        decayed = sum(far.rate is not None for far in self.far)
        states = f"{len(self.far)} state{'s' * (len(self.far) > 1)}, {decayed} of them decayed"
        return f"{exactly}, {states}"

    def whole(self, problem: Problem) -> Problem:
        """The problem with these slots, its bias without the peak."""
        whole = problem.ungrouped() if self.ungrouped else problem
        return whole if whole.bias is None else replace(whole, bias=self.below_peak(whole.bias))

    def outline(self, problem: Problem) -> Problem:
        """The same in shapes only, which take no memory, nothing hidden."""
        (H, G, n, d), (_, n_k, d_v) = problem.q.shape, problem.v.shape
        H, G = (H * G, 1) if self.ungrouped else (H, G)
        shapes = {"q": (H, G, n, d), "k": (H, n_k, d), "v": (H, n_k, d_v)}
        zeros = {name: np.broadcast_to(problem.q.dtype.type(0), shape) for name, shape in shapes.items()}
        return replace(problem, **zeros, key_mask=None)

    def near_layout(self, layout: Layout) -> Layout:
        """Of a sequence in pieces, with that band."""
        return replace(layout, lo=self.near[0], hi=self.near[1])

    def near_problem(self, whole: Problem) -> Problem:
        """That of the pairs between the sides."""
        return replace(whole, lo=self.near[0], hi=self.near[1])

    def below_peak(self, bias: np.ndarray) -> np.ndarray:
        """A bias (H or 1, G or 1, m) without its peak."""
        return bias - self.peak[..., None]


@dataclass(slots=True)
class Hidden:
    """The keys that key_mask hides, by slot, (H,): the most between two kept ones, and those at the ends."""

    between: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclass(slots=True)
class Pieces:
    """Of a sequence in pieces: who has the others and where, whether any hides keys, and the bias at given offsets."""

    ranks: Any
    layout: Layout
    masked: bool
    symbol: Callable[[int, int], np.ndarray] | None


class _Side:
    """The causal problem of one side, at this process, and how rows go there and come back."""

    def __init__(self, whole: Problem, far: Far, pieces: Pieces | None) -> None:
        shift = far.first if far.right else -far.first
        part = replace(whole, lo=None, hi=0, bias=None, near=None, q_offset=whole.q_offset + shift)
        self.right, self.ranks, self._cuts = far.right, Alone, None
        if pieces is not None:
            layout, rank = pieces.layout, pieces.ranks.rank
            self.ranks = pieces.ranks.turned() if far.right else pieces.ranks
            self._cuts = layout.rows, layout.rows_at_keys(shift)
            part.q = self._sent(part.q, *self._cuts)
            # Where no rows are, a state is seen from where keys end.
            first = layout.q_offset + shift + self._cuts[1][rank] - layout.k_start[rank]
            part.q_offset = first if part.q.shape[2] else 0
        self.problem = _reversed(part) if far.right else part

    def there(self, X: np.ndarray) -> np.ndarray:
        """Rows, axis 2, as the side's problem has them."""
        X = self._sent(X, *self._cuts) if self._cuts else X
        return np.ascontiguousarray(X[:, :, ::-1]) if self.right else X

    def home(self, X: np.ndarray) -> np.ndarray:
        """Rows of the side's problem, where they came from."""
        X = X[:, :, ::-1] if self.right else X
        return self._sent(X, *self._cuts[::-1]) if self._cuts else X

    def _sent(self, X: np.ndarray, cuts: list[int], wanted: list[int]) -> np.ndarray:
        return X if cuts == wanted else self.ranks.recut(X, cuts, wanted)


@dataclass(slots=True)
class _Part:
    """What backward needs of a far part."""

    far: Far
    side: _Side
    saved: polynomial_engine.Saved
    own: np.ndarray | None  # its O and its share of the row, where the first moment of dS is asked for
    share: np.ndarray | None


@dataclass(slots=True)
class Saved:
    """What backward needs of forward."""

    split: Split
    whole: Problem
    pieces: Pieces | None
    centre: np.ndarray | None
    o: np.ndarray
    lse: np.ndarray
    parts: list[_Part]
    ring: Ring | None
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


def hidden_keys(problem: Problem, ranks: Any = Alone) -> Hidden:
    """Runs of hidden keys, over all ranks. Time O(n_k)."""
    H, n_k = problem.k.shape[:2]
    own = Hidden(np.zeros(H, int), np.zeros(H, int), np.zeros(H, int))
    if problem.key_mask is not None and n_k:
        index = np.where(problem.key_mask, np.arange(n_k), -1)
        last = np.maximum.accumulate(index, axis=1)
        before = np.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        own.between = np.where((index >= 0) & (before >= 0), index - before - 1, 0).max(axis=1)
        own.start = np.where(last[:, -1] >= 0, problem.key_mask.argmax(axis=1), n_k)
        own.end = n_k - 1 - last[:, -1]
    found, seen = Hidden(np.zeros(H, int), np.zeros(H, int), np.zeros(H, int)), np.zeros(H, bool)
    for length, piece in ranks.gather((n_k, own)):
        kept = piece.start < length
        across = np.where(seen & kept, found.end + piece.start, 0)
        found.between = np.maximum(found.between, np.maximum(piece.between, across))
        found.start = found.start + np.where(seen, 0, piece.start)
        found.end = np.where(kept, piece.end, found.end + length)
        seen = seen | kept
    return found


def split(problem: Problem, tolerance: float, hidden: Hidden | None = None) -> tuple[Split | None, str | None]:
    """The parts, sums of exponentials being right within `tolerance`, relatively; or None, and why there are none.

    `hidden` is by default that of the problem.
    """
    H, G, n, _ = problem.q.shape
    n_k = problem.k.shape[1]
    longest = max(n_k - 1 - problem.q_offset, n - 1 + problem.q_offset, 1)
    plain = Tail(0, 1, np.zeros((2, 1, 1)), np.zeros((2, 1, 1)))
    tail = plain if problem.bias is None else problem.tail(longest, tolerance)
    if tail is None:
        return None, f"a bias whose far field no sum of exponentials fits within {tolerance:.2g}"
    found = Split(tail.rate.shape[-1] > 1 and G > 1, None, [], tail)
    outline = found.outline(problem)
    repeats = G if found.ungrouped else 1
    H, G = outline.q.shape[:2]
    left, right = tail.left, tail.right
    if problem.near is not None:
        left, right = max(left, problem.near[0]), max(right, problem.near[0])
    rates = np.broadcast_to(tail.rate, (2, tail.rate.shape[1], H * G)).reshape(2, -1, H, G)[..., 0]
    weights = np.broadcast_to(tail.log_weight, rates.shape[:2] + (H * G,)).reshape(2, -1, H, G)
    if problem.bias is not None:
        found.peak = seen_bias(problem).max(axis=-1)
        if found.ungrouped:
            found.peak = found.peak.reshape(-1, 1)
        weights = weights - found.peak
    for side, first in enumerate((left, right)):
        if side == 1 and problem.hi is not None:
            continue
        part = _far_outline(outline, first, side == 1)
        if part.empty:
            continue
        for term in range(rates.shape[1]):
            rate = rates[side, term]
            if not np.isfinite(weights[side, term]).any():
                continue
            if rate.any():
                hidden = hidden or hidden_keys(problem)
                if np.any(rate * np.repeat(_longest_gap(part, hidden, side == 1), repeats) > _FADED):
                    return None, "keys that are hidden for so long that a decayed state fades away"
            found.far.append(Far(side == 1, term, first, weights[side, term], rate.copy() if rate.any() else None))
    if not found.far:
        return None, "a near field without a far one"
    found.near = (1 - left, right - 1 if problem.hi is None else 0)
    if found.near[0] > found.near[1] or found.near_problem(outline).empty:
        found.near = None
    return found, None


def _far_outline(outline: Problem, first: int, right: bool) -> Problem:
    """Row i sees the keys j <= i + q_offset - first; of the reversed sequences where `right`."""
    n, n_k = outline.q.shape[2], outline.k.shape[1]
    offset = n_k - n - outline.q_offset if right else outline.q_offset
    return replace(outline, lo=None, hi=0, q_offset=offset - first, bias=None, near=None)


def _reversed(problem: Problem) -> Problem:
    """Both sequences from their ends: t becomes -t."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    mask = problem.key_mask
    return replace(
        problem,
        q=np.ascontiguousarray(problem.q[:, :, ::-1]),
        k=np.ascontiguousarray(problem.k[:, ::-1]),
        v=np.ascontiguousarray(problem.v[:, ::-1]),
        key_mask=None if mask is None else np.ascontiguousarray(mask[:, ::-1]),
        q_offset=n_k - n - problem.q_offset,
    )


def _longest_gap(part: Problem, hidden: Hidden, right: bool) -> np.ndarray:
    """No less than the tokens between a row of a causal problem and the last key it sees, by slots of `hidden`."""
    n, n_k = part.q.shape[2], part.k.shape[1]
    start, end = (hidden.end, hidden.start) if right else (hidden.start, hidden.end)
    gap = np.maximum(hidden.between, np.maximum(0, end + n - 1 + part.q_offset - (n_k - 1)))
    return np.where(start < n_k, gap, 0)


def rounding(split: Split, problem: Problem, scores: Scores, values: Values) -> float:
    """Of the far parts, of the near one, and of merging them: by differences of lse, float64 numbers that are as large
    as a row's best key is below the peak, each rounded to a side of its own.
    """
    unit = float(np.finfo(problem.q.dtype).eps) / 2
    total = polynomial_rounding(problem, scores.bound, values, scores.lost)
    total += 2 * unit * len(split.far) * (1 + values.offset)
    merges = len(split.far) + (split.near is not None) - 1
    if problem.bias is not None and merges:
        reach = bias_reach(problem, score_size(problem, scores))
        total += min(1.0, 2 * 2.0**-53 * math.sqrt(merges) * reach)
    if split.near is None:
        return total
    return total + exact_rounding(split.near_problem(problem), scores, values)


def work(split: Split, problem: Problem, degree: int, grad: bool) -> Work:
    """Of forward, and of backward where grad."""
    outline = split.outline(problem)
    H, G, n, _ = outline.q.shape
    total = Work(H * G * n * (outline.v.shape[2] + 4) * _MERGE * len(split.far))
    for far in split.far:
        total += polynomial_work(_far_outline(outline, far.first, far.right), degree, grad)
    return total if split.near is None else total + exact_work(split.near_problem(outline), grad)


def memory(split: Split, problem: Problem, degree: int, grad: bool) -> float:
    """Bytes beyond inputs and outputs."""
    outline = split.outline(problem)
    H, G, n, d = outline.q.shape
    n_k, d_v = outline.v.shape[1:]
    item = outline.q.itemsize
    rows, keys = H * G * n, H * n_k
    size = rows * (16 + d_v * item)
    if split.near is not None:
        size += (keys * d + rows * (2 * item + (2 * (d + d_v) if grad else 0))) * item
    if any(far.right for far in split.far):
        size += (rows * (d + d_v) + keys * (d + d_v)) * item
    each = rows * (8 + item) + (keys * (d + d_v) + rows * d) * item * grad
    state = polynomial_engine.memory(replace(outline, hi=0), degree, grad)
    return size + state + len(split.far) * each


def forward(
    problem: Problem,
    split: Split,
    scores: Scores,
    values: Values,
    p: Polynomial,
    grad: bool,
    want_lse: bool,
    pieces: Pieces | None = None,
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
    pieces : Pieces, optional
        Where the problem is a piece of a sequence: of the others. `split`, scores and values are of the whole.

    Notes
    -----
    Time: that of a causal polynomial problem for each term of a side, and of the exact band.
    """
    whole = split.whole(problem)
    o, lse, ring = None, None, None
    if split.near is not None:
        near = split.near_problem(whole)
        if pieces is None:
            near = _of_one_scale(near)
            o, lse, _ = exact.forward(near, scores.plain if near.scale == whole.scale else np.inf, True)
        else:
            ring = _near_ring(near, split, pieces, scores)
            o, lse = ring.forward()
    scores, values = _spread(scores, values, whole.k.shape[0])
    parts, own_lse, sides = [], [], {}
    near_o, near_lse = (o.copy(), lse.copy()) if grad and o is not None and scores.centre is not None else (None, None)
    for far in split.far:
        if far.right not in sides:
            sides[far.right] = _Side(whole, far, pieces)
        side = sides[far.right]
        part_o, part_lse, saved = polynomial_engine.forward(
            side.problem, scores, values, p, grad, True, ranks=side.ranks, decay=far.rate
        )
        part_lse += far.log_weight[..., None]
        if far.rate is not None:
            part_lse -= (far.rate * far.first)[:, None, None]
        part_o, part_lse = side.home(part_o), side.home(part_lse)
        if grad:
            kept = part_o if split.tail.moments and (split.near is not None or len(split.far) > 1) else None
            parts.append(_Part(far, side, saved, kept, None))
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
        part.saved.inverse = np.ascontiguousarray(part.saved.inverse * part.side.there(share), whole.q.dtype)
    if ring is not None and grad:
        ring.resume(o, lse)
    saved = Saved(split, whole, pieces, scores.centre, o, lse, parts, ring, near_o, near_lse) if grad else None
    shape = problem.q.shape[:3]
    if want_lse:
        lse = (lse if split.peak is None else lse + split.peak[..., None]).reshape(shape)
    return o.reshape(shape + o.shape[3:]), lse if want_lse else None, saved


def _of_one_scale(near: Problem) -> Problem:
    """A band that lies in the problem's near field, with its scale."""
    if near.near is None or max(-near.lo, near.hi) >= near.near[0]:
        return near
    return replace(near, scale=near.near[1], near=None)


def _near_ring(near: Problem, split: Split, pieces: Pieces, scores: Scores) -> Ring:
    """The near field of a sequence in pieces."""

    def symbol(first: int, last: int) -> np.ndarray:
        bias = pieces.symbol(first, last)
        return split.below_peak(bias.reshape(-1, 1, bias.shape[-1]) if split.ungrouped else bias)

    layout, shown = split.near_layout(pieces.layout), symbol if pieces.symbol else None
    return Ring(near, layout, pieces.ranks, scores.plain, pieces.masked, shown)


def _spread(scores: Scores, values: Values, slots: int) -> tuple[Scores, Values]:
    """With a slot for each query head, where the parts have that."""
    repeats = slots // values.middle.shape[0]
    if repeats == 1:
        return scores, values
    q_factor, k_factor = (np.repeat(X, repeats) for X in (scores.q_factor, scores.k_factor))
    middle = np.repeat(values.middle, repeats, axis=0)
    centre = None if scores.centre is None else np.repeat(scores.centre, repeats, axis=0)
    return replace(scores, centre=centre, q_factor=q_factor, k_factor=k_factor), replace(values, middle=middle)


def backward(problem: Problem, saved: Saved, do: np.ndarray, shared: Any = None):
    """dq, dk, dv of ``<do, O>``; and the gradient of the bias: of its symbol in the near field, and a `FarGradient`.

    Of a sequence in pieces `shared` is given the near field's part of it, as `Ring.backward` says.

    Notes
    -----
    Every part's backward pass, with the whole's O and denominators: ``dS = P (do V^T - <do, O>)`` splits over keys.
    """
    split, whole = saved.split, saved.whole
    H, G, n, d = whole.q.shape
    do = do.reshape(H, G, n, do.shape[-1])
    dq, dk, dv = np.zeros_like(whole.q), np.zeros_like(whole.k), np.zeros_like(whole.v)
    dsymbol = None
    if split.near is not None:
        if saved.ring is not None:
            dq, dk, dv = saved.ring.backward(do, shared)
        else:
            near = _of_one_scale(split.near_problem(whole))
            dq, dk, dv, dsymbol = exact.backward(near, exact.resume(near, np.inf, saved.o, saved.lse), do)
        if saved.near_o is not None:
            # Far keys are centred, which a row's gradient forgets where dS sums to 0: it does over near and far only.
            near_sum = _row_sums(do, saved.near_o, saved.o, exact.share(saved.near_lse, saved.lse))
            dq -= (whole.scale * near_sum[..., None] * saved.centre[:, None, None]).astype(dq.dtype)
    terms = split.tail.rate.shape[1]
    far_gradient = FarGradient(dsymbol, split.tail, np.zeros((2, terms, H)), np.zeros((2, H)))
    rows = {}
    for part in saved.parts:
        far, side = part.far, part.side
        if far.right not in rows:
            rows[far.right] = side, side.there(saved.o), side.there(do), np.zeros_like(side.problem.q)
        _, o, grad, total = rows[far.right]
        sums = None if problem.tail is None else np.zeros(side.problem.k.shape[:2])
        of_whole = replace(part.saved, o=o)
        dq_part, *found, _ = polynomial_engine.backward(side.problem, of_whole, grad, side.ranks, sums)
        total += dq_part
        for X, part_X in zip((dk, dv), found, strict=True):
            X += part_X[:, ::-1] if far.right else part_X
        if sums is not None:
            far_gradient.flow[int(far.right), far.term] = sums.sum(axis=1)
            if split.tail.moments:
                sums = sums[:, ::-1] if far.right else sums
                far_gradient.moment[int(far.right)] += _moment(part, sums, saved, do)
    for side, _, _, total in rows.values():
        dq += side.home(total)
    if H != problem.q.shape[0]:
        H, G = problem.q.shape[:2]
        dq = dq.reshape(problem.q.shape)
        dk, dv = (X.reshape(H, G, *X.shape[1:]).sum(axis=1) for X in (dk, dv))
    return dq, dk, dv, None if problem.tail is None else far_gradient


def _moment(part: _Part, sums: np.ndarray, saved: Saved, do: np.ndarray) -> np.ndarray:
    """sum_ij |t_ij| dS_ij of one side, (H,): from sums over queries and sums over keys, the latter <do, own O - O>
    times the side's share of the row.
    """
    first = 0.0 if saved.pieces is None else float(saved.pieces.layout.k_start[saved.pieces.ranks.rank])
    total = -(sums @ (np.arange(sums.shape[1]) + first))
    if part.own is not None:
        rows = _row_sums(do, part.own, saved.o, part.share).sum(axis=1)
        total += rows @ (np.arange(rows.shape[1]) + float(saved.whole.q_offset) + first)
    return -total if part.far.right else total


def _row_sums(do: np.ndarray, own: np.ndarray, o: np.ndarray, share: np.ndarray) -> np.ndarray:
    """sum_j dS_ij over the keys of a part, of which `own` is the O and which has that share of the row: (H, G, n)."""
    return np.einsum("hgnc,hgnc->hgn", do, own - o, dtype=np.float64) * share
