"""``sum_a w_a diag(q^a) T diag(k^a) v`` for a Toeplitz matrix T, and its adjoint, by FFT: threads, memory, interrupts.

T is cut into blocks of b x b, each of which is applied by transforms that fill its rows up to 2b (overlap-save). Two
monomials of one degree make a complex column, (k^a + i k^a') v_c, which T, being real, keeps apart: its spectrum of 2b
is that of four transforms of b / 2. A column is built when it is transformed, and what comes back is added to the
result at once: nothing is kept for each monomial. Pairs are cut into parts by shapes alone, each with sums of its own,
so that results are bitwise the same for every thread count.
"""

import numpy as np

cimport numpy as cnp
from libc.string cimport memset

from ._arrays cimport LINE, line, pieces, pointer
from ._fftw cimport ComplexFFT
from ._parallel cimport interrupted, parallel_for, rc_worker, team

cnp.import_array()

cdef extern from "c/isa.h" nogil:
    int rc_level()

kernels = rc_toeplitz_select(rc_level())

cdef ptrdiff_t STRETCH = 4096  # doubles of a sum of parts that a thread takes at a time


cdef Terms pointers(arrays):
    cdef Terms terms
    nonzero, start, shared, rows = arrays
    terms.outputs = len(nonzero)
    terms.nonzero, terms.start = <const unsigned char *>pointer(nonzero), <const ptrdiff_t *>pointer(start)
    terms.shared, terms.rows = <const ptrdiff_t *>pointer(shared), <const ptrdiff_t *>pointer(rows)
    return terms


cdef struct Pass:
    # What a pass reads, and what it adds up, with an axis of parts in front.
    const double *weights
    const double *grad_weights
    const double *grad  # NULL forward
    double *sums
    double *dq
    double *dk
    double *dv
    double *correlations
    void *product  # the Product whose pass it is
    double *work
    ptrdiff_t size  # of a thread's workspace, in doubles


cdef struct Parts:
    double *sums
    ptrdiff_t count, size


