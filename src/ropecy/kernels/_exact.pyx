"""Exact attention forward: threads and memory around the serial C kernels of ``c/exact.h``.

The split of work depends on the shapes alone, never on the number of threads, so that results are bitwise the same
for every thread count.
"""

import numpy as np

cimport numpy as cnp
from cython cimport floating
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY, fabs, isfinite, sqrt
from libc.string cimport memchr

from ._arrays cimport LINE, line, lines, pieces, pointer
from ._halves cimport rc_halves_kernels, rc_halves_select
from ._memory cimport borrowed, results, returned
from ._parallel cimport parallel_for, rc_worker, team
from ._rows cimport far, rc_rows_kernels, rc_rows_select

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

LEVEL = rc_level()
cdef const rc_exact_kernels *kernels = rc_exact_select(LEVEL)
cdef const rc_rows_kernels *kernels_of_rows = rc_rows_select(LEVEL)
cdef const rc_halves_kernels *halves = rc_halves_select(LEVEL)


cdef const rc_exact_functions *functions_of(dtype):
    return kernels.f32 if dtype == np.float32 else kernels.f64


cdef Halves halves_of(dtype):
    cdef Halves found
    found.widen, found.narrow = NULL, NULL
    if dtype.itemsize == 2:
        found.widen, found.narrow = halves.widen_bfloat16, halves.narrow_bfloat16
        if dtype.kind == "f":
            found.widen, found.narrow = halves.widen_float16, halves.narrow_float16
    return found


def blocking(dtype):
    """(queries in a tile, keys in a block, lanes of a vector) for a dtype."""
    cdef const rc_exact_functions *f = functions_of(dtype)
    return f.tile, f.block, f.lanes


def left_out(dtype):
    """(queries, keys) that forward, and that backward, leaves out together where a band hides them; queries of a tile
    in backward see whole steps of keys.
    """
    cdef const rc_exact_functions *f = functions_of(dtype)
    return (f.queries, f.block), (f.tile, f.step)


cdef void describe(rc_exact_problem *p, q, k, v, tables):
    """What forward and backward share. Arrays: q (H, G, n, d), k (H, n_k, d), v (H, n_k, d_v), C-contiguous."""
    p.heads, p.groups, p.n, p.d = q.shape
    p.n_k, p.d_v = v.shape[1:]
    p.q, p.k, p.v = pointer(q), pointer(k), pointer(v)
    p.lo, p.hi = tables.lo, tables.hi
    p.scale, p.gain = tables.scale, tables.gain
    p.bounded = <const unsigned char *>pointer(tables.bounded)
    p.symbol, p.factor, p.key_shift = pointer(tables.symbol), pointer(tables.factor), pointer(tables.key_shift)
    p.factor_start = <const ptrdiff_t *>pointer(tables.factor_start)
    p.everywhere, p.masked = tables.everywhere, tables.masked
    if tables.symbol is not None:
        length = tables.symbol.shape[2]
        p.symbol_group = length if tables.symbol.shape[1] > 1 else 0
        p.symbol_head = length * tables.symbol.shape[1] if tables.symbol.shape[0] > 1 else 0


