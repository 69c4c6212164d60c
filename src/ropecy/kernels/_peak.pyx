"""What the cores of this machine can do at most (c/peak.h), all threads together; `ropecy.cli.bench` times it."""

import numpy as np

cimport numpy as cnp

from ._arrays cimport pieces, pointer
from ._parallel cimport parallel_for, rc_worker

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

cdef enum:
    STRETCH = 1 << 20  # numbers that a task reads, 4 MiB


cdef struct Limit:
    bint single
    ptrdiff_t rounds, n
    const float *x
    double *found  # by each task


cdef void multiply_add_once(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Limit *p = <const Limit *>context
    p.found[task] = kernels.multiply_add_f32(p.rounds) if p.single else kernels.multiply_add_f64(p.rounds)


cdef void sum_stretch(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Limit *p = <const Limit *>context
    p.found[task] = kernels.sum(min(STRETCH, p.n - task * STRETCH), p.x + task * STRETCH)


def multiply_add(dtype, ptrdiff_t rounds, int threads):
    """Each thread runs that many rounds of multiply-adds on registers; how many operations these were together."""
    cdef Limit p
    found = np.zeros(threads)
    p.single, p.rounds, p.found = np.dtype(dtype) == np.float32, rounds, <double *>pointer(found)
    parallel_for(threads, threads, multiply_add_once, &p)
    return float(found.sum())


def total(const float[::1] x, int threads):
    """The sum of x, of which each thread reads a part."""
    cdef Limit p
    if x.shape[0] == 0:
        return 0.0
    found = np.zeros(pieces(x.shape[0], STRETCH))
    p.n, p.x, p.found = x.shape[0], &x[0], <double *>pointer(found)
    parallel_for(len(found), threads, sum_stretch, &p)
    return float(found.sum())
