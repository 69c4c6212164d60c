"""Loops over tasks that several threads share (c/parallel.h), with a look at Ctrl-C a few times a second."""

cdef extern from "Python.h":
    int PyErr_CheckSignals() noexcept

cdef extern from "c/parallel.h" nogil:
    int rc_parallel_for(ptrdiff_t tasks, int threads, task_function function, void *context, int (*poll)() noexcept)
    bint rc_interrupted(const rc_worker *worker)


cdef int signals() noexcept with gil:
    # What a handler raises stays with this thread, until it has the GIL back.
    return PyErr_CheckSignals()


cdef int parallel_for(ptrdiff_t tasks, int threads, task_function function, void *context) except -1:
    cdef int status
    with nogil:
        status = rc_parallel_for(tasks, threads, function, context, signals)
    return status


cdef bint interrupted(const rc_worker *worker) noexcept nogil:
    return rc_interrupted(worker)
