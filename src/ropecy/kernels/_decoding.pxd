"""What c/decoding.h declares."""

cdef extern from "c/decoding.h" nogil:
    ctypedef struct rc_decode_problem:
        ptrdiff_t heads, groups, states, d, d_v
        int degree
        ptrdiff_t pitch
        const ptrdiff_t *offset
        const ptrdiff_t *count
        const double *weights
        const double *slope
        const double *fall
        const double *const *state
        ptrdiff_t capacity
        ptrdiff_t ring_pitch
        double *ring_keys
        double *ring
        const ptrdiff_t *streams
        const ptrdiff_t *length
        const ptrdiff_t *recent
        ptrdiff_t near
        ptrdiff_t stretches
        const double *stretch
        const double *value_centre
        const double *rows
        const double *v
        double *o

    ctypedef struct rc_leaving:
        const rc_decode_problem *p
        ptrdiff_t tokens
        const ptrdiff_t *streams
        const ptrdiff_t *folded
        const double *factors
        const double *weights
        double *const *after

    ctypedef struct rc_decoding_kernels:
        size_t (*step_workspace)(const rc_decode_problem *) noexcept nogil
        void (*step)(const rc_decode_problem *, ptrdiff_t, ptrdiff_t, void *) noexcept nogil
        size_t (*leave_workspace)(const rc_leaving *) noexcept nogil
        void (*leave)(const rc_leaving *, ptrdiff_t, void *) noexcept nogil
        void (*add_block)(ptrdiff_t, ptrdiff_t, double, const double *, const double *, double *) noexcept nogil

    const rc_decoding_kernels *rc_decoding_select(int level)
