#include "simd.h"
#include "product.template.h"
#include "transpose.template.h"
#include "fold.template.h"
#include "exp2.template.h"
#include "scores.template.h"
#include "row_features.template.h"
#include "update.template.h"
#include "features.template.h"

/* The pieces of polynomial attention, for one precision: what monomials.h names, made of features.template.h's three
 * products and, inside a causal chunk, of the exact scores of scores.template.h.
 *
 * Sums over tokens start from zero in every product and are gathered in a `part` of the data's precision, which is
 * folded into a float64 `master` every FOLD updates: a sum of a million tokens is never longer than a few hundred. */

#define UPDATE_TOKENS 96
#define ROW_BYTES (320 * 1024) /* of features of an update's tokens: they stay in L2 */
#define FOLD 32
#define CHUNK 192 /* the longest chunk: a multiple of UPDATE_TOKENS, BLOCK, TILE and WIDE at every level */
#define AHEAD (TILE + 2 * KEYS) /* distances below 0 that a block of exact pairs reaches */

/* What one task works in; lay_out cuts it from the task's workspace. */
typedef struct {
    RC_NAME(monomials) y;
    RC_NAME(source) *sources;                         /* of updates; made by start_state */
    ptrdiff_t first, block; /* the first column of values, and the block of columns that begins there */
    int update_tokens;
    ptrdiff_t wide, wide_columns;
    REAL *x, *columns, *rows;                         /* update: [token][d], [token][wide_columns], features */
    REAL *part, *base;                                /* (columns, pitch): since the last fold; all up to it, rounded */
    double *master;                                   /* (columns, pitch): what has been added to `start` up to the last fold */
    const double *start;                              /* NULL or (columns, pitch), to be multiplied by `fallen` */
    double fallen;
    REAL *packed, *grad_packed;                       /* the scan's own */
    REAL *xt, *xt_top, *scaled, *phi, *N, *dN, *dphi, *dx, *moment, *ratio; /* tiles by token lanes */
    REAL *keys, *key_columns, *key_pack, *column_pack; /* a chunk's keys: [key][d], [key][wide_columns], packed */
    REAL *query_rows, *query_columns;                 /* a chunk's queries: [row][d], [row][wide_columns] */
    REAL *E, *dE, *dk, *dv;                           /* exact pairs: [BLOCK][TILE]; [CHUNK][wide], [CHUNK][wide_columns] */
    double chunk_fall;                                /* what a chunk's length does to a weight, not rounded to REAL */
    REAL *fall;                                       /* what a distance does to a weight: 0 below 0, e^{-decay m} from m = 0 on */
} RC_NAME(room);

static REAL *RC_NAME(take)(char *base, size_t *used, ptrdiff_t count) {
    REAL *p = base ? (REAL *)(base + *used) : 0;
    *used += (size_t)rc_round_up((count + LANES) * (ptrdiff_t)sizeof(REAL), 64); /* stores may run over by a vector */
    return p;
}

static RC_NAME(monomials) RC_NAME(monomials_of)(const rc_monomials_problem *p) {
    return (RC_NAME(monomials)){p->d, p->d_v + 1, p->pitch, p->offset, p->count};
}

