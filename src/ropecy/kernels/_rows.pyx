"""Norms and columns of many rows, read once, by threads over fixed pieces."""

import numpy as np

cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange, threadid

from ._arrays cimport LINE, line, pieces, pointer

cnp.import_array()

cdef extern from "c/rows.h" nogil:
    ctypedef double (*largest_function "rc_largest_function")(const void *, ptrdiff_t) noexcept nogil
    ctypedef double (*norm_function "rc_norm_function")(const void *, ptrdiff_t, ptrdiff_t, const unsigned char *,
                                                        const void *) noexcept nogil
    ctypedef void (*norms_function "rc_norms_function")(const void *, ptrdiff_t, ptrdiff_t, double,
                                                        double *) noexcept nogil
    ctypedef void (*quadratic_function "rc_quadratic_function")(const void *, ptrdiff_t, ptrdiff_t, const void *,
                                                                double *, void *) noexcept nogil
    ctypedef void (*columns_function "rc_columns_function")(const void *, ptrdiff_t, ptrdiff_t, const unsigned char *,
                                                            double *, void *, void *) noexcept nogil

    ctypedef struct rc_rows_kernels:
        largest_function largest_f32, largest_f64
        norm_function norm_f32, norm_f64
        norms_function norms_f32, norms_f64
        size_t (*quadratic_workspace_f32)(ptrdiff_t) noexcept nogil
        size_t (*quadratic_workspace_f64)(ptrdiff_t) noexcept nogil
        quadratic_function quadratic_f32, quadratic_f64
        columns_function columns_f32, columns_f64

    const rc_rows_kernels *rc_rows_select(int level)

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_rows_kernels *kernels = rc_rows_select(rc_level())
cdef ptrdiff_t PIECE = 16384  # elements of a piece
cdef ptrdiff_t WORTH = 131072  # elements: fewer are not worth a second thread


def largest(cnp.ndarray x):
    """max |x|, 0 for none, of contiguous float32 or float64 numbers; inf or NaN where one of them is."""
    cdef largest_function size = kernels.largest_f32 if x.itemsize == 4 else kernels.largest_f64
    cdef const void *data = <const void *>cnp.PyArray_DATA(x)
    cdef ptrdiff_t count = cnp.PyArray_SIZE(x)
    cdef double found
    with nogil:
        found = size(data, count)
    return found


