#include "simd.h"

#define PARTS 4 /* independent sums, so that a row does not wait for its own additions */

static double RC_NAME(norm)(const void *rows, ptrdiff_t n, ptrdiff_t d, const unsigned char *keep, const void *centre) {
    const REAL *x = rows, *shift = centre;
    REAL largest = 0;
    for (ptrdiff_t i = 0; i < n; i++, x += d) {
        if (keep && !keep[i])
            continue;
        REAL sum[PARTS] = {0};
        ptrdiff_t a = 0;
        for (; a + PARTS <= d; a += PARTS)
            for (int part = 0; part < PARTS; part++) {
                const REAL y = shift ? x[a + part] - shift[a + part] : x[a + part];
                sum[part] += y * y;
            }
        for (; a < d; a++) {
            const REAL y = shift ? x[a] - shift[a] : x[a];
            sum[0] += y * y;
        }
        const REAL norm2 = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        largest = norm2 > largest ? norm2 : largest;
    }
    return largest;
}

static void RC_NAME(columns)(const void *rows, ptrdiff_t n, ptrdiff_t d, const unsigned char *keep, double *sum, void *least,
                             void *most) {
    const REAL *x = rows;
    REAL *low = least, *high = most;
    for (ptrdiff_t a = 0; a < d; a++) {
        sum[a] = 0;
        low[a] = (REAL)__builtin_inf();
        high[a] = -(REAL)__builtin_inf();
    }
    for (ptrdiff_t i = 0; i < n; i++, x += d) {
        if (keep && !keep[i])
            continue;
        for (ptrdiff_t a = 0; a < d; a++) {
            sum[a] += x[a];
            low[a] = x[a] < low[a] ? x[a] : low[a];
            high[a] = x[a] > high[a] ? x[a] : high[a];
        }
    }
}
#undef PARTS
