/* What the kernels of every variant share: which of them this processor can run, and threads to run them.

   A kernel is `void name_variant(const void *fields, int64_t begin, int64_t end)`: it does the items begin..end-1, and
   what it does for one item depends on nothing but that item, so results do not depend on the number of threads.
   `fields` is a struct of pointers, int64_t and double, 8 bytes each, which Python packs (moestro/ops/native). */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define EXPORT __attribute__((visibility("default")))
#define MOST_THREADS 256

typedef void kernel(const void *fields, int64_t begin, int64_t end);

struct work {
    kernel *run;
    const void *fields;
    const int64_t *bounds;
    int64_t parts, next;
};

/* Parts are taken in turn by whoever is free. */
static void take_parts(void *argument) {
    struct work *work = argument;
    for (;;) {
        int64_t part = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (part >= work->parts)
            return;
        work->run(work->fields, work->bounds[part], work->bounds[part + 1]);
    }
}

static void *thread_body(void *argument) {
    take_parts(argument);
    return NULL;
}

static void run_on_own_threads(struct work *work, int64_t threads) {
    pthread_t others[MOST_THREADS];
    int64_t started = 0;
    while (started < threads - 1 && started < MOST_THREADS &&
           pthread_create(&others[started], NULL, thread_body, work) == 0)
        started++;
    take_parts(work);
    for (int64_t i = 0; i < started; i++)
        pthread_join(others[i], NULL);
}

/* Run a kernel on bounds[0]..bounds[1], bounds[1]..bounds[2], ...: on the threads of the OpenMP runtime that torch has
   loaded, where its symbols can be seen, because threads of our own would compete with its spinning ones. */
EXPORT void moestro_run(kernel *run, const void *fields, const int64_t *bounds, int64_t parts, int64_t threads) {
    struct work work = {run, fields, bounds, parts, 0};
    threads = threads < parts ? threads : parts;
    if (threads <= 1) {
        take_parts(&work);
        return;
    }
    typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
    parallel *openmp = (parallel *)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (openmp)
        openmp(take_parts, &work, (unsigned)threads, 0);
    else
        run_on_own_threads(&work, threads);
}

/* Names of the variants in this library, from slowest to fastest. */
EXPORT const char *moestro_variants(void) { return VARIANTS; }

EXPORT const char *moestro_fingerprint(void) { return FINGERPRINT; }

#ifdef __x86_64__
/* Whether there are products of bfloat16: compilers that build the rest may not know how to ask. */
static int multiplies_bfloat16(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

/* Whether there are tiles of bfloat16, and the system lets this process use them: it has to be asked. */
static int tiles_allowed(void) {
#ifdef __linux__
    const long ask = 0x1023, data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
        return 0;
    return syscall(SYS_arch_prctl, ask, data) == 0;
#else
    return 0;
#endif
}
#endif

EXPORT int moestro_supports(const char *variant) {
    int found = !strcmp(variant, "baseline");
#ifdef __x86_64__
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    found |= !strcmp(variant, "avx2") && avx2;
    found |= !strcmp(variant, "avx512") && avx512;
    found |= !strcmp(variant, "avx512bf16") && avx512 && multiplies_bfloat16();
    found |= !strcmp(variant, "amx") && avx512 && multiplies_bfloat16() && tiles_allowed();
#endif
    return found;
}
