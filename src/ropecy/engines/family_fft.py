"""The papers' algorithm for W_{i-j}: a Toeplitz matrix for each monomial of ``s = sum_ab q_a W_{i-j}[a, b] k_b``.

The monomials of degree s are the multisets of s entries of the support (arXiv:2505.11892). Those that have the same
monomials q^a and k^b of the rows share a Toeplitz matrix, whose symbol is the sum of what each multiset makes of W.
What passes between q^a and k^b is added up in frequencies, so that a transform of a column serves all its partners in
a batch.

Columns are laid out so that no symbol has to be turned: its offsets i - j come in order, keys stand from 0 on, and the
rows of queries from n_k - 1 on.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..bounds import Scores, largest_entries
from ..polynomial import Polynomial, antiderivative, n_features
from ..problem import Problem
from ._tasks import in_order

# Of columns and their spectra, for each thread.
_BATCH_BYTES = 2**26
# Into how many parts the monomials of queries are cut, by shapes, over all slots together.
_PARTS = 4


@dataclass(frozen=True, slots=True)
class Pair:
    """What q^a and k^b share: the multisets of entries between them, each with its multinomial |m|! / m!."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    multisets: tuple[tuple[tuple[int, ...], float], ...]


def length(n: int, n_k: int) -> int:
    """Of transforms: the least even 2^a 3^b 5^c 7^d from n + n_k - 1 on."""
    size = n + n_k - 1 + (n + n_k - 1) % 2
    while True:
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def absolute_sum(problem: Problem, p: Polynomial) -> float:
    """``sum_t |c_t| x^t``, x the sum over the support of max |q_a| max_t |W_t[a, b]| max |k_b|: of all monomials."""
    x = abs(problem.scale) * float(largest_entries(problem))
    return math.fsum(abs(c) * x**t for t, c in enumerate(p.coefficients))


