/* The micro-kernel under every product of ropecy, for one precision (include after simd.h).
 *
 *     C[r][v] (=, +=, or += x[v] *)  sum_k B[k][r] A[k][v],      r < R rows, v < V vectors
 *
 * A is read as vectors (lanes), B one scalar at a time and broadcast; the R x V accumulators never leave
 * the registers and start from zero, so that a long sum of C is a sum of short ones.
 *
 * Two families, tables of functions so that R and V are literals inside each:
 *   product[R][V]   B[k * ldb + r]      R <= ROWS, V <= VECTORS      packed rows side by side
 *   columns[V]      B[r * TILE + k]     R = COLUMN_ROWS(V)           a [key][token] tile against row-major rows
 *
 * What bounds it: one load of A per R products and one broadcast load of B per V; with 9 x 3 (AVX-512) or
 * 6 x 2 (16 registers) the multiply-add ports, not the loads. R x V + V + 1 registers must fit, or GCC
 * re-reads A from memory inside the products. With 6 x 2 (AVX2, a Zen 4, K = 96, all in the L1 cache) 99% of the peak is
 * reached, with 5 x 2 95%, with 4 x 2 93%, with 3 x 2, too few chains for the latency, 76%.
 */
#undef ROWS
#undef VECTORS
#undef TILE
#undef COLUMN_VECTORS
#if RC_REGISTERS == 32
#define ROWS 9
#define VECTORS 3
#define COLUMN_VECTORS 4
#else
#define ROWS 6
#define VECTORS 2
#define COLUMN_VECTORS 2
#endif
#define TILE (VECTORS * LANES) /* tokens side by side in a tile */

#ifndef RC_PRODUCT_ONCE
#define RC_PRODUCT_ONCE
enum { RC_STORE, RC_ADD, RC_ADD_SCALED };

/* Functions name_R_V of every size, and the table of them. */
#if RC_REGISTERS == 32
#define RC_SIZES_OF(F, R) F(R, 1) F(R, 2) F(R, 3)
#define RC_SIZES(F)                                                                                                         \
    RC_SIZES_OF(F, 1) RC_SIZES_OF(F, 2) RC_SIZES_OF(F, 3) RC_SIZES_OF(F, 4) RC_SIZES_OF(F, 5) RC_SIZES_OF(F, 6)             \
    RC_SIZES_OF(F, 7) RC_SIZES_OF(F, 8) RC_SIZES_OF(F, 9)
#define RC_ROW_OF(f, R) {0, RC_NAME(f##_##R##_1), RC_NAME(f##_##R##_2), RC_NAME(f##_##R##_3)}
#define RC_TABLE_OF(f)                                                                                                      \
    {{0}, RC_ROW_OF(f, 1), RC_ROW_OF(f, 2), RC_ROW_OF(f, 3), RC_ROW_OF(f, 4), RC_ROW_OF(f, 5), RC_ROW_OF(f, 6),             \
     RC_ROW_OF(f, 7), RC_ROW_OF(f, 8), RC_ROW_OF(f, 9)}
#else
#define RC_SIZES_OF(F, R) F(R, 1) F(R, 2)
#define RC_SIZES(F)                                                                                                         \
    RC_SIZES_OF(F, 1) RC_SIZES_OF(F, 2) RC_SIZES_OF(F, 3) RC_SIZES_OF(F, 4) RC_SIZES_OF(F, 5) RC_SIZES_OF(F, 6)
#define RC_ROW_OF(f, R) {0, RC_NAME(f##_##R##_1), RC_NAME(f##_##R##_2)}
#define RC_TABLE_OF(f)                                                                                                      \
    {{0}, RC_ROW_OF(f, 1), RC_ROW_OF(f, 2), RC_ROW_OF(f, 3), RC_ROW_OF(f, 4), RC_ROW_OF(f, 5), RC_ROW_OF(f, 6)}
#endif

/* Columns cut into balanced blocks of at most `rows`: the width of block b of `columns`. */
static inline int rc_blocks(int columns, int rows) { return (columns + rows - 1) / rows; }
static inline int rc_block_start(int columns, int blocks, int b) {
    int q = columns / blocks, r = columns % blocks;
    return b * q + (b < r ? b : r);
}
#endif

typedef void (*RC_NAME(product_function))(ptrdiff_t K, const REAL *A, ptrdiff_t lda, const REAL *B, ptrdiff_t ldb, REAL *C,
                                          ptrdiff_t ldc, int mode, const REAL *x);

/* R, V, br are literals at every call, so acc is a fixed array that lives in registers. */
RC_INLINE void RC_NAME(product_block)(const int R, const int V, ptrdiff_t K, const REAL *A, ptrdiff_t lda, const REAL *B,
                                      ptrdiff_t bk, const ptrdiff_t br, REAL *C, ptrdiff_t ldc, int mode, const REAL *x) {
    vreal acc[16][4];
    RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vreal){0};
    for (ptrdiff_t k = 0; k < K; k++) {
        vreal a[4];
        RC_UNROLL for (int v = 0; v < V; v++) a[v] = LOAD(A + v * LANES);
        RC_UNROLL for (int r = 0; r < R; r++) {
            vreal b = SPLAT(B[r * br]);
            RC_UNROLL for (int v = 0; v < V; v++) acc[r][v] += a[v] * b;
        }
        A += lda;
        B += bk;
    }
    if (mode == RC_STORE) {
        RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int v = 0; v < V; v++) STORE(C + r * ldc + v * LANES, acc[r][v]);
    } else if (mode == RC_ADD) {
        RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int v = 0; v < V; v++)
            STORE(C + r * ldc + v * LANES, LOAD(C + r * ldc + v * LANES) + acc[r][v]);
    } else {
        RC_UNROLL for (int v = 0; v < V; v++) {
            vreal xv = LOAD(x + v * LANES);
            RC_UNROLL for (int r = 0; r < R; r++)
                STORE(C + r * ldc + v * LANES, LOAD(C + r * ldc + v * LANES) + xv * acc[r][v]);
        }
    }
}

#define RC_PRODUCT(R, V)                                                                                                  \
    RC_NOINLINE void RC_NAME(product_##R##_##V)(ptrdiff_t K, const REAL *A, ptrdiff_t lda, const REAL *B, ptrdiff_t ldb,  \
                                                REAL *C, ptrdiff_t ldc, int mode, const REAL *x) {                        \
        RC_NAME(product_block)(R, V, K, A, lda, B, ldb, 1, C, ldc, mode, x);                                              \
    }
RC_SIZES(RC_PRODUCT)
static const RC_NAME(product_function) RC_NAME(product)[ROWS + 1][VECTORS + 1] = RC_TABLE_OF(product);
#undef RC_PRODUCT

/* C (columns x TILE tokens) += sum_k B[k][c] A[k][token], all columns, and the first V vectors of a tile's tokens. */
RC_INLINE void RC_NAME(product_tile)(int columns, const int V, ptrdiff_t K, const REAL *A, const REAL *B, ptrdiff_t ldb, REAL *C) {
    const int blocks = rc_blocks(columns, ROWS);
    for (int b = 0; b < blocks; b++) {
        const int c0 = rc_block_start(columns, blocks, b), c1 = rc_block_start(columns, blocks, b + 1);
        RC_NAME(product)[c1 - c0][V](K, A, TILE, B + c0, ldb, C + (ptrdiff_t)c0 * TILE, TILE, RC_ADD, 0);
    }
}
