"""Decoding, a token at a time: threads, memory and arrays around the serial C kernels of ``c/decoding.h``.

Heads are shared out by their bytes alone, and each is worked on by one thread, so that results are bitwise the same for
every thread count.
"""

import numpy as np

cimport numpy as cnp

from ._arrays cimport LINE, line, lines, pieces, pointer
from ._parallel cimport parallel_for, rc_worker, team

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_decoding_kernels *kernels = rc_decoding_select(rc_level())

cdef enum:
    READ = 262144  # bytes that a task of decoding reads of consecutive heads, or those of one head


cdef struct Step:
    const rc_decode_problem *p
    ptrdiff_t heads, share  # heads of a task
    char *work
    size_t size


cdef void run_step(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Step *x = <const Step *>context
    kernels.step(x.p, task * x.share, min((task + 1) * x.share, x.heads), x.work + worker.slot * x.size)


cdef addresses(sums):
    """Where each of the arrays begins, and 0 for None."""
    cdef ptrdiff_t i
    found = np.zeros(len(sums), np.intp)
    cdef Py_ssize_t *out = <Py_ssize_t *>pointer(found)
    for i in range(len(sums)):
        if sums[i] is not None:
            out[i] = <Py_ssize_t>pointer(sums[i])
    return found


cdef class Decoder:
    """Decoding, a token at a time: what c/decoding.h says of it, in float64, on a ring that is changed in place.

    Parameters
    ----------
    monomials : engines.polynomial.Monomials, for float64
    sums : list
        Of each stream, (2, H S, d_v + 1, pitch): the state, and behind it what rounding took from it; or None.
    ring : (keys, tokens, capacity)
        Recent tokens, (streams, H, d, ring_pitch) and (streams, H, d_v + 1, ring_pitch) with 1 in the last row, and for
        how many of a stream there is room; ring_pitch is a whole number of vectors.
    value_centre : (streams, H, d_v)
    slopes : (H, S)
        By how much a token's score falls with each that follows; S is 1, or as many as a key head has queries.
    near : (int, (H, 1 or G) array)
        How many of the last tokens have scores that are multiplied, and by what.
    """

    cdef rc_decode_problem p
    cdef object arrays, workspace

    def __init__(self, monomials, sums, ring, value_centre, slopes, near):
        cdef rc_decode_problem *p = &self.p
        ring_keys, tokens, p.capacity = ring
        states = addresses(sums)
        self.arrays = [monomials, sums, states, ring_keys, tokens, value_centre, slopes, near]
        p.heads, p.d, p.ring_pitch = ring_keys.shape[1:]
        p.near, stretch = near
        p.stretches, p.stretch = stretch.shape[1], <const double *>pointer(stretch)
        p.d_v, p.degree, p.pitch = value_centre.shape[2], monomials.degree, monomials.pitch
        p.offset, p.count = <const ptrdiff_t *>pointer(monomials.offset), <const ptrdiff_t *>pointer(monomials.count)
        p.weights = <const double *>pointer(monomials.weights)
        p.state = <const double *const *>pointer(states)
        p.ring_keys, p.ring = <double *>pointer(ring_keys), <double *>pointer(tokens)
        p.value_centre = <const double *>pointer(value_centre)
        p.states, p.slope = slopes.shape[1], <const double *>pointer(slopes)
        self.workspace = np.empty(0, np.uint8)

    def step(self, rows, v, streams, counts, fall, int threads):
        """o (streams, H, G, d_v) of these streams, 0 of others.

        Parameters
        ----------
        rows : (streams, H, 1 + G, d)
            k before q; where v is None (streams, H, G, d), q alone. G is S where S is not 1.
        v : (streams, H, d_v) or None
            Of the token that comes.
        streams : (m,) int64
            Those that have sums.
        counts : (length, recent), (streams,) int64 each
            Tokens of each stream, the one that comes among them, and how many of these are in the ring.
        fall : (streams, H, S)
            The state is multiplied by e^fall.
        threads : int
        """
        cdef rc_decode_problem *p = &self.p
        cdef Step x
        cdef ptrdiff_t bytes_of_head = 8 * (p.states * (p.d_v + 1) * p.pitch + (p.d + p.d_v + 1) * p.ring_pitch)
        length, recent = counts
        p.groups = rows.shape[2] - (v is not None)
        x.size = lines(kernels.step_workspace(p))
        if self.workspace.size < threads * x.size + LINE:
            self.workspace = np.empty(threads * x.size + LINE, np.uint8)
        o = np.zeros((len(length), p.heads, p.groups, p.d_v))
        p.rows, p.v, p.o = <const double *>pointer(rows), <const double *>pointer(v), <double *>pointer(o)
        p.length, p.recent = <const ptrdiff_t *>pointer(length), <const ptrdiff_t *>pointer(recent)
        p.fall = <const double *>pointer(fall)
        p.streams = <const ptrdiff_t *>pointer(streams)
        x.p, x.heads, x.work = p, len(streams) * p.heads, line(self.workspace)
        x.share = max(1, READ // bytes_of_head)
        # To read a byte takes as long as a multiply-add of a product.
        parallel_for(pieces(x.heads, x.share), team(threads, <double>x.heads * bytes_of_head), run_step, &x)
        return o

    def left(self, places, decay, ptrdiff_t tokens, int threads):
        """The sums of some streams with the oldest tokens of their rings added, in new arrays like theirs.

        Parameters
        ----------
        places : (streams, folded), (m,) int64 each
            The streams, and the first of each stream's tokens that leave its ring.
        decay : (factors, weights)
            (m, H, S) float64 powers of two, by which sums are multiplied, and None or (m, H, S, tokens) float64, the
            weights of the tokens in each sum.
        tokens : int
            How many leave each ring.
        threads : int
        """
        cdef rc_decode_problem *p = &self.p
        cdef Leaving x
        streams, folded = places
        factors, weights = decay
        made = [np.empty((2, p.heads * p.states, p.d_v + 1, p.pitch)) for _ in range(len(streams))]
        after = addresses(made)
        x.b.p, x.b.tokens = p, tokens
        x.b.streams, x.b.folded = <const ptrdiff_t *>pointer(streams), <const ptrdiff_t *>pointer(folded)
        x.b.factors, x.b.weights = <const double *>pointer(factors), <const double *>pointer(weights)
        x.b.after = <double *const *>pointer(after)
        x.size = lines(kernels.leave_workspace(&x.b))
        workspace = np.empty(threads * x.size + LINE, np.uint8)
        x.work = line(workspace)
        cdef double work = <double>len(streams) * p.heads * tokens * p.states * (p.d_v + 1) * p.pitch
        parallel_for(len(streams) * p.heads, team(threads, work), run_leave, &x)
        return made


cdef struct Leaving:
    rc_leaving b
    char *work
    size_t size


cdef void run_leave(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Leaving *x = <const Leaving *>context
    kernels.leave(&x.b, task, x.work + worker.slot * x.size)


cdef struct Block:
    const double *const *state
    const double *const *total
    const double *added
    const double *factor
    ptrdiff_t heads, length


cdef void run_add_block(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Block *x = <const Block *>context
    cdef ptrdiff_t stream = task // x.heads, start = task % x.heads * x.length
    kernels.add_block(x.length, x.heads * x.length, x.factor[task], x.state[stream] + start, x.added + task * x.length,
                      <double *>x.total[stream] + start)


def add_block(sums, added, factors, int threads):
    """factors sums + added in nearly twice the digits of float64, in new arrays like those of the sums.

    Parameters
    ----------
    sums : list of m arrays
        Each (2, H, d_v + 1, pitch) float64, C-contiguous: a state, and what rounding took from it.
    added : (m H, d_v + 1, pitch) float64, C-contiguous
    factors : (m H,) float64
        Powers of two.
    threads : int
    """
    cdef Block x
    cdef ptrdiff_t tasks = len(added)
    totals = [np.empty_like(each) for each in sums]
    state, total = addresses(sums), addresses(totals)
    x.state, x.total = <const double *const *>pointer(state), <const double *const *>pointer(total)
    x.added, x.factor = <const double *>pointer(added), <const double *>pointer(factors)
    x.heads, x.length = tasks // len(sums), added.shape[1] * added.shape[2]
    parallel_for(tasks, team(threads, <double>tasks * x.length), run_add_block, &x)
    return totals
