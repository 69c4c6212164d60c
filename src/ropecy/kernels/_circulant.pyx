"""The blocks of a real Toeplitz matrix as circulants: their spectra, and from spectra back to numbers by offset.

Spectra are in quarters, in the order in which `_toeplitz` and `_family_pairs` multiply them.
"""

import numpy as np

cimport numpy as cnp
from libc.string cimport memcpy

from ._arrays cimport LINE, line, pointer
from ._fftw cimport RealFFT
from ._parallel cimport parallel_for, rc_worker, team

cnp.import_array()


cdef struct Blocks:
    # T at its offsets and the spectra of its blocks: of `slots` times levels, so many blocks each.
    void *fft  # a RealFFT
    ptrdiff_t b, pitch, levels, blocks
    double *offsets
    double *spectra
    const unsigned char *used
    double *work
    ptrdiff_t size  # of a thread's workspace


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
    cdef Blocks x = blocks_of(fft, offsets.shape[1], offsets.shape[2] // (fft.n // 2) - 1)
    cdef ptrdiff_t tasks = offsets.shape[0] * x.levels * x.blocks
    # The first entry of a window is not in the block.
    seen = offsets.any(axis=0).reshape(x.levels, -1, x.b)
    nonzero = np.ascontiguousarray(seen[:, 1:].any(axis=2) | seen[:, :-1, 1:].any(axis=2))
    shape = (offsets.shape[0], x.levels, x.blocks, x.pitch)
    zeros = np.zeros(2 * np.prod(shape) + LINE // 8)
    found = zeros[-zeros.ctypes.data % LINE // 8 :][: 2 * np.prod(shape)].view(complex).reshape(shape)
    threads = team(threads, 10.0 * tasks * fft.n * np.log2(fft.n))
    workspace = np.empty(8 * threads * x.size + LINE, np.uint8)
    x.offsets, x.used = <double *>pointer(offsets), <const unsigned char *>pointer(nonzero)
    x.spectra, x.work = <double *>pointer(found), <double *>line(workspace)
    parallel_for(tasks, threads, spectrum_of_block, &x)
    return nonzero, found


def spectra_adjoint(RealFFT fft, nonzero, spectra, int threads):
    """The adjoint of `spectra` for its results: (slots, levels, size)."""
    cdef Blocks x = blocks_of(fft, spectra.shape[1], spectra.shape[2])
    cdef ptrdiff_t tasks = spectra.shape[0] * x.levels
    found = np.zeros((*spectra.shape[:2], (x.blocks + 1) * x.b))
    threads = team(threads, 10.0 * tasks * x.blocks * fft.n * np.log2(fft.n))
    workspace = np.empty(8 * threads * x.size + LINE, np.uint8)
    x.offsets, x.used = <double *>pointer(found), <const unsigned char *>pointer(nonzero)
    x.spectra, x.work = <double *>pointer(spectra), <double *>line(workspace)
    parallel_for(tasks, threads, offsets_of_level, &x)
    return found


cdef Blocks blocks_of(RealFFT fft, ptrdiff_t levels, ptrdiff_t blocks):
    cdef Blocks x
    x.fft, x.b, x.levels, x.blocks = <void *>fft, fft.n // 2, levels, blocks
    x.pitch, x.size = pitch_of(x.b), workspace_of(x.b)
    return x


cdef void spectrum_of_block(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Blocks *x = <const Blocks *>context
    cdef double *window = x.work + worker.slot * x.size
    cdef const double *offsets = x.offsets + (task // x.blocks * (x.blocks + 1) + task % x.blocks) * x.b
    if x.used[task % (x.levels * x.blocks)]:
        circulant(<RealFFT>x.fft, offsets, window, window + 2 * x.b, x.spectra + 2 * x.pitch * task)


cdef void offsets_of_level(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil:
    cdef const Blocks *x = <const Blocks *>context
    cdef double *window = x.work + worker.slot * x.size
    cdef double *below
    cdef ptrdiff_t block, i
    for block in range(x.blocks):
        if not x.used[task % x.levels * x.blocks + block]:
            continue
        circulant_adjoint(<RealFFT>x.fft, x.spectra + 2 * x.pitch * (task * x.blocks + block), window + 2 * x.b, window)
        below = x.offsets + (task * (x.blocks + 1) + block) * x.b
        for i in range(x.b):
            below[x.b + i] += window[i]
        for i in range(1, x.b):
            below[i] += window[x.b + i]


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
