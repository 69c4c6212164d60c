#include "simd.h"

/* `column_stride` and `interleaved` are literals at the call sites that matter, so that the loop over pairs is vectors. Products are formed in double and cast once. ivdep holds for y == x as well: iteration b
 * reads and writes the coordinates of pair b only. */
RC_INLINE void RC_NAME(rotate)(const rc_rotary *r, ptrdiff_t column_stride, int interleaved,
                               ptrdiff_t n, const REAL *x, const int64_t *positions, REAL *y) {
    const ptrdiff_t pairs = r->pairs, first = interleaved ? 2 : 1, second = interleaved ? 1 : pairs;
    for (ptrdiff_t i = 0; i < n; i++) {
        const int64_t p = positions[i * r->position_stride];
        const double *c = r->coarse + (p >> RC_ROTARY_SHIFT) * 2 * pairs;
        const double *f = r->fine + (p & (RC_ROTARY_FINE - 1)) * 2 * pairs;
        const REAL *xi = x + i * r->row_stride;
        REAL *yi = y + i * r->d;
#pragma GCC ivdep
        for (ptrdiff_t b = 0; b < pairs; b++) {
            const double re = c[b] * f[b] - c[pairs + b] * f[pairs + b];
            const double im = c[b] * f[pairs + b] + c[pairs + b] * f[b];
            const double u = xi[first * b * column_stride], v = xi[(first * b + second) * column_stride];
            yi[first * b] = (REAL)(u * re - v * im);
            yi[first * b + second] = (REAL)(u * im + v * re);
        }
#pragma GCC ivdep
        for (ptrdiff_t k = 2 * pairs; k < r->d; k++)
            yi[k] = xi[k * column_stride];
    }
}

static void RC_NAME(rc_rotary_rows)(const rc_rotary *r, ptrdiff_t n, const REAL *x, const int64_t *positions, REAL *y) {
    if (r->column_stride != 1)
        RC_NAME(rotate)(r, r->column_stride, r->interleaved, n, x, positions, y);
    else if (r->interleaved)
        RC_NAME(rotate)(r, 1, 1, n, x, positions, y);
    else
        RC_NAME(rotate)(r, 1, 0, n, x, positions, y);
}
