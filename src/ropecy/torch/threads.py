"""The threads that PyTorch computes with, for loops of this package inside of its operators.

After each of PyTorch's operators OpenMP's threads look for the next one for some milliseconds, and hold their
processors meanwhile. Threads of our own would have to share these with them, so that a loop between two operators of
PyTorch would run as if on one processor less.
"""

from __future__ import annotations

import ctypes

import torch

from ..kernels._parallel import Team


def _openmp() -> int:
    """The address of GOMP_parallel in the library that PyTorch computes with; 0 where that has none."""
    if "OpenMP" not in torch.__config__.parallel_info().partition("ATen parallel backend:")[2]:
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0


torch_threads = Team(_openmp())
