#include "simd.h"
#include "product.template.h"

/* w: lanes are tokens, z = L y for rows of L = the lower triangle of X with its off-diagonal doubled, w = sum_a y_a z_a.
 * The image: lanes are columns, a block of OUTER rows of it up to the block's last column, summed in float64 every FOLD
 * tiles.
 */
#undef OUTER
#if RC_REGISTERS == 32
#define OUTER 8
#else
#define OUTER 6
#endif
#define FOLD 32

typedef struct {
    ptrdiff_t wide, deep; /* d in whole vectors, and in whole blocks */
    REAL *z, *weighted;   /* [ROWS][TILE], [deep][TILE] */
    REAL *lower;          /* [block of rows][column][row] */
    REAL *part;           /* (deep, wide) */
} RC_NAME(quartic_room);

static size_t RC_NAME(quartic_size)(ptrdiff_t d) { return (size_t)(TILE * (d + rc_round_up(d, LANES))); }

static RC_NAME(quartic_room) RC_NAME(quartic_lay_out)(ptrdiff_t d, REAL *base) {
    RC_NAME(quartic_room) w = {rc_round_up(d, LANES), rc_round_up(d, OUTER), base, 0, 0, 0};
    w.weighted = w.z + ROWS * TILE;
    w.part = w.weighted + w.deep * TILE;
    w.lower = w.part + w.deep * w.wide;
    return w;
}

static size_t RC_NAME(quartic_workspace)(ptrdiff_t d) {
    const ptrdiff_t wide = rc_round_up(d, LANES), deep = rc_round_up(d, OUTER);
    return (size_t)(ROWS * TILE + deep * TILE + deep * wide + d * d) * sizeof(REAL);
}

static void RC_NAME(quartic_pack)(const void *x, ptrdiff_t count, ptrdiff_t d, const unsigned char *keep, const void *centre,
                                  double factor, void *out) {
    const REAL *from = x, *shift = centre;
    const ptrdiff_t wide = rc_round_up(d, LANES);
    REAL *xt = out, *rows = xt + d * TILE;
    for (ptrdiff_t t = 0; t < TILE; t++) {
        const int there = t < count && (!keep || keep[t]);
        for (ptrdiff_t a = 0; a < d; a++)
            xt[a * TILE + t] = rows[t * wide + a] = there ? (REAL)factor * (from[t * d + a] - (shift ? shift[a] : 0)) : 0;
        for (ptrdiff_t a = d; a < wide; a++)
            rows[t * wide + a] = 0;
    }
}

/* weighted = y w of a tile, lanes of tokens, and the sum of w. */
static REAL RC_NAME(quartic_weigh)(const RC_NAME(quartic_room) * w, ptrdiff_t d, const REAL *xt, const int given) {
    const int blocks = rc_blocks((int)d, ROWS);
    const REAL *lower = w->lower;
    vreal sum[VECTORS], all = {0};
    RC_UNROLL for (int v = 0; v < VECTORS; v++) sum[v] = SPLAT((REAL)!given);
    for (int b = 0; given && b < blocks; b++) {
        const int a0 = rc_block_start((int)d, blocks, b), a1 = rc_block_start((int)d, blocks, b + 1), R = a1 - a0;
        RC_NAME(product)[R][VECTORS](a1, xt, TILE, lower, R, w->z, TILE, RC_STORE, 0);
        lower += a1 * R;
        for (int r = 0; r < R; r++)
            RC_UNROLL for (int v = 0; v < VECTORS; v++)
                sum[v] += LOAD(w->z + r * TILE + v * LANES) * LOAD(xt + (a0 + r) * TILE + v * LANES);
    }
    for (ptrdiff_t a = 0; a < d; a++)
        RC_UNROLL for (int v = 0; v < VECTORS; v++)
            STORE(w->weighted + a * TILE + v * LANES, sum[v] * LOAD(xt + a * TILE + v * LANES));
    RC_UNROLL for (int v = 0; v < VECTORS; v++) all += sum[v];
    REAL total = 0;
    for (int lane = 0; lane < LANES; lane++)
        total += all[lane];
    return total;
}

