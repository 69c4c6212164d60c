# What other kernels may cimport. Plans are opaque here, so that fftw3.h is included, and the library linked, by
# _fftw alone.

cdef class RealFFT:
    cdef readonly Py_ssize_t n          # length of a row
    cdef readonly Py_ssize_t howmany    # rows in a batch
    cdef readonly Py_ssize_t n_freq     # n // 2 + 1, length of a row's spectrum
    cdef readonly object dtype          # of the rows: float32 or float64
    cdef bint single
    cdef void *forward_plan
    cdef void *inverse_plan

    # Workspaces with the alignment that plans ask for: (howmany, n) reals, (howmany, n_freq) complex numbers.
    # NULL where memory is lacking. Whoever takes one gives it back to release.
    cdef size_t row_bytes(self) noexcept nogil
    cdef void *new_rows(self) noexcept nogil
    cdef void *new_spectra(self) noexcept nogil
    cdef void release(self, void *workspace) noexcept nogil

    # Both arrays must be workspaces of this plan (or share their alignment). The inverse is not normalised and
    # overwrites the spectra. Any number of threads may run one plan at once, each on its own workspaces.
    cdef void run_forward(self, void *rows, void *spectra) noexcept nogil
    cdef void run_inverse(self, void *spectra, void *rows) noexcept nogil


cdef class ComplexFFT:
    cdef readonly Py_ssize_t n
    cdef void *forward_plan
    cdef void *inverse_plan

    cdef void *new_row(self) noexcept nogil

    # In place, on arrays with the alignment of fftw_malloc. The inverse is not normalised. Any number of threads may
    # run one plan at once.
    cdef void run_forward(self, void *x) noexcept nogil
    cdef void run_inverse(self, void *x) noexcept nogil
    cdef object _execute(self, str name, given, bint inverse)
