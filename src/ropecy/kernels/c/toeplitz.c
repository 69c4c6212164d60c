/* Bound by memory but for `mix`: every function streams a few columns, each once. */
#include "toeplitz.h"

#define RC_BITS 64
#include "simd.h"

#define UNROLL (RC_REGISTERS / 8) /* vectors of each of four sums, half of the registers */

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

/* x turn for sign = 1, x conj(turn) for sign = -1. */
RC_INLINE vreal RC_NAME(turned)(vreal x, vreal turn, double sign) {
    return x * RC_NAME(real)(turn) + RC_NAME(swapped)(x) * (RC_NAME(imaginary)(turn) * RC_NAME(pairs)(-sign, sign));
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

static void RC_NAME(pack)(ptrdiff_t size, const double *w, const double *x1, const double *x2, const double *y,
                          const double *turn, double *even, double *odd) {
    vint low, high;
    for (int l = 0; l < LANES; l++) {
        low[l] = l / 2 + (l & 1) * LANES;
        high[l] = low[l] + LANES / 2;
    }
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        const vreal a = RC_NAME(or_one)(w, i) * LOAD(y + i);
        const vreal real = LOAD(x1 + i) * a, imaginary = LOAD(x2 + i) * a;
        const vreal z[2] = {RC_NAME(shuffled)(real, imaginary, low), RC_NAME(shuffled)(real, imaginary, high)};
        for (int half = 0; half < 2; half++) {
            const ptrdiff_t at = 2 * i + half * LANES;
            STORE(even + at, z[half]);
            STORE(odd + at, RC_NAME(turned)(z[half], LOAD(turn + at), 1));
        }
    }
}

/* Real and imaginary parts of u at [i, i + LANES). */
RC_INLINE void RC_NAME(unpack)(ptrdiff_t i, const double *even, const double *odd, const double *turn, vreal *real,
                               vreal *imaginary) {
    vint first, second;
    for (int l = 0; l < LANES; l++) {
        first[l] = 2 * l;
        second[l] = 2 * l + 1;
    }
    vreal u[2];
    for (int half = 0; half < 2; half++) {
        const ptrdiff_t at = 2 * i + half * LANES;
        u[half] = LOAD(even + at) + RC_NAME(turned)(LOAD(odd + at), LOAD(turn + at), -1);
    }
    *real = RC_NAME(shuffled)(u[0], u[1], first);
    *imaginary = RC_NAME(shuffled)(u[0], u[1], second);
}

static void RC_NAME(gather)(ptrdiff_t size, double factor, const double *w, const double *x1, const double *x2,
                            const double *even, const double *odd, const double *turn, double *z) {
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        vreal real, imaginary;
        RC_NAME(unpack)(i, even, odd, turn, &real, &imaginary);
        const vreal sum = LOAD(x1 + i) * real + LOAD(x2 + i) * imaginary;
        STORE(z + i, LOAD(z + i) + SPLAT(factor) * RC_NAME(or_one)(w, i) * sum);
    }
}

static void RC_NAME(scatter)(ptrdiff_t size, double factor, const double *w, const double *y, const double *even,
                             const double *odd, const double *turn, double *z1, double *z2) {
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        vreal real, imaginary;
        RC_NAME(unpack)(i, even, odd, turn, &real, &imaginary);
        const vreal a = SPLAT(factor) * RC_NAME(or_one)(w, i) * LOAD(y + i);
        STORE(z1 + i, LOAD(z1 + i) + a * real);
        STORE(z2 + i, LOAD(z2 + i) + a * imaginary);
    }
}

/* R and M += the products of the rows [from, to) of one output, at [0, UNROLL * LANES). */
RC_INLINE void RC_NAME(alone)(ptrdiff_t pitch, ptrdiff_t from, ptrdiff_t to, const ptrdiff_t *first, const ptrdiff_t *with,
                              const double *x, const double *shared, vreal R[UNROLL], vreal M[UNROLL]) {
    for (ptrdiff_t j = from; j < to; j++) {
        const double *a = x + pitch * first[j], *s = shared + pitch * with[j];
        RC_UNROLL
        for (int u = 0; u < UNROLL; u++) {
            const vreal both = LOAD(s + u * LANES);
            R[u] += RC_NAME(real)(both) * LOAD(a + u * LANES);
            M[u] += RC_NAME(imaginary)(both) * LOAD(a + u * LANES);
        }
    }
}

