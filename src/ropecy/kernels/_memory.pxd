"""Memory that calls work in and that results lie in, which later calls take."""

# An array of at least so many bytes, behind the first beginning of a cache line in it.
cdef borrowed(ptrdiff_t size)

# To be called with that array when nothing works in it any more.
cdef void returned(memory)

# An array for results. Its memory goes to later calls when nobody holds the array, or a view of it, any more.
cdef results(shape, dtype)
