"""``sum_a w_a diag(q^a) T diag(k^a) v`` for a Toeplitz matrix T, and its adjoint, by FFT: threads, memory, interrupts.

T is cut into blocks of b x b, each of which is applied by transforms of length 2b (overlap-save). A column k^a v_c is
built when it is transformed, and what comes back is added to the result at once: nothing is kept for each monomial.
Monomials come in the order of a depth-first walk, so that each is one product away from one that is at hand. They are
cut into parts by shapes alone, each with sums of its own, so that results are bitwise the same for every thread count.
"""

import numpy as np

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange, threadid
from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ._arrays cimport pointer
from ._fftw cimport RealFFT

cnp.import_array()

cdef extern from "c/toeplitz.h" nogil:
    ctypedef struct rc_toeplitz_kernels:
        void (*multiply)(ptrdiff_t, const double *, const double *, double *) noexcept nogil
        void (*weigh)(ptrdiff_t, const double *, const double *, const double *, double *) noexcept nogil
        void (*add)(ptrdiff_t, double, const double *, const double *, const double *, double *) noexcept nogil
        void (*adjoint)(ptrdiff_t, const double *, const double *, const double *, double *, double *) noexcept nogil
        void (*convolve)(ptrdiff_t, const double *, const double *, double *) noexcept nogil
        void (*correlate)(ptrdiff_t, double, const double *, const double *, double *) noexcept nogil

    const rc_toeplitz_kernels *rc_toeplitz_select(int level)

cdef extern from "c/isa.h" nogil:
    int rc_level()

cdef const rc_toeplitz_kernels *kernels = rc_toeplitz_select(rc_level())

cdef double ROUND = 0.2  # seconds between two looks at Ctrl-C
cdef double RATE = 1e9  # operations of a transform a second, low: a bound on a round's time, not a prediction


