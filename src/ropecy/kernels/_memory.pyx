"""Memory that calls work in and that results lie in, which later calls take.

What was given back to the system costs more, for the system clears each page before it gives it out again: it takes a
quarter of the time of a gradient of a quarter of a million tokens to write it into new memory.
"""

import numpy as np

cimport cython
cimport numpy as cnp

from ._arrays cimport LINE, line

cnp.import_array()

cdef enum:
    LEAST = 128 << 10  # bytes of results that are worth it
    MOST = 64 << 20  # bytes that are kept, and how many arrays
    MOST_ARRAYS = 16

# By identity, the latest last. There is no lock, which a fork could leave locked: an array is that thread's which has
# taken it out by `pop`.
cdef dict spare = {}


cdef borrowed(ptrdiff_t size):
    size += LINE
    for memory in reversed(list(spare.values())):
        if size <= len(memory) <= 2 * size and spare.pop(id(memory), None) is not None:
            return memory
    return np.empty(size, np.uint8)


cdef void returned(memory):
    cdef ptrdiff_t size = 0, arrays = 0
    if len(memory) > MOST:
        return
    spare[id(memory)] = memory
    for each in reversed(list(spare.values())):
        size += len(each)
        arrays += 1
        if size > MOST or arrays > MOST_ARRAYS:
            spare.pop(id(each), None)


@cython.no_gc
cdef class Loan:
    """Memory, which is returned when nothing refers to the loan any more."""

    cdef object memory

    def __dealloc__(self):
        returned(self.memory)


cdef results(shape, dtype):
    cdef cnp.npy_intp size = dtype.itemsize
    cdef Loan loan
    for length in shape:
        size *= length
    if size < LEAST:
        return np.empty(shape, dtype)
    loan = Loan.__new__(Loan)
    loan.memory = borrowed(size)
    bytes_of = cnp.PyArray_SimpleNewFromData(1, &size, cnp.NPY_UINT8, line(loan.memory))
    cnp.set_array_base(bytes_of, loan)
    return bytes_of.view(dtype).reshape(shape)