static size_t RC_NAME(lay_out)(const rc_monomials_problem *p, char *base, RC_NAME(room) * w) {
    const ptrdiff_t d = p->d;
    w->y = RC_NAME(monomials_of)(p);
    w->first = w->block = 0;
    const ptrdiff_t columns = w->y.columns, state = columns * p->pitch;
    const ptrdiff_t low = RC_NAME(below)(&w->y, p->state_degree);
    const ptrdiff_t row = RC_NAME(row_pitch)(&w->y, p->state_degree);
    w->update_tokens = (int)rc_max(16, rc_min(UPDATE_TOKENS, ROW_BYTES / (ptrdiff_t)sizeof(REAL) / row / 16 * 16));
    w->wide = rc_round_up(d, LANES);
    w->wide_columns = rc_round_up(columns, LANES);
    size_t used = 0;
    w->master = (double *)RC_NAME(take)(base, &used, state * (ptrdiff_t)(sizeof(double) / sizeof(REAL)));
    w->part = RC_NAME(take)(base, &used, state);
    w->base = RC_NAME(take)(base, &used, state);
    w->packed = RC_NAME(take)(base, &used, (ptrdiff_t)p->packed_size);
    w->grad_packed = RC_NAME(take)(base, &used, (ptrdiff_t)p->grad_packed_size);
    w->sources = (RC_NAME(source) *)RC_NAME(take)(
        base, &used, RC_NAME(source_count)(&w->y, p->state_degree) * (ptrdiff_t)(sizeof(RC_NAME(source)) / sizeof(REAL)));
    w->x = RC_NAME(take)(base, &used, UPDATE_TOKENS * w->wide);
    w->columns = RC_NAME(take)(base, &used, UPDATE_TOKENS * w->wide_columns);
    w->rows = RC_NAME(take)(base, &used, w->update_tokens * row);
    w->xt = RC_NAME(take)(base, &used, d * TILE);
    w->xt_top = RC_NAME(take)(base, &used, d * TILE);
    w->scaled = RC_NAME(take)(base, &used, d * TILE);
    w->phi = RC_NAME(take)(base, &used, low * TILE);
    w->N = RC_NAME(take)(base, &used, columns * TILE);
    w->dN = RC_NAME(take)(base, &used, columns * TILE);
    w->dphi = RC_NAME(take)(base, &used, (low + GRAD_ROWS) * WIDE);
    w->dx = RC_NAME(take)(base, &used, d * TILE);
    w->moment = RC_NAME(take)(base, &used, TILE);
    w->ratio = RC_NAME(take)(base, &used, TILE);
    w->keys = RC_NAME(take)(base, &used, CHUNK * d);
    w->key_columns = RC_NAME(take)(base, &used, CHUNK * w->wide_columns);
    w->key_pack = RC_NAME(take)(base, &used, CHUNK * d);
    w->column_pack = RC_NAME(take)(base, &used, CHUNK * columns);
    w->query_rows = RC_NAME(take)(base, &used, CHUNK * d);
    w->query_columns = RC_NAME(take)(base, &used, CHUNK * w->wide_columns);
    w->E = RC_NAME(take)(base, &used, BLOCK * TILE);
    w->dE = RC_NAME(take)(base, &used, BLOCK * TILE);
    w->dk = RC_NAME(take)(base, &used, (CHUNK + COLUMN_SLACK) * w->wide);
    w->dv = RC_NAME(take)(base, &used, (CHUNK + COLUMN_SLACK) * w->wide_columns);
    w->fall = RC_NAME(take)(base, &used, AHEAD + CHUNK + TILE);
    w->fall = w->fall ? w->fall + AHEAD : 0;
    return used;
}

static size_t RC_NAME(workspace)(const rc_monomials_problem *p) {
    RC_NAME(room) w;
    return RC_NAME(lay_out)(p, 0, &w);
}

static size_t RC_NAME(packed_size)(const rc_monomials_problem *p) {
    const RC_NAME(monomials) y = RC_NAME(monomials_of)(p);
    return RC_NAME(evaluate_size)(&y, p->degree);
}

static size_t RC_NAME(grad_packed_size)(const rc_monomials_problem *p) {
    const RC_NAME(monomials) y = RC_NAME(monomials_of)(p);
    return RC_NAME(differentiate_size)(&y, p->grad_degree);
}

#include "states.template.h"
#include "pairs.template.h"

/* ---- forward ---- */

