"""What work costs: seconds of the exact and the polynomial engine from their shapes, and bytes of the exact one.

The constants are shipped, for each instruction set and precision, and not measured, so that the same call takes the
same engine, hence gives the same bits, on every run; nor does a choice depend on the number of threads. One factor, of
this machine over the one they were fitted on, is measured once a process, and goes only into the seconds that are told.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .approximation.minimax import n_features
from .engines import exact as exact_engine
from .engines import family as family_engine
from .engines import polynomial as polynomial_engine
from .kernels import _exact
from .memory import fits
from .moments import STEPS, prefixes
from .problem import Problem
from .sample import SAMPLED_KEYS, SAMPLED_ROWS


@dataclass(frozen=True, slots=True)
class Speeds:
    """Nanoseconds of one thread.

    Attributes
    ----------
    product : float
        A multiply-add of a product of matrices, of scores, of values or of monomials with a state.
    pair, pair_grad : float
        What a pair of the exact engine costs beside its products, forward and backward: exp.
    near : float
        Likewise of a pair in a causal chunk of the polynomial engine.
    feature : float
        A monomial of a token, read or differentiated.
    pack : float
        An entry of a state that is laid out for products.
    """

    product: float
    pair: float
    pair_grad: float
    near: float
    feature: float
    pack: float


# Fitted to 128 to 32,768 tokens, d = 8, 16, 64 and degrees 1 to 9, forward and with gradient, causal or not, of one
# thread of an AMD EPYC (Zen 4): v4 in float32 from 512 tokens on within 1.2 times in 95%, the others less closely, down
# to half (`asv run --bench Worst`).
_SPEEDS = {
    ("baseline", "float32"): Speeds(0.059, 1.00, 1.22, 1.36, 0.36, 2.7),
    ("baseline", "float64"): Speeds(0.128, 2.85, 3.73, 3.15, 0.57, 2.9),
    ("v3", "float32"): Speeds(0.0197, 0.33, 0.40, 0.66, 0.14, 2.0),
    ("v3", "float64"): Speeds(0.0423, 0.80, 1.04, 1.14, 0.23, 2.1),
    ("v4", "float32"): Speeds(0.0176, 0.168, 0.61, 0.90, 0.16, 1.7),
    ("v4", "float64"): Speeds(0.041, 0.35, 0.51, 1.08, 0.17, 2.9),
}
_LEVELS = ("baseline", "v3", "v4")
# Seconds, the same on all of them: a call and its gradient, whose time is Python's; what the polynomial engine and the
# fft engine have more of it; an entry of a row of q, k, v, dO that is rotated, measured, copied (exact, polynomial); an
# entry of a state at the end of a segment, or read and written by an update; a byte of memory that is new to the
# process.
_CALL, _VJP = 1.5e-4, 0.8e-4
_PASS, TRANSFORMS = 3e-5, 4e-4
_EXACT_ENTRY, _ENTRY = 3.2e-9, 4.7e-9
_STATE, _STREAM, _BYTE = 0.7e-9, 0.1e-9, 0.08e-9
_REUSED = 2**25
# Longer sequences than this are nobody's.
_LONGEST = 2**40
# The norm of a row, which is sorted, with a part that grows with d.
_NORM = 1.6e-8, 1.2e-9
# Of moments: a sampled row or key, with a part that grows with d^2; a certified row; a step of Lanczos beside products.
_SAMPLE, _CERTIFIED, _LANCZOS = (1.5e-8, 5.5e-11), 1.5e-8, (1e-4, 4e-8)
# A problem that is run to compare this machine with the table: keys and queries, width.
_REFERENCE = 384, 32


class Work:
    """Seconds of one thread: `alone`, and `parts` (seconds, pieces), whose pieces threads share."""

    __slots__ = ("_one", "_two", "alone", "parts")

    def __init__(self, alone: float = 0.0, parts: tuple[tuple[float, float], ...] = ()) -> None:
        self.alone, self.parts = alone, parts
        # Sums of works, of which a plan compares many, are sums of these.
        self._one = self._two = alone
        if parts:
            self._one, self._two = self.seconds(1), self.seconds(2)

    def __add__(self, other: Work) -> Work:
        one, two = self._one + other._one, self._two + other._two
        return self._of(self.alone + other.alone, self.parts + other.parts, one, two)

    def times(self, factor: float) -> Work:
        """So often."""
        parts = tuple((seconds * factor, pieces) for seconds, pieces in self.parts)
        return self._of(self.alone * factor, parts, self._one * factor, self._two * factor)

    @classmethod
    def _of(cls, alone, parts, one, two) -> Work:
        work = object.__new__(cls)
        work.alone, work.parts, work._one, work._two = alone, parts, one, two
        return work

    def seconds(self, threads: int) -> float:
        """Of so many threads; whole pieces go to a thread."""
        shared = 0.0
        for seconds, pieces in self.parts:
            shared += seconds * -(-pieces // threads) / pieces
        return self.alone + shared

    @property
    def nominal(self) -> float:
        """What choices go by, whatever the number of threads: the geometric mean of the seconds of one and of two."""
        return math.sqrt(self._one * self._two)


def speeds(dtype: np.dtype) -> Speeds:
    """Of the instruction set in use."""
    # The name of a dtype takes NumPy microseconds to make.
    return _SPEEDS[_LEVELS[_exact.LEVEL], "float32" if dtype.itemsize == 4 else "float64"]


def shaped(q_shape: tuple[int, ...], n_k: int, d_v: int, dtype: np.dtype, causal: bool) -> Problem:
    """A problem of that size, for one thread, which holds no numbers."""
    zero = np.zeros((), dtype)
    k, v = (np.broadcast_to(zero, (q_shape[0], n_k, width)) for width in (q_shape[3], d_v))
    return Problem(q=np.broadcast_to(zero, q_shape), k=k, v=v, scale=1.0, hi=0 if causal else None)


def seconds_of(work: Work, threads: int, grad: bool) -> float:
    """On this machine, of a call that does this work."""
    return (work.seconds(threads) + _CALL + grad * _VJP) * slowness()


def exact_work(problem: Problem, grad: bool) -> Work:
    """Of exact attention, and of its gradient where grad."""
    H, G, n, d = problem.q.shape
    n_k, d_v = problem.k.shape[1], problem.v.shape[2]
    if problem.family is not None:
        pairs = H * G * exact_engine.pairs(problem)
        return operations_work(problem, family_engine.operations(problem, pairs, grad))
    s = speeds(problem.q.dtype)
    tile, block, _ = _exact.blocking(problem.q.dtype)
    tiles = H * G * -(-n // tile)
    whole = tiles * tile / max(1, H * G * n)
    forward = _pairs(problem, tile / 2, tile / 2 + block / 2) * whole
    rows = H * (G * n + n_k) * (d + d_v) / 2 * _EXACT_ENTRY
    work = Work(0.0, ((forward * (s.pair + s.product * (d + d_v)) * 1e-9, tiles), (rows, tiles)))
    if not grad:
        return work
    backward = _pairs(problem, (tile + block) / 2, (tile + block) / 2) * whole
    seconds = backward * (s.pair_grad + s.product * (3 * d + 2 * d_v)) * 1e-9
    return work + Work(0.0, ((seconds, H * exact_engine.segments(problem)), (2 * rows, tiles)))


def polynomial_work(problem: Problem, degree: int, grad: bool, grad_degree: int | None = None) -> Work:
    """Of the polynomial engine, and of its gradient where grad, without what certifies rows by moments.

    `grad_degree` is that of backward's features, one more than `degree` unless weights have their own.

    Notes
    -----
    By phases, as `engines.polynomial` has them: a state for each segment, the packed sum (or a scan of the segment's
    chunks, pairs inside which are exact), and backward the same for queries, with derivatives of the features.
    """
    causal = problem.hi is not None
    offset = problem.q_offset if causal else 0
    grad_degree = (grad_degree or degree + 1) if grad else 0
    return _polynomial_work(problem.q.shape, *problem.v.shape[1:], problem.q.dtype, causal, offset, degree, grad_degree)


@lru_cache(maxsize=1024)
def _polynomial_work(shape, n_k, d_v, dtype, causal, offset, degree, grad_degree) -> Work:
    problem = shaped(shape, n_k, d_v, dtype, causal)
    (H, G, n, d), columns, item, s = shape, d_v + 1, dtype.itemsize, speeds(dtype)
    grad, most = grad_degree > 0, max(degree, grad_degree)
    low, top, held = (n_features(d, g) for g in (degree, grad_degree, most))
    size = polynomial_engine.chunk(problem)
    chunks = max(1, -(-max(n_k, n + offset) // size))
    segments = -(-chunks // -(-chunks // polynomial_engine.segments(problem, most)))
    keys, queries = H * n_k, H * G * n
    # Of an update (kernels/c/monomials.template.c).
    tokens = max(16, min(96, 2**18 // item // n_features(d, most - 1) // 16 * 16))

    # Of a token, seconds.
    update = held * columns * (s.product + _STREAM * 1e9 / tokens) * 1e-9
    evaluate = low * (columns * s.product + s.feature) * 1e-9
    differentiate = top * (columns * s.product + s.feature) * 1e-9
    pack_low, pack_top = low * columns * s.pack * 1e-9, top * columns * s.pack * 1e-9
    rows = (keys + queries) * (d + columns) / 2 * _ENTRY
    fresh = memory if (memory := polynomial_engine.memory(problem, degree, grad, grad_degree)) > _REUSED else 0.0
    ends = H * segments * held * columns * _STATE
    alone = _PASS + ends + 2 * fresh * _BYTE
    pieces, rows_of = H * segments, H * G * -(-n // size)
    if not causal:
        parts = (keys * update + rows / 2, pieces), (queries * evaluate + rows / 2, rows_of)
        work = Work(alone + H * pack_low, parts)
        if not grad:
            return work
        return work + Work(
            ends + 2 * fresh * _BYTE + H * (2 * pack_top + pack_low),
            (
                (queries * update + rows, pieces),
                (queries * differentiate + rows, rows_of),
                (keys * (differentiate + evaluate) + rows, H * chunks),
            ),
        )
    first = (segments - 1) / segments  # what a pass before the scan sums up
    inside = 1 - segments / chunks
    far = 1 - 1 / chunks
    near = queries * min(size + 48, n + 48) / 2 * 1e-9
    scan = keys * inside * update + queries * far * evaluate + H * (chunks - 1) * pack_low
    pair = s.near + 0.7 * s.product * (d + columns)
    work = Work(alone, ((keys * first * update, max(1, pieces - H)), (scan + near * pair + rows, pieces)))
    if not grad:
        return work
    pair = 2 * s.near + 0.7 * s.product * (6 * d + 5 * columns)
    of_queries = queries * far * differentiate + keys * inside * update + H * (chunks - 1) * pack_top
    of_keys = keys * (differentiate + evaluate) + queries * inside * update + H * chunks * (pack_low + pack_top)
    return work + Work(
        2 * ends + 2 * fresh * _BYTE,
        (
            (queries * first * update, max(1, pieces - H)),
            (of_queries + near * pair / 2 + 1.5 * rows, pieces),
            (of_keys + near * pair / 2 + 1.5 * rows, pieces),
        ),
    )


def pays_from(
    problem: Problem, degree: int, grad_degree: int | None, *, moments: bool = False, fourth: bool = False
) -> int | None:
    """About the least n, to two digits, from which a polynomial beats exact attention on n queries and n keys.

    `grad_degree`, of backward's features, is None where there is no backward pass. With what certifies a polynomial by
    moments, and by the fourth of them.
    """
    (H, G, _, d), grad = problem.q.shape, grad_degree is not None

    def pays(n: int) -> bool:
        made = shaped((H, G, n, d), n, problem.v.shape[2], problem.q.dtype, problem.hi is not None)
        work = polynomial_work(made, degree, grad, grad_degree)
        work += moments_work(made) if moments else Work()
        work += fourth_work(made) if fourth else Work()
        return work.nominal < exact_work(made, grad).nominal

    n = 16
    while not pays(n):
        n *= 2
        if n > _LONGEST:
            return None
    step = 10 ** max(0, len(str(n)) - 2)
    first, last = n // 2 // step, -(-n // step)
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if pays(middle * step) else (middle, last)
    return last * step


def operations_work(problem: Problem, operations: float) -> Work:
    """Of so many multiply-adds times 2, exp counted as 60 in float32 and as 120 in float64."""
    s, keys = speeds(problem.q.dtype), 60 if problem.q.dtype == np.float32 else 120
    rate = (4 * _REFERENCE[1] + keys) / (s.pair + 2 * _REFERENCE[1] * s.product) * 1e9
    # Pieces of which any number of threads that is asked about has as many.
    return Work(0.0, ((operations / rate, 2 * problem.threads),))


def sample_work(problem: Problem, grad: bool) -> Work:
    """Of `sample.Sample`, and of what is asked of it."""
    H, G, n, d = problem.q.shape
    rows, keys = min(H * G * n, SAMPLED_ROWS), min(H * problem.k.shape[1], H * SAMPLED_KEYS)
    return Work((1e-3 if grad else 6e-4) + (rows + keys) * (_SAMPLE[0] + _SAMPLE[1] * d * d))


def norms_work(problem: Problem) -> Work:
    """Of `engines.outliers.Norms`, and of a look at what they offer."""
    H, G, n, d = problem.q.shape
    return Work(5e-4 + H * (G * n + problem.k.shape[1]) * (_NORM[0] + _NORM[1] * d))


def moments_work(problem: Problem) -> Work:
    """Of what certifies rows by moments."""
    H, G, n, d = problem.q.shape
    return Work(_PASS + H * G * n * _CERTIFIED)


def fourth_work(problem: Problem) -> Work:
    """Of `moments.fourth_moments`."""
    H, _, d = problem.k.shape
    stops, product = prefixes(problem), speeds(problem.q.dtype).product * 1e-9
    keys = H * STEPS * float(stops.sum())
    # Vectors are made orthogonal by one thread.
    alone = H * len(stops) * STEPS * (_LANCZOS[0] + _LANCZOS[1] * d * d)
    return Work(alone, ((keys * product * (1.5 * d * d + 12 * d), H * len(stops) * 64),))


def _pairs(problem: Problem, ahead: float, behind: float) -> float:
    """Pairs that the band makes the exact engine look at, of all heads, `ahead` and `behind` it in each row."""
    H, G, n, _ = problem.q.shape
    n_k = problem.k.shape[1]
    more = (problem.hi is not None) * ahead + (problem.lo is not None) * behind
    return H * G * min(float(n) * n_k, exact_engine.pairs(problem) + n * more)


@lru_cache(maxsize=1)
def slowness() -> float:
    """Of this machine, over that of the table: the exact engine's time on a small problem, in 2 ms once a process."""
    n, d = _REFERENCE
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, n, d)).astype(np.float32)
    problem, best = Problem(q=q[None], k=k, v=v, scale=1 / d, threads=1), math.inf
    for _ in range(8):
        start = time.perf_counter()
        exact_engine.forward(problem, 1.0, False)
        best = min(best, time.perf_counter() - start)
    s = speeds(q.dtype)
    return best / (n * n * (s.pair + 2 * d * s.product) * 1e-9)


def exact_bytes(problem: Problem, grad: bool) -> float:
    """Bytes of exact attention beyond inputs and outputs."""
    if problem.family is not None:
        return family_engine.memory(problem, grad)
    H, G, n, d = problem.q.shape
    n_k, d_v = problem.v.shape[1:]
    item = problem.q.itemsize
    size = H * n_k * d * item + H * G * n * 2 * item
    if grad:
        # Transposed and padded copies of q and do, and a dq for each segment of keys.
        size += (H * G * n * (2 * (d + d_v) + d * exact_engine.segments(problem)) + H * n_k * d_v) * item
    return size


def cheaper(engine: str, works: dict[str, Work], sizes: dict[str, float]) -> bool:
    """Whether an engine is predicted to be faster than the exact one, in the memory there is."""
    return works[engine].nominal < works["exact"].nominal and fits(sizes[engine])