class Product:
    """The sums over keys of weights times values, and their adjoint, for one problem; as `fft.Shared` with one T.

    Parameters
    ----------
    problem : Problem
    scores : Scores
    values : (H, columns, n_k) float64
        0 for keys that are masked.
    levels : (H or 1, G or 1, levels, n + n_k - 1) float64
        exp(b) by levels, at offsets j - i from -(n - 1) on.
    gain : (H or 1, G or 1, levels, n) float64 or None
        What each level is multiplied with in each row.
    """

    def __init__(
        self, problem: Problem, scores: Scores, values: np.ndarray, levels: np.ndarray, gain: np.ndarray | None
    ) -> None:
        self.problem, self.values = problem, values
        self.levels = np.ascontiguousarray(levels[..., ::-1])
        H, G, n, _ = problem.q.shape
        n_k = problem.k.shape[1]
        self.gain = None if gain is None else np.broadcast_to(gain, (H, G, *gain.shape[2:]))
        self.q = np.multiply(problem.q.swapaxes(-1, -2), scores.q_factor, dtype=np.float64)
        self.k = np.multiply(problem.k.swapaxes(-1, -2), scores.k_factor, dtype=np.float64)
        if problem.key_mask is not None:
            self.k *= problem.key_mask[:, None]
        family, first = problem.family, problem.q_offset - (n_k - 1)
        factors = scores.q_factor * scores.k_factor
        weight = problem.scale / factors if factors else 0.0
        self.used = used(problem)
        self.W = dict.fromkeys(range(len(family.left)))
        index = family.rows(first, problem.q_offset + n - 1)
        for entry in self.used:
            self.W[entry] = family.values[index, entry] * weight
        self.weight = weight
        # Heads of a group that have biases of their own do not share T.
        groups = range(G)
        self.slots = [(h, g) for h in range(H) for g in ([[g] for g in groups] if levels.shape[1] > 1 else [groups])]
        self.length = length(n, n_k)

    def forward(self, p: Polynomial) -> np.ndarray:
        """(H, G, columns, n): sum_j p(s_ij) exp(b_{j-i}) v_j."""
        problem, coefficients = self.problem, p.coefficients
        H, G, n, _ = problem.q.shape
        pairs = self._pairs(len(coefficients) - 1)
        sums = np.zeros((H, G, self.values.shape[1], n))
        tasks = [(h, groups, batch) for h, groups in self.slots for batch in self._batches(pairs, 1)]
        work = self._forward_batch
        found = in_order(lambda *task: work(*task, coefficients), tasks, problem.threads)
        for (h, groups, _), part in zip(tasks, found, strict=True):
            sums[h, list(groups)] += part
        return sums

    def _forward_batch(
        self, h: int, groups: list[int], batch: list[list[Pair]], coefficients: tuple[float, ...]
    ) -> Generator[None, None, np.ndarray]:
        """What the monomials of queries in one batch add: (groups, columns, n)."""
        n, n_k = self.problem.q.shape[2], self.problem.k.shape[1]
        levels = self._levels(h, groups)
        C = self.values.shape[1]
        sums = np.zeros((len(groups), C, n))
        sent = np.zeros((len(batch), len(levels), C, self.length // 2 + 1), complex)
        for b, partners in self._by_keys(batch):
            spectrum = np.fft.rfft(self.values[h] * self._monomial(self.k[h], b), self.length)
            for at, pair in partners:
                symbol = self._symbol(pair) * coefficients[len(b)]
                for level, total in zip(levels, sent[at], strict=True):
                    total += np.fft.rfft(symbol * level, self.length) * spectrum
            yield
        for own, pairs in zip(sent, batch, strict=True):
            found = np.fft.irfft(own, self.length)[..., n_k - 1 : n_k - 1 + n]
            for place, g in enumerate(groups):
                column = self._monomial(self.q[h, g], pairs[0].a)
                for level in range(len(levels)):
                    sums[place] += self._gained(column, h, g, level) * found[level]
            yield
        return sums

    def backward(self, p: Polynomial, grad: np.ndarray, want_dsymbol: bool) -> tuple[np.ndarray, ...]:
        """The adjoint for grad (H, G, columns, n): dq (H, G, d, n), dk (H, d, n_k), both of the features of an
        antiderivative of p, dv (H, columns, n_k), dsymbol (H, G or 1, n + n_k - 1) or None, and dfamily (|S|, n + n_k
        - 1), also where W is 0.
        """
        problem = self.problem
        H, G, n, d = problem.q.shape
        n_k, size = problem.k.shape[1], n + problem.k.shape[1] - 1
        raised = antiderivative(p)
        weights = (*p.coefficients, *([0.0] * (len(raised) - len(p.coefficients))))
        pairs = self._pairs(len(raised) - 1, beside=True)
        dq, dk, dv = np.zeros((H, G, d, n)), np.zeros((H, d, n_k)), np.zeros(self.values.shape)
        dfamily = np.zeros((len(self.W), size))
        own = G if self.levels.shape[1] > 1 else 1
        dsymbol = np.zeros((H, own, size)) if want_dsymbol else None
        tasks = [(h, groups, batch) for h, groups in self.slots for batch in self._batches(pairs, 2)]
        work = self._backward_batch
        found = in_order(lambda *task: work(*task, grad, weights, raised), tasks, problem.threads)
        for (h, groups, _), part in zip(tasks, found, strict=True):
            dq[h, list(groups)] += part[0]
            dk[h] += part[1]
            dv[h] += part[2]
            for entry, row in part[3].items():
                dfamily[entry] += row
            if dsymbol is not None:
                dsymbol[h, groups[0] if own > 1 else 0] += part[4][::-1]
        return dq, dk, dv, dsymbol, self.weight * dfamily

    def _backward_batch(
        self,
        h: int,
        groups: list[int],
        batch: list[list[Pair]],
        grad: np.ndarray,
        weights: tuple[float, ...],
        raised: tuple[float, ...],
    ) -> Generator[None, None, tuple[Any, ...]]:
        n, n_k, d = self.problem.q.shape[2], self.problem.k.shape[1], self.problem.q.shape[3]
        levels, size = self._levels(h, groups), n + n_k - 1
        C, rows = self.values.shape[1], slice(n_k - 1, size)
        dq, dk, dv = np.zeros((len(groups), d, n)), np.zeros((d, n_k)), np.zeros((C, n_k))
        dW, dsymbol = {}, np.zeros(size)
        column = np.zeros((len(levels), C, size))
        shape = (len(batch), len(levels), C, self.length // 2 + 1)
        upstream, sent = np.empty(shape, complex), np.zeros(shape, complex)
        for at, pairs in enumerate(batch):
            column[..., rows] = 0
            for g in groups:
                monomial = self._monomial(self.q[h, g], pairs[0].a)
                for level in range(len(levels)):
                    column[level, :, rows] += self._gained(monomial, h, g, level) * grad[h, g]
            upstream[at] = np.fft.rfft(column, self.length)
        yield
        for b, partners in self._by_keys(batch):
            s = len(b)
            monomial = self._monomial(self.k[h], b)
            spectrum = np.fft.rfft(self.values[h] * monomial, self.length)
            back = np.zeros_like(spectrum)
            conjugate = spectrum.conj()
            for at, pair in partners:
                symbol = self._symbol(pair)
                along = np.zeros(size)
                for level, total, given in zip(levels, sent[at], upstream[at], strict=True):
                    if symbol is not None:
                        of_symbol = np.fft.rfft(symbol * level, self.length)
                        total += of_symbol * spectrum
                        back += of_symbol.conj() * given
                    correlation = np.einsum("cf,cf->f", conjugate, given)
                    along += level * np.fft.irfft(correlation, self.length)[:size]
                if symbol is not None and weights[s] and self.problem.bias is not None:
                    dsymbol += weights[s] * symbol * along
                self._add_to_entries(dW, pair, raised[s] * along)
            found = np.fft.irfft(back, self.length)[:, :n_k]
            if weights[s]:
                dv += weights[s] * monomial * found
            self._add_to_rows(dk, self.k[h], b, raised[s] * np.einsum("cj,cj->j", self.values[h], found))
            yield
        for own, pairs in zip(sent, batch, strict=True):
            a = pairs[0].a
            found = np.fft.irfft(own, self.length)[..., rows]
            for place, g in enumerate(groups):
                derivative = np.zeros(n)
                for level in range(len(levels)):
                    part = np.einsum("ci,ci->i", grad[h, g], found[level])
                    derivative += self._gained(part, h, g, level)
                self._add_to_rows(dq[place], self.q[h, g], a, raised[len(a)] * derivative)
            yield
        return dq, dk, dv, dW, dsymbol

    def _pairs(self, degree: int, beside: bool = False) -> list[list[Pair]]:
        """By monomials of queries; `beside`: also multisets with one entry that is 0 everywhere, for its gradient."""
        family = self.problem.family
        support = tuple(zip(family.left.tolist(), family.right.tolist(), strict=True))
        return _pairs(support, tuple(self.used), degree, beside)

    def _batches(self, pairs: list[list[Pair]], arrays: int) -> list[list[list[Pair]]]:
        """Monomials of queries that are done together: by shapes, never by the number of threads."""
        most = max(1, int(_BATCH_BYTES / (arrays * self._row_bytes)))
        most = min(most, max(1, -(-len(pairs) * len(self.slots) // _PARTS)))
        return [pairs[at : at + most] for at in range(0, len(pairs), most)]

    @property
    def _row_bytes(self) -> float:
        return 8.0 * self.length * self.values.shape[1] * self.levels.shape[2]

    @staticmethod
    def _by_keys(batch: list[list[Pair]]) -> list[tuple[tuple[int, ...], list[tuple[int, Pair]]]]:
        """The monomials of keys, each with its partners in a batch."""
        found: dict[tuple[int, ...], list[tuple[int, Pair]]] = {}
        for at, pairs in enumerate(batch):
            for pair in pairs:
                found.setdefault(pair.b, []).append((at, pair))
        return list(found.items())

    def _levels(self, h: int, groups: list[int]) -> np.ndarray:
        return self.levels[min(h, len(self.levels) - 1), min(groups[0], self.levels.shape[1] - 1)]

    def _gained(self, column: np.ndarray, h: int, g: int, level: int) -> np.ndarray:
        return column if self.gain is None else column * self.gain[h, g, level]

    @staticmethod
    def _monomial(columns: np.ndarray, variables: tuple[int, ...]) -> np.ndarray:
        """The product of these columns."""
        found = np.ones(columns.shape[-1])
        for variable in variables:
            found *= columns[variable]
        return found

    def _symbol(self, pair: Pair) -> np.ndarray | None:
        """The sum over multisets of multinomials times the product of their entries; None where it is 0."""
        total = None
        for multiset, multinomial in pair.multisets:
            if any(self.W[entry] is None for entry in multiset):
                continue
            term = np.full(self.levels.shape[-1], multinomial)
            for entry in multiset:
                term *= self.W[entry]
            total = term if total is None else total + term
        return total

    def _add_to_entries(self, dW: dict[int, np.ndarray], pair: Pair, along: np.ndarray) -> None:
        """The derivative of the pair's symbol by each entry, times `along`."""
        for multiset, multinomial in pair.multisets:
            for entry in set(multiset):
                rest = list(multiset)
                rest.remove(entry)
                if any(self.W[other] is None for other in rest):
                    continue
                term = along * (multinomial * multiset.count(entry))
                for other in rest:
                    term *= self.W[other]
                if entry in dW:
                    dW[entry] += term
                else:
                    dW[entry] = term

    def _add_to_rows(
        self, total: np.ndarray, columns: np.ndarray, variables: tuple[int, ...], derivative: np.ndarray
    ) -> None:
        """The derivative of a monomial by each of its variables, times `derivative`."""
        for variable in set(variables):
            rest = list(variables)
            rest.remove(variable)
            total[variable] += variables.count(variable) * derivative * self._monomial(columns, tuple(rest))


def used(problem: Problem) -> list[int]:
    """The entries of the support that are not 0 at all offsets."""
    return np.flatnonzero(problem.family.values.any(axis=0)).tolist()


def operations(problem: Problem, degree: int, levels: int, grad: bool) -> float:
    """Multiply-adds times 2, as the exact engine counts them."""
    H, G, n, d = problem.q.shape
    n_k, columns = problem.k.shape[1], problem.v.shape[2] + 1
    entries, size = len(used(problem)), length(n, n_k)
    slots = H * (G if problem.bias is not None and problem.bias.shape[1] > 1 else 1)
    transform = 2.5 * size * math.log2(size)

    def work(degree: int, passes: int) -> float:
        pairs = n_features(entries, degree)
        monomials = min(n_features(d, degree), pairs)
        batch = max(1.0, _BATCH_BYTES / (8.0 * size * columns * levels * passes))
        sent = min(pairs, monomials * max(1.0, monomials / batch))
        transforms = columns * (sent + monomials * levels) * passes + pairs * levels * passes
        return transforms * transform + pairs * size * levels * (8.0 * columns * (2 * passes - 1) + 20 * degree)

    total = work(degree, 1) + (work(degree + 1, 2) if grad else 0)
    return slots * total


def memory(problem: Problem, degree: int, levels: int, grad: bool) -> float:
    """Bytes beyond inputs and outputs."""
    H, G, n, d = problem.q.shape
    n_k, columns = problem.k.shape[1], problem.v.shape[2] + 1
    entries, size = len(problem.family.left), length(n, n_k)
    row = 8.0 * size * columns * levels
    batch = max(_BATCH_BYTES, (2 if grad else 1) * row) + 6 * row
    held = H * G * n * (d + columns) + H * n_k * (d + columns) + (entries + 4) * (n + n_k)
    sums = H * G * n * columns + (H * G * n * d + H * n_k * (d + columns) + 2 * entries * (n + n_k) if grad else 0)
    parts = (problem.threads + 2) * (sums / max(1, H) if grad else G * n * columns)
    return 8.0 * (held + sums + parts) + problem.threads * batch


@lru_cache(maxsize=16)
def _pairs(
    support: tuple[tuple[int, int], ...], entries: tuple[int, ...], degree: int, beside: bool
) -> list[list[Pair]]:
    """All multisets of at most `degree` entries, by (a, b); `beside`: and those with one entry of the support more."""
    found: dict[tuple, list[tuple[tuple[int, ...], float]]] = {}

    def add(multiset: tuple[int, ...], multinomial: float) -> None:
        ends = zip(*(support[entry] for entry in multiset), strict=True)
        a, b = (tuple(sorted(end)) for end in ends) if multiset else ((), ())
        found.setdefault((a, b), []).append((multiset, multinomial))

    others = [entry for entry in range(len(support)) if entry not in set(entries)] if beside else []
    # multiset, where its last entry stands in `entries`, |m|! / m!
    open_ends: list[tuple[tuple[int, ...], int, float]] = [((), 0, 1.0)]
    while open_ends:
        multiset, last, multinomial = open_ends.pop()
        add(multiset, multinomial)
        if len(multiset) == degree:
            continue
        for other in others:
            add((*multiset, other), multinomial * (len(multiset) + 1))
        for place in range(last, len(entries)):
            count = multiset.count(entries[place]) + 1
            larger = (*multiset, entries[place])
            open_ends.append((larger, place, multinomial * len(larger) / count))
    grouped: dict[tuple[int, ...], list[Pair]] = {}
    for (a, b), multisets in sorted(found.items()):
        grouped.setdefault(a, []).append(Pair(a, b, tuple(multisets)))
    return list(grouped.values())