def largest_norms(x, keep, shift, int threads):
    """max_i ||x_i - shift||, (H,) float64, of x (H, n, d) over the rows that keep (H, n) has; shift (H, d) or None."""
    cdef norm_function norm = kernels.norm_f32 if x.dtype == np.float32 else kernels.norm_f64
    cdef ptrdiff_t H = x.shape[0], n = x.shape[1], d = x.shape[2], item = x.itemsize
    cdef ptrdiff_t rows = max(<ptrdiff_t>1, PIECE // d), count = max(<ptrdiff_t>1, pieces(n, rows)), task, head, first
    cdef const char *data = <const char *>pointer(x)
    cdef const char *kept = <const char *>pointer(keep)
    cdef const char *centre = <const char *>pointer(shift)
    found = np.empty((H, count))
    cdef double *out = <double *>pointer(found)
    for task in prange(H * count, nogil=True, num_threads=threads, schedule="static", use_threads_if=H * n * d > WORTH):
        head = task // count
        first = task % count * rows
        out[task] = norm(data + (head * n + first) * d * item, min(rows, n - first), d,
                         NULL if kept == NULL else <const unsigned char *>kept + head * n + first,
                         NULL if centre == NULL else centre + head * d * item)
    found = found[:, 0] if count == 1 else found.max(axis=1)
    return np.sqrt(found, out=found)


cdef double scatter(const floating *x, ptrdiff_t n, ptrdiff_t d, ptrdiff_t step) noexcept nogil:
    cdef double scattered = 0, first, second, value
    cdef ptrdiff_t row, a, count = pieces(n, step)
    for a in range(d):
        first = second = 0
        for row in range(count):
            value = x[row * step * d + a]
            first += value
            second += value * value
        scattered += second - first * first / count
    return scattered / count


def few_scatter(x, ptrdiff_t step):
    """The mean of ||x_i - mean||^2 over every so many rows, (H,) float64, of x (H, n, d)."""
    cdef ptrdiff_t H = x.shape[0], n = x.shape[1], d = x.shape[2], head
    cdef bint single = x.dtype == np.float32
    cdef const void *data = pointer(x)
    found = np.empty(H)
    cdef double *out = <double *>pointer(found)
    for head in range(H):
        if single:
            out[head] = scatter(<const float *>data + head * n * d, n, d, step)
        else:
            out[head] = scatter(<const double *>data + head * n * d, n, d, step)
    return found


def norms(x, factor, int threads):
    """factor_h ||x_hi||, (H, n) float64, of x (H, n, d), factor (H,) float64."""
    cdef norms_function measure = kernels.norms_f32 if x.dtype == np.float32 else kernels.norms_f64
    cdef ptrdiff_t H = x.shape[0], n = x.shape[1], d = x.shape[2], item = x.itemsize
    cdef ptrdiff_t rows = max(<ptrdiff_t>1, PIECE // d), count = max(<ptrdiff_t>1, pieces(n, rows)), task, head, first
    cdef const char *data = <const char *>pointer(x)
    cdef const double *factors = <const double *>pointer(factor)
    found = np.empty((H, n))
    cdef double *out = <double *>pointer(found)
    for task in prange(H * count, nogil=True, num_threads=threads, schedule="static", use_threads_if=H * n * d > WORTH):
        head = task // count
        first = task % count * rows
        measure(data + (head * n + first) * d * item, min(rows, n - first), d, factors[head], out + head * n + first)
    return found


def quadratic(x, M, int threads):
    """<x_hi, M_h x_hi>, (H, n) float64, of x (H, n, d), M (H, d, d) symmetric."""
    cdef bint single = x.dtype == np.float32
    cdef quadratic_function form = kernels.quadratic_f32 if single else kernels.quadratic_f64
    cdef ptrdiff_t H = x.shape[0], n = x.shape[1], d = x.shape[2], item = x.itemsize
    cdef ptrdiff_t rows = max(<ptrdiff_t>1, PIECE // d), count = pieces(n, rows), task, head, first
    cdef ptrdiff_t size = kernels.quadratic_workspace_f32(d) if single else kernels.quadratic_workspace_f64(d)
    # Half of the products are enough.
    upper = np.ascontiguousarray(np.triu(M) + np.triu(M, 1), x.dtype)
    size = pieces(size, LINE) * LINE
    found, workspace = np.empty((H, n)), np.empty(threads * size + LINE, np.uint8)
    cdef const char *data = <const char *>pointer(x)
    cdef const char *matrices = <const char *>pointer(upper)
    cdef double *out = <double *>pointer(found)
    cdef char *work = line(workspace)
    for task in prange(H * count, nogil=True, num_threads=threads, schedule="static", use_threads_if=H * n * d > WORTH):
        head = task // count
        first = task % count * rows
        form(data + (head * n + first) * d * item, min(rows, n - first), d, matrices + head * d * d * item,
             out + head * n + first, work + threadid() * size)
    return found


def columns(x, keep, int threads):
    """Sums (H, d) float64, minima and maxima (H, d) of the columns of x (H, n, d) over kept rows."""
    cdef columns_function measure = kernels.columns_f32 if x.dtype == np.float32 else kernels.columns_f64
    cdef ptrdiff_t H = x.shape[0], n = x.shape[1], d = x.shape[2], item = x.itemsize
    cdef ptrdiff_t rows = max(<ptrdiff_t>1, PIECE // d), count = max(<ptrdiff_t>1, pieces(n, rows)), task, head, first
    cdef const char *data = <const char *>pointer(x)
    cdef const char *kept = <const char *>pointer(keep)
    total = np.empty((H, count, d))
    low, high = np.empty((H, count, d), x.dtype), np.empty((H, count, d), x.dtype)
    cdef double *sums = <double *>pointer(total)
    cdef char *lows = <char *>pointer(low)
    cdef char *highs = <char *>pointer(high)
    for task in prange(H * count, nogil=True, num_threads=threads, schedule="static", use_threads_if=H * n * d > WORTH):
        head = task // count
        first = task % count * rows
        measure(data + (head * n + first) * d * item, min(rows, n - first), d,
                NULL if kept == NULL else <const unsigned char *>kept + head * n + first,
                sums + task * d, lows + task * d * item, highs + task * d * item)
    if count == 1:
        return total[:, 0], low[:, 0], high[:, 0]
    return total.sum(axis=1), low.min(axis=1), high.max(axis=1)
