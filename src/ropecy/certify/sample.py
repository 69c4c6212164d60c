"""Estimates of the moments of the scores from some rows and keys. They choose a degree and certify nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from ..approximation import minimax as poly
from ..kernels import _quartic, _rows
from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline, Problem, Slots
from .fourth_moments import Fourth
from .moments import TILE, RowFits, far_keys, gradient_error
from .once import once
from .rounding import polynomial_rounding
from .scores import Scores
from .values import Values

SAMPLED_KEYS = 4096
SAMPLED_ROWS = 2048
_FEW = 0.03  # the part of the rows, or else of the exact work, that may be expected to be left to the exact engine
_CUT = 0.5  # the largest part of the sampled rows that may be left out because their bounds are large


def steps(problem: Outline, n: int, n_k: int) -> tuple[int, int]:
    """The distances (of rows, of keys) at which a `Sample` takes one, for n rows in each head and n_k keys."""
    H, G = problem.sizes[:2]
    return max(1, n // max(16, SAMPLED_ROWS // (H * G))), max(1, n_k // SAMPLED_KEYS)


def draw(risk: np.ndarray, count: int, rng: np.random.Generator, comm: Communicator = SERIAL) -> np.ndarray:
    """Flat indices, in order, of `count` rows: half are those of largest `risk`, half are drawn from all others.

    If the sequence is in pieces, `count` rows are drawn from all pieces together, and each process gets its own.
    """
    flat = risk.reshape(-1)
    sizes = np.array(comm.gather(flat.size))
    if count >= sizes.sum():
        return np.arange(flat.size)
    half = count // 2
    most = min(half, flat.size)
    top = np.argpartition(flat, flat.size - most)[flat.size - most :] if most else np.empty(0, int)
    top = top[np.argsort(-flat[top], kind="stable")]
    everyone = comm.gather(flat[top])
    owner = np.repeat(np.arange(len(everyone)), [len(X) for X in everyone])
    taken = np.bincount(owner[np.argsort(-np.concatenate(everyone), kind="stable")[:half]], minlength=len(everyone))
    remain = np.ones(flat.size, bool)
    remain[top[: taken[comm.rank]]] = False
    drawn = rng.choice(sizes.sum() - half, count - half, replace=False)
    drawn = drawn - (sizes - taken)[: comm.rank].sum()
    rest = np.flatnonzero(remain)
    remain[rest[drawn[(drawn >= 0) & (drawn < rest.size)]]] = False
    return np.flatnonzero(~remain)


class Sample:
    """Some rows and some keys of a problem, and estimates made from them.

    The rows are taken at equal distances; rows that are longer than all of these are sampled separately, if the whole
    sequence is in one process.

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
        How many rows there are in all.
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
        few, n_longer = np.empty(0, int), 0
        if not comm.distributed:
            longer = np.flatnonzero(sizes > 1.01 * sizes.reshape(-1)[some].max(initial=0))
            few, n_longer = longer[:: max(1, len(longer) // SAMPLED_ROWS)], len(longer)
        n_some = sum(comm.gather(len(some)))
        weights = (H * G * total - n_longer) / max(1, n_some), n_longer / max(1, len(few))
        own = np.concatenate([some, few])
        lane, row = np.divmod(own, max(1, n))
        first = sum(rows for rows, _ in lengths[: comm.rank])
        # Three numbers of each sampled row: its flat index, how many rows it stands for, and its bound.
        weights = np.repeat(weights, [len(some), len(few)])
        sample = np.array([lane * total + first + row, weights, sizes.reshape(-1)[own]])
        sample, x = comm.joined(sample, 1), comm.joined(problem.q.reshape(-1, d)[own], 0)
        order = np.argsort(sample[0], kind="stable")
        index, self.weight, self.sizes = sample[:, order]
        self.index = index.astype(np.intp)
        self.n_rows = int(H * G * total)
        self.every = sizes.reshape(H, G, n) if not comm.distributed else None
        self._head, self._row = self.index // max(1, G * total), self.index % max(1, total)
        self._x = np.multiply(x[order], scores.q_factor[self._head, None], dtype=np.float64)
        self.second, self.first = np.empty((2, len(self.index)))
        mean = _rows.columns(self._y, None, problem.threads)[0] / count[:, None]
        for head, rows in self._by_head():
            x = self._x[rows]
            self.second[rows] = _rows.quadratic(x[None], self._products[head : head + 1], problem.threads)[0]
            self.first[rows] = x @ mean[head]
        self._share, self._lost = values.share, scores.lost
        self._means: dict[int, np.ndarray] = {}
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    def slots(self, which: Slots, scores: Scores, values: Values) -> Sample:
        """The rows and keys of some of the slots, whose scores and values these are; of a sequence in pieces."""
        H = len(self._y)
        heads, of_head = np.arange(H)[which], self.n_rows // H
        place = np.full(H, -1)
        place[heads] = np.arange(len(heads))
        rows = place[self._head] >= 0
        found = object.__new__(Sample)
        found._head, found._row, found._x = place[self._head[rows]], self._row[rows], self._x[rows]
        found.index = self.index[rows] + (found._head - self._head[rows]) * of_head
        found.weight, found.sizes = self.weight[rows], self.sizes[rows]
        found.second, found.first = self.second[rows], self.first[rows]
        found.n_rows, found.every = of_head * len(heads), None
        found._y, found._products = self._y[which], self._products[which]
        found._share, found._lost = values.share, scores.lost
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

    def _by_head(self) -> Iterator[tuple[int, slice]]:
        cuts = np.searchsorted(self._head, np.arange(len(self._y) + 1))
        return ((head, slice(*ends)) for head, ends in enumerate(itertools.pairwise(cuts)))

    def longer(self, B: float) -> int:
        """How many rows have a bound larger than B; an estimate if the sequence is in pieces."""
        if self.every is None:
            return math.ceil(self.weight[self.sizes > B].sum())
        return int(np.count_nonzero(self.every > B))

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

    def _tail(self, k: int) -> float:
        """The largest ``m_k(i) / m_2(i)^(k/2)`` over a few rows i, m_k being the k-th moment of a row's scores."""
        found = 1.0
        with np.errstate(all="ignore"):
            for square in self._squares if k > 2 else []:
                power = square
                for _ in range(k // 2 - 2):  # pow is fifty times slower than a product
                    power = power * square
                found = np.nanmax(np.einsum("rj,rj->r", power, square) / square.shape[1], initial=found)
        return float(found)

    def fits(self, degree: int, kappa: float, least: float = 0.0) -> RowFits:
        """The polynomials of the sampled rows; bounds smaller than `least` are raised to it."""
        return RowFits(np.maximum(self.sizes, least), degree, kappa)

    def mean(self, problem: Outline, order: int) -> np.ndarray:
        """An estimate of ``sum_j s_ij^order`` divided by the denominator, for each sampled row."""
        if order not in self._means:
            far, seen = self._keys_of(problem)
            with np.errstate(all="ignore"):
                mean = far / np.maximum(seen, 1) * self._tail(order) * self.second ** (order // 2)
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
            return np.where(h < 1, h / np.maximum(1 - h, 1e-300) * min(1.0, 1.1 * self._share), math.inf)

    def kept(
        self, problem: Outline, values: Values, eps: float, B: float, h: np.ndarray, h_r: np.ndarray | None = None
    ) -> tuple[float, int, float, float] | None:
        """What to expect if the polynomial engine keeps the rows whose bound is at most B and that reach eps.

        Returns the part of the whole exact work that the other rows take, how many of these are allowed for, and the
        largest truncation of the kept rows, of O and of gradients; None if too many rows are left to the exact engine.
        A row is not kept if its bound is past B, or if its truncation, estimated from the radii h (and h_r in
        backward), is more than rounding leaves of eps.
        """
        grad, total = h_r is not None, self.n_rows
        allowed = eps - polynomial_rounding(problem, B, values, self._lost)
        expected = self.truncation(h)
        of_gradient = gradient_error(h, h_r) if grad else np.zeros_like(h)
        long = self.sizes > B
        others = ~(long | ((expected <= allowed) & (of_gradient <= 2 * allowed)))
        pairs = max(1.0, problem.sizes.H * problem.sizes.G * problem.mask.pairs())
        work = self.weight * self._keys_of(problem)[1] / pairs
        if problem.mask.causal:
            # The exact engine computes a whole tile even for a single row.
            rows, beside = long | others, np.zeros(len(long), bool)
            beside[1:] = rows[:-1]
            beside[:-1] |= rows[1:]
            work *= np.where(beside, 1.0, TILE)
        share = work[long].sum() + 1.5 * work[others].sum()
        count = self.longer(B) + 1.5 * self.weight[others].sum()
        if count > _FEW * total and share > _FEW:
            return None
        truncation = (float(np.max(errors, where=~(long | others), initial=0.0)) for errors in (expected, of_gradient))
        # If more rows fail than are allowed for, the whole problem is computed again. So there is room for rows that
        # the sample misses, above all the first ones of a causal problem.
        return float(share), math.ceil(count + total / 256) + TILE, *truncation

    def cuts(self, bound: float) -> list[float]:
        """Bounds B to try for the rows that are kept: `bound`, and lower ones that leave out 1, 2, 4, ... of them."""
        sizes = np.sort(self.sizes)[::-1]
        found = [bound]
        for count in 2 ** np.arange(int(_CUT * len(sizes)).bit_length()):
            # Less than a step of the grid changes nothing.
            if sizes[count] < 0.97 * found[-1]:
                found.append(float(sizes[count]))
        return [B for B in found if B <= poly.MAX_BOUND]

    def kappa(self) -> float:
        """``B_i^2 / (3 m_2)`` of the row with the largest second moment m_2, rounded to a power of 2.

        For Gaussian scores this is the ratio of the second moment to the fourth, for scores in units of B_i.
        """
        worst = int(self.second.argmax())
        second, size = float(self.second[worst]), float(self.sizes[worst])
        if not 0 < second < math.inf or not 0 < size < math.inf:
            return 1.0
        return 2.0 ** min(40, max(-1, round(2 * math.log2(size) - math.log2(3 * second))))
