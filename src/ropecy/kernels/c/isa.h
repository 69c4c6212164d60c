/* Which instruction-set level the kernels run at: 0 baseline, 1 x86-64-v3 (AVX2, FMA), 2 x86-64-v4 (AVX-512).
 *
 * Chosen once at import by what the CPU has; the environment variable ROPECY_ISA=baseline|v3|v4 asks for
 * a level, and what the CPU lacks is refused rather than run into an illegal instruction. Baseline is SSE2 on x86-64;
 * elsewhere it is all there is, on arm64 with NEON, which every such CPU has.
 */
#ifndef RC_ISA_H
#define RC_ISA_H
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define RC_X86 1
#else
#define RC_X86 0
#endif

static inline int rc_level_of_cpu(void) {
#if RC_X86
    __builtin_cpu_init();
    int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2");
    int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    return v4 ? 2 : v3 ? 1 : 0;
#else
    return 0;
#endif
}

/* The level in use, or -1 where ROPECY_ISA names no level or one that this CPU does not have. */
static inline int rc_level(void) {
    int have = rc_level_of_cpu();
    const char *ask = getenv("ROPECY_ISA");
    if (!ask || !*ask)
        return have;
    int want = !strcmp(ask, "baseline") ? 0 : !strcmp(ask, "v3") ? 1 : !strcmp(ask, "v4") ? 2 : -1;
    return want <= have ? want : -1;
}

/* The table of a kernel family for a level: RC_SELECT(rc_exact, level). */
#if RC_X86
#define RC_SELECT(name, level) ((level) == 2 ? &name##_v4 : (level) == 1 ? &name##_v3 : &name##_baseline)
#else
#define RC_SELECT(name, level) (&name##_baseline)
#endif
#endif
