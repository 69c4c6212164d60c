"""``sum_{a, b} diag(q^a) T_ab diag(k^b) v`` over pairs of monomials q^a, k^b, and the adjoint of that product.

Each T_ab is the Toeplitz matrix of a polynomial in the entries of W. Monomials of queries are done in batches. What a
batch gets from the keys is added up as spectra, so that each monomial of keys is transformed once for all its partners
in the batch; the symbol of a pair is made and transformed where it is needed, and not kept. A task is a part of the
batches of a slot; how they are cut into parts depends on shapes only.
"""

import numpy as np

cimport numpy as cnp
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ._arrays cimport LINE, line, pieces, pointer
from ._family_pairs cimport Pairs, Pass, Work
from ._parallel cimport interrupted, parallel_for, rc_worker
from ._toeplitz cimport kernels

cnp.import_array()


cdef void run_lane(void *context, ptrdiff_t lane, const rc_worker *worker) noexcept nogil:
    """`Product.tasks_of` as `parallel_for` calls it."""
    cdef const Pass *p = <const Pass *>context
    (<Product>p.product).tasks_of(p, lane, worker)


cdef double *carved(uintptr_t *at, ptrdiff_t size) noexcept nogil:
    """The address `at` of so many doubles; `at` moves past them, to the next multiple of 64 bytes."""
    cdef double *taken = <double *>at[0]
    at[0] += (size + 7) // 8 * 8 * sizeof(double)
    return taken


