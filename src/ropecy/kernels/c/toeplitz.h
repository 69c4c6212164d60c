/* What happens to columns and their spectra around the transforms, all in float64.
 *
 * Two real columns make a complex one, x1 + i x2, which a real Toeplitz matrix keeps apart. A column of b entries with b
 * zeros behind it has a spectrum of 2b: its even frequencies are the transform of the column, its odd ones that of the
 * column times `turn`, turn[j] = exp(-i pi j / b). Complex numbers are pairs (real part, imaginary part). Every size is
 * a multiple of 32.
 */
#ifndef RC_TOEPLITZ_H
#define RC_TOEPLITZ_H
#include <stddef.h>
#include "isa.h"

#define RC_CHUNK 128 /* doubles of each row that `mix` goes through at a time: of all rows together, about L1 */

/* What becomes of sums R + i M, R = sum Re(shared) x and M = sum Im(shared) x, or of R - i M = sum conj(shared) x. */
typedef enum {
    RC_PRODUCT,  /* z = factor sum shared x */
    RC_ADJOINT,  /* z = factor sum shared conj(x) */
    RC_CORRELATE /* z += factor sum conj(shared) x */
} rc_mixing;

typedef struct {
    /* z = factor times the product of the columns x[0 .. count) */
    void (*monomial)(ptrdiff_t size, double factor, ptrdiff_t count, const double *const *x, double *z);
    /* z += factor y times the product of the columns x[0 .. count) */
    void (*derive)(ptrdiff_t size, double factor, const double *y, ptrdiff_t count, const double *const *x, double *z);
    /* even = w y (x1 + i x2), odd = turn times that; w = NULL stands for 1, here and below */
    void (*pack)(ptrdiff_t size, const double *w, const double *x1, const double *x2, const double *y, const double *turn,
                 double *even, double *odd);
    /* z += factor w (x1 Re u + x2 Im u), where u = even + conj(turn) odd */
    void (*gather)(ptrdiff_t size, double factor, const double *w, const double *x1, const double *x2, const double *even,
                   const double *odd, const double *turn, double *z);
    /* z1 += factor w y Re u, z2 += factor w y Im u */
    void (*scatter)(ptrdiff_t size, double factor, const double *w, const double *y, const double *even, const double *odd,
                    const double *turn, double *z1, double *z2);
    /* Rows 2 t and 2 t + 1 of z are sums of products of complex rows, those of `shared` with those of x: both rows take
     * x[first[j]] and x[second[j]] times shared[with[j]] for start[3 t] <= j < start[3 t + 1], then one takes x[first[j]]
     * times shared[with[j]] up to start[3 t + 2], the other up to start[3 t + 3]. Rows lie a pitch apart. Where z is
     * `shared`, `rows` has room for RC_CHUNK numbers of each row of z; else it is NULL. */
    void (*mix)(ptrdiff_t size, ptrdiff_t pitch, ptrdiff_t tiles, const ptrdiff_t *start, const ptrdiff_t *first,
                const ptrdiff_t *second, const ptrdiff_t *with, rc_mixing how, double factor, const double *x,
                const double *shared, double *z, double *rows);
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
