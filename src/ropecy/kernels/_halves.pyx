"""Whole arrays from float16 and bfloat16 to float32 and back, by threads over fixed pieces."""

import numpy as np

cimport numpy as cnp

from ._arrays cimport pieces, pointer
from ._halves cimport narrow_function, rc_halves_kernels, rc_halves_select, widen_function
from ._memory cimport results
from ._parallel cimport parallel_for, rc_worker, team

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_halves_kernels *kernels = rc_halves_select(rc_level())

cdef enum:
    PIECE = 1 << 16  # numbers of a task, some 10 us


cdef struct Numbers:
    char *stored
    float *x
    ptrdiff_t count
    widen_function widen
    narrow_function narrow


cdef void widen_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Numbers *n = <const Numbers *>context
    cdef ptrdiff_t first = task * PIECE
    n.widen(n.stored + 2 * first, min(PIECE, n.count - first), n.x + first)


cdef void narrow_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Numbers *n = <const Numbers *>context
    cdef ptrdiff_t first = task * PIECE
    n.narrow(n.x + first, min(PIECE, n.count - first), n.stored + 2 * first)


def widened(cnp.ndarray stored, int threads):
    """float16 or bfloat16 numbers as float32, in C order. Nothing is rounded."""
    cdef Numbers n
    stored = np.ascontiguousarray(stored)
    x = results((<object>stored).shape, np.dtype(np.float32))
    n.stored, n.x, n.count = <char *>pointer(stored), <float *>pointer(x), x.size
    n.widen = kernels.widen_float16 if stored.dtype.kind == "f" else kernels.widen_bfloat16
    parallel_for(pieces(n.count, PIECE), team(threads, 2.0 * n.count), widen_piece, &n)
    return x


def narrowed(cnp.ndarray x, dtype, int threads):
    """float32 numbers rounded to float16 or bfloat16, in C order; infinity is past the largest number."""
    cdef Numbers n
    x = np.ascontiguousarray(x)
    stored = results((<object>x).shape, dtype)
    n.stored, n.x, n.count = <char *>pointer(stored), <float *>pointer(x), x.size
    n.narrow = kernels.narrow_float16 if dtype.kind == "f" else kernels.narrow_bfloat16
    parallel_for(pieces(n.count, PIECE), team(threads, 4.0 * n.count), narrow_piece, &n)
    return stored
