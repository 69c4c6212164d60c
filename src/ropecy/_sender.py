"""What a rank sends and receives in a call that is so planned: `Ranks` and `Ring`, by formula."""

from __future__ import annotations

from . import _network
from ._network import Traffic
from .engines import polynomial as polynomial_engine
from .engines.ring import Layout
from .problem import Call, Problem
from .sample import steps
from .schedule import Plan


class Sender:
    """One rank of a call.

    Parameters
    ----------
    call, problem
        This rank's.
    layout : Layout
    rank : int
    masked : bool
        Whether any rank hides keys.
    grad : bool
    """

    def __init__(self, call: Call, problem: Problem, layout: Layout, rank: int, masked: bool, grad: bool) -> None:
        self._call, self._problem, self._layout, self._rank = call, problem, layout, rank
        self._masked, self._grad, self._size = masked, grad, len(layout.n)
        (self._H, self._G, _, self._d), self._d_v = problem.q.shape, problem.v.shape[2]
        self._item = problem.q.itemsize
        # Where causal rows are cut, and where when they are with their keys.
        moves = problem.hi is not None and not layout.aligned
        self._at_keys = (layout.rows, layout.rows_at_keys()) if moves else None

    def traffic(self, made: Plan, looked: bool) -> Traffic:
        """Of a call so planned, no row failing by moments; `looked`: rows and keys were sampled for the plan."""
        call, size, a, found = self._call, self._size, self._call._arguments, Traffic()
        if made._values is not None:
            # The sizes of queries and of keys.
            found += _network.maxima(16 * self._H, size) if self._grad else Traffic()
            near = self._problem.near is not None
            found += _network.bounds((self._H, self._d, self._d_v), self._item, size, near)
            found += self._sample() if looked else Traffic()
            if made._split is not None:
                found += self._split(made)
            elif made.engine == "exact":
                shape = self._H, self._G, self._d, self._d_v
                found += _network.ring(self._layout, self._rank, shape, self._item, self._masked, self._grad)
            else:
                found += self._state(made) + (self._judged(made) if made.judged else Traffic())
        if self._grad:
            found += _network.maxima(8, size)
            found += Traffic() if self._problem.near is None else _network.totals(1, size)
            for X in (a.W, a.W_Q, a.W_K, a.W_V, None if a.bias is None else call.bias_gradient(None, 0)):
                found += Traffic() if X is None else _network.totals(X.size, size)
        return found

    def _state(self, made: Plan) -> Traffic:
        """One state each way, and rows that go to their keys."""
        problem, grad, found = self._problem, self._grad, Traffic()
        degree = made._trials[0].degree if made._trials else made._choice.degree
        degree = max(degree, made._choice.grad_degree) if grad else degree
        summed = _network.totals if problem.hi is None else _network.sums
        for _ in range(1 + grad):
            found += summed(polynomial_engine.state_size(problem, degree), self._size)
        if self._at_keys:
            d, d_v, there = self._d * self._item, self._d_v * self._item, self._at_keys
            for width, cuts in ((d, there), (d_v, there[::-1]), (d_v, there), (d, there[::-1]))[: 2 + 2 * grad]:
                found += self._moved(cuts, width)
            for _ in range(1 + grad if made._trials is None and made.judged else 0):
                found += self._moved(there[::-1], 8)
        return found

    def _moved(self, cuts: tuple[list[int], list[int]], width: int, heads: int | None = None) -> Traffic:
        return _network.recut(*cuts, self._rank, (heads or self._H * self._G) * width)

    def _judged(self, made: Plan) -> Traffic:
        """The range of values on lower ranks; or a sample of rows, and the same rows exactly, at the first degree."""
        ranges = _network.maxima(self._H * self._d_v * self._item, self._size)
        if made._trials is None:
            return Traffic() if self._problem.hi is None else ranges + ranges
        rows = made.certificate.n_sampled
        found = ranges + ranges + _network.maxima(8 * rows, self._size)
        for width in (self._d + 1, self._d_v + 1):
            found += _network.totals(rows * width, self._size)
        return found

    def _sample(self) -> Traffic:
        """Of some keys and rows, and of how many keys are kept."""
        layout, found = self._layout, _network.totals(self._H, self._size)
        row_step, key_step = steps(self._problem, sum(layout.n), sum(layout.n_k))
        # A row comes with three numbers in float64.
        rows, vector = self._H * self._G, self._d * self._item
        keys = (layout.n_k, key_step, self._H * vector)
        for lengths, step, width in (keys, (layout.n, row_step, rows * 24), (layout.n, row_step, rows * vector)):
            found += _network.joined([-(-length // step) * width for length in lengths], self._rank)
        return found

    def _split(self, made: Plan) -> Traffic:
        """A near field, and states, one for each term of a side."""
        split, layout, grad, found, sides = made._split, self._layout, self._grad, Traffic(), set()
        outline = split.outline(self._problem)
        (H, G, _, _), d, d_v = outline.q.shape, self._d * self._item, self._d_v * self._item
        if split.near is not None:
            near = split.near_layout(layout)
            found += _network.ring(near, self._rank, (H, G, self._d, self._d_v), self._item, self._masked, grad)
        state = polynomial_engine.state_size(outline, made._choice.degree + grad)
        for far in split.far:
            there = layout.rows, layout.rows_at_keys(far.first if far.right else -far.first)
            back = there[::-1]
            moved = [(d_v, back), (8, back)] + ([(8, there)] if grad else [])
            if far.right not in sides:
                sides.add(far.right)
                moved += [(d, there)] + ([(d_v, there), (d_v, there), (d, back)] if grad else [])
            for width, cuts in moved:
                found += self._moved(cuts, width, H * G)
            for _ in range(1 + grad):
                found += _network.sums(state, self._size)
        return found
