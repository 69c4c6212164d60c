#include "simd.h"
#include "product.template.h"
#include "transpose.template.h"
#include "exp2.template.h"
#include "scores.template.h"

/* Exact attention, for one precision. Lanes are queries, keys are broadcast; scores, exp and P V of a block stay
 * in the L1 cache.
 *
 * What bounds it: the multiply-adds of scores and P V, 2 (d + d_v) a pair, and about 14 operations of exp a pair,
 * which is 15% of the whole at d = 64 and a third at d = 16. Share of the peak reached (float32, two cores of a Zen 4,
 * n = 4,096, exp not counted, causal in brackets): with AVX-512 forward 76% (70%) at d = 16 and 87% (86%) at d = 64, backward
 * 80% (73%) and 87% (84%); with AVX2 forward 65% (62%) and 83% (80%), backward 71% (68%) and 77% (74%). There the products
 * alone, with all in the caches, reach 92% to 99%. Of the 6.2 ns a pair of backward at d = 64 on one core, 5.4 are
 * multiply-adds and 0.25 exp; 0.4 is what the five products take longer one after the other than each alone. */

/* Queries of a piece of forward, whose P is [key][QUERIES]. With 16 registers a tile is small, and keys and values, which come
 * from L2 or from beyond it, would be read too often for one. Backward, whose P and dS share the L1 cache, takes one tile. */
#undef QUERIES
#if RC_REGISTERS == 32
#define QUERIES TILE
#else
#define QUERIES (2 * TILE)
#endif

typedef struct {
    const REAL *symbol, *factor, *key_shift; /* at u = 0; at key 0 */
    ptrdiff_t lo, hi, n_k;
    int everywhere, masked;
} RC_NAME(masking);

static RC_NAME(masking) RC_NAME(masking_of)(const rc_exact_problem *p, ptrdiff_t head, ptrdiff_t group) {
    RC_NAME(masking) m = {0, 0, 0, p->lo, p->hi, p->n_k, p->everywhere, p->masked};
    if (p->symbol)
        m.symbol = (const REAL *)p->symbol + head * p->symbol_head + group * p->symbol_group + BLOCK;
    if (p->factor)
        m.factor = (const REAL *)p->factor + p->factor_start[head * p->groups + group] + BLOCK;
    m.key_shift = (const REAL *)p->key_shift + head * rc_round_up(p->n_k, BLOCK);
    return m;
}

/* Whether `queries` queries from row0 on and `keys` keys from j0 on need the tables; if not, every pair is allowed, unbiased.
 * Keys are computed KEYS at once, of which the last ones may have to be hidden. */
static int RC_NAME(needs_tables)(const RC_NAME(masking) * m, ptrdiff_t row0, int queries, ptrdiff_t j0,
                                 ptrdiff_t keys) {
    if (m->everywhere || m->masked || keys % KEYS)
        return 1;
    return j0 - (row0 + queries - 1) < m->lo || j0 + keys - 1 - row0 > m->hi;
}

/* The keys [*first, *last) that some row of [row0, row1) sees. */
static void RC_NAME(visible_keys)(const rc_exact_problem *p, ptrdiff_t row0, ptrdiff_t row1, ptrdiff_t *first, ptrdiff_t *last) {
    *first = p->lo > -row0 ? rc_min(row0 + p->lo, p->n_k) : 0;
    *last = p->hi < p->n_k - row1 ? rc_max(row1 + p->hi, 0) : p->n_k;
}

/* Biases and masks of KEYS keys from j on, V vectors of rows from row0 on. */
RC_INLINE void RC_NAME(apply_tables)(const int V, vreal acc[KEYS][VECTORS], const RC_NAME(masking) * m, ptrdiff_t row0,
                                     ptrdiff_t j) {
    const ptrdiff_t u = row0 - j + m->n_k - 1;
    if (m->factor)
        RC_UNROLL for (int r = 0; r < KEYS; r++) RC_UNROLL for (int v = 0; v < V; v++)
            acc[r][v] *= LOAD(m->factor + u - r + v * LANES);
    if (m->symbol)
        RC_UNROLL for (int r = 0; r < KEYS; r++) RC_UNROLL for (int v = 0; v < V; v++)
            acc[r][v] += LOAD(m->symbol + u - r + v * LANES);
    RC_UNROLL for (int r = 0; r < KEYS; r++) {
        vreal s = SPLAT(m->key_shift[j + r]);
        RC_UNROLL for (int v = 0; v < V; v++) acc[r][v] += s;
    }
}

