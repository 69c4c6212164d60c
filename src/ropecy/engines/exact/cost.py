"""The work and memory of exact attention, and seconds on this machine, whose speed is measured by exact attention."""

from __future__ import annotations

import math
import time
from functools import lru_cache

import numpy as np

from ...kernels import _exact, _exact_gradient
from ...problem.problem import Outline, Problem
from ..cost import REFERENCE, Work, operations_work, shared, speeds
from . import family, streaming

_CALL, _VJP = 2.5e-5, 2.9e-4  # seconds that Python takes for a call, and for its gradient
_ENTRY = 0.6e-9  # seconds for an entry of a row of q, k, v or dO


def seconds_of(work: Work, threads: int, grad: bool) -> float:
    """Predicted seconds, on this machine, of a call that does this work."""
    return (work.seconds(threads) + _CALL + grad * _VJP) * slowness()


@shared
def exact_work(problem: Outline, grad: bool) -> Work:
    """The work of exact attention, and of its gradient if `grad`."""
    if problem.family is not None:
        return operations_work(problem, family.operations(problem, grad))
    H, G, n, n_k, d, d_v = problem.sizes
    s = speeds(problem.dtype)
    (queries, block), (tile, step) = _exact.left_out(problem.dtype)
    _, _, lanes = _exact.blocking(problem.dtype)
    tiles = H * G * -(-n // queries)
    forward = H * G * problem.mask.pairs(queries / 2, (queries + block) / 2) * _whole(n, lanes)
    rows = H * (G * n + n_k) * (d + d_v) / 2 * _ENTRY
    work = Work(0.0, ((forward * (s.pair + s.product * (d + d_v)) * 1e-9, tiles), (rows, tiles)))
    if not grad:
        return work
    backward = H * G * problem.mask.pairs((tile + step) / 2, (tile + step) / 2) * _whole(n, tile)
    seconds = backward * (s.pair_grad + s.product * (3 * d + 2 * d_v)) * 1e-9
    return work + Work(0.0, ((seconds, H * streaming.segments(problem)), (2 * rows, tiles)))


def _whole(n: int, part: int) -> float:
    """How many times n rows are computed, if they are computed in whole parts."""
    return -(-n // part) * part / max(1, n)


def exact_bytes(problem: Outline, grad: bool) -> float:
    """The bytes that exact attention needs beyond inputs and outputs."""
    if problem.family is not None:
        return family.memory(problem, grad)
    H, G, n, n_k, d, d_v = problem.sizes
    item = problem.dtype.itemsize
    size = H * n_k * d * item + H * G * n * 2 * item
    if grad:
        # Transposed and padded copies of q and do, a dq for each segment of keys, and keys and values, of some heads.
        segments = streaming.segments(problem)
        work = float(G * n) * n_k * (3 * d + 2 * d_v + 30)
        heads = _exact_gradient.heads_at_once(H, work, segments, problem.threads)
        size += heads * (G * n * (2 * (d + d_v) + d * segments) + n_k * (d + d_v)) * item
    return size


@lru_cache(maxsize=1)
def slowness() -> float:
    """How many times slower this machine is than the table of speeds says.

    It is measured once in a process, in some 2 ms, by exact attention of a small problem.
    """
    n, d = REFERENCE
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, n, d)).astype(np.float32)
    problem, best = Problem(q=q[None], k=k, v=v, scale=1 / d, threads=1), math.inf
    for _ in range(8):
        start = time.perf_counter()
        streaming.forward(problem, 1.0, False)
        best = min(best, time.perf_counter() - start)
    return best / exact_work(problem, False).seconds(1)
