"""Polynomial attention: threads, memory and interrupts around the serial C kernels of ``c/monomials.h``.

The sequence is cut into segments, each with a state of its own, and these are added (no mask) or summed up to each
segment (causal): by shapes alone, so that results are bitwise the same for every thread count. Which segments are
summed up before a causal scan does depend on threads: a thread that scans one segment after another finds their sums on
its way, the same to the bit, so only segments that others wait for are summed up first, which costs a product more. So
does into how many blocks the columns of values are cut, which a causal scan forward has for threads that have no head:
what is computed of a column does not depend on those beside it.
"""

import numpy as np

cimport numpy as cnp

from ._arrays cimport LINE, line, lines, pieces, pointer
from ._memory cimport borrowed, results, returned
from ._parallel cimport interrupted, parallel_for, rc_worker, task_function, team

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_monomials_kernels *kernels = rc_monomials_select(rc_level())

cdef struct Pieces:
    # Of heads, or of heads and groups: `count` of each, from `start` on; one of both functions.
    const rc_monomials_problem *p
    segment_function piece
    chunk_function rows
    ptrdiff_t start, count
    char *work
    size_t size  # of a thread's workspace
    bint back  # segments are counted from the last one


cdef void run_piece(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pieces *x = <const Pieces *>context
    x.piece(x.p, task // x.count, x.start + task % x.count, x.work + worker.slot * x.size)


cdef void run_scan(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    # The first task of each head, the longest, takes the last known segment and those that follow it.
    cdef const Pieces *x = <const Pieces *>context
    cdef ptrdiff_t heads = x.p.heads * x.p.blocks
    cdef ptrdiff_t last = x.p.segments - 1, start = x.p.known - 1 - task // heads, s
    for s in range(start, x.p.segments if task < heads else start + 1):
        if interrupted(worker):
            return
        x.piece(x.p, task % heads, last - s if x.back else s, x.work + worker.slot * x.size)


cdef void run_chunk(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pieces *x = <const Pieces *>context
    x.rows(x.p, task // x.count // x.p.groups, task // x.count % x.p.groups, task % x.count,
           x.work + worker.slot * x.size)


cdef const rc_monomials_functions *functions_of(dtype):
    return kernels.f32 if dtype == np.float32 else kernels.f64


def lanes_of(dtype):
    """How many numbers of a dtype a vector has."""
    return functions_of(dtype).lanes


cpdef ptrdiff_t chunk_of(dtype, ptrdiff_t d, bint causal):
    """How many rows a chunk has.

    If causal, pairs inside a chunk are exact. For d = 8 these cost as much as far ones with a state of degree 3, and
    chunks of half the length save 13% of a forward pass of degree 2 and nothing from degree 4 on; for d = 16 they lose
    4%, because the state is laid out anew for each.
    """
    cdef ptrdiff_t longest = functions_of(dtype).chunk
    return longest // 2 if causal and d <= 8 else longest


# Of a block: features are made for each, and cost about as much as four columns.
LEAST_COLUMNS = 8
cdef ptrdiff_t least_columns = LEAST_COLUMNS


cdef object joined(states, ptrdiff_t blocks):
    """States of all columns, (H, segments, d_v + 1, pitch), from those of blocks, each of which has the last one."""
    if blocks == 1:
        return states
    _, segments, columns, pitch = states.shape
    of_blocks = states.reshape(-1, blocks, segments, columns, pitch)
    values = of_blocks[:, :, :, :columns - 1].swapaxes(1, 2).reshape(-1, segments, blocks * (columns - 1), pitch)
    return np.concatenate((values, of_blocks[:, 0, :, columns - 1:]), axis=2)


cdef class Scan:
    """One polynomial attention problem: forward, then backward as often as wanted, from any thread.

    Nothing is changed after `__init__`: each pass works on a copy of the problem and on arrays of its own, and what one
    pass needs of another is handed to it.

    Parameters
    ----------
    problem : problem.problem.Problem
        Its rows, all of one dtype, and its mask, which is causal or hides no pair by index.
    frame : engines.polynomial.features.Frame
        What rows are centred on and multiplied by: scores are q_factor k_factor <q, k - centre>.
    monomials : engines.polynomial.features.Monomials
    segments : int
        Into how many parts the sequence is cut.
    decay : (H,) float64 array, at least 0, optional
        Causal: weights are multiplied by exp(-decay (i + offset - j)).
    """

    cdef rc_monomials_problem p
    cdef const rc_monomials_functions *f
    cdef int threads
    cdef bint causal
    cdef ptrdiff_t chunks
    cdef size_t size
    cdef object arrays, decay

    def __init__(self, problem, frame, monomials, ptrdiff_t segments, decay=None):
        cdef rc_monomials_problem *p = &self.p
        q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
        centre, value_centre, q_factor, k_factor = frame
        self.f = functions_of(q.dtype)
        self.threads, self.causal = problem.threads, mask.causal
        self.arrays = [q, k, v, mask, frame, monomials, decay]
        p.heads, p.groups, p.n, p.d = q.shape
        p.n_k, p.d_v = v.shape[1:]
        p.blocks, p.width = 1, p.d_v
        p.q_offset, p.earlier = mask.offset if self.causal else 0, False
        p.q, p.k, p.v = pointer(q), pointer(k), pointer(v)
        p.centre, p.value_centre = pointer(centre), pointer(value_centre)
        p.key_mask = <const unsigned char *>pointer(mask.kept)
        p.q_factor, p.k_factor = <const double *>pointer(q_factor), <const double *>pointer(k_factor)
        p.degree, p.grad_degree, p.state_degree = monomials.degree, monomials.grad_degree, monomials.state_degree
        p.pitch = monomials.pitch
        p.offset, p.count = <const ptrdiff_t *>pointer(monomials.offset), <const ptrdiff_t *>pointer(monomials.count)
        p.weights, p.grad_weights = pointer(monomials.weights), pointer(monomials.grad_weights)
        p.weights_apart = p.pitch if monomials.weights.shape[0] > 1 else 0
        p.chunk = chunk_of(q.dtype, p.d, self.causal)
        p.decay, p.key_sums = <const double *>pointer(decay), NULL
        self.chunks = max(<ptrdiff_t>1, pieces(max(p.n_k, p.n + p.q_offset), p.chunk))
        p.chunks_per_segment = pieces(self.chunks, segments)
        p.segments = pieces(self.chunks, p.chunks_per_segment)
        p.packed_size = self.f.packed_size(p)
        p.grad_packed_size = self.f.grad_packed_size(p) if p.grad_degree else 0
        self.size = lines(self.f.workspace(p)) + LINE
        # What a segment's length does to a state; the last one ends where keys and rows do.
        self.decay = None
        if decay is not None:
            cuts = np.minimum(np.arange(p.segments + 1) * p.chunk * p.chunks_per_segment, max(p.n_k, p.n + p.q_offset))
            self.decay = np.exp(-np.outer(decay, np.maximum(np.diff(cuts), 0)))
        p.falls = <const double *>pointer(self.decay)

    cdef void run(self, const rc_monomials_problem *p, segment_function piece, ptrdiff_t start, ptrdiff_t stop,
                  ptrdiff_t rows):
        """piece(head, i), of so many rows, for every head and start <= i < stop."""
        cdef Pieces x = Pieces(p, piece, NULL, start, stop - start, NULL, self.size, False)
        self.share(&x, run_piece, p.heads * p.blocks * x.count, p.heads * x.count * rows)

    cdef void run_segments(self, const rc_monomials_problem *p, segment_function piece, ptrdiff_t start,
                           ptrdiff_t stop):
        self.run(p, piece, start, stop, p.chunk * p.chunks_per_segment * p.groups)

    cdef void scan(self, const rc_monomials_problem *p, segment_function piece, bint back):
        """piece(head, segment) for all, each after those whose state it needs."""
        cdef Pieces x = Pieces(p, piece, NULL, 0, 0, NULL, self.size, back)
        self.share(&x, run_scan, p.heads * p.blocks * p.known, p.heads * p.groups * p.chunk * self.chunks)

    cdef ptrdiff_t blocks(self):
        """Into how many blocks of columns the causal scan of each head is cut, for threads that have no head."""
        cdef ptrdiff_t blocks = max(1, self.team_of(self.rows()) // max(self.p.heads, 1))
        while self.p.d_v % blocks or blocks * least_columns > max(self.p.d_v, least_columns):
            blocks -= 1
        return blocks

    cdef ptrdiff_t rows(self):
        """Of all heads and chunks."""
        return self.p.heads * self.p.groups * self.p.chunk * self.chunks

    cdef ptrdiff_t known(self, ptrdiff_t blocks=1):
        """How many segments' states to know before the scan, so that it and the sums take the least time.

        A segment's sum is one product, its scan two; while some heads are scanned as a whole, other threads take what
        is left.
        """
        cdef ptrdiff_t heads = self.p.heads * blocks, segments = self.p.segments, first, known = 1, time, least = -1
        cdef int threads = self.team_of(self.rows())
        for first in range(segments):
            time = pieces(heads * first, threads) + 2 * max(
                pieces(heads * segments, threads), pieces(heads, threads) * (segments - first))
            if least < 0 or time < least:
                least, known = time, first + 1
        return known

    cdef void run_rows(self, const rc_monomials_problem *p, chunk_function rows):
        """rows(head, group, chunk) for every chunk of query rows."""
        cdef ptrdiff_t count = pieces(p.n, p.chunk)
        cdef Pieces x = Pieces(p, NULL, rows, 0, count, NULL, self.size, False)
        self.share(&x, run_chunk, p.heads * p.groups * count, p.heads * p.groups * count * p.chunk)

    cdef int team_of(self, ptrdiff_t rows):
        """How many threads so many rows are worth."""
        return team(self.threads, <double>rows * self.p.pitch * (self.p.d_v + 1))

    cdef void share(self, Pieces *x, task_function function, ptrdiff_t tasks, ptrdiff_t rows):
        """So many tasks, of so many rows together, by threads with a workspace each."""
        cdef int threads = self.team_of(rows)
        workspaces = borrowed(threads * self.size)
        x.work = line(workspaces)
        parallel_for(tasks, threads, function, x)
        returned(workspaces)

    cdef void pack(self, rc_monomials_problem *p, totals, packed, grad_packed):
        """Every head's state (H, columns, pitch) with its weights, as forward, grad_queries and grad_keys read it."""
        cdef ptrdiff_t head
        workspace = borrowed(self.size)
        for head in range(p.heads):
            self.f.pack(p, head, <const double *>pointer(totals[head]),
                        NULL if packed is None else pointer(packed[head]),
                        NULL if grad_packed is None else pointer(grad_packed[head]), line(workspace))
        returned(workspace)
        p.packed, p.grad_packed = pointer(packed), pointer(grad_packed)

    cdef object empty_states(self, const rc_monomials_problem *p):
        return np.empty((p.heads * p.blocks, p.segments, p.d_v + 1, p.pitch))

    cdef object segment_states(self, rc_monomials_problem *p, ptrdiff_t segments):
        """sum_j phi(k_j) [v_j - value_centre, 1] of each of the first segments, (H blocks, segments, columns, pitch)"""
        states = self.empty_states(p)
        p.states = <double *>pointer(states)
        self.run_segments(p, self.f.sum_keys, 0, segments)
        return states

    cdef object segment_grad_states(self, ptrdiff_t first, o, inverse, grad):
        """The same of queries and the gradients of their numerators and denominators, from the segment `first` on."""
        cdef rc_monomials_problem p = self.p
        p.o, p.inverse, p.grad = pointer(o), pointer(inverse), pointer(grad)
        states = self.empty_states(&p)
        p.grad_states = <double *>pointer(states)
        self.run_segments(&p, self.f.sum_queries, first, p.segments)
        return states

    def key_states(self):
        """The sums of keys over each segment, which `forward` takes, and over all of them, (H, d_v + 1, pitch) float64;
        decayed, seen from where keys end.
        """
        cdef rc_monomials_problem p = self.p
        states = self.segment_states(&p, p.segments)
        return states, self.add_up(states, None, False, self.p.segments)

    def query_states(self, o, inverse, grad):
        """The sums of queries over each segment, for `backward`, and over all; decayed, seen from the first key."""
        states = self.segment_grad_states(0, o, inverse, grad)
        return states, self.add_up(states, None, True, self.p.segments)

    cdef object add_up(self, states, start, bint back, ptrdiff_t count, bint replace=False):
        """start (None is 0) + the sums of the first `count` segments, from the last one backwards if `back`.

        If `replace`, the states of these segments and of the next become the sums of what comes before them.
        """
        cdef ptrdiff_t head, i, s, blocks = len(states) // max(self.p.heads, 1)
        if count == 1 and start is None and not replace:
            return states[:, self.p.segments - 1 if back else 0].copy()
        total = np.zeros_like(states[:, 0]) if start is None else start.copy()
        for i in range(count):
            s = self.p.segments - 1 - i if back else i
            part = states[:, s].copy()
            if replace:
                states[:, s] = total
            for head in range(len(states)):
                fall = 1 if self.decay is None else self.decay[head // blocks, s]
                self.f.follow(total[head].size, <const double *>pointer(total[head]), fall,
                              <const double *>pointer(part[head]), <double *>pointer(total[head]))
        if replace:
            states[:, self.p.segments - 1 - count if back else count] = total
        return total

    def forward(self, bint want_lse, int order=0, reach=None, ratio=None, states=None, start=None):
        """o (H, G, n, d_v), inverse denominators (H, G, n), lse float64 or None, moment and spread (H, G, n) or None,
        and the states that `backward` takes.

        Moment and spread, of what certifies rows (c/monomials.h), where `reach` (H, 1 or chunks, 3, d_v) is given.
        `ratio` (2, H, G, n) gives every row a polynomial of its own. Where there are keys elsewhere, `states` is what
        `key_states` found of each segment here, and is overwritten; and `start` (H, d_v + 1, pitch) the state of what
        comes before where causal, else of all keys there are.
        """
        cdef rc_monomials_problem p = self.p
        q = self.arrays[0]
        shape = q.shape[:3]
        if self.causal and start is None:
            p.blocks = self.blocks()
            p.d_v //= p.blocks
            p.packed_size = self.f.packed_size(&p)
        of_rows = (p.blocks, *shape)
        o, inverse = results(shape + (p.width,), q.dtype), np.empty(of_rows, q.dtype)
        if p.q_offset < 0:  # rows before the first key are in no chunk
            o[:], inverse[:] = 0, 0
        lse = np.full(of_rows, -np.inf) if want_lse else None
        p.known = p.segments if start is not None else self.known(p.blocks)
        if start is None:
            states = self.segment_states(&p, p.known - 1 if self.causal else p.segments)
        p.o, p.inverse, p.lse = pointer(o), pointer(inverse), <double *>pointer(lse)
        moment = spread = None
        if reach is not None:
            moment, spread = np.zeros(of_rows, q.dtype), np.zeros(of_rows, q.dtype)
            p.order, p.reaches = order, reach.shape[1]
        p.moment, p.spread, p.reach = pointer(moment), pointer(spread), pointer(reach)
        p.ratio = pointer(ratio)
        if self.causal:
            p.earlier = start is not None
            self.add_up(states, start, False, p.known - 1, True)
            p.states = <double *>pointer(states)
            self.scan(&p, self.f.scan_forward, False)
            states = joined(states, p.blocks)
        else:
            states = states.sum(axis=1) if start is None else start
            packed = np.empty((p.heads, p.packed_size), q.dtype)
            self.pack(&p, states, packed, None)
            self.run_rows(&p, self.f.forward)
        # Each block of columns has made the same of each row, but for the spread of its own columns.
        inverse, lse, moment = (None if X is None else X[0] for X in (inverse, lse, moment))
        return o, inverse, lse, moment, None if spread is None else spread.max(axis=0), states

    def backward(self, states, o, inverse, grad, key_sums=None, grad_states=None, start=None):
        """dq, dk, dv for do = grad; states, o and inverse being forward's.

        `key_sums` (H, n_k), zeros, is given sum_i dS_ij where causal, dS the gradient of the scores.

        Where there are queries elsewhere, `grad_states` is what `query_states` found of each segment here, and is
        overwritten; and `start` (H, d_v + 1, pitch) the gradient state of what comes after where causal, else of all
        queries there are.
        """
        cdef rc_monomials_problem p = self.p
        q, k, v = self.arrays[:3]
        dq, dk, dv = (results(X.shape, X.dtype) for X in (q, k, v))
        if p.q_offset < 0:  # rows before the first key are in no chunk
            dq[:] = 0
        p.known = p.segments if start is not None else self.known()
        if start is None:
            grad_states = self.segment_grad_states(p.segments - p.known + 1 if self.causal else 0, o, inverse, grad)
        p.o, p.inverse, p.grad = pointer(o), pointer(inverse), pointer(grad)
        p.dq, p.dk, p.dv = pointer(dq), pointer(dk), pointer(dv)
        p.key_sums = <double *>pointer(key_sums)
        if self.causal:
            p.earlier = start is not None
            self.add_up(grad_states, start, True, p.known - 1, True)
            p.states, p.grad_states = <double *>pointer(states), <double *>pointer(grad_states)
            self.run_segments(&p, self.f.scan_grad_queries, 0, p.segments)
            self.scan(&p, self.f.scan_grad_keys, True)
        else:
            packed = np.empty((p.heads, p.packed_size), q.dtype)
            grad_packed = np.empty((p.heads, p.grad_packed_size), q.dtype)
            self.pack(&p, states, None, grad_packed)
            self.run_rows(&p, self.f.grad_queries)
            self.pack(&p, grad_states.sum(axis=1) if start is None else start, packed, grad_packed)
            self.run(&p, self.f.grad_keys, 0, pieces(p.n_k, p.chunk), p.chunk)
        return dq, dk, dv
