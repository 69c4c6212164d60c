/* Bound by memory but for `mix`: every function streams a few columns, each once. */
#include "toeplitz.h"

#define RC_BITS 64
#include "simd.h"

#define UNROLL (RC_REGISTERS / (4 * RC_TILE)) /* vectors of each of the sums of a tile, half of the registers */

/* Lanes for the pairs of a vector: (a, b, a, b, ...). */
RC_INLINE vreal RC_NAME(pairs)(double a, double b) {
    vreal v;
    for (int l = 0; l < LANES; l++)
        v[l] = l & 1 ? b : a;
    return v;
}

/* Lane l is number at[l] of the lanes of x, then y. `at` is constant where this is inlined, so that clang, which has no
 * builtin for it, makes the same single instruction of the loop. */
RC_INLINE vreal RC_NAME(shuffled)(vreal x, vreal y, vint at) {
#ifdef __clang__
    vreal z;
    for (int l = 0; l < LANES; l++)
        z[l] = at[l] < LANES ? x[at[l]] : y[at[l] - LANES];
    return z;
#else
    return __builtin_shuffle(x, y, at);
#endif
}

/* Lane l of a pair: its real part at both places, its imaginary part at both, or the two exchanged. */
RC_INLINE vreal RC_NAME(real)(vreal x) {
    vint at;
    for (int l = 0; l < LANES; l++)
        at[l] = l & ~1;
    return RC_NAME(shuffled)(x, x, at);
}

RC_INLINE vreal RC_NAME(imaginary)(vreal x) {
    vint at;
    for (int l = 0; l < LANES; l++)
        at[l] = l | 1;
    return RC_NAME(shuffled)(x, x, at);
}

RC_INLINE vreal RC_NAME(swapped)(vreal x) {
    vint at;
    for (int l = 0; l < LANES; l++)
        at[l] = l ^ 1;
    return RC_NAME(shuffled)(x, x, at);
}

RC_INLINE vreal RC_NAME(or_one)(const double *w, ptrdiff_t at) {
    if (w)
        return LOAD(w + at);
    return SPLAT(1.0);
}

RC_INLINE vreal RC_NAME(product)(double factor, ptrdiff_t count, const double *const *x, ptrdiff_t at) {
    vreal z = SPLAT(factor);
    for (ptrdiff_t c = 0; c < count; c++)
        z *= LOAD(x[c] + at);
    return z;
}

static void RC_NAME(monomial)(ptrdiff_t size, double factor, ptrdiff_t count, const double *const *x, double *z) {
    for (ptrdiff_t i = 0; i < size; i += LANES)
        STORE(z + i, RC_NAME(product)(factor, count, x, i));
}

static void RC_NAME(derive)(ptrdiff_t size, double factor, const double *y, ptrdiff_t count, const double *const *x,
                            double *z) {
    for (ptrdiff_t i = 0; i < size; i += LANES)
        STORE(z + i, LOAD(z + i) + LOAD(y + i) * RC_NAME(product)(factor, count, x, i));
}

RC_INLINE void RC_NAME(differentiate_few)(ptrdiff_t size, double factor, const double *y, ptrdiff_t count,
                                          const double *const *x, double *const *dx) {
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        vreal before[RC_COLUMNS], after = SPLAT(1.0);
        before[0] = SPLAT(factor) * LOAD(y + i);
        for (ptrdiff_t c = 1; c < count; c++)
            before[c] = before[c - 1] * LOAD(x[c - 1] + i);
        for (ptrdiff_t c = count - 1; c >= 0; c--) {
            STORE(dx[c] + i, LOAD(dx[c] + i) + before[c] * after);
            after *= LOAD(x[c] + i);
        }
    }
}

static void RC_NAME(differentiate)(ptrdiff_t size, double factor, const double *y, ptrdiff_t count,
                                   const double *const *x, double *const *dx) {
    /* Few columns are held in registers, where it is known how many there are. */
    switch (count) {
    case 1: RC_NAME(differentiate_few)(size, factor, y, 1, x, dx); break;
    case 2: RC_NAME(differentiate_few)(size, factor, y, 2, x, dx); break;
    case 3: RC_NAME(differentiate_few)(size, factor, y, 3, x, dx); break;
    case 4: RC_NAME(differentiate_few)(size, factor, y, 4, x, dx); break;
    case 5: RC_NAME(differentiate_few)(size, factor, y, 5, x, dx); break;
    case 6: RC_NAME(differentiate_few)(size, factor, y, 6, x, dx); break;
    default: RC_NAME(differentiate_few)(size, factor, y, count, x, dx);
    }
}

/* LANES complex numbers, one after the other. */
RC_INLINE void RC_NAME(interleave)(vreal real, vreal imaginary, double *z) {
    vint low, high;
    for (int l = 0; l < LANES; l++) {
        low[l] = l / 2 + (l & 1) * LANES;
        high[l] = low[l] + LANES / 2;
    }
    STORE(z, RC_NAME(shuffled)(real, imaginary, low));
    STORE(z + LANES, RC_NAME(shuffled)(real, imaginary, high));
}