/* C (OUTER, V vectors) += weighted (OUTER, TILE) rows (TILE, wide). */
#define RC_OUTER(V)                                                                                                      \
    RC_NOINLINE void RC_NAME(outer_##V)(const REAL *rows, ptrdiff_t wide, const REAL *weighted, REAL *C) {                \
        RC_NAME(product_block)(OUTER, V, TILE, rows, wide, weighted, 1, TILE, C, wide, RC_ADD, 0);                        \
    }
RC_OUTER(1) RC_OUTER(2)
#if VECTORS == 3
RC_OUTER(3)
#endif
#undef RC_OUTER

static void RC_NAME(quartic_fold)(const RC_NAME(quartic_room) * w, ptrdiff_t d, double *image) {
    for (ptrdiff_t a = 0; a < d; a++)
        for (ptrdiff_t b = 0; b <= a; b++) {
            image[a * d + b] += w->part[a * w->wide + b];
            w->part[a * w->wide + b] = 0;
        }
}

static double RC_NAME(quartic_apply)(const void *packed, ptrdiff_t first, ptrdiff_t last, ptrdiff_t d, const double *X, double *image,
                                     void *workspace) {
    const int blocks = rc_blocks((int)d, ROWS);
    const RC_NAME(quartic_room) w = RC_NAME(quartic_lay_out)(d, workspace);
    REAL *lower = w.lower;
    for (int b = 0; X && b < blocks; b++) {
        const int a0 = rc_block_start((int)d, blocks, b), a1 = rc_block_start((int)d, blocks, b + 1);
        for (int k = 0; k < a1; k++)
            for (int a = a0; a < a1; a++)
                *lower++ = (REAL)(k < a ? 2 * X[a * d + k] : k == a ? X[a * d + a] : 0);
    }
    for (ptrdiff_t i = 0; i < d * d; i++)
        image[i] = 0;
    for (ptrdiff_t i = 0; i < w.deep * w.wide; i++)
        w.part[i] = 0;
    for (ptrdiff_t i = d * TILE; i < w.deep * TILE; i++)
        w.weighted[i] = 0;
    double total = 0;
    for (ptrdiff_t tile = first; tile < last; tile++) {
        const REAL *xt = (const REAL *)packed + (size_t)tile * RC_NAME(quartic_size)(d), *rows = xt + d * TILE;
        total += RC_NAME(quartic_weigh)(&w, d, xt, X != 0);
        for (ptrdiff_t a = 0; a < w.deep; a += OUTER) {
            const ptrdiff_t vectors = rc_min(w.wide, rc_round_up(a + OUTER, LANES)) / LANES;
            for (ptrdiff_t v = 0; v < vectors; v += VECTORS) {
                const REAL *weighted = w.weighted + a * TILE, *from = rows + v * LANES;
                REAL *C = w.part + a * w.wide + v * LANES;
                if (vectors - v == 1)
                    RC_NAME(outer_1)(from, w.wide, weighted, C);
#if VECTORS == 3
                else if (vectors - v >= 3)
                    RC_NAME(outer_3)(from, w.wide, weighted, C);
#endif
                else
                    RC_NAME(outer_2)(from, w.wide, weighted, C);
            }
        }
        if ((tile - first) % FOLD == FOLD - 1)
            RC_NAME(quartic_fold)(&w, d, image);
    }
    RC_NAME(quartic_fold)(&w, d, image);
    for (ptrdiff_t a = 0; a < d; a++)
        for (ptrdiff_t b = 0; b < a; b++)
            image[b * d + a] = image[a * d + b];
    return total;
}
#undef FOLD

static const rc_quartic_functions RC_NAME(quartic_functions) = {
    TILE, RC_NAME(quartic_size), RC_NAME(quartic_workspace), RC_NAME(quartic_pack), RC_NAME(quartic_apply),
};
