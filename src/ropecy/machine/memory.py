"""Memory: how much can be had, and the refusal of what needs more."""

from __future__ import annotations

import math
import os

from . import cgroup


def fits(size: float) -> bool:
    """Whether so many bytes can be had."""
    # Asking the system costs as much as a small call.
    return size < 2**26 or size <= available_memory()


def available_memory() -> float:
    """Bytes that can be had without swapping and within the limit of a container, where the system tells; else inf."""
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
    """Refuse work that needs more bytes than can be had, before it begins.

    Parameters
    ----------
    size : float
        Bytes.
    what : str
        What needs them, as the message is to name it.

    Raises
    ------
    MemoryError
        With both numbers.
    """
    if not fits(size):
        available = available_memory() / 2**30
        raise MemoryError(f"{what} needs {size / 2**30:.3g} GiB, and {available:.3g} GiB are available")
