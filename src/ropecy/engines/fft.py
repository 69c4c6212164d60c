"""Polynomial attention where positions don't factor: ``p(s) t_{j-i} = sum_a w_a q^a T k^a`` with T = (t_{j-i}), by FFT.

The algorithm of arXiv:2412.17316 and arXiv:2505.11892 proper: each monomial is a Toeplitz matrix between two diagonal
ones. Rotations factor, so with rotated rows all monomials share one T, which holds the band and the bias, ``t_m =
exp(b_m)`` where a row may see the offset m. The gradient of the bias, not in the papers, is a correlation. What a
family W_{i-j} multiplies T with differs from monomial to monomial: `family_fft`.

The error of a transform is absolute, a few units times the norm of its whole input. Hence float64 for float32 data too;
and a bias that spreads over many nats is cut into levels, so that rows which see none of the large weights are not
drowned by what rounding makes of these. Rows for which even that is too little are computed by the exact engine.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np

from ..approximation.minimax import Polynomial, antiderivative, n_features
from ..bounds import Scores, Values, largest_entries, medians, moved
from ..kernels import _circulant, _toeplitz
from ..kernels._fftw import ComplexFFT, RealFFT
from ..problem import Problem
from . import exact, family_fft
from ._kept import kept_below

# A bias of this spread, in nats, is one level; else a level spans LEVEL, and there are at most MOST_LEVELS.
_SPREAD = 14.0
_LEVEL = 12.0
_MOST_LEVELS = 6
# |error| <= _NOISE u log2(length) ||t||_2 ||x||_2 of a product by transforms; 0.33 was the largest seen.
_NOISE = 0.5
_UNIT = 2.0**-53
_PARTS = 8
_PART_BYTES = 512 * 2**20
# Operations of a pass, for each row of a block, from which plans are measured. That takes 0.2 s at a length of 2^10 and
# 0.7 s at 2^13, once a process, and makes transforms of these 1.2 and 2.2 times as fast.
_WORTH_MEASURING = 4e5
# What an operation of a transform costs, in the operations of the exact engine's products; and how many of a transform
# a row takes beside them: what is measured, centred and copied.
_SLOWNESS = {"float32": 8.0, "float64": 4.0}
_ROW = 3000.0
_SLOWNESS_FAMILY = {"float32": 5.5, "float64": 3.2}


@dataclass(slots=True)
class Symbol:
    """T, cut into levels, and what its rows can be promised.

    Attributes
    ----------
    peak : (H or 1, G or 1) array
        max_m b_m; T is exp(b - peak).
    levels : (H or 1, G or 1, levels, n + n_k - 1) array
        t_m exp(12 l) at index m + n - 1, where level l holds m, else 0.
    top : (H or 1, G or 1, n) int array
        The first level of which a row sees an entry; `unseen` where there is no key.
    exact_rows : list of (int, int)
        Runs of rows that the exact engine computes.
    rounding : float
        What transforms do to all other rows at most, in units of range(V).
    block : int
        b: T is applied in blocks of b x b.
    """

    peak: np.ndarray
    levels: np.ndarray
    top: np.ndarray
    exact_rows: list[tuple[int, int]]
    rounding: float
    block: int

    @property
    def unseen(self) -> int:
        """What `top` has where a row sees no key."""
        return self.levels.shape[2]

    @property
    def gain(self) -> np.ndarray | None:
        """What each level is multiplied with in each row, (H or 1, G or 1, levels, n); None for ones."""
        if self.unseen == 1:
            return None
        levels = np.arange(self.unseen)[:, None]
        return np.where(levels >= self.top[:, :, None], np.exp(-_LEVEL * levels), 0)


@dataclass(slots=True)
class Saved:
    """What backward needs of forward."""

    product: Shared | family_fft.Product
    symbol: Symbol
    p: Polynomial
    scores: Scores
    centred: np.ndarray
    inverse: np.ndarray
    exact: list[tuple[Problem, exact.Saved]]


def unsupported(problem: Problem) -> str | None:
    """What of the problem this engine doesn't do, or None."""
    return "a near field" if problem.near is not None else None


def terms(problem: Problem) -> int:
    """How many products a score is the sum of: monomials are those of so many variables."""
    return problem.q.shape[-1] if problem.family is None else max(1, len(family_fft.used(problem)))


