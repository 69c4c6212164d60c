#include "peak.h"

#define RC_BITS 64
#include "peak.template.c"
#undef RC_BITS
#define RC_BITS 32
#include "peak.template.c"

/* Eight sums of a vector each, so that loads and not the latency of additions are what takes time. */
static double RC_PASTE3(rc_peak_sum, _, RC_LEVEL)(ptrdiff_t n, const float *x) {
    enum { SUMS = 8 };
    vreal sums[SUMS] = {{0}};
    ptrdiff_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
        RC_UNROLL for (int s = 0; s < SUMS; s++) sums[s] += LOAD(x + i + s * LANES);
    double total = 0;
    for (int s = 0; s < SUMS; s++)
        for (int lane = 0; lane < LANES; lane++)
            total += sums[s][lane];
    for (; i < n; i++)
        total += x[i];
    return total;
}

const rc_peak_kernels RC_TABLE(rc_peak) = {
    .multiply_add_f32 = RC_PASTE3(rc_peak_multiply_add, _f32_, RC_LEVEL),
    .multiply_add_f64 = RC_PASTE3(rc_peak_multiply_add, _f64_, RC_LEVEL),
    .sum = RC_PASTE3(rc_peak_sum, _, RC_LEVEL),
};
