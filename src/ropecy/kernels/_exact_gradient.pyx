"""The gradient of exact attention: threads, memory and interrupts around the serial C kernels of ``c/exact.h``.

Some heads at a time are computed, so that what is copied of queries, keys and values, and the parts of dq, are kept of
these alone. How the work of a head is split depends on shapes alone, never on the number of threads or on what is
computed beside it, so that results are bitwise the same for every thread count.
"""

import numpy as np

cimport numpy as cnp
from libc.string cimport memcpy, memset

from ._arrays cimport LINE, line, lines, pieces, pointer
from ._exact cimport Halves, Pass, describe, functions_of, halves_of, rc_exact_problem
from ._memory cimport borrowed, results, returned
from ._parallel cimport interrupted, parallel_for, rc_worker, team

cnp.import_array()


cdef struct Gradient:
    Pass x
    Halves halves
    ptrdiff_t stored        # bytes of a number as q, k, v and do are stored, and their gradients
    ptrdiff_t wide, wide_v  # entries of rows of q and do in whole vectors
    ptrdiff_t key_shift, symbol  # bytes from one head's table to the next
    ptrdiff_t length        # of the gradient along diagonals
    const char *grad
    char *dq
    char *dk
    char *dv
    char *places            # what is kept of a head while it is computed, for each that is computed at once
    ptrdiff_t place         # bytes of one
    ptrdiff_t first         # the head that has the first place


cdef enum:
    TASKS = 4  # that each thread has at least of the heads that are computed at once
    WORK = 1 << 29  # multiply-adds of these at least, some 10 ms: fewer are not worth waiting for the last thread


cdef char *cut(ptrdiff_t *used, char *memory, ptrdiff_t size) noexcept nogil:
    """The next bytes of the memory, of which so many are used, from the beginning of a cache line on."""
    cdef char *found = memory + used[0]
    used[0] += lines(size)
    return found


cdef ptrdiff_t lay_out(const Gradient *g, rc_exact_problem *p, char *memory) noexcept nogil:
    """What is kept of a head in this memory, which begins a cache line; how many bytes that is."""
    cdef ptrdiff_t used = 0, item = g.x.item
    cdef ptrdiff_t keys = g.x.blocks * g.x.f.block * item, rows = p.groups * g.x.tiles * g.x.f.tile * item
    p.key_pack, p.value_pack = cut(&used, memory, keys * p.d), cut(&used, memory, keys * p.d_v)
    p.q_tiles, p.grad_tiles = cut(&used, memory, rows * p.d), cut(&used, memory, rows * p.d_v)
    p.row_stats, p.dq_segments = cut(&used, memory, rows * 3), cut(&used, memory, p.segments * rows * p.d)
    # Where these are not computed with as they are stored.
    if g.halves.widen != NULL:
        p.k = cut(&used, memory, p.n_k * p.d * item)
    if g.halves.widen != NULL or g.wide != p.d:
        p.q_rows = cut(&used, memory, p.groups * p.n * g.wide * item)
    if g.halves.widen != NULL or g.wide_v != p.d_v:
        p.grad_rows = cut(&used, memory, p.groups * p.n * g.wide_v * item)
    return used


cdef rc_exact_problem of_head(const Gradient *g, ptrdiff_t at) noexcept nogil:
    """The problem, by itself, of the head that has this place."""
    cdef rc_exact_problem p = g.x.p
    cdef ptrdiff_t head = g.first + at, rows = p.groups * p.n
    p.q_rows = <const char *>p.q + head * rows * p.d * g.stored
    p.grad_rows = g.grad + head * rows * p.d_v * g.stored
    p.k = <const char *>p.k + head * p.n_k * p.d * g.stored
    lay_out(g, &p, g.places + at * g.place)
    p.o = <char *>p.o + head * rows * p.d_v * g.x.item
    p.maximum, p.inverse = <char *>p.maximum + head * rows * g.x.item, <char *>p.inverse + head * rows * g.x.item
    p.key_shift = <const char *>p.key_shift + head * g.key_shift
    if p.symbol != NULL:
        p.symbol = <const char *>p.symbol + head * g.symbol
    if p.factor_start != NULL:
        p.factor_start += head * p.groups
    if p.dsymbol != NULL:
        p.dsymbol += head * p.segments * p.groups * g.length
    p.heads = 1
    return p


