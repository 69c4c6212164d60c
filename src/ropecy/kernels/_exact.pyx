"""Exact attention: threads, memory and interrupts around the serial C kernels of ``c/exact.h``.

The split of work depends on the shapes alone, never on the number of threads, so that results are bitwise the same
for every thread count. Long work is done in rounds of a fraction of a second, with a look at Ctrl-C between them.
"""

import numpy as np

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange, threadid

from ._arrays cimport LINE, line, pieces, pointer

cnp.import_array()

cdef extern from "c/exact.h" nogil:
    ctypedef struct rc_exact_problem:
        ptrdiff_t heads, groups, n, n_k, d, d_v, lo, hi
        double scale, gain
        int bounded, everywhere, masked
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

cdef double SHARE = 5e6  # operations of a thread, some 50 us
cdef double ROUND = 0.2  # seconds of one core between two looks at Ctrl-C
cdef double PAIR_RATE = 2e10  # operations a second, low: a bound on a round's time, not a prediction


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
    p.scale, p.gain, p.bounded = tables.scale, tables.gain, tables.bounded
    p.symbol, p.factor, p.key_shift = pointer(tables.symbol), pointer(tables.factor), pointer(tables.key_shift)
    p.everywhere, p.masked = tables.everywhere, tables.masked
    if tables.symbol is not None:
        length = tables.symbol.shape[2]
        p.symbol_group = length if tables.symbol.shape[1] > 1 else 0
        p.symbol_head = length * tables.symbol.shape[1] if tables.symbol.shape[0] > 1 else 0


