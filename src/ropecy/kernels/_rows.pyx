"""Norms and columns of many rows, read once, by threads over fixed pieces."""

import numpy as np

cimport numpy as cnp
from cython cimport floating

from ._arrays cimport LINE, line, pieces, pointer
from ._parallel cimport parallel_for, rc_worker, task_function
from ._rows cimport (
    columns_function,
    far,
    largest_function,
    norm_function,
    norms_function,
    quadratic_function,
    rc_rows_kernels,
    rc_rows_select,
)

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_rows_kernels *kernels = rc_rows_select(rc_level())
cdef ptrdiff_t PIECE = 16384  # elements of a piece
cdef ptrdiff_t WORTH = 32768  # elements, some 10 us: fewer are not worth a second thread

cdef struct Pieces:
    # Of x (H, n, d): `count` of each head, so many rows in each.
    const char *x
    ptrdiff_t H, n, d, item, rows, count
    const char *keep       # (H, n) or NULL
    const char *centre     # (H, d) or NULL
    const double *factors  # (H,)
    const char *matrices   # (H, d, d)
    double *out
    char *low
    char *high
    char *work
    size_t size  # of a thread's workspace
    norm_function norm
    norms_function norms
    quadratic_function quadratic
    columns_function columns


cdef struct Piece:
    ptrdiff_t head, first, rows
    const char *x
    const unsigned char *keep


