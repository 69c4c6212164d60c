/* Numbers that are stored as float16 or bfloat16, and the float32 numbers that they are computed in: one read and one
 * write, bound by memory.
 */
#ifndef RC_HALVES_H
#define RC_HALVES_H
#include <stddef.h>
#include "isa.h"

typedef void (*rc_widen_function)(const void *stored, ptrdiff_t n, float *x);
typedef void (*rc_narrow_function)(const float *x, ptrdiff_t n, void *stored);

typedef struct {
    rc_widen_function widen_float16, widen_bfloat16;
    rc_narrow_function narrow_float16, narrow_bfloat16;
} rc_halves_kernels;

extern const rc_halves_kernels rc_halves_baseline;
#if RC_X86
extern const rc_halves_kernels rc_halves_v3, rc_halves_v4;
#endif

static inline const rc_halves_kernels *rc_halves_select(int level) {
    (void)level;
    return RC_SELECT(rc_halves, level);
}
#endif
