"""Rows times rotations, from tables of cosines and sines (c/rotary.h): threads and memory; meaning is in rotary.py."""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t

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

# Rows a task takes. Fixed, so that the split of work does not depend on the thread count.
cdef enum:
    BLOCK = 2048


cdef void rotate_block(const rc_rotary *r, ptrdiff_t rows, bint single, const char *x, const int64_t *positions,
                       char *y) noexcept nogil:
    if single:
        kernels.rows_f32(r, rows, <const float *> x, positions, <float *> y)
    else:
        kernels.rows_f64(r, rows, <const double *> x, positions, <double *> y)


def rotate(
    cnp.ndarray x, const ptrdiff_t[::1] x_offsets, const int64_t[:] positions, const ptrdiff_t[::1] position_offsets,
    ptrdiff_t position_stride, const double[:, ::1] coarse, const double[:, ::1] fine, cnp.ndarray out,
    bint interleaved, int threads,
):
    """y_i = R_{p_i} x_i for all rows of x (..., n, d), float32 or float64, into C-contiguous out of the same shape.

    x_offsets and position_offsets say, in elements, where each of the leading indices of x has its first row and its
    first position. Positions are not negative and stay inside the tables. Nothing is checked here.
    """
    cdef:
        int axes = cnp.PyArray_NDIM(x)
        ptrdiff_t size = cnp.PyArray_ITEMSIZE(x)
        ptrdiff_t n = cnp.PyArray_DIM(x, axes - 2), slots = x_offsets.shape[0]
        ptrdiff_t blocks = (n + BLOCK - 1) // BLOCK
        ptrdiff_t task, slot, start
        bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32
        const char *source = cnp.PyArray_BYTES(x)
        char *target = cnp.PyArray_BYTES(out)
        rc_rotary r
    if n == 0 or slots == 0:
        return
    r.d = cnp.PyArray_DIM(x, axes - 1)
    r.pairs = coarse.shape[1] // 2
    r.row_stride = cnp.PyArray_STRIDE(x, axes - 2) // size
    r.column_stride = cnp.PyArray_STRIDE(x, axes - 1) // size
    r.position_stride = position_stride
    r.interleaved = interleaved
    r.coarse = &coarse[0, 0]
    r.fine = &fine[0, 0]
    for task in prange(slots * blocks, nogil=True, schedule="static", num_threads=threads):
        slot = task // blocks
        start = (task - slot * blocks) * BLOCK
        rotate_block(
            &r, min(BLOCK, n - start), single,
            source + (x_offsets[slot] + start * r.row_stride) * size,
            &positions[0] + position_offsets[slot] + start * position_stride,
            target + (slot * n + start) * r.d * size,
        )
