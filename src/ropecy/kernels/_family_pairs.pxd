"""The arrays of a product for a family of matrices, and the steps of it that concern one pair of monomials."""

from libc.stdint cimport uintptr_t

from ._fftw cimport ComplexFFT, RealFFT
from ._parallel cimport rc_worker
from ._toeplitz cimport Terms, rc_mixing


cdef struct Work:
    # The task that a thread is at: the lane and the part of a slot's batches.
    ptrdiff_t lane, slot, part
    # Its workspace. First spectra:
    double *sent  # (batch, columns, levels, query blocks), what the monomials of queries get from the keys
    double *given  # the same shape, of the columns of queries times gradients
    double *keys  # (columns, key blocks), of a column of keys times values
    double *back  # the same shape, what that column of keys gets from the gradients
    double *symbol  # (levels, blocks), of T_ab
    double *correlations  # the same shape, of the derivative of T_ab
    # and then numbers by offset or by row:
    double *line  # by offset: a symbol, later the derivative of one
    double *window  # two blocks of it
    double *half  # half a spectrum of them, as a real transform gives it
    double *key_column  # a monomial of keys
    double *key_adjoint  # its derivative
    double *columns  # a monomial of queries, for each group
    double *both  # two columns of that monomial times the gradient, which make one complex column
    double *adjoint  # the derivative of the monomial
    const rc_worker *worker


cdef struct Pass:
    # The lists of batches, monomials, pairs and multisets, as `engines` makes them, with their names;
    ptrdiff_t batches, batch, most  # how many batches, their largest size, the largest degree
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
    # how many parts a slot's batches are cut into, how many tasks that makes, and how many lanes these are done in;
    ptrdiff_t parts, tasks, lanes
    # what is read, where grad is NULL in the forward pass;
    ptrdiff_t columns
    const double *v
    const double *weights
    const double *grad_weights
    const double *grad
    # what is added to, which has an axis of parts in front, or of lanes in the case of dW;
    double *sums
    double *dq
    double *dk
    double *dv
    double *dsymbol
    double *dW
    # the `Product` whose pass this is, the address of the first workspace, and how many bytes each has.
    void *product
    uintptr_t work, size


cdef class Pairs:
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

    cdef void make_symbol(self, const Pass *p, ptrdiff_t pair, double factor, Work *work) noexcept nogil
    cdef void multiply(self, const Pass *p, ptrdiff_t pair, ptrdiff_t first, bint used, Work *work) noexcept nogil
    cdef void correlate(self, const Pass *p, ptrdiff_t pair, double weight, double grad_weight,
                        Work *work) noexcept nogil
    cdef ptrdiff_t factors(self, const Pass *p, ptrdiff_t multiset, ptrdiff_t at, const double **of) noexcept nogil
    cdef void derive(self, ptrdiff_t size, ptrdiff_t degree, const ptrdiff_t *variables, const double *x,
                     const double *adjoint, double *dx) noexcept nogil
    cdef void monomial(self, ptrdiff_t size, ptrdiff_t degree, const ptrdiff_t *variables, const double *x,
                       double *column) noexcept nogil
    cdef void query_columns(self, const Pass *p, ptrdiff_t a, Work *work) noexcept nogil
    cdef void transform_keys(self, const Pass *p, ptrdiff_t key, Work *work) noexcept nogil
    cdef void transform_grads(self, const Pass *p, ptrdiff_t a, ptrdiff_t first, Work *work) noexcept nogil
    cdef void transform(self, const double *x1, const double *x2, const double *y, double *to) noexcept nogil
    cdef double *invert(self, double *quarters) noexcept nogil
    cdef void mix(self, Terms terms, rc_mixing how, const double *x, const double *shared, double *z) noexcept nogil
    cdef ptrdiff_t sent_size(self, const Pass *p) noexcept nogil
    cdef double *sent_of(self, const Pass *p, double *spectra, ptrdiff_t at, ptrdiff_t c, ptrdiff_t level,
                         ptrdiff_t I) noexcept nogil
    cdef const double *levels_of(self, ptrdiff_t slot) noexcept nogil
    cdef const double *gain_of(self, ptrdiff_t slot, ptrdiff_t g, ptrdiff_t level, ptrdiff_t I) noexcept nogil
    cdef const double *grad_of(self, const Pass *p, ptrdiff_t slot, ptrdiff_t g, ptrdiff_t c) noexcept nogil
