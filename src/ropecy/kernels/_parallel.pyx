"""Loops over tasks that several threads share (c/parallel.h), with a look at Ctrl-C a few times a second."""

cdef extern from "Python.h":
    int PyErr_CheckSignals() noexcept

cdef extern from "c/parallel.h" nogil:
    void rc_watch_forks()
    int rc_parallel_for(ptrdiff_t tasks, int threads, task_function function, void *context, int (*poll)() noexcept)
    bint rc_interrupted(const rc_worker *worker)
    ptrdiff_t rc_share()

    ctypedef void (*rc_team)(void (*function)(void *) noexcept, void *data, unsigned threads, unsigned flags) noexcept
    void rc_use_team(rc_team team)

rc_watch_forks()


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


cdef int team(int threads, double work) noexcept nogil:
    return min(threads, max(1, <int>min(work / rc_share(), 2e9)))


cdef class Team:
    """Inside of a block, the loops of the thread that is there run on threads which another library keeps.

    Parameters
    ----------
    address : int
        Of a function like OpenMP's GOMP_parallel; 0 for none, which changes nothing.
    """

    cdef rc_team function

    def __init__(self, size_t address):
        self.function = <rc_team><void *>address

    def __enter__(self):
        rc_use_team(self.function)

    def __exit__(self, *raised):
        rc_use_team(NULL)
