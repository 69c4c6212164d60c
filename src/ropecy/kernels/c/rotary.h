/* Rotate rows: y_i = R_{p_i} x_i, the cosines and sines taken from two tables.
 *
 * A position p = 512 a + b, not negative, has the angle 512 a theta + b theta, so its cosine and sine are one complex
 * product of entry a of `coarse` and entry b of `fine`: no libm call per angle. An entry holds `pairs` cosines and then
 * `pairs` sines.
 */
#ifndef RC_ROTARY_H
#define RC_ROTARY_H
#include <stddef.h>
#include <stdint.h>
#include "isa.h"

#define RC_ROTARY_SHIFT 9
#define RC_ROTARY_FINE (1 << RC_ROTARY_SHIFT)

/* What all rows of a call share. Strides count elements. */
typedef struct {
    ptrdiff_t d;             /* width of a row */
    ptrdiff_t pairs;         /* planes that rotate; coordinates past 2 * pairs are copied */
    ptrdiff_t row_stride;    /* of x; y is contiguous */
    ptrdiff_t column_stride; /* of x */
    ptrdiff_t position_stride;
    int interleaved;      /* planes (2b, 2b + 1), else (b, b + pairs) */
    const double *coarse; /* entry a: exp(i 512 a theta), already times the attention factor */
    const double *fine;   /* entry b: exp(i b theta) */
} rc_rotary;

/* y may be x where both have the same layout. */
typedef struct {
    void (*rows_f32)(const rc_rotary *r, ptrdiff_t n, const float *x, const int64_t *positions, float *y);
    void (*rows_f64)(const rc_rotary *r, ptrdiff_t n, const double *x, const int64_t *positions, double *y);
} rc_rotary_kernels;

extern const rc_rotary_kernels rc_rotary_baseline;
#if RC_X86
extern const rc_rotary_kernels rc_rotary_v3, rc_rotary_v4;
#endif

static inline const rc_rotary_kernels *rc_rotary_select(int level) {
    (void)level;
    return RC_SELECT(rc_rotary, level);
}
#endif
