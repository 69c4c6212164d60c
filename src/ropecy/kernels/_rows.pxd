"""What is measured of rows (c/rows.h), for shims that measure and compute in one pass."""

from cython cimport floating

cdef extern from "c/rows.h" nogil:
    ctypedef double (*largest_function "rc_largest_function")(const void *, ptrdiff_t) noexcept nogil
    ctypedef double (*norm_function "rc_norm_function")(const void *, ptrdiff_t, ptrdiff_t, const unsigned char *,
                                                        const void *) noexcept nogil
    ctypedef void (*norms_function "rc_norms_function")(const void *, ptrdiff_t, ptrdiff_t, double,
                                                        double *) noexcept nogil
    ctypedef void (*quadratic_function "rc_quadratic_function")(const void *, ptrdiff_t, ptrdiff_t, const void *,
                                                                double *, void *) noexcept nogil
    ctypedef void (*columns_function "rc_columns_function")(const void *, ptrdiff_t, ptrdiff_t, const unsigned char *,
                                                            double *, void *, void *) noexcept nogil

    ctypedef struct rc_rows_kernels:
        largest_function largest_f32, largest_f64
        norm_function norm_f32, norm_f64
        norms_function norms_f32, norms_f64
        size_t (*quadratic_workspace_f32)(ptrdiff_t) noexcept nogil
        size_t (*quadratic_workspace_f64)(ptrdiff_t) noexcept nogil
        quadratic_function quadratic_f32, quadratic_f64
        columns_function columns_f32, columns_f64

    const rc_rows_kernels *rc_rows_select(int level)


cdef inline bint far(const floating *low, const floating *high, ptrdiff_t count) noexcept nogil:
    """Whether some column lies farther from 0 than twice the distance between its ends."""
    cdef ptrdiff_t a
    cdef double least, most
    for a in range(count):
        # Halves, so that no difference passes the largest number.
        least, most = 0.5 * <double>low[a], 0.5 * <double>high[a]
        if max(-least, most) > 2 * (most - least):
            return True
    return False
