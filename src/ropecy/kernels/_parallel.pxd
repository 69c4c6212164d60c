"""Loops over tasks that several threads share (c/parallel.h), with a look at Ctrl-C a few times a second."""

cdef extern from "c/parallel.h" nogil:
    ctypedef struct rc_worker:
        int slot

    ctypedef void (*task_function "rc_task")(void *context, ptrdiff_t task, const rc_worker *worker) noexcept nogil


# function(context, i, worker) for 0 <= i < tasks, without the GIL, by at most so many threads. Raises what a signal's
# handler raises, KeyboardInterrupt for one, when every task that had begun has ended.
cdef int parallel_for(ptrdiff_t tasks, int threads, task_function function, void *context) except -1

# Whether the loop is to stop: for tasks that take longer than a fraction of a second.
cdef bint interrupted(const rc_worker *worker) noexcept nogil


# So many threads, or fewer, each of which has enough of these multiply-adds to do, or of these bytes to read.
cdef int team(int threads, double work) noexcept nogil
