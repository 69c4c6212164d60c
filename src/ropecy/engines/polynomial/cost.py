"""The work of the polynomial engine and of certifying its rows, and the length from which it beats exact attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ...approximation.minimax import n_features
from ...certify.fourth_moments import STEPS, prefixes
from ...certify.moments import chunk
from ...certify.sample import SAMPLED_KEYS, SAMPLED_ROWS
from ...kernels import _monomials
from ...problem.mask import Mask
from ...problem.problem import Origin, Outline, Sizes
from ..cost import Work, shared, speeds
from ..exact.cost import exact_work
from . import features

# Seconds, the same on all instruction sets.
LOOKING = 1e-4  # what looking for a degree takes
_PASS = 4.3e-4  # what a call costs more than an exact one
_ENTRY = 2.5e-9  # to rotate, measure and copy an entry of a row of q, k, v or dO
_STATE = 2.2e-9  # an entry of a state at the end of a segment
_STREAM = 0.18e-9  # an entry of a state that an update reads and writes
_BYTE = 0.07e-9  # a byte of memory that the process has not used before
_REUSED = 2**25  # how many bytes of memory are reused from call to call
_LONGEST = 2**40  # `pays_from` looks at no longer sequences
_NORM = 1.6e-8, 1.2e-9  # to compute and sort the norm of a row: a constant, and a part for each of its d entries
_SAMPLE = 1.5e-8, 5.5e-11  # a sampled row or key: a constant, and a part that is multiplied by d^2
_CERTIFIED = 3e-5, 1.5e-8  # to certify rows by moments: a constant, and a part for each row
_LANCZOS = 1e-4, 4e-8  # a step of Lanczos beside its products: a constant, and a part that is multiplied by d^2


@shared
def polynomial_work(problem: Outline, degree: int, grad: bool, grad_degree: int | None = None) -> Work:
    """The work of the polynomial engine, and of its gradient if `grad`, without certifying rows by moments.

    `grad_degree` is the degree of backward's features, by default `degree` + 1.

    Notes
    -----
    The work is added up by phases of the engine: a state for each segment of keys; then, for queries, products with the
    sum of the states (or, if causal, a scan over the chunks of each segment, inside which pairs are exact). Backward
    does the same with queries and keys exchanged, and with derivatives of the features.
    """
    causal = problem.mask.causal
    offset = problem.mask.offset if causal else 0
    grad_degree = (grad_degree or degree + 1) if grad else 0
    at = offset if causal else None
    return _polynomial_work(problem.sizes, problem.dtype, problem.cut_for, at, degree, grad_degree)


@lru_cache(maxsize=1024)
def _polynomial_work(
    sizes: Sizes, dtype: np.dtype, cut_for: int, offset: int | None, degree: int, grad_degree: int
) -> Work:
    """`polynomial_work` by all that it depends on, so that it can be cached; `offset` is None without a causal mask."""
    (H, G, n, n_k, d, d_v), causal = sizes, offset is not None
    mask = Mask(n, n_k, hi=0 if causal else None)
    problem = Outline(sizes=sizes, dtype=dtype, mask=mask, origin=Origin(heads=cut_for))
    columns, item, s, offset = d_v + 1, dtype.itemsize, speeds(dtype), offset or 0
    grad, most = grad_degree > 0, max(degree, grad_degree)
    low, top, held = (n_features(d, g) for g in (degree, grad_degree, most))
    size = chunk(problem)
    chunks = max(1, -(-max(n_k, n + offset) // size))
    segments = -(-chunks // -(-chunks // features.segments(problem, most)))
    keys, queries = H * n_k, H * G * n
    # How many tokens an update of a state takes together (kernels/c/monomials.template.c).
    tokens = max(16, min(96, 2**18 // item // n_features(d, most - 1) // 16 * 16))

    # Seconds for each token.
    update = held * columns * (s.product + _STREAM * 1e9 / tokens) * 1e-9
    evaluate = low * (columns * s.product + s.feature) * 1e-9
    differentiate = top * (columns * s.product + s.feature) * 1e-9
    pack_low, pack_top = low * columns * s.pack * 1e-9, top * columns * s.pack * 1e-9
    rows = (keys + queries) * (d + columns) / 2 * _ENTRY
    fresh = memory if (memory := features.memory(problem, degree, grad, grad_degree)) > _REUSED else 0.0
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
    # With two threads one head's columns are shared between them, or else half of its keys summed up before the scan.
    half = (segments - 1) / segments / 2 if H == 1 else 0.0
    blocks = 2 if H == 1 and d_v % 2 == 0 and d_v >= 2 * _monomials.LEAST_COLUMNS else 1
    first = half if blocks == 1 else 0.0
    far, near = 1 - 1 / chunks, queries * min(size + 48, n + 48) / 2 * 1e-9
    scan = keys * far * update + queries * far * evaluate + H * (chunks - 1) * pack_low
    pair = s.near + 0.7 * s.product * (d + columns)
    work = Work(alone, ((keys * first * update, max(1, pieces - H)), (scan + near * pair + rows, pieces * blocks)))
    if not grad:
        return work
    pair = s.near + 0.7 * s.product * (5 * d + 4 * columns)
    of_queries = queries * far * differentiate + keys * far * update + H * (chunks - 1) * pack_top
    of_keys = keys * (differentiate + evaluate) + queries * far * update + H * chunks * (pack_low + pack_top)
    return work + Work(
        2 * ends + 2 * fresh * _BYTE,
        (
            (queries * half * update, max(1, pieces - H)),
            (of_queries + 1.5 * rows, pieces),
            (of_keys + near * pair + 1.5 * rows, pieces),
        ),
    )


class Served(NamedTuple):
    """What a polynomial serves: a problem, or some of its slots.

    Attributes
    ----------
    outline : Outline
    degree : int
    grad_degree : int or None
        The degree of backward's features, None if there is no backward pass.
    moments, fourth : bool
        Whether certifying by moments, and by fourth moments, counts.
    """

    outline: Outline
    degree: int
    grad_degree: int | None
    moments: bool = False
    fourth: bool = False

    def beats_exact_by(self, n: int) -> float:
        """The seconds that the polynomial saves for n queries and n keys, less what looking for it takes."""
        grad, made = self.grad_degree is not None, self.outline.resized(n, n)
        work = polynomial_work(made, self.degree, grad, self.grad_degree)
        work += moments_work(made) if self.moments else Work()
        work += fourth_work(made) if self.fourth else Work()
        return exact_work(made, grad).nominal - work.nominal - LOOKING


def pays_from(served: Sequence[Served]) -> int | None:
    """About the least n, to two digits, from which polynomials beat exact attention on n queries and n keys.

    It is None if there is none up to 2^40. Each polynomial serves some of the slots.
    """

    def pays(n: int) -> bool:
        return sum(own.beats_exact_by(n) for own in served) > 0

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


@shared
def sample_work(problem: Outline, grad: bool) -> Work:
    """The work of making a `certify.sample.Sample`, and of the estimates made from it."""
    H, G, n, n_k, d, _ = problem.sizes
    rows, keys = min(H * G * n, SAMPLED_ROWS), min(H * n_k, H * SAMPLED_KEYS)
    return Work((1e-3 if grad else 6e-4) + (rows + keys) * (_SAMPLE[0] + _SAMPLE[1] * d * d))


@shared
def norms_work(problem: Outline) -> Work:
    """The work of `outliers.split.Norms`, and of looking at the ways to split that it offers."""
    H, G, n, n_k, d, _ = problem.sizes
    return Work(5e-4 + H * (G * n + n_k) * (_NORM[0] + _NORM[1] * d))


@shared
def moments_work(problem: Outline) -> Work:
    """The work of certifying rows by moments."""
    H, G, n = problem.sizes[:3]
    return Work(_CERTIFIED[0] + H * G * n * _CERTIFIED[1])


@shared
def fourth_work(problem: Outline) -> Work:
    """The work of `certify.fourth_moments`."""
    H, d = problem.sizes.H, problem.sizes.d
    stops, product = prefixes(problem), speeds(problem.dtype).product * 1e-9
    keys = H * STEPS * float(stops.sum())
    # The reorthogonalisation runs on one thread.
    alone = H * len(stops) * STEPS * (_LANCZOS[0] + _LANCZOS[1] * d * d)
    return Work(alone, ((keys * product * (1.5 * d * d + 12 * d), H * len(stops) * 64),))
