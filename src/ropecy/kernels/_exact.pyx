"""Exact attention: threads, memory and interrupts around the serial C kernels of ``c/exact.h``.

The split of work depends on the shapes alone, never on the number of threads, so that results are bitwise the same
for every thread count.
"""

import numpy as np

cimport numpy as cnp

from ._arrays cimport LINE, line, pieces, pointer
from ._parallel cimport interrupted, parallel_for, rc_worker, team

cnp.import_array()

cdef extern from "c/exact.h" nogil:
    ctypedef struct rc_exact_problem:
        ptrdiff_t heads, groups, n, n_k, d, d_v, lo, hi
        double scale, gain
        const unsigned char *bounded
        int everywhere, masked
        const void *q
        const void *k
        const void *v
        const void *symbol
        ptrdiff_t symbol_head, symbol_group
        const void *factor
        const void *key_shift
        void *key_pack
        void *value_pack
        void *o
        void *maximum
        void *inverse
        double *lse
        const void *grad
        const void *q_rows
        const void *grad_rows
        void *q_tiles
        void *grad_tiles
        void *row_stats
        void *dq_segments
        double *dsymbol
        ptrdiff_t segments
        double grad_scale
        void *dq
        void *dk
        void *dv

    ctypedef struct rc_exact_functions:
        int tile, block, lanes
        size_t (*forward_workspace)(const rc_exact_problem *) noexcept nogil
        size_t (*backward_workspace)(const rc_exact_problem *) noexcept nogil
        void (*pack_keys)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*pack_values)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*forward)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t, ptrdiff_t, void *) noexcept nogil
        void (*prepare)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*backward)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, void *) noexcept nogil
        void (*collect)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t, ptrdiff_t) noexcept nogil

    ctypedef struct rc_exact_kernels:
        const rc_exact_functions *f32
        const rc_exact_functions *f64

    const rc_exact_kernels rc_exact_baseline
    const rc_exact_kernels *rc_exact_select(int level)

cdef extern from "c/isa.h" nogil:
    int rc_level()

LEVEL = rc_level()
cdef const rc_exact_kernels *kernels = rc_exact_select(LEVEL)


cdef struct Pass:
    rc_exact_problem p
    const rc_exact_functions *f
    ptrdiff_t tiles, blocks  # of a head's queries and keys
    char *work
    size_t size  # of a thread's workspace


cdef const rc_exact_functions *functions_of(dtype):
    return kernels.f32 if dtype == np.float32 else kernels.f64


def blocking(dtype):
    """(queries in a tile, keys in a block, lanes of a vector) for a dtype."""
    cdef const rc_exact_functions *f = functions_of(dtype)
    return f.tile, f.block, f.lanes


cdef void describe(rc_exact_problem *p, q, k, v, tables):
    """What forward and backward share. Arrays: q (H, G, n, d), k (H, n_k, d), v (H, n_k, d_v), C-contiguous."""
    p.heads, p.groups, p.n, p.d = q.shape
    p.n_k, p.d_v = v.shape[1:]
    p.q, p.k, p.v = pointer(q), pointer(k), pointer(v)
    p.lo, p.hi = tables.lo, tables.hi
    p.scale, p.gain = tables.scale, tables.gain
    p.bounded = <const unsigned char *>pointer(tables.bounded)
    p.symbol, p.factor, p.key_shift = pointer(tables.symbol), pointer(tables.factor), pointer(tables.key_shift)
    p.everywhere, p.masked = tables.everywhere, tables.masked
    if tables.symbol is not None:
        length = tables.symbol.shape[2]
        p.symbol_group = length if tables.symbol.shape[1] > 1 else 0
        p.symbol_head = length * tables.symbol.shape[1] if tables.symbol.shape[0] > 1 else 0