/* P = 2^scores and sum += P, no maximum. The sum is kept in registers meanwhile: the compiler takes `sum` for a part of P, and
 * would store and load it again for each key, which took longer than exp. */
RC_INLINE void RC_NAME(weights_bounded)(const int V, ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *P, vreal *sum,
                                        const RC_NAME(masking) * m, ptrdiff_t row0, ptrdiff_t j) {
    vreal acc[KEYS][VECTORS];
    RC_NAME(dots)(V, acc, d, queries, QUERIES, keys);
    if (m)
        RC_NAME(apply_tables)(V, acc, m, row0, j);
    vreal part[VECTORS];
    RC_UNROLL for (int v = 0; v < V; v++) part[v] = sum[v];
    RC_UNROLL for (int r = 0; r < KEYS; r++) RC_UNROLL for (int v = 0; v < V; v++) {
        vreal e = RC_NAME(exp2)(acc[r][v]);
        part[v] += e;
        STORE(P + r * QUERIES + v * LANES, e);
    }
    RC_UNROLL for (int v = 0; v < V; v++) sum[v] = part[v];
}

/* S = scores, largest = max(largest, scores), in registers meanwhile as the sum above. */
RC_INLINE void RC_NAME(scores_unbounded)(const int V, ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *S,
                                         vreal *largest, const RC_NAME(masking) * m, ptrdiff_t row0, ptrdiff_t j) {
    vreal acc[KEYS][VECTORS];
    RC_NAME(dots)(V, acc, d, queries, QUERIES, keys);
    if (m)
        RC_NAME(apply_tables)(V, acc, m, row0, j);
    vreal most[VECTORS];
    RC_UNROLL for (int v = 0; v < V; v++) most[v] = largest[v];
    RC_UNROLL for (int r = 0; r < KEYS; r++) RC_UNROLL for (int v = 0; v < V; v++) {
        most[v] = RC_NAME(vector_max)(most[v], acc[r][v]);
        STORE(S + r * QUERIES + v * LANES, acc[r][v]);
    }
    RC_UNROLL for (int v = 0; v < V; v++) largest[v] = most[v];
}

/* Of KEYS keys and the vectors of queries that there are in a tile, of which the last one may not be full. */
typedef struct {
    void (*plain)(ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *P, vreal *sum);
    void (*masked)(ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *P, vreal *sum, const RC_NAME(masking) * m,
                   ptrdiff_t row0, ptrdiff_t j);
    void (*scores)(ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *S, vreal *largest, const RC_NAME(masking) * m,
                   ptrdiff_t row0, ptrdiff_t j);
} RC_NAME(pairs_functions);

#define RC_PAIRS_OF(V)                                                                                                      \
    RC_NOINLINE void RC_NAME(weights_plain_##V)(ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *P, vreal *sum) {  \
        RC_NAME(weights_bounded)(V, d, queries, keys, P, sum, 0, 0, 0);                                                     \
    }                                                                                                                       \
    RC_NOINLINE void RC_NAME(weights_masked_##V)(ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *P, vreal *sum,   \
                                                 const RC_NAME(masking) * m, ptrdiff_t row0, ptrdiff_t j) {                 \
        RC_NAME(weights_bounded)(V, d, queries, keys, P, sum, m, row0, j);                                                  \
    }                                                                                                                       \
    RC_NOINLINE void RC_NAME(scores_##V)(ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *S, vreal *largest,       \
                                         const RC_NAME(masking) * m, ptrdiff_t row0, ptrdiff_t j) {                         \
        RC_NAME(scores_unbounded)(V, d, queries, keys, S, largest, m, row0, j);                                             \
    }
