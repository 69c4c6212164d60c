"""How many threads a call uses where the caller doesn't say."""

from __future__ import annotations

import math
import os
import time

from . import cgroup

# More threads than this only wait for each other. Results don't depend on their number.
MOST_THREADS = 256
# For how many seconds an answer of `default_threads` is reused: asking the system takes some microseconds, which would
# slow down short calls.
KEPT = 1.0

_last = (-math.inf, 1)  # when the process last looked, by time.monotonic(), and how many threads it found


def default_threads() -> int:
    """`available_threads`, where the system is asked at most once a second."""
    global _last
    looked, threads = _last
    now = time.monotonic()
    if now - looked >= KEPT:
        threads = available_threads()
        _last = now, threads
    return threads


def available_threads() -> int:
    """OMP_NUM_THREADS if that is a positive integer, else the CPUs of the process's affinity, within its quota."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isascii() and first.isdigit() and int(first) > 0:
        return min(int(first), MOST_THREADS)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, math.ceil(min(available, cgroup.cpus()))), MOST_THREADS)
