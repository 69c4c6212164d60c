/* Exact attention of a few queries over many keys: decoding. Keys and values are read where they lie, as they are stored,
 * once.
 *
 * The n_k keys of a slot are cut into parts of PART keys, whatever the number of threads: `part` leaves the softmax over
 * its own keys, `merge` makes one of all parts of a slot, in their order.
 */
#ifndef RC_FEW_H
#define RC_FEW_H
#include <stddef.h>
#include "isa.h"

typedef struct {
    ptrdiff_t rows, n;                          /* queries of a slot; of those, row r is the query r % n of its head */
    ptrdiff_t n_k, d, d_v, lo, hi;              /* query i sees the keys with lo <= j - i <= hi */
    const void *const *k;                       /* of every slot, its first key and its first value, as stored */
    const void *const *v;
    const unsigned char *const *keep;           /* of every slot, n_k bytes, 0 for a key that is hidden and never read; or NULL */
    ptrdiff_t k_row, k_column, v_row, v_column; /* bytes from one row, or entry of a row, to the next */
    const void *q;                              /* (slots, rows, d) contiguous, times scale log2 e, as computed in */
    double most; /* of the product of the norms of a query and a key: rounding of scores passes what is asked beyond it */
    void *partial;                              /* of every part of every slot, partial_size bytes */
    void *o;                                    /* (slots, rows, d_v) contiguous, as computed in */
    double *lse;                                /* (slots, rows) or NULL */
} rc_few_problem;

typedef struct {
    /* `count` entries of queries, as stored, times `scale`, as computed with; whether all of them are finite. */
    int (*queries)(const void *from, ptrdiff_t count, double scale, void *to);
    size_t (*partial_size)(const rc_few_problem *); /* multiples of a cache line, as is the workspace of a thread */
    size_t (*workspace)(const rc_few_problem *);
    /* Whether all scores and sums are finite, and with them every query, key and value that was read, and none of the scores
     * is so large that its rounding would show in the weights. */
    int (*of_part)(const rc_few_problem *, ptrdiff_t slot, ptrdiff_t part, void *workspace);
    /* By a sample of keys and values: whether values lie so far from 0, beside how far they spread, that rounding of their
     * sums would show, or queries and keys are longer than `most`. */
    int (*far)(const rc_few_problem *, ptrdiff_t slot, void *workspace);
    void (*merge)(const rc_few_problem *, ptrdiff_t slot);
} rc_few_functions;

/* By what is stored; float16 and bfloat16 are computed in float32. */
typedef struct {
    ptrdiff_t part; /* keys in a part */
    rc_few_functions float32, float64, float16, bfloat16;
} rc_few_kernels;

extern const rc_few_kernels rc_few_baseline;
#if RC_X86
extern const rc_few_kernels rc_few_v3, rc_few_v4;
#endif

static inline const rc_few_kernels *rc_few_select(int level) {
    (void)level;
    return RC_SELECT(rc_few, level);
}
#endif