/* N, and moment where it is wanted, of a tile of queries in xt: rows [row, row + rows). */
static void RC_NAME(evaluate_queries)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t lane, ptrdiff_t row, ptrdiff_t rows,
                                      const REAL *packed) {
    REAL *ratio = 0, *top = w->xt, *moment = p->moment ? w->moment : 0;
    if (p->ratio) {
        const REAL *below = (const REAL *)p->ratio + lane * p->n + row, *further = below + p->heads * p->groups * p->n;
        ratio = w->ratio, top = w->xt_top;
        for (ptrdiff_t i = 0; i < TILE; i++)
            ratio[i] = i < rows ? further[i] : 0;
        for (ptrdiff_t a = 0; a < p->d; a++)
            for (ptrdiff_t i = 0; i < TILE; i++)
                top[a * TILE + i] = w->xt[a * TILE + i] * ratio[i];
        for (ptrdiff_t i = 0; i < rows; i++)
            ratio[i] = below[i];
    }
    RC_NAME(evaluate)(&w->y, p->degree, p->order, w->xt, ratio, top, packed, w->phi, w->N, moment);
}

/* moment and spread of a tile, N being numerators and denominators of centred values. A denominator that is not above
 * 0, though the row sees keys, makes moment inf. */
static void RC_NAME(finish_certificate)(const rc_monomials_problem *p, const RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t first,
                                        ptrdiff_t rows, ptrdiff_t chunk) {
    const REAL *reach = (const REAL *)p->reach + (head * p->reaches + rc_min(chunk, p->reaches - 1)) * 3 * p->width;
    const REAL *middle = reach + w->first, *half = middle + p->width, *per_range = half + p->width;
    const REAL *den = w->N + p->d_v * TILE, *inverse = (const REAL *)p->inverse + first;
    REAL *moment = (REAL *)p->moment + first, *spread = (REAL *)p->spread + first;
    for (ptrdiff_t i = 0; i < rows; i++) {
        moment[i] = den[i] > 0 ? w->moment[i] * inverse[i] : den[i] == 0 ? 0 : (REAL)__builtin_inf();
        spread[i] = 0;
    }
    for (ptrdiff_t c = 0; c < p->d_v; c++)
        for (ptrdiff_t i = 0; i < rows; i++) {
            const REAL off = w->N[c * TILE + i] * inverse[i] - middle[c];
            const REAL reached = (half[c] + (off < 0 ? -off : off)) * per_range[c];
            spread[i] = reached > spread[i] ? reached : spread[i];
        }
}

/* o of a tile from N: rows by whole vectors, as far as what runs over is overwritten by the next row of the same tile. */
static void RC_NAME(store_rows)(const rc_monomials_problem *p, const REAL *N, const REAL *middle, ptrdiff_t rows, REAL *o) {
    const ptrdiff_t d_v = p->d_v, width = p->width, wide = rc_round_up(d_v, LANES);
    const ptrdiff_t whole = wide > d_v && p->blocks > 1 ? 0 : RC_NAME(whole_rows)(o, o + (rows - 1) * width + d_v, width, wide, rows);
    const REAL *den = N + d_v * TILE;
    for (ptrdiff_t i = 0; i < whole; i += LANES) {
        const vint seen = LOAD(den + i) > 0;
        const vreal inverse = 1 / LOAD(den + i);
        for (ptrdiff_t c = wide - LANES; c >= 0; c -= LANES) { /* a row's end runs over into the beginning of the next */
            vreal block[LANES];
            RC_UNROLL for (int l = 0; l < LANES; l++) {
                block[l] = (vreal){0};
                if (c + l < d_v)
                    block[l] = (vreal)((vint)(middle[c + l] + LOAD(N + (c + l) * TILE + i) * inverse) & seen);
            }
            RC_NAME(transpose)(block);
            RC_UNROLL for (int l = 0; l < LANES; l++) if (i + l < whole) STORE(o + (i + l) * width + c, block[l]);
        }
    }
    for (ptrdiff_t i = whole; i < rows; i++)
        for (ptrdiff_t c = 0; c < d_v; c++)
            o[i * width + c] = den[i] > 0 ? middle[c] + N[c * TILE + i] * (1 / den[i]) : 0;
}

