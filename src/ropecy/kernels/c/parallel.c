#ifdef __linux__
#define _GNU_SOURCE /* SCHED_BATCH */
#endif
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum { MOST_HELPERS = RC_MOST_THREADS - 1 };

/* Nanoseconds. To wake a thread that sleeps costs up to a tenth of a millisecond, as much as a short loop takes. So a
 * helper looks for the next loop for a while before it sleeps, and gives its processor to whoever wants it between two
 * looks; a caller looks for the end of helpers' tasks for a shorter while, and does not give its processor away. A team is
 * late if its caller waits longer than it worked itself, and longer than it takes to wake a thread. */
static const long BETWEEN_POLLS = 50 * 1000 * 1000, HELPER_LOOKS = 200 * 1000, CALLER_LOOKS = 50 * 1000, LATE = 300 * 1000;

/* On the stack of the thread that runs it. */
struct rc_loop {
    rc_task function;
    void *context;
    rc_poll poll;
    ptrdiff_t tasks;
    atomic_ptrdiff_t next; /* the first task that nobody has taken */
    atomic_int status;     /* what `poll` returned */
    atomic_int running;    /* helpers in the loop; falls under the lock */
    pthread_t caller;
    atomic_int members;    /* of a team that have come, beside the caller */
    long long begun, left; /* when the caller of a team began, and when it found no more tasks */
    struct timespec polled;
    /* under the lock: */
    int joined, most; /* helpers that have ever come, and that may */
    rc_loop *after;
    pthread_cond_t finished; /* running is 0 */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* under the lock: */
static pthread_cond_t work = PTHREAD_COND_INITIALIZER; /* there is a loop to join */
static rc_loop *loops;                                 /* those that helpers may join, the oldest first */
static int helpers, idle;
/* Rises under the lock with every loop, and is read without it. */
static atomic_uint announced;

static _Thread_local rc_team team;
static int forked; /* whether this process is the child of one that has loaded this */
/* No team is asked before, in nanoseconds since the system began. */
static atomic_llong resting_until;

static long long nanoseconds_since(const struct timespec *then) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - then->tv_sec) * 1000000000LL + now.tv_nsec - then->tv_nsec;
}

static long long now(void) {
    static const struct timespec epoch;
    return nanoseconds_since(&epoch);
}

static void run_tasks(const rc_worker *worker) {
    rc_loop *loop = worker->loop;
    ptrdiff_t task;
    while ((task = atomic_fetch_add(&loop->next, 1)) < loop->tasks) {
        loop->function(loop->context, task, worker);
        if (worker->slot == 0 && rc_interrupted(worker)) break;
    }
}

int rc_interrupted(const rc_worker *worker) {
    rc_loop *loop = worker->loop;
    int status = atomic_load_explicit(&loop->status, memory_order_relaxed);
    if (worker->slot || status) return status;
    if (nanoseconds_since(&loop->polled) < BETWEEN_POLLS) return 0;
    clock_gettime(CLOCK_MONOTONIC, &loop->polled);
    status = loop->poll();
    if (status) {
        atomic_store(&loop->status, status);
        atomic_store(&loop->next, loop->tasks);
    }
    return status;
}

/* The oldest loop that has room for a helper and a task for it. */
static rc_loop *open_loop(void) {
    for (rc_loop *loop = loops; loop; loop = loop->after)
        if (loop->joined < loop->most && atomic_load(&loop->next) < loop->tasks) return loop;
    return NULL;
}

/* Under the lock, which is given up meanwhile: returns when a loop may have come. */
static void await_loop(void) {
    const unsigned seen = atomic_load(&announced);
    struct timespec begun;
    idle++;
    pthread_mutex_unlock(&lock);
    clock_gettime(CLOCK_MONOTONIC, &begun);
    while (atomic_load(&announced) == seen && nanoseconds_since(&begun) < HELPER_LOOKS) sched_yield();
    pthread_mutex_lock(&lock);
    if (atomic_load(&announced) == seen) pthread_cond_wait(&work, &lock);
    idle--;
}

static void *help(void *nothing) {
#ifdef __linux__
    /* A helper that wakes does not push others from their processor, the caller least of all. */
    sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0});
