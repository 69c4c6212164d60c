"""What c/monomials.h declares."""

cdef extern from "c/monomials.h" nogil:
    ctypedef struct rc_monomials_problem:
        ptrdiff_t heads, groups, n, n_k, d, d_v, blocks, width, q_offset
        const void *q
        const void *k
        const void *v
        const double *decay
        int earlier
        const unsigned char *key_mask
        const void *centre
        const void *value_centre
        const double *q_factor
        const double *k_factor
        int degree, grad_degree, state_degree
        ptrdiff_t pitch
        const ptrdiff_t *offset
        const ptrdiff_t *count
        const void *weights
        const void *grad_weights
        ptrdiff_t weights_apart
        ptrdiff_t chunk, segments, chunks_per_segment
        ptrdiff_t known
        const double *falls
        double *states
        double *grad_states
        void *packed
        void *grad_packed
        size_t packed_size, grad_packed_size
        void *o
        void *inverse
        const void *ratio
        double *lse
        int order
        void *moment
        void *spread
        const void *reach
        ptrdiff_t reaches
        const void *grad
        void *dq
        void *dk
        void *dv
        double *key_sums

    ctypedef void (*segment_function "rc_segment_function")(const rc_monomials_problem *, ptrdiff_t, ptrdiff_t,
                                                            void *) noexcept nogil
    ctypedef void (*chunk_function "rc_chunk_function")(const rc_monomials_problem *, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                                                        void *) noexcept nogil

    ctypedef struct rc_monomials_functions:
        int tile, lanes, chunk
        size_t (*workspace)(const rc_monomials_problem *) noexcept nogil
        size_t (*packed_size)(const rc_monomials_problem *) noexcept nogil
        size_t (*grad_packed_size)(const rc_monomials_problem *) noexcept nogil
        segment_function sum_keys, sum_queries
        void (*follow)(ptrdiff_t, const double *, double, const double *, double *) noexcept nogil
        void (*pack)(const rc_monomials_problem *, ptrdiff_t, const double *, void *, void *, void *) noexcept nogil
        chunk_function forward, grad_queries
        segment_function grad_keys, scan_forward, scan_grad_queries, scan_grad_keys

    ctypedef struct rc_monomials_kernels:
        const rc_monomials_functions *f32
        const rc_monomials_functions *f64

    const rc_monomials_kernels *rc_monomials_select(int level)