#define RC_PAIRS_ROW(V) {RC_NAME(weights_plain_##V), RC_NAME(weights_masked_##V), RC_NAME(scores_##V)}
RC_PAIRS_OF(1) RC_PAIRS_OF(2)
#if RC_REGISTERS == 32
RC_PAIRS_OF(3)
#endif
static const RC_NAME(pairs_functions) RC_NAME(pairs)[VECTORS + 1] = {
    {0},
    RC_PAIRS_ROW(1),
    RC_PAIRS_ROW(2),
#if RC_REGISTERS == 32
    RC_PAIRS_ROW(3),
#endif
};
#undef RC_PAIRS_OF
#undef RC_PAIRS_ROW

/* Of the next tile, where so many vectors are left. */
RC_INLINE const RC_NAME(pairs_functions) *RC_NAME(pairs_of)(int vectors) { return &RC_NAME(pairs)[rc_min(vectors, VECTORS)]; }

/* N (d_v x QUERIES) += P V of `keys` keys, for the first V vectors of queries. */
static void RC_NAME(add_values)(int d_v, int V, ptrdiff_t keys, const REAL *P, const REAL *values, REAL *N) {
    const int blocks = rc_blocks(d_v, ROWS);
    for (int b = 0; b < blocks; b++) {
        const int c0 = rc_block_start(d_v, blocks, b), c1 = rc_block_start(d_v, blocks, b + 1);
        for (int v = 0; v < V; v += VECTORS)
            RC_NAME(product)[c1 - c0][rc_min(VECTORS, V - v)](keys, P + v * LANES, QUERIES, values + c0, d_v,
                                                             N + c0 * QUERIES + v * LANES, QUERIES, RC_ADD, 0);
    }
}

/* Blocks after which sums over keys go on from 0: added to a long sum, equal terms are all rounded to the same side.
 * rounding.sums_rounding counts with it. */
enum { RC_NAME(STRETCH) = 16 };

static size_t RC_NAME(forward_workspace)(const rc_exact_problem *p) {
    return QUERIES * (sizeof(REAL) * (p->d + p->d_v + BLOCK) + sizeof(double) * p->d_v);
}

static void RC_NAME(pack_keys)(const rc_exact_problem *p, ptrdiff_t head, ptrdiff_t block) {
    const ptrdiff_t j0 = block * BLOCK, padded = rc_round_up(p->n_k, BLOCK);
    RC_NAME(pack_rows)((const REAL *)p->k + (head * p->n_k + j0) * p->d, p->d, p->n_k - j0, BLOCK,
                  (REAL *)p->key_pack + (head * padded + j0) * p->d);
}

static void RC_NAME(pack_values)(const rc_exact_problem *p, ptrdiff_t head, ptrdiff_t block) {
    const ptrdiff_t j0 = block * BLOCK, padded = rc_round_up(p->n_k, BLOCK);
    RC_NAME(pack_rows)((const REAL *)p->v + (head * p->n_k + j0) * p->d_v, p->d_v, p->n_k - j0, BLOCK,
                  (REAL *)p->value_pack + (head * padded + j0) * p->d_v);
}

