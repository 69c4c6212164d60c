"""Memory: how much can be allocated, and the refusal of work that needs more."""

from __future__ import annotations

import math
import os

from . import cgroup


def fits(size: float) -> bool:
    """Whether `size` bytes can be allocated; small sizes are assumed to fit."""
    # Asking the system takes as long as a small call of `attention`.
    return size < 2**26 or size <= available_memory()


def available_memory() -> float:
    """Bytes that can be allocated without swapping and within a container's limit; inf if the system doesn't tell."""
    return min(_machine(), cgroup.memory())


def _machine() -> float:
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


def require(size: float, what: str) -> None:
    """Refuse work that needs more bytes than can be allocated, before it begins.

    Parameters
    ----------
    size : float
        The bytes that the work needs.
    what : str
        What needs them, in the words of the message.

    Raises
    ------
    MemoryError
        The message has the bytes that are needed and those that can be allocated.
    """
    if not fits(size):
        available = available_memory() / 2**30
        raise MemoryError(f"{what} needs {size / 2**30:.3g} GiB, and {available:.3g} GiB are available")
