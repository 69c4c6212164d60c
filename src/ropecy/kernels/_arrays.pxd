"""What every shim needs of arrays and of splitting work."""

cimport numpy as cnp


cdef inline ptrdiff_t pieces(ptrdiff_t whole, ptrdiff_t part) noexcept nogil:
    """How many parts cover the whole; the last may be short."""
    return (whole + part - 1) // part


cdef inline void *pointer(array):
    """Where the data of an array is; NULL for None."""
    return NULL if array is None else cnp.PyArray_DATA(array)