/* o, inverse, lse and certificate of a tile from N; <x, k_factor centre> is what centring took from a row's scores. */
static void RC_NAME(finish)(const rc_monomials_problem *p, const RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t lane, ptrdiff_t row,
                            ptrdiff_t rows, ptrdiff_t chunk) {
    const REAL *N = w->N, *den = N + p->d_v * TILE, *centre = RC_NAME(centre)(p, head);
    const REAL *middle = (const REAL *)p->value_centre + head * p->width + w->first;
    const ptrdiff_t first = (w->block * p->heads * p->groups + lane) * p->n + row; /* of what there is for each row */
    REAL *o = (REAL *)p->o + (lane * p->n + row) * p->width + w->first, *inverse = (REAL *)p->inverse + first;
    for (ptrdiff_t i = 0; i < rows; i++)
        inverse[i] = den[i] > 0 ? 1 / den[i] : 0;
    if (p->moment)
        RC_NAME(finish_certificate)(p, w, head, first, rows, chunk);
    RC_NAME(store_rows)(p, N, middle, rows, o);
    if (p->lse)
        for (ptrdiff_t i = 0; i < rows; i++) {
            double shift = 0;
            for (ptrdiff_t a = 0; centre && a < p->d; a++)
                shift += (double)w->xt[a * TILE + i] * p->k_factor[head] * centre[a];
            p->lse[first + i] = den[i] > 0 ? shift + __builtin_log(den[i]) : -__builtin_inf();
        }
}

/* xt of a tile of queries. */
static void RC_NAME(load_query_tile)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t lane, ptrdiff_t row, ptrdiff_t rows) {
    RC_NAME(tile_load)(RC_NAME(queries)(p, lane, row), p->d, rows, p->d, RC_NAME(q_factor)(p, lane / p->groups), 0, w->xt,
                       TILE);
}

static void RC_NAME(forward)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t group, ptrdiff_t chunk, void *workspace) {
    RC_NAME(room) w;
    RC_NAME(lay_out)(p, workspace, &w);
    const ptrdiff_t lane = head * p->groups + group, end = rc_min(p->n, (chunk + 1) * p->chunk);
    for (ptrdiff_t row = chunk * p->chunk; row < end; row += TILE) {
        const ptrdiff_t rows = rc_min(TILE, end - row);
        RC_NAME(load_query_tile)(p, &w, lane, row, rows);
        RC_NAME(evaluate_queries)(p, &w, lane, row, rows, (const REAL *)p->packed + head * p->packed_size);
        RC_NAME(finish)(p, &w, head, lane, row, rows, 0);
    }
}

