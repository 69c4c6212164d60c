"""Fourier transforms by FFTW, of many real rows or of a complex one: plans under one lock, executed from any thread.

FFTW's planner is not safe to run from two threads, its executions are; so plans are made and destroyed under one
lock of this module, with the GIL released, and are executed by the new-array calls on workspaces of ``fftw_malloc``,
which have the alignment that the plan was made for.

FFTW ends the process where its own allocations fail. So a plan is made only after what planning takes could be had, and
a MemoryError raised where it could not. What is left: memory that other threads take between these two moments, and the
few kilobytes that FFTW allocates while it executes some plans.
"""

import numpy as np

from libc.limits cimport INT_MAX
from libc.string cimport memcpy, memset

__all__ = ["ComplexFFT", "RealFFT", "fftw_version"]

cdef extern from "fftw3.h" nogil:
    ctypedef double fftw_complex[2]
    ctypedef float fftwf_complex[2]
    ctypedef struct fftw_plan_s
    ctypedef fftw_plan_s *fftw_plan
    ctypedef struct fftwf_plan_s
    ctypedef fftwf_plan_s *fftwf_plan
    const unsigned FFTW_MEASURE, FFTW_ESTIMATE, FFTW_DESTROY_INPUT
    const int FFTW_FORWARD, FFTW_BACKWARD
    const char *fftw_version_double "fftw_version"
    const char *fftw_version_single "fftwf_version"

    void *fftw_malloc(size_t)
    void fftw_free(void *)
    void *fftwf_malloc(size_t)
    void fftwf_free(void *)
    fftw_plan fftw_plan_many_dft_r2c(int, const int *, int, double *, const int *, int, int,
                                     fftw_complex *, const int *, int, int, unsigned)
    fftw_plan fftw_plan_many_dft_c2r(int, const int *, int, fftw_complex *, const int *, int, int,
                                     double *, const int *, int, int, unsigned)
    fftwf_plan fftwf_plan_many_dft_r2c(int, const int *, int, float *, const int *, int, int,
                                       fftwf_complex *, const int *, int, int, unsigned)
    fftwf_plan fftwf_plan_many_dft_c2r(int, const int *, int, fftwf_complex *, const int *, int, int,
                                       float *, const int *, int, int, unsigned)
    fftw_plan fftw_plan_dft_1d(int, fftw_complex *, fftw_complex *, int, unsigned)
    void fftw_execute_dft(fftw_plan, fftw_complex *, fftw_complex *)
    void fftw_execute_dft_r2c(fftw_plan, double *, fftw_complex *)
    void fftw_execute_dft_c2r(fftw_plan, fftw_complex *, double *)
    void fftwf_execute_dft_r2c(fftwf_plan, float *, fftwf_complex *)
    void fftwf_execute_dft_c2r(fftwf_plan, fftwf_complex *, float *)
    void fftw_destroy_plan(fftw_plan)
    void fftwf_destroy_plan(fftwf_plan)


# The lock is taken only where the GIL is released and no Python code runs, so that neither a garbage collection nor a
# signal handler can ask for it again in the thread that holds it. Shared by both precisions.
cdef extern from "c/planner.h" nogil:
    void lock_planner "rc_planner_lock"()
    void unlock_planner "rc_planner_unlock"()
    int rc_planner_at_fork()

if rc_planner_at_fork() != 0:
    raise MemoryError("no memory for a handler of forks")

cdef enum:
    PLANNING = 1 << 22  # bytes that the planner takes whatever the size of rows


cdef bint has_room(size_t size) noexcept nogil:
    """Whether planning for arrays of so many bytes finds what it takes: twiddle factors and buffers of their size."""
    cdef void *room = fftw_malloc(4 * size + PLANNING)
    fftw_free(room)
    return room != NULL


def fftw_version() -> dict[str, str]:
    """FFTW's version strings, which name the instruction sets of its codelets.

    Returns
    -------
    dict
        ``{"float64": "fftw-3.3.10-sse2-avx", "float32": ...}`` or the like.
    """
    return {"float64": fftw_version_double.decode(), "float32": fftw_version_single.decode()}