cdef void pack_keys(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    x.f.pack_keys(&x.p, task // x.blocks, task % x.blocks)


cdef void pack_keys_and_values(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    x.f.pack_keys(&x.p, task // x.blocks, task % x.blocks)
    x.f.pack_values(&x.p, task // x.blocks, task % x.blocks)


cdef void forward_tile(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    # Long rows first: the last tiles of a causal problem see the most keys.
    cdef ptrdiff_t tile = x.p.heads * x.p.groups * x.tiles - 1 - task
    x.f.forward(&x.p, tile // x.tiles // x.p.groups, tile // x.tiles % x.p.groups, tile % x.tiles,
                x.work + worker.slot * x.size)


cdef void prepare_tile(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    x.f.prepare(&x.p, task // x.tiles // x.p.groups, task // x.tiles % x.p.groups, task % x.tiles)


cdef void backward_segment(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    cdef ptrdiff_t block
    for block in range(pieces(x.blocks, x.p.segments)):
        if interrupted(worker):
            return
        x.f.backward(&x.p, task // x.p.segments, task % x.p.segments, block, block + 1, x.work + worker.slot * x.size)


cdef void collect_tile(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    x.f.collect(&x.p, task // x.tiles // x.p.groups, task // x.tiles % x.p.groups, task % x.tiles)


def forward(q, k, v, tables, bint want_lse, int threads):
    """o (H, G, n, d_v), maximum and inverse (H, G, n), lse float64 or None.

    ``tables`` is engines.exact.Tables. Time n n_k (2 d + 2 d_v + exp); memory beyond the results: the packed keys.
    """
    cdef Pass x
    cdef rc_exact_problem *p = &x.p
    cdef double pairs
    describe(p, q, k, v, tables)
    x.f = functions_of(q.dtype)
    x.blocks, x.tiles = pieces(p.n_k, x.f.block), pieces(p.n, x.f.tile)
    o = np.empty(q.shape[:3] + (p.d_v,), q.dtype)
    maximum, inverse = np.empty(q.shape[:3], q.dtype), np.empty(q.shape[:3], q.dtype)
    lse = np.empty(q.shape[:3]) if want_lse else None
    pairs = <double>p.heads * p.groups * p.n * p.n_k
    threads = team(threads, pairs * (p.d + p.d_v + 30))
    key_pack = np.empty((p.heads, x.blocks * x.f.block, p.d), q.dtype)
    p.key_pack = pointer(key_pack)
    p.o, p.maximum, p.inverse, p.lse = pointer(o), pointer(maximum), pointer(inverse), <double *>pointer(lse)
    x.size = pieces(x.f.forward_workspace(p), LINE) * LINE + LINE
    workspace = np.empty(threads * x.size + LINE, np.uint8)
    x.work = line(workspace)
    parallel_for(p.heads * x.blocks, team(threads, 4.0 * p.heads * p.n_k * p.d), pack_keys, &x)
    parallel_for(p.heads * p.groups * x.tiles, threads, forward_tile, &x)
    return o, maximum, inverse, lse


def segments_of(ptrdiff_t heads, ptrdiff_t n_k, dtype):
    """Into how many parts, each with its own dq, backward cuts the keys of each of so many heads: what keeps 8 threads
    busy.
    """
    return max(1, min(8 // heads if heads else 1, pieces(n_k, functions_of(dtype).block)))


def backward(saved, v, grad, bint want_dsymbol, ptrdiff_t segments, int threads):
    """dq, dk, dv and the gradient along diagonals (H, G, table length) float64, or None, for do = grad; `saved` is what
    `engines.exact.streaming` keeps of a forward pass, `segments` into how many parts the keys of a head are cut.

    Time 2.5 forwards (5 products); memory: transposed copies of q and grad and one dq for each segment.
    """
    cdef Pass x
    cdef rc_exact_problem *p = &x.p
    cdef ptrdiff_t tiles
    cdef double pairs
    q, k, tables, dtype = saved.sized.q, saved.sized.k, saved.tables, v.dtype
    describe(p, q, k, v, tables)
    p.segments = segments
    x.f = functions_of(dtype)
    x.blocks, x.tiles = pieces(p.n_k, x.f.block), pieces(p.n, x.f.tile)
    pairs = <double>p.heads * p.groups * p.n * p.n_k
    threads = team(threads, pairs * (3 * p.d + 2 * p.d_v + 30))
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    key_pack = np.empty((p.heads, x.blocks * x.f.block, p.d), dtype)
    value_pack = np.empty((p.heads, x.blocks * x.f.block, p.d_v), dtype)
    q_rows, grad_rows = whole_vectors(q, x.f.lanes), whole_vectors(grad, x.f.lanes)
    # Of each tile of queries, which are padded to whole ones.
    tiles = p.heads * p.groups * x.tiles
    rows = tiles * x.f.tile * q.itemsize
    q_tiles, grad_tiles = np.empty(rows * p.d + LINE, np.uint8), np.empty(rows * p.d_v + LINE, np.uint8)
    row_stats, dq_segments = np.empty(rows * 3 + LINE, np.uint8), np.zeros(p.segments * rows * p.d + LINE, np.uint8)
    length = x.f.block + p.n + p.n_k - 1 + x.f.tile
    dsymbol = np.zeros((p.segments, p.heads, p.groups, length)) if want_dsymbol else None
    p.key_pack, p.value_pack, p.grad = pointer(key_pack), pointer(value_pack), pointer(grad)
    p.q_rows, p.grad_rows = pointer(q_rows), pointer(grad_rows)
    p.q_tiles, p.grad_tiles, p.row_stats = line(q_tiles), line(grad_tiles), line(row_stats)
    p.dq_segments, p.dsymbol = line(dq_segments), <double *>pointer(dsymbol)
    p.o, p.maximum, p.inverse = pointer(saved.o), pointer(saved.maximum), pointer(saved.inverse)
    p.dq, p.dk, p.dv = pointer(dq), pointer(dk), pointer(dv)
    p.grad_scale = tables.grad_scale
    x.size = pieces(x.f.backward_workspace(p), LINE) * LINE + LINE
    workspace = np.empty(threads * x.size + LINE, np.uint8)
    x.work = line(workspace)
    parallel_for(p.heads * x.blocks, team(threads, 4.0 * p.heads * p.n_k * (p.d + p.d_v)), pack_keys_and_values, &x)
    parallel_for(tiles, team(threads, 4.0 * p.heads * p.groups * p.n * (p.d + p.d_v)), prepare_tile, &x)
    # Blocks of one segment go in order, so a segment is one task.
    parallel_for(p.heads * p.segments, threads, backward_segment, &x)
    parallel_for(tiles, team(threads, 4.0 * p.segments * p.heads * p.groups * p.n * p.d), collect_tile, &x)
    return dq, dk, dv, None if dsymbol is None else dsymbol.sum(axis=0)


def whole_vectors(rows, int lanes):
    """rows with their last axis padded by zeros to a multiple of lanes; rows itself where it is one."""
    cdef ptrdiff_t width = rows.shape[rows.ndim - 1]
    if width % lanes == 0:
        return rows
    padded = np.zeros(rows.shape[:rows.ndim - 1] + (pieces(width, lanes) * lanes,), rows.dtype)
    padded[..., :width] = rows
    return padded
