"""The sums over keys of weights times values where all monomials share one T, and their adjoint."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np

from ...approximation.minimax import Polynomial, antiderivative, n_features
from ...certify.scores import Scores
from ...kernels import _circulant, _toeplitz
from ...kernels._fftw import ComplexFFT, RealFFT
from ...problem.problem import Problem
from ..kept import kept_below
from .blocks import parts, round_up
from .cost import transform_operations
from .symbol import Symbol

# FFTW measures its plans where a pass does at least so many operations for each row of a block. Measuring takes 0.2 s
# for a length of 2^10 and 0.7 s for 2^13, once a process, and makes transforms of these lengths 1.2 and 2.2 times as
# fast.
_WORTH_MEASURING = 4e5


class Shared:
    """The sums over keys of weights times values, and their adjoint, with one T for all monomials.

    Each slot has a polynomial of its own; all are of one degree.
    """

    def __init__(self, problem: Problem, scores: Scores, values: np.ndarray, symbol: Symbol, degree: int) -> None:
        self._problem, self._symbol = problem, symbol
        # The transforms of a slot do not depend on how many are computed together.
        work = transform_operations(problem, degree, symbol.block, False) * problem.cut_for / problem.sizes.H
        self._fft, self._symbol_fft = plans(symbol.block, work)
        self._operands = _operands(problem, scores, values, symbol, self._symbol_fft)

    def forward(self, polynomials: Sequence[Polynomial]) -> np.ndarray:
        """sum_j p(s_ij) t_{j-i} v_j for every column of values, (H, G, columns, n)."""
        degree = max(1, polynomials[0].degree)
        weights = _padded((p.coefficients for p in polynomials), degree)
        return self._product(degree).forward(weights)[..., : self._problem.q.shape[2]]

    def backward(
        self, polynomials: Sequence[Polynomial], grad: np.ndarray, want_dsymbol: bool
    ) -> tuple[np.ndarray | None, ...]:
        """The gradients of ``<grad, sums>`` for grad (H, G, columns, n): dq (H, G, d, n), dk (H, d, n_k), dv (H,
        columns, n_k), and where it is wanted that of the bias, (H, G or 1, n + n_k - 1), else None.
        """
        n, n_k, degree = self._problem.q.shape[2], self._problem.k.shape[1], max(1, polynomials[0].degree) + 1
        padded = np.zeros((*grad.shape[:-1], self._operands[0].shape[-1]))
        padded[..., :n] = grad
        weights = _padded((p.coefficients for p in polynomials), degree)
        raised = _padded((antiderivative(p) for p in polynomials), degree)
        dq, dk, dv, correlations = self._product(degree).backward(weights, raised, padded, want_dsymbol)
        dsymbol = None
        if correlations is not None:
            nonzero, threads = self._operands[4], self._problem.threads
            dsymbol = _symbol_gradient(self._symbol, self._symbol_fft, nonzero, correlations, n, n_k, threads)
        return dq[..., :n], dk[..., :n_k], dv[..., :n_k], dsymbol

    def _product(self, degree: int) -> _toeplitz.Product:
        problem, operands = self._problem, self._operands
        count = parts(problem, degree, operands[0].shape[-1], operands[1].shape[-1])
        return _toeplitz.Product(self._fft, operands, _pairs(problem.sizes.d, degree), count, problem.threads)


def _operands(problem: Problem, scores: Scores, values: np.ndarray, symbol: Symbol, fft: RealFFT) -> tuple:
    """The operands of `_toeplitz.Product`: q, k and v as columns, the spectra of T, which of its blocks are not 0, and
    the factors of levels.
    """
    H, G, n, d = problem.q.shape
    n_k = problem.k.shape[1]
    rows, keys = round_up(n, symbol.block), round_up(n_k, symbol.block)
    q, k, v = np.zeros((H, G, d, rows)), np.zeros((H, d, keys)), np.zeros((*values.shape[:2], keys))
    q_factor, k_factor = scores.q_factor[:, None, None, None], scores.k_factor[:, None, None]
    np.multiply(problem.q.swapaxes(-1, -2), q_factor, out=q[..., :n], dtype=np.float64)
    centre = 0 if scores.centre is None else scores.centre.astype(np.float64)[:, :, None]
    np.subtract(problem.k.swapaxes(-1, -2), centre, out=k[..., :n_k], dtype=np.float64)
    k[..., :n_k] *= k_factor
    v[..., :n_k] = values
    if problem.mask.kept is not None:
        k[..., :n_k] *= problem.mask.kept[:, None]

    nonzero, spectra = _spectra(symbol, fft, n, n_k, problem.threads)
    gain = None
    if symbol.unseen > 1:
        gain = np.zeros((H, G, symbol.unseen, rows))
        gain[..., :n] = symbol.gain
    return q, k, v, spectra, nonzero, gain


def _spectra(symbol: Symbol, fft: RealFFT, n: int, n_k: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of T have an entry that is not 0, and the spectra of all blocks as `_toeplitz.Product` takes them.
    """
    *lead, levels, _ = symbol.levels.shape
    t = np.zeros((math.prod(lead), levels, round_up(n, symbol.block) + round_up(n_k, symbol.block)))
    t.reshape(*lead, levels, -1)[..., _offsets(symbol, n, n_k)] = symbol.levels[..., ::-1]
    nonzero, spectra = _circulant.spectra(fft, t, threads)
    return nonzero, spectra.reshape(*lead, *spectra.shape[1:])