cdef class RealFFT:
    """X_k = sum_j x_j exp(-2 pi i j k / n) for k = 0 .. n // 2, of many real rows at once, and its inverse.

    Parameters
    ----------
    n : int
        Length of a row, at least 1; any integer, though products of small primes are fastest.
    howmany : int, default 1
        Rows that one execution transforms, at least 1.
    dtype : {float64, float32}
        Of the rows; the spectra are complex128 or complex64.
    flags : {"estimate", "measure"}
        How FFTW chooses its algorithm. "measure" times candidates: 1.4 to 2.3 times faster in execution, seconds
        of planning, and a choice, so the last bits of a result, that may differ from one process to the next.

    Raises
    ------
    TypeError
        `n` or `howmany` is not an integer, or `dtype` is neither float32 nor float64.
    ValueError
        `n` or `howmany` is below 1 or above 2**31 - 1, or `flags` is unknown.
    MemoryError
        The workspaces that planning needs can't be had.
    RuntimeError
        FFTW makes no plan.

    Notes
    -----
    Time O(howmany n log n), on the calling thread alone. The GIL is free while planning and executing. One plan
    may be executed by many threads at once: each call has its own workspaces, of howmany (2 n + 2) numbers.

    Examples
    --------
    >>> fft = RealFFT(4)
    >>> fft.forward([1.0, 2.0, 3.0, 4.0])
    array([10.+0.j, -2.+2.j, -2.+0.j])
    >>> fft.inverse(fft.forward([1.0, 2.0, 3.0, 4.0]))
    array([1., 2., 3., 4.])
    """

    def __cinit__(self, n, howmany=1, dtype=np.float64, *, flags="estimate"):
        self.n = _size("n", n)
        self.howmany = _size("howmany", howmany)
        self.n_freq = self.n // 2 + 1
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        cdef unsigned how = _flags(flags)
        self.single = self.dtype == np.float32
        if 2 * self.n_freq * self.dtype.itemsize * int(self.howmany) >= 1 << 62:
            raise MemoryError(f"{howmany} rows of {n} numbers pass what can be addressed")

        cdef void *rows
        cdef void *spectra
        cdef bint allocated
        with nogil:
            rows = self.new_rows()
            spectra = self.new_spectra()
            allocated = rows != NULL and spectra != NULL and has_room(self.row_bytes())
            if allocated:
                lock_planner()
                _plan(self, rows, spectra, how)
                unlock_planner()
            self.release(rows)
            self.release(spectra)
        if not allocated:
            raise MemoryError(f"no memory to plan {howmany} transforms of length {n}")
        if self.forward_plan == NULL or self.inverse_plan == NULL:
            raise RuntimeError(f"FFTW makes no plan for {howmany} transforms of length {n} in {self.dtype}")

    def __dealloc__(self):
        with nogil:
            lock_planner()
            if self.single:
                if self.forward_plan != NULL:
                    fftwf_destroy_plan(<fftwf_plan>self.forward_plan)
                if self.inverse_plan != NULL:
                    fftwf_destroy_plan(<fftwf_plan>self.inverse_plan)
            else:
                if self.forward_plan != NULL:
                    fftw_destroy_plan(<fftw_plan>self.forward_plan)
                if self.inverse_plan != NULL:
                    fftw_destroy_plan(<fftw_plan>self.inverse_plan)
            unlock_planner()

    def __repr__(self):
        return f"RealFFT({self.n}, howmany={self.howmany}, dtype={self.dtype})"

    cdef size_t row_bytes(self) noexcept nogil:
        return <size_t>self.howmany * self.n * (sizeof(float) if self.single else sizeof(double))

    cdef void *new_rows(self) noexcept nogil:
        return fftwf_malloc(self.row_bytes()) if self.single else fftw_malloc(self.row_bytes())

    cdef void *new_spectra(self) noexcept nogil:
        if self.single:
            return fftwf_malloc(<size_t>self.howmany * self.n_freq * sizeof(fftwf_complex))
        return fftw_malloc(<size_t>self.howmany * self.n_freq * sizeof(fftw_complex))

    cdef void release(self, void *workspace) noexcept nogil:
        if self.single:
            fftwf_free(workspace)
        else:
            fftw_free(workspace)

    cdef void run_forward(self, void *rows, void *spectra) noexcept nogil:
        if self.single:
            fftwf_execute_dft_r2c(<fftwf_plan>self.forward_plan, <float *>rows, <fftwf_complex *>spectra)
        else:
            fftw_execute_dft_r2c(<fftw_plan>self.forward_plan, <double *>rows, <fftw_complex *>spectra)

    cdef void run_inverse(self, void *spectra, void *rows) noexcept nogil:
        if self.single:
            fftwf_execute_dft_c2r(<fftwf_plan>self.inverse_plan, <fftwf_complex *>spectra, <float *>rows)
        else:
            fftw_execute_dft_c2r(<fftw_plan>self.inverse_plan, <fftw_complex *>spectra, <double *>rows)

    def forward(self, x):
        """The spectra of real rows, not normalised, as ``numpy.fft.rfft``.

        Parameters
        ----------
        x : array_like, (howmany, n), or (n,) where howmany is 1
            Of the plan's dtype, any strides.

        Returns
        -------
        ndarray, (howmany, n_freq) or (n_freq,)

        Raises
        ------
        TypeError, ValueError
            `x` has another dtype or shape.
        """
        return _transform(self, "x", x, False)

    def inverse(self, X):
        """The real rows of given spectra, divided by n, as ``numpy.fft.irfft(X, n)``.

        Parameters
        ----------
        X : array_like, (howmany, n_freq), or (n_freq,) where howmany is 1
            Of the complex dtype that belongs to the plan's, any strides; it is not written to.

        Returns
        -------
        ndarray, (howmany, n) or (n,)

        Raises
        ------
        TypeError, ValueError
            `X` has another dtype or shape.
        """
        rows = _transform(self, "X", X, True)
        rows /= self.n
        return rows