static void RC_NAME(scan_forward)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t segment, void *workspace) {
    RC_NAME(room) w;
    int updates = 0;
    RC_NAME(lay_out)(p, workspace, &w);
    double *state = p->states + (head * p->segments + segment) * w.y.columns * p->pitch;
    head = RC_NAME(take_block)(p, &w, head);
    const int onward = segment + 1 >= p->known && segment + 1 < p->segments;
    RC_NAME(start_state)(p, &w, state);
    RC_NAME(start_fall)(p, &w, head);
    for (ptrdiff_t chunk = segment * p->chunks_per_segment; chunk < (segment + 1) * p->chunks_per_segment; chunk++) {
        const ptrdiff_t first = rc_min(p->n_k, chunk * p->chunk), keys = rc_min(p->chunk, p->n_k - first);
        const ptrdiff_t begin = RC_NAME(chunk_row)(p, chunk, p->q_offset, p->n);
        const ptrdiff_t end = RC_NAME(chunk_row)(p, chunk + 1, p->q_offset, p->n);
        RC_NAME(load_chunk)(p, &w, head, first, keys);
        if (begin < end && (first > 0 || p->earlier))
            RC_NAME(evaluate_pack)(&w.y, p->degree, w.base, w.part, RC_NAME(of_head)(p, p->weights, head), w.packed);
        for (ptrdiff_t group = 0; group < p->groups; group++)
            for (ptrdiff_t row = begin; row < end; row += TILE) {
                const ptrdiff_t lane = head * p->groups + group, rows = rc_min(TILE, end - row);
                const ptrdiff_t limit = row + p->q_offset - chunk * p->chunk, seen = rc_min(keys, limit + rows);
                RC_NAME(load_query_tile)(p, &w, lane, row, rows);
                RC_NAME(scale_tile)(p, &w);
                if (first > 0 || p->earlier) {
                    RC_NAME(evaluate_queries)(p, &w, lane, row, rows, w.packed);
                    for (ptrdiff_t i = 0; p->decay && i < w.y.columns * TILE; i++)
                        w.N[i] *= w.fall[limit + i % TILE];
                    for (ptrdiff_t i = 0; p->decay && i < TILE; i++)
                        w.moment[i] *= w.fall[limit + i];
                } else {
                    for (ptrdiff_t i = 0; i < w.y.columns * TILE; i++)
                        w.N[i] = 0;
                    for (ptrdiff_t i = 0; i < TILE; i++)
                        w.moment[i] = 0;
                }
                RC_NAME(add_pairs)(p, &w, limit, seen);
                RC_NAME(finish)(p, &w, head, lane, row, rows, chunk);
            }
        if (onward || chunk + 1 < (segment + 1) * p->chunks_per_segment) {
            RC_NAME(decay_state)(p, &w, head, chunk);
            RC_NAME(add_chunk)(p, &w, keys, RC_NAME(chunk_end)(p, chunk) - first, &updates);
        }
    }
    if (onward)
        RC_NAME(go_on)(p, &w, head, segment, state + w.y.columns * p->pitch);
}

/* ---- backward ---- */

/* Gradients of rows [row, end) to which pieces are added. */
static void RC_NAME(clear_queries)(const rc_monomials_problem *p, ptrdiff_t lane, ptrdiff_t row, ptrdiff_t end) {
    memset((REAL *)p->dq + (lane * p->n + row) * p->d, 0, (size_t)((end - row) * p->d) * sizeof(REAL));
}
static void RC_NAME(clear_keys)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t row, ptrdiff_t end) {
    memset((REAL *)p->dk + (head * p->n_k + row) * p->d, 0, (size_t)((end - row) * p->d) * sizeof(REAL));
    memset((REAL *)p->dv + (head * p->n_k + row) * p->d_v, 0, (size_t)((end - row) * p->d_v) * sizeof(REAL));
}

/* dq of rows [row, end) += q_factor dx from a packed state, which is seen from token `start`. */
static void RC_NAME(differentiate_queries)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t lane, ptrdiff_t row,
                                           ptrdiff_t end, ptrdiff_t start, const REAL *packed) {
    const REAL factor = RC_NAME(q_factor)(p, lane / p->groups);
    for (; row < end; row += WIDE) {
        const ptrdiff_t rows = rc_min(WIDE, end - row);
        REAL *dq = (REAL *)p->dq + (lane * p->n + row) * p->d;
        RC_NAME(load_grad_query_tile)(p, lane, row, rows, w->xt, WIDE);
        RC_NAME(load_query_columns)(p, w, lane, row, rows, w->columns);
        RC_NAME(decay_rows)(p, w, w->fall + (row + p->q_offset - start), 1, rows, w->columns);
        RC_NAME(tile_load)(w->columns, w->wide_columns, rows, w->y.columns, 1, 0, w->dN, WIDE);
        RC_NAME(differentiate)(&w->y, p->grad_degree, w->xt, w->dN, packed, w->phi, w->dphi, w->dx);
        for (ptrdiff_t i = 0; i < rows; i++)
            for (ptrdiff_t a = 0; a < p->d; a++)
                dq[i * p->d + a] += factor * w->dx[a * WIDE + i];
    }
}