#endif
    pthread_mutex_lock(&lock);
    for (;;) {
        rc_loop *loop = open_loop();
        if (!loop) {
            await_loop();
            continue;
        }
        const rc_worker worker = {++loop->joined, loop};
        atomic_fetch_add(&loop->running, 1);
        pthread_mutex_unlock(&lock);
        run_tasks(&worker);
        pthread_mutex_lock(&lock);
        /* The last use of the loop, whose caller takes the lock before it leaves. */
        if (atomic_fetch_sub(&loop->running, 1) == 1) pthread_cond_signal(&loop->finished);
    }
    return nothing;
}

/* Under the lock. Helpers leave all signals to the threads that were there before. */
static void start_helpers(int count) {
    sigset_t all, before;
    pthread_attr_t detached;
    if (pthread_attr_init(&detached)) return;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; count > 0 && helpers < MOST_HELPERS; count--) {
        if (pthread_create(&thread, &detached, help, NULL)) break;
        helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
}

static void before_fork(void) { pthread_mutex_lock(&lock); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&lock); }

/* Helpers and the callers of loops have stayed with the parent. */
static void after_fork_in_child(void) {
    loops = NULL;
    helpers = idle = 0;
    work = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    forked = 1;
    pthread_mutex_unlock(&lock);
}

static void at_fork(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

void rc_watch_forks(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, at_fork);
}

/* Asks helpers to join. */
static void announce(rc_loop *loop) {
    pthread_cond_init(&loop->finished, NULL);
    pthread_mutex_lock(&lock);
    rc_loop **last = &loops;
    while (*last) last = &(*last)->after;
    *last = loop;
    atomic_fetch_add(&announced, 1);
    if (idle < loop->most) start_helpers(loop->most - idle);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < loop->most; i++) pthread_cond_signal(&work);
}

/* Lets no more helpers join, and waits for those inside. */
static void dismiss(rc_loop *loop) {
    const rc_worker caller = {0, loop};
    pthread_mutex_lock(&lock);
    rc_loop **at = &loops;
    while (*at != loop) at = &(*at)->after;
    *at = loop->after;
    pthread_mutex_unlock(&lock);
    struct timespec begun;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    while (atomic_load(&loop->running) && nanoseconds_since(&begun) < CALLER_LOOKS) continue;
    pthread_mutex_lock(&lock);
    while (atomic_load(&loop->running)) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += BETWEEN_POLLS;
        if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
        if (pthread_cond_timedwait(&loop->finished, &lock, &until) == 0) continue;
        /* `poll` may wait for other threads, which may want the lock. */
        pthread_mutex_unlock(&lock);
        rc_interrupted(&caller);
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&loop->finished);
}

void rc_use_team(rc_team other) { team = other; }

static void join(void *data) {
    rc_loop *loop = data;
    const int caller = pthread_equal(pthread_self(), loop->caller);
    const rc_worker worker = {caller ? 0 : atomic_fetch_add(&loop->members, 1) + 1, loop};
    run_tasks(&worker);
    if (caller) loop->left = now();
}

/* Whether there is a team to ask now. */
static int team_is_ready(void) { return team && !forked && now() >= atomic_load(&resting_until); }

ptrdiff_t rc_share(void) { return team_is_ready() ? 1 << 17 : 1 << 20; }

static void run_by_team(rc_loop *loop) {
    loop->caller = pthread_self();
    loop->begun = now();
    team(join, loop, (unsigned)loop->most + 1, 0);
    const long long waited = now() - loop->left;
    if (waited > LATE && waited > loop->left - loop->begun) atomic_store(&resting_until, now() + 100 * waited);
}

int rc_parallel_for(ptrdiff_t tasks, int threads, rc_task function, void *context, rc_poll poll) {
    rc_loop loop = {.function = function, .context = context, .poll = poll, .tasks = tasks};
    const rc_worker caller = {0, &loop};
    if (threads > RC_MOST_THREADS) threads = RC_MOST_THREADS;
    loop.most = (int)(tasks < threads ? tasks : threads) - 1;
    clock_gettime(CLOCK_MONOTONIC, &loop.polled);
    if (loop.most > 0 && team_is_ready()) {
        run_by_team(&loop);
    } else {
        if (loop.most > 0) announce(&loop);
        run_tasks(&caller);
        if (loop.most > 0) dismiss(&loop);
    }
    return atomic_load(&loop.status);
}