cdef class ComplexFFT:
    """X_k = sum_j x_j exp(-2 pi i j k / n) of one complex row in float64, and its inverse, in place.

    Two real columns in one complex row pass through about a quarter faster than each by a `RealFFT`, and measuring
    takes a quarter of the time.

    Parameters
    ----------
    n, flags
        As for `RealFFT`.

    Raises
    ------
    TypeError, ValueError, MemoryError, RuntimeError
        As `RealFFT` does.

    Examples
    --------
    >>> fft = ComplexFFT(4)
    >>> fft.forward(np.array([1, 2, 3, 4j]))
    array([ 6.+4.j, -6.-2.j,  2.-4.j,  2.+2.j])
    >>> fft.inverse(fft.forward(np.array([1, 2, 3, 4j])))
    array([1.+0.j, 2.+0.j, 3.+0.j, 0.+4.j])
    """

    def __cinit__(self, n, *, flags="estimate"):
        self.n = _size("n", n)
        cdef int length = <int>self.n
        cdef unsigned how = _flags(flags)
        cdef fftw_complex *x
        cdef bint allocated
        with nogil:
            x = <fftw_complex *>self.new_row()
            allocated = x != NULL and has_room(<size_t>length * sizeof(fftw_complex))
            if allocated:
                lock_planner()
                self.forward_plan = fftw_plan_dft_1d(length, x, x, FFTW_FORWARD, how)
                self.inverse_plan = fftw_plan_dft_1d(length, x, x, FFTW_BACKWARD, how)
                unlock_planner()
            fftw_free(x)
        if not allocated:
            raise MemoryError(f"no memory to plan a transform of length {n}")
        if self.forward_plan == NULL or self.inverse_plan == NULL:
            raise RuntimeError(f"FFTW makes no plan for a transform of length {n}")

    def __dealloc__(self):
        with nogil:
            lock_planner()
            if self.forward_plan != NULL:
                fftw_destroy_plan(<fftw_plan>self.forward_plan)
            if self.inverse_plan != NULL:
                fftw_destroy_plan(<fftw_plan>self.inverse_plan)
            unlock_planner()

    def __repr__(self):
        return f"ComplexFFT({self.n})"

    cdef void *new_row(self) noexcept nogil:
        return fftw_malloc(<size_t>self.n * sizeof(fftw_complex))

    cdef void run_forward(self, void *x) noexcept nogil:
        fftw_execute_dft(<fftw_plan>self.forward_plan, <fftw_complex *>x, <fftw_complex *>x)

    cdef void run_inverse(self, void *x) noexcept nogil:
        fftw_execute_dft(<fftw_plan>self.inverse_plan, <fftw_complex *>x, <fftw_complex *>x)

    def forward(self, x):
        """The spectrum of x, complex (n,), not normalised, as ``numpy.fft.fft``.

        Raises
        ------
        TypeError, ValueError
            `x` has another dtype or shape.
        """
        return self._execute("x", x, False)

    def inverse(self, X):
        """The row of a given spectrum, divided by n, as ``numpy.fft.ifft``.

        Raises
        ------
        TypeError, ValueError
            `X` has another dtype or shape.
        """
        return self._execute("X", X, True) / self.n

    def rounds(self, Py_ssize_t rows, Py_ssize_t times):
        """Transform so many rows of zeros forth, then back, and that so many times: what FFTW takes by itself."""
        cdef Py_ssize_t i
        # Rows a cache line apart, as far as powers of two let them.
        cdef Py_ssize_t pitch = self.n + 4
        cdef char *x
        with nogil:
            x = <char *>fftw_malloc(<size_t>rows * pitch * sizeof(fftw_complex))
            if x != NULL:
                memset(x, 0, rows * pitch * sizeof(fftw_complex))
                for i in range(2 * times * rows):
                    if i // rows % 2 == 0:
                        self.run_forward(x + i % rows * pitch * sizeof(fftw_complex))
                    else:
                        self.run_inverse(x + i % rows * pitch * sizeof(fftw_complex))
                fftw_free(x)
        if x == NULL:
            raise MemoryError(f"no memory for {rows} rows of {self.n} numbers")

    cdef object _execute(self, str name, given, bint inverse):
        """The transform of a copy."""
        source = np.ascontiguousarray(given)
        if source.dtype != np.complex128:
            raise TypeError(f"{name} must be complex128, got {source.dtype}")
        if source.shape != (self.n,):
            raise ValueError(f"{name} must have shape {(self.n,)}, got {source.shape}")
        target = np.empty(self.n, complex)
        cdef const double complex[::1] read = source
        cdef double complex[::1] write = target
        cdef void *x
        with nogil:
            x = self.new_row()
            if x != NULL:
                memcpy(x, &read[0], self.n * sizeof(fftw_complex))
                if inverse:
                    self.run_inverse(x)
                else:
                    self.run_forward(x)
                memcpy(&write[0], x, self.n * sizeof(fftw_complex))
            fftw_free(x)
        if x == NULL:
            raise MemoryError(f"no memory for a transform of length {self.n}")
        return target