cdef Pieces pieces_of(x):
    cdef Pieces p
    p.x, p.item = <const char *>pointer(x), x.itemsize
    p.H, p.n, p.d = x.shape
    p.rows = max(<ptrdiff_t>1, PIECE // p.d)
    p.count = max(<ptrdiff_t>1, pieces(p.n, p.rows))
    return p


cdef Piece piece_of(const Pieces *p, ptrdiff_t task) noexcept nogil:
    cdef Piece piece
    cdef ptrdiff_t at
    piece.head, piece.first = task // p.count, task % p.count * p.rows
    piece.rows = min(p.rows, p.n - piece.first)
    at = piece.head * p.n + piece.first
    piece.x = p.x + at * p.d * p.item
    piece.keep = NULL if p.keep == NULL else <const unsigned char *>p.keep + at
    return piece


cdef void run(Pieces *p, int threads, task_function function):
    parallel_for(p.H * p.count, threads if p.H * p.n * p.d > WORTH else 1, function, p)


cdef void norm_of_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pieces *p = <const Pieces *>context
    cdef Piece piece = piece_of(p, task)
    p.out[task] = p.norm(piece.x, piece.rows, p.d, piece.keep,
                         NULL if p.centre == NULL else p.centre + piece.head * p.d * p.item)


cdef void norms_of_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pieces *p = <const Pieces *>context
    cdef Piece piece = piece_of(p, task)
    p.norms(piece.x, piece.rows, p.d, p.factors[piece.head], p.out + piece.head * p.n + piece.first)


cdef void quadratic_of_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pieces *p = <const Pieces *>context
    cdef Piece piece = piece_of(p, task)
    p.quadratic(piece.x, piece.rows, p.d, p.matrices + piece.head * p.d * p.d * p.item,
                p.out + piece.head * p.n + piece.first, p.work + worker.slot * p.size)


cdef void columns_of_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pieces *p = <const Pieces *>context
    cdef Piece piece = piece_of(p, task)
    p.columns(piece.x, piece.rows, p.d, piece.keep, p.out + task * p.d, p.low + task * p.d * p.item,
              p.high + task * p.d * p.item)


cdef struct Numbers:
    const char *x
    ptrdiff_t count, item
    largest_function largest
    double *out


cdef void largest_of_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Numbers *n = <const Numbers *>context
    cdef ptrdiff_t first = task * WORTH
    n.out[task] = n.largest(n.x + first * n.item, min(WORTH, n.count - first))


def largest(cnp.ndarray x, int threads=1):
    """max |x|, 0 for none, of contiguous float32 or float64 numbers; inf or NaN where one of them is."""
    cdef Numbers n
    cdef double most = 0, found
    cdef ptrdiff_t task
    n.largest = kernels.largest_f32 if x.itemsize == 4 else kernels.largest_f64
    n.x, n.count, n.item = <const char *>cnp.PyArray_DATA(x), cnp.PyArray_SIZE(x), x.itemsize
    if n.count <= WORTH:
        with nogil:
            most = n.largest(n.x, n.count)
        return most
    of_pieces = np.empty(pieces(n.count, WORTH))
    n.out = <double *>pointer(of_pieces)
    parallel_for(pieces(n.count, WORTH), threads, largest_of_piece, &n)
    for task in range(pieces(n.count, WORTH)):
        found = n.out[task]
        if found > most or found != found:  # nothing is above NaN, so that it stays
            most = found
    return most


def far_from_zero(low, high):
    """Whether some column lies farther from 0 than twice the distance between its ends, low and high (H, d)."""
    if low.dtype == np.float32:
        return far[float](<const float *>pointer(low), <const float *>pointer(high), low.size)
    return far[double](<const double *>pointer(low), <const double *>pointer(high), low.size)


def largest_norms(x, keep, shift, int threads):
    """max_i ||x_i - shift||, (H,) float64, of x (H, n, d) over the rows that keep (H, n) has; shift (H, d) or None."""
    cdef Pieces p = pieces_of(x)
    p.norm = kernels.norm_f32 if x.dtype == np.float32 else kernels.norm_f64
    p.keep, p.centre = <const char *>pointer(keep), <const char *>pointer(shift)
    found = np.empty((p.H, p.count))
    p.out = <double *>pointer(found)
    run(&p, threads, norm_of_piece)
    found = found[:, 0] if p.count == 1 else found.max(axis=1)
    return np.sqrt(found, out=found)


def largest_products(q, k, keep, double factor, int threads):
    """factor max_i ||q_hi|| max_j ||k_hj||, (H,) float64, of q (H, G, n, d) and the rows of k (H, n_k, d) that keep
    (H, n_k) has. 0 times inf is NaN: such norms bound nothing, and neither does their product.
    """
    cdef ptrdiff_t H = k.shape[0], head
    of_q = largest_norms(q.reshape(H, -1, k.shape[2]), None, None, threads)
    of_k = largest_norms(k, keep, None, threads)
    cdef const double *q_norms = <const double *>pointer(of_q)
    cdef const double *k_norms = <const double *>pointer(of_k)
    found = np.empty(H)
    cdef double *products = <double *>pointer(found)
    for head in range(H):
        products[head] = q_norms[head] * k_norms[head] * factor
    return found


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
    cdef Pieces p = pieces_of(x)
    p.norms = kernels.norms_f32 if x.dtype == np.float32 else kernels.norms_f64
    p.keep, p.factors = NULL, <const double *>pointer(factor)
    found = np.empty((p.H, p.n))
    p.out = <double *>pointer(found)
    run(&p, threads, norms_of_piece)
    return found


def quadratic(x, M, int threads):
    """<x_hi, M_h x_hi>, (H, n) float64, of x (H, n, d), M (H, d, d) symmetric."""
    cdef bint single = x.dtype == np.float32
    cdef Pieces p = pieces_of(x)
    p.quadratic = kernels.quadratic_f32 if single else kernels.quadratic_f64
    p.size = kernels.quadratic_workspace_f32(p.d) if single else kernels.quadratic_workspace_f64(p.d)
    p.size = pieces(p.size, LINE) * LINE
    # Half of the products are enough.
    upper = np.ascontiguousarray(np.triu(M) + np.triu(M, 1), x.dtype)
    found, workspace = np.empty((p.H, p.n)), np.empty(threads * p.size + LINE, np.uint8)
    p.keep, p.matrices = NULL, <const char *>pointer(upper)
    p.out, p.work = <double *>pointer(found), line(workspace)
    run(&p, threads, quadratic_of_piece)
    return found


def columns(x, keep, int threads):
    """Sums (H, d) float64, Inf or NaN where they overflow, minima and maxima (H, d) of the columns of x (H, n, d) over
    kept rows.
    """
    cdef Pieces p = pieces_of(x)
    p.columns = kernels.columns_f32 if x.dtype == np.float32 else kernels.columns_f64
    p.keep = <const char *>pointer(keep)
    total = np.empty((p.H, p.count, p.d))
    low, high = np.empty((p.H, p.count, p.d), x.dtype), np.empty((p.H, p.count, p.d), x.dtype)
    p.out, p.low, p.high = <double *>pointer(total), <char *>pointer(low), <char *>pointer(high)
    run(&p, threads, columns_of_piece)
    if p.count == 1:
        return total[:, 0], low[:, 0], high[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        return total.sum(axis=1), low.min(axis=1), high.max(axis=1)


cdef void scale(const floating *x, const double *factors, ptrdiff_t d, double *row) noexcept nogil:
    cdef ptrdiff_t a
    for a in range(d):
        row[a] = factors[a] * x[a]


def scaled(x, factors, rows, norms2, ptrdiff_t first):
    """rows[h, first + i] = factors x[h, i], coordinate by coordinate, and the squares of their norms.

    Parameters
    ----------
    x : (H, n, d) float32 or float64, C-contiguous
    factors : (d,) float64
    rows, norms2 : (H, m, d), (H, m) float64, C-contiguous, where the results are written
    first : int
    """
    cdef ptrdiff_t H = x.shape[0], n = x.shape[1], d = x.shape[2], m = rows.shape[1], h, i
    cdef bint single = x.dtype == np.float32
    cdef const void *source = pointer(x)
    cdef const double *by = <const double *>pointer(factors)
    cdef double *out = <double *>pointer(rows)
    cdef double *squares = <double *>pointer(norms2)
    cdef double *row
    with nogil:
        for h in range(H):
            for i in range(n):
                row = out + (h * m + first + i) * d
                if single:
                    scale(<const float *>source + (h * n + i) * d, by, d, row)
                else:
                    scale(<const double *>source + (h * n + i) * d, by, d, row)
        # Not of each row at once: vectors would wait until the numbers that they are made of are in the cache.
        for h in range(H):
            for i in range(first, first + n):
                squares[h * m + i] = kernels.norm_f64(out + (h * m + i) * d, 1, d, NULL, NULL)
