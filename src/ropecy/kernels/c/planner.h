/* The lock of FFTW's planner, which no two threads may run at once.
 *
 * A fork waits for whoever plans: in the child that thread is gone, and what it was changing would stay half changed and
 * the lock taken. So the lock is the C library's own, and not one of Python's, which pthread_atfork cannot reach.
 */
#ifndef RC_PLANNER_H
#define RC_PLANNER_H
#include <pthread.h>

static pthread_mutex_t rc_planner = PTHREAD_MUTEX_INITIALIZER;

static void rc_planner_lock(void) { pthread_mutex_lock(&rc_planner); }

static void rc_planner_unlock(void) { pthread_mutex_unlock(&rc_planner); }

static int rc_planner_at_fork(void) { return pthread_atfork(rc_planner_lock, rc_planner_unlock, rc_planner_unlock); }

#endif
