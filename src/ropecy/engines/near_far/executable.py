"""Attention as an exact near field and decayed states: each part is computed by its own engine, then all are merged.

If the sequence is in pieces, each state goes from rank to rank and decays by the length of each piece. Rows first go to
the rank that holds the last key of the side that they see. The near field is computed round the ring of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...approximation.bias_forms import FarGradient
from ...approximation.minimax import Polynomial, tau
from ...certificate import Certificate
from ...certify.scores import Scores
from ...certify.values import Values
from ...problem.input_gradients import InputGradients, SymbolGradient
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Problem
from ...problem.traffic import Sender, Traffic, ring, sums
from ..base import Executable, Result, row_by_row
from ..exact import attention
from ..exact.ring import Ring
from ..merge import merge, row_sums, share
from ..polynomial import features
from ..polynomial.features import Expansion
from .split import Far, Split


class _Side:
    """The causal problem of one side, as this process computes it, and the way of rows there and back."""

    def __init__(self, whole: Problem, far: Far, pieces: Pieces) -> None:
        shift = far.first if far.right else -far.first
        q, mask, layout = whole.q, whole.mask, pieces.layout
        offset = mask.offset + shift
        self.right, self._comm, self._cuts = far.right, pieces.comm, None
        self.comm = pieces.comm.turned() if far.right else pieces.comm
        if layout is not None:
            rank = pieces.comm.rank
            self._cuts = layout.rows, layout.rows_at_keys(shift)
            q = self._sent(q, *self._cuts)
            # Without rows here the offset is 0, so that the state of this rank decays to the end of its keys.
            first = layout.offset + shift + self._cuts[1][rank] - layout.k_start[rank]
            offset = first if q.shape[2] else 0
        mask = replace(mask, n=q.shape[2], lo=None, hi=0, offset=offset)
        part = replace(whole, q=q, mask=mask, bias=None, near=None)
        self.problem = _from_their_ends(part) if far.right else part

    def there(self, X: np.ndarray) -> np.ndarray:
        """Rows of this process (axis 2), sent and reversed as the problem of this side has them."""
        X = self._sent(X, *self._cuts) if self._cuts else X
        return np.ascontiguousarray(X[:, :, ::-1]) if self.right else X

    def home(self, X: np.ndarray) -> np.ndarray:
        """Rows of the side's problem, sent back to where they came from."""
        X = X[:, :, ::-1] if self.right else X
        return self._sent(X, *self._cuts[::-1]) if self._cuts else X

    def _sent(self, X: np.ndarray, cuts: list[int], wanted: list[int]) -> np.ndarray:
        return X if cuts == wanted else self._comm.recut(X, cuts, wanted)


def _from_their_ends(part: Problem) -> Problem:
    """The causal problem of both sequences reversed, in which the keys after a row come before it."""
    turned = part.reversed()
    return replace(turned, mask=replace(turned.mask, lo=None, hi=0))


@dataclass(slots=True)
class _Part:
    """A far part: its side, what its forward pass saved, its O and lse, and its share of each row's weight."""

    far: Far
    side: _Side
    saved: features.Saved
    o: np.ndarray | None
    lse: np.ndarray | None
    share: np.ndarray | None = None


@dataclass(slots=True)
class Saved:
    """What backward needs of forward.

    Attributes
    ----------
    whole : Problem
        The problem with the slots of the split (`Split.whole`).
    o, lse : arrays
        The merged results of that problem.
    parts : list of _Part
    ring : Ring or None
        The near field, if the sequence is in pieces.
    near_o, near_lse : arrays or None
        The results of the near field alone; they are kept only if keys are centred.
    """

    whole: Problem
    o: np.ndarray
    lse: np.ndarray
    parts: list[_Part]
    ring: Ring | None
    near_o: np.ndarray | None
    near_lse: np.ndarray | None


