"""float16 and bfloat16 from and to float32 (c/halves.h), for shims that compute from what is stored."""

cdef extern from "c/halves.h" nogil:
    ctypedef void (*widen_function "rc_widen_function")(const void *, ptrdiff_t, float *) noexcept nogil
    ctypedef void (*narrow_function "rc_narrow_function")(const float *, ptrdiff_t, void *) noexcept nogil

    ctypedef struct rc_halves_kernels:
        widen_function widen_float16, widen_bfloat16
        narrow_function narrow_float16, narrow_bfloat16

    const rc_halves_kernels *rc_halves_select(int level)
