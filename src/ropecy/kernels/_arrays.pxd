"""What every shim needs of arrays and of splitting work."""

cimport numpy as cnp
from libc.stdint cimport uintptr_t

cdef enum:
    LINE = 64  # bytes of a cache line, and of the longest vector


cdef inline ptrdiff_t pieces(ptrdiff_t whole, ptrdiff_t part) noexcept nogil:
    """How many parts cover the whole; the last may be short."""
    return (whole + part - 1) // part


cdef inline ptrdiff_t lines(ptrdiff_t size) noexcept nogil:
    """So many bytes, up to the end of a cache line."""
    return pieces(size, LINE) * LINE


cdef inline void *pointer(array):
    """Where the data of an array is; NULL for None."""
    return NULL if array is None else cnp.PyArray_DATA(array)


cdef inline char *line(array):
    """Where the first cache line of an array begins, which has LINE bytes more than are needed: NumPy's begin within
    one, and every vector would lie across two.
    """
    return <char *>((<uintptr_t>cnp.PyArray_DATA(array) + LINE - 1) // LINE * LINE)