def forward(q, k, v, tables, bint want_lse, int threads):
    """o (H, G, n, d_v), maximum and inverse (H, G, n), lse float64 or None.

    ``tables`` is engines.exact.Tables. Time n n_k (2 d + 2 d_v + exp); memory beyond the results: the packed keys.
    """
    cdef const rc_exact_functions *f = functions_of(q.dtype)
    cdef rc_exact_problem p
    cdef ptrdiff_t task, first, last, tiles, blocks, tasks, in_round, size
    cdef double each
    cdef char *work
    describe(&p, q, k, v, tables)
    o = np.empty(q.shape[:3] + (p.d_v,), q.dtype)
    maximum, inverse = np.empty(q.shape[:3], q.dtype), np.empty(q.shape[:3], q.dtype)
    lse = np.empty(q.shape[:3]) if want_lse else None
    blocks = pieces(p.n_k, f.block)
    tiles = pieces(p.n, f.tile)
    each = f.tile * p.n_k * (2.0 * p.d + 2.0 * p.d_v + 60.0)
    threads = worth(threads, p.heads * p.groups * tiles * each)
    key_pack = np.empty((p.heads, blocks * f.block, p.d), q.dtype)
    p.key_pack = pointer(key_pack)
    p.o, p.maximum, p.inverse, p.lse = pointer(o), pointer(maximum), pointer(inverse), <double *>pointer(lse)
    size = pieces(f.forward_workspace(&p), LINE) * LINE + LINE
    workspace = np.empty(threads * size + LINE, np.uint8)
    work = line(workspace)
    tasks = p.heads * blocks
    for task in prange(tasks, nogil=True, num_threads=threads, schedule="static"):
        f.pack_keys(&p, task // blocks, task % blocks)
    tasks = p.heads * p.groups * tiles
    in_round = rounds(threads, each)
    for first in range(0, tasks, in_round):
        last = min(tasks, first + in_round)
        # Long rows first: the last tiles of a causal problem see the most keys.
        for task in prange(first, last, nogil=True, num_threads=threads, schedule="dynamic"):
            f.forward(&p, (tasks - 1 - task) // tiles // p.groups, (tasks - 1 - task) // tiles % p.groups,
                      (tasks - 1 - task) % tiles, work + threadid() * size)
        PyErr_CheckSignals()
    return o, maximum, inverse, lse


cdef int worth(int threads, double operations):
    """So many threads, or fewer, each of which has enough to do to be worth waking."""
    return min(threads, max(1, <int>min(operations / SHARE, 2e9)))


cdef ptrdiff_t rounds(int threads, double operations):
    """Tasks in a round of ROUND seconds, at least one a thread."""
    return max(<ptrdiff_t>threads, <ptrdiff_t>(threads * ROUND * PAIR_RATE / operations))


def segments_of(ptrdiff_t heads, ptrdiff_t n_k, dtype):
    """Into how many parts, each with its own dq, backward cuts the keys: what keeps 8 threads busy."""
    return max(1, min(8 // heads if heads else 1, pieces(n_k, functions_of(dtype).block)))


def backward(q, k, v, tables, o, maximum, inverse, grad, bint want_dsymbol, int threads):
    """dq, dk, dv and the gradient along diagonals (H, G, table length) float64, or None, for do = grad.

    Time 2.5 forwards (5 products); memory: transposed copies of q and grad and one dq for each segment.
    """
    cdef const rc_exact_functions *f = functions_of(q.dtype)
    cdef rc_exact_problem p
    cdef ptrdiff_t task, first, last, tiles, blocks, tasks, in_round, size
    cdef double each
    cdef char *work
    describe(&p, q, k, v, tables)
    dtype = q.dtype
    blocks = pieces(p.n_k, f.block)
    tiles = pieces(p.n, f.tile)
    each = f.block * <double>p.groups * p.n * (6.0 * p.d + 4.0 * p.d_v + 60.0)
    threads = worth(threads, p.heads * blocks * each)
    p.segments = segments_of(p.heads, p.n_k, dtype)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    key_pack = np.empty((p.heads, blocks * f.block, p.d), dtype)
    value_pack = np.empty((p.heads, blocks * f.block, p.d_v), dtype)
    q_rows, grad_rows = whole_vectors(q, f.lanes), whole_vectors(grad, f.lanes)
    # Of each tile of queries, which are padded to whole ones.
    rows = p.heads * p.groups * tiles * f.tile * q.itemsize
    q_tiles, grad_tiles = np.empty(rows * p.d + LINE, np.uint8), np.empty(rows * p.d_v + LINE, np.uint8)
    row_stats, dq_segments = np.empty(rows * 3 + LINE, np.uint8), np.zeros(p.segments * rows * p.d + LINE, np.uint8)
    length = f.block + p.n + p.n_k - 1 + f.tile
    dsymbol = np.zeros((p.segments, p.heads, p.groups, length)) if want_dsymbol else None
    p.key_pack, p.value_pack, p.grad = pointer(key_pack), pointer(value_pack), pointer(grad)
    p.q_rows, p.grad_rows = pointer(q_rows), pointer(grad_rows)
    p.q_tiles, p.grad_tiles, p.row_stats = line(q_tiles), line(grad_tiles), line(row_stats)
    p.dq_segments, p.dsymbol = line(dq_segments), <double *>pointer(dsymbol)
    p.o, p.maximum, p.inverse = pointer(o), pointer(maximum), pointer(inverse)
    p.dq, p.dk, p.dv = pointer(dq), pointer(dk), pointer(dv)
    p.grad_scale = tables.grad_scale
    size = pieces(f.backward_workspace(&p), LINE) * LINE + LINE
    workspace = np.empty(threads * size + LINE, np.uint8)
    work = line(workspace)
    tasks = p.heads * blocks
    for task in prange(tasks, nogil=True, num_threads=threads, schedule="static"):
        f.pack_keys(&p, task // blocks, task % blocks)
        f.pack_values(&p, task // blocks, task % blocks)
    tasks = p.heads * p.groups * tiles
    for task in prange(tasks, nogil=True, num_threads=threads, schedule="static"):
        f.prepare(&p, task // tiles // p.groups, task // tiles % p.groups, task % tiles)
    # Blocks of one segment go in order, whoever takes them: a round advances every segment by `in_round` blocks.
    in_round = max(1, rounds(1, each))
    for first in range(0, pieces(blocks, p.segments), in_round):
        last = first + in_round
        for task in prange(p.heads * p.segments, nogil=True, num_threads=threads, schedule="dynamic"):
            f.backward(&p, task // p.segments, task % p.segments, first, last, work + threadid() * size)
        PyErr_CheckSignals()
    for task in prange(tasks, nogil=True, num_threads=threads, schedule="static"):
        f.collect(&p, task // tiles // p.groups, task // tiles % p.groups, task % tiles)
    return dq, dk, dv, None if dsymbol is None else dsymbol.sum(axis=0)


def whole_vectors(rows, int lanes):
    """rows with their last axis padded by zeros to a multiple of lanes; rows itself where it is one."""
    cdef ptrdiff_t width = rows.shape[rows.ndim - 1]
    if width % lanes == 0:
        return rows
    padded = np.zeros(rows.shape[:rows.ndim - 1] + (pieces(width, lanes) * lanes,), rows.dtype)
    padded[..., :width] = rows
    return padded
