/* A small team of threads that compute one step together, phase by phase.

   A phase is so many units. Each thread takes the units of its own range, so that it reads on where it was, and then
   those of the others. A phase is over when its units are counted done, not when all threads arrive: one that gets no
   core holds nobody up. Between steps the threads spin for some microseconds and then sleep. */
#ifndef TEAM_H
#define TEAM_H
#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include "numbers.h"

#define MOST 256         /* threads */
#define PATIENCE 200     /* looks before a thread that waits for others offers them its core */
#define IDLE 20000       /* looks for a new step before a thread sleeps */
#define LINE 8           /* counters of a phase lie in cache lines of their own */

typedef struct Step Step;
static void work(Step *step, int thread);
static _Atomic i64 *counters_of(Step *step);

static struct {
    pthread_mutex_t busy, sleep; /* one step at a time; who sleeps */
    pthread_cond_t wake;
    int size; /* threads, the caller's included */
    atomic_int turn, open, inside, members, sleepers;
    Step *_Atomic step;
} team = {.busy = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .size = 1};

INLINE void relax(void) {
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}
INLINE void wait_a_moment(i64 looks) { /* whom we wait for may wait for this core */
    relax();
    if (looks > PATIENCE && looks % 16 == 0) sched_yield();
}

/* The next unit of a phase, or `units` if none is left. */
INLINE i64 take(Step *step, i64 phase, int thread, int members, i64 units) {
    _Atomic i64 *counters = counters_of(step) + phase * (members + 1) * LINE;
    for (int k = 0; k < members; k++) {
        int owner = (thread + k) % members;
        i64 end = units * (owner + 1) / members;
        i64 unit = units * owner / members + atomic_fetch_add_explicit(counters + owner * LINE, 1, memory_order_relaxed);
        if (unit < end) return unit;
    }
    return units;
}
INLINE void finish(Step *step, i64 phase, int members) {
    _Atomic i64 *done = counters_of(step) + (phase * (members + 1) + members) * LINE;
    atomic_fetch_add_explicit(done, 1, memory_order_release);
}
INLINE void wait_for(Step *step, i64 phase, int members, i64 units) {
    _Atomic i64 *done = counters_of(step) + (phase * (members + 1) + members) * LINE;
    for (i64 looks = 0; atomic_load_explicit(done, memory_order_acquire) < units; looks++) wait_a_moment(looks);
}

static void *member(void *argument) {
    int thread = (int)(intptr_t)argument, seen = 0;
    fesetenv(FE_DFL_ENV);
    for (;;) {
        for (i64 looks = 0; atomic_load(&team.turn) == seen; looks++) {
            relax();
            if (looks < IDLE) continue;
            pthread_mutex_lock(&team.sleep);
            atomic_fetch_add(&team.sleepers, 1);
            while (atomic_load(&team.turn) == seen) pthread_cond_wait(&team.wake, &team.sleep);
            atomic_fetch_sub(&team.sleepers, 1);
            pthread_mutex_unlock(&team.sleep);
        }
        seen = atomic_load(&team.turn);
        atomic_fetch_add(&team.inside, 1); /* before the look at `open`: who closes it waits for those inside */
        if (atomic_load(&team.open) && thread < atomic_load(&team.members)) work(atomic_load(&team.step), thread);
        atomic_fetch_sub(&team.inside, 1);
    }
    return 0;
}
static void finish_step(void) { pthread_mutex_lock(&team.busy); } /* before a fork: a child needs no half of one */
static void go_on(void) { pthread_mutex_unlock(&team.busy); }
static void forget(void) { /* in the child, which has only the thread that forked */
    pthread_mutex_init(&team.busy, 0);
    pthread_mutex_init(&team.sleep, 0);
    pthread_cond_init(&team.wake, 0);
    team.size = 1;
    atomic_store(&team.open, 0);
    atomic_store(&team.inside, 0);
    atomic_store(&team.sleepers, 0);
    atomic_store(&team.turn, 0);
}
/* Start threads up to this number; return how many there are, which is less where the system gives no more. */
static int grow(int threads) {
    static int watched;
    if (!watched) watched = !pthread_atfork(finish_step, go_on, forget);
    if (threads > MOST) threads = MOST;
    while (team.size < threads) {
        pthread_t id;
        if (pthread_create(&id, 0, member, (void *)(intptr_t)team.size)) break;
        pthread_detach(id);
        team.size++;
    }
    return team.size < threads ? team.size : threads;
}
/* Compute a step with this many threads, which `grow` has started. */
static void together(Step *step, int members) {
    atomic_store(&team.step, step);
    atomic_store(&team.members, members);
    atomic_store(&team.open, 1);
    atomic_fetch_add(&team.turn, 1);
    if (members > 1 && atomic_load(&team.sleepers)) {
        pthread_mutex_lock(&team.sleep);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.sleep);
    }
    fenv_t own; /* the caller may flush small numbers to zero, which others do not */
    fegetenv(&own);
    fesetenv(FE_DFL_ENV);
    work(step, 0);
    fesetenv(&own);
    atomic_store(&team.open, 0);
    for (i64 looks = 0; atomic_load(&team.inside); looks++) wait_a_moment(looks);
}

#endif
