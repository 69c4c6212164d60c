"""What the cores of this machine can do at most (c/peak.h), all threads together; `ropecy.bench` times it."""

import numpy as np

cimport numpy as cnp
from cython.parallel cimport prange

from ._arrays cimport pieces

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef extern from "c/peak.h" nogil:
    ctypedef struct rc_peak_kernels:
        double (*multiply_add_f32)(ptrdiff_t) noexcept nogil
        double (*multiply_add_f64)(ptrdiff_t) noexcept nogil
        double (*sum)(ptrdiff_t, const float *) noexcept nogil
    const rc_peak_kernels *rc_peak_select(int)

cdef const rc_peak_kernels *kernels = rc_peak_select(rc_level())


def multiply_add(dtype, ptrdiff_t rounds, int threads):
    """Each thread runs that many rounds of multiply-adds on registers; how many operations these were together."""
    cdef bint single = np.dtype(dtype) == np.float32
    cdef double done = 0
    cdef int _thread
    for _thread in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        done += kernels.multiply_add_f32(rounds) if single else kernels.multiply_add_f64(rounds)
    return done


def total(const float[::1] x, int threads):
    """The sum of x, of which each thread reads a part."""
    cdef double found = 0
    cdef ptrdiff_t n = x.shape[0], part = pieces(n, max(1, threads)), thread
    if n == 0:
        return 0.0
    for thread in prange(pieces(n, part), nogil=True, num_threads=threads, schedule="static"):
        found += kernels.sum(min(part, n - thread * part), &x[0] + thread * part)
    return found