def _offsets(symbol: Symbol, n: int, n_k: int) -> slice:
    """Where the offsets that occur stand in an array over i - j that begins with whole blocks of keys."""
    first = round_up(n_k, symbol.block) - (n_k - 1)
    return slice(first, first + n + n_k - 1)


def _symbol_gradient(
    symbol: Symbol, fft: RealFFT, nonzero: np.ndarray, correlations: np.ndarray, n: int, n_k: int, threads: int
) -> np.ndarray:
    """The gradient of the bias: t_m times the correlations at the offset m, summed over levels and blocks, (H, G, n +
    n_k - 1).
    """
    H, G, levels = correlations.shape[:3]
    t = _circulant.spectra_adjoint(fft, nonzero, correlations.reshape(H * G, *correlations.shape[2:]), threads)
    return (symbol.levels * t.reshape(H, G, levels, -1)[..., _offsets(symbol, n, n_k)][..., ::-1]).sum(axis=2)


def _padded(coefficients: Iterable[Sequence[float]], degree: int) -> np.ndarray:
    """The coefficients of each slot's polynomial, (H, degree + 1), with zeros for those that are missing."""
    return np.array([(*own, *[0.0] * (degree + 1 - len(own))) for own in coefficients])


@kept_below(lambda d, degree: n_features(d, degree) * (degree + 2))
def _pairs(d: int, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All monomials by degree, in pairs: their degrees, variables and factors sqrt(|a|! / a!) as `_toeplitz.Product`
    takes them.

    Two monomials share a transform, so rounding mixes them. Queries and keys each take the root of |a|! / a!, for then
    the sums of squares over the monomials of degree s are ||q||^{2s} and ||k||^{2s}, and the bound on the rounding of
    one monomial holds for a pair too.
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


def plans(block: int, operations: float) -> tuple[ComplexFFT, RealFFT]:
    """The transforms of the quarters that the spectra of columns are cut into, and of the blocks of T. FFTW measures
    the former where a pass does so many operations that it pays.
    """
    return _transforms(block, operations > _WORTH_MEASURING * block)


@lru_cache(maxsize=32)
def _transforms(block: int, measured: bool) -> tuple[ComplexFFT, RealFFT]:
    """As `plans`, kept for the next call of the same block size."""
    return _measured(block // 2) if measured else ComplexFFT(block // 2), RealFFT(2 * block)


def _measured(n: int) -> ComplexFFT:
    """A transform whose plan FFTW has measured.

    FFTW cannot be stopped while it measures, which takes seconds, and more on a busy machine. So a daemon thread does
    it, and Ctrl-C ends the wait for that thread.
    """
    found: Future[ComplexFFT] = Future()

    def measure() -> None:
        try:
            found.set_result(ComplexFFT(n, flags="measure"))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=measure, daemon=True).start()
    return found.result()