@dataclass(slots=True)
class NearFar(Executable):
    """An exact near field, and a state for each term of each side.

    Attributes
    ----------
    split : Split
    scores, values : Scores, Values
        The measurements of the whole problem.
    polynomials : tuple of Polynomial
        The polynomial of each slot, which stands for exp in all far parts.
    """

    certificate: Certificate
    gradient_certificate: Certificate | None
    split: Split
    scores: Scores
    values: Values
    polynomials: tuple[Polynomial, ...]

    engine = "polynomial"

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        split, grad = self.split, self.grad
        want_lse = want_lse or (grad and problem.near is not None)
        whole = split.whole(problem)
        o, lse, ring = self._near(whole, pieces)
        own = grad and o is not None and self.scores.centre is not None
        near_o, near_lse = (o.copy(), lse.copy()) if own else (None, None)
        parts = []
        for part in self._far(whole, pieces):
            if grad:
                parts.append(part)
            if o is None:
                o, lse = (part.o.copy() if grad else part.o), part.lse.copy()
            else:
                merge(o, lse, part.o, part.lse)
        o = np.ascontiguousarray(o)
        for part in parts:
            part.share = share(part.lse, lse)
            part.saved.inverse = np.ascontiguousarray(part.saved.inverse * part.side.there(part.share), whole.dtype)
            part.lse = None
            if not split.tail.moments:
                part.o = None  # only the gradient of a rate asks for it
        if ring is not None and grad:
            ring.resume(o, lse)
        saved = Saved(whole, o, lse, parts, ring, near_o, near_lse) if grad else None
        shape = problem.q.shape[:3]
        if want_lse:
            lse = (lse if split.peak is None else lse + split.peak[..., None]).reshape(shape)
        # Relative errors of a polynomial and of the sums of exponentials multiply.
        errors = [(1 + p.error) * (1 + split.tail.error) - 1 for p in self.polynomials]
        found = row_by_row(self.certificate, [tau(e) for e in errors], shape)
        gradient = self.gradient_certificate and row_by_row(self.gradient_certificate, errors, shape)
        return Result(o.reshape(shape + o.shape[3:]), lse if want_lse else None, self, saved, found, gradient)

    def _near(self, whole: Problem, pieces: Pieces) -> tuple[np.ndarray | None, np.ndarray | None, Ring | None]:
        """O and lse of the near field, None if it has no pairs; and the ring, if the sequence is in pieces."""
        split = self.split
        if split.near is None:
            return None, None, None
        near = split.near_part(whole)
        if pieces.distributed:
            ring = _near_ring(near, split, pieces, self.scores)
            return *ring.forward(), ring
        near = attention.of_one_scale(near)
        bound = np.repeat(self.scores.plain_of_slots, whole.sizes.H // len(self.scores.of_slots))
        bound = bound if near.scale == whole.scale else np.inf
        o, lse, _ = attention.forward(near, bound, True)
        return o, lse, None

    def _far(self, whole: Problem, pieces: Pieces) -> Iterator[_Part]:
        """The far parts, each computed when it is asked for."""
        expansion, sides = self._expansion(whole), {}
        for far in self.split.far:
            if far.right not in sides:
                sides[far.right] = _Side(whole, far, pieces)
            side = sides[far.right]
            o, lse, saved = features.forward(side.problem, expansion, True, side.comm, decay=far.rate)
            lse += far.log_weight[..., None]
            if far.rate is not None:
                lse -= (far.rate * far.first)[:, None, None]
            yield _Part(far, side, saved, side.home(o), side.home(lse))

    def _expansion(self, whole: Problem) -> Expansion:
        """The expansion of the far parts, with a slot for each query head if the parts have that."""
        scores, values, found = self.scores, self.values, self.polynomials
        repeats = whole.sizes.H // values.middle.shape[0]
        if repeats > 1:
            q_factor, k_factor, of_slots = (
                np.repeat(X, repeats) for X in (scores.q_factor, scores.k_factor, scores.of_slots)
            )
            centre = None if scores.centre is None else np.repeat(scores.centre, repeats, axis=0)
            scores = replace(scores, centre=centre, q_factor=q_factor, k_factor=k_factor, of_slots=of_slots)
            values = replace(values, middle=np.repeat(values.middle, repeats, axis=0))
            found = tuple(p for p in found for _ in range(repeats))
        return Expansion.of_slots(scores, values, found, found if self.grad else None)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        """The sum of the gradients of all parts, each with the O and the denominators of the whole.

        This is right because each entry of ``dS = P (do V^T - <do, O>)`` belongs to one key. The gradient of the bias
        is that of its symbol for the near field, and a `FarGradient` for the far parts.
        """
        saved, split = result.saved, self.split
        whole = saved.whole
        H, G, n, _, d, _ = whole.sizes
        near = None
        if problem.near is not None and not pieces.distributed:
            near = attention.near_scale_gradient(problem, result.o, result.lse, do)
        do = do.reshape(H, G, n, do.shape[-1])
        found = self._near_backward(saved, do)
        if not pieces.distributed:
            found.scale_near = near
        dsymbol = found.symbol[0].values if found.symbol and not pieces.distributed else None
        far = FarGradient(dsymbol, split.tail, np.zeros((2, split.tail.rate.shape[1], H)), np.zeros((2, H)))
        self._far_backward(saved, do, found, far, None if pieces.layout is None else pieces)
        if H != problem.sizes.H:
            H, G = problem.sizes[:2]
            found.dq = found.dq.reshape(problem.q.shape)
            found.dk, found.dv = (X.reshape(H, G, *X.shape[1:]).sum(axis=1) for X in (found.dk, found.dv))
            if found.scale_near is not None:
                found.scale_near = found.scale_near.reshape(H, G)
        if problem.tail is not None:
            of_far = SymbolGradient(far, problem.mask.least)
            found.symbol = (*found.symbol, of_far) if pieces.distributed else (of_far,)
        return found

    def _near_backward(self, saved: Saved, do: np.ndarray) -> InputGradients:
        whole, split = saved.whole, self.split
        found = InputGradients(*(np.zeros_like(X) for X in (whole.q, whole.k, whole.v)))
        if split.near is None:
            return found
        if saved.ring is not None:
            found = saved.ring.backward(do)
        else:
            near = attention.of_one_scale(split.near_part(whole))
            found = attention.backward(near, attention.resume(near, np.inf, saved.o, saved.lse), do)
        if saved.near_o is not None:
            # Far parts use centred keys. That does not change dq if the dS of a row sum to 0 over its far keys, but
            # they do so only over near and far keys together. What is missing is the centre times the sum over near
            # keys.
            near_sum = row_sums(do, saved.near_o, saved.o, share(saved.near_lse, saved.lse))
            centre = self._expansion(whole).scores.centre
            found.dq -= (whole.scale * near_sum[..., None] * centre[:, None, None]).astype(found.dq.dtype)
        return found

    def _far_backward(
        self, saved: Saved, do: np.ndarray, into: InputGradients, far_gradient: FarGradient, pieces: Pieces | None
    ) -> None:
        """Adds the gradients of the far parts to dq, dk and dv of `into`, and to the gradient of the bias's tail."""
        biased, rows = saved.whole.tail is not None, {}
        for part in saved.parts:
            far, side = part.far, part.side
            if far.right not in rows:
                rows[far.right] = side, side.there(saved.o), side.there(do), np.zeros_like(side.problem.q)
            _, o, grad, total = rows[far.right]
            key_sums = np.zeros(side.problem.k.shape[:2]) if biased else None
            found = features.backward(side.problem, replace(part.saved, o=o), grad, side.comm, key_sums)
            total += found.dq
            into.dk += found.dk[:, ::-1] if far.right else found.dk
            into.dv += found.dv[:, ::-1] if far.right else found.dv
            if biased:
                far_gradient.flow[int(far.right), far.term] = key_sums.sum(axis=1)
                if self.split.tail.moments:
                    key_sums = key_sums[:, ::-1] if far.right else key_sums
                    near = self.split.near is not None
                    far_gradient.moment[int(far.right)] += _moment(part, key_sums, saved, do, near, pieces)
        for side, _, _, total in rows.values():
            into.dq += side.home(total)

    def traffic(self, sender: Sender) -> Traffic:
        """The traffic of the near field's ring, of the rows of each side, and of the state of each term."""
        split, layout, grad, found, sides = self.split, sender.layout, sender.grad, Traffic(), set()
        outline = split.outline(sender.outline)
        H, G, _, _, d, d_v = outline.sizes
        d, d_v = d * outline.dtype.itemsize, d_v * outline.dtype.itemsize
        if split.near is not None:
            found += ring(replace(sender, outline=outline), split.near_layout(layout))
        state = features.state_size(outline, self.certificate.degree + grad)
        for far in split.far:
            there = layout.rows, layout.rows_at_keys(far.first if far.right else -far.first)
            back = there[::-1]
            moved = [(d_v, back), (8, back)] + ([(8, there)] if grad else [])
            if far.right not in sides:
                sides.add(far.right)
                moved += [(d, there)] + ([(d_v, there), (d_v, there), (d, back)] if grad else [])
            for width, cuts in moved:
                found += sender.moved(cuts, width, H * G)
            for _ in range(1 + grad):
                found += sums(state, sender.size)
        return found


def _near_ring(near: Problem, split: Split, pieces: Pieces, scores: Scores) -> Ring:
    """The ring that computes the near field of a sequence in pieces."""

    def symbol(first: int, last: int) -> np.ndarray:
        bias = pieces.symbol(first, last)
        return split.below_peak(bias.reshape(-1, 1, bias.shape[-1]) if split.ungrouped else bias)

    layout, shown = split.near_layout(pieces.layout), symbol if pieces.symbol else None
    return Ring(near, replace(pieces, layout=layout, symbol=shown), scores.plain)


def _moment(
    part: _Part, key_sums: np.ndarray, saved: Saved, do: np.ndarray, near: bool, pieces: Pieces | None
) -> np.ndarray:
    """sum_ij |t_ij| dS_ij over the pairs of one side, (H,).

    It is made of the sums of dS over queries, `key_sums`, and over keys (`_row_sums`). If the sequence is in pieces,
    keys are counted from the first of the whole sequence.
    """
    first = 0.0 if pieces is None else float(pieces.layout.k_start[pieces.comm.rank])
    total = -(key_sums @ (np.arange(key_sums.shape[1]) + first))
    if len(saved.parts) > 1 or near:
        rows = row_sums(do, part.o, saved.o, part.share).sum(axis=1)
        total += rows @ (np.arange(rows.shape[1]) + float(saved.whole.mask.offset) + first)
    return -total if part.far.right else total
