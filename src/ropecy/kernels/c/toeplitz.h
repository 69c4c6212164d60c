/* What happens to columns and their spectra between two transforms, all in float64: products of columns, and products
 * of spectra with that of a Toeplitz symbol. Spectra are pairs (real part, imaginary part); `size` counts pairs there. */
#ifndef RC_TOEPLITZ_H
#define RC_TOEPLITZ_H
#include <stddef.h>
#include "isa.h"

typedef struct {
    /* z = x y */
    void (*multiply)(ptrdiff_t size, const double *x, const double *y, double *z);
    /* z = w x y, w = NULL standing for 1 */
    void (*weigh)(ptrdiff_t size, const double *w, const double *x, const double *y, double *z);
    /* z += factor w x y, w = NULL standing for 1 */
    void (*add)(ptrdiff_t size, double factor, const double *w, const double *x, const double *y, double *z);
    /* One step of the adjoint of y = x parent: dx += dy parent, dparent += dy x */
    void (*adjoint)(ptrdiff_t size, const double *dy, const double *x, const double *parent, double *dx, double *dparent);
    /* z += x y, and z += factor conj(x) y, of complex numbers */
    void (*convolve)(ptrdiff_t size, const double *x, const double *y, double *z);
    void (*correlate)(ptrdiff_t size, double factor, const double *x, const double *y, double *z);
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
