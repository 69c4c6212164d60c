#include "simd.h"

/* Twelve chains of dependent multiply-adds hide a latency of 4 to 6 cycles at two a cycle, and fit into 16 registers
 * beside their two operands. Each chain is a variable of its own, and the empty assembly asks for it in a register after
 * each step: of an array the compiler would keep what the assembly touches in memory. */
#if defined(__aarch64__)
#define RC_PEAK_HOLD(c) __asm__ volatile("" : "+w"(chain##c));
#elif defined(__x86_64__)
#define RC_PEAK_HOLD(c) __asm__ volatile("" : "+x"(chain##c));
#else
#define RC_PEAK_HOLD(c)
#endif
#define RC_PEAK_EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define RC_PEAK_START(c) vreal chain##c = SPLAT((REAL)c);
#define RC_PEAK_STEP(c) chain##c = chain##c * factor + term;
#define RC_PEAK_KEEP(c) kept += chain##c[0];

static double RC_NAME(rc_peak_multiply_add)(ptrdiff_t rounds) {
    const vreal factor = SPLAT((REAL)0.999), term = SPLAT((REAL)1e-3);
    RC_PEAK_EACH(RC_PEAK_START)
    for (ptrdiff_t i = 0; i < rounds; i++) {
        RC_PEAK_EACH(RC_PEAK_STEP)
        RC_PEAK_EACH(RC_PEAK_HOLD)
    }
    volatile REAL kept = 0;
    RC_PEAK_EACH(RC_PEAK_KEEP)
    return 2.0 * 12 * LANES * rounds;
}

#undef RC_PEAK_HOLD
#undef RC_PEAK_EACH
#undef RC_PEAK_START
#undef RC_PEAK_STEP
#undef RC_PEAK_KEEP
