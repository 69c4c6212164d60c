"""The papers' algorithm for W_{i-j}: a Toeplitz matrix for each monomial of ``s = sum_ab q_a W_{i-j}[a, b] k_b``.

The monomials of degree s are the multisets of s entries of the support (arXiv:2505.11892). Those that have the same
monomials q^a and k^b of the rows share a Toeplitz matrix, whose symbol is the sum of what each multiset makes of W.
What passes between q^a and k^b is added up in frequencies, so that a transform of a column serves all its partners in
a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...approximation.minimax import Polynomial, antiderivative, n_features
from ...certify.family_scores import largest_entries
from ...certify.scores import Scores
from ...kernels import _circulant, _family
from ...kernels._fftw import ComplexFFT, RealFFT
from ...problem.problem import Outline, Problem
from ..kept import kept_below

if TYPE_CHECKING:
    from .symbol import Symbol

# The bytes that each thread may take for the spectra of a batch of monomials of queries.
_BATCH_BYTES = 2**26
# Into how many parts the monomials of queries are cut, over all slots together, whatever the number of threads.
_PARTS = 8
# The bytes that the sums may take of which the gradient of W is made.
_LANE_BYTES = 512 * 2**20
# Up to so many multisets their lists are made to count what they share, for which more there are bounds; and how many
# operations take as long as to make the lists.
_COUNTED = 2000
_LISTS = 1.6e8
# The bytes that the lists take for each multiset while they are made.
_MULTISET_BYTES = 500
# Two columns of norms within a factor of 2 are transformed as one. The norm of both is at most this times that of
# either.
TOGETHER = math.sqrt(5)


@dataclass(frozen=True, slots=True)
class Pair:
    """A monomial q^a of queries and one k^b of keys, with all multisets of the support's entries that give these two.

    Attributes
    ----------
    a, b : tuple of int
        The coordinates that the monomials are the products of, in order.
    multisets : tuple of (tuple of int, float)
        The entries of each multiset, and its multinomial |m|! / m!.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    multisets: tuple[tuple[tuple[int, ...], float], ...]


class Lists(NamedTuple):
    """All pairs, in the order in which `_family.Product` goes through them: batch after batch of monomials of queries.

    Attributes
    ----------
    batch_start : (batches + 1,) intp
        Where each batch begins among the monomials of queries.
    key_start : (batches + 1,) intp
        Where each batch begins among the monomials of keys. These are listed batch by batch, those that have partners
        in the batch, so that one may be listed several times.
    pair_start : (keys + 1,) intp
        Where the pairs of each listed monomial of keys begin.
    partner : (pairs,) intp
        The monomial of queries of each pair.
    multiset_start : (pairs + 1,) intp
        Where the multisets of each pair begin.
    multiset_end : (pairs,) intp
        Where those of a pair's multisets begin whose last entry is 0 at all offsets.
    query_degree, key_degree : (monomials,), (keys,) intp
        The degree of each monomial.
    query_variables, key_variables : (monomials, most), (keys, most) intp
        The coordinates that each monomial is the product of, in order.
    entries : (multisets, most) intp
        The entries of each multiset in order, with -1 past the last one.
    multinomial : (multisets,) float64
        |m|! / m! of each multiset.
    """

    batch_start: np.ndarray
    key_start: np.ndarray
    pair_start: np.ndarray
    partner: np.ndarray
    multiset_start: np.ndarray
    multiset_end: np.ndarray
    query_degree: np.ndarray
    key_degree: np.ndarray
    query_variables: np.ndarray
    key_variables: np.ndarray
    entries: np.ndarray
    multinomial: np.ndarray


def absolute_sum(problem: Problem, p: Polynomial) -> float:
    """``sum_t |c_t| x^t`` with x the sum over the support of max |q_a| max_t |W_t[a, b]| max |k_b|: what the absolute
    values of all monomials add up to at most.
    """
    x = abs(problem.scale) * float(largest_entries(problem))
    return math.fsum(abs(c) * x**t for t, c in enumerate(p.coefficients))


