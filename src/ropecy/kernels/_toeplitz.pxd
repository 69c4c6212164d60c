"""What products by FFT share: the kernels around transforms, and which products of spectra make each output."""

cdef extern from "c/toeplitz.h" nogil:
    ctypedef enum rc_mixing:
        RC_PRODUCT
        RC_ADJOINT
        RC_CORRELATE
        RC_ADD_PRODUCT
        RC_ADD_ADJOINT

    enum:
        RC_COLUMNS

    const int RC_TILE, RC_CHUNK

    ctypedef struct rc_toeplitz_kernels:
        void (*monomial)(ptrdiff_t, double, ptrdiff_t, const double *const *, double *) noexcept nogil
        void (*derive)(ptrdiff_t, double, const double *, ptrdiff_t, const double *const *, double *) noexcept nogil
        void (*differentiate)(ptrdiff_t, double, const double *, ptrdiff_t, const double *const *,
                              double *const *) noexcept nogil
        void (*pack)(ptrdiff_t, const double *, const double *, const double *, const double *, const double *,
                     double *) noexcept nogil
        void (*gather)(ptrdiff_t, double, const double *, const double *, const double *, const double *,
                       const double *, double *) noexcept nogil
        void (*scatter)(ptrdiff_t, double, const double *, const double *, const double *, const double *, double *,
                        double *) noexcept nogil
        void (*mix)(ptrdiff_t, ptrdiff_t, ptrdiff_t, const ptrdiff_t *, const ptrdiff_t *, const ptrdiff_t *,
                    rc_mixing, double, const double *, const double *, double *, double *) noexcept nogil

    const rc_toeplitz_kernels *rc_toeplitz_select(int level)


cdef const rc_toeplitz_kernels *kernels

cdef struct Terms:
    # Which products of spectra each output is the sum of, as `mix` takes them.
    ptrdiff_t outputs
    const unsigned char *nonzero
    const ptrdiff_t *start
    const ptrdiff_t *shared
    const ptrdiff_t *rows


cdef Terms pointers(arrays)
