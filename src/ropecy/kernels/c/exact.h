/* Exact attention by blocks, never an n x n array: forward by query tiles, backward by key blocks.
 *
 * Every function does one piece of work of one head, serially; pieces of a phase may run at once on different
 * workspaces, and what each writes does not depend on the others.
 *
 *   pack_keys, pack_values   keys as [register block][a][key]; padding keys are 0
 *   forward                  `queries` queries, their rows of q and of o: o, maximum, inverse, lse
 *
 * Backward is of one head by itself:
 *
 *   prepare                  one tile of queries: transposed q and do, <o, do>
 *   backward                 one block of keys, all queries: its rows of dk and dv, and it adds to the dq of its segment,
 *                            which has every block that leaves the same rest when divided by the number of segments
 *   collect                  a tile's rows of dq: the segments' parts added in order
 */
#ifndef RC_EXACT_H
#define RC_EXACT_H
#include <stddef.h>
#include "isa.h"

typedef struct {
    ptrdiff_t heads, groups, n, n_k, d, d_v; /* q (heads, groups, n, d), k (heads, n_k, d), v (heads, n_k, d_v) */
    ptrdiff_t lo, hi;                        /* row i sees key j when lo <= j - i <= hi */
    double scale;                            /* score = scale <q, k>; with `factor`, the factor of <q, k> is there */
    double gain;    /* a power of two that q and k were divided by, so that no score overflows; else 1 */
    const unsigned char *bounded; /* (heads): 1 where scores are so small that no running maximum is needed */
    int everywhere; /* symbol or factor say more than the band: every block reads them */
    const void *q, *k, *v;
    /* Toeplitz tables read at u = i - j + n_k - 1, padded on both sides so that whole tiles and blocks may be
     * read (`block` elements before u = 0, `tile` after u = n + n_k - 2), in units of log2; symbol is -inf where the band forbids. */
    const void *symbol;                    /* NULL, or a table per (head, group), or shared where the stride is 0 */
    ptrdiff_t symbol_head, symbol_group;   /* strides in elements */
    const void *factor;                    /* NULL, or tables that multiply <q, k> */
    const ptrdiff_t *factor_start;         /* (heads, groups): where in `factor` that of each begins, in elements */
    const void *key_shift;                 /* (heads, padded n_k): 0, or -inf for a key that is masked or padding */
    int masked;                            /* whether key_shift masks more than the padding */
    void *key_pack, *value_pack;           /* (heads, padded n_k, d), (heads, padded n_k, d_v) */
    void *o;                               /* (heads, groups, n, d_v) */
    void *maximum, *inverse;               /* (heads, groups, n): in log2; 1 / sum, 0 for a row without keys */
    double *lse;                           /* NULL or (heads, groups, n): natural log, -inf for a row without keys */
    /* backward */
    const void *q_rows, *grad_rows;        /* q and do, rows with zeros up to whole vectors: (groups, n, padded d or d_v) */
    void *q_tiles, *grad_tiles;            /* (groups, tiles, d or d_v, tile) */
    void *row_stats;                       /* (groups, tiles, 3, tile): maximum, inverse, <o, do> */
    void *dq_segments;                     /* (segments, groups, tiles, d, tile), zeroed */
    double *dsymbol;                       /* NULL or (segments, groups, table), zeroed */
    ptrdiff_t segments;
    double grad_scale;                     /* of dq and dk */
} rc_exact_problem;

typedef struct {
    int queries;              /* of a piece of forward: some whole tiles */
    int tile, block;          /* queries in a tile, keys in a block */
    int step;                 /* keys, a part of a block, that backward leaves out where no query of a tile sees them */
    int lanes;                /* rows for backward are padded to a multiple of this */
    size_t (*forward_workspace)(const rc_exact_problem *);
    size_t (*backward_workspace)(const rc_exact_problem *);
    void (*pack_keys)(const rc_exact_problem *, ptrdiff_t head, ptrdiff_t block);
    void (*pack_values)(const rc_exact_problem *, ptrdiff_t head, ptrdiff_t block);
    void (*forward)(const rc_exact_problem *, ptrdiff_t head, ptrdiff_t group, ptrdiff_t piece, const void *q, void *o,
                    void *workspace);
    void (*prepare)(const rc_exact_problem *, ptrdiff_t group, ptrdiff_t tile);
    void (*backward)(const rc_exact_problem *, ptrdiff_t block, void *dk, void *dv, void *workspace);
    void (*collect)(const rc_exact_problem *, ptrdiff_t group, ptrdiff_t tile, void *dq);
} rc_exact_functions;

typedef struct {
    const rc_exact_functions *f32, *f64;
} rc_exact_kernels;

extern const rc_exact_kernels rc_exact_baseline;
#if RC_X86
extern const rc_exact_kernels rc_exact_v3, rc_exact_v4;
#endif

static inline const rc_exact_kernels *rc_exact_select(int level) {
    (void)level;
    return RC_SELECT(rc_exact, level);
}
#endif