cdef void run_part(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Pass *p = <const Pass *>context
    (<Product>p.product).part(p, task, worker)


cdef void add_parts(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    """One stretch of all parts to that of the first."""
    cdef const Parts *x = <const Parts *>context
    cdef ptrdiff_t part, start = task * STRETCH
    for part in range(1, x.count):
        kernels.derive(min(STRETCH, x.size - start), 1, x.sums + part * x.size + start, 0, NULL, x.sums + start)


cdef class Product:
    """The product and its adjoint for one problem; nothing is changed after `__init__`, so any thread may call either.

    Parameters
    ----------
    fft : ComplexFFT
        Of length b / 2, a multiple of 16.
    operands : tuple of q, k, v, spectra, nonzero, gain
    monomials : tuple of degrees, variables, factors
    parts : int
        Into how many parts the pairs are cut.

    Notes
    -----
    q : (H, G, d, rows) float64
        Columns of queries, rows a multiple of b, zeros past the last query.
    k : (H, d, keys), v : (H, columns, keys)
        Likewise for keys; v is 0 for keys that are masked.
    spectra : (H or 1, G or 1, levels, blocks, pitch) complex128
        Of T's blocks, as `_circulant` has them: block I - J + keys / b - 1 for query block I and key block J. T is a
        sum of levels.
    nonzero : (levels, blocks) bool
        Which blocks have an entry that is not 0, in any head.
    gain : (H, G, levels, rows) float64, or None for ones
        What each level is multiplied with in each row.
    degrees : (P,) intp
        Of both monomials of each pair.
    variables : (P, 2, most) intp
        The coordinates that each is the product of, in order.
    factors : (P, 2) float64
        What the columns of queries and of keys are both multiplied with; 0 for the second of a monomial that is alone.
    threads : int
    """

    cdef ComplexFFT fft
    cdef object arrays
    cdef ptrdiff_t heads, groups, d, rows, keys, columns, levels, blocks, pitch, block, query_blocks, key_blocks
    cdef ptrdiff_t symbol_groups, symbol_head, pairs, most, parts
    cdef int threads
    cdef const double *q
    cdef const double *k
    cdef const double *v
    cdef const double *spectra
    cdef const double *gain
    cdef const double *turn
    cdef const ptrdiff_t *degrees
    cdef const ptrdiff_t *variables
    cdef const double *factors
    cdef Terms products
    cdef Terms adjoints
    cdef Terms correlated

    def __init__(self, ComplexFFT fft, operands, monomials, parts, threads):
        q, k, v, spectra, nonzero, gain = operands
        degrees, variables, factors = monomials
        self.fft, self.parts, self.threads = fft, parts, threads
        self.block = 2 * fft.n
        self.heads, self.groups, self.d, self.rows = q.shape
        self.columns, self.keys = v.shape[1:]
        self.query_blocks, self.key_blocks = self.rows // self.block, self.keys // self.block
        self.levels, self.blocks, self.pitch = spectra.shape[2:]
        self.symbol_groups = spectra.shape[1]
        self.symbol_head = 0 if spectra.shape[0] == 1 else 1
        self.pairs, self.most = len(degrees), variables.shape[2]
        self.q, self.k, self.v = <const double *>pointer(q), <const double *>pointer(k), <const double *>pointer(v)
        self.spectra, self.gain = <const double *>pointer(spectra), <const double *>pointer(gain)
        self.degrees, self.variables = <const ptrdiff_t *>pointer(degrees), <const ptrdiff_t *>pointer(variables)
        self.factors = <const double *>pointer(factors)
        angles = -np.pi / self.block * np.arange(self.fft.n)
        turn = np.concatenate([np.cos(angles), np.sin(angles)])
        self.turn = <const double *>pointer(turn)
        terms = _terms(nonzero, self.groups, self.symbol_groups, self.query_blocks, self.key_blocks)
        self.products, self.adjoints, self.correlated = pointers(terms[0]), pointers(terms[1]), pointers(terms[2])
        self.arrays = (q, k, v, spectra, gain, degrees, variables, factors, turn, terms)

    def forward(self, weights):
        """(H, G, columns, rows): sum_a w_|a| q^a T (k^a v), for weights (H, most + 1) of each degree."""
        cdef Pass p
        memset(&p, 0, sizeof(Pass))
        p.size = self.passing(self.key_blocks) + 2 * (self.groups * self.rows + self.keys)
        p.weights = <const double *>pointer(weights)
        sums = np.zeros((self.parts, self.heads, self.groups, self.columns, self.rows))
        p.sums = <double *>pointer(sums)
        self.run(&p, 1)
        return self.total(sums)

    def backward(self, weights, grad_weights, grad, bint want_correlations):
        """The adjoint for grad (H, G, columns, rows), the derivative of the result.

        dq (H, G, d, rows) and dk (H, d, keys) are the derivatives for `grad_weights`, dv (H, columns, keys) for
        `weights`, both (H, most + 1); so are the spectra (H, G or 1, levels, blocks, pitch) of the correlations sum_i
        of the pairs with one offset, which T's derivative is, summed over the groups where these share T: their real
        parts, in time; None where not wanted.
        """
        cdef Pass p
        cdef ptrdiff_t given = self.groups * self.levels * self.query_blocks
        memset(&p, 0, sizeof(Pass))
        p.size = self.passing(self.key_blocks) + 2 * self.pitch * max(given, self.key_blocks)
        p.size += 4 * (self.groups * self.rows + self.keys)
        p.weights, p.grad_weights = <const double *>pointer(weights), <const double *>pointer(grad_weights)
        p.grad = <const double *>pointer(grad)
        lead = (self.parts, self.heads)
        dq, dk = np.zeros(lead + (self.groups, self.d, self.rows)), np.zeros(lead + (self.d, self.keys))
        dv = np.zeros(lead + (self.columns, self.keys))
        shape = lead + (self.symbol_groups, self.levels, self.blocks, self.pitch)
        correlations = np.zeros(shape, complex) if want_correlations else None
        p.dq, p.dk, p.dv = <double *>pointer(dq), <double *>pointer(dk), <double *>pointer(dv)
        p.correlations = <double *>pointer(correlations)
        self.run(&p, 2 + self.groups)
        return tuple([None if x is None else self.total(x) for x in (dq, dk, dv, correlations)])

    cdef object total(self, parts):
        """The sum over the first axis, in place of the first part."""
        cdef Parts x
        x.sums, x.count, x.size = <double *>pointer(parts), parts.shape[0], parts[0].nbytes // sizeof(double)
        parallel_for(pieces(x.size, STRETCH), team(self.threads, <double>x.size * x.count), add_parts, &x)
        return parts[0]

    cdef ptrdiff_t passing(self, ptrdiff_t given):
        """Doubles for spectra of which products are made in place, and for the room that `mix` takes for that."""
        return (2 * self.pitch * max(given, self.products.outputs)
                + RC_CHUNK * max(self.products.outputs, self.key_blocks))

    cdef void run(self, Pass *p, ptrdiff_t passes):
        """All pairs of all heads, every part a task."""
        cdef double work = 2.0 * passes * self.columns * (self.rows * self.groups * self.levels + self.keys)
        work *= 5 * np.log2(self.block) + 2 * (self.query_blocks + self.key_blocks)
        cdef int threads = team(self.threads, work * self.heads * self.pairs)
        p.size = (p.size + 7) // 8 * 8
        workspace = np.empty(8 * threads * p.size + LINE, np.uint8)
        # Cache lines: more than the alignment that FFTW's plans were made for.
        p.product, p.work = <void *>self, <double *>line(workspace)
        parallel_for(self.heads * self.parts, threads, run_part, p)

    cdef void part(self, const Pass *p, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
        """The pairs of one part of one head."""
        cdef ptrdiff_t pair, head = task // self.parts, part = task % self.parts
        cdef double *work = p.work + worker.slot * p.size
        for pair in range(self.pairs * part // self.parts, self.pairs * (part + 1) // self.parts):
            if interrupted(worker):
                return
            if p.grad == NULL:
                self.forward_pair(p, head, part, pair, work)
            else:
                self.backward_pair(p, head, part, pair, work)

    cdef void forward_pair(self, const Pass *p, ptrdiff_t head, ptrdiff_t part, ptrdiff_t pair,
                           double *work) noexcept nogil:
        cdef double weight = p.weights[head * (self.most + 1) + self.degrees[pair]]
        cdef double *spectra = work
        cdef double *room = spectra + 2 * self.pitch * max(self.key_blocks, self.products.outputs)
        cdef double *keys = room + RC_CHUNK * max(self.products.outputs, self.key_blocks)
        cdef double *queries = keys + 2 * self.keys
        cdef double *sums = p.sums + (part * self.heads + head) * self.groups * self.columns * self.rows
        cdef const double *column
        cdef const double *found
        cdef ptrdiff_t c, output, symbol, level, g, I
        if weight == 0:
            return
        self.build(head, pair, keys, queries)
        for c in range(self.columns):
            self.transform_keys(keys, self.v + (head * self.columns + c) * self.keys, spectra)
            self.mix(self.products, RC_PRODUCT, 1, self.spectra_of(head), spectra, spectra, room)
            for output in range(self.products.outputs):
                found = self.invert(self.products, output, spectra)
                if found == NULL:
                    continue
                I = output % self.query_blocks
                level = output // self.query_blocks % self.levels
                symbol = output // (self.query_blocks * self.levels)
                for g in range(self.groups):
                    if self.symbol_groups == 1 or g == symbol:
                        column = queries + 2 * g * self.rows + I * self.block
                        kernels.gather(self.block, weight, self.gain_of(head, g, level, I), column, column + self.rows,
                                       found, self.turn,
                                       sums + (g * self.columns + c) * self.rows + I * self.block)

    cdef void backward_pair(self, const Pass *p, ptrdiff_t head, ptrdiff_t part, ptrdiff_t pair,
                            double *work) noexcept nogil:
        cdef ptrdiff_t degree = self.degrees[pair], slot = part * self.heads + head
        cdef ptrdiff_t of_degree = head * (self.most + 1) + degree
        # A constant has no derivative.
        cdef double weight = p.weights[of_degree], grad_weight = p.grad_weights[of_degree] if degree else 0
        cdef ptrdiff_t given = self.groups * self.levels * self.query_blocks
        cdef double *spectra = work
        cdef double *room = spectra + 2 * self.pitch * max(self.key_blocks, self.products.outputs)
        cdef double *grad_spectra = room + RC_CHUNK * max(self.products.outputs, self.key_blocks)
        cdef double *keys = grad_spectra + 2 * self.pitch * max(given, self.key_blocks)
        cdef double *queries = keys + 2 * self.keys
        cdef double *key_adjoint = queries + 2 * self.groups * self.rows
        cdef double *query_adjoint = key_adjoint + 2 * self.keys
        cdef double *column
        cdef const double *found
        cdef const double *values
        cdef ptrdiff_t c, output, symbol, level, g, I, J
        if weight == 0 and grad_weight == 0:
            return
        self.build(head, pair, keys, queries)
        memset(key_adjoint, 0, 2 * (self.keys + self.groups * self.rows) * sizeof(double))
        for c in range(self.columns):
            values = self.v + (head * self.columns + c) * self.keys
            self.transform_keys(keys, values, spectra)
            self.transform_grads(p, head, c, queries, grad_spectra)
            if p.correlations != NULL and weight:
                self.mix(self.correlated, RC_CORRELATE, weight, grad_spectra, spectra,
                         p.correlations + 2 * self.pitch * slot * self.correlated.outputs, NULL)
            if grad_weight:
                self.mix(self.products, RC_PRODUCT, 1, self.spectra_of(head), spectra, spectra, room)
                for output in range(self.products.outputs):
                    found = self.invert(self.products, output, spectra)
                    if found == NULL:
                        continue
                    I = output % self.query_blocks
                    level = output // self.query_blocks % self.levels
                    symbol = output // (self.query_blocks * self.levels)
                    for g in range(self.groups):
                        if self.symbol_groups == 1 or g == symbol:
                            column = query_adjoint + 2 * g * self.rows + I * self.block
                            kernels.scatter(self.block, grad_weight, self.gain_of(head, g, level, I),
                                            self.grad_of(p, head, g, c) + I * self.block, found, self.turn, column,
                                            column + self.rows)
            self.mix(self.adjoints, RC_ADJOINT, 1, self.spectra_of(head), grad_spectra, grad_spectra, room)
            for J in range(self.key_blocks):
                found = self.invert(self.adjoints, J, grad_spectra)
                if found == NULL:
                    continue
                if grad_weight:
                    column = key_adjoint + J * self.block
                    kernels.scatter(self.block, grad_weight, NULL, values + J * self.block, found, self.turn,
                                    column, column + self.keys)
                if weight:
                    column = keys + J * self.block
                    kernels.gather(self.block, weight, NULL, column, column + self.keys, found, self.turn,
                                   p.dv + (slot * self.columns + c) * self.keys + J * self.block)
        if grad_weight:
            self.derive(self.keys, pair, self.k + head * self.d * self.keys, key_adjoint,
                        p.dk + slot * self.d * self.keys)
            for g in range(self.groups):
                self.derive(self.rows, pair, self.q + (head * self.groups + g) * self.d * self.rows,
                            query_adjoint + 2 * g * self.rows, p.dq + (slot * self.groups + g) * self.d * self.rows)

    cdef void build(self, ptrdiff_t head, ptrdiff_t pair, double *keys, double *queries) noexcept nogil:
        """The two columns of keys, and two of queries for each group."""
        cdef ptrdiff_t g
        self.monomials(self.keys, pair, self.k + head * self.d * self.keys, keys)
        for g in range(self.groups):
            self.monomials(self.rows, pair, self.q + (head * self.groups + g) * self.d * self.rows,
                           queries + 2 * g * self.rows)

    cdef void monomials(self, ptrdiff_t size, ptrdiff_t pair, const double *x, double *columns) noexcept nogil:
        cdef const double *of[RC_COLUMNS]
        cdef ptrdiff_t which, at
        for which in range(2):
            for at in range(self.degrees[pair]):
                of[at] = x + self.variables[(2 * pair + which) * self.most + at] * size
            kernels.monomial(size, self.factors[2 * pair + which], self.degrees[pair], of, columns + which * size)

    cdef void derive(self, ptrdiff_t size, ptrdiff_t pair, const double *x, const double *adjoint,
                     double *dx) noexcept nogil:
        """dx += the derivatives of both monomials by each variable, times their adjoints."""
        cdef const double *of[RC_COLUMNS]
        cdef double *to[RC_COLUMNS]
        cdef const ptrdiff_t *variables
        cdef ptrdiff_t which, at, degree = self.degrees[pair]
        for which in range(2):
            variables = self.variables + (2 * pair + which) * self.most
            if self.factors[2 * pair + which] == 0:
                continue
            for at in range(degree):
                of[at], to[at] = x + variables[at] * size, dx + variables[at] * size
            kernels.differentiate(size, self.factors[2 * pair + which], adjoint + which * size, degree, of, to)

    cdef const double *spectra_of(self, ptrdiff_t head) noexcept nogil:
        return self.spectra + 2 * self.pitch * self.levels * self.blocks * head * self.symbol_head * self.symbol_groups

    cdef const double *gain_of(self, ptrdiff_t head, ptrdiff_t g, ptrdiff_t level, ptrdiff_t I) noexcept nogil:
        if self.gain == NULL:
            return NULL
        return self.gain + ((head * self.groups + g) * self.levels + level) * self.rows + I * self.block

    cdef const double *grad_of(self, const Pass *p, ptrdiff_t head, ptrdiff_t g, ptrdiff_t c) noexcept nogil:
        return p.grad + ((head * self.groups + g) * self.columns + c) * self.rows

    cdef void transform(self, double *quarters) noexcept nogil:
        cdef ptrdiff_t k
        for k in range(4):
            self.fft.run_forward(quarters + k * self.block)

    cdef void transform_keys(self, const double *keys, const double *values, double *spectra) noexcept nogil:
        """The spectra of both columns times values, block by block."""
        cdef ptrdiff_t J
        cdef double *to
        for J in range(self.key_blocks):
            to = spectra + 2 * self.pitch * J
            kernels.pack(self.block, NULL, keys + J * self.block, keys + self.keys + J * self.block,
                         values + J * self.block, self.turn, to)
            self.transform(to)

    cdef void transform_grads(self, const Pass *p, ptrdiff_t head, ptrdiff_t c, const double *queries,
                              double *spectra) noexcept nogil:
        """The spectra of both columns of queries times the gradient and the gain, by group, level and block."""
        cdef ptrdiff_t g, level, I
        cdef double *to
        cdef const double *column
        for g in range(self.groups):
            for level in range(self.levels):
                for I in range(self.query_blocks):
                    column = queries + 2 * g * self.rows + I * self.block
                    to = spectra + 2 * self.pitch * ((g * self.levels + level) * self.query_blocks + I)
                    kernels.pack(self.block, self.gain_of(head, g, level, I), column, column + self.rows,
                                 self.grad_of(p, head, g, c) + I * self.block, self.turn, to)
                    self.transform(to)

    cdef void mix(self, Terms terms, rc_mixing how, double factor, const double *x, const double *shared,
                  double *z, double *room) noexcept nogil:
        kernels.mix(2 * self.block, self.pitch, terms.outputs, terms.start, terms.shared, terms.rows, how, factor, x,
                    shared, z, room)

    cdef double *invert(self, Terms terms, ptrdiff_t output, double *spectra) noexcept nogil:
        """The quarters in time of one output, in its place; NULL where that is 0."""
        cdef double *quarters = spectra + 2 * self.pitch * output
        cdef ptrdiff_t k
        if not terms.nonzero[output]:
            return NULL
        for k in range(4):
            self.fft.run_inverse(quarters + k * self.block)
        return quarters


def _terms(nonzero, groups, symbol_groups, query_blocks, key_blocks):
    """Which products make each output, for `mix`: T times keys, by symbol, level and query block; T^T times queries, by
    key block; correlations, by symbol, level and block of T.
    """
    levels, blocks = nonzero.shape
    # For each output, the row of x that goes with a shared one; the latter may come once for each group.
    products = [{} for _ in range(symbol_groups * levels * query_blocks)]
    adjoints = [{} for _ in range(key_blocks)]
    correlated = [{} for _ in range(symbol_groups * levels * blocks)]
    for level, I, J in np.ndindex(levels, query_blocks, key_blocks):
        block = I - J + key_blocks - 1
        if not nonzero[level, block]:
            continue
        for g in range(groups):
            place = (g if symbol_groups > 1 else 0) * levels + level
            symbol, query = place * blocks + block, (g * levels + level) * query_blocks + I
            products[place * query_blocks + I][J, 0] = symbol
            adjoints[J][query, 0] = symbol
            correlated[symbol][J, g] = query
    return [_tiles(lists) for lists in (products, adjoints, correlated)]


def _tiles(outputs):
    """(nonzero, start, shared, rows) of a mapping for each output, as `mix` takes them, RC_TILE outputs at a time."""
    start, shared, rows = [0], [], []
    for first in range(0, len(outputs), RC_TILE):
        tile = outputs[first : first + RC_TILE]
        tile += [{}] * (RC_TILE - len(tile))
        keys = sorted(set().union(*tile))
        shared += [key[0] for key in keys]
        rows += [[one.get(key, -1) for one in tile] for key in keys]
        start.append(len(shared))
    return np.array([bool(found) for found in outputs]), *(np.array(x, np.intp) for x in (start, shared, rows))
