"""What work costs on this machine: operations of exact attention, their rate, memory."""

from __future__ import annotations

import math
import os
import time
from functools import lru_cache

import numpy as np

from .engines import exact as exact_engine
from .engines import family as family_engine
from .problem import Problem


def exact_operations(problem: Problem, grad: bool) -> float:
    """Multiply-adds times 2 of exact attention, exp counted by its time."""
    H, G, n, d = problem.q.shape
    d_v = problem.v.shape[2]
    exp = 60 if problem.q.dtype == np.float32 else 120
    pairs = H * G * exact_engine.pairs(problem)
    if problem.family is not None:
        return family_engine.operations(problem, pairs, grad)
    per_pair = 2 * (d + d_v) + exp
    if grad:
        per_pair += 2 * (3 * d + 2 * d_v) + 2 * exp
    return pairs * per_pair + 60.0 * H * (G * n + problem.k.shape[1]) * (d + d_v)


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


@lru_cache(maxsize=4)
def rate(dtype: str) -> float:
    """Operations a second of one thread, measured once a process in about a millisecond."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 384, 32)).astype(dtype)
    problem = Problem(q=q[None], k=k, v=v, scale=1 / 32, threads=1)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        exact_engine.forward(problem, 1.0, False)
        best = min(best, time.perf_counter() - start)
    return exact_operations(problem, False) / best


def fits(size: float) -> bool:
    """Whether so many bytes can be had."""
    # Asking the system costs as much as a small call.
    return size < 2**26 or size <= available_memory()


def available_memory() -> float:
    """Bytes that can be had without swapping, where the system tells; else inf."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return math.inf


def cheaper(engine: str, seconds: dict[str, float], sizes: dict[str, float]) -> bool:
    """Whether an engine is predicted to be faster than the exact one, in the memory there is."""
    return seconds[engine] < seconds["exact"] and fits(sizes[engine])