cdef unsigned _flags(flags) except? 0:
    if flags not in ("estimate", "measure"):
        raise ValueError(f"flags must be 'estimate' or 'measure', got {flags!r}")
    return (FFTW_MEASURE if flags == "measure" else FFTW_ESTIMATE) | FFTW_DESTROY_INPUT


def _size(name, value):
    """The value as an integer from 1 to what FFTW's int holds."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 1 <= value <= INT_MAX:
        raise ValueError(f"{name} must be from 1 to {INT_MAX}, got {value}")
    return value


cdef void _plan(RealFFT fft, void *rows, void *spectra, unsigned how) noexcept nogil:
    """Both plans, or NULL in their place; the planner's lock is held."""
    cdef int n = <int>fft.n, howmany = <int>fft.howmany, n_freq = <int>fft.n_freq
    if fft.single:
        fft.forward_plan = fftwf_plan_many_dft_r2c(1, &n, howmany, <float *>rows, NULL, 1, n,
                                                   <fftwf_complex *>spectra, NULL, 1, n_freq, how)
        fft.inverse_plan = fftwf_plan_many_dft_c2r(1, &n, howmany, <fftwf_complex *>spectra, NULL, 1, n_freq,
                                                   <float *>rows, NULL, 1, n, how)
    else:
        fft.forward_plan = fftw_plan_many_dft_r2c(1, &n, howmany, <double *>rows, NULL, 1, n,
                                                  <fftw_complex *>spectra, NULL, 1, n_freq, how)
        fft.inverse_plan = fftw_plan_many_dft_c2r(1, &n, howmany, <fftw_complex *>spectra, NULL, 1, n_freq,
                                                  <double *>rows, NULL, 1, n, how)


cdef object _transform(RealFFT fft, str name, given, bint inverse):
    """One execution on workspaces of its own, from a checked copy of the input into a new array."""
    kinds = [(fft.dtype, fft.n), (np.result_type(fft.dtype, np.complex64), fft.n_freq)]
    (dtype, length), (target_dtype, target_length) = kinds[::-1] if inverse else kinds
    source = np.asarray(given)
    if source.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {source.dtype}")
    one_row = source.ndim == 1 and fft.howmany == 1
    if source.shape != (fft.howmany, length) and not (one_row and len(source) == length):
        raise ValueError(f"{name} must have shape {(fft.howmany, length)}, got {source.shape}")
    source = np.ascontiguousarray(source)
    target = np.empty(target_length if one_row else (fft.howmany, target_length), target_dtype)

    cdef const unsigned char[::1] read = source.reshape(-1).view(np.uint8)
    cdef unsigned char[::1] write = target.reshape(-1).view(np.uint8)
    cdef void *rows
    cdef void *spectra
    cdef bint allocated
    with nogil:
        rows = fft.new_rows()
        spectra = fft.new_spectra()
        allocated = rows != NULL and spectra != NULL
        if allocated and inverse:
            memcpy(spectra, &read[0], read.shape[0])
            fft.run_inverse(spectra, rows)
            memcpy(&write[0], rows, write.shape[0])
        elif allocated:
            memcpy(rows, &read[0], read.shape[0])
            fft.run_forward(rows, spectra)
            memcpy(&write[0], spectra, write.shape[0])
        fft.release(rows)
        fft.release(spectra)
    if not allocated:
        raise MemoryError(f"no memory for {fft.howmany} transforms of length {fft.n}")
    return target
