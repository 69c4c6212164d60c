/* Exact attention of a few queries over many keys: decoding. Keys and values are read where they lie, as they are stored,
 * once.
 *
 * Each of any number of sequences has its own number of queries and keys, and key heads that groups of query heads share.
 * Its keys are cut into parts of PART keys, whatever the number of threads and whatever is beside it: `of_parts` leaves the
 * softmax over the keys of a part, `merge` makes one of all parts of a sequence, in their order.
 */
#ifndef RC_FEW_H
#define RC_FEW_H
#include <stddef.h>
#include <stdint.h>
#include "isa.h"

/* Where rows of keys, or of values, lie: bytes from one row of a page to the next, from entry to entry of a row, from the
 * rows of a head to those of the next, from page to page. */
typedef struct {
    ptrdiff_t row, column, head, page;
} rc_few_strides;

typedef struct {
    ptrdiff_t n, n_k, lo, hi;  /* query i of n sees those of the n_k keys with lo <= j - i <= hi */
    ptrdiff_t row;             /* its first query, counted in rows of q and o */
    ptrdiff_t from;            /* its first key, counted in rows of its pages */
    const int32_t *pages;      /* which pages these are, in their order */
    const void *k, *v;         /* of its first head, the first row of page 0 */
    const unsigned char *keep; /* n_k bytes, 0 for a key that is hidden and never read; or NULL */
    double most;               /* of the product of the norms of a query and a key: rounding passes what is asked beyond it */
    ptrdiff_t first_part;      /* parts of the sequences before it */
    size_t partial;            /* bytes that these leave */
} rc_few_sequence;

typedef struct {
    const rc_few_sequence *sequences;
    ptrdiff_t heads, group;          /* key heads, and query heads that share one */
    ptrdiff_t d, d_v, page;          /* page: rows of keys in one */
    rc_few_strides k, v;
    const void *q;                   /* rows of d entries, contiguous, as stored */
    double scale;                    /* of scores, times log2 e */
    ptrdiff_t head_rows, query_rows; /* of q and o, from one head of a sequence, and from one query of a head, to the next */
    char *partial;                   /* of every part of every sequence and head */
    void *o;                         /* rows of d_v entries, contiguous, as computed in */
    double *lse;                     /* of each row; or NULL */
} rc_few_problem;

/* Some parts of a sequence, one after the other, for some heads of it. What they leave does not depend on how they are put
 * together. */
typedef struct {
    ptrdiff_t sequence, part, parts, head, heads; /* heads: 1, or a power of two up to RC_FEW_HEADS */
} rc_few_task;

enum { RC_FEW_HEADS = 8 };

typedef struct {
    /* Of n queries a head: bytes of what a part leaves of a head, and of a thread's workspace for so many heads at once; both
     * multiples of a cache line. */
    size_t (*partial_size)(const rc_few_problem *, ptrdiff_t n);
    size_t (*workspace)(const rc_few_problem *, ptrdiff_t n, ptrdiff_t heads);
    /* Whether all scores and sums are finite, and with them every query, key and value that was read, and none of the scores
     * is so large that its rounding would show in the weights. */
    int (*of_parts)(const rc_few_problem *, const rc_few_sequence *, rc_few_task, void *workspace);
    /* Whether queries are not finite; or, by a sample of keys and values, whether values lie so far from 0, beside how far
     * they spread, that rounding of their sums would show, or queries and keys are longer than `most`. */
    int (*far)(const rc_few_problem *, const rc_few_sequence *, ptrdiff_t head, void *workspace);
    void (*merge)(const rc_few_problem *, const rc_few_sequence *, ptrdiff_t head);
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