/* Their real and their imaginary parts. */
RC_INLINE void RC_NAME(separate)(const double *z, vreal *real, vreal *imaginary) {
    vint first, second;
    for (int l = 0; l < LANES; l++) {
        first[l] = 2 * l;
        second[l] = 2 * l + 1;
    }
    *real = RC_NAME(shuffled)(LOAD(z), LOAD(z + LANES), first);
    *imaginary = RC_NAME(shuffled)(LOAD(z), LOAD(z + LANES), second);
}

/* The real and the imaginary part of the power 0 to 3 of the turns at [i, i + LANES). */
RC_INLINE void RC_NAME(turns)(ptrdiff_t size, ptrdiff_t i, const double *turn, vreal c[4], vreal s[4]) {
    c[0] = SPLAT(1.0);
    s[0] = SPLAT(0.0);
    c[1] = LOAD(turn + i);
    s[1] = LOAD(turn + size / 2 + i);
    c[2] = c[1] * c[1] - s[1] * s[1];
    s[2] = c[1] * s[1] + s[1] * c[1];
    c[3] = c[2] * c[1] - s[2] * s[1];
    s[3] = c[2] * s[1] + s[2] * c[1];
}

static void RC_NAME(pack)(ptrdiff_t size, const double *w, const double *x1, const double *x2, const double *y,
                          const double *turn, double *z) {
    const ptrdiff_t half = size / 2;
    for (ptrdiff_t i = 0; i < half; i += LANES) {
        vreal c[4], s[4];
        RC_NAME(turns)(size, i, turn, c, s);
        const vreal a = RC_NAME(or_one)(w, i) * LOAD(y + i), b = RC_NAME(or_one)(w, i + half) * LOAD(y + i + half);
        const vreal real_a = LOAD(x1 + i) * a, imaginary_a = LOAD(x2 + i) * a;
        const vreal real_b = LOAD(x1 + i + half) * b, imaginary_b = LOAD(x2 + i + half) * b;
        /* a + (-i)^k b */
        const vreal real[4] = {real_a + real_b, real_a + imaginary_b, real_a - real_b, real_a - imaginary_b};
        const vreal imaginary[4] = {imaginary_a + imaginary_b, imaginary_a - real_b, imaginary_a - imaginary_b,
                                    imaginary_a + real_b};
        RC_UNROLL
        for (int k = 0; k < 4; k++)
            RC_NAME(interleave)(real[k] * c[k] - imaginary[k] * s[k], real[k] * s[k] + imaginary[k] * c[k],
                                z + k * size + 2 * i);
    }
}

/* Real and imaginary parts of u, which `quarters` make, at [i, i + LANES) and half of the size further on. */
RC_INLINE void RC_NAME(unpack)(ptrdiff_t size, ptrdiff_t i, const double *quarters, const double *turn, vreal real[2],
                               vreal imaginary[2]) {
    vreal c[4], s[4], x[4], y[4];
    RC_NAME(turns)(size, i, turn, c, s);
    RC_UNROLL
    for (int k = 0; k < 4; k++) {
        vreal of_real, of_imaginary;
        RC_NAME(separate)(quarters + k * size + 2 * i, &of_real, &of_imaginary);
        x[k] = of_real * c[k] + of_imaginary * s[k];
        y[k] = of_imaginary * c[k] - of_real * s[k];
    }
    /* sum_k i^(k half) (x + i y)_k */
    real[0] = (x[0] + x[2]) + (x[1] + x[3]);
    imaginary[0] = (y[0] + y[2]) + (y[1] + y[3]);
    real[1] = (x[0] - x[2]) - (y[1] - y[3]);
    imaginary[1] = (y[0] - y[2]) + (x[1] - x[3]);
}

static void RC_NAME(gather)(ptrdiff_t size, double factor, const double *w, const double *x1, const double *x2,
                            const double *quarters, const double *turn, double *z) {
    for (ptrdiff_t i = 0; i < size / 2; i += LANES) {
        vreal real[2], imaginary[2];
        RC_NAME(unpack)(size, i, quarters, turn, real, imaginary);
        RC_UNROLL
        for (int half = 0; half < 2; half++) {
            const ptrdiff_t at = i + half * size / 2;
            const vreal sum = LOAD(x1 + at) * real[half] + LOAD(x2 + at) * imaginary[half];
            STORE(z + at, LOAD(z + at) + SPLAT(factor) * RC_NAME(or_one)(w, at) * sum);
        }
    }
}