/* dk and dv of rows [row, end), and sums over queries, += from a packed gradient state, which is seen from token `stop`. */
static void RC_NAME(differentiate_keys)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t row, ptrdiff_t end,
                                        ptrdiff_t stop, const REAL *packed, const REAL *grad_packed) {
    const REAL factor = RC_NAME(k_factor)(p, head);
    REAL *dk = (REAL *)p->dk + head * p->n_k * p->d, *dv = (REAL *)p->dv + head * p->n_k * p->d_v;
    for (ptrdiff_t j = row; j < end; j += WIDE) {
        const ptrdiff_t rows = rc_min(WIDE, end - j);
        RC_NAME(load_key_tile)(p, head, j, rows, w->xt, WIDE);
        RC_NAME(load_key_columns)(p, w, head, j, rows, w->columns);
        RC_NAME(decay_rows)(p, w, w->fall + (stop - j), -1, rows, w->columns);
        RC_NAME(tile_load)(w->columns, w->wide_columns, rows, w->y.columns, 1, 0, w->dN, WIDE);
        RC_NAME(differentiate)(&w->y, p->grad_degree, w->xt, w->dN, grad_packed, w->phi, w->dphi, w->dx);
        for (ptrdiff_t i = 0; i < rows; i++)
            for (ptrdiff_t a = 0; a < p->d; a++)
                dk[(j + i) * p->d + a] += factor * w->dx[a * WIDE + i];
    }
    for (ptrdiff_t j = row; j < end; j += TILE) {
        const ptrdiff_t rows = rc_min(TILE, end - j);
        RC_NAME(load_key_tile)(p, head, j, rows, w->xt, TILE);
        RC_NAME(evaluate)(&w->y, p->degree, 0, w->xt, 0, w->xt, packed, w->phi, w->N, 0);
        for (ptrdiff_t i = 0; i < rows; i++) {
            const REAL weight = p->decay ? w->fall[stop - (j + i)] : 1;
            for (ptrdiff_t c = 0; c < p->d_v; c++)
                dv[(j + i) * p->d_v + c] += weight * w->N[c * TILE + i];
        }
        if (p->key_sums) {
            RC_NAME(load_key_columns)(p, w, head, j, rows, w->columns);
            for (ptrdiff_t i = 0; i < rows; i++)
                for (ptrdiff_t c = 0; c <= p->d_v; c++)
                    p->key_sums[head * p->n_k + j + i] += (double)w->fall[stop - (j + i)] * w->columns[i * w->wide_columns + c] * w->N[c * TILE + i];
        }
    }
}

static void RC_NAME(grad_queries)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t group, ptrdiff_t chunk, void *workspace) {
    RC_NAME(room) w;
    RC_NAME(lay_out)(p, workspace, &w);
    const ptrdiff_t lane = head * p->groups + group, row = chunk * p->chunk, end = rc_min(p->n, row + p->chunk);
    RC_NAME(clear_queries)(p, lane, row, end);
    RC_NAME(differentiate_queries)(p, &w, lane, row, end, 0, (const REAL *)p->grad_packed + head * p->grad_packed_size);
}

static void RC_NAME(grad_keys)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t chunk, void *workspace) {
    RC_NAME(room) w;
    RC_NAME(lay_out)(p, workspace, &w);
    const ptrdiff_t row = chunk * p->chunk, end = rc_min(p->n_k, row + p->chunk);
    RC_NAME(clear_keys)(p, head, row, end);
    RC_NAME(differentiate_keys)(p, &w, head, row, end, 0, (const REAL *)p->packed + head * p->packed_size,
                                (const REAL *)p->grad_packed + head * p->grad_packed_size);
}

