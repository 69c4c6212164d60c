"""Sums of y_j^T X y_j y_j y_j^T over many rows y_j, by threads over fixed pieces."""

import numpy as np

cimport numpy as cnp
from cython.parallel cimport prange, threadid

from ._arrays cimport LINE, line, pieces, pointer

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


cdef class Rows:
    """y = factor (x - centre) of the rows of x (H, n, d) that keep (H, n) has; centre (H, d) and keep may be None."""

    cdef const rc_quartic_functions *f
    cdef ptrdiff_t H, n, d, tiles, size
    cdef int threads
    cdef object packed

    def __init__(self, x, keep, centre, double factor, int threads):
        cdef ptrdiff_t task, head, row, item = x.itemsize, tile
        cdef size_t none = 0
        self.f = kernels.f32 if x.dtype == np.float32 else kernels.f64
        self.H, self.n, self.d = x.shape
        self.threads, tile = threads, self.f.tile
        self.tiles, self.size = pieces(self.n, tile), self.f.size(self.d) * item
        self.packed = np.empty(self.H * self.tiles * self.size + LINE, np.uint8)
        cdef char *out = line(self.packed)
        cdef size_t data = <size_t>pointer(x), kept = <size_t>pointer(keep), centres = <size_t>pointer(centre)
        for task in prange(self.H * self.tiles, nogil=True, num_threads=threads, schedule="static",
                           use_threads_if=self.H * self.n > PIECE):
            head, row = task // self.tiles, task % self.tiles * tile
            self.f.pack(<void *>(data + (head * self.n + row) * self.d * item), min(tile, self.n - row), self.d,
                        <void *>(kept + head * self.n + row if kept else none),
                        <void *>(centres + head * self.d * item if centres else none), factor, out + task * self.size)

    def apply(self, stops, X):
        """sum_j w_j y_j y_j^T and sum_j w_j, w_j = y_j^T X y_j: (H, L, d, d) and (H, L) float64.

        Over the first stops[l] rows, which is n or a multiple of every tile. X (H, L, d, d) float64 is symmetric; None
        stands for w_j = 1, for all rows that are packed, there or not.
        """
        cdef ptrdiff_t L = len(stops), d = self.d, count = max(<ptrdiff_t>1, min(PIECES, pieces(self.n, PIECE)))
        cdef ptrdiff_t task, slot, stop
        cdef size_t room = self.f.workspace(d) // LINE * LINE + 2 * LINE
        workspace = np.empty(self.threads * room + LINE, np.uint8)
        ends = np.array([pieces(stop, self.f.tile) for stop in stops], np.intp)
        image, total = np.empty((self.H, L, count, d, d)), np.empty((self.H, L, count))
        cdef const char *packed = line(self.packed)
        cdef size_t matrices = <size_t>pointer(X), none = 0
        cdef const ptrdiff_t *end = <const ptrdiff_t *>pointer(ends)
        cdef double *images = <double *>pointer(image)
        cdef double *totals = <double *>pointer(total)
        cdef char *work = line(workspace)
        for task in prange(self.H * L * count, nogil=True, num_threads=self.threads, schedule="dynamic",
                           use_threads_if=self.H * L * count > 1):
            slot = task // count
            stop = end[slot % L]
            totals[task] = self.f.apply(packed + slot // L * self.tiles * self.size, task % count * stop // count,
                                        (task % count + 1) * stop // count, d,
                                        <void *>(matrices + slot * d * d * 8 if matrices else none),
                                        images + task * d * d, work + threadid() * room)
        return image.sum(axis=2), total.sum(axis=2)
