/* Scores of a block of keys against a tile of queries, and what sums over them, for one precision (include after
 * product.template.h).
 *
 * Lanes are queries, keys are broadcast: blocks are stored [key][TILE].
 *
 * What bounds it: the multiply-adds. AVX2 on a Zen 4, keys from the L2 cache: `dots` with what is made of them without exp
 * reaches 91% of the peak at d = 16 and 97% at d = 64, `columns` of 16 queries 97% and 96%.
 */
#undef KEYS
#undef STEP
#if RC_REGISTERS == 32
#define KEYS 8 /* keys in a register block of scores */
#define STEP 48 /* a multiple of KEYS and of the keys in every block of `columns` */
#else
#define KEYS 6
#define STEP 24
#endif
#define COLUMN_SLACK 15 /* keys that `columns` may go on for past the last one */
#define BLOCK 96 /* keys in a block: a multiple of STEP */
#define LN2 0.69314718055994530942

/* acc[r][v] = <x of key r, x of query lane v> for V vectors of queries stored [a][pitch], keys packed [a][KEYS]. */
RC_INLINE void RC_NAME(dots)(const int V, vreal acc[KEYS][VECTORS], ptrdiff_t d, const REAL *queries, const int pitch,
                             const REAL *keys) {
    RC_UNROLL for (int r = 0; r < KEYS; r++) RC_UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vreal){0};
    for (ptrdiff_t a = 0; a < d; a++) {
        vreal x[VECTORS];
        RC_UNROLL for (int v = 0; v < V; v++) x[v] = LOAD(queries + v * LANES);
        RC_UNROLL for (int r = 0; r < KEYS; r++) {
            vreal y = SPLAT(keys[r]);
            RC_UNROLL for (int v = 0; v < V; v++) acc[r][v] += x[v] * y;
        }
        queries += pitch;
        keys += KEYS;
    }
}

/* `rows` rows of x as [register block][a][KEYS], zeros up to `padded` rows (a multiple of KEYS). */
static void RC_NAME(pack_rows)(const REAL *x, ptrdiff_t width, ptrdiff_t rows, ptrdiff_t padded, REAL *out) {
    for (ptrdiff_t j = 0; j < padded; j += KEYS, out += KEYS * width)
        RC_NAME(tile_load)(x + j * width, width, rc_max(0, rc_min(KEYS, rows - j)), width, 1, 0, out, KEYS);
}

/* C[key][c] += sum_i B[key][i] A[i][c] over `keys` keys, up to COLUMN_SLACK more where that is no whole number of register
 * blocks, and `rows` queries; A and C have whole vectors of columns. */
#define RC_COLUMNS(R, V)                                                                                                 \
    RC_NOINLINE void RC_NAME(columns_##V)(ptrdiff_t keys, ptrdiff_t rows, const REAL *A, ptrdiff_t ld, const REAL *B,     \
                                          REAL *C) {                                                                      \
        for (ptrdiff_t j = 0; j < keys; j += R)                                                                           \
            RC_NAME(product_block)(R, V, rows, A, ld, B + j * TILE, 1, TILE, C + j * ld, ld, RC_ADD, 0);                  \
    }
#if RC_REGISTERS == 32
RC_COLUMNS(16, 1) RC_COLUMNS(12, 2) RC_COLUMNS(8, 3) RC_COLUMNS(6, 4)
#else
RC_COLUMNS(8, 1) RC_COLUMNS(6, 2)
#endif
#undef RC_COLUMNS

static void RC_NAME(columns)(ptrdiff_t keys, ptrdiff_t width, ptrdiff_t rows, const REAL *A, const REAL *B, REAL *C) {
    for (ptrdiff_t c = 0; c < width; c += COLUMN_VECTORS * LANES) {
        const ptrdiff_t vectors = rc_min(COLUMN_VECTORS, (width - c) / LANES);
        if (vectors == 1)
            RC_NAME(columns_1)(keys, rows, A + c, width, B, C + c);
        else if (vectors == 2)
            RC_NAME(columns_2)(keys, rows, A + c, width, B, C + c);
#if COLUMN_VECTORS == 4
        else if (vectors == 3)
            RC_NAME(columns_3)(keys, rows, A + c, width, B, C + c);
        else
            RC_NAME(columns_4)(keys, rows, A + c, width, B, C + c);
#endif
    }
}