/* What keys before their chunk give to the gradients of queries. */
static void RC_NAME(scan_grad_queries)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t segment, void *workspace) {
    RC_NAME(room) w;
    int updates = 0;
    RC_NAME(lay_out)(p, workspace, &w);
    RC_NAME(start_state)(p, &w, p->states + (head * p->segments + segment) * w.y.columns * p->pitch);
    RC_NAME(start_fall)(p, &w, head);
    for (ptrdiff_t chunk = segment * p->chunks_per_segment; chunk < (segment + 1) * p->chunks_per_segment; chunk++) {
        const ptrdiff_t first = rc_min(p->n_k, chunk * p->chunk), keys = rc_min(p->chunk, p->n_k - first);
        const ptrdiff_t begin = RC_NAME(chunk_row)(p, chunk, p->q_offset, p->n);
        const ptrdiff_t end = RC_NAME(chunk_row)(p, chunk + 1, p->q_offset, p->n);
        for (ptrdiff_t group = 0; group < p->groups; group++)
            RC_NAME(clear_queries)(p, head * p->groups + group, begin, end);
        if (begin < end && (first > 0 || p->earlier)) {
            RC_NAME(differentiate_pack)(&w.y, p->grad_degree, w.base, w.part, RC_NAME(of_head)(p, p->grad_weights, head),
                                        w.grad_packed);
            for (ptrdiff_t group = 0; group < p->groups; group++)
                RC_NAME(differentiate_queries)(p, &w, head * p->groups + group, begin, end, chunk * p->chunk, w.grad_packed);
        }
        if (chunk + 1 < (segment + 1) * p->chunks_per_segment) {
            RC_NAME(decay_state)(p, &w, head, chunk);
            RC_NAME(add_keys)(p, &w, head, first, first + keys, RC_NAME(chunk_end)(p, chunk), &updates);
        }
    }
}

/* Gradients through the pairs of a chunk's keys and the `rows` loaded queries of a lane, the first of which is `begin`:
 * w->dk and w->dv += those of keys, dq += those of queries. */
static void RC_NAME(pair_gradients)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t lane, ptrdiff_t begin, ptrdiff_t count,
                                    ptrdiff_t chunk, ptrdiff_t keys) {
    const ptrdiff_t d = p->d, wide_columns = w->wide_columns;
    const REAL factor = RC_NAME(q_factor)(p, lane / p->groups);
    for (ptrdiff_t i = 0; i < count; i += TILE) {
        const ptrdiff_t rows = rc_min(TILE, count - i);
        const ptrdiff_t limit = begin + i + p->q_offset - chunk * p->chunk, seen = rc_min(keys, limit + rows);
        const REAL *columns = w->query_columns + i * wide_columns;
        REAL *dq = (REAL *)p->dq + (lane * p->n + begin + i) * d;
        RC_NAME(tile_load)(w->query_rows + i * d, d, rows, d, 1, 0, w->xt, TILE);
        RC_NAME(scale_tile)(p, w);
        RC_NAME(tile_load)(columns, wide_columns, rows, w->y.columns, 1, 0, w->dN, TILE);
        RC_NAME(load_rows)(w->query_rows + i * d, rows, d, 1, 0, w->x, w->wide);
        for (ptrdiff_t a = 0; a < d * TILE; a++)
            w->dx[a] = 0;
        RC_NAME(tile_gradients)(p, w, rows, columns, limit, seen);
        for (ptrdiff_t t = 0; t < rows; t++)
            for (ptrdiff_t a = 0; a < d; a++)
                dq[t * d + a] += factor * w->dx[a * TILE + t];
    }
}

/* What queries after their chunk give to the gradients of keys, and what pairs inside chunks give to those of both: their
 * weights and the gradients of these are computed here alone. */
