#include "simd.h"
#include "product.template.h"

#define PARTS 4 /* independent sums, so that a row does not wait for its own additions */

static double RC_NAME(largest)(const void *numbers, ptrdiff_t n) {
    /* Without its sign a number grows with its bits, past all finite ones those of inf and NaN: compared as integers,
     * for no NaN is above or below anything. */
    const REAL *x = numbers;
    const vint sign = (vint)SPLAT((REAL)-0.0);
    vint most = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vint size = (vint)LOAD(x + i) & ~sign, more = size > most;
        most = (size & more) | (most & ~more);
    }
    vreal rest = {0};
    for (int lane = 0; i < n; i++, lane++)
        rest[lane] = x[i];
    const vint size = (vint)rest & ~sign, more = size > most;
    most = (size & more) | (most & ~more);
    int top = 0;
    for (int lane = 1; lane < LANES; lane++)
        top = most[lane] > most[top] ? lane : top;
    return ((vreal)most)[top];
}

/* ||x - shift||^2. Squares that float32 cannot hold are summed in float64: a short query may meet a long key. */
RC_INLINE double RC_NAME(norm2)(const REAL *x, ptrdiff_t d, const REAL *shift) {
    REAL sum[PARTS] = {0};
    ptrdiff_t a = 0;
    if (d >= LANES) {
        vreal sums = {0};
        for (; a + LANES <= d; a += LANES) {
            vreal y = LOAD(x + a);
            if (shift)
                y -= LOAD(shift + a);
            sums += y * y;
        }
        RC_UNROLL for (int lane = 0; lane < LANES; lane++) sum[lane % PARTS] += sums[lane];
    }
    for (; a + PARTS <= d; a += PARTS)
        for (int part = 0; part < PARTS; part++) {
            const REAL y = shift ? x[a + part] - shift[a + part] : x[a + part];
            sum[part] += y * y;
        }
    for (; a < d; a++) {
        const REAL y = shift ? x[a] - shift[a] : x[a];
        sum[0] += y * y;
    }
    double whole = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (whole < 1e-30) {
        whole = 0;
        for (a = 0; a < d; a++) {
            const double y = shift ? x[a] - shift[a] : x[a];
            whole += y * y;
        }
    }
    return whole;
}

static double RC_NAME(norm)(const void *rows, ptrdiff_t n, ptrdiff_t d, const unsigned char *keep, const void *centre) {
    const REAL *x = rows;
    double largest = 0;
    for (ptrdiff_t i = 0; i < n; i++, x += d) {
        if (keep && !keep[i])
            continue;
        const double size = RC_NAME(norm2)(x, d, centre);
        largest = size > largest ? size : largest;
    }
    return largest;
}

static void RC_NAME(norms)(const void *rows, ptrdiff_t n, ptrdiff_t d, double factor, double *norms) {
    for (ptrdiff_t i = 0; i < n; i++)
        norms[i] = factor * __builtin_sqrt(RC_NAME(norm2)((const REAL *)rows + i * d, d, 0));
}

static size_t RC_NAME(quadratic_workspace)(ptrdiff_t d) { return (size_t)((d + ROWS) * TILE) * sizeof(REAL); }

/* Lanes are rows of x: y = U^T x, a block of columns at a time, each up to its last row. */
static void RC_NAME(quadratic)(const void *rows, ptrdiff_t n, ptrdiff_t d, const void *upper, double *forms, void *work) {
    const int blocks = rc_blocks((int)d, ROWS);
    REAL *xt = work, *y = xt + d * TILE;
    for (ptrdiff_t i = 0; i < n; i += TILE) {
        const ptrdiff_t count = rc_min(TILE, n - i);
        REAL sum[TILE] = {0};
        RC_NAME(tile_load)((const REAL *)rows + i * d, d, count, d, 1, 0, xt, TILE);
        for (int b = 0; b < blocks; b++) {
            const int a0 = rc_block_start((int)d, blocks, b), a1 = rc_block_start((int)d, blocks, b + 1);
            RC_NAME(product)[a1 - a0][VECTORS](a1, xt, TILE, (const REAL *)upper + a0, d, y, TILE, RC_STORE, 0);
            for (ptrdiff_t a = a0; a < a1; a++)
                for (int t = 0; t < TILE; t++)
                    sum[t] += xt[a * TILE + t] * y[(a - a0) * TILE + t];
        }
        for (ptrdiff_t t = 0; t < count; t++)
            forms[i + t] = sum[t];
    }
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
