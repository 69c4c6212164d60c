/* Bound by memory: every function streams two to five columns. Beside a pair of transforms, 2.5 size log2(size)
 * operations each, they cost a few percent. */
#include "toeplitz.h"

#define RC_BITS 64
#include "simd.h"

static void RC_NAME(multiply)(ptrdiff_t size, const double *restrict x, const double *restrict y, double *restrict z) {
    for (ptrdiff_t i = 0; i < size; i++)
        z[i] = x[i] * y[i];
}

static void RC_NAME(weigh)(ptrdiff_t size, const double *restrict w, const double *restrict x, const double *restrict y,
                           double *restrict z) {
    if (!w) {
        RC_NAME(multiply)(size, x, y, z);
        return;
    }
    for (ptrdiff_t i = 0; i < size; i++)
        z[i] = w[i] * x[i] * y[i];
}

static void RC_NAME(add)(ptrdiff_t size, double factor, const double *restrict w, const double *restrict x,
                         const double *restrict y, double *restrict z) {
    if (w)
        for (ptrdiff_t i = 0; i < size; i++)
            z[i] += factor * w[i] * x[i] * y[i];
    else
        for (ptrdiff_t i = 0; i < size; i++)
            z[i] += factor * x[i] * y[i];
}

static void RC_NAME(adjoint)(ptrdiff_t size, const double *restrict dy, const double *restrict x, const double *restrict parent,
                             double *restrict dx, double *restrict dparent) {
    for (ptrdiff_t i = 0; i < size; i++) {
        dx[i] += dy[i] * parent[i];
        dparent[i] += dy[i] * x[i];
    }
}

/* z += x y for sign = 1, factor conj(x) y for sign = -1: real parts of x times y, imaginary parts times i y. */
RC_INLINE void RC_NAME(complex_add)(ptrdiff_t size, double factor, double sign, const double *x, const double *y, double *z) {
    vint real, imaginary, swap;
    vreal turn;
    for (int l = 0; l < LANES; l++) {
        real[l] = l & ~1;
        imaginary[l] = l | 1;
        swap[l] = l ^ 1;
        turn[l] = (l & 1 ? sign : -sign) * factor;
    }
    ptrdiff_t i = 0;
    for (; i + LANES <= 2 * size; i += LANES) {
        const vreal a = LOAD(x + i), b = LOAD(y + i);
        STORE(z + i, LOAD(z + i) + __builtin_shuffle(a, real) * b * SPLAT(factor) +
                         __builtin_shuffle(a, imaginary) * __builtin_shuffle(b, swap) * turn);
    }
    for (; i < 2 * size; i += 2) {
        z[i] += factor * (x[i] * y[i] - sign * x[i + 1] * y[i + 1]);
        z[i + 1] += factor * (x[i] * y[i + 1] + sign * x[i + 1] * y[i]);
    }
}

static void RC_NAME(convolve)(ptrdiff_t size, const double *x, const double *y, double *z) {
    RC_NAME(complex_add)(size, 1, 1, x, y, z);
}

static void RC_NAME(correlate)(ptrdiff_t size, double factor, const double *x, const double *y, double *z) {
    RC_NAME(complex_add)(size, factor, -1, x, y, z);
}

const rc_toeplitz_kernels RC_TABLE(rc_toeplitz) = {
    .multiply = RC_NAME(multiply),
    .weigh = RC_NAME(weigh),
    .add = RC_NAME(add),
    .adjoint = RC_NAME(adjoint),
    .convolve = RC_NAME(convolve),
    .correlate = RC_NAME(correlate),
};
