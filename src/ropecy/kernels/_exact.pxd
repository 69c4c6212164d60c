"""What forward and backward of exact attention share: the kernels of c/exact.h."""

from ._halves cimport narrow_function, widen_function

cdef extern from "c/exact.h" nogil:
    ctypedef struct rc_exact_problem:
        ptrdiff_t heads, groups, n, n_k, d, d_v, lo, hi
        double scale, gain
        const unsigned char *bounded
        int everywhere, masked
        const void *q
        const void *k
        const void *v
        const void *symbol
        ptrdiff_t symbol_head, symbol_group
        const void *factor
        const ptrdiff_t *factor_start
        const void *key_shift
        void *key_pack
        void *value_pack
        void *o
        void *maximum
        void *inverse
        double *lse
        const void *q_rows
        const void *grad_rows
        void *q_tiles
        void *grad_tiles
        void *row_stats
        void *dq_segments
        double *dsymbol
        ptrdiff_t segments
        double grad_scale

    ctypedef struct rc_exact_functions:
        int queries, tile, block, step, lanes
        size_t (*forward_workspace)(const rc_exact_problem *) noexcept nogil
        size_t (*backward_workspace)(const rc_exact_problem *) noexcept nogil
        void (*pack_keys)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*pack_values)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*forward)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t, ptrdiff_t, const void *, void *,
                        void *) noexcept nogil
        void (*prepare)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*backward)(const rc_exact_problem *, ptrdiff_t, void *, void *, void *) noexcept nogil
        void (*collect)(const rc_exact_problem *, ptrdiff_t, ptrdiff_t, void *) noexcept nogil

    ctypedef struct rc_exact_kernels:
        const rc_exact_functions *f32
        const rc_exact_functions *f64

    const rc_exact_kernels *rc_exact_select(int level)


cdef struct Pass:
    rc_exact_problem p
    const rc_exact_functions *f
    ptrdiff_t tiles, blocks  # of a head's queries (forward: pieces of them) and keys
    ptrdiff_t item  # bytes of a number that is computed with
    char *work
    size_t size  # of a thread's workspace


cdef struct Halves:
    # From halves, which are computed in float32, and back; NULL where what is stored is computed with.
    widen_function widen
    narrow_function narrow


cdef const rc_exact_functions *functions_of(dtype)
cdef Halves halves_of(dtype)
cdef void describe(rc_exact_problem *p, q, k, v, tables)
