"""``sum_{a, b} diag(q^a) T_ab diag(k^b) v``, each T_ab the Toeplitz matrix of a polynomial in W's entries; its adjoint.

Blocks, spectra and what happens around transforms are those of `_toeplitz`; but two columns of v make a complex one,
since T_ab is another for each pair. Monomials of queries are done a batch at a time: what comes from the keys is added
up in frequencies, so that a column of keys is transformed once for all its partners in the batch, and a symbol is made,
transformed, used and forgotten. Tasks, the parts of each slot's batches, are cut by shapes alone.
"""

import numpy as np

cimport numpy as cnp
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ._arrays cimport LINE, line, pieces, pointer
from ._circulant cimport circulant, circulant_adjoint, pitch_of
from ._fftw cimport ComplexFFT, RealFFT
from ._parallel cimport interrupted, parallel_for, rc_worker
from ._toeplitz cimport (
    RC_ADD_ADJOINT, RC_ADD_PRODUCT, RC_COLUMNS, RC_CORRELATE, Terms, kernels, pointers, rc_mixing,
)

from ._toeplitz import _terms

cnp.import_array()

cdef enum:
    STRIP = 1024  # offsets at a time, so that what all multisets of a pair read stays in the cache


cdef struct Work:
    # of a thread. Spectra: (batch, columns, levels, query blocks) from keys and from gradients, (columns, key blocks)
    # of keys and back to them, (levels, blocks) of a symbol and of correlations
    double *sent
    double *given
    double *keys
    double *back
    double *symbol
    double *correlations
    double *line  # a symbol, then sums along its offsets
    double *window
    double *half
    double *key_column
    double *key_adjoint
    double *columns  # of queries, for each group
    double *both
    double *adjoint
    const rc_worker *worker


cdef struct Pass:
    # The lists, as `Lists` has them,
    ptrdiff_t batches, batch, most
    const ptrdiff_t *batch_start
    const ptrdiff_t *key_start
    const ptrdiff_t *pair_start
    const ptrdiff_t *multiset_start
    const ptrdiff_t *multiset_end
    const ptrdiff_t *partner
    const ptrdiff_t *query_degree
    const ptrdiff_t *query_variables
    const ptrdiff_t *key_degree
    const ptrdiff_t *key_variables
    const ptrdiff_t *of_entries
    const double *multinomial
    # how tasks are cut,
    ptrdiff_t parts, tasks, lanes
    # what is read; grad is NULL forward,
    ptrdiff_t columns
    const double *v
    const double *weights
    const double *grad_weights
    const double *grad
    # what is added up: sums have an axis of parts in front, dW of lanes;
    double *sums
    double *dq
    double *dk
    double *dv
    double *dsymbol
    double *dW
    # the Product whose pass it is, where workspaces start, and bytes of each.
    void *product
    uintptr_t work, size


cdef void run_lane(void *context, ptrdiff_t lane, const rc_worker *worker) noexcept nogil:
    cdef const Pass *p = <const Pass *>context
    (<Product>p.product).tasks_of(p, lane, worker)


cdef double *carved(uintptr_t *at, ptrdiff_t size) noexcept nogil:
    cdef double *taken = <double *>at[0]
    at[0] += (size + 7) // 8 * 8 * sizeof(double)
    return taken


