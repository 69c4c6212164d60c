/* What planning measures of rows: norms, quadratic forms, and sums, minima and maxima of columns.
 *
 * Bound by memory, quadratic forms by multiply-adds: one read of x. Rows whose keep is 0 are passed over.
 */
#ifndef RC_ROWS_H
#define RC_ROWS_H
#include <stddef.h>
#include "isa.h"

/* max |x_i| of n numbers; inf or NaN where one of them is. */
typedef double (*rc_largest_function)(const void *x, ptrdiff_t n);
/* norm2 = max_i ||x_i - shift||^2, or 0; inf or NaN where a number is; shift may be NULL. */
typedef double (*rc_norm_function)(const void *x, ptrdiff_t n, ptrdiff_t d, const unsigned char *keep, const void *shift);
/* norms[i] = factor ||x_i|| */
typedef void (*rc_norms_function)(const void *x, ptrdiff_t n, ptrdiff_t d, double factor, double *norms);
/* forms[i] = x_i^T U x_i, U (d, d) 0 below the diagonal; `work` has room for quadratic_workspace(d). */
typedef void (*rc_quadratic_function)(const void *x, ptrdiff_t n, ptrdiff_t d, const void *upper, double *forms, void *work);
/* sum, low and high (d each) over the kept rows: 0, +inf and -inf where there are none. */
typedef void (*rc_columns_function)(const void *x, ptrdiff_t n, ptrdiff_t d, const unsigned char *keep, double *sum, void *low,
                                    void *high);

typedef struct {
    rc_largest_function largest_f32, largest_f64;
    rc_norm_function norm_f32, norm_f64;
    rc_norms_function norms_f32, norms_f64;
    size_t (*quadratic_workspace_f32)(ptrdiff_t d), (*quadratic_workspace_f64)(ptrdiff_t d);
    rc_quadratic_function quadratic_f32, quadratic_f64;
    rc_columns_function columns_f32, columns_f64;
} rc_rows_kernels;

extern const rc_rows_kernels rc_rows_baseline;
#if RC_X86
extern const rc_rows_kernels rc_rows_v3, rc_rows_v4;
#endif

static inline const rc_rows_kernels *rc_rows_select(int level) {
    (void)level;
    return RC_SELECT(rc_rows, level);
}
#endif
