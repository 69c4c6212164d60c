/* The two limits of a core that kernels are measured against: multiply-adds on registers, and reading memory. */
#ifndef RC_PEAK_H
#define RC_PEAK_H
#include <stddef.h>
#include "isa.h"

typedef struct {
    /* Runs `rounds` rounds of independent multiply-adds and returns how many operations these were, a multiply-add being
     * two. */
    double (*multiply_add_f32)(ptrdiff_t rounds);
    double (*multiply_add_f64)(ptrdiff_t rounds);
    /* The sum of n numbers, each of which is read once. */
    double (*sum)(ptrdiff_t n, const float *x);
} rc_peak_kernels;

extern const rc_peak_kernels rc_peak_baseline;
#if RC_X86
extern const rc_peak_kernels rc_peak_v3, rc_peak_v4;
#endif

static inline const rc_peak_kernels *rc_peak_select(int level) {
    (void)level;
    return RC_SELECT(rc_peak, level);
}
#endif