static void RC_NAME(forward)(const rc_exact_problem *p, ptrdiff_t head, ptrdiff_t group, ptrdiff_t piece, const void *q, void *o,
                             void *workspace) {
    const ptrdiff_t d = p->d, d_v = p->d_v, row0 = piece * QUERIES, rows = rc_min(QUERIES, p->n - row0);
    const ptrdiff_t slot = (head * p->groups + group) * p->n + row0, padded = rc_round_up(p->n_k, BLOCK);
    const RC_NAME(masking) masking = RC_NAME(masking_of)(p, head, group);
    const int V = (int)((rows + LANES - 1) / LANES); /* vectors of queries that there are */
    REAL *queries = workspace, *P = queries + d * QUERIES, *N = P + BLOCK * QUERIES;
    REAL maximum[QUERIES];
    /* Of the stretches before this one, where there are any. */
    double sum[QUERIES], sum_before[QUERIES] = {0}, *before = (double *)(N + d_v * QUERIES);
    int blocks = 0;
    const int bounded = p->bounded[head];
    RC_NAME(tile_load)(q, d, rows, d, p->factor ? 1 : (REAL)(p->scale * LOG2E), 0, queries, QUERIES);
    for (ptrdiff_t i = 0; i < d_v * QUERIES; i++)
        N[i] = 0;
    /* The lowest number, below every score that is not masked, and finite, so that a masked score minus the maximum is
     * -inf and not NaN. */
    for (int i = 0; i < QUERIES; i++) {
        maximum[i] = bounded ? 0 : RC_BITS == 32 ? -(REAL)__FLT_MAX__ : -(REAL)__DBL_MAX__;
        sum[i] = 0;
    }
    ptrdiff_t first, last;
    RC_NAME(visible_keys)(p, row0, row0 + rows, &first, &last);
    for (ptrdiff_t j0 = first / BLOCK * BLOCK; j0 < last; j0 += BLOCK, blocks++) {
        const ptrdiff_t keys = rc_min(BLOCK, last - j0);
        const RC_NAME(masking) *m = RC_NAME(needs_tables)(&masking, row0, QUERIES, j0, keys) ? &masking : 0;
        if (blocks && blocks % RC_NAME(STRETCH) == 0) {
            for (ptrdiff_t i = 0; i < d_v * QUERIES; i++) {
                before[i] = N[i] + (blocks == RC_NAME(STRETCH) ? 0 : before[i]);
                N[i] = 0;
            }
            for (int i = 0; i < QUERIES; i++) {
                sum_before[i] += sum[i];
                sum[i] = 0;
            }
        }
        const REAL *pack = (const REAL *)p->key_pack + (head * padded + j0) * d;
        vreal part[QUERIES / LANES];
        for (int v = 0; v < V; v++)
            part[v] = (vreal){0};
        if (bounded) {
            for (ptrdiff_t j = 0; j < keys; j += KEYS)
                for (int v = 0, i = 0; v < V; v += VECTORS, i += TILE)
                    if (m)
                        RC_NAME(pairs_of)(V - v)->masked(d, queries + i, pack + j * d, P + j * QUERIES + i, part + v, m,
                                                         row0 + i, j0 + j);
                    else
                        RC_NAME(pairs_of)(V - v)->plain(d, queries + i, pack + j * d, P + j * QUERIES + i, part + v);
        } else {
            vreal largest[QUERIES / LANES];
            for (int v = 0; v < V; v++)
                largest[v] = LOAD(maximum + v * LANES);
            for (ptrdiff_t j = 0; j < keys; j += KEYS)
                for (int v = 0, i = 0; v < V; v += VECTORS, i += TILE)
                    RC_NAME(pairs_of)(V - v)->scores(d, queries + i, pack + j * d, P + j * QUERIES + i, largest + v, m,
                                                     row0 + i, j0 + j);
            const REAL gain = (REAL)p->gain;
            for (int v = 0; v < V; v++) {
                vreal was = LOAD(maximum + v * LANES), now = largest[v];
                vint grew = (vint)(now > was);
                int any = 0;
                for (int i = 0; i < LANES; i++)
                    any |= grew[i] != 0;
                if (any) {
                    REAL shrink[LANES];
                    STORE(shrink, RC_NAME(exp2)((was - now) * gain));
                    for (ptrdiff_t c = 0; c < d_v; c++)
                        STORE(N + c * QUERIES + v * LANES, LOAD(N + c * QUERIES + v * LANES) * LOAD(shrink));
                    for (ptrdiff_t c = 0; blocks >= RC_NAME(STRETCH) && c < d_v; c++)
                        for (int i = 0; i < LANES; i++)
                            before[c * QUERIES + v * LANES + i] *= shrink[i];
                    for (int i = 0; i < LANES; i++) {
                        sum[v * LANES + i] *= shrink[i];
                        sum_before[v * LANES + i] *= shrink[i];
                    }
                    STORE(maximum + v * LANES, now);
                }
                vreal added = {0}; /* in a register: see weights_bounded */
                for (ptrdiff_t j = 0; j < rc_round_up(keys, KEYS); j++) {
                    vreal e = RC_NAME(exp2)((LOAD(P + j * QUERIES + v * LANES) - now) * gain);
                    added += e;
                    STORE(P + j * QUERIES + v * LANES, e);
                }
                part[v] = added;
            }
        }
        REAL flat[QUERIES];
        for (int v = 0; v < V; v++)
            STORE(flat + v * LANES, part[v]);
        for (int i = 0; i < V * LANES; i++)
            sum[i] += flat[i];
        RC_NAME(add_values)((int)d_v, V, keys, P, (const REAL *)p->v + (head * p->n_k + j0) * d_v, N);
    }
    REAL inverse[QUERIES];
    for (ptrdiff_t i = 0; i < QUERIES; i++) {
        const double whole = sum_before[i] + sum[i];
        inverse[i] = whole > 0 ? (REAL)(1 / whole) : 0;
        if (i < rows) {
            ((REAL *)p->maximum)[slot + i] = maximum[i];
            ((REAL *)p->inverse)[slot + i] = inverse[i];
            if (p->lse)
                p->lse[slot + i] = whole > 0 ? LN2 * (maximum[i] * p->gain + __builtin_log2(whole)) : -__builtin_inf();
        }
    }
    for (ptrdiff_t i = 0; blocks > RC_NAME(STRETCH) && i < d_v * QUERIES; i++)
        N[i] = (REAL)(N[i] + before[i]);
    for (ptrdiff_t c = 0; c < d_v; c++)
        for (int v = 0; v < V; v++)
            STORE(N + c * QUERIES + v * LANES, LOAD(N + c * QUERIES + v * LANES) * LOAD(inverse + v * LANES));
    RC_NAME(tile_load)(N, QUERIES, d_v, rows, 1, 0, o, (int)d_v);
}

