"""The blocks of a real Toeplitz matrix as circulants: their spectra in quarters, as `_toeplitz` and `_family` multiply
them, and back to offsets.
"""

import numpy as np

cimport numpy as cnp
from cython.parallel cimport prange, threadid
from libc.string cimport memcpy

from ._arrays cimport LINE, line, pointer
from ._fftw cimport RealFFT

cnp.import_array()


cpdef ptrdiff_t pitch_of(ptrdiff_t b) noexcept nogil:
    """Complex numbers from one spectrum of 2b to the next, lest they fall onto each other in the caches."""
    return 2 * b + 68


def spectra(RealFFT fft, offsets, int threads):
    """Which blocks are not 0, and the spectra of those, of all levels of T.

    Parameters
    ----------
    fft : RealFFT
        Of length 2b.
    offsets : (slots, levels, size) float64
        T at i - j, size a multiple of b, block by block.
    threads : int

    Returns
    -------
    nonzero : (levels, size / b - 1) bool
        In any slot.
    spectra : (slots, levels, size / b - 1, pitch) complex128
        That start a cache line.
    """
    cdef ptrdiff_t b = fft.n // 2, pitch = pitch_of(b), blocks = offsets.shape[2] // b - 1, task, of_block
    cdef ptrdiff_t levels = offsets.shape[1], tasks = offsets.shape[0] * levels * blocks, size = workspace_of(b)
    # The first entry of a window is not in the block.
    seen = offsets.any(axis=0).reshape(levels, -1, b)
    nonzero = np.ascontiguousarray(seen[:, 1:].any(axis=2) | seen[:, :-1, 1:].any(axis=2))
    shape = (offsets.shape[0], levels, blocks, pitch)
    zeros = np.zeros(2 * np.prod(shape) + LINE // 8)
    found = zeros[-zeros.ctypes.data % LINE // 8 :][: 2 * np.prod(shape)].view(complex).reshape(shape)
    workspace = np.empty(8 * threads * size + LINE, np.uint8)
    cdef const double *t = <const double *>pointer(offsets)
    cdef const unsigned char *used = <const unsigned char *>pointer(nonzero)
    cdef double *to = <double *>pointer(found)
    cdef double *work = <double *>line(workspace)
    for task in prange(tasks, nogil=True, num_threads=threads, schedule="static"):
        of_block = task % (levels * blocks)
        if used[of_block]:
            circulant(fft, t + (task // blocks * (blocks + 1) + task % blocks) * b, work + threadid() * size,
                      work + threadid() * size + 2 * b, to + 2 * pitch * task)
    return nonzero, found


def spectra_adjoint(RealFFT fft, nonzero, spectra, int threads):
    """The adjoint of `spectra` for its results: (slots, levels, size)."""
    cdef ptrdiff_t b = fft.n // 2, pitch = pitch_of(b), blocks = spectra.shape[2], row, block, i
    cdef ptrdiff_t levels = spectra.shape[1], rows = spectra.shape[0] * levels, size = workspace_of(b)
    found = np.zeros((*spectra.shape[:2], (blocks + 1) * b))
    workspace = np.empty(8 * threads * size + LINE, np.uint8)
    cdef const double *of = <const double *>pointer(spectra)
    cdef const unsigned char *used = <const unsigned char *>pointer(nonzero)
    cdef double *to = <double *>pointer(found)
    cdef double *work = <double *>line(workspace)
    cdef double *window
    cdef double *below
    for row in prange(rows, nogil=True, num_threads=threads, schedule="static"):
        window = work + threadid() * size
        for block in range(blocks):
            if not used[row % levels * blocks + block]:
                continue
            circulant_adjoint(fft, of + 2 * pitch * (row * blocks + block), window + 2 * b, window)
            below = to + (row * (blocks + 1) + block) * b
            for i in range(b):
                below[b + i] += window[i]
            for i in range(1, b):
                below[i] += window[b + i]
    return found


cdef ptrdiff_t workspace_of(ptrdiff_t b) noexcept nogil:
    """Doubles of a window and of half of a spectrum, a whole number of cache lines each."""
    return 4 * b + 8


cdef void circulant(RealFFT fft, const double *offsets, double *window, double *half, double *quarters) noexcept nogil:
    cdef ptrdiff_t b = fft.n // 2, r, j, at
    cdef double factor = 0.5 / b
    cdef double *z
    # The first column: offsets from 0 on, then those below. No pair is b apart in a block.
    memcpy(window, offsets + b, b * sizeof(double))
    memcpy(window + b, offsets, b * sizeof(double))
    window[b] = 0
    fft.run_forward(window, half)
    for r in range(4):
        z = quarters + r * b
        for j in range(b // 4):
            at = 2 * (4 * j + r)
            z[2 * j], z[2 * j + 1] = factor * half[at], factor * half[at + 1]
        for j in range(b // 4, b // 2):
            at = 2 * (2 * b - 4 * j - r)
            z[2 * j], z[2 * j + 1] = factor * half[at], -factor * half[at + 1]


cdef void circulant_adjoint(RealFFT fft, const double *quarters, double *half, double *window) noexcept nogil:
    cdef ptrdiff_t b = fft.n // 2, r, j, other, at
    cdef double factor = 0.25 / b
    cdef const double *z
    cdef const double *opposite
    for r in range(4):
        z, opposite = quarters + r * b, quarters + (4 - r) % 4 * b
        for j in range(b // 4):
            other = b // 2 - j - 1 if r else (b // 2 - j) % (b // 2)
            at = 2 * (4 * j + r)
            half[at] = factor * (z[2 * j] + opposite[2 * other])
            half[at + 1] = factor * (z[2 * j + 1] - opposite[2 * other + 1])
    half[2 * b], half[2 * b + 1] = 2 * factor * quarters[b // 2], 0
    fft.run_inverse(half, window)