cdef class Product(Pairs):
    """The product and its adjoint for one problem. Any number of threads may call either at the same time.

    Both take values v (H, columns, keys): an even number of columns, two of which share their transforms, with 0 past
    the last key and for keys that are masked. `lists` says which monomials there are, and in which batches and order
    the pairs are done.
    """

    def forward(self, lists, parts, v, weights):
        """sum_ab q^a T_ab (k^b v_c) for each column c: (slots, G, columns, rows).

        T_ab is the sum over multisets of s entries of weights[s] times a multinomial times the product of W's entries.
        """
        cdef Pass p = self.pass_over(lists, parts, v)
        p.weights, p.lanes = <const double *>pointer(weights), p.tasks
        sums = np.zeros((parts, self.slots, self.groups, p.columns, self.rows))
        p.sums = <double *>pointer(sums)
        self.run(&p)
        return sums.sum(axis=0)

    def backward(self, lists, parts, lanes, v, weights, grad, bint want_dsymbol):
        """(dq, dk, dv, dsymbol, dW), given grad (slots, G, columns, rows), the derivative by the result.

        dq (slots, G, d, rows), dk (slots, d, keys) and dW (entries, offsets) are computed with the second of
        `weights`, dv (slots, columns, keys) and dsymbol (slots, offsets) with the first. dsymbol is the derivative
        by a factor of all T_ab at each offset, and None where not wanted. Tasks are dealt out to so many lanes, and
        each lane has a dW of its own, which are added up in their order.
        """
        cdef Pass p = self.pass_over(lists, parts, v)
        p.weights, p.grad_weights = <const double *>pointer(weights[0]), <const double *>pointer(weights[1])
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
        """The fields of `Pass` that both passes need. The caller must keep lists and v alive."""
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
        """The workspace of a thread that begins at `at`, which moves past its end."""
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

    cdef void run(self, Pass *p):
        """Do all tasks: lanes on several threads, the tasks of a lane one after the other."""
        p.size = 0
        self.carve(p, &p.size)
        workspace = np.empty(self.threads * p.size + LINE, np.uint8)
        # Workspaces begin at cache lines, which is a stricter alignment than FFTW's plans ask for.
        p.product, p.work = <void *>self, <uintptr_t>line(workspace)
        parallel_for(p.lanes, self.threads, run_lane, p)

    cdef void tasks_of(self, const Pass *p, ptrdiff_t lane, const rc_worker *worker) noexcept nogil:
        """Do all tasks of a lane."""
        cdef uintptr_t start = p.work + worker.slot * p.size
        cdef Work work = self.carve(p, &start)
        cdef ptrdiff_t step, task, batch
        work.worker, work.lane = worker, lane
        for step in range(pieces(p.tasks - lane, p.lanes)):
            task = lane + step * p.lanes
            work.slot, work.part = task // p.parts, task % p.parts
            for batch in range(p.batches * work.part // p.parts, p.batches * (work.part + 1) // p.parts):
                if interrupted(worker):
                    return
                if p.grad == NULL:
                    self.forward_batch(p, batch, &work)
                else:
                    self.backward_batch(p, batch, &work)

    cdef void forward_batch(self, const Pass *p, ptrdiff_t batch, Work *work) noexcept nogil:
        """Add what the monomials of queries of a batch contribute to p.sums."""
        cdef ptrdiff_t first = p.batch_start[batch], last = p.batch_start[batch + 1]
        cdef ptrdiff_t key, pair, c, g, a, level, I, place = work.part * self.slots + work.slot
        cdef double *found
        cdef double *sums
        memset(work.sent, 0, (last - first) * self.sent_size(p) * sizeof(double))
        for key in range(p.key_start[batch], p.key_start[batch + 1]):
            if interrupted(work.worker):
                return
            if p.weights[p.key_degree[key]] == 0:
                continue
            self.transform_keys(p, key, work)
            for pair in range(p.pair_start[key], p.pair_start[key + 1]):
                self.make_symbol(p, pair, p.weights[p.key_degree[key]], work)
                self.multiply(p, pair, first, True, work)
        for a in range(first, last):
            self.query_columns(p, a, work)
            for c in range(0, p.columns, 2):
                for level in range(self.levels):
                    for I in range(self.query_blocks):
                        found = self.invert(self.sent_of(p, work.sent, a - first, c, level, I))
                        for g in range(self.groups):
                            sums = p.sums + ((place * self.groups + g) * p.columns + c) * self.rows
                            sums += I * self.block
                            kernels.scatter(self.block, 1.0, self.gain_of(work.slot, g, level, I),
                                            work.columns + g * self.rows + I * self.block, found, self.turn, sums,
                                            sums + self.rows)

    cdef void backward_batch(self, const Pass *p, ptrdiff_t batch, Work *work) noexcept nogil:
        """Add what the pairs of a batch contribute to all derivatives."""
        cdef ptrdiff_t first = p.batch_start[batch], last = p.batch_start[batch + 1], key, pair, a
        cdef double weight, grad_weight
        cdef bint used, back
        memset(work.sent, 0, (last - first) * self.sent_size(p) * sizeof(double))
        for a in range(first, last):
            self.transform_grads(p, a, first, work)
        for key in range(p.key_start[batch], p.key_start[batch + 1]):
            if interrupted(work.worker):
                return
            weight, grad_weight = p.weights[p.key_degree[key]], p.grad_weights[p.key_degree[key]]
            if weight == 0 and grad_weight == 0:
                continue
            self.transform_keys(p, key, work)
            memset(work.back, 0, p.columns * self.key_blocks * self.pitch * sizeof(double))
            back = False
            for pair in range(p.pair_start[key], p.pair_start[key + 1]):
                used = p.multiset_end[pair] > p.multiset_start[pair]
                if used:
                    back = True
                    self.make_symbol(p, pair, 1.0, work)
                self.multiply(p, pair, first, used, work)
                self.correlate(p, pair, weight, grad_weight, work)
            if back:
                self.derive_keys(p, key, weight, grad_weight, work)
        for a in range(first, last):
            self.derive_queries(p, a, first, work)

    cdef void derive_keys(self, const Pass *p, ptrdiff_t key, double weight, double grad_weight,
                          Work *work) noexcept nogil:
        """Add to dv and dk what a monomial of keys got from the gradients, which is in work.back."""
        cdef ptrdiff_t place = work.part * self.slots + work.slot, head = work.slot * self.heads // self.slots, c, J
        cdef const double *k = self.k + head * self.d * self.keys
        cdef double *found
        cdef double *dv
        cdef const double *x
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

    cdef void derive_queries(self, const Pass *p, ptrdiff_t a, ptrdiff_t first, Work *work) noexcept nogil:
        """Add to dq what a monomial of queries got from the keys, which is in work.sent."""
        cdef ptrdiff_t place = work.part * self.slots + work.slot, c, g, level, I
        cdef double grad_weight = p.grad_weights[p.query_degree[a]]
        cdef double *found
        cdef const double *x
        # Spectra are transformed once, in their place, since each group needs them.
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
                        x = self.grad_of(p, work.slot, g, c) + I * self.block
                        kernels.gather(self.block, grad_weight, self.gain_of(work.slot, g, level, I), x, x + self.rows,
                                       found, self.turn, work.adjoint + I * self.block)
            self.derive(self.rows, p.query_degree[a], p.query_variables + a * p.most,
                        self.q + (work.slot * self.groups + g) * self.d * self.rows, work.adjoint,
                        p.dq + (place * self.groups + g) * self.d * self.rows)
