/* The sum of a state, state += phi^T columns, for one precision (include after product.template.h and row_features.template.h).
 *
 * Lanes are monomials; the top degree is made a panel at a time. What bounds it: the multiply-adds, and then the features. AVX-512
 * on a Zen 4, 96 tokens, (d, degree) = (8, 4): 122 ns a token, of which the peak would take 75; 20 are features of low degrees, 13
 * the vectors of the top degree that several runs have a part of, 6 the product that each other vector of it takes. To store all of
 * those as well would take 10 more.
 */
#undef PANEL
#undef FUSED
#define PANEL (4 * VECTORS) /* vectors of the top degree that are made at a time */
#define FUSED 2             /* blocks of columns up to which the top degree is made as it is multiplied */

/* C[r][v] += sum_k A_k[at[v]] A_k[by[v]] B_k[r], a vector and a scalar of row A_k: what is multiplied is made on the way, by one
 * more product for each R. */
RC_INLINE void RC_NAME(scaled_block)(const int R, const int V, ptrdiff_t K, const REAL *A, ptrdiff_t lda, const ptrdiff_t *at,
                                     const ptrdiff_t *by, const REAL *B, ptrdiff_t ldb, REAL *C, ptrdiff_t ldc) {
    vreal acc[ROWS][VECTORS];
    const REAL *a[VECTORS], *x[VECTORS];
    RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vreal){0};
    RC_UNROLL for (int v = 0; v < V; v++) a[v] = A + at[v], x[v] = A + by[v];
    for (ptrdiff_t k = 0, i = 0; k < K; k++, i += lda, B += ldb) {
        vreal ax[VECTORS];
        RC_UNROLL for (int v = 0; v < V; v++) ax[v] = LOAD(a[v] + i) * x[v][i];
        RC_UNROLL for (int r = 0; r < R; r++) {
            vreal b = SPLAT(B[r]);
            RC_UNROLL for (int v = 0; v < V; v++) acc[r][v] += ax[v] * b;
        }
    }
    RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int v = 0; v < V; v++)
        STORE(C + r * ldc + v * LANES, LOAD(C + r * ldc + v * LANES) + acc[r][v]);
}
typedef void (*RC_NAME(scaled_function))(ptrdiff_t K, const REAL *A, ptrdiff_t lda, const ptrdiff_t *at, const ptrdiff_t *by,
                                         const REAL *B, ptrdiff_t ldb, REAL *C, ptrdiff_t ldc);
#define RC_SCALED(R, V)                                                                                                   \
    RC_NOINLINE void RC_NAME(scaled_##R##_##V)(ptrdiff_t K, const REAL *A, ptrdiff_t lda, const ptrdiff_t *at,            \
                                               const ptrdiff_t *by, const REAL *B, ptrdiff_t ldb, REAL *C, ptrdiff_t ldc) { \
        RC_NAME(scaled_block)(R, V, K, A, lda, at, by, B, ldb, C, ldc);                                                   \
    }
RC_SIZES(RC_SCALED)
static const RC_NAME(scaled_function) RC_NAME(scaled_product)[ROWS + 1][VECTORS + 1] = RC_TABLE_OF(scaled);
#undef RC_SCALED

/* state[c][f] += sum_t features[t][f] columns[t][c] for f < width; the last vector runs into zeros. */
static void RC_NAME(add_product)(const RC_NAME(monomials) * y, int tokens, const REAL *features, ptrdiff_t pitch, ptrdiff_t width,
                                 const REAL *columns, ptrdiff_t ld, REAL *state) {
    const int blocks = rc_blocks((int)y->columns, ROWS);
    for (ptrdiff_t f = 0; f < width; f += VECTORS * LANES) {
        const ptrdiff_t vectors = rc_min(VECTORS, (width - f + LANES - 1) / LANES);
        for (int b = 0; b < blocks; b++) {
            const int c0 = rc_block_start((int)y->columns, blocks, b), c1 = rc_block_start((int)y->columns, blocks, b + 1);
            RC_NAME(product)[c1 - c0][vectors](tokens, features + f, pitch, columns + c0, ld, state + c0 * y->pitch + f, y->pitch,
                                               RC_ADD, 0);
        }
    }
}

