/* A wall clock that jumps: preloaded into a process, it adds the seconds in a file (a 64-bit integer, mapped, so that it
   may change at any time) to CLOCK_REALTIME. CLOCK_MONOTONIC stays, as it does when an administrator sets the clock.

   Deadlines on the wall clock are taken back by as much before the kernel sees them. A wait that has begun already is
   not woken by a jump, which the kernel would do.

       cc -shared -fPIC -O2 -o clock.so clock.c -ldl; FEDLOOM_TEST_CLOCK=FILE LD_PRELOAD=./clock.so COMMAND
*/

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

int close(int); /* unistd.h declares syscall otherwise */

#define WALL 1000000000 /* seconds: a deadline past this is one on the wall clock, since no machine is up for so long */

static volatile int64_t *shift;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FEDLOOM_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) shift = page;
    close(file);
}

static int64_t ahead(void) { return shift ? *shift : 0; }

/* The C library's own function: of a condition variable, the version that new programs are linked with. */
static void *original(const char *name) {
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    return found ? found : dlsym(RTLD_NEXT, name);
}

static const struct timespec *back(const struct timespec *until, struct timespec *moved) {
    if (!until || until->tv_sec < WALL) return until;
    *moved = *until;
    moved->tv_sec -= ahead();
    return moved;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec exact;
    if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (where) *where = exact.tv_sec;
    return exact.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real) real = original("pthread_cond_timedwait");
    struct timespec moved;
    return real(cond, mutex, back(until, &moved));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec moved;
    return real(semaphore, back(until, &moved));
}

long syscall(long number, long a, long b, long c, long d, long e, long f) {
    static long (*real)(long, ...);
    if (!real) real = dlsym(RTLD_NEXT, "syscall");
    struct timespec moved;
    if (number == SYS_futex && (b & FUTEX_CLOCK_REALTIME)) d = (long)back((const struct timespec *)d, &moved);
    return real(number, a, b, c, d, e, f);
}
