"""Sums of y_j^T X y_j y_j y_j^T over many rows y_j, by threads over fixed pieces."""

import numpy as np

cimport numpy as cnp

from ._arrays cimport LINE, line, pieces, pointer
from ._parallel cimport parallel_for, rc_worker

cnp.import_array()

cdef extern from "c/quartic.h" nogil:
    ctypedef struct rc_quartic_functions:
        int tile
        size_t (*size)(ptrdiff_t) noexcept nogil
        size_t (*workspace)(ptrdiff_t) noexcept nogil
        void (*pack)(const void *, ptrdiff_t, ptrdiff_t, const void *, const void *, double, void *) noexcept nogil
        double (*apply)(const void *, ptrdiff_t, ptrdiff_t, ptrdiff_t, const void *, double *, void *) noexcept nogil

    ctypedef struct rc_quartic_kernels:
        const rc_quartic_functions *f32
        const rc_quartic_functions *f64

    const rc_quartic_kernels *rc_quartic_select(int level)

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_quartic_kernels *kernels = rc_quartic_select(rc_level())
cdef ptrdiff_t PIECE = 2048  # rows, at least: fewer are not worth a thread
cdef ptrdiff_t PIECES = 64   # of a set of rows, at most: each has a sum


cdef struct Packing:
    const rc_quartic_functions *f
    const char *x
    const char *keep
    const char *centre
    const double *factor
    ptrdiff_t n, d, item, tiles, size
    char *out


cdef struct Sums:
    const rc_quartic_functions *f
    const char *packed
    const char *matrices
    const ptrdiff_t *ends
    ptrdiff_t d, tiles, size, stretches, count
    double *images
    double *totals
    char *work
    size_t room


cdef void pack_tile(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Packing *p = <const Packing *>context
    cdef ptrdiff_t head = task // p.tiles, row = task % p.tiles * p.f.tile
    p.f.pack(p.x + (head * p.n + row) * p.d * p.item, min(<ptrdiff_t>p.f.tile, p.n - row), p.d,
             NULL if p.keep == NULL else p.keep + head * p.n + row,
             NULL if p.centre == NULL else p.centre + head * p.d * p.item, p.factor[head], p.out + task * p.size)


cdef void sum_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Sums *s = <const Sums *>context
    cdef ptrdiff_t slot = task // s.count, part = task % s.count
    cdef ptrdiff_t stop = s.ends[slot % s.stretches], size = s.d * s.d
    s.totals[task] = s.f.apply(s.packed + slot // s.stretches * s.tiles * s.size, part * stop // s.count,
                               (part + 1) * stop // s.count, s.d,
                               NULL if s.matrices == NULL else s.matrices + slot * size * sizeof(double),
                               s.images + task * size, s.work + worker.slot * s.room)


cdef class Rows:
    """y = factor (x - centre) of the rows of x (H, n, d) that keep (H, n) has; factor (H,) float64; centre (H, d) and
    keep may be None.
    """

    cdef const rc_quartic_functions *f
    cdef ptrdiff_t H, n, d, tiles, size
    cdef int threads
    cdef object packed

    def __init__(self, x, keep, centre, factor, int threads):
        cdef Packing p
        self.f = kernels.f32 if x.dtype == np.float32 else kernels.f64
        self.H, self.n, self.d = x.shape
        self.threads = threads
        self.tiles, self.size = pieces(self.n, self.f.tile), self.f.size(self.d) * x.itemsize
        self.packed = np.empty(self.H * self.tiles * self.size + LINE, np.uint8)
        p.f, p.factor, p.n, p.d, p.item = self.f, <const double *>pointer(factor), self.n, self.d, x.itemsize
        p.x, p.keep, p.centre = <char *>pointer(x), <char *>pointer(keep), <char *>pointer(centre)
        p.tiles, p.size, p.out = self.tiles, self.size, line(self.packed)
        parallel_for(self.H * self.tiles, threads if self.H * self.n > PIECE else 1, pack_tile, &p)

    def apply(self, stops, X):
        """sum_j w_j y_j y_j^T and sum_j w_j, w_j = y_j^T X y_j: (H, L, d, d) and (H, L) float64.

        Over the first stops[l] rows, which is n or a multiple of every tile. X (H, L, d, d) float64 is symmetric; None
        stands for w_j = 1, for all rows that are packed, there or not.
        """
        cdef Sums s
        s.f, s.d, s.tiles, s.size, s.stretches = self.f, self.d, self.tiles, self.size, len(stops)
        s.count = max(<ptrdiff_t>1, min(PIECES, pieces(self.n, PIECE)))
        s.room = self.f.workspace(self.d) // LINE * LINE + 2 * LINE
        workspace = np.empty(self.threads * s.room + LINE, np.uint8)
        ends = np.array([pieces(stop, self.f.tile) for stop in stops], np.intp)
        lead = (self.H, s.stretches, s.count)
        image, total = np.empty(lead + (self.d, self.d)), np.empty(lead)
        s.packed, s.work, s.matrices = line(self.packed), line(workspace), <const char *>pointer(X)
        s.ends = <const ptrdiff_t *>pointer(ends)
        s.images, s.totals = <double *>pointer(image), <double *>pointer(total)
        parallel_for(self.H * s.stretches * s.count, self.threads, sum_piece, &s)
        return image.sum(axis=2), total.sum(axis=2)
