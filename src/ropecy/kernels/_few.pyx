"""Attention of few queries: threads, memory and interrupts around the serial C kernels of ``c/few.h``.

The parts into which the keys of a sequence are cut depend on their number alone, never on the number of threads or on
other sequences, so that results are bitwise the same whatever these are.
"""

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int32_t
from libc.string cimport memchr

from ._arrays cimport LINE, line, pieces, pointer
from ._parallel cimport parallel_for, rc_worker, team

cnp.import_array()

cdef extern from "c/few.h" nogil:
    ctypedef struct rc_few_strides:
        ptrdiff_t row, column, head, page

    ctypedef struct rc_few_sequence:
        ptrdiff_t n, n_k, lo, hi, row
        ptrdiff_t first "from"
        const int32_t *pages
        const void *k
        const void *v
        const unsigned char *keep
        double most
        ptrdiff_t first_part
        size_t partial

    ctypedef struct rc_few_problem:
        const rc_few_sequence *sequences
        ptrdiff_t heads, group, d, d_v, page
        rc_few_strides k, v
        const void *q
        double scale
        ptrdiff_t head_rows, query_rows
        char *partial
        void *o
        double *lse

    ctypedef struct rc_few_task:
        ptrdiff_t sequence, part, parts, head, heads

    enum:
        RC_FEW_HEADS

    ctypedef struct rc_few_functions:
        size_t (*partial_size)(const rc_few_problem *, ptrdiff_t) noexcept nogil
        size_t (*workspace)(const rc_few_problem *, ptrdiff_t, ptrdiff_t) noexcept nogil
        int (*of_parts)(const rc_few_problem *, const rc_few_sequence *, rc_few_task, void *) noexcept nogil
        int (*far)(const rc_few_problem *, const rc_few_sequence *, ptrdiff_t, void *) noexcept nogil
        void (*merge)(const rc_few_problem *, const rc_few_sequence *, ptrdiff_t) noexcept nogil

    ctypedef struct rc_few_kernels:
        ptrdiff_t part
        rc_few_functions float32, float64, float16, bfloat16

    const rc_few_kernels *rc_few_select(int level)

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_few_kernels *kernels = rc_few_select(rc_level())


cdef struct Pass:
    rc_few_problem p
    const rc_few_functions *f
    ptrdiff_t parts  # of all sequences
    size_t left  # bytes, by all parts
    double keys  # of all sequences
    rc_few_task *tasks
    ptrdiff_t count  # of tasks
    char *work
    size_t size  # of a thread's workspace
    unsigned char *good  # of each task, whether all that it read and made was finite, and not too large
    unsigned char *done  # of each head of a sequence, whether its result is right


cdef enum:
    TASKS = 8  # that each thread has at least, where there is enough to do
    LONGEST_RUN = 4  # parts of a task

cdef int32_t FIRST_PAGE = 0  # where there is one page


cdef const rc_few_functions *functions_of(dtype):
    """Of float32, float64, float16 and bfloat16, which is none of NumPy's own kinds of numbers."""
    if dtype.itemsize != 2:
        return &kernels.float32 if dtype.itemsize == 4 else &kernels.float64
    return &kernels.float16 if dtype.kind == "f" else &kernels.bfloat16


cdef char *of_slot(cnp.ndarray x, int inner, ptrdiff_t slot):
    """Where one of the arrays of the last `inner` axes begins, the others counted as one; NULL where there is no x."""
    if x is None:
        return NULL
    cdef char *found = <char *>cnp.PyArray_DATA(x)
    cdef int axis
    for axis in range(x.ndim - inner - 1, -1, -1):
        found += slot % x.shape[axis] * x.strides[axis]
        slot //= x.shape[axis]
    return found