/* <x, y> of `width` entries. */
static REAL RC_NAME(dot)(const REAL *x, const REAL *y, ptrdiff_t width) {
    vreal sums = {0};
    ptrdiff_t c = 0;
    for (; c + LANES <= width; c += LANES)
        sums += LOAD(x + c) * LOAD(y + c);
    REAL dot = 0;
    for (; c < width; c++)
        dot += x[c] * y[c];
    for (int i = 0; i < LANES; i++)
        dot += sums[i];
    return dot;
}

static void RC_NAME(prepare)(const rc_exact_problem *p, ptrdiff_t group, ptrdiff_t tile) {
    const ptrdiff_t d = p->d, d_v = p->d_v, row0 = tile * TILE, rows = rc_min(TILE, p->n - row0), slot = group * p->n + row0;
    const ptrdiff_t tiles = (p->n + TILE - 1) / TILE, wide = rc_round_up(d, LANES), wide_v = rc_round_up(d_v, LANES);
    const REAL *grad = (const REAL *)p->grad_rows + slot * wide_v, *o = (const REAL *)p->o + slot * d_v;
    REAL *stats = (REAL *)p->row_stats + (group * tiles + tile) * 3 * TILE;
    RC_NAME(tile_load)((const REAL *)p->q_rows + slot * wide, wide, rows, d, p->factor ? 1 : (REAL)(p->scale * LOG2E), 0,
                       (REAL *)p->q_tiles + (group * tiles + tile) * d * TILE, TILE);
    RC_NAME(tile_load)(grad, wide_v, rows, d_v, 1, 0, (REAL *)p->grad_tiles + (group * tiles + tile) * d_v * TILE, TILE);
    for (ptrdiff_t i = 0; i < TILE; i++) {
        /* What is no row, or sees no key, has a maximum by which every weight is 0: inf * 0 would be NaN. */
        const REAL inverse = i < rows ? ((const REAL *)p->inverse)[slot + i] : 0;
        stats[i] = inverse > 0 ? ((const REAL *)p->maximum)[slot + i] : RC_BITS == 32 ? (REAL)1e38 : (REAL)1e307;
        stats[TILE + i] = inverse;
        stats[2 * TILE + i] = i < rows ? RC_NAME(dot)(grad + i * wide_v, o + i * d_v, d_v) : 0;
    }
}