cdef void pack_block(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Gradient *g = <const Gradient *>context
    cdef ptrdiff_t at = task // g.x.blocks, j0 = task % g.x.blocks * g.x.f.block
    cdef rc_exact_problem p = of_head(g, at)
    cdef ptrdiff_t first = (g.first + at) * p.n_k + j0, keys = min(<ptrdiff_t>g.x.f.block, p.n_k - j0)
    cdef const char *k = <const char *>g.x.p.k + first * p.d * g.stored
    p.v = <const char *>p.v + first * p.d_v * g.stored
    p.k = <const char *>p.k + j0 * p.d * g.x.item
    if g.halves.widen != NULL:
        g.halves.widen(k, keys * p.d, <float *>p.k)
        g.halves.widen(p.v, keys * p.d_v, <float *>(g.x.work + worker.slot * g.x.size))
        p.v = g.x.work + worker.slot * g.x.size
    p.key_pack = <char *>p.key_pack + j0 * p.d * g.x.item
    p.value_pack = <char *>p.value_pack + j0 * p.d_v * g.x.item
    p.n_k = keys
    g.x.f.pack_keys(&p, 0, 0)
    g.x.f.pack_values(&p, 0, 0)


cdef void fill_rows(
    const Gradient *g, const char *stored, ptrdiff_t rows, ptrdiff_t width, ptrdiff_t wide, char *out
) noexcept nogil:
    """Rows as they are computed with: widened, with zeros up to whole vectors."""
    cdef ptrdiff_t _i, item = g.x.item
    if wide == width:
        g.halves.widen(stored, rows * width, <float *>out)
        return
    for _i in range(rows):
        if g.halves.widen != NULL:
            g.halves.widen(stored, width, <float *>out)
        else:
            memcpy(out, stored, width * item)
        memset(out + width * item, 0, (wide - width) * item)
        stored += width * g.stored
        out += wide * item


cdef void prepare_tile(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Gradient *g = <const Gradient *>context
    cdef ptrdiff_t at = task // g.x.tiles // g.x.p.groups, group = task // g.x.tiles % g.x.p.groups
    cdef rc_exact_problem p = of_head(g, at)
    cdef ptrdiff_t tile = task % g.x.tiles, row0 = tile * g.x.f.tile, rows = min(<ptrdiff_t>g.x.f.tile, p.n - row0)
    cdef ptrdiff_t own = group * p.n + row0, first = (g.first + at) * p.groups * p.n + own
    if g.halves.widen != NULL or g.wide != p.d:
        fill_rows(g, <const char *>g.x.p.q + first * p.d * g.stored, rows, p.d, g.wide,
                  <char *>p.q_rows + own * g.wide * g.x.item)
    if g.halves.widen != NULL or g.wide_v != p.d_v:
        fill_rows(g, g.grad + first * p.d_v * g.stored, rows, p.d_v, g.wide_v,
                  <char *>p.grad_rows + own * g.wide_v * g.x.item)
    g.x.f.prepare(&p, group, tile)


cdef void of_segment(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Gradient *g = <const Gradient *>context
    cdef ptrdiff_t at = task // g.x.p.segments, segment = task % g.x.p.segments
    cdef rc_exact_problem p = of_head(g, at)
    cdef ptrdiff_t size = p.groups * g.x.tiles * p.d * g.x.f.tile * g.x.item  # of the segment's dq
    cdef ptrdiff_t block = segment, j0, keys
    cdef char *work = g.x.work + worker.slot * g.x.size
    cdef char *dk
    cdef char *dv
    cdef float *wide = <float *>work
    memset(<char *>p.dq_segments + segment * size, 0, size)
    if g.halves.widen != NULL:
        work += lines(g.x.f.block * (p.d + p.d_v) * g.x.item)
    while block < g.x.blocks and not interrupted(worker):
        j0, keys = block * g.x.f.block, min(<ptrdiff_t>g.x.f.block, p.n_k - block * g.x.f.block)
        dk = g.dk + ((g.first + at) * p.n_k + j0) * p.d * g.stored
        dv = g.dv + ((g.first + at) * p.n_k + j0) * p.d_v * g.stored
        if g.halves.widen == NULL:
            g.x.f.backward(&p, block, dk, dv, work)
        else:
            g.x.f.backward(&p, block, wide, wide + keys * p.d, work)
            g.halves.narrow(wide, keys * p.d, dk)
            g.halves.narrow(wide + keys * p.d, keys * p.d_v, dv)
        block += p.segments


cdef void collect_tile(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Gradient *g = <const Gradient *>context
    cdef ptrdiff_t at = task // g.x.tiles // g.x.p.groups, group = task // g.x.tiles % g.x.p.groups
    cdef rc_exact_problem p = of_head(g, at)
    cdef ptrdiff_t tile = task % g.x.tiles, row0 = tile * g.x.f.tile, rows = min(<ptrdiff_t>g.x.f.tile, p.n - row0)
    cdef char *dq = g.dq + (((g.first + at) * p.groups + group) * p.n + row0) * p.d * g.stored
    cdef float *wide = <float *>(g.x.work + worker.slot * g.x.size)
    if g.halves.widen == NULL:
        g.x.f.collect(&p, group, tile, dq)
    else:
        g.x.f.collect(&p, group, tile, wide)
        g.halves.narrow(wide, rows * p.d, dq)


def segments_of(ptrdiff_t heads, ptrdiff_t n_k, dtype):
    """Into how many parts, each with its own dq, backward cuts the keys of each of so many heads: what keeps 8 threads
    busy, and two where few of these heads are computed exactly, for long sequences, as long as that takes few dq.
    """
    if heads == 0:
        return 1
    of_few = min(4, 32 // heads, n_k // 1024)
    return max(1, min(max(8 // heads, of_few), pieces(n_k, functions_of(dtype).block)))


def heads_at_once(ptrdiff_t heads, double work, ptrdiff_t segments, int threads):
    """How many heads are computed at once, each of them so many multiply-adds."""
    return min(heads, max(pieces(TASKS * threads, segments), <ptrdiff_t>min(<double>heads, WORK / max(work, 1.0))))


def backward(saved, v, grad, bint want_dsymbol, ptrdiff_t segments, int threads):
    """dq, dk, dv and the gradient along diagonals (H, G, table length) float64, or None, for do = grad; `saved` is what
    `engines.exact.streaming` keeps of a forward pass, `segments` into how many parts the keys of a head are cut.

    q, k, v and do may be of float16 or bfloat16, beside o of float32, which is then computed in: so are the gradients.

    Time 2.5 forwards (5 products); memory, for some heads at a time: transposed copies of q, k, v and do, halves also
    widened, and one dq for each segment.
    """
    cdef Gradient g
    cdef Pass *x = &g.x
    cdef rc_exact_problem *p = &x.p
    cdef rc_exact_problem one
    cdef ptrdiff_t at_once, count
    cdef double work
    q, k, tables, compute = saved.sized.q, saved.sized.k, saved.tables, saved.o.dtype
    describe(p, q, k, v, tables)
    p.segments, p.grad_scale = segments, tables.grad_scale
    x.f, x.item, g.stored, g.halves = functions_of(compute), compute.itemsize, v.itemsize, halves_of(v.dtype)
    x.blocks, x.tiles = pieces(p.n_k, x.f.block), pieces(p.n, x.f.tile)
    g.wide, g.wide_v = pieces(p.d, x.f.lanes) * x.f.lanes, pieces(p.d_v, x.f.lanes) * x.f.lanes
    g.key_shift = x.blocks * x.f.block * x.item if len(tables.key_shift) > 1 else 0
    g.symbol, g.length = p.symbol_head * x.item, x.f.block + p.n + p.n_k - 1 + x.f.tile
    dq, dk, dv = (results(X.shape, X.dtype) for X in (q, k, v))
    dsymbol = np.zeros((p.heads, segments, p.groups, g.length)) if want_dsymbol else None
    g.grad, g.dq, g.dk, g.dv = <char *>pointer(grad), <char *>pointer(dq), <char *>pointer(dk), <char *>pointer(dv)
    p.o, p.maximum, p.inverse = pointer(saved.o), pointer(saved.maximum), pointer(saved.inverse)
    p.dsymbol = <double *>pointer(dsymbol)
    work = <double>p.groups * p.n * p.n_k * (3 * p.d + 2 * p.d_v + 30)
    threads = team(threads, p.heads * work)
    at_once = heads_at_once(p.heads, work, segments, threads)
    x.size = lines(x.f.backward_workspace(p)) + LINE
    if g.halves.widen != NULL:
        x.size += lines(max(x.f.block * (p.d + p.d_v), x.f.tile * p.d) * x.item)
    one = x.p
    g.place = lay_out(&g, &one, NULL)
    memory = borrowed(threads * x.size + at_once * g.place)
    x.work = line(memory)
    g.places = x.work + threads * x.size
    g.first = 0
    while g.first < p.heads:
        count = min(at_once, p.heads - g.first)
        parallel_for(count * x.blocks, team(threads, 4.0 * count * p.n_k * (p.d + p.d_v)), pack_block, &g)
        parallel_for(count * p.groups * x.tiles, team(threads, 4.0 * count * p.groups * p.n * (p.d + p.d_v)),
                     prepare_tile, &g)
        # Blocks of one segment go in order, so a segment is one task.
        parallel_for(count * segments, threads, of_segment, &g)
        parallel_for(count * p.groups * x.tiles, team(threads, 4.0 * segments * count * p.groups * p.n * p.d),
                     collect_tile, &g)
        g.first += count
    returned(memory)
    return dq, dk, dv, None if dsymbol is None else dsymbol.sum(axis=1)