static void RC_NAME(scatter)(ptrdiff_t size, double factor, const double *w, const double *y, const double *quarters,
                             const double *turn, double *z1, double *z2) {
    for (ptrdiff_t i = 0; i < size / 2; i += LANES) {
        vreal real[2], imaginary[2];
        RC_NAME(unpack)(size, i, quarters, turn, real, imaginary);
        RC_UNROLL
        for (int half = 0; half < 2; half++) {
            const ptrdiff_t at = i + half * size / 2;
            const vreal a = SPLAT(factor) * RC_NAME(or_one)(w, at) * LOAD(y + at);
            STORE(z1 + at, LOAD(z1 + at) + a * real[half]);
            STORE(z2 + at, LOAD(z2 + at) + a * imaginary[half]);
        }
    }
}

/* [0, size) of the rows of a tile, whose entries are [from, to): of[0] R + of[1] M, R and M as `rc_mixing` has them,
 * real and imaginary parts of M exchanged; with `add`, added to what is there. Not inlined, since `of` would take
 * registers from the sums. */
RC_NOINLINE void RC_NAME(tile)(ptrdiff_t size, ptrdiff_t pitch, ptrdiff_t from, ptrdiff_t to, const ptrdiff_t *with,
                               const ptrdiff_t *rows, const vreal of[2], int add, const double *x,
                               const double *shared, ptrdiff_t apart, double *z) {
    for (ptrdiff_t i = 0; i < size; i += UNROLL * LANES) {
        vreal R[RC_TILE][UNROLL] = {0}, M[RC_TILE][UNROLL] = {0};
        int any[RC_TILE] = {0};
        for (ptrdiff_t j = from; j < to; j++) {
            vreal real[UNROLL], imaginary[UNROLL];
            RC_UNROLL
            for (int u = 0; u < UNROLL; u++) {
                const vreal both = LOAD(shared + pitch * with[j] + i + u * LANES);
                real[u] = RC_NAME(real)(both);
                imaginary[u] = RC_NAME(imaginary)(both);
            }
            RC_UNROLL
            for (int o = 0; o < RC_TILE; o++) {
                const ptrdiff_t row = rows[RC_TILE * j + o];
                if (row < 0)
                    continue;
                any[o] = 1;
                RC_UNROLL
                for (int u = 0; u < UNROLL; u++) {
                    const vreal a = LOAD(x + pitch * row + i + u * LANES);
                    R[o][u] += real[u] * a;
                    M[o][u] += imaginary[u] * a;
                }
            }
        }
        const vreal of_R = of[0], of_M = of[1];
        RC_UNROLL
        for (int o = 0; o < RC_TILE; o++) {
            if (!any[o])
                continue;
            RC_UNROLL
            for (int u = 0; u < UNROLL; u++) {
                double *to = z + o * apart + i + u * LANES;
                vreal sum = R[o][u] * of_R + RC_NAME(swapped)(M[o][u]) * of_M;
                if (add)
                    sum += LOAD(to);
                STORE(to, sum);
            }
        }
    }
}

static void RC_NAME(mix)(ptrdiff_t size, ptrdiff_t pitch, ptrdiff_t outputs, const ptrdiff_t *start,
                         const ptrdiff_t *with, const ptrdiff_t *rows, rc_mixing how, double factor, const double *x,
                         const double *shared, double *z, double *room) {
    const ptrdiff_t tiles = (outputs + RC_TILE - 1) / RC_TILE;
    const int product = how == RC_PRODUCT || how == RC_ADD_PRODUCT, correlate = how == RC_CORRELATE;
    const vreal of[2] = {
        RC_NAME(pairs)(factor, product || correlate ? factor : -factor),
        RC_NAME(pairs)(product ? -factor : factor, correlate ? -factor : factor),
    };
    size *= 2;
    pitch *= 2;
    /* A single tile has read all that it writes over before it does. */
    if (tiles == 1)
        room = NULL;
    for (ptrdiff_t i = 0; i < size; i += RC_CHUNK) {
        double *to = room ? room : z + i;
        const ptrdiff_t apart = room ? RC_CHUNK : pitch;
        for (ptrdiff_t t = 0; t < tiles; t++)
            RC_NAME(tile)(RC_CHUNK, pitch, start[t], start[t + 1], with, rows, of, how >= RC_CORRELATE, x + i,
                          shared + i, apart, to + RC_TILE * t * apart);
        for (ptrdiff_t o = 0; room && o < outputs; o++)
            memcpy(z + o * pitch + i, room + o * RC_CHUNK, RC_CHUNK * sizeof(double));
    }
}
#undef UNROLL

const rc_toeplitz_kernels RC_TABLE(rc_toeplitz) = {
    .monomial = RC_NAME(monomial),
    .derive = RC_NAME(derive),
    .differentiate = RC_NAME(differentiate),
    .pack = RC_NAME(pack),
    .gather = RC_NAME(gather),
    .scatter = RC_NAME(scatter),
    .mix = RC_NAME(mix),
};
