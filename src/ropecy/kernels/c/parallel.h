/* Loops over tasks that several threads share: the calling thread, and helpers that sleep between loops.
 *
 * The caller takes tasks itself and never waits for a helper that has not begun: beside busy processes, where the
 * system lets a helper run late or not at all, a loop takes no longer than on one thread. It waits for helpers in the
 * middle of a task only, so tasks are to be short. Before they sleep, helpers look for the next loop for 0.2 ms and let
 * other processes have the processor meanwhile; a caller looks for the end of tasks for 0.05 ms. Which thread does
 * which task is open, so results must not depend on it.
 *
 * A thread may have its loops run by a team of threads that another library keeps, as PyTorch does with OpenMP's: these look
 * for work long after they have done some, and would keep helpers from the processors that they hold. But such a loop has to
 * wait for each thread of the team, also for one that the system lets run late. So after a loop that had to wait, helpers run
 * all loops for a hundred times as long.
 *
 * Any number of threads may run loops at once, also from within a task. Helpers are started when first asked for; where
 * the system refuses one, the loop goes on with fewer. After a fork the child starts helpers of its own.
 */
#ifndef RC_PARALLEL_H
#define RC_PARALLEL_H
#include <stddef.h>

enum { RC_MOST_THREADS = 256 }; /* of one loop */

typedef struct rc_loop rc_loop;

/* One thread in one loop: `slot` is below the number of threads, and no other thread of the loop has it. */
typedef struct {
    int slot;
    rc_loop *loop;
} rc_worker;

typedef void (*rc_task)(void *context, ptrdiff_t task, const rc_worker *worker);

/* Whether to stop: called by the thread that runs the loop alone, a few times a second. */
typedef int (*rc_poll)(void);

/* To be called when this is loaded: what is there to be done at a fork is also needed where another library alone had run
 * loops before it, for the threads of its team stay with the parent. */
void rc_watch_forks(void);

/* function(context, i, worker) for 0 <= i < tasks, by at most so many threads. Returns 0 when all are done; or, once
 * `poll` has returned something else, that, when every task that had begun has ended. */
int rc_parallel_for(ptrdiff_t tasks, int threads, rc_task function, void *context, rc_poll poll);

/* function(data) on at most so many threads, one of which is the caller; returns when all have. It is OpenMP's
 * GOMP_parallel, whose flags are 0. */
typedef void (*rc_team)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

/* From now on the team runs the loops of the calling thread, where it is not late; NULL: helpers do. After a fork it is never
 * asked, for its threads have stayed with the parent. */
void rc_use_team(rc_team team);

/* Multiply-adds, or bytes read: a thread with less to do is not worth waking. They take some 50 us, or 6 where the loops of
 * the calling thread are run by a team, whose threads do not sleep. */
ptrdiff_t rc_share(void);

/* Whether the loop is to stop: for tasks that take longer than a fraction of a second. */
int rc_interrupted(const rc_worker *worker);

#endif
