"""A block of b x b of a real Toeplitz matrix, as a circulant of 2b whose spectrum is in quarters."""

from ._fftw cimport RealFFT

# `offsets` are the entries i - j = -b .. b - 1, of which the first is not in the block. The spectrum is divided by 2b;
# frequencies 0 modulo 4 first, then 1, 2 and 3. Workspaces are those of the transform, of length 2b.
cdef void circulant(RealFFT fft, const double *offsets, double *window, double *half, double *quarters) noexcept nogil

# What a spectrum's real part, in time, has at i - j = 0 .. b - 1, then at -b .. -1, in `window`: the adjoint.
cdef void circulant_adjoint(RealFFT fft, const double *quarters, double *half, double *window) noexcept nogil

cpdef ptrdiff_t pitch_of(ptrdiff_t b) noexcept nogil
