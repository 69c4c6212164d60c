"""Rows times rotations, from tables of cosines and sines (c/rotary.h): threads and memory; meaning is in rotary.py."""

cimport numpy as cnp
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t

from ._arrays cimport pieces
from ._parallel cimport parallel_for, rc_worker, team

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef extern from "c/rotary.h" nogil:
    const int RC_ROTARY_FINE
    ctypedef struct rc_rotary:
        ptrdiff_t d
        ptrdiff_t pairs
        ptrdiff_t row_stride
        ptrdiff_t column_stride
        ptrdiff_t position_stride
        int interleaved
        const double *coarse
        const double *fine
    ctypedef struct rc_rotary_kernels:
        void (*rows_f32)(const rc_rotary *, ptrdiff_t, const float *, const int64_t *, float *) noexcept nogil
        void (*rows_f64)(const rc_rotary *, ptrdiff_t, const double *, const int64_t *, double *) noexcept nogil
    const rc_rotary_kernels *rc_rotary_select(int)

cdef int level = rc_level()
if level < 0:
    raise ImportError("ROPECY_ISA: wants baseline, v3 or v4, and one that this CPU has")
cdef const rc_rotary_kernels *kernels = rc_rotary_select(level)

FINE = RC_ROTARY_FINE

# Rows a task takes, of one slot or of several. Fixed, so that the split of work does not depend on the thread count.
cdef enum:
    BLOCK = 2048


cdef struct Blocks:
    rc_rotary r
    ptrdiff_t n, size, count, blocks  # rows of a slot, bytes of an element, blocks of a slot and of all slots
    ptrdiff_t share  # blocks of a task
    bint single
    const char *source
    const ptrdiff_t *offsets
    const int64_t *positions
    const ptrdiff_t *position_offsets
    char *target


cdef void rotate_block(const Blocks *b, ptrdiff_t block) noexcept nogil:
    cdef ptrdiff_t slot = block // b.count, start = block % b.count * BLOCK, rows = min(BLOCK, b.n - start)
    cdef const char *x = b.source + (b.offsets[slot] + start * b.r.row_stride) * b.size
    cdef char *y = b.target + (slot * b.n + start) * b.r.d * b.size
    cdef const int64_t *positions = b.positions + b.position_offsets[slot] + start * b.r.position_stride
    if b.single:
        kernels.rows_f32(&b.r, rows, <const float *>x, positions, <float *>y)
    else:
        kernels.rows_f64(&b.r, rows, <const double *>x, positions, <double *>y)


cdef void rotate_blocks(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Blocks *b = <const Blocks *>context
    cdef ptrdiff_t block
    for block in range(task * b.share, min((task + 1) * b.share, b.blocks)):
        rotate_block(b, block)


def rotate(rows, places, tables, cnp.ndarray out, bint interleaved, int threads):
    """y_i = R_{p_i} x_i for all rows of x (..., n, d), float32 or float64, into C-contiguous out of the same shape.

    Parameters
    ----------
    rows : (x, offsets)
        The offsets say, in elements, where each of the leading indices of x has its first row.
    places : (positions, offsets, stride)
        Likewise of its positions, int64, of which each is so many elements after the one before. They are not negative
        and stay inside the tables. Nothing is checked here.
    tables : (coarse, fine)
        Cosines and sines, float64.
    """
    cdef:
        cnp.ndarray x = rows[0]
        const ptrdiff_t[::1] x_offsets = rows[1], position_offsets = places[1]
        const int64_t[:] positions = places[0]
        ptrdiff_t position_stride = places[2]
        const double[:, ::1] coarse = tables[0], fine = tables[1]
        int axes = cnp.PyArray_NDIM(x)
        ptrdiff_t slots = x_offsets.shape[0]
        Blocks b
    b.n, b.size = cnp.PyArray_DIM(x, axes - 2), cnp.PyArray_ITEMSIZE(x)
    if b.n == 0 or slots == 0:
        return
    b.count, b.share = pieces(b.n, BLOCK), max(1, BLOCK // b.n)
    b.blocks = slots * b.count
    b.single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32
    b.source, b.target = cnp.PyArray_BYTES(x), cnp.PyArray_BYTES(out)
    b.offsets, b.positions, b.position_offsets = &x_offsets[0], &positions[0], &position_offsets[0]
    b.r.d = cnp.PyArray_DIM(x, axes - 1)
    b.r.pairs = coarse.shape[1] // 2
    b.r.row_stride = cnp.PyArray_STRIDE(x, axes - 2) // b.size
    b.r.column_stride = cnp.PyArray_STRIDE(x, axes - 1) // b.size
    b.r.position_stride = position_stride
    b.r.interleaved = interleaved
    b.r.coarse = &coarse[0, 0]
    b.r.fine = &fine[0, 0]
    # An element takes as long as ten multiply-adds of a product.
    parallel_for(pieces(b.blocks, b.share), team(threads, 10.0 * slots * b.n * b.r.d), rotate_blocks, &b)
