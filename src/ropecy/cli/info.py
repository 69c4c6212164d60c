"""What is installed and what the machine offers: the first thing to put into a report of a problem."""

from __future__ import annotations

import os
import platform

import numpy as np

from ..kernels import _exact, _fftw
from ..machine.threads import available_threads


class Info(dict):
    """What `info` found, by name; it is printed one entry a line."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())


def info() -> Info:
    """Versions, FFTW's own version string, the instruction set in use, and the threads of a call.

    Returns
    -------
    Info
        A dict that prints one entry a line: "ropecy", "python", "numpy", "fftw" (with the instruction sets of its
        codelets), "instruction set" ("baseline", "v3" or "v4": what the CPU has, or what ``ROPECY_ISA`` asks for; on
        arm64 "baseline", which is NEON), "machine", "cpus" and "threads" (those of a call without ``threads``).

    Examples
    --------
    >>> info()["instruction set"] in ("baseline", "v3", "v4")
    True
    """
    from importlib.metadata import version  # imported here, since it takes a third as long as importing this package

    return Info(
        {
            "ropecy": version("ropecy"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "fftw": ", ".join(_fftw.fftw_version().values()),
            "instruction set": ("baseline", "v3", "v4")[_exact.LEVEL],
            "machine": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count() or 1,
            "threads": available_threads(),
        }
    )