cdef class Product:
    """The product and its adjoint for one problem; nothing is changed after `__init__`, so any thread may call either.

    Parameters
    ----------
    fft, real : ComplexFFT, RealFFT
        Of length b / 2, a multiple of 16, and of 2b.
    q : (slots, G, d, rows) float64
        Columns of queries, rows a multiple of b. A slot is what shares a T: a head, or one of its group.
    k : (H, d, keys) float64
        Likewise for keys.
    W : (entries, offsets) float64
        For offsets i - j from -keys on, of which there are rows + keys; 0 past those that occur.
    levels : (slots or 1, levels, offsets) float64
        What each T_ab is multiplied with: T is a sum of levels.
    nonzero : (levels, blocks) bool
        Which blocks of T have an entry that is not 0, in any slot.
    gain : (slots, G, levels, rows) float64, or None for ones
        What each level is multiplied with in each row.
    threads : int

    Both passes take values v (H, columns, keys): an even number of columns, two of which share their transforms, 0 past
    the last key and for keys that are masked.
    """

    cdef ComplexFFT fft
    cdef RealFFT real
    cdef object arrays
    cdef ptrdiff_t slots, groups, heads, d, rows, keys, entries, levels, offsets, blocks, block, pitch
    cdef ptrdiff_t query_blocks, key_blocks, level_slots, begin, end
    cdef int threads
    cdef const double *q
    cdef const double *k
    cdef const double *W
    cdef const double *of_levels
    cdef const double *gain
    cdef const double *turn
    cdef const double *ones
    cdef const unsigned char *nonzero
    cdef Terms products
    cdef Terms adjoints
    cdef Terms correlated

    def __init__(self, ComplexFFT fft, RealFFT real, q, k, W, levels, nonzero, gain, threads):
        self.fft, self.real, self.threads, self.block = fft, real, threads, 2 * fft.n
        self.pitch = pitch_of(self.block)
        self.slots, self.groups, self.d, self.rows = q.shape
        self.heads, _, self.keys = k.shape
        self.entries, self.offsets = W.shape
        self.level_slots, self.levels = levels.shape[:2]
        self.query_blocks, self.key_blocks = self.rows // self.block, self.keys // self.block
        self.blocks = nonzero.shape[1]
        used = np.flatnonzero(nonzero.any(axis=0))
        self.begin, self.end = (used.min() * self.block, (used.max() + 2) * self.block) if len(used) else (0, 0)
        self.q, self.k = <const double *>pointer(q), <const double *>pointer(k)
        self.W, self.of_levels = <const double *>pointer(W), <const double *>pointer(levels)
        self.gain, self.nonzero = <const double *>pointer(gain), <const unsigned char *>pointer(nonzero)
        angles = -np.pi / self.block * np.arange(self.fft.n)
        turn, ones = np.concatenate([np.cos(angles), np.sin(angles)]), np.ones(self.block)
        self.turn, self.ones = <const double *>pointer(turn), <const double *>pointer(ones)
        terms = _terms(nonzero, 1, 1, self.query_blocks, self.key_blocks)
        self.products, self.adjoints, self.correlated = pointers(terms[0]), pointers(terms[1]), pointers(terms[2])
        self.arrays = (q, k, W, levels, nonzero, gain, turn, ones, terms)

    def forward(self, lists, parts, v, weights):
        """(slots, G, columns, rows): sum_ab q^a T_ab (k^b v_c), T_ab the sum over multisets of s entries of weights[s]
        times their multinomial and the product of W's entries.
        """
        cdef Pass p = self.pass_over(lists, parts, v)
        p.weights, p.lanes = <const double *>pointer(weights), p.tasks
        sums = np.zeros((parts, self.slots, self.groups, p.columns, self.rows))
        p.sums = <double *>pointer(sums)
        self.run(&p)
        return sums.sum(axis=0)

    def backward(self, lists, parts, lanes, v, weights, grad_weights, grad, bint want_dsymbol):
        """The adjoint for grad (slots, G, columns, rows), the derivative of the result.

        dq (slots, G, d, rows), dk (slots, d, keys) and dW (entries, offsets) are the derivatives for `grad_weights`, dv
        (slots, columns, keys) and dsymbol (slots, offsets), that of what multiplies all T_ab, for `weights`; the last
        is None where not wanted. dW is summed in so many lanes, each of which has some of the tasks.
        """
        cdef Pass p = self.pass_over(lists, parts, v)
        p.weights, p.grad_weights = <const double *>pointer(weights), <const double *>pointer(grad_weights)
        p.grad, p.lanes = <const double *>pointer(grad), lanes
        lead = (parts, self.slots)
        dq, dk = np.zeros(lead + (self.groups, self.d, self.rows)), np.zeros(lead + (self.d, self.keys))
        dv = np.zeros(lead + (p.columns, self.keys))
        dsymbol = np.zeros(lead + (self.offsets,)) if want_dsymbol else None
        dW = np.zeros((lanes, self.entries, self.offsets))
        p.dq, p.dk, p.dv = <double *>pointer(dq), <double *>pointer(dk), <double *>pointer(dv)
        p.dsymbol, p.dW = <double *>pointer(dsymbol), <double *>pointer(dW)
        self.run(&p)
        return tuple([None if x is None else x.sum(axis=0) for x in (dq, dk, dv, dsymbol, dW)])

    cdef Pass pass_over(self, lists, ptrdiff_t parts, v):
        """What both passes go through; the caller keeps lists and v."""
        cdef Pass p
        memset(&p, 0, sizeof(Pass))
        p.parts, p.tasks = parts, parts * self.slots
        p.v, p.columns = <const double *>pointer(v), v.shape[1]
        starts = lists.batch_start
        p.batches, p.batch = len(starts) - 1, np.diff(starts).max()
        p.most = lists.query_variables.shape[1]
        p.batch_start = <const ptrdiff_t *>pointer(starts)
        p.key_start = <const ptrdiff_t *>pointer(lists.key_start)
        p.pair_start = <const ptrdiff_t *>pointer(lists.pair_start)
        p.multiset_start = <const ptrdiff_t *>pointer(lists.multiset_start)
        p.multiset_end = <const ptrdiff_t *>pointer(lists.multiset_end)
        p.partner = <const ptrdiff_t *>pointer(lists.partner)
        p.query_degree = <const ptrdiff_t *>pointer(lists.query_degree)
        p.query_variables = <const ptrdiff_t *>pointer(lists.query_variables)
        p.key_degree = <const ptrdiff_t *>pointer(lists.key_degree)
        p.key_variables = <const ptrdiff_t *>pointer(lists.key_variables)
        p.of_entries = <const ptrdiff_t *>pointer(lists.entries)
        p.multinomial = <const double *>pointer(lists.multinomial)
        return p

    cdef Work carve(self, const Pass *p, uintptr_t *at) noexcept nogil:
        """A thread's workspace from `at` on, which is moved past its end."""
        cdef Work work
        cdef ptrdiff_t sent = self.sent_size(p) * p.batch, keys = p.columns * self.key_blocks * self.pitch
        cdef ptrdiff_t symbol = 2 * self.levels * self.blocks * self.pitch
        work.sent, work.keys, work.symbol = carved(at, sent), carved(at, keys), carved(at, symbol)
        work.line, work.window = carved(at, self.offsets), carved(at, 2 * self.block)
        work.half = carved(at, 2 * self.block + 2)
        work.key_column, work.columns = carved(at, self.keys), carved(at, self.groups * self.rows)
        if p.grad != NULL:
            work.given, work.back, work.correlations = carved(at, sent), carved(at, keys), carved(at, symbol)
            work.key_adjoint, work.adjoint = carved(at, self.keys), carved(at, self.rows)
            work.both = carved(at, 2 * self.rows)
        return work

    cdef ptrdiff_t sent_size(self, const Pass *p) noexcept nogil:
        """Doubles of the spectra that belong to one monomial of queries."""
        return p.columns * self.levels * self.query_blocks * self.pitch

    cdef void run(self, Pass *p):
        """All tasks, each lane's one after another."""
        p.size = 0
        self.carve(p, &p.size)
        workspace = np.empty(self.threads * p.size + LINE, np.uint8)
        # Cache lines: more than the alignment that FFTW's plans were made for.
        p.product, p.work = <void *>self, <uintptr_t>line(workspace)
        parallel_for(p.lanes, self.threads, run_lane, p)

    cdef void tasks_of(self, const Pass *p, ptrdiff_t lane, const rc_worker *worker) noexcept nogil:
        cdef uintptr_t start = p.work + worker.slot * p.size
        cdef Work work = self.carve(p, &start)
        cdef ptrdiff_t step, task, slot, part, batch
        work.worker = worker
        for step in range(pieces(p.tasks - lane, p.lanes)):
            task = lane + step * p.lanes
            slot, part = task // p.parts, task % p.parts
            for batch in range(p.batches * part // p.parts, p.batches * (part + 1) // p.parts):
                if interrupted(worker):
                    return
                if p.grad == NULL:
                    self.forward_batch(p, slot, part, batch, &work)
                else:
                    self.backward_batch(p, lane, slot, part, batch, &work)

    cdef void forward_batch(self, const Pass *p, ptrdiff_t slot, ptrdiff_t part, ptrdiff_t batch,
                            Work *work) noexcept nogil:
        cdef ptrdiff_t first = p.batch_start[batch], last = p.batch_start[batch + 1]
        cdef ptrdiff_t key, pair, c, g, a, level, I, place = part * self.slots + slot
        cdef double *found
        cdef double *sums
        memset(work.sent, 0, (last - first) * self.sent_size(p) * sizeof(double))
        for key in range(p.key_start[batch], p.key_start[batch + 1]):
            if interrupted(work.worker):
                return
            if p.weights[p.key_degree[key]] == 0:
                continue
            self.transform_keys(p, slot, key, work)
            for pair in range(p.pair_start[key], p.pair_start[key + 1]):
                self.make_symbol(p, slot, pair, p.weights[p.key_degree[key]], work)
                self.multiply(p, pair, first, True, work)
        for a in range(first, last):
            self.query_columns(p, slot, a, work)
            for c in range(0, p.columns, 2):
                for level in range(self.levels):
                    for I in range(self.query_blocks):
                        found = self.invert(self.sent_of(p, work.sent, a - first, c, level, I))
                        for g in range(self.groups):
                            sums = p.sums + ((place * self.groups + g) * p.columns + c) * self.rows
                            sums += I * self.block
                            kernels.scatter(self.block, 1.0, self.gain_of(slot, g, level, I),
                                            work.columns + g * self.rows + I * self.block, found, self.turn, sums,
                                            sums + self.rows)

    cdef void backward_batch(self, const Pass *p, ptrdiff_t lane, ptrdiff_t slot, ptrdiff_t part, ptrdiff_t batch,
                             Work *work) noexcept nogil:
        cdef ptrdiff_t first = p.batch_start[batch], last = p.batch_start[batch + 1]
        cdef ptrdiff_t place = part * self.slots + slot, head = slot * self.heads // self.slots
        cdef const double *k = self.k + head * self.d * self.keys
        cdef ptrdiff_t key, pair, c, g, a, level, I, J
        cdef double weight, grad_weight
        cdef bint used, back
        cdef double *found
        cdef double *dv
        cdef const double *x
        memset(work.sent, 0, (last - first) * self.sent_size(p) * sizeof(double))
        for a in range(first, last):
            self.transform_grads(p, slot, a, first, work)
        for key in range(p.key_start[batch], p.key_start[batch + 1]):
            if interrupted(work.worker):
                return
            weight, grad_weight = p.weights[p.key_degree[key]], p.grad_weights[p.key_degree[key]]
            if weight == 0 and grad_weight == 0:
                continue
            self.transform_keys(p, slot, key, work)
            memset(work.back, 0, p.columns * self.key_blocks * self.pitch * sizeof(double))
            back = False
            for pair in range(p.pair_start[key], p.pair_start[key + 1]):
                used = p.multiset_end[pair] > p.multiset_start[pair]
                if used:
                    back = True
                    self.make_symbol(p, slot, pair, 1.0, work)
                self.multiply(p, pair, first, used, work)
                self.correlate(p, lane, slot, part, pair, weight, grad_weight, work)
            if not back:
                continue
            memset(work.key_adjoint, 0, self.keys * sizeof(double))
            for c in range(0, p.columns, 2):
                for J in range(self.key_blocks):
                    found = self.invert(work.back + (c * self.key_blocks + 2 * J) * self.pitch)
                    if weight:
                        dv = p.dv + (place * p.columns + c) * self.keys + J * self.block
                        kernels.scatter(self.block, weight, NULL, work.key_column + J * self.block, found, self.turn,
                                        dv, dv + self.keys)
                    x = p.v + (head * p.columns + c) * self.keys + J * self.block
                    kernels.gather(self.block, grad_weight, NULL, x, x + self.keys, found, self.turn,
                                   work.key_adjoint + J * self.block)
            self.derive(self.keys, p.key_degree[key], p.key_variables + key * p.most, k, work.key_adjoint,
                        p.dk + place * self.d * self.keys)
        for a in range(first, last):
            grad_weight = p.grad_weights[p.query_degree[a]]
            # Once for all groups: `found` is needed by each.
            for c in range(0, p.columns, 2):
                for level in range(self.levels):
                    for I in range(self.query_blocks):
                        self.invert(self.sent_of(p, work.sent, a - first, c, level, I))
            for g in range(self.groups):
                memset(work.adjoint, 0, self.rows * sizeof(double))
                for c in range(0, p.columns, 2):
                    for level in range(self.levels):
                        for I in range(self.query_blocks):
                            found = self.sent_of(p, work.sent, a - first, c, level, I)
                            x = self.grad_of(p, slot, g, c) + I * self.block
                            kernels.gather(self.block, grad_weight, self.gain_of(slot, g, level, I), x, x + self.rows,
                                           found, self.turn, work.adjoint + I * self.block)
                self.derive(self.rows, p.query_degree[a], p.query_variables + a * p.most,
                            self.q + (slot * self.groups + g) * self.d * self.rows, work.adjoint,
                            p.dq + (place * self.groups + g) * self.d * self.rows)

    cdef void make_symbol(self, const Pass *p, ptrdiff_t slot, ptrdiff_t pair, double factor,
                          Work *work) noexcept nogil:
        """The spectra of T_ab, divided by 2b, by level and block."""
        cdef const double *levels = self.levels_of(slot)
        cdef const double *of[RC_COLUMNS]
        cdef ptrdiff_t level, block, multiset, strip, at, size, degree
        for level in range(self.levels):
            memset(work.line + self.begin, 0, (self.end - self.begin) * sizeof(double))
            for strip in range(pieces(self.end - self.begin, STRIP)):
                at = self.begin + strip * STRIP
                size = min(<ptrdiff_t>STRIP, self.end - at)
                for multiset in range(p.multiset_start[pair], p.multiset_end[pair]):
                    degree = self.factors(p, multiset, at, of)
                    kernels.derive(size, factor * p.multinomial[multiset], levels + level * self.offsets + at,
                                   degree, of, work.line + at)
            for block in range(self.blocks):
                if not self.nonzero[level * self.blocks + block]:
                    continue
                circulant(self.real, work.line + block * self.block, work.window, work.half,
                          work.symbol + 2 * (level * self.blocks + block) * self.pitch)

    cdef void multiply(self, const Pass *p, ptrdiff_t pair, ptrdiff_t first, bint used, Work *work) noexcept nogil:
        """What a pair's spectra make, all columns added up: T_ab times keys, where it is not 0; backward, its transpose
        times gradients, and the correlations of these and keys.
        """
        cdef ptrdiff_t c, a = p.partner[pair] - first
        cdef double *given
        cdef double *keys
        if p.grad != NULL:
            memset(work.correlations, 0, 2 * self.levels * self.blocks * self.pitch * sizeof(double))
        for c in range(0, p.columns, 2):
            keys = work.keys + c * self.key_blocks * self.pitch
            if used:
                self.mix(self.products, RC_ADD_PRODUCT, work.symbol, keys, self.sent_of(p, work.sent, a, c, 0, 0))
            if p.grad != NULL:
                given = self.sent_of(p, work.given, a, c, 0, 0)
                if used:
                    self.mix(self.adjoints, RC_ADD_ADJOINT, work.symbol, given,
                             work.back + c * self.key_blocks * self.pitch)
                self.mix(self.correlated, RC_CORRELATE, given, keys, work.correlations)

    cdef void correlate(self, const Pass *p, ptrdiff_t lane, ptrdiff_t slot, ptrdiff_t part, ptrdiff_t pair,
                        double weight, double grad_weight, Work *work) noexcept nogil:
        """What pairs with one offset add to the derivative of T_ab, and this to dW and dsymbol."""
        cdef const double *of[RC_COLUMNS]
        cdef const double *levels = self.levels_of(slot)
        cdef double *to[RC_COLUMNS]
        cdef ptrdiff_t level, block, multiset, strip, at, size, degree, last, place
        cdef ptrdiff_t known = p.multiset_end[pair]
        cdef const ptrdiff_t *entries
        cdef double factor
        memset(work.line + self.begin, 0, (self.end - self.begin) * sizeof(double))
        for level in range(self.levels):
            for block in range(self.blocks):
                if not self.nonzero[level * self.blocks + block]:
                    continue
                circulant_adjoint(self.real, work.correlations + 2 * (level * self.blocks + block) * self.pitch,
                                  work.half, work.window)
                for last in range(2):
                    at = (block + 1 - last) * self.block
                    of[0] = levels + level * self.offsets + at
                    kernels.derive(self.block, 1.0, work.window + last * self.block, 1, of, work.line + at)
        for strip in range(pieces(self.end - self.begin, STRIP)):
            at = self.begin + strip * STRIP
            size = min(<ptrdiff_t>STRIP, self.end - at)
            for multiset in range(p.multiset_start[pair], p.multiset_start[pair + 1]):
                entries = p.of_entries + multiset * p.most
                degree = self.factors(p, multiset, at, of)
                if p.dsymbol != NULL and weight and multiset < known:
                    kernels.derive(size, weight * p.multinomial[multiset], work.line + at, degree, of,
                                   p.dsymbol + (part * self.slots + slot) * self.offsets + at)
                for place in range(degree):
                    to[place] = p.dW + (lane * self.entries + entries[place]) * self.offsets + at
                factor = grad_weight * p.multinomial[multiset]
                if multiset < known:
                    kernels.differentiate(size, factor, work.line + at, degree, of, to)
                else:
                    # The last entry is 0 everywhere: no other of its multiset has a derivative.
                    kernels.derive(size, factor, work.line + at, degree - 1, of, to[degree - 1])

    cdef ptrdiff_t factors(self, const Pass *p, ptrdiff_t multiset, ptrdiff_t at, const double **of) noexcept nogil:
        """W from the offset `at` on for all entries of a multiset, and how many these are: lists are padded with -1."""
        cdef const ptrdiff_t *entries = p.of_entries + multiset * p.most
        cdef ptrdiff_t degree = 0
        while degree < p.most and entries[degree] >= 0:
            of[degree] = self.W + entries[degree] * self.offsets + at
            degree += 1
        return degree

    cdef void derive(self, ptrdiff_t size, ptrdiff_t degree, const ptrdiff_t *variables, const double *x,
                     const double *adjoint, double *dx) noexcept nogil:
        """dx += the derivatives of a monomial by each of its variables, times its adjoint."""
        cdef const double *of[RC_COLUMNS]
        cdef double *to[RC_COLUMNS]
        cdef ptrdiff_t at
        for at in range(degree):
            of[at], to[at] = x + variables[at] * size, dx + variables[at] * size
        kernels.differentiate(size, 1.0, adjoint, degree, of, to)

    cdef void monomial(self, ptrdiff_t size, ptrdiff_t degree, const ptrdiff_t *variables, const double *x,
                       double *column) noexcept nogil:
        cdef const double *of[RC_COLUMNS]
        cdef ptrdiff_t at
        for at in range(degree):
            of[at] = x + variables[at] * size
        kernels.monomial(size, 1.0, degree, of, column)

    cdef void query_columns(self, const Pass *p, ptrdiff_t slot, ptrdiff_t a, Work *work) noexcept nogil:
        cdef ptrdiff_t g
        for g in range(self.groups):
            self.monomial(self.rows, p.query_degree[a], p.query_variables + a * p.most,
                          self.q + (slot * self.groups + g) * self.d * self.rows, work.columns + g * self.rows)

    cdef void transform_keys(self, const Pass *p, ptrdiff_t slot, ptrdiff_t key, Work *work) noexcept nogil:
        """The spectra of a column of keys times values, two columns of these at a time, block by block."""
        cdef ptrdiff_t head = slot * self.heads // self.slots, c, J
        cdef const double *values
        self.monomial(self.keys, p.key_degree[key], p.key_variables + key * p.most,
                      self.k + head * self.d * self.keys, work.key_column)
        for c in range(0, p.columns, 2):
            for J in range(self.key_blocks):
                values = p.v + (head * p.columns + c) * self.keys + J * self.block
                self.transform(values, values + self.keys, work.key_column + J * self.block,
                               work.keys + (c * self.key_blocks + 2 * J) * self.pitch)

    cdef void transform_grads(self, const Pass *p, ptrdiff_t slot, ptrdiff_t a, ptrdiff_t first,
                              Work *work) noexcept nogil:
        """The spectra of a column of queries times the gradient and the gain, groups added, likewise by levels."""
        cdef const double *of[2]
        cdef ptrdiff_t c, which, level, g, I, count
        self.query_columns(p, slot, a, work)
        for c in range(0, p.columns, 2):
            for level in range(self.levels):
                memset(work.both, 0, 2 * self.rows * sizeof(double))
                for g in range(self.groups):
                    of[1] = self.gain_of(slot, g, level, 0)
                    count = 1 if self.gain == NULL else 2
                    for which in range(2):
                        of[0] = self.grad_of(p, slot, g, c + which)
                        kernels.derive(self.rows, 1.0, work.columns + g * self.rows, count, of,
                                       work.both + which * self.rows)
                for I in range(self.query_blocks):
                    self.transform(work.both + I * self.block, work.both + self.rows + I * self.block, self.ones,
                                   self.sent_of(p, work.given, a - first, c, level, I))

    cdef void transform(self, const double *x1, const double *x2, const double *y,
                        double *to) noexcept nogil:
        cdef ptrdiff_t quarter
        kernels.pack(self.block, NULL, x1, x2, y, self.turn, to)
        for quarter in range(4):
            self.fft.run_forward(to + quarter * self.block)

    cdef double *invert(self, double *quarters) noexcept nogil:
        """In time, in their place."""
        cdef ptrdiff_t quarter
        for quarter in range(4):
            self.fft.run_inverse(quarters + quarter * self.block)
        return quarters

    cdef void mix(self, Terms terms, rc_mixing how, const double *x, const double *shared, double *z) noexcept nogil:
        kernels.mix(2 * self.block, self.pitch, terms.outputs, terms.start, terms.shared, terms.rows, how, 1.0, x,
                    shared, z, NULL)

    cdef double *sent_of(self, const Pass *p, double *spectra, ptrdiff_t at, ptrdiff_t c, ptrdiff_t level,
                         ptrdiff_t I) noexcept nogil:
        spectra += at * self.sent_size(p)
        return spectra + ((c * self.levels + 2 * level) * self.query_blocks + 2 * I) * self.pitch

    cdef const double *levels_of(self, ptrdiff_t slot) noexcept nogil:
        return self.of_levels + (slot * self.levels * self.offsets if self.level_slots > 1 else 0)

    cdef const double *gain_of(self, ptrdiff_t slot, ptrdiff_t g, ptrdiff_t level, ptrdiff_t I) noexcept nogil:
        if self.gain == NULL:
            return NULL
        return self.gain + ((slot * self.groups + g) * self.levels + level) * self.rows + I * self.block

    cdef const double *grad_of(self, const Pass *p, ptrdiff_t slot, ptrdiff_t g, ptrdiff_t c) noexcept nogil:
        return p.grad + ((slot * self.groups + g) * p.columns + c) * self.rows