class Product:
    """The sums over keys of weights times values, and their adjoint, with a T for each pair of monomials. It has the
    methods of `shared.Shared`, where there is one T.

    Parameters
    ----------
    problem : Problem
    scores : Scores
    values : (H, columns, n_k) float64
        0 for keys that are masked.
    symbol : Symbol
        exp(b) by levels.
    transforms : (ComplexFFT, RealFFT)
        Of half and of twice the length of the symbol's blocks.
    """

    def __init__(
        self,
        problem: Problem,
        scores: Scores,
        values: np.ndarray,
        symbol: Symbol,
        transforms: tuple[ComplexFFT, RealFFT],
    ) -> None:
        self._problem = problem
        levels, gain, b = symbol.levels, symbol.gain, symbol.block
        H, G, n, n_k, d, _ = problem.sizes
        self._columns = values.shape[1]
        rows, keys = -(-n // b) * b, -(-n_k // b) * b
        slots = _slots(problem)
        self._alone, groups = slots // H, H * G // slots
        q, k = np.zeros((slots, groups, d, rows)), np.zeros((H, d, keys))
        q_factor, k_factor = scores.q_factor[:, None, None, None], scores.k_factor[:, None, None]
        of_queries = q.reshape(H, G, d, rows)[..., :n]
        np.multiply(problem.q.swapaxes(-1, -2), q_factor, out=of_queries, dtype=np.float64)
        np.multiply(problem.k.swapaxes(-1, -2), k_factor, out=k[..., :n_k], dtype=np.float64)
        # Two share a transform.
        self._v = np.zeros((H, self._columns + self._columns % 2, keys))
        self._v[:, : self._columns, :n_k] = values
        if problem.mask.kept is not None:
            k[..., :n_k] *= problem.mask.kept[:, None]

        # Offsets i - j from -keys on.
        self._offsets = slice(keys - (n_k - 1), keys + n)
        family, mask = problem.family, problem.mask
        # The same for all slots, which share the family.
        factors = float(scores.q_factor[0] * scores.k_factor[0])
        self._weight = problem.scale / factors if factors else 0.0
        W = np.zeros((len(family.left), rows + keys))
        W[:, self._offsets] = family.values[family.rows(-mask.most, -mask.least)].T * self._weight
        of_levels = np.zeros((*levels.shape[:3], rows + keys))
        of_levels[..., self._offsets] = levels[..., ::-1]
        windows = of_levels.any(axis=(0, 1)).reshape(levels.shape[2], -1, b).any(axis=-1)
        nonzero = np.ascontiguousarray(windows[:, :-1] | windows[:, 1:])
        if of_levels.shape[:2] != (1, 1):
            of_levels = np.ascontiguousarray(np.broadcast_to(of_levels, (H, self._alone, *of_levels.shape[2:])))
        of_levels = of_levels.reshape(-1, *of_levels.shape[2:])
        by_row = self._largest_gain = None
        if gain is not None:
            self._largest_gain = np.broadcast_to(gain.max(axis=2), (H, G, n)).reshape(H, -1)
            by_row = np.zeros((slots, groups, levels.shape[2], rows))
            by_row.reshape(H, G, -1, rows)[..., :n] = gain
        self._support, self._used = _support(problem), tuple(problem.family.used)
        self._product_shape, self._size = (slots, groups, rows), W.size
        self._monomial_bytes = 8.0 * self._v.shape[1] * levels.shape[2] * (rows // b) * _circulant.pitch_of(b)
        self._product = _family.Product(transforms, (q, k), W, of_levels, nonzero, by_row, problem.threads)

    def forward(self, polynomials: Sequence[Polynomial]) -> np.ndarray:
        """(H, G, columns, n): sum_j p(s_ij) exp(b_{j-i}) v_j, with one p for all slots, which share W."""
        H, G, n, _ = self._problem.q.shape
        p = polynomials[0]
        lists, parts = self._lists(p.degree, 1)
        v, size = _of_one_size(self._v, np.ones(1))
        sums = self._product.forward(lists, parts, v, np.array(p.coefficients))
        return (sums.reshape(H, G, *sums.shape[2:]) * size[:, None])[:, :, : self._columns, :n]

    def backward(
        self, polynomials: Sequence[Polynomial], grad: np.ndarray, want_dsymbol: bool
    ) -> tuple[np.ndarray | None, ...]:
        """The adjoint for grad (H, G, columns, n): dq (H, G, d, n), dk (H, d, n_k), both of the features of an
        antiderivative of p, dv (H, columns, n_k), dsymbol (H, G or 1, n + n_k - 1) or None, and dfamily (|S|, n + n_k
        - 1), also where W is 0.
        """
        problem = self._problem
        (H, G, n, d), (_, n_k, _), C = problem.q.shape, problem.k.shape, grad.shape[2]
        p = polynomials[0]
        raised = antiderivative(p)
        weights = np.zeros(len(raised))
        weights[: len(p.coefficients)] = p.coefficients
        lists, parts = self._lists(len(raised) - 1, 2)
        # dv has columns of its own, all else are sums over columns. So gradients are transformed as columns of one
        # size, and values take their sizes: what rounding mixes is then small beside the largest term of a sum. What is
        # transformed of a row is its gradient times its gain, and may be smaller by 30 powers of ten.
        gain = np.ones(1) if self._largest_gain is None else self._largest_gain[:, None]
        one_size, size = _of_one_size(np.moveaxis(grad, 1, 2).reshape(H, C, -1), gain)
        given = np.zeros((H, G, self._v.shape[1], self._product_shape[2]))
        given[:, :, :C, :n] = np.moveaxis(one_size.reshape(H, C, G, n), 2, 1)
        given = given.reshape(*self._product_shape[:2], *given.shape[2:])
        v = self._v.copy()
        v[:, :C] *= size
        lanes = min(parts * len(given), max(2, int(_LANE_BYTES / (8 * self._size))))
        dq, dk, dv, dsymbol, dW = self._product.backward(
            lists, parts, lanes, v, (weights, np.array(raised)), given, want_dsymbol
        )
        dq, dk = dq.reshape(H, G, d, -1)[..., :n], dk.reshape(H, -1, *dk.shape[1:]).sum(axis=1)[..., :n_k]
        dv = dv.reshape(H, -1, *dv.shape[1:]).sum(axis=1)[:, :C, :n_k] * size
        if dsymbol is not None:
            dsymbol = dsymbol[:, self._offsets].reshape(H, self._alone, -1)[..., ::-1]
        return dq, dk, dv, dsymbol, self._weight * dW[:, self._offsets]

    def _lists(self, degree: int, arrays: int) -> tuple[Lists, int]:
        """The lists up to a degree, and the number of parts that their batches are cut into. Both follow from shapes,
        never from the number of threads.
        """
        pairs = _pairs(self._support, self._used, degree, arrays > 1)
        monomials, slots = len(pairs), self._product_shape[0]
        parts = min(-(-_PARTS // slots), monomials)
        most = max(1, int(_BATCH_BYTES / (arrays * self._monomial_bytes)))
        count = parts * -(-monomials // (parts * most))
        return _lists(pairs, self._support, self._used, degree, count), parts


def _of_one_size(columns: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns (..., n) whose products with weights (..., n) have Euclidean norms in [1, 2), and the powers of two,
    (..., 1), that make them what was given.

    A transform rounds a column by what its norm is, and by that of the column that it is transformed with. Where the
    product is 0 the size is 0 too, so that nothing is made of it.
    """
    weighted = columns * weights
    powers = np.frexp(np.abs(weighted).max(axis=-1, keepdims=True))[1] - 1
    # Powers of two are taken first, so that squares do not overflow.
    norms = np.linalg.norm(np.ldexp(weighted, -powers), axis=-1, keepdims=True)
    powers += np.frexp(norms)[1] - 1
    return np.ldexp(columns, -powers), np.where(norms > 0, np.ldexp(1.0, powers), 0)


def operations(problem: Outline, degree: int, b: int, near: float, grad: bool) -> float:
    """The number of operations of transforms, 5 N log2 N for a length of N, that take as long as all work on one level,
    of whose blocks the share `near` is not 0.
    """
    H, G, n, n_k, d, d_v = problem.sizes
    query_blocks, key_blocks, slots = -(-n // b), -(-n_k // b), _slots(problem)
    blocks, products = near * (query_blocks + key_blocks - 1), near * query_blocks * key_blocks
    columns, parts = d_v // 2 + 1, -(-_PARTS // slots)
    support, entries = _support(problem), tuple(problem.family.used)

    def work(degree: int, passes: int) -> float:
        monomials, pairs, beside, multisets = _counts(support, entries, degree, passes > 1)
        batches = max(parts, monomials * passes * 32.0 * columns * query_blocks * b / _BATCH_BYTES)
        keys = min(pairs + beside, monomials * min(batches, monomials))
        transforms = 2 * passes * columns * (monomials * query_blocks + keys * key_blocks)
        transforms += (passes * pairs + beside) * blocks
        mixed = ((2 * passes - 1) * pairs + beside) * columns * products
        symbols = passes * multisets * degree * (blocks + 1)
        copied = 8000 * H * (G * n + n_k) * (d + d_v) + 600 * len(support) * (n + n_k)
        return slots * b * (transforms * 5 * math.log2(b) + 12 * mixed + 8 * symbols) + copied

    return _LISTS + work(degree, 1) + (work(degree + 1, 2) if grad else 0)


def memory(problem: Outline, degree: int, b: int, grad: bool) -> float:
    """The bytes that one level takes beyond inputs and outputs."""
    H, G, n, n_k, d, d_v = problem.sizes
    columns = d_v + 2
    rows, keys, entries = -(-n // b) * b, -(-n_k // b) * b, len(problem.family.left)
    slots = _slots(problem)
    parts = -(-_PARTS // slots)
    pitch = _circulant.pitch_of(b) / b
    monomial = pitch * columns * rows * (2 if grad else 1)
    batch = min(max(_BATCH_BYTES / 8, monomial), monomial * (1 + n_features(d, degree + grad) // parts))
    batch += 2 * pitch * columns * keys + (4 * pitch + 4) * (rows + keys) + (G + 4) * rows
    held = H * (G * rows * (d + columns) + 2 * keys * (d + columns)) + (entries + slots) * (rows + keys)
    sums = H * G * rows * columns
    if grad:
        sums = H * G * rows * d + slots * (keys * (d + columns) + rows + keys)
        lanes = min(parts * slots, max(2, _LANE_BYTES / (8.0 * entries * (rows + keys))))
        held += 3 * H * G * rows * columns + (lanes + 1) * entries * (rows + keys)
    # W is copied twice, before there is more.
    copied = 2 * entries * (rows + keys)
    multisets = sum(_multisets(_support(problem), tuple(problem.family.used), degree + grad, grad))
    return 8.0 * (held + max(copied, (parts + 1) * sums + problem.threads * batch)) + _MULTISET_BYTES * multisets


def _slots(problem: Outline) -> int:
    """How many T there are for each pair of monomials: heads of a group that have biases of their own do not share one.
    """
    H, G = problem.sizes[:2]
    return H * (G if problem.bias is not None and problem.bias.shape[1] > 1 else 1)


def _support(problem: Outline) -> tuple[tuple[int, int], ...]:
    """The pairs (a, b) of the family's support."""
    return tuple(zip(problem.family.left.tolist(), problem.family.right.tolist(), strict=True))


@lru_cache(maxsize=64)
def _counts(
    support: tuple[tuple[int, int], ...], entries: tuple[int, ...], degree: int, beside: bool
) -> tuple[int, int, int, int]:
    """How many of each there are in `_pairs`: monomials of queries; pairs with a multiset whose entries are all used;
    other pairs; and multisets. Where there are many multisets, these are upper bounds.
    """
    multisets, others = _multisets(support, entries, degree, beside)
    if multisets + others <= _COUNTED:
        unused = set(range(len(support))) - set(entries)
        pairs = [pair for own in _pairs(support, entries, degree, beside) for pair in own]
        known = sum(any(not unused.intersection(m) for m, _ in pair.multisets) for pair in pairs)
        return len({pair.a for pair in pairs}), known, len(pairs) - known, multisets + others
    lefts, rights = len({a for a, _ in support}), len({b for _, b in support})
    most = sum(math.comb(lefts + s - 1, s) * math.comb(rights + s - 1, s) for s in range(degree + 1))
    known = min(multisets, most)
    return min(n_features(lefts, degree), most), known, min(others, most - known), multisets + others


def _multisets(
    support: tuple[tuple[int, int], ...], entries: tuple[int, ...], degree: int, beside: bool
) -> tuple[int, int]:
    """The number of multisets of used entries, and with `beside` of those that have one more entry, which is 0
    everywhere.
    """
    others = (len(support) - len(entries)) * n_features(len(entries), degree - 1) if beside and degree else 0
    return n_features(len(entries), degree), others


def _lists(
    pairs: list[list[Pair]], support: tuple[tuple[int, int], ...], entries: tuple[int, ...], degree: int, batches: int
) -> Lists:
    """The pairs of `_pairs` as lists, their monomials of queries cut into so many batches."""
    unused = set(range(len(support))) - set(entries)
    starts = len(pairs) * np.arange(batches + 1) // batches
    key_start, pair_start, multiset_start, multiset_end = [0], [0], [0], []
    keys, partner, multisets, multinomial = [], [], [], []
    for first, last in pairwise(starts.tolist()):
        partners: dict[tuple[int, ...], list[tuple[int, Pair]]] = {}
        for at in range(first, last):
            for pair in pairs[at]:
                partners.setdefault(pair.b, []).append((at, pair))
        for b, found in partners.items():
            keys.append(b)
            for at, pair in found:
                partner.append(at)
                known = [m for m in pair.multisets if not unused.intersection(m[0])]
                multiset_end.append(len(multisets) + len(known))
                for multiset, factor in known + [m for m in pair.multisets if unused.intersection(m[0])]:
                    multisets.append(multiset)
                    multinomial.append(factor)
                multiset_start.append(len(multisets))
            pair_start.append(len(partner))
        key_start.append(len(keys))

    def padded(rows: list[tuple[int, ...]], fill: int) -> np.ndarray:
        return np.array([row + (fill,) * (max(1, degree) - len(row)) for row in rows], np.intp)

    own = [own[0].a for own in pairs]
    return Lists(
        *(np.array(X, np.intp) for X in (starts, key_start, pair_start, partner, multiset_start, multiset_end)),
        query_degree=np.array([len(a) for a in own], np.intp),
        key_degree=np.array([len(b) for b in keys], np.intp),
        query_variables=padded(own, 0),
        key_variables=padded(keys, 0),
        entries=padded(multisets, -1),
        multinomial=np.array(multinomial),
    )


@kept_below(lambda *which: sum(_multisets(*which)))
def _pairs(
    support: tuple[tuple[int, int], ...], entries: tuple[int, ...], degree: int, beside: bool
) -> list[list[Pair]]:
    """All pairs of monomials that multisets of at most `degree` used entries give, grouped by the monomial of queries.
    With `beside` those multisets too in which one entry of the support is 0 everywhere.
    """
    found: dict[tuple, list[tuple[tuple[int, ...], float]]] = {}

    def add(multiset: tuple[int, ...], multinomial: float) -> None:
        ends = zip(*(support[entry] for entry in multiset), strict=True)
        a, b = (tuple(sorted(end)) for end in ends) if multiset else ((), ())
        found.setdefault((a, b), []).append((multiset, multinomial))

    others = [entry for entry in range(len(support)) if entry not in set(entries)] if beside else []
    # A multiset that may grow, the place of its last entry in `entries`, and its multinomial |m|! / m!.
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
    # Sorted by degree, since only monomials of one degree are partners; the largest degree, with the most work, first.
    for (a, b), multisets in sorted(found.items(), key=lambda pair: (-len(pair[0][0]), pair[0])):
        grouped.setdefault(a, []).append(Pair(a, b, tuple(multisets)))
    return list(grouped.values())