cdef void pack_keys(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    x.f.pack_keys(&x.p, task // x.blocks, task % x.blocks)


cdef void forward_tile(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    # Long rows first: the last tiles of a causal problem see the most keys.
    cdef ptrdiff_t tile = x.p.heads * x.p.groups * x.tiles - 1 - task
    cdef ptrdiff_t row = tile // x.tiles * x.p.n + tile % x.tiles * x.f.queries
    x.f.forward(&x.p, tile // x.tiles // x.p.groups, tile // x.tiles % x.p.groups, tile % x.tiles,
                <const char *>x.p.q + row * x.p.d * x.item, <char *>x.p.o + row * x.p.d_v * x.item,
                x.work + worker.slot * x.size)


def forward(q, k, v, tables, bint want_lse, int threads):
    """o (H, G, n, d_v), maximum and inverse (H, G, n), lse float64 or None.

    ``tables`` is engines.exact.Tables. Time n n_k (2 d + 2 d_v + exp); memory beyond the results: the packed keys.
    """
    cdef Pass x
    cdef rc_exact_problem *p = &x.p
    cdef double pairs
    describe(p, q, k, v, tables)
    x.f, x.item = functions_of(q.dtype), q.itemsize
    x.blocks, x.tiles = pieces(p.n_k, x.f.block), pieces(p.n, x.f.queries)
    o = results(q.shape[:3] + (p.d_v,), q.dtype)
    maximum, inverse = np.empty(q.shape[:3], q.dtype), np.empty(q.shape[:3], q.dtype)
    lse = np.empty(q.shape[:3]) if want_lse else None
    pairs = <double>p.heads * p.groups * p.n * p.n_k
    threads = team(threads, pairs * (p.d + p.d_v + 30))
    p.o, p.maximum, p.inverse, p.lse = pointer(o), pointer(maximum), pointer(inverse), <double *>pointer(lse)
    x.size = lines(x.f.forward_workspace(p)) + LINE
    memory = borrowed(threads * x.size + p.heads * x.blocks * x.f.block * p.d * q.itemsize)
    x.work = line(memory)
    p.key_pack = x.work + threads * x.size
    parallel_for(p.heads * x.blocks, team(threads, 4.0 * p.heads * p.n_k * p.d), pack_keys, &x)
    parallel_for(p.heads * p.groups * x.tiles, threads, forward_tile, &x)
    returned(memory)
    return o, maximum, inverse, lse


cdef struct Heads:
    # Whole heads as tasks, or a head's keys and then its tiles: what numbers must be, and whether some are not.
    Pass x
    ptrdiff_t stored         # bytes of a number as it is stored
    ptrdiff_t result         # and of one of o
    Halves halves
    ptrdiff_t keys, values   # bytes of the packed keys, and of the widened values, of a head
    ptrdiff_t rows           # bytes of the widened keys of a head, or as many queries, or those and results of a tile
    ptrdiff_t size           # of a thread's workspace: for tiles, rows, keys and values
    double factor            # the largest score of a head is at most this times its largest norms of queries and keys
    double most              # of scores
    double least_norm        # of a head's queries, and of its keys, the largest is between these, or 0
    double largest_norm
    double least_value       # of its values the largest number
    double largest_value
    char *packed             # keys and values of all heads; NULL where a thread has those of one head after the other
    unsigned char *mild      # (heads,): whether the numbers of a head are such


cdef double spread(
    const floating *x, ptrdiff_t n, ptrdiff_t d, double *total, floating *low, floating *high
) noexcept nogil:
    """max |x| of n rows; inf where a number is not finite or a column is far from 0, so that it would be centred."""
    cdef ptrdiff_t a
    cdef double largest = 0
    (kernels_of_rows.columns_f32 if floating is float else kernels_of_rows.columns_f64)(x, n, d, NULL, total, low, high)
    for a in range(d):
        if not isfinite(total[a]):
            return INFINITY
        largest = max(largest, max(fabs(low[a]), fabs(high[a])))
    return INFINITY if far(low, high, d) else largest


cdef bint usual(double largest, double least, double most) noexcept nogil:
    """Whether the largest of some sizes is between these, or 0; NaN is not."""
    return largest == 0 or (least <= largest and largest <= most)


cdef double query_norm2(const Heads *h, const rc_exact_problem *p, char *work) noexcept nogil:
    """The largest of the squared norms of one head's queries; inf or NaN where a number is."""
    cdef ptrdiff_t first = 0, rows = p.groups * p.n, most = p.n_k if h.halves.widen != NULL else rows
    cdef float *wide = <float *>(work + h.x.size)
    cdef double found, largest = 0
    while first < rows:
        most = min(most, rows - first)
        if h.halves.widen != NULL:
            h.halves.widen(<const char *>p.q + first * p.d * h.stored, most * p.d, wide)
            found = kernels_of_rows.norm_f32(wide, most, p.d, NULL, NULL)
        elif h.x.item == 4:
            found = kernels_of_rows.norm_f32(p.q, most, p.d, NULL, NULL)
        else:
            found = kernels_of_rows.norm_f64(p.q, most, p.d, NULL, NULL)
        if found != found:
            return found
        largest = max(largest, found)
        first += most
    return largest


cdef bint mild(const Heads *h, const rc_exact_problem *p, double q_norm2, const floating *k, char *work) noexcept nogil:
    """Whether one head's numbers are finite and of such sizes that they are computed as they are; k is what p.k is."""
    cdef bint single = floating is float
    cdef ptrdiff_t width = max(p.d, p.d_v)
    cdef double *total = <double *>work
    cdef floating *low = <floating *>(total + width)
    cdef double k_norm2
    k_norm2 = (kernels_of_rows.norm_f32 if single else kernels_of_rows.norm_f64)(k, p.n_k, p.d, NULL, NULL)
    # NaN fails each comparison, and Inf times 0 is NaN. Queries are packed times the scale, whatever size keys have.
    if not sqrt(q_norm2) * fabs(p.scale) <= (FLT_MAX if single else DBL_MAX) / 16:
        return False
    if not sqrt(q_norm2) * sqrt(k_norm2) * h.factor <= h.most:
        return False
    if not usual(sqrt(q_norm2), h.least_norm, h.largest_norm) or not usual(sqrt(k_norm2), h.least_norm, h.largest_norm):
        return False
    if spread(k, p.n_k, p.d, total, low, low + width) == INFINITY:
        return False
    return usual(spread(<const floating *>p.v, p.n_k, p.d_v, total, low, low + width), h.least_value, h.largest_value)


cdef rc_exact_problem one_head(const Heads *h, ptrdiff_t head, char *work) noexcept nogil:
    """The problem of one head by itself, values as computed with. The tables of scores are the same for all."""
    cdef rc_exact_problem p = h.x.p
    cdef ptrdiff_t rows = p.groups * p.n
    cdef char *packed = work + h.x.size + h.rows if h.packed == NULL else h.packed + head * (h.keys + h.values)
    p.q = <const char *>p.q + head * rows * p.d * h.stored
    p.k = <const char *>p.k + head * p.n_k * p.d * h.stored
    p.v = <const char *>p.v + head * p.n_k * p.d_v * h.stored if h.halves.widen == NULL else packed + h.keys
    p.o = <char *>p.o + head * rows * p.d_v * h.result
    p.maximum = <char *>p.maximum + head * rows * h.x.item
    p.inverse = <char *>p.inverse + head * rows * h.x.item
    p.lse = NULL if p.lse == NULL else p.lse + head * rows
    p.key_pack = packed
    return p


cdef void pack_head(void *context, ptrdiff_t head, const rc_worker *worker) noexcept nogil:
    cdef const Heads *h = <const Heads *>context
    cdef char *work = h.x.work + worker.slot * h.size
    cdef rc_exact_problem p = one_head(h, head, work)
    cdef double q_norm2 = query_norm2(h, &p, work)
    cdef ptrdiff_t block
    if h.halves.widen != NULL:
        h.halves.widen(p.k, p.n_k * p.d, <float *>(work + h.x.size))
        p.k = work + h.x.size
        h.halves.widen(<const char *>h.x.p.v + head * p.n_k * p.d_v * h.stored, p.n_k * p.d_v, <float *>p.v)
    if h.x.item == 4:
        h.mild[head] = mild(h, &p, q_norm2, <const float *>p.k, work)
    else:
        h.mild[head] = mild(h, &p, q_norm2, <const double *>p.k, work)
    for block in range(h.x.blocks if h.mild[head] else 0):
        h.x.f.pack_keys(&p, 0, block)


cdef void forward_rows(
    const Heads *h, const rc_exact_problem *p, ptrdiff_t group, ptrdiff_t tile, char *work
) noexcept nogil:
    """One tile of one head's queries, widened where they are halves, and its results rounded where these are."""
    cdef ptrdiff_t row = tile * h.x.f.queries, rows = min(<ptrdiff_t>h.x.f.queries, p.n - row), at = group * p.n + row
    cdef const char *q = <const char *>p.q + at * p.d * h.stored
    cdef char *o = <char *>p.o + at * p.d_v * h.result
    cdef float *wide_q = <float *>(work + h.x.size)
    cdef float *wide_o = wide_q + rows * p.d
    if h.halves.widen == NULL:
        h.x.f.forward(p, 0, group, tile, q, o, work)
        return
    h.halves.widen(q, rows * p.d, wide_q)
    if h.result == h.x.item:
        h.x.f.forward(p, 0, group, tile, wide_q, o, work)
        return
    h.x.f.forward(p, 0, group, tile, wide_q, wide_o, work)
    h.halves.narrow(wide_o, rows * p.d_v, o)


cdef void tile_of_head(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Heads *h = <const Heads *>context
    cdef const Pass *x = &h.x
    cdef char *work = x.work + worker.slot * h.size
    # Long rows first, as in `forward_tile`.
    cdef ptrdiff_t tile = x.p.heads * x.p.groups * x.tiles - 1 - task
    cdef rc_exact_problem p = one_head(h, tile // x.tiles // x.p.groups, work)
    forward_rows(h, &p, tile // x.tiles % x.p.groups, tile % x.tiles, work)


cdef void whole_head(void *context, ptrdiff_t head, const rc_worker *worker) noexcept nogil:
    cdef const Heads *h = <const Heads *>context
    cdef char *work = h.x.work + worker.slot * h.size
    cdef rc_exact_problem p = one_head(h, head, work)
    cdef ptrdiff_t group, tile
    pack_head(context, head, worker)
    for group in range(p.groups if h.mild[head] else 0):
        for tile in range(h.x.tiles):
            forward_rows(h, &p, group, tile, work)


cdef enum:
    HEAD = 4 << 20  # multiply-adds of a head, some 0.2 ms: more are worth several tasks
    HEADS = 8  # as many tasks keep some threads busy


def forward_mild(q, k, v, told, kind, bint want_lse, int threads):
    """As `forward`, with tables of one head for all, without a look at the numbers beforehand: None where those of a
    head turn out not to be finite, or far from 0, or past `sizes`. Arrays may be of float16 or bfloat16, which is then
    computed in float32. o is of the dtype `kind`, that of the arrays or that computed in.

    ``told`` is (tables, sizes), and ``sizes`` is (factor, most, norms, values): the factor times the norms of a query
    and a key is at most `most`; the largest norms of a head's queries and of its keys are between the two `norms`, or
    0, its largest value between the two `values`.
    """
    cdef Heads h
    cdef Pass *x = &h.x
    cdef rc_exact_problem *p = &x.p
    cdef double operations
    cdef bint apart
    tables, sizes = told
    describe(p, q, k, v, tables)
    compute = np.dtype(np.float32) if q.itemsize == 2 else q.dtype
    x.f, x.item = functions_of(compute), compute.itemsize
    x.blocks, x.tiles = pieces(p.n_k, x.f.block), pieces(p.n, x.f.queries)
    h.stored, h.result, h.packed, h.halves = q.itemsize, kind.itemsize, NULL, halves_of(q.dtype)
    h.factor, h.most, (h.least_norm, h.largest_norm), (h.least_value, h.largest_value) = sizes
    o, (maximum, inverse) = results(q.shape[:3] + (p.d_v,), kind), np.empty((2, *q.shape[:3]), compute)
    lse, are_mild = np.empty(q.shape[:3]) if want_lse else None, np.empty(p.heads, np.uint8)
    p.o, p.maximum, p.inverse, p.lse = pointer(o), pointer(maximum), pointer(inverse), <double *>pointer(lse)
    h.mild = <unsigned char *>pointer(are_mild)
    operations = <double>p.groups * p.n * p.n_k * (p.d + p.d_v + 30)
    threads = team(threads, p.heads * operations)
    # Of a tile, or of columns that are measured.
    x.size = lines(max(<ptrdiff_t>x.f.forward_workspace(p), max(p.d, p.d_v) * (8 + 2 * x.item))) + LINE
    h.keys = lines(x.blocks * x.f.block * p.d * x.item)
    h.values = lines(p.n_k * p.d_v * x.item) if h.halves.widen != NULL else 0
    h.rows = lines(max(p.n_k * p.d, x.f.queries * (p.d + p.d_v)) * x.item) if h.halves.widen != NULL else 0
    apart = p.heads < HEADS or operations > HEAD
    h.size = x.size + h.rows + (0 if apart else h.keys + h.values)
    memory = borrowed(threads * h.size + apart * p.heads * (h.keys + h.values))
    x.work = line(memory)
    if not apart:
        parallel_for(p.heads, threads, whole_head, &h)
    else:
        h.packed = x.work + threads * h.size
        parallel_for(p.heads, team(threads, 8.0 * p.heads * p.n_k * p.d), pack_head, &h)
        if memchr(h.mild, 0, p.heads) == NULL:
            parallel_for(p.heads * p.groups * x.tiles, threads, tile_of_head, &h)
    returned(memory)
    return (o, maximum, inverse, lse) if memchr(h.mild, 0, p.heads) == NULL else None
