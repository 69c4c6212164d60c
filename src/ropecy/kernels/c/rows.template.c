#include "simd.h"
#include "product.template.h"
#include "transpose.template.h"

#define ROWS_SUMMED 32
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

/* Lanes in another order: each gets its neighbour's, whose number differs in one bit. */
#define RC_FLIPPED(i, bit) (((i) ^ (bit)) % LANES)
#define RC_FLIP(x, bit) RC_SHUFFLE(x, x, RC_EACH(RC_FLIPPED, bit))

/* max ||x_i - shift||^2 of rows of which a vector holds a whole number, as far as they fill vectors. A NaN stays. */
static double RC_NAME(norm2_of_short)(const REAL *x, ptrdiff_t vectors, ptrdiff_t d, const REAL *shift) {
    REAL middle[LANES];
    for (int lane = 0; lane < LANES; lane++)
        middle[lane] = shift ? shift[lane % d] : 0;
    const vreal centre = LOAD(middle);
    vreal most = {0};
    for (ptrdiff_t i = 0; i < vectors; i++) {
        vreal y = LOAD(x + i * LANES) - centre;
        y *= y;
        if (d > 1)
            y += RC_FLIP(y, 1);
        if (d > 2)
            y += RC_FLIP(y, 2);
        if (d > 4)
            y += RC_FLIP(y, 4);
        if (d > 8)
            y += RC_FLIP(y, 8);
        const vint more = (vint)(y > most) | (vint)(y != y);
        most = (vreal)(((vint)y & more) | ((vint)most & ~more));
    }
    double largest = 0;
    for (int lane = 0; lane < LANES; lane++)
        if (most[lane] > largest || most[lane] != most[lane])
            largest = most[lane];
    return largest;
}

static double RC_NAME(norm)(const void *rows, ptrdiff_t n, ptrdiff_t d, const unsigned char *keep, const void *centre) {
    const REAL *x = rows;
    double largest = 0;
    if (!keep && d <= LANES && LANES % d == 0) {
        const ptrdiff_t vectors = n * d / LANES, done = vectors * (LANES / d);
        largest = RC_NAME(norm2_of_short)(x, vectors, d, centre);
        if (largest < 1e-30) /* as above */
            largest = 0;
        else
            x += done * d, n -= done;
    }
    for (ptrdiff_t i = 0; i < n; i++, x += d) {
        if (keep && !keep[i])
            continue;
        const double size = RC_NAME(norm2)(x, d, centre);
        if (size > largest || size != size) /* nothing is above NaN, so that it stays */
            largest = size;
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

/* sum, low and high of V vectors of columns, whose rows are `pitch` apart. Sums are REAL over a few rows, then float64. */
RC_INLINE void RC_NAME(vector_columns)(const int V, const REAL *x, ptrdiff_t n, ptrdiff_t pitch, const unsigned char *keep,
                                       double *sum, REAL *low, REAL *high) {
    vreal least[4], most[4];
    RC_UNROLL for (int v = 0; v < V; v++) {
        least[v] = SPLAT((REAL)__builtin_inf());
        most[v] = -least[v];
    }
    for (int l = 0; l < V * LANES; l++)
        sum[l] = 0;
    for (ptrdiff_t start = 0; start < n; start += ROWS_SUMMED) {
        const ptrdiff_t end = rc_min(n, start + ROWS_SUMMED);
        vreal part[4];
        RC_UNROLL for (int v = 0; v < V; v++) part[v] = (vreal){0};
        for (ptrdiff_t i = start; i < end; i++) {
            if (keep && !keep[i])
                continue;
            RC_UNROLL for (int v = 0; v < V; v++) {
                const vreal y = LOAD(x + i * pitch + v * LANES);
                const vint lower = y < least[v], higher = y > most[v];
                part[v] += y;
                least[v] = (vreal)(((vint)y & lower) | ((vint)least[v] & ~lower));
                most[v] = (vreal)(((vint)y & higher) | ((vint)most[v] & ~higher));
            }
        }
        for (int v = 0; v < V; v++)
            for (int l = 0; l < LANES; l++)
                sum[v * LANES + l] += part[v][l];
    }
    RC_UNROLL for (int v = 0; v < V; v++) {
        STORE(low + v * LANES, least[v]);
        STORE(high + v * LANES, most[v]);
    }
}

static void RC_NAME(columns)(const void *rows, ptrdiff_t n, ptrdiff_t d, const unsigned char *keep, double *sum, void *least,
                             void *most) {
    const REAL *x = rows;
    REAL *low = least, *high = most;
    ptrdiff_t first = 0, whole = d / LANES * LANES; /* the first row and the first column that are done one by one */
    ptrdiff_t column = 0;
    for (; column + 4 * LANES <= whole; column += 4 * LANES)
        RC_NAME(vector_columns)(4, x + column, n, d, keep, sum + column, low + column, high + column);
    for (; column < whole; column += LANES)
        RC_NAME(vector_columns)(1, x + column, n, d, keep, sum + column, low + column, high + column);
    for (ptrdiff_t a = whole; a < d; a++) {
        sum[a] = 0;
        low[a] = (REAL)__builtin_inf();
        high[a] = -(REAL)__builtin_inf();
    }
    if (!keep && d < LANES && LANES % d == 0 && n * d >= LANES) { /* some rows to a vector */
        double sums[LANES];
        REAL lows[LANES], highs[LANES];
        first = n * d / LANES * (LANES / d);
        RC_NAME(vector_columns)(1, x, n * d / LANES, LANES, 0, sums, lows, highs);
        for (int l = 0; l < LANES; l++) {
            const ptrdiff_t a = l % d;
            sum[a] += sums[l];
            low[a] = lows[l] < low[a] ? lows[l] : low[a];
            high[a] = highs[l] > high[a] ? highs[l] : high[a];
        }
    }
    for (ptrdiff_t i = first; i < n && whole < d; i++) {
        if (keep && !keep[i])
            continue;
        for (ptrdiff_t a = whole; a < d; a++) {
            const REAL y = x[i * d + a];
            sum[a] += y;
            low[a] = y < low[a] ? y : low[a];
            high[a] = y > high[a] ? y : high[a];
        }
    }
}
#undef RC_FLIPPED
#undef RC_FLIP
#undef ROWS_SUMMED
#undef PARTS
