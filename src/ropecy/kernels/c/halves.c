#include "halves.h"
#define RC_BITS 32
#include "simd.h"
#include "half.h"

#define RC_CONVERSIONS(KIND)                                                                                                \
    static void RC_NAME(widen_##KIND)(const void *stored, ptrdiff_t n, float *x) {                                         \
        const rc_##KIND *y = stored;                                                                                        \
        ptrdiff_t i = 0;                                                                                                    \
        for (; i + LANES <= n; i += LANES)                                                                                  \
            STORE(x + i, rc_widen_##KIND(y + i));                                                                           \
        if (i < n) {                                                                                                        \
            rc_##KIND rest[LANES] = {{0}};                                                                                  \
            __builtin_memcpy(rest, y + i, (n - i) * sizeof *y);                                                             \
            const vreal wide = rc_widen_##KIND(rest);                                                                       \
            __builtin_memcpy(x + i, &wide, (n - i) * sizeof *x);                                                            \
        }                                                                                                                   \
    }                                                                                                                       \
    static void RC_NAME(narrow_##KIND)(const float *x, ptrdiff_t n, void *stored) {                                        \
        rc_##KIND *y = stored;                                                                                              \
        ptrdiff_t i = 0;                                                                                                    \
        for (; i + LANES <= n; i += LANES)                                                                                  \
            rc_narrow_##KIND(LOAD(x + i), y + i);                                                                           \
        if (i < n) {                                                                                                        \
            vreal wide = {0};                                                                                               \
            rc_##KIND rest[LANES];                                                                                          \
            __builtin_memcpy(&wide, x + i, (n - i) * sizeof *x);                                                            \
            rc_narrow_##KIND(wide, rest);                                                                                   \
            __builtin_memcpy(y + i, rest, (n - i) * sizeof *y);                                                             \
        }                                                                                                                   \
    }
RC_CONVERSIONS(float16)
RC_CONVERSIONS(bfloat16)

const rc_halves_kernels RC_TABLE(rc_halves) = {
    RC_NAME_F32(widen_float16),
    RC_NAME_F32(widen_bfloat16),
    RC_NAME_F32(narrow_float16),
    RC_NAME_F32(narrow_bfloat16),
};