cdef void cut(Pass *x, rc_few_sequence *sequences, ptrdiff_t count) noexcept nogil:
    """The parts of each sequence, and what all of them leave."""
    cdef ptrdiff_t i, parts
    cdef rc_few_sequence *s
    x.p.sequences = sequences
    x.parts, x.left, x.keys = 0, 0, 0
    for i in range(count):
        s, parts = sequences + i, pieces(sequences[i].n_k, kernels.part)
        s.first_part, s.partial = x.parts, x.left
        x.parts += parts
        x.left += parts * x.p.heads * x.f.partial_size(&x.p, s.n)
        x.keys += s.n_k


cdef ptrdiff_t heads_at_once(const Pass *x, int threads) noexcept nogil:
    """How many heads a task has: as many as lie side by side, if that leaves every thread some tasks."""
    cdef ptrdiff_t heads = min(<ptrdiff_t>RC_FEW_HEADS, x.p.heads & -x.p.heads)
    while heads > 1 and x.parts * (x.p.heads // heads) < TASKS * threads:
        heads //= 2
    return heads


cdef void share_out(Pass *x, ptrdiff_t count, ptrdiff_t heads, int threads) noexcept nogil:
    """The tasks, where there are many of several parts: what comes next is asked for within a task."""
    cdef ptrdiff_t i, head, part, parts
    cdef ptrdiff_t run = max(1, min(<ptrdiff_t>LONGEST_RUN, x.parts * (x.p.heads // heads) // (TASKS * threads)))
    x.count, x.size = 0, 0
    for i in range(count):
        parts = pieces(x.p.sequences[i].n_k, kernels.part)
        x.size = max(x.size, x.f.workspace(&x.p, x.p.sequences[i].n, heads))
        for part in range(pieces(parts, run)):
            for head in range(x.p.heads // heads):
                x.tasks[x.count] = rc_few_task(i, part * run, min(run, parts - part * run), head * heads, heads)
                x.count += 1


cdef void of_parts(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    cdef const rc_few_sequence *s = x.p.sequences + x.tasks[task].sequence
    x.good[task] = x.f.of_parts(&x.p, s, x.tasks[task], x.work + worker.slot * x.size)


cdef void merge(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *x = <const Pass *>context
    cdef const rc_few_sequence *s = x.p.sequences + task // x.p.heads
    x.done[task] = not x.f.far(&x.p, s, task % x.p.heads, x.work + worker.slot * x.size)
    x.f.merge(&x.p, s, task % x.p.heads)


cdef compute(Pass *x, sequences, ptrdiff_t itemsize, int threads):
    """Fills o and lse; of which sequences they are right: no byte of (sequences, heads) is 0."""
    cdef rc_few_problem *p = &x.p
    cdef ptrdiff_t i, heads, count = len(sequences) // <ptrdiff_t>sizeof(rc_few_sequence)
    cut(x, <rc_few_sequence *>pointer(sequences), count)
    threads = team(threads, x.keys * p.heads * (p.d + p.d_v) * itemsize)
    heads = heads_at_once(x, threads)
    done = np.empty((count, p.heads), np.uint8)
    scratch = np.empty(LINE + x.left + x.parts * (p.heads // heads) * (sizeof(rc_few_task) + 1), np.uint8)
    p.partial = line(scratch)
    x.tasks, x.done = <rc_few_task *>(p.partial + x.left), <unsigned char *>pointer(done)
    share_out(x, count, heads, threads)
    x.good = <unsigned char *>(x.tasks + x.count)
    workspace = np.empty(threads * x.size + LINE, np.uint8)
    x.work = line(workspace)
    parallel_for(x.count, threads, of_parts, x)
    parallel_for(count * p.heads, threads, merge, x)
    for i in range(x.count):
        if not x.good[i]:
            x.done[x.tasks[i].sequence * p.heads] = False
    return done


cdef rc_few_strides strides_of(cnp.ndarray x, int row):
    """Those of an array whose rows follow on each other along the axis `row` and have the entries of the last axis."""
    cdef rc_few_strides found
    found.page = found.head = 0
    found.row, found.column = x.strides[row], x.strides[x.ndim - 1]
    return found


def forward(cnp.ndarray queries, cnp.ndarray k, cnp.ndarray v, limits, bint want_lse, int threads):
    """o (H, rows, d_v) and lse float64 (H, rows) or None; None where something that was read is not finite, or where
    rounding would show: scores or sums overflow or are large, norms of queries and keys come to more than `most`, or
    values are far from 0 beside how far they spread, these two by a sample of keys.

    Parameters
    ----------
    queries : (H, rows, d) float32, float64, float16 or bfloat16, C-contiguous
        Row r is query r % n of its head.
    k, v : (..., n_k, d) and (..., n_k, d_v) arrays
        Of the same dtype and any strides, their leading axes H slots.
    limits : engines.exact.few_queries.Limits
        The scale, the mask and the size of scores.

    Notes
    -----
    Time: one read of k and v at the rate of memory.
    """
    cdef Pass x
    cdef rc_few_problem *p = &x.p
    cdef ptrdiff_t i, H = queries.shape[0], rows = queries.shape[1]
    cdef cnp.ndarray keep = limits.keep
    sequences = np.empty(H * sizeof(rc_few_sequence), np.uint8)
    cdef rc_few_sequence *s = <rc_few_sequence *>pointer(sequences)
    x.f = functions_of(k.dtype)
    o = np.empty((H, rows, v.shape[v.ndim - 1]), np.float64 if k.itemsize == 8 else np.float32)
    lse = np.empty((H, rows)) if want_lse else None
    s.n, s.n_k, s.first, s.pages, s.most = limits.n, k.shape[k.ndim - 2], 0, &FIRST_PAGE, limits.most
    s.lo, s.hi = limits.band
    for i in range(H):
        s[i] = s[0]
        s[i].row = i * rows
        s[i].k, s[i].v, s[i].keep = of_slot(k, 2, i), of_slot(v, 2, i), <unsigned char *>of_slot(keep, 1, i)
    p.heads, p.group, p.d, p.d_v, p.page = 1, rows // s.n, queries.shape[2], v.shape[v.ndim - 1], s.n_k
    p.k, p.v = strides_of(k, k.ndim - 2), strides_of(v, v.ndim - 2)
    p.head_rows, p.query_rows = s.n, 1
    p.q, p.scale, p.o, p.lse = pointer(queries), limits.scale, pointer(o), <double *>pointer(lse)
    done = compute(&x, sequences, k.itemsize, threads)
    return None if memchr(pointer(done), 0, H) else (o, lse)


def forward_stretches(cnp.ndarray queries, cnp.ndarray k, cnp.ndarray v, stretches, bint want_lse, int threads):
    """o (H, group, n, d_v), lse float64 (H, group, n) or None, 0 and -inf in the rows of no stretch; and of which
    stretches, (s,) bool, these are right: `forward` says which they are not.

    Parameters
    ----------
    queries : (H, group, n, d) float32, float64, float16 or bfloat16, C-contiguous
    k, v : (..., n_k, d) and (..., n_k, d_v) arrays
        As `forward` takes them.
    stretches : engines.exact.few_lengths.Stretches
        Where each sequence has its queries and keys, the same in each of the H slots.
    """
    cdef Pass x
    cdef rc_few_problem *p = &x.p
    cdef const Py_ssize_t[:, ::1] rows = stretches.rows
    cdef const double[::1] most = stretches.most
    cdef ptrdiff_t i, j, H = queries.shape[0], count = rows.shape[0]
    cdef cnp.ndarray keep = stretches.keep
    sequences = np.empty(count * H * sizeof(rc_few_sequence), np.uint8)
    cdef rc_few_sequence *s = <rc_few_sequence *>pointer(sequences)
    x.f = functions_of(k.dtype)
    p.heads, p.group, p.d, p.d_v = 1, queries.shape[1], queries.shape[3], v.shape[v.ndim - 1]
    p.page, p.head_rows, p.query_rows = max(1, k.shape[k.ndim - 2]), queries.shape[2], 1
    p.k, p.v = strides_of(k, k.ndim - 2), strides_of(v, v.ndim - 2)
    shape = (H, queries.shape[1], queries.shape[2])
    o = np.zeros((*shape, p.d_v), np.float64 if k.itemsize == 8 else np.float32)
    lse = np.full(shape, -np.inf) if want_lse else None
    for j in range(count):
        for i in range(H):
            s.n, s.n_k, s.lo, s.hi = rows[j, 0], rows[j, 1], rows[j, 2], rows[j, 3]
            s.row, s.first, s.pages, s.most = i * p.group * p.head_rows + rows[j, 4], 0, &FIRST_PAGE, most[j]
            s.k, s.v = of_slot(k, 2, i) + rows[j, 5] * p.k.row, of_slot(v, 2, i) + rows[j, 5] * p.v.row
            s.keep = NULL if keep is None else <unsigned char *>of_slot(keep, 1, i) + rows[j, 5]
            s += 1
    p.q, p.scale, p.o, p.lse = pointer(queries), stretches.scale, pointer(o), <double *>pointer(lse)
    return o, lse, compute(&x, sequences, k.itemsize, threads).reshape(count, H).all(axis=1)


def forward_packed(cnp.ndarray queries, cnp.ndarray k, cnp.ndarray v, packed, bint want_lse, int threads):
    """o (T, heads, d_v), lse float64 (T, heads) or None, and of which sequences, (s,) bool, these are right: `forward`
    says which they are not.

    Parameters
    ----------
    queries : (T, heads, d) float32, float64, float16 or bfloat16, C-contiguous
        Those of a sequence follow on each other.
    k, v : (pages, page, key heads, d) and (pages, page, key heads, d_v) arrays
        Of the same dtype and any strides.
    packed : engines.exact.few_packed.Packed
        Where each sequence has its queries and keys.
    """
    cdef Pass x
    cdef rc_few_problem *p = &x.p
    cdef const Py_ssize_t[:, ::1] rows = packed.rows
    cdef const double[::1] most = packed.most
    cdef const int32_t[:, :] pages = packed.pages
    cdef ptrdiff_t i, heads = queries.shape[1]
    sequences = np.empty(rows.shape[0] * sizeof(rc_few_sequence), np.uint8)
    cdef rc_few_sequence *s = <rc_few_sequence *>pointer(sequences)
    x.f = functions_of(k.dtype)
    o = np.empty((queries.shape[0], heads, v.shape[3]), np.float64 if k.itemsize == 8 else np.float32)
    lse = np.empty((queries.shape[0], heads)) if want_lse else None
    for i in range(rows.shape[0]):
        s[i].n, s[i].n_k, s[i].lo, s[i].hi = rows[i, 0], rows[i, 1], rows[i, 2], rows[i, 3]
        s[i].row, s[i].first, s[i].most = rows[i, 4] * heads, rows[i, 5], most[i]
        s[i].pages, s[i].keep, s[i].k, s[i].v = &pages[i, 0], NULL, pointer(k), pointer(v)
    p.heads, p.page, p.d, p.d_v = k.shape[2], k.shape[1], queries.shape[2], v.shape[3]
    p.group = heads // p.heads
    p.k, p.v = strides_of(k, 1), strides_of(v, 1)
    p.k.page, p.k.head, p.v.page, p.v.head = k.strides[0], k.strides[2], v.strides[0], v.strides[2]
    p.head_rows, p.query_rows = 1, heads
    p.q, p.scale, p.o, p.lse = pointer(queries), packed.scale, pointer(o), <double *>pointer(lse)
    return o, lse, compute(&x, sequences, k.itemsize, threads).all(axis=1)
