"""Estimates of the moments of the scores from some rows and keys. They choose a degree and certify nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..approximation import minimax as poly
from ..kernels import _quartic, _rows
from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline, Problem, Slots
from .fourth_moments import Fourth
from .moments import TILE, RowFits, far_keys, gradient_error
from .once import once
from .scores import Scores
from .values import Values

SAMPLED_KEYS = 4096
SAMPLED_ROWS = 2048
_FEW = 0.03  # the part of the rows, or else of the exact work, that may be expected to be left to the exact engine
_CUT = 0.5  # the largest part of the sampled rows that may be left out because their bounds are large


def steps(problem: Outline, n: int, n_k: int) -> tuple[int, int]:
    """The distances (of rows, of keys) at which a `Sample` takes one, for n rows in each head and n_k keys."""
    H, G = problem.origin.alike or problem.sizes.H, problem.sizes.G
    return max(1, n // max(16, SAMPLED_ROWS // (H * G))), max(1, n_k // SAMPLED_KEYS)


def draw(risk: np.ndarray, count: int, draws: Sequence[np.random.Generator], comm: Communicator = SERIAL) -> np.ndarray:
    """`count` rows of each slot, as a bool array like `risk` (H, G, n): half are those of largest `risk` in the slot,
    half are drawn from all others of the slot by its own generator.

    If the sequence is in pieces, `count` rows are drawn from all pieces together, and each process gets its own.
    """
    shape, risk = risk.shape, risk.reshape(len(risk), -1)
    size = risk.shape[1]
    sizes = np.array(comm.gather(size))
    if count >= sizes.sum():
        return np.ones(shape, bool)
    half = count // 2
    most = min(half, size)
    top = np.argpartition(risk, size - most, axis=1)[:, size - most :] if most else np.empty((len(risk), 0), int)
    top = np.take_along_axis(top, np.argsort(-np.take_along_axis(risk, top, 1), axis=1, kind="stable"), 1)
    everyone = comm.gather(np.take_along_axis(risk, top, 1))
    owner = np.repeat(np.arange(len(everyone)), [X.shape[1] for X in everyone])
    best = owner[np.argsort(-np.concatenate(everyone, axis=1), axis=1, kind="stable")[:, :half]]
    taken = np.array([np.count_nonzero(best == rank, axis=1) for rank in range(len(everyone))])
    before = (sizes[:, None] - taken)[: comm.rank].sum(axis=0)
    chosen = np.zeros((len(risk), size), bool)
    for slot, rng in enumerate(draws):
        own = chosen[slot]
        own[top[slot, : taken[comm.rank, slot]]] = True
        drawn = rng.choice(sizes.sum() - half, count - half, replace=False) - before[slot]
        rest = np.flatnonzero(~own)
        own[rest[drawn[(drawn >= 0) & (drawn < len(rest))]]] = True
    return chosen.reshape(shape)


class Kept(NamedTuple):
    """What to expect of each slot, (H,) arrays, if some rows are left to the exact engine.

    Attributes
    ----------
    few : bool array
        Whether these rows are few enough.
    share : array
        The part of the exact work of the slot that they take.
    n_exact_rows : int array
        How many of them are allowed for.
    truncation, of_gradient : arrays
        The largest truncation of the rows that are kept, of O and of gradients.
    """

    few: np.ndarray
    share: np.ndarray
    n_exact_rows: np.ndarray
    truncation: np.ndarray
    of_gradient: np.ndarray


class Sample:
    """Some rows and some keys of a problem, and estimates made from them.

    The rows are taken at equal distances; rows that are longer than all of these are sampled separately, if the whole
    sequence is in one process. What is estimated of a slot depends on no other slot.

    Attributes
    ----------
    index : (R,) int array
        Flat indices of the sampled rows into (H, G, n), increasing.
    weight : (R,) array
        How many rows each sampled row stands for.
    sizes : (R,) array
        B_i, the bound of the scores of each sampled row.
    second, first : (R,) arrays
        The mean square and the mean of the scores of each row, over the sampled keys.
    n_rows : int
        How many rows there are in each slot.
    every : (H, G, n) array or None
        The bounds of all rows; None if the sequence is in pieces.
    """

    def __init__(self, problem: Problem, scores: Scores, values: Values, comm: Communicator = SERIAL) -> None:
        H, G, n, d = problem.q.shape
        lengths = comm.gather((n, problem.k.shape[1]))
        total, n_k = np.sum(lengths, axis=0)
        row_step, key_step = steps(problem, total, n_k)
        own, count = self._some_keys(problem, scores, key_step)
        self._y, count = comm.joined(own, 1), np.maximum(comm.total(count), 1)
        rows = _quartic.Rows(self._y, None, None, np.ones(H), problem.threads)
        self._products = rows.apply([self._y.shape[1]], None)[0][:, 0] / count[:, None, None]

        sizes = scores.of_rows(problem).reshape(H * G, n)
        some = (np.arange(H * G)[:, None] * n + np.arange(0, n, row_step)).reshape(-1)
        few, n_longer = [np.empty(0, int)] * H, np.zeros(H)
        if not comm.distributed:
            longest = 1.01 * sizes[:, ::row_step].reshape(H, -1).max(axis=1, initial=0)
            found = np.flatnonzero((sizes.reshape(H, G, n) > longest[:, None, None]).reshape(-1))
            longer = np.split(found, np.searchsorted(found, np.arange(1, H) * G * n))
            n_longer[:] = [len(rows) for rows in longer]
            few = [rows[:: max(1, len(rows) // (SAMPLED_ROWS // (problem.origin.alike or H) or 1))] for rows in longer]
        n_some = sum(comm.gather(len(some)))
        weights = (G * total - n_longer) / max(1, n_some / H), n_longer / np.maximum(1, [len(rows) for rows in few])
        lanes = len(some) // H, [len(rows) for rows in few]
        own = np.concatenate([some, *few])
        lane, row = np.divmod(own, max(1, n))
        first = sum(rows for rows, _ in lengths[: comm.rank])
        # Three numbers of each sampled row: its flat index, how many rows it stands for, and its bound.
        weights = np.concatenate([np.repeat(*both) for both in zip(weights, lanes, strict=True)])
        sample = np.array([lane * total + first + row, weights, sizes.reshape(-1)[own]])
        sample, x = comm.joined(sample, 1), comm.joined(problem.q.reshape(-1, d)[own], 0)
        order = np.argsort(sample[0], kind="stable")
        index, self.weight, self.sizes = sample[:, order]
        self.index = index.astype(np.intp)
        self.n_rows = int(G * total)
        self.every = sizes.reshape(H, G, n) if not comm.distributed else None
        self._head, self._row = self.index // max(1, G * total), self.index % max(1, total)
        self._x = np.multiply(x[order], scores.q_factor[self._head, None], dtype=np.float64)
        self.second, self.first = np.empty((2, len(self.index)))
        mean = _rows.columns(self._y, None, problem.threads)[0] / count[:, None]
        for head, rows in self._by_head():
            x = self._x[rows]
            self.second[rows] = _rows.quadratic(x[None], self._products[head : head + 1], problem.threads)[0]
            self.first[rows] = x @ mean[head]
        self._share = np.minimum(1.0, 1.1 * values.share)[self._head]
        self._means: dict[int, np.ndarray] = {}
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    def slots(self, which: Slots) -> Sample:
        """The rows and keys of some of the slots."""
        H = len(self._y)
        heads = np.arange(H)[which]
        place = np.full(H, -1)
        place[heads] = np.arange(len(heads))
        rows = place[self._head] >= 0
        found = object.__new__(Sample)
        found._head, found._row, found._x = place[self._head[rows]], self._row[rows], self._x[rows]
        found.index = self.index[rows] + (found._head - self._head[rows]) * self.n_rows
        found.weight, found.sizes = self.weight[rows], self.sizes[rows]
        found.second, found.first = self.second[rows], self.first[rows]
        found.n_rows, found.every = self.n_rows, None if self.every is None else self.every[which]
        found._y, found._products, found._share = self._y[which], self._products[which], self._share[rows]
        found._means, found._seen = {}, None
        return found

    @staticmethod
    def _some_keys(problem: Problem, scores: Scores, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Every `step`-th key, centred and scaled, (H, m, d), and how many of these each slot keeps, (H,)."""
        y = problem.k[:, ::step]
        factor = scores.k_factor.astype(problem.k.dtype)[:, None, None]
        y = (y if scores.centre is None else y - scores.centre[:, None]) * factor
        count = np.full(len(y), y.shape[1])
        if problem.mask.kept is not None:
            mask = problem.mask.kept[:, ::step]
            y, count = y * mask[..., None], mask.sum(axis=1)
        return np.ascontiguousarray(y), count

    @once
    def _starts(self) -> np.ndarray:
        """Where the sampled rows of each slot begin, (H,)."""
        return np.searchsorted(self._head, np.arange(len(self._y)))

    def _by_head(self) -> Iterator[tuple[int, slice]]:
        ends = itertools.pairwise([*self._starts, len(self._head)])
        return ((head, slice(*own)) for head, own in enumerate(ends))

    @once
    def _longest(self) -> np.ndarray:
        """The largest bound of a row of each slot, (H,)."""
        return self.every.max(axis=(1, 2))

    def of_rows(self, X: np.ndarray) -> np.ndarray:
        """A number of each slot for each of its sampled rows."""
        return X[self._head]

    def _total(self, X: np.ndarray) -> np.ndarray:
        """A number of each sampled row, added up in each slot."""
        return np.add.reduceat(X, self._starts)

    def _middle(self, X: np.ndarray) -> np.ndarray:
        """The median over the sampled rows of each slot, or the larger of the two in the middle."""
        counts = np.diff([*self._starts, len(X)])
        return X[np.lexsort((X, self._head))][self._starts + counts // 2]

    def usual(self, problem: Outline) -> tuple[np.ndarray, np.ndarray]:
        """The size and the mean square of the scores of a usual row of each slot."""
        return self._middle(self.sizes), self._middle(self.mean(problem, 2))

    def longer(self, B: np.ndarray) -> np.ndarray:
        """How many rows of each slot have a bound larger than its B; an estimate if the sequence is in pieces."""
        if self.every is None:
            return np.ceil(self._total(np.where(self.sizes > self.of_rows(B), self.weight, 0.0)))
        found, some = np.zeros(len(B), int), np.flatnonzero(B < self._longest)
        for slot in some.tolist():
            found[slot] = np.count_nonzero(self.every[slot] > B[slot])
        return found

    def risk(self, problem: Problem, scores: Scores, inverse: np.ndarray, comm: Communicator = SERIAL) -> np.ndarray:
        """A number for each row with which its error is expected to grow, (H, G, n).

        It is the second moment of the scores divided by the denominator, times the square root of the number of far
        keys, because their errors have both signs. It is inf where the denominator is not positive though the row sees
        keys.
        """
        H, G, n, d = problem.q.shape
        products = self._products * scores.q_factor[:, None, None] ** 2
        second = _rows.quadratic(problem.q.reshape(H, G * n, d), products, problem.threads).reshape(H, G, n)
        n_k = problem.k.shape[1]
        kept = np.full((H, n_k), 1) if problem.mask.kept is None else problem.mask.kept
        kept = np.pad(np.cumsum(kept, axis=1), ((0, 0), (1, 0)))
        others = comm.gather((n_k, kept[:, -1]))
        if not problem.mask.causal:
            far = sum(length for length, _ in others)
            sees = sum(count for _, count in others)[:, None, None] > 0
        else:
            before = others[: comm.rank]
            far = sum(length for length, _ in before) + far_keys(problem, np.arange(n))
            seen_before = sum((count for _, count in before), np.zeros(H, int))
            seen = kept[:, problem.mask.stops(np.arange(n))] + seen_before[:, None]
            sees = seen[:, None] > 0
        return np.where(inverse > 0, np.sqrt(far) * second * inverse, np.where(sees, np.inf, 0.0))

    @once
    def _squares(self) -> list[np.ndarray]:
        """Squared scores of a few rows and keys, divided by the mean of each row: one array for each head."""
        found = []
        for head, rows in self._by_head():
            x, y = self._x[rows], self._y[head, :: max(1, self._y.shape[1] // 1024)]
            square = (x[:: max(1, len(x) // 64)] @ y.T.astype(np.float64)) ** 2
            found.append(square / np.mean(square, axis=1, keepdims=True))
        return found

    def _tail(self, k: int) -> np.ndarray:
        """The largest ``m_k(i) / m_2(i)^(k/2)`` over a few rows i of each slot, m_k being the k-th moment of a row's
        scores.
        """
        found = np.ones(len(self._y))
        with np.errstate(all="ignore"):
            for head, square in enumerate(self._squares if k > 2 else []):
                power = square
                for _ in range(k // 2 - 2):  # pow is fifty times slower than a product
                    power = power * square
                found[head] = np.nanmax(np.einsum("rj,rj->r", power, square) / square.shape[1], initial=1.0)
        return found

    def fits(self, degree: int, kappa: np.ndarray, least: np.ndarray | None = None) -> RowFits:
        """The polynomials of the sampled rows, with a kappa for each slot; a bound below the `least` of its slot is
        raised to it.
        """
        sizes = self.sizes if least is None else np.maximum(self.sizes, self.of_rows(least))
        return RowFits(sizes, degree, self.of_rows(kappa))

    def mean(self, problem: Outline, order: int) -> np.ndarray:
        """An estimate of ``sum_j s_ij^order`` divided by the denominator, for each sampled row."""
        if order not in self._means:
            far, seen = self._keys_of(problem)
            with np.errstate(all="ignore"):
                mean = far / np.maximum(seen, 1) * self._tail(order)[self._head] * self.second ** (order // 2)
                self._means[order] = mean * np.exp(-self.first)
        return self._means[order]

    def _keys_of(self, problem: Outline) -> tuple[np.ndarray, np.ndarray]:
        """How many keys each sampled row sees through the polynomial, and how many in all."""
        if self._seen is None:
            self._seen = far_keys(problem, self._row), problem.mask.stops(self._row)
        return self._seen

    def radius(self, problem: Outline, fits: RowFits, order: int, fourth: Fourth | None = None) -> np.ndarray:
        """An estimate of h_i (see `certify.moments`) for each sampled row; without `fourth`, as for Gaussian scores."""
        mean = self.mean(problem, order)
        with np.errstate(all="ignore"):
            h = fits.of_rows(lambda p: p.alone) * mean
            b = fits.of_rows(lambda p: p.radius[1])
            if np.any(b > 0):
                m4 = 3 * self.second**2
                if fourth is not None:
                    far, _ = self._keys_of(problem)
                    largest = fourth.largest[self._head, np.searchsorted(fourth.stops, far)]
                    m4 = self.second**2 + fits.sizes**4 * largest / np.maximum(far, 1)
                h = np.fmin(h, (fits.of_rows(lambda p: p.radius[0]) + b * m4 / self.second) * mean)
        return h

    def truncation(self, h: np.ndarray) -> np.ndarray:
        """An estimate of what `MomentRule.truncation` will find, for rows whose h_i is `h`."""
        with np.errstate(all="ignore"):
            return np.where(h < 1, h / np.maximum(1 - h, 1e-300) * self._share, math.inf)

    def kept(
        self, problem: Outline, allowed: np.ndarray, B: np.ndarray, h: np.ndarray, h_r: np.ndarray | None = None
    ) -> Kept:
        """What to expect if the polynomial engine keeps the rows of each slot whose bound is at most the slot's B and
        that reach eps.

        A row is not kept if its bound is past B, or if its truncation, estimated from the radii h (and h_r in
        backward), is more than is `allowed` in its slot.
        """
        expected, allowed = self.truncation(h), self.of_rows(allowed)
        of_gradient = np.zeros_like(h) if h_r is None else gradient_error(h, h_r)
        long = self.sizes > self.of_rows(B)
        others = ~(long | ((expected <= allowed) & (of_gradient <= 2 * allowed)))
        pairs = max(1.0, problem.sizes.G * problem.mask.pairs())
        work = self.weight * self._keys_of(problem)[1] / pairs
        if problem.mask.causal:
            # The exact engine computes a whole tile even for a single row.
            rows, beside = long | others, np.zeros(len(long), bool)
            alike = self._head[1:] == self._head[:-1]
            beside[1:] = rows[:-1] & alike
            beside[:-1] |= rows[1:] & alike
            work *= np.where(beside, 1.0, TILE)
        share = self._total(np.where(long, 1.0, np.where(others, 1.5, 0.0)) * work)
        count = self.longer(B) + self._total(np.where(others, 1.5 * self.weight, 0.0))
        few = (count <= _FEW * self.n_rows) | (share <= _FEW)
        errors = (np.where(long | others, 0.0, X) for X in (expected, of_gradient))
        # If more rows fail than are allowed for, the whole slot is computed again. So there is room for rows that the
        # sample misses, above all the first ones of a causal problem.
        n_exact_rows = np.ceil(count + self.n_rows / 256).astype(int) + TILE
        return Kept(few, share, n_exact_rows, *(np.maximum.reduceat(X, self._starts) for X in errors))

    def cuts(self, bounds: np.ndarray) -> Iterator[np.ndarray]:
        """Bounds B to try for the rows of each slot that are kept: `bounds`, and lower ones that leave out 1, 2, 4, ...
        of its sampled rows; NaN where there is none.
        """
        counts = np.diff([*self._starts, len(self.sizes)])
        falling, found = self.sizes[np.lexsort((-self.sizes, self._head))], bounds
        yield np.where(bounds <= poly.MAX_BOUND, bounds, np.nan)
        for count in 2 ** np.arange(int(_CUT * counts.max()).bit_length()):
            there = count <= _CUT * counts
            B = np.where(there, falling[np.minimum(self._starts + count, len(falling) - 1)], np.inf)
            # Less than a step of the grid changes nothing.
            less = B < 0.97 * found
            found = np.where(less, B, found)
            if less.any():
                yield np.where(less & (B <= poly.MAX_BOUND), B, np.nan)

    def kappa(self) -> np.ndarray:
        """``B_i^2 / (3 m_2)`` of the row of each slot with the largest second moment m_2, rounded to a power of 2.

        For Gaussian scores this is the ratio of the second moment to the fourth, for scores in units of B_i.
        """
        found = np.ones(len(self._y))
        for head, rows in self._by_head():
            worst = rows.start + int(self.second[rows].argmax())
            second, size = float(self.second[worst]), float(self.sizes[worst])
            if 0 < second < math.inf and 0 < size < math.inf:
                found[head] = 2.0 ** min(40, max(-1, round(2 * math.log2(size) - math.log2(3 * second))))
        return found