/* P = the normalised weights of KEYS keys. */
RC_NOINLINE void RC_NAME(weights_known)(ptrdiff_t d, const REAL *queries, const REAL *keys, REAL *P, const REAL *stats,
                                        REAL gain, const RC_NAME(masking) * m, ptrdiff_t row0, ptrdiff_t j) {
    vreal acc[KEYS][VECTORS];
    RC_NAME(dots)(VECTORS, acc, d, queries, TILE, keys);
    if (m)
        RC_NAME(apply_tables)(VECTORS, acc, m, row0, j);
    RC_UNROLL for (int v = 0; v < VECTORS; v++) {
        vreal maximum = LOAD(stats + v * LANES), inverse = LOAD(stats + TILE + v * LANES);
        RC_UNROLL for (int r = 0; r < KEYS; r++)
            STORE(P + r * TILE + v * LANES, RC_NAME(exp2)((acc[r][v] - maximum) * gain) * inverse);
    }
}

/* dS = P (<do, v> - <o, do>). */
RC_NOINLINE void RC_NAME(score_gradients)(ptrdiff_t d_v, const REAL *grads, const REAL *values, const REAL *P, REAL *dS,
                                          const REAL *dots) {
    vreal acc[KEYS][VECTORS];
    RC_NAME(dots)(VECTORS, acc, d_v, grads, TILE, values);
    RC_UNROLL for (int v = 0; v < VECTORS; v++) {
        vreal mean = LOAD(dots + v * LANES);
        RC_UNROLL for (int r = 0; r < KEYS; r++)
            STORE(dS + r * TILE + v * LANES, LOAD(P + r * TILE + v * LANES) * (acc[r][v] - mean));
    }
}

static size_t RC_NAME(backward_workspace)(const rc_exact_problem *p) {
    return sizeof(REAL) * BLOCK * (2 * TILE + rc_round_up(p->d, LANES) + rc_round_up(p->d_v, LANES));
}

/* dS summed along diagonals, and multiplied by the near factor for what follows. */
static void RC_NAME(diagonals)(const RC_NAME(masking) * m, double *dsymbol, REAL *dS, ptrdiff_t keys, ptrdiff_t row0, ptrdiff_t j0) {
    for (ptrdiff_t j = 0; j < keys; j++, dS += TILE) {
        const ptrdiff_t u = row0 - (j0 + j) + m->n_k - 1;
        if (dsymbol)
            for (int i = 0; i < TILE; i++)
                dsymbol[u + i] += dS[i];
        if (m->factor)
            for (int i = 0; i < TILE; i++)
                dS[i] *= m->factor[u + i];
    }
}