/* state[c][f] += sum_t row_t[at[v] + lane] row_t[by[v]] columns[t][c] for the lanes f of so many vectors. */
static void RC_NAME(add_scaled_product)(const RC_NAME(monomials) * y, int tokens, const REAL *rows, ptrdiff_t pitch, ptrdiff_t vectors,
                                        const ptrdiff_t *at, const ptrdiff_t *by, const REAL *columns, ptrdiff_t ld, REAL *state) {
    const int blocks = rc_blocks((int)y->columns, ROWS);
    for (ptrdiff_t v = 0; v < vectors; v += VECTORS)
        for (int b = 0; b < blocks; b++) {
            const int c0 = rc_block_start((int)y->columns, blocks, b), c1 = rc_block_start((int)y->columns, blocks, b + 1);
            RC_NAME(scaled_product)[c1 - c0][rc_min(VECTORS, vectors - v)](tokens, rows, pitch, at + v, by + v, columns + c0, ld,
                                                                           state + c0 * y->pitch + v * LANES, y->pitch);
        }
}

/* Elements of a row of `update`: the degrees below the top one, a panel of that, and what loads run over. */
static ptrdiff_t RC_NAME(row_pitch)(const RC_NAME(monomials) * y, int degree) {
    return (((RC_NAME(below)(y, degree) + LANES - 1) / LANES + PANEL + 1) | 1) * LANES;
}

/* state[c][f] += sum_t phi_f(x_t) columns[t][c] over all monomials of degree <= `degree`, the state's own degree. `rows` is
 * [token][row_pitch]; x can be read a vector past its end.
 *
 * Where columns are few, a vector of the top degree that is inside of a run is not stored: the product multiplies it by x_m as it
 * loads it, once for each block of columns. */
static void RC_NAME(update)(const RC_NAME(monomials) * y, int degree, const RC_NAME(source) * sources, int tokens, const REAL *x,
                            const REAL *columns, ptrdiff_t ld, REAL *rows, REAL *state) {
    const ptrdiff_t low_end = RC_NAME(below)(y, degree), top = rc_round_up(RC_NAME(count)(y, degree, y->d), LANES) / LANES;
    const ptrdiff_t pitch = RC_NAME(row_pitch)(y, degree), panel = rc_round_up(low_end, LANES);
    const int fused = rc_blocks((int)y->columns, ROWS) <= FUSED;
    RC_NAME(low_degrees)(y, degree, sources, tokens, x, rows, pitch);
    RC_NAME(add_product)(y, tokens, rows, pitch, low_end, columns, ld, state);
    const RC_NAME(source) *source = RC_NAME(sources_of)(y, degree, sources);
    for (ptrdiff_t first = 0; first < top; first += PANEL) {
        const ptrdiff_t vectors = rc_min(PANEL, top - first);
        ptrdiff_t at[PANEL], by[PANEL];
        for (ptrdiff_t v = 0; v < vectors; v++, source++) {
            const int inside = fused && source->one_run;
            at[v] = inside ? y->offset[degree - 1] + source->from : panel + v * LANES;
            by[v] = inside ? y->offset[1] + source->m : 0;
            if (!inside)
                RC_NAME(next_degree)(y, degree, source, 1, tokens, x, rows, pitch, rows + panel + v * LANES);
        }
        REAL *to = state + y->offset[degree] + first * LANES;
        if (fused)
            RC_NAME(add_scaled_product)(y, tokens, rows, pitch, vectors, at, by, columns, ld, to);
        else
            RC_NAME(add_product)(y, tokens, rows + panel, pitch, vectors * LANES, columns, ld, to);
    }
}

