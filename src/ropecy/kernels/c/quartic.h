/* X -> sum_j w_j y_j y_j^T with w_j = y_j^T X y_j, for many y and symmetric X: what Lanczos asks for the largest variance
 * of <X, y y^T>.
 *
 * Bound by multiply-adds: 2 n d^2, for of both products only what is on and below the diagonal is formed.
 *
 *   pack    a tile of rows, by lanes and by rows, `size` elements; rows that are not there are 0
 *   apply   tiles [first, last) of packed rows
 */
#ifndef RC_QUARTIC_H
#define RC_QUARTIC_H
#include <stddef.h>
#include "isa.h"

typedef struct {
    int tile;
    size_t (*size)(ptrdiff_t d);      /* elements of a packed tile */
    size_t (*workspace)(ptrdiff_t d); /* bytes */
    /* y = factor (x - centre) of `count` <= tile rows x (count, d), of which keep says which are there; centre, keep: or NULL */
    void (*pack)(const void *x, ptrdiff_t count, ptrdiff_t d, const unsigned char *keep, const void *centre, double factor, void *out);
    /* image (d, d), and returns the sum of w; X (d, d), or NULL for w_j = 1 */
    double (*apply)(const void *packed, ptrdiff_t first, ptrdiff_t last, ptrdiff_t d, const double *X, double *image, void *workspace);
} rc_quartic_functions;

typedef struct {
    const rc_quartic_functions *f32, *f64;
} rc_quartic_kernels;

extern const rc_quartic_kernels rc_quartic_baseline;
#if RC_X86
extern const rc_quartic_kernels rc_quartic_v3, rc_quartic_v4;
#endif

static inline const rc_quartic_kernels *rc_quartic_select(int level) {
    (void)level;
    return RC_SELECT(rc_quartic, level);
}
#endif