def spectrum_pitch(length):
    """How many complex numbers the spectrum of a real row takes, its padding to whole cache lines included."""
    return (length // 2 + 1 + 3) // 4 * 4


cdef class Product:
    """The product and its adjoint for one problem.

    Parameters
    ----------
    fft : RealFFT
        Of length 2b, one row, float64.
    q : (H, G, d, rows) float64
        Columns of queries, rows a multiple of b, zeros past the last query.
    k : (H, d, keys), v : (H, columns, keys)
        Likewise for keys; v is 0 for keys that are masked.
    spectra : (H or 1, G or 1, levels, blocks, pitch) complex128
        Of T's blocks, divided by 2b: block I - J + keys / b - 1 for query block I and key block J. T is a sum of
        levels.
    nonzero : (levels, blocks) bool
        Which blocks have an entry that is not 0, in any head.
    gain : (H, G, levels, rows) float64, or None for ones
        What each level is multiplied with in each row.
    depth, variable : (F,) intp
        Degree and last factor of each monomial: the latest one before it of one degree less, times this coordinate.
    parts : int
        Into how many parts the monomials are cut.
    threads : int
    """

    cdef RealFFT fft
    cdef object arrays
    cdef ptrdiff_t heads, groups, d, rows, keys, columns, levels, blocks, pitch, block, query_blocks, key_blocks
    cdef ptrdiff_t symbol_groups, symbol_head, monomials, degree, parts
    cdef int threads
    cdef const double *q
    cdef const double *k
    cdef const double *v
    cdef const double *spectra
    cdef const unsigned char *nonzero
    cdef const double *gain
    cdef const ptrdiff_t *depth
    cdef const ptrdiff_t *variable
    cdef ptrdiff_t size  # of a thread's workspace, in doubles

    # of the pass that is running; sums have an axis of parts in front
    cdef const double *weights
    cdef const double *grad_weights
    cdef const double *grad
    cdef double *sums
    cdef double *dq
    cdef double *dk
    cdef double *dv
    cdef double *correlations

    def __init__(self, RealFFT fft, q, k, v, spectra, nonzero, gain, depth, variable, parts, threads):
        self.arrays = (q, k, v, spectra, nonzero, gain, depth, variable)
        self.fft, self.parts, self.threads = fft, parts, threads
        self.block = fft.n // 2
        self.heads, self.groups, self.d, self.rows = q.shape
        self.columns, self.keys = v.shape[1:]
        self.query_blocks, self.key_blocks = self.rows // self.block, self.keys // self.block
        self.levels, self.blocks, self.pitch = spectra.shape[2:]
        self.symbol_groups = spectra.shape[1]
        self.symbol_head = 0 if spectra.shape[0] == 1 else 1
        self.monomials, self.degree = len(depth), max(depth)
        self.q, self.k, self.v = <const double *>pointer(q), <const double *>pointer(k), <const double *>pointer(v)
        self.spectra, self.nonzero = <const double *>pointer(spectra), <const unsigned char *>pointer(nonzero)
        self.gain = <const double *>pointer(gain)
        self.depth, self.variable = <const ptrdiff_t *>pointer(depth), <const ptrdiff_t *>pointer(variable)

    def forward(self, weights):
        """(H, G, columns, rows): sum_a w_a q^a T (k^a v)."""
        cdef ptrdiff_t stacks = (self.degree + 1) * (self.groups * self.rows + self.keys)
        self.size = stacks + 2 * self.pitch * (self.key_blocks + 1) + 2 * self.block
        self.weights, self.grad = <const double *>pointer(weights), NULL
        sums = np.zeros((self.parts, self.heads, self.groups, self.columns, self.rows))
        self.sums = <double *>pointer(sums)
        self.run()
        return sums.sum(axis=0)

    def backward(self, weights, grad_weights, grad, bint want_correlations):
        """The adjoint for grad (H, G, columns, rows), the derivative of the result.

        dq (H, G, d, rows) and dk (H, d, keys) are the derivatives for `grad_weights`, dv (H, columns, keys) for
        `weights`; so are the spectra (H, G or 1, levels, blocks, pitch) of the correlations sum_i of the pairs with
        one offset, which T's derivative is, summed over the groups where these share T; None where not wanted.
        """
        cdef ptrdiff_t stacks = 2 * (self.degree + 1) * (self.groups * self.rows + self.keys)
        cdef ptrdiff_t transforms = self.key_blocks + self.groups * self.levels * self.query_blocks + 1
        self.size = stacks + 2 * self.pitch * transforms + 2 * self.block
        self.weights, self.grad_weights = <const double *>pointer(weights), <const double *>pointer(grad_weights)
        self.grad = <const double *>pointer(grad)
        lead = (self.parts, self.heads)
        dq, dk = np.zeros(lead + (self.groups, self.d, self.rows)), np.zeros(lead + (self.d, self.keys))
        dv = np.zeros(lead + (self.columns, self.keys))
        shape = lead + (self.symbol_groups, self.levels, self.blocks, self.pitch)
        correlations = np.zeros(shape, complex) if want_correlations else None
        self.dq, self.dk, self.dv = <double *>pointer(dq), <double *>pointer(dk), <double *>pointer(dv)
        self.correlations = <double *>pointer(correlations)
        self.run()
        sums = [None if x is None else x.sum(axis=0) for x in (dq, dk, dv, correlations)]
        return tuple(sums)

    cdef void run(self):
        """All monomials of all heads: every part a range, in steps between which Ctrl-C is looked at."""
        cdef ptrdiff_t task, step, each, longest = (self.monomials + self.parts - 1) // self.parts
        cdef double log_length = np.log2(self.fft.n)
        cdef double work = 2.0 * self.columns * (self.rows * self.groups * self.levels + self.keys)
        work *= 5.0 * log_length + self.query_blocks + self.key_blocks
        each = max(<ptrdiff_t>1, <ptrdiff_t>(ROUND * RATE / work))
        self.size = (self.size + 7) // 8 * 8
        workspace = np.empty(self.threads * self.size + 8)
        # Cache lines: more than the alignment that FFTW's plans were made for.
        cdef uintptr_t start = (<uintptr_t>pointer(workspace) + 63) // 64 * 64
        cdef double *work_of_threads = <double *>start
        for step in range(0, longest, each):
            for task in prange(self.heads * self.parts, nogil=True, num_threads=self.threads, schedule="dynamic"):
                self.piece(task // self.parts, task % self.parts, step, each, work_of_threads + threadid() * self.size)
            PyErr_CheckSignals()

    cdef void piece(self, ptrdiff_t head, ptrdiff_t part, ptrdiff_t step, ptrdiff_t each,
                    double *work) noexcept nogil:
        """The monomials [step, step + each) of one part."""
        cdef ptrdiff_t first = self.monomials * part // self.parts + step
        cdef ptrdiff_t last = min(first + each, self.monomials * (part + 1) // self.parts)
        if first >= last:
            return
        if self.grad == NULL:
            self.forward_range(head, part, first, last, work)
        else:
            self.backward_range(head, part, first, last, work)

    cdef void raise_degree(self, ptrdiff_t head, ptrdiff_t monomial, double *key_stack,
                           double *query_stack) noexcept nogil:
        """The monomial's columns from those of one degree less."""
        cdef ptrdiff_t s = self.depth[monomial], variable = self.variable[monomial], g
        cdef double *stack
        kernels.multiply(self.keys, key_stack + (s - 1) * self.keys, self.k + (head * self.d + variable) * self.keys,
                         key_stack + s * self.keys)
        for g in range(self.groups):
            stack = query_stack + g * (self.degree + 1) * self.rows
            kernels.multiply(self.rows, stack + (s - 1) * self.rows, self.query_column(head, g, variable),
                             stack + s * self.rows)

    cdef const double *query_column(self, ptrdiff_t head, ptrdiff_t g, ptrdiff_t variable) noexcept nogil:
        return self.q + ((head * self.groups + g) * self.d + variable) * self.rows

    cdef void begin(self, ptrdiff_t head, ptrdiff_t first, ptrdiff_t *path, double *key_stack,
                    double *query_stack) noexcept nogil:
        """Ones, and the columns of the monomials that the first one is a multiple of."""
        cdef ptrdiff_t s = self.depth[first] - 1, monomial = first - 1, g, i
        for i in range(self.keys):
            key_stack[i] = 1
        for g in range(self.groups):
            for i in range(self.rows):
                query_stack[g * (self.degree + 1) * self.rows + i] = 1
        while s > 0:
            if self.depth[monomial] == s:
                path[s] = monomial
                s -= 1
            monomial -= 1
        for s in range(1, self.depth[first]):
            self.raise_degree(head, path[s], key_stack, query_stack)

    cdef const double *spectrum(self, ptrdiff_t head, ptrdiff_t g, ptrdiff_t level, ptrdiff_t block) noexcept nogil:
        cdef ptrdiff_t symbol = head * self.symbol_head * self.symbol_groups + (g if self.symbol_groups > 1 else 0)
        return self.spectra + 2 * self.pitch * ((symbol * self.levels + level) * self.blocks + block)

    cdef void transform_keys(self, const double *column, const double *values, double *row,
                             double *spectra) noexcept nogil:
        """The spectra of column times values, block by block, each with b zeros behind it."""
        cdef ptrdiff_t J
        for J in range(self.key_blocks):
            kernels.multiply(self.block, column + J * self.block, values + J * self.block, row)
            memset(row + self.block, 0, self.block * sizeof(double))
            self.fft.run_forward(row, spectra + 2 * self.pitch * J)

    cdef bint product_block(self, ptrdiff_t head, ptrdiff_t g, ptrdiff_t level, ptrdiff_t I, const double *spectra,
                            double *total, double *row) noexcept nogil:
        """The first b entries of row = block I of T times what spectra are of; False where that is 0."""
        cdef ptrdiff_t J, block
        cdef bint found = False
        memset(total, 0, 2 * self.pitch * sizeof(double))
        for J in range(self.key_blocks):
            block = I - J + self.key_blocks - 1
            if self.nonzero[level * self.blocks + block]:
                found = True
                kernels.convolve(self.block + 1, self.spectrum(head, g, level, block), spectra + 2 * self.pitch * J,
                                 total)
        if found:
            self.fft.run_inverse(total, row)
        return found

    cdef const double *gain_of(self, ptrdiff_t head, ptrdiff_t g, ptrdiff_t level, ptrdiff_t I) noexcept nogil:
        if self.gain == NULL:
            return NULL
        return self.gain + ((head * self.groups + g) * self.levels + level) * self.rows + I * self.block

    cdef void forward_range(self, ptrdiff_t head, ptrdiff_t part, ptrdiff_t first, ptrdiff_t last,
                            double *work) noexcept nogil:
        cdef ptrdiff_t stack = (self.degree + 1) * self.rows
        cdef double *spectra = work
        cdef double *total = spectra + 2 * self.pitch * self.key_blocks
        cdef double *row = total + 2 * self.pitch
        cdef double *key_stack = row + 2 * self.block
        cdef double *query_stack = key_stack + (self.degree + 1) * self.keys
        cdef double *sums = self.sums + (part * self.heads + head) * self.groups * self.columns * self.rows
        cdef ptrdiff_t path[64]
        cdef ptrdiff_t monomial, s, c, level, symbol, g, I
        self.begin(head, first, path, key_stack, query_stack)
        for monomial in range(first, last):
            s = self.depth[monomial]
            if s:
                self.raise_degree(head, monomial, key_stack, query_stack)
            if self.weights[monomial] == 0:
                continue
            for c in range(self.columns):
                self.transform_keys(key_stack + s * self.keys, self.v + (head * self.columns + c) * self.keys, row,
                                    spectra)
                for level in range(self.levels):
                    for symbol in range(self.symbol_groups):
                        for I in range(self.query_blocks):
                            if not self.product_block(head, symbol, level, I, spectra, total, row):
                                continue
                            for g in range(self.groups):
                                if self.symbol_groups == 1 or g == symbol:
                                    kernels.add(self.block, self.weights[monomial], self.gain_of(head, g, level, I),
                                                query_stack + g * stack + s * self.rows + I * self.block, row,
                                                sums + (g * self.columns + c) * self.rows + I * self.block)

    cdef void backward_range(self, ptrdiff_t head, ptrdiff_t part, ptrdiff_t first, ptrdiff_t last,
                             double *work) noexcept nogil:
        cdef ptrdiff_t stack = (self.degree + 1) * self.rows, slot = part * self.heads + head
        cdef double *spectra = work
        cdef double *grad_spectra = spectra + 2 * self.pitch * self.key_blocks
        cdef double *total = grad_spectra + 2 * self.pitch * self.groups * self.levels * self.query_blocks
        cdef double *row = total + 2 * self.pitch
        cdef double *key_stack = row + 2 * self.block
        cdef double *query_stack = key_stack + (self.degree + 1) * self.keys
        cdef double *key_adjoint = query_stack + self.groups * stack
        cdef double *query_adjoint = key_adjoint + (self.degree + 1) * self.keys
        cdef double *dv = self.dv + slot * self.columns * self.keys
        cdef const double *grad
        cdef const double *values
        cdef ptrdiff_t path[64]
        cdef ptrdiff_t monomial, s, c, level, symbol, g, I, J, top = self.depth[first] - 1
        self.begin(head, first, path, key_stack, query_stack)
        memset(key_adjoint, 0, (self.degree + 1) * self.keys * sizeof(double))
        memset(query_adjoint, 0, self.groups * stack * sizeof(double))
        for monomial in range(first, last):
            s = self.depth[monomial]
            self.lower_degree(head, part, path, top, s, key_stack, query_stack, key_adjoint, query_adjoint)
            top = s
            path[s] = monomial
            if s:
                self.raise_degree(head, monomial, key_stack, query_stack)
            for c in range(self.columns):
                values = self.v + (head * self.columns + c) * self.keys
                self.transform_keys(key_stack + s * self.keys, values, row, spectra)
                for level in range(self.levels):
                    for symbol in range(self.symbol_groups):
                        for I in range(self.query_blocks):
                            if not self.product_block(head, symbol, level, I, spectra, total, row):
                                continue
                            for g in range(self.groups):
                                if self.symbol_groups == 1 or g == symbol:
                                    grad = self.grad + ((head * self.groups + g) * self.columns + c) * self.rows
                                    kernels.add(self.block, self.grad_weights[monomial],
                                                self.gain_of(head, g, level, I), grad + I * self.block, row,
                                                query_adjoint + g * stack + s * self.rows + I * self.block)
                for g in range(self.groups):
                    grad = self.grad + ((head * self.groups + g) * self.columns + c) * self.rows
                    for level in range(self.levels):
                        for I in range(self.query_blocks):
                            kernels.weigh(self.block, self.gain_of(head, g, level, I),
                                          query_stack + g * stack + s * self.rows + I * self.block,
                                          grad + I * self.block, row)
                            memset(row + self.block, 0, self.block * sizeof(double))
                            self.fft.run_forward(row, grad_spectra + 2 * self.pitch * (
                                (g * self.levels + level) * self.query_blocks + I))
                for J in range(self.key_blocks):
                    if not self.adjoint_block(head, J, grad_spectra, total, row):
                        continue
                    kernels.add(self.block, self.grad_weights[monomial], NULL, values + J * self.block, row,
                                key_adjoint + s * self.keys + J * self.block)
                    kernels.add(self.block, self.weights[monomial], NULL,
                                key_stack + s * self.keys + J * self.block, row, dv + c * self.keys + J * self.block)
                if self.correlations != NULL and self.weights[monomial] != 0:
                    self.add_correlations(slot, self.weights[monomial], spectra, grad_spectra)
        self.lower_degree(head, part, path, top, 1, key_stack, query_stack, key_adjoint, query_adjoint)

    cdef bint adjoint_block(self, ptrdiff_t head, ptrdiff_t J, const double *grad_spectra, double *total,
                            double *row) noexcept nogil:
        """The first b entries of row = block J of T^T times what grad_spectra are of, over all groups and levels."""
        cdef ptrdiff_t g, level, I, block
        cdef bint found = False
        memset(total, 0, 2 * self.pitch * sizeof(double))
        for g in range(self.groups):
            for level in range(self.levels):
                for I in range(self.query_blocks):
                    block = I - J + self.key_blocks - 1
                    if self.nonzero[level * self.blocks + block]:
                        found = True
                        kernels.correlate(
                            self.block + 1, 1, self.spectrum(head, g, level, block),
                            grad_spectra + 2 * self.pitch * ((g * self.levels + level) * self.query_blocks + I), total)
        if found:
            self.fft.run_inverse(total, row)
        return found

    cdef void add_correlations(self, ptrdiff_t slot, double weight, const double *spectra,
                               const double *grad_spectra) noexcept nogil:
        cdef ptrdiff_t g, level, I, J, block, symbol
        for g in range(self.groups):
            symbol = slot * self.symbol_groups + (g if self.symbol_groups > 1 else 0)
            for level in range(self.levels):
                for I in range(self.query_blocks):
                    for J in range(self.key_blocks):
                        block = level * self.blocks + I - J + self.key_blocks - 1
                        if self.nonzero[block]:
                            kernels.correlate(
                                self.block + 1, weight, spectra + 2 * self.pitch * J,
                                grad_spectra + 2 * self.pitch * ((g * self.levels + level) * self.query_blocks + I),
                                self.correlations + 2 * self.pitch * (symbol * self.levels * self.blocks + block))

    cdef void lower_degree(self, ptrdiff_t head, ptrdiff_t part, const ptrdiff_t *path, ptrdiff_t top, ptrdiff_t bottom,
                           double *key_stack, double *query_stack, double *key_adjoint,
                           double *query_adjoint) noexcept nogil:
        """What the monomials of degree top .. bottom on the path give dq, dk, and those of one degree less."""
        cdef ptrdiff_t stack = (self.degree + 1) * self.rows, slot = part * self.heads + head
        cdef ptrdiff_t s, g, variable, queries
        for s in range(top, max(bottom, <ptrdiff_t>1) - 1, -1):
            variable = self.variable[path[s]]
            kernels.adjoint(self.keys, key_adjoint + s * self.keys, self.k + (head * self.d + variable) * self.keys,
                            key_stack + (s - 1) * self.keys, self.dk + (slot * self.d + variable) * self.keys,
                            key_adjoint + (s - 1) * self.keys)
            memset(key_adjoint + s * self.keys, 0, self.keys * sizeof(double))
            for g in range(self.groups):
                queries = g * stack + s * self.rows
                kernels.adjoint(self.rows, query_adjoint + queries, self.query_column(head, g, variable),
                                query_stack + queries - self.rows,
                                self.dq + ((slot * self.groups + g) * self.d + variable) * self.rows,
                                query_adjoint + queries - self.rows)
                memset(query_adjoint + queries, 0, self.rows * sizeof(double))