static void RC_NAME(scan_grad_keys)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t segment, void *workspace) {
    RC_NAME(room) w;
    int updates = 0;
    RC_NAME(lay_out)(p, workspace, &w);
    const ptrdiff_t d = p->d, wide = w.wide, wide_columns = w.wide_columns;
    const REAL factor = RC_NAME(k_factor)(p, head);
    double *state = p->grad_states + (head * p->segments + segment) * w.y.columns * p->pitch;
    const int onward = segment > 0 && p->segments - segment >= p->known;
    RC_NAME(start_state)(p, &w, state);
    RC_NAME(start_fall)(p, &w, head);
    for (ptrdiff_t chunk = (segment + 1) * p->chunks_per_segment - 1; chunk >= segment * p->chunks_per_segment; chunk--) {
        const ptrdiff_t first = rc_min(p->n_k, chunk * p->chunk), keys = rc_min(p->chunk, p->n_k - first);
        const ptrdiff_t begin = RC_NAME(chunk_row)(p, chunk, p->q_offset, p->n);
        const ptrdiff_t end = RC_NAME(chunk_row)(p, chunk + 1, p->q_offset, p->n);
        if (keys > 0) {
            RC_NAME(evaluate_pack)(&w.y, p->degree, w.base, w.part, RC_NAME(of_head)(p, p->weights, head), w.packed);
            RC_NAME(differentiate_pack)(&w.y, p->grad_degree, w.base, w.part, RC_NAME(of_head)(p, p->grad_weights, head),
                                        w.grad_packed);
            RC_NAME(load_chunk)(p, &w, head, first, keys);
            RC_NAME(pack_columns)(&w, keys);
            for (ptrdiff_t i = 0; i < p->chunk * wide; i++)
                w.dk[i] = 0;
            for (ptrdiff_t i = 0; i < p->chunk * wide_columns; i++)
                w.dv[i] = 0;
        }
        /* The state as it was is packed. */
        const int adds = onward || chunk > segment * p->chunks_per_segment;
        if (adds)
            RC_NAME(decay_state)(p, &w, head, chunk);
        for (ptrdiff_t group = 0; group < p->groups; group++) {
            RC_NAME(load_query_chunk)(p, &w, head * p->groups + group, begin, end - begin);
            if (keys > 0)
                RC_NAME(pair_gradients)(p, &w, head * p->groups + group, begin, end - begin, chunk, keys);
            if (adds)
                RC_NAME(add_query_chunk)(p, &w, begin, end - begin, chunk * p->chunk, &updates);
        }
        if (keys > 0) {
            REAL *dk = (REAL *)p->dk + (head * p->n_k + first) * d, *dv = (REAL *)p->dv + (head * p->n_k + first) * p->d_v;
            RC_NAME(clear_keys)(p, head, first, first + keys);
            for (ptrdiff_t j = 0; j < keys; j++) {
                for (ptrdiff_t a = 0; a < d; a++)
                    dk[j * d + a] += factor * w.dk[j * wide + a];
                for (ptrdiff_t c = 0; c < p->d_v; c++)
                    dv[j * p->d_v + c] += w.dv[j * wide_columns + c];
                for (ptrdiff_t c = 0; p->key_sums && c <= p->d_v; c++)
                    p->key_sums[head * p->n_k + first + j] += (double)w.key_columns[j * wide_columns + c] * w.dv[j * wide_columns + c];
            }
            RC_NAME(differentiate_keys)(p, &w, head, first, first + keys, RC_NAME(chunk_end)(p, chunk), w.packed, w.grad_packed);
        }
    }
    if (onward)
        RC_NAME(go_on)(p, &w, head, segment, state - w.y.columns * p->pitch);
}

static const rc_monomials_functions RC_NAME(functions) = {
    TILE,
    LANES,
    CHUNK,
    RC_NAME(workspace),
    RC_NAME(packed_size),
    RC_NAME(grad_packed_size),
    RC_NAME(sum_keys),
    RC_NAME(sum_queries),
    RC_NAME(follow),
    RC_NAME(pack),
    RC_NAME(forward),
    RC_NAME(grad_queries),
    RC_NAME(grad_keys),
    RC_NAME(scan_forward),
    RC_NAME(scan_grad_queries),
    RC_NAME(scan_grad_keys),
};