static void RC_NAME(backward)(const rc_exact_problem *p, ptrdiff_t block, void *dk_rows, void *dv_rows, void *workspace) {
    const ptrdiff_t d = p->d, d_v = p->d_v, n = p->n, tiles = (n + TILE - 1) / TILE;
    const ptrdiff_t wide = rc_round_up(d, LANES), wide_v = rc_round_up(d_v, LANES);
    const ptrdiff_t table = BLOCK + n + p->n_k - 1 + TILE, segment = block % p->segments;
    const ptrdiff_t j0 = block * BLOCK, keys = rc_min(BLOCK, p->n_k - j0), keys_up = rc_round_up(keys, KEYS);
    REAL *P = workspace, *dS = P + BLOCK * TILE, *dk = dS + BLOCK * TILE, *dv = dk + BLOCK * wide;
    const REAL *k_pack = (const REAL *)p->key_pack + j0 * d, *v_pack = (const REAL *)p->value_pack + j0 * d_v;
    for (ptrdiff_t i = 0; i < BLOCK * (wide + wide_v); i++)
        dk[i] = 0;
    for (ptrdiff_t i = keys_up * TILE; i < BLOCK * TILE; i++)
        P[i] = dS[i] = 0;
    const ptrdiff_t row_first = p->hi < j0 ? rc_min(n, j0 - p->hi) : 0;
    const ptrdiff_t row_last = p->lo > j0 + keys - n ? rc_max(0, j0 + keys - p->lo) : n;
    for (ptrdiff_t group = 0; group < p->groups; group++) {
        const RC_NAME(masking) masking = RC_NAME(masking_of)(p, 0, group);
        double *dsymbol = p->dsymbol ? p->dsymbol + (segment * p->groups + group) * table + BLOCK : 0;
        for (ptrdiff_t tile = row_first / TILE; tile * TILE < row_last; tile++) {
            const ptrdiff_t row0 = tile * TILE, rows = rc_min(TILE, n - row0), at = group * tiles + tile;
            const REAL *q = (const REAL *)p->q_tiles + at * d * TILE, *g = (const REAL *)p->grad_tiles + at * d_v * TILE;
            const REAL *stats = (const REAL *)p->row_stats + at * 3 * TILE;
            const RC_NAME(masking) *m = RC_NAME(needs_tables)(&masking, row0, TILE, j0, keys) ? &masking : 0;
            /* Of the block's keys those that a row of the tile sees: [a, b), from `from` to a whole number of steps. */
            ptrdiff_t a, b;
            RC_NAME(visible_keys)(p, row0, row0 + rows, &a, &b);
            const ptrdiff_t from = rc_max(0, a - j0) / STEP * STEP, end = rc_min(keys, b - j0);
            const ptrdiff_t end_up = rc_min(keys_up, rc_round_up(end, STEP)), whole = rc_round_up(end, STEP) - from;
            for (ptrdiff_t j = from; j < end_up; j += KEYS)
                RC_NAME(weights_known)(d, q, k_pack + j * d, P + j * TILE, stats, (REAL)p->gain, m, row0, j0 + j);
            for (ptrdiff_t j = from; j < end_up; j += KEYS)
                RC_NAME(score_gradients)(d_v, g, v_pack + j * d_v, P + j * TILE, dS + j * TILE, stats + 2 * TILE);
            RC_NAME(columns)(whole, wide_v, rows, (const REAL *)p->grad_rows + (group * n + row0) * wide_v, P + from * TILE,
                             dv + from * wide_v);
            if (dsymbol || p->factor)
                RC_NAME(diagonals)(&masking, dsymbol, dS + from * TILE, end - from, row0, j0 + from);
            RC_NAME(columns)(whole, wide, rows, (const REAL *)p->q_rows + (group * n + row0) * wide, dS + from * TILE,
                             dk + from * wide);
            RC_NAME(product_tile)((int)d, VECTORS, end - from, dS + from * TILE, (const REAL *)p->k + (j0 + from) * d, d,
                                  (REAL *)p->dq_segments + ((segment * p->groups + group) * tiles + tile) * d * TILE);
        }
    }
    for (ptrdiff_t j = 0; j < keys; j++) {
        REAL *dk_out = (REAL *)dk_rows + j * d, *dv_out = (REAL *)dv_rows + j * d_v;
        for (ptrdiff_t a = 0; a < d; a++)
            dk_out[a] = (REAL)p->grad_scale * dk[j * wide + a];
        for (ptrdiff_t c = 0; c < d_v; c++)
            dv_out[c] = dv[j * wide_v + c];
    }
}

static void RC_NAME(collect)(const rc_exact_problem *p, ptrdiff_t group, ptrdiff_t tile, void *dq_rows) {
    const ptrdiff_t d = p->d, rows = rc_min(TILE, p->n - tile * TILE), tiles = (p->n + TILE - 1) / TILE;
    REAL *sum = (REAL *)p->dq_segments + (group * tiles + tile) * d * TILE, *dq = dq_rows;
    for (ptrdiff_t s = 1; s < p->segments; s++)
        for (ptrdiff_t i = 0; i < d * TILE; i++)
            sum[i] += sum[s * p->groups * tiles * d * TILE + i];
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t a = 0; a < d; a++)
            dq[i * d + a] = (REAL)p->grad_scale * sum[a * TILE + i];
}

static const rc_exact_functions RC_NAME(functions) = {
    QUERIES,
    TILE,
    BLOCK,
    STEP,
    LANES,
    RC_NAME(forward_workspace),
    RC_NAME(backward_workspace),
    RC_NAME(pack_keys),
    RC_NAME(pack_values),
    RC_NAME(forward),
    RC_NAME(prepare),
    RC_NAME(backward),
    RC_NAME(collect),
};