def base_rounding(problem: Problem, scores: Scores, values: Values) -> float:
    """Rounding beside that of the transforms: monomials that cancel, in float64, storing O in its dtype, and what
    scores carry of projections and rotations.
    """
    stored = float(np.finfo(problem.q.dtype).eps) * (1 + values.offset)
    # What is added up in a family's scores may pass the scores themselves.
    largest = scores.bound if problem.family is None else abs(problem.scale) * largest_entries(problem)
    return stored + moved(problem, scores.lost) + _UNIT * (12 + 4 * math.exp(min(scores.bound + largest, 700)))


def survey(problem: Problem, p: Polynomial, allowance: float) -> Symbol:
    """Cut T into levels, and find the rows whose rounding passes the allowance.

    Notes
    -----
    The error of a row's sums is at most ``K u log2(2b) sum_l exp(-12 l) ||t_l||_2 sqrt(n_k) sum_t |c_t| B^t``, over the
    levels l from its first one on, and its denominator at least ``min p`` times what it sees of that level. A family
    has as many T_ab as pairs of monomials, with ``||T_ab||_2 <= ||t_l||_2`` times what |W| makes of a pair at most, so
    that q^a, T_ab and k^b add up to no more than `family_fft.absolute_sum`; and what a transform takes is larger than
    the column by `family_fft.TOGETHER`. Time O(n log n) for each bias.
    """
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    offset = np.arange(n + n_k - 1) - (n - 1) - problem.q_offset
    allowed = np.ones(n + n_k - 1, bool)
    if problem.lo is not None:
        allowed &= offset >= problem.lo
    if problem.hi is not None:
        allowed &= offset <= problem.hi
    bias = np.zeros((1, 1, n + n_k - 1)) if problem.bias is None else problem.bias
    peak = np.where(allowed, bias, -np.inf).max(axis=-1)
    depth = np.where(allowed, peak[..., None] - bias, np.inf)
    block = _block(problem, int(allowed.sum()))
    absolute_sum = p.absolute_sum if problem.family is None else family_fft.absolute_sum(problem, p)

    seen = _row_sums(np.broadcast_to(allowed.astype(float), depth.shape), problem.key_mask, n) > 0.5
    spread = float(depth[np.isfinite(depth)].max())
    levels, tops = [], np.full(seen.shape, -1)
    floor = np.zeros(seen.shape)
    for level in range(1 if spread <= _SPREAD else _MOST_LEVELS):
        start = _LEVEL * level
        end = start + (_SPREAD + 1 if spread <= _SPREAD else _LEVEL)
        with np.errstate(under="ignore"):
            t = np.where((depth >= start) & (depth < end), np.exp(np.minimum(start - depth, 0)), 0)
        levels.append(t)
        sums = _row_sums(t, problem.key_mask, n)
        new = (tops < 0) & (sums > 0.5 * math.exp(start - end))
        tops[new], floor[new] = level, sums[new]
        if np.all((tops >= 0) | ~seen):
            break
    if spread > _SPREAD:
        # Nothing lies deeper that a row needs by itself, so the last level takes all that is left.
        start = _LEVEL * (len(levels) - 1)
        with np.errstate(under="ignore"):
            levels[-1] = np.where(depth >= start, np.exp(np.minimum(start - depth, 0)), 0)
    t = np.stack(levels, axis=2)

    keys = min(n_k, int(allowed.sum()) + 2 * block)
    if problem.family is not None:
        # The size of a column is that of all its keys, seen or not.
        keys, absolute_sum = n_k, absolute_sum * family_fft.TOGETHER
    noise = _NOISE * _UNIT * math.log2(2 * block) * math.sqrt(keys) * absolute_sum
    # In units of the level where a row begins, every later level counts exp(-12) of the one before.
    norms = np.sqrt((t * t).sum(axis=-1))
    for level in range(len(levels) - 2, -1, -1):
        norms[..., level] += math.exp(-_LEVEL) * norms[..., level + 1]
    reach = np.broadcast_to(norms[..., None, :], tops.shape + norms.shape[-1:])
    error = noise * np.take_along_axis(reach, np.maximum(tops, 0)[..., None], axis=-1)[..., 0]
    least = math.exp(-p.B) * (1 - min(p.error, 0.5))
    error = np.divide(error, floor * least, out=np.full(tops.shape, np.inf), where=tops >= 0)
    error[~seen] = 0
    failing = error > allowance
    runs = _runs(failing.any(axis=(0, 1)), max(16, n // 64))
    for first, last in runs:
        error[..., first:last] = 0
    return Symbol(
        peak=peak,
        levels=t,
        top=np.where(seen, np.maximum(tops, 0), len(levels)),
        exact_rows=runs,
        rounding=float(error.max(initial=0)),
        block=block,
    )


def forward(
    problem: Problem, scores: Scores, p: Polynomial, symbol: Symbol, want_lse: bool
) -> tuple[np.ndarray, np.ndarray | None, Saved]:
    """O (H, G, n, d_v), lse float64 or None, and what backward needs.

    Parameters
    ----------
    problem : Problem
    scores : Scores
        Centre and sizes of q and k, so that all scores are within ``[-p.B, p.B]``.
    p : Polynomial
    symbol : Symbol
        `survey` of the problem.
    want_lse : bool

    Notes
    -----
    Time: 2 F (d_v + 1) complex transforms of n numbers, forth and back, F = C(d + g, g), in blocks. Memory: columns of
    q, k, v in float64, the spectrum of T, and for each thread a few columns and spectra; nothing of F n.
    """
    H, G, n, _ = problem.q.shape
    # Taken from v and given back to O, for the error of a transform is as large as what it is given.
    middle = medians(problem)
    values = _centred(problem, middle)
    if problem.family is None:
        product = Shared(problem, scores, values, symbol, p)
    else:
        work = family_fft.operations(problem, p.degree, symbol.block, _near(problem, symbol.block), False)
        transforms = _transforms(symbol.block, work > _WORTH_MEASURING * symbol.block)
        product = family_fft.Product(problem, scores, values, symbol.levels, symbol.gain, symbol.block, transforms)
    sums = product.forward(p)
    plain = np.broadcast_to(symbol.top < symbol.unseen, (H, G, n)).copy()
    for first, last in symbol.exact_rows:
        plain[..., first:last] = False
    denominators = np.where(plain, sums[:, :, -1], 1)
    inverse = np.where(plain, 1 / denominators, 0)
    centred = sums[:, :, :-1] * inverse[:, :, None]
    o = centred + middle[:, None, :, None] * plain[:, :, None]
    o = np.ascontiguousarray(o.swapaxes(-1, -2).astype(problem.q.dtype))
    lse = None
    if want_lse:
        shift = symbol.peak[..., None]
        if scores.centre is not None:
            shift = shift + problem.scale * np.einsum(
                "hgna,ha->hgn", problem.q, scores.centre.astype(np.float64), dtype=np.float64
            )
        lse = np.where(plain, np.log(denominators) + shift, -np.inf)
    saved = Saved(product, symbol, p, scores, centred, inverse, [])
    for first, last in symbol.exact_rows:
        part = _rows(problem, first, last)
        o_part, lse_part, saved_part = exact.forward(part, scores.plain, want_lse)
        o[:, :, first:last] = o_part
        if want_lse:
            lse[:, :, first:last] = lse_part
        saved.exact.append((part, saved_part))
    return o, lse, saved


def backward(problem: Problem, saved: Saved, do: np.ndarray):
    """dq, dk, dv of ``<do, O>``, and the gradient of the bias, (H, G, n + n_k - 1) or (H, 1, ...) where a group shares
    it; None where there is none; and that of the family where there is one, (|S|, n + n_k - 1).

    Notes
    -----
    With dN = [do, -<do, o>] / den: dphi_a(q) = sum_c dN_c T (k^a v_c), dphi_a(k) = sum_c v_c T^T (q^a dN_c),
    dv_c = sum_a w_a k^a T^T (q^a dN_c), and the gradient of b_m is t_m times what correlation finds of q^a dN_c and
    k^a v_c at the offset m. The features of dq and dk are those of an antiderivative of p, one degree more, so that
    pairs have the weights p(s_ij) t_{j-i} / den_i there too. Two pairs of transforms for each monomial and column.
    """
    H, G, n, _ = problem.q.shape
    p, symbol = saved.p, saved.symbol
    grad = np.zeros((H, G, problem.v.shape[2] + 1, n))
    upstream = do.astype(np.float64).swapaxes(-1, -2)
    grad[:, :, :-1] = upstream * saved.inverse[:, :, None]
    grad[:, :, -1] = -(upstream * saved.centred).sum(axis=2) * saved.inverse
    dq, dk, dv, dsymbol, *dfamily = saved.product.backward(p, grad, problem.bias is not None)
    n_k, dtype = problem.k.shape[1], problem.q.dtype
    dq = np.ascontiguousarray((saved.scores.q_factor[:, None, None, None] * dq).swapaxes(-1, -2).astype(dtype))
    dk = np.ascontiguousarray((saved.scores.k_factor[:, None, None] * dk).swapaxes(-1, -2).astype(dtype))
    dv = np.ascontiguousarray(dv[:, :-1].swapaxes(-1, -2).astype(dtype))
    if problem.key_mask is not None:
        dv[~problem.key_mask] = 0
        # Transforms leave rounding at offsets at which every key is hidden.
        hidden = ~_kept_at(problem.key_mask, n)
        if dsymbol is not None:
            np.copyto(dsymbol, 0, where=hidden[:, None])
        for total in dfamily:
            # In order of i - j.
            np.copyto(total, 0, where=hidden.all(axis=0)[::-1])
    for (first, last), (part, saved_part) in zip(symbol.exact_rows, saved.exact, strict=True):
        dq_part, dk_part, dv_part, dsymbol_part, *dfamily_part = exact.backward(
            part, saved_part, np.ascontiguousarray(do[:, :, first:last])
        )
        dq[:, :, first:last] = dq_part
        dk += dk_part
        dv += dv_part
        if dsymbol is not None:
            own = dsymbol_part if dsymbol.shape[1] > 1 else dsymbol_part.sum(axis=1, keepdims=True)
            dsymbol[..., n - last : n - first + n_k - 1] += own
        for total, own in zip(dfamily, dfamily_part, strict=True):
            total[:, first : last + n_k - 1] += own
    return dq, dk, dv, dsymbol, *dfamily


def operations(problem: Problem, degree: int, grad: bool) -> float:
    """Multiply-adds times 2 of forward, and of backward where grad, as the exact engine's products count them; without
    rows that are computed exactly.
    """
    block = _block(problem, _band(problem))
    if problem.family is not None:
        return _SLOWNESS_FAMILY[problem.q.dtype.name] * family_fft.operations(
            problem, degree, block, _near(problem, block), grad
        )
    rows = problem.k.shape[0] * (problem.q.shape[1] * problem.q.shape[2] + problem.k.shape[1])
    return _SLOWNESS[problem.q.dtype.name] * (_transform_operations(problem, degree, block, grad) + _ROW * rows)


def memory(problem: Problem, degree: int, grad: bool) -> float:
    """Bytes beyond inputs and outputs."""
    H, G, n, d = problem.q.shape
    n_k, columns = problem.k.shape[1], problem.v.shape[2] + 1
    block = _block(problem, _band(problem))
    if problem.family is not None:
        return family_fft.memory(problem, degree, block, grad)
    rows, keys = _round_up(n, block), _round_up(n_k, block)
    symbols, own = (1, 1) if problem.bias is None else (math.prod(problem.bias.shape[:2]), problem.bias.shape[1])
    # A spectrum takes 4 numbers for each entry of a column.
    spectra = 4.0 * (rows + keys) * symbols
    passing = 4 * max(own * rows, keys) + (4 * max(G * rows, keys) if grad else 0)
    columns_at_hand = 2 * (G * rows + keys) * (2 if grad else 1)
    workspaces = problem.threads * float(passing + columns_at_hand)
    sums = _part_size(problem, rows, keys, grad) * _parts(problem, degree, rows, keys)
    held = H * G * rows * (d + columns * (2 if grad else 1)) + H * keys * (d + columns)
    return 8.0 * (held + 2 * spectra + workspaces + sums)


def _band(problem: Problem) -> int:
    """How many offsets the band allows."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    first, last = -(n - 1) - problem.q_offset, n_k - 1 - problem.q_offset
    low = first if problem.lo is None else max(first, problem.lo)
    high = last if problem.hi is None else min(last, problem.hi)
    return max(1, high - low + 1)


def _near(problem: Problem, block: int) -> float:
    """Which part of the blocks of T the band meets."""
    blocks = -(-problem.q.shape[2] // block) - (-problem.k.shape[1] // block) - 1
    return min(1.0, (_band(problem) / block + 1) / blocks)


def _block(problem: Problem, band: int) -> int:
    """Rows of a block of T: powers of two, so that few plans are made. A narrow band takes small ones; and where each
    product takes a transform of its own T, fewer blocks are faster.
    """
    longest = max(problem.q.shape[2], problem.k.shape[1])
    block = 1 << max(5, (longest - 1).bit_length())
    if longest > 2048:
        block = min(max(1024, block // (8 if problem.family is None else 4)), 32768)
    return min(block, max(256, 1 << (4 * band - 1).bit_length()))


def _transform_operations(problem: Problem, degree: int, block: int, grad: bool) -> float:
    """Operations of transforms, 5 N log2 N each, and of the products of spectra between them, for one level."""
    H, G, n, d = problem.q.shape
    columns = problem.v.shape[2] + 1
    query_blocks, key_blocks = _round_up(n, block) // block, _round_up(problem.k.shape[1], block) // block
    near = _near(problem, block)
    # Of a column, which is half of a complex one.
    one = 5.0 * block * math.log2(block) + 6.0 * block
    own = G if problem.bias is not None and problem.bias.shape[1] > 1 else 1
    passes = (own * query_blocks + key_blocks) * one + own * query_blocks * key_blocks * near * 6 * block
    total = n_features(d, degree) * columns * H * passes
    if grad:
        back = (key_blocks * 2 + (own + G) * query_blocks) * one
        back += (own + G + (G if problem.bias is not None else 0)) * query_blocks * key_blocks * near * 6 * block
        total += n_features(d, degree + 1) * columns * H * back
    return total


@lru_cache(maxsize=32)
def _transforms(block: int, measured: bool) -> tuple[ComplexFFT, RealFFT]:
    """Of the quarters that spectra of columns are cut into, and of the blocks of T."""
    return _measured(block // 2) if measured else ComplexFFT(block // 2), RealFFT(2 * block)


def _measured(n: int) -> ComplexFFT:
    """A measured plan. FFTW cannot be stopped while it measures, which takes seconds, and more on a busy machine; so a
    thread that nobody need wait for does it, and Ctrl-C ends the wait.
    """
    found: Future[ComplexFFT] = Future()

    def measure() -> None:
        try:
            found.set_result(ComplexFFT(n, flags="measure"))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=measure, daemon=True).start()
    return found.result()


def _centred(problem: Problem, middle: np.ndarray) -> np.ndarray:
    """[v - middle, 1] as columns, (H, d_v + 1, n_k) float64; 0 for keys that are masked."""
    H, n_k, d_v = problem.v.shape
    values = np.ones((H, d_v + 1, n_k))
    np.subtract(problem.v.swapaxes(-1, -2), middle[:, :, None], out=values[:, :-1], dtype=np.float64)
    if problem.key_mask is not None:
        values *= problem.key_mask[:, None]
    return values


class Shared:
    """The sums over keys of weights times values, and their adjoint: one T for all monomials."""

    def __init__(self, problem: Problem, scores: Scores, values: np.ndarray, symbol: Symbol, p: Polynomial) -> None:
        self._problem, self._symbol = problem, symbol
        work = _transform_operations(problem, max(1, p.degree), symbol.block, False)
        self._fft, self._symbol_fft = _transforms(symbol.block, work > _WORTH_MEASURING * symbol.block)
        self._operands = _operands(problem, scores, values, symbol, self._symbol_fft)

    def forward(self, p: Polynomial) -> np.ndarray:
        """(H, G, columns, n): sum_j p(s_ij) t_{j-i} v_j."""
        degree = max(1, p.degree)
        weights = _padded(p.coefficients, degree)
        return self._product(degree).forward(weights)[..., : self._problem.q.shape[2]]

    def backward(self, p: Polynomial, grad: np.ndarray, want_dsymbol: bool) -> tuple[np.ndarray | None, ...]:
        """The adjoint for grad (H, G, columns, n): dq (H, G, d, n), dk (H, d, n_k), dv (H, columns, n_k), dsymbol."""
        n, n_k, degree = self._problem.q.shape[2], self._problem.k.shape[1], max(1, p.degree) + 1
        padded = np.zeros((*grad.shape[:-1], self._operands[0].shape[-1]))
        padded[..., :n] = grad
        dq, dk, dv, correlations = self._product(degree).backward(
            _padded(p.coefficients, degree), _padded(antiderivative(p), degree), padded, want_dsymbol
        )
        dsymbol = None
        if correlations is not None:
            nonzero, threads = self._operands[4], self._problem.threads
            dsymbol = _symbol_gradient(self._symbol, self._symbol_fft, nonzero, correlations, n, n_k, threads)
        return dq[..., :n], dk[..., :n_k], dv[..., :n_k], dsymbol

    def _product(self, degree: int) -> _toeplitz.Product:
        problem, operands = self._problem, self._operands
        parts = _parts(problem, degree, operands[0].shape[-1], operands[1].shape[-1])
        return _toeplitz.Product(self._fft, *operands, *_pairs(problem.q.shape[-1], degree), parts, problem.threads)


def _operands(problem: Problem, scores: Scores, values: np.ndarray, symbol: Symbol, fft: RealFFT) -> tuple:
    """q, k, v as columns, the spectra of T with their mask, and the gain of levels: what `_toeplitz.Product` takes."""
    H, G, n, d = problem.q.shape
    n_k = problem.k.shape[1]
    rows, keys = _round_up(n, symbol.block), _round_up(n_k, symbol.block)
    q, k, v = np.zeros((H, G, d, rows)), np.zeros((H, d, keys)), np.zeros((*values.shape[:2], keys))
    q_factor, k_factor = scores.q_factor[:, None, None, None], scores.k_factor[:, None, None]
    np.multiply(problem.q.swapaxes(-1, -2), q_factor, out=q[..., :n], dtype=np.float64)
    centre = 0 if scores.centre is None else scores.centre.astype(np.float64)[:, :, None]
    np.subtract(problem.k.swapaxes(-1, -2), centre, out=k[..., :n_k], dtype=np.float64)
    k[..., :n_k] *= k_factor
    v[..., :n_k] = values
    if problem.key_mask is not None:
        k[..., :n_k] *= problem.key_mask[:, None]

    nonzero, spectra = _spectra(symbol, fft, n, n_k, problem.threads)
    gain = None
    if symbol.unseen > 1:
        gain = np.zeros((H, G, symbol.unseen, rows))
        gain[..., :n] = symbol.gain
    return q, k, v, spectra, nonzero, gain


def _spectra(symbol: Symbol, fft: RealFFT, n: int, n_k: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of T are not 0, and the spectra of all as `_toeplitz.Product` takes them."""
    *lead, levels, _ = symbol.levels.shape
    t = np.zeros((math.prod(lead), levels, _round_up(n, symbol.block) + _round_up(n_k, symbol.block)))
    t.reshape(*lead, levels, -1)[..., _offsets(symbol, n, n_k)] = symbol.levels[..., ::-1]
    nonzero, spectra = _circulant.spectra(fft, t, threads)
    return nonzero, spectra.reshape(*lead, *spectra.shape[1:])


def _offsets(symbol: Symbol, n: int, n_k: int) -> slice:
    """Where those that occur stand, in order of i - j, from whole blocks of keys below 0 on."""
    first = _round_up(n_k, symbol.block) - (n_k - 1)
    return slice(first, first + n + n_k - 1)


def _symbol_gradient(
    symbol: Symbol, fft: RealFFT, nonzero: np.ndarray, correlations: np.ndarray, n: int, n_k: int, threads: int
) -> np.ndarray:
    """t_m times the correlations at m, levels and blocks added: (H, G, n + n_k - 1)."""
    H, G, levels = correlations.shape[:3]
    t = _circulant.spectra_adjoint(fft, nonzero, correlations.reshape(H * G, *correlations.shape[2:]), threads)
    return (symbol.levels * t.reshape(H, G, levels, -1)[..., _offsets(symbol, n, n_k)][..., ::-1]).sum(axis=2)


def _parts(problem: Problem, degree: int, rows: int, keys: int) -> int:
    """Into how many parts the monomials are cut: by shapes, never by the number of threads."""
    wanted = -(-_PARTS // problem.k.shape[0])
    room = int(_PART_BYTES / (8 * _part_size(problem, rows, keys, True)))
    return max(1, min(wanted, max(2, room), n_features(problem.q.shape[-1], degree) // 2))


def _part_size(problem: Problem, rows: int, keys: int, grad: bool) -> float:
    """Numbers that the sums of a part take."""
    H, G, _, d = problem.q.shape
    columns = problem.v.shape[2] + 1
    if not grad:
        return float(H * G * rows * columns)
    own = 0 if problem.bias is None else problem.bias.shape[1]
    return float(H * (G * rows * d + keys * (d + columns) + 4 * own * (rows + keys)))


def _padded(coefficients: tuple[float, ...], degree: int) -> np.ndarray:
    padded = np.zeros(degree + 1)
    padded[: len(coefficients)] = coefficients
    return padded


@kept_below(lambda d, degree: n_features(d, degree) * (degree + 2))
def _pairs(d: int, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All monomials by degree, two at a time: degrees, variables and sqrt(|a|! / a!), as `_toeplitz.Product` has them.

    With half of |a|! / a! on either side, what rounding mixes of two monomials obeys the bound of each by itself: both
    the columns of queries and those of keys have sums of squares ||q||^{2s} and ||k||^{2s} over the degree s.
    """
    degrees, variables, factors = [], [], []
    for s in range(degree + 1):
        found = list(combinations_with_replacement(range(d), s))
        each = [math.factorial(s) / math.prod(math.factorial(a.count(x)) for x in set(a)) for a in found]
        if len(found) % 2:
            found.append(found[-1])
            each.append(0.0)
        degrees += [s] * (len(found) // 2)
        variables += [a + (0,) * (degree - s) for a in found]
        factors += each
    return (
        np.array(degrees, np.intp),
        np.array(variables, np.intp).reshape(-1, 2, degree),
        np.sqrt(np.array(factors)).reshape(-1, 2),
    )


def _row_sums(t: np.ndarray, key_mask: np.ndarray | None, n: int) -> np.ndarray:
    """sum_j t_{j-i} over the keys that are kept: (H or 1, G or 1, n) of t (H or 1, G or 1, n + n_k - 1)."""
    n_k = t.shape[-1] - n + 1
    if key_mask is None:
        total = np.zeros((*t.shape[:-1], t.shape[-1] + 1))
        np.cumsum(t, axis=-1, out=total[..., 1:])
        return (total[..., n_k:] - total[..., :n])[..., ::-1]
    length = 1 << (t.shape[-1] + n_k - 1).bit_length()
    kept = np.fft.rfft(key_mask[:, None, ::-1].astype(float), length)
    return np.fft.irfft(np.fft.rfft(t, length) * kept, length)[..., n_k - 1 : n_k - 1 + n][..., ::-1]


def _kept_at(key_mask: np.ndarray, n: int) -> np.ndarray:
    """(H, n + n_k - 1): at which offsets j - i, from -(n - 1) on, any of n rows meets a key that is kept."""
    n_k = key_mask.shape[1]
    before = np.pad(np.cumsum(key_mask, axis=1), ((0, 0), (1, 0)))
    at = np.arange(n + n_k - 1)
    return before[:, np.minimum(at + 1, n_k)] > before[:, np.maximum(at - n + 1, 0)]


def _runs(rows: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """[first, last) of the runs of True, those less than a gap apart joined."""
    where = np.flatnonzero(rows)
    if where.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(where) > gap)
    firsts, lasts = where[np.append(0, breaks + 1)], where[np.append(breaks, where.size - 1)]
    return [(int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True)]


def _rows(problem: Problem, first: int, last: int) -> Problem:
    """The problem of the query rows [first, last)."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    bias = problem.bias
    return replace(
        problem,
        q=np.ascontiguousarray(problem.q[:, :, first:last]),
        q_offset=problem.q_offset + first,
        bias=None if bias is None else np.ascontiguousarray(bias[..., n - last : n - first + n_k - 1]),
    )


def _round_up(count: int, block: int) -> int:
    return -(-count // block) * block
