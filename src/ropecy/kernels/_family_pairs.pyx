"""The steps of a product with ``sum_{a, b} diag(q^a) T_ab diag(k^b)`` and of its adjoint, for one pair (a, b) each.

Blocks, spectra and what happens around transforms are those of `_toeplitz`; but two columns of v make one complex
column, since each pair has a matrix T_ab of its own.
"""

import numpy as np

cimport numpy as cnp
from libc.string cimport memset

from ._arrays cimport pieces, pointer
from ._circulant cimport circulant, circulant_adjoint, pitch_of
from ._fftw cimport ComplexFFT, RealFFT
from ._toeplitz cimport (
    RC_ADD_ADJOINT, RC_ADD_PRODUCT, RC_COLUMNS, RC_CORRELATE, Terms, kernels, pointers, rc_mixing,
)

from ._toeplitz import _terms

cnp.import_array()

cdef enum:
    STRIP = 1024  # offsets at a time, so that the rows of W that all multisets of a pair read stay in the cache


cdef class Pairs:
    """The arrays of one problem, and the steps for a pair of monomials. Nothing is changed after `__init__`.

    Parameters
    ----------
    transforms : (ComplexFFT, RealFFT)
        Of length b / 2 and of 2b, where b, the length of a block, is a multiple of 32.
    rows : (q, k)
        Columns of queries, (slots, G, d, rows) float64, and of keys, (H, d, keys); rows and keys are multiples of b.
        The heads of a slot share all T_ab: a slot is a key head with its G query heads, or one query head where those
        of a key head have symbols of their own.
    W : (entries, offsets) float64
        For the rows + keys offsets i - j from -keys on; 0 for offsets that do not occur.
    levels : (slots or 1, levels, offsets) float64
        Factors of T_ab by offset. T_ab is a sum over levels, each with a gain of its own for every row.
    nonzero : (levels, blocks) bool
        Which blocks of T_ab have an entry that is not 0 in some slot.
    gain : (slots, G, levels, rows) float64, or None for ones
        What each level is multiplied by in each row.
    threads : int
        The most that are used.
    """

    def __init__(self, transforms, rows, W, levels, nonzero, gain, threads):
        cdef ComplexFFT fft
        cdef RealFFT real
        fft, real = transforms
        q, k = rows
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

    cdef ptrdiff_t sent_size(self, const Pass *p) noexcept nogil:
        """How many doubles the spectra of one monomial of queries have."""
        return p.columns * self.levels * self.query_blocks * self.pitch

    cdef void make_symbol(self, const Pass *p, ptrdiff_t pair, double factor, Work *work) noexcept nogil:
        """work.symbol = the spectra of factor T_ab / (2b), by level and block."""
        cdef const double *levels = self.levels_of(work.slot)
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
        """Add the products of spectra of a pair to what its monomials get, for all columns.

        The monomial of queries gets T_ab times keys. Backward, the column of keys gets the transpose times gradients,
        and work.correlations becomes what gradients and keys say of T_ab. Where T_ab is 0, `used` is False, and only
        the last is computed.
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

    cdef void correlate(self, const Pass *p, ptrdiff_t pair, double weight, double grad_weight,
                        Work *work) noexcept nogil:
        """From work.correlations the derivative of T_ab at each offset, and what it adds to dW and dsymbol."""
        cdef const double *of[RC_COLUMNS]
        cdef const double *levels = self.levels_of(work.slot)
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
                                   p.dsymbol + (work.part * self.slots + work.slot) * self.offsets + at)
                for place in range(degree):
                    to[place] = p.dW + (work.lane * self.entries + entries[place]) * self.offsets + at
                factor = grad_weight * p.multinomial[multiset]
                if multiset < known:
                    kernels.differentiate(size, factor, work.line + at, degree, of, to)
                else:
                    # The last entry of the multiset is 0 at every offset, so only that one has a derivative.
                    kernels.derive(size, factor, work.line + at, degree - 1, of, to[degree - 1])

    cdef ptrdiff_t factors(self, const Pass *p, ptrdiff_t multiset, ptrdiff_t at, const double **of) noexcept nogil:
        """of = the addresses of all entries of a multiset at the offset `at`; returned is how many these are.

        Lists of entries are padded with -1.
        """
        cdef const ptrdiff_t *entries = p.of_entries + multiset * p.most
        cdef ptrdiff_t degree = 0
        while degree < p.most and entries[degree] >= 0:
            of[degree] = self.W + entries[degree] * self.offsets + at
            degree += 1
        return degree

    cdef void derive(self, ptrdiff_t size, ptrdiff_t degree, const ptrdiff_t *variables, const double *x,
                     const double *adjoint, double *dx) noexcept nogil:
        """dx += the derivatives of a monomial by its variables, times the derivative by the monomial."""
        cdef const double *of[RC_COLUMNS]
        cdef double *to[RC_COLUMNS]
        cdef ptrdiff_t at
        for at in range(degree):
            of[at], to[at] = x + variables[at] * size, dx + variables[at] * size
        kernels.differentiate(size, 1.0, adjoint, degree, of, to)

    cdef void monomial(self, ptrdiff_t size, ptrdiff_t degree, const ptrdiff_t *variables, const double *x,
                       double *column) noexcept nogil:
        """column = the product of these variables, which are columns of x."""
        cdef const double *of[RC_COLUMNS]
        cdef ptrdiff_t at
        for at in range(degree):
            of[at] = x + variables[at] * size
        kernels.monomial(size, 1.0, degree, of, column)

    cdef void query_columns(self, const Pass *p, ptrdiff_t a, Work *work) noexcept nogil:
        """work.columns = the monomial a of queries, for each group."""
        cdef ptrdiff_t g
        for g in range(self.groups):
            self.monomial(self.rows, p.query_degree[a], p.query_variables + a * p.most,
                          self.q + (work.slot * self.groups + g) * self.d * self.rows, work.columns + g * self.rows)

    cdef void transform_keys(self, const Pass *p, ptrdiff_t key, Work *work) noexcept nogil:
        """work.keys = the spectra of a monomial of keys times each column of values, two of these at a time."""
        cdef ptrdiff_t head = work.slot * self.heads // self.slots, c, J
        cdef const double *values
        self.monomial(self.keys, p.key_degree[key], p.key_variables + key * p.most,
                      self.k + head * self.d * self.keys, work.key_column)
        for c in range(0, p.columns, 2):
            for J in range(self.key_blocks):
                values = p.v + (head * p.columns + c) * self.keys + J * self.block
                self.transform(values, values + self.keys, work.key_column + J * self.block,
                               work.keys + (c * self.key_blocks + 2 * J) * self.pitch)

    cdef void transform_grads(self, const Pass *p, ptrdiff_t a, ptrdiff_t first, Work *work) noexcept nogil:
        """work.given = the spectra of a monomial of queries times gradient and gain, groups added up, by level."""
        cdef const double *of[2]
        cdef ptrdiff_t c, which, level, g, I, count
        self.query_columns(p, a, work)
        for c in range(0, p.columns, 2):
            for level in range(self.levels):
                memset(work.both, 0, 2 * self.rows * sizeof(double))
                for g in range(self.groups):
                    of[1] = self.gain_of(work.slot, g, level, 0)
                    count = 1 if self.gain == NULL else 2
                    for which in range(2):
                        of[0] = self.grad_of(p, work.slot, g, c + which)
                        kernels.derive(self.rows, 1.0, work.columns + g * self.rows, count, of,
                                       work.both + which * self.rows)
                for I in range(self.query_blocks):
                    self.transform(work.both + I * self.block, work.both + self.rows + I * self.block, self.ones,
                                   self.sent_of(p, work.given, a - first, c, level, I))

    cdef void transform(self, const double *x1, const double *x2, const double *y, double *to) noexcept nogil:
        """to = the spectrum of a block of the complex column (x1 + i x2) y, in quarters."""
        cdef ptrdiff_t quarter
        kernels.pack(self.block, NULL, x1, x2, y, self.turn, to)
        for quarter in range(4):
            self.fft.run_forward(to + quarter * self.block)

    cdef double *invert(self, double *quarters) noexcept nogil:
        """The inverse of `transform` but for its order, in the place of the quarters."""
        cdef ptrdiff_t quarter
        for quarter in range(4):
            self.fft.run_inverse(quarters + quarter * self.block)
        return quarters

    cdef void mix(self, Terms terms, rc_mixing how, const double *x, const double *shared, double *z) noexcept nogil:
        """Add products of spectra x and shared to z, by the blocks that `terms` lists."""
        kernels.mix(2 * self.block, self.pitch, terms.outputs, terms.start, terms.shared, terms.rows, how, 1.0, x,
                    shared, z, NULL)

    cdef double *sent_of(self, const Pass *p, double *spectra, ptrdiff_t at, ptrdiff_t c, ptrdiff_t level,
                         ptrdiff_t I) noexcept nogil:
        """Where in `sent` or `given` the spectra of the monomial `at` of a batch, for columns c and c + 1, begin."""
        spectra += at * self.sent_size(p)
        return spectra + ((c * self.levels + 2 * level) * self.query_blocks + 2 * I) * self.pitch

    cdef const double *levels_of(self, ptrdiff_t slot) noexcept nogil:
        """The levels of a slot."""
        return self.of_levels + (slot * self.levels * self.offsets if self.level_slots > 1 else 0)

    cdef const double *gain_of(self, ptrdiff_t slot, ptrdiff_t g, ptrdiff_t level, ptrdiff_t I) noexcept nogil:
        """The gain of a block of rows, NULL where there is none."""
        if self.gain == NULL:
            return NULL
        return self.gain + ((slot * self.groups + g) * self.levels + level) * self.rows + I * self.block

    cdef const double *grad_of(self, const Pass *p, ptrdiff_t slot, ptrdiff_t g, ptrdiff_t c) noexcept nogil:
        """A column of the gradient."""
        return p.grad + ((slot * self.groups + g) * p.columns + c) * self.rows