RC_INLINE void RC_NAME(finish)(rc_mixing how, double factor, const vreal R[UNROLL], const vreal M[UNROLL], double *z) {
    const vreal of_R = RC_NAME(pairs)(factor, how == RC_ADJOINT ? -factor : factor);
    const vreal of_M = RC_NAME(pairs)(how == RC_PRODUCT ? -factor : factor, how == RC_CORRELATE ? -factor : factor);
    RC_UNROLL
    for (int u = 0; u < UNROLL; u++) {
        vreal sum = R[u] * of_R + RC_NAME(swapped)(M[u]) * of_M;
        if (how == RC_CORRELATE)
            sum += LOAD(z + u * LANES);
        STORE(z + u * LANES, sum);
    }
}

static void RC_NAME(mix)(ptrdiff_t size, ptrdiff_t pitch, ptrdiff_t tiles, const ptrdiff_t *start, const ptrdiff_t *first,
                         const ptrdiff_t *second, const ptrdiff_t *with, rc_mixing how, double factor, const double *x,
                         const double *shared, double *z, double *rows) {
    pitch *= 2;
    const ptrdiff_t apart = rows ? RC_CHUNK : pitch;
    for (ptrdiff_t chunk = 0; chunk < 2 * size; chunk += RC_CHUNK) {
        const ptrdiff_t end = chunk + RC_CHUNK < 2 * size ? chunk + RC_CHUNK : 2 * size;
        double *to = rows ? rows - chunk : z;
        for (ptrdiff_t t = 0; t < tiles; t++) {
            const ptrdiff_t *at = start + 3 * t;
            for (ptrdiff_t i = chunk; i < end; i += UNROLL * LANES) {
                vreal R[2][UNROLL] = {0}, M[2][UNROLL] = {0};
                for (ptrdiff_t j = at[0]; j < at[1]; j++) {
                    const double *a = x + pitch * first[j] + i, *b = x + pitch * second[j] + i;
                    const double *s = shared + pitch * with[j] + i;
                    RC_UNROLL
                    for (int u = 0; u < UNROLL; u++) {
                        const vreal both = LOAD(s + u * LANES);
                        const vreal real = RC_NAME(real)(both), imaginary = RC_NAME(imaginary)(both);
                        R[0][u] += real * LOAD(a + u * LANES);
                        M[0][u] += imaginary * LOAD(a + u * LANES);
                        R[1][u] += real * LOAD(b + u * LANES);
                        M[1][u] += imaginary * LOAD(b + u * LANES);
                    }
                }
                RC_NAME(alone)(pitch, at[1], at[2], first, with, x + i, shared + i, R[0], M[0]);
                RC_NAME(alone)(pitch, at[2], at[3], first, with, x + i, shared + i, R[1], M[1]);
                if (at[0] < at[1] || at[1] < at[2])
                    RC_NAME(finish)(how, factor, R[0], M[0], to + 2 * t * apart + i);
                if (at[0] < at[1] || at[2] < at[3])
                    RC_NAME(finish)(how, factor, R[1], M[1], to + (2 * t + 1) * apart + i);
            }
        }
        for (ptrdiff_t o = 0; rows && o < 2 * tiles; o++) {
            const ptrdiff_t *at = start + 3 * (o / 2);
            if (at[0] < at[1] || at[1 + o % 2] < at[2 + o % 2])
                memcpy(z + o * pitch + chunk, rows + o * RC_CHUNK, (end - chunk) * sizeof(double));
        }
    }
}
#undef UNROLL

const rc_toeplitz_kernels RC_TABLE(rc_toeplitz) = {
    .monomial = RC_NAME(monomial),
    .derive = RC_NAME(derive),
    .pack = RC_NAME(pack),
    .gather = RC_NAME(gather),
    .scatter = RC_NAME(scatter),
    .mix = RC_NAME(mix),
};
