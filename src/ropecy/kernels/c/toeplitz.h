/* What happens to columns and their spectra around the transforms, all in float64.
 *
 * Two real columns make a complex one, x1 + i x2, which a real Toeplitz matrix keeps apart. A column of b entries with
 * b zeros behind it has a spectrum of 2b. Its frequencies k modulo 4 are four transforms of b / 2, the quarters: of
 * what x_j + (-i)^k x_{j + b/2} makes when multiplied with the power k of exp(-i pi j / b). Real parts of the latter
 * for all j < b / 2, then imaginary ones, are `turn`; elsewhere complex numbers are pairs (real part, imaginary part).
 * Sizes are multiples of 32, of what `derive` adds up of 8.
 */
#ifndef RC_TOEPLITZ_H
#define RC_TOEPLITZ_H
#include <stddef.h>
#include "isa.h"

#define RC_COLUMNS 64 /* of a product, at most */
#define RC_TILE 4     /* rows that `mix` makes together, so that it reads once what they share */
#define RC_CHUNK 128  /* doubles of a row that it makes at a time */

/* What becomes of sums R + i M, R = sum Re(shared) x and M = sum Im(shared) x, or of R - i M = sum conj(shared) x. */
typedef enum {
    RC_PRODUCT,     /* z = factor sum shared x */
    RC_ADJOINT,     /* z = factor sum shared conj(x) */
    RC_CORRELATE,   /* z += factor sum conj(shared) x */
    RC_ADD_PRODUCT, /* z += factor sum shared x */
    RC_ADD_ADJOINT  /* z += factor sum shared conj(x) */
} rc_mixing;

typedef struct {
    /* z = factor times the product of the columns x[0 .. count) */
    void (*monomial)(ptrdiff_t size, double factor, ptrdiff_t count, const double *const *x, double *z);
    /* z += factor y times the product of the columns x[0 .. count) */
    void (*derive)(ptrdiff_t size, double factor, const double *y, ptrdiff_t count, const double *const *x, double *z);
    /* dx[c] += factor y times the product of the columns x[0 .. count) but x[c], for all c; dx may be the same for some,
     * count is at most RC_COLUMNS */
    void (*differentiate)(ptrdiff_t size, double factor, const double *y, ptrdiff_t count, const double *const *x,
                          double *const *dx);
    /* z = the quarters of w y (x1 + i x2), to be transformed; w = NULL stands for 1, here and below */
    void (*pack)(ptrdiff_t size, const double *w, const double *x1, const double *x2, const double *y,
                 const double *turn, double *z);
    /* z += factor w (x1 Re u + x2 Im u), where u is the first b entries of what has these quarters, transformed back */
    void (*gather)(ptrdiff_t size, double factor, const double *w, const double *x1, const double *x2,
                   const double *quarters, const double *turn, double *z);
    /* z1 += factor w y Re u, z2 += factor w y Im u */
    void (*scatter)(ptrdiff_t size, double factor, const double *w, const double *y, const double *quarters,
                    const double *turn, double *z1, double *z2);
    /* Rows of z are sums of products of complex rows, those of `shared` with those of x. Tile t makes RC_TILE of them
     * from RC_TILE t on: its entries j, start[t] <= j < start[t + 1], add shared[with[j]] times x[rows[RC_TILE j + o]]
     * to the row o of the tile, nothing where that is negative. What rows hold that nothing is added to is not said.
     * Rows lie a pitch apart. Where z is `shared`, `room` is RC_CHUNK numbers for each row of z; else it is NULL. */
    void (*mix)(ptrdiff_t size, ptrdiff_t pitch, ptrdiff_t outputs, const ptrdiff_t *start, const ptrdiff_t *with,
                const ptrdiff_t *rows, rc_mixing how, double factor, const double *x, const double *shared, double *z,
                double *room);
} rc_toeplitz_kernels;

extern const rc_toeplitz_kernels rc_toeplitz_baseline;
#if RC_X86
extern const rc_toeplitz_kernels rc_toeplitz_v3, rc_toeplitz_v4;
#endif

static inline const rc_toeplitz_kernels *rc_toeplitz_select(int level) {
    (void)level;
    return RC_SELECT(rc_toeplitz, level);
}
#endif
