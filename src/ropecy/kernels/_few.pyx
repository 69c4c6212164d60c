"""Attention of few queries: threads, memory and interrupts around the serial C kernels of ``c/few.h``.

The parts into which keys are cut depend on the shapes alone, never on the number of threads, so that results are
bitwise the same for every thread count.
"""

import numpy as np

cimport numpy as cnp

from ._arrays cimport LINE, line, pieces, pointer
from ._parallel cimport parallel_for, rc_worker

cnp.import_array()

cdef extern from "c/few.h" nogil:
    ctypedef struct rc_few_problem:
        ptrdiff_t rows, n, n_k, d, d_v, lo, hi
        const void *const *k
        const void *const *v
        const unsigned char *const *keep
        ptrdiff_t k_row, k_column, v_row, v_column
        const void *q
        void *partial
        void *o
        double *lse
        double most

    ctypedef struct rc_few_functions:
        int (*queries)(const void *, ptrdiff_t, double, void *) noexcept nogil
        size_t (*partial_size)(const rc_few_problem *) noexcept nogil
        size_t (*workspace)(const rc_few_problem *) noexcept nogil
        int (*of_part)(const rc_few_problem *, ptrdiff_t, ptrdiff_t, void *) noexcept nogil
        int (*far)(const rc_few_problem *, ptrdiff_t, void *) noexcept nogil
        void (*merge)(const rc_few_problem *, ptrdiff_t) noexcept nogil

    ctypedef struct rc_few_kernels:
        ptrdiff_t part
        rc_few_functions float32, float64, float16, bfloat16

    const rc_few_kernels *rc_few_select(int level)

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_few_kernels *kernels = rc_few_select(rc_level())

cdef double READ = 2e6  # bytes, some 100 us: a thread with less to read is not worth waking


cdef struct Pass:
    rc_few_problem p
    const rc_few_functions *f
    ptrdiff_t parts
    char *work
    size_t size  # of a thread's workspace
    int *good  # of each task


cdef const rc_few_functions *functions_of(dtype):
    """Of float32, float64, float16 and bfloat16, which is none of NumPy's own kinds of numbers."""
    if dtype.itemsize != 2:
        return &kernels.float32 if dtype.itemsize == 4 else &kernels.float64
    return &kernels.float16 if dtype.kind == "f" else &kernels.bfloat16


cdef addresses(cnp.ndarray x, int inner):
    """Where each of the arrays of the last `inner` axes begins, as one row of integers."""
    cdef ptrdiff_t count = 1, at, left
    cdef int axis, lead = x.ndim - inner
    for axis in range(lead):
        count *= x.shape[axis]
    found = np.empty(count, np.intp)
    cdef Py_ssize_t *out = <Py_ssize_t *>pointer(found)
    for at in range(count):
        out[at], left = <Py_ssize_t>cnp.PyArray_DATA(x), at
        for axis in range(lead - 1, -1, -1):
            out[at] += left % x.shape[axis] * x.strides[axis]
            left //= x.shape[axis]
    return found


cdef void of_part(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    x.good[task] = x.f.of_part(&x.p, task // x.parts, task % x.parts, x.work + worker.slot * x.size)


cdef void merge(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    x.good[task] = not x.f.far(&x.p, task, x.work + worker.slot * x.size)
    x.f.merge(&x.p, task)


cdef bint all_good(const Pass *x, ptrdiff_t tasks) noexcept nogil:
    cdef ptrdiff_t task
    for task in range(tasks):
        if not x.good[task]:
            return False
    return True


def forward(queries, k, v, limits, bint want_lse, int threads):
    """o (H, rows, d_v) and lse float64 (H, rows) or None; None where something that was read is not finite, or where
    rounding would show: scores or sums overflow or are large, norms of queries and keys come to more than `most`, or
    values are far from 0 beside how far they spread, these two by a sample of keys.

    Parameters
    ----------
    queries : (H, rows, d) float32, float64, float16 or bfloat16, C-contiguous
        Row r is query r % n of its head.
    k, v : (..., n_k, d) and (..., n_k, d_v) arrays
        Of the same dtype and any strides, their leading axes H slots.
    limits : engines.exact.few_queries.Limits
        The scale, the mask and the size of scores.

    Notes
    -----
    Time: one read of k and v at the rate of memory.
    """
    cdef Pass x
    cdef rc_few_problem *p = &x.p
    cdef ptrdiff_t tasks, H = queries.shape[0]
    keep = limits.keep
    x.f = functions_of(k.dtype)
    q = np.empty(queries.shape, np.float64 if k.dtype.itemsize == 8 else np.float32)
    if not x.f.queries(pointer(queries), q.size, limits.scale, pointer(q)):
        return None
    o = np.empty((H, q.shape[1], v.shape[v.ndim - 1]), q.dtype)
    lse = np.empty((H, q.shape[1])) if want_lse else None
    keys, values, kept = addresses(k, 2), addresses(v, 2), None if keep is None else addresses(keep, 1)
    p.rows, p.n, p.d, p.d_v, p.n_k = q.shape[1], limits.n, q.shape[2], o.shape[2], k.shape[k.ndim - 2]
    p.lo, p.hi = limits.band
    p.most = limits.most
    p.k, p.v = <const void *const *>pointer(keys), <const void *const *>pointer(values)
    p.keep = <const unsigned char *const *>pointer(kept)
    p.k_row, p.k_column = k.strides[k.ndim - 2], k.strides[k.ndim - 1]
    p.v_row, p.v_column = v.strides[v.ndim - 2], v.strides[v.ndim - 1]
    p.q, p.o, p.lse = pointer(q), pointer(o), <double *>pointer(lse)
    x.parts = pieces(p.n_k, kernels.part)
    tasks = H * x.parts
    threads = min(threads, max(1, <int>min(<double>H * p.n_k * (p.d + p.d_v) * k.itemsize / READ, 2e9)))
    partial = np.empty(tasks * x.f.partial_size(p) + LINE, np.uint8)
    p.partial = line(partial)
    x.size = pieces(x.f.workspace(p), LINE) * LINE
    workspace, good = np.empty(threads * x.size + LINE, np.uint8), np.empty(tasks, np.intc)
    x.work, x.good = line(workspace), <int *>pointer(good)
    parallel_for(tasks, threads, of_part, &x)
    if not all_good(&x, tasks):
        return None
    parallel_for(H, threads, merge, &x)
    return (o, lse) if all_good(&x, H) else None
