/* Rows turned into columns, for one precision (include after simd.h).
 *
 * Blocks of LANES x LANES are transposed in registers: first LANES / QUAD x LANES / QUAD blocks of QUAD x QUAD each, with
 * shuffles inside of 128 bits, then whole quads change their places. That is log2(LANES) shuffles a vector, where a loop
 * over elements needs a load, an insertion and a share of a store for each of them.
 */
#include "shuffle.template.h"

#ifndef RC_TRANSPOSE_ONCE
#define RC_TRANSPOSE_ONCE
/* Numbers of lanes, as in fold.template.h: of a (below LANES) and b, alternately units of so many lanes of both. */
#define RC_ALTERNATE(i, unit, next) ((i) + (next) * (unit) + (i) / (unit) % 2 * (LANES - (unit)))
#define RC_OCTETS(i, next) RC_ALTERNATE(i, 2 * QUAD, next)
#define RC_QUADS(i, next) RC_ALTERNATE(i, QUAD, next)
/* The lower or upper halves of each quad of a and b: their elements in turns, or each half as a whole. */
#define RC_SINGLES(i, next) ((i) / QUAD * QUAD + (i) % QUAD / 2 + (next) * (QUAD / 2) + (i) % 2 * LANES)
#define RC_DOUBLES(i, next) ((i) / QUAD * QUAD + (i) % 2 + (next) * (QUAD / 2) + (i) % QUAD / 2 * LANES)
#define RC_EXCHANGE(f, a, b)                                                                                                \
    do {                                                                                                                    \
        const vreal low = RC_SHUFFLE(a, b, RC_EACH(f, 0)), high = RC_SHUFFLE(a, b, RC_EACH(f, 1));                          \
        a = low, b = high;                                                                                                  \
    } while (0)
#endif

/* a[i][j] becomes a[j][i]. */
RC_INLINE void RC_NAME(transpose)(vreal a[LANES]) {
    RC_UNROLL for (int i = 0; i < LANES; i += QUAD) {
        RC_EXCHANGE(RC_SINGLES, a[i], a[i + 1]);
#if RC_BITS == 32
        RC_EXCHANGE(RC_SINGLES, a[i + 2], a[i + 3]);
        RC_EXCHANGE(RC_DOUBLES, a[i], a[i + 2]);
        RC_EXCHANGE(RC_DOUBLES, a[i + 1], a[i + 3]);
        const vreal second = a[i + 2];
        a[i + 2] = a[i + 1], a[i + 1] = second;
#endif
    }
#if RC_VECTOR_BYTES > 16
    RC_UNROLL for (int i = 0; i < LANES; i++) if (i / QUAD % 2 == 0) RC_EXCHANGE(RC_QUADS, a[i], a[i + QUAD]);
#endif
#if RC_VECTOR_BYTES > 32
    RC_UNROLL for (int i = 0; i < LANES / 2; i++) RC_EXCHANGE(RC_OCTETS, a[i], a[i + 2 * QUAD]);
#endif
}

/* `count` rows from x on, with zeros below them, become LANES columns in xt: the first `whole` of them as vectors, of the
 * others `left` elements each. */
RC_INLINE void RC_NAME(transposed)(const REAL *x, ptrdiff_t ld, int count, REAL factor, vreal shift, REAL *xt, ptrdiff_t tile,
                                   ptrdiff_t whole, ptrdiff_t left) {
    vreal block[LANES];
    RC_UNROLL for (int r = 0; r < LANES; r++) {
        if (r < count)
            block[r] = factor * (LOAD(x + r * ld) - shift);
        else
            block[r] = (vreal){0};
    }
    RC_NAME(transpose)(block);
    RC_UNROLL for (int k = 0; k < LANES; k++) if (k < whole) STORE(xt + k * tile, block[k]);
    if (whole < LANES) {
        REAL flat[LANES * LANES];
        RC_UNROLL for (int k = 0; k < LANES; k++) STORE(flat + k * LANES, block[k]);
        for (ptrdiff_t k = rc_max(whole, 0); k < LANES; k++)
            for (ptrdiff_t i = 0; i < left; i++)
                xt[k * tile + i] = flat[k * LANES + i];
    }
}

/* The first `whole` columns of `tile_load`, a multiple of LANES. */
RC_NOINLINE void RC_NAME(tile_load_vectors)(const REAL *x, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t whole, REAL factor,
                                            const REAL *shift, REAL *xt, ptrdiff_t tile) {
    /* A vector may be written past the end of its column, but not past those of all: what was written there comes to be
     * overwritten. So tokens go from the last to the first, and columns from the first to the last. */
    for (ptrdiff_t a = 0; a < whole; a += LANES) {
        vreal s = {0};
        if (shift)
            s = LOAD(shift + a);
        for (ptrdiff_t i = (tile - 1) / LANES * LANES; i >= 0; i -= LANES) {
            const int count = (int)rc_max(0, rc_min(LANES, rows - i));
            const ptrdiff_t room = whole * tile - i - LANES;
            RC_NAME(transposed)(x + i * ld + a, ld, count, factor, s, xt + a * tile + i, tile,
                                room < 0 ? 0 : rc_min(LANES, room / tile + 1 - a), rc_min(LANES, tile - i));
        }
    }
}

/* xt[a][token] = factor * (x[token][a] - shift[a]) for a tile of `rows` tokens; the columns past them are 0. Whole vectors of
 * a are transposed in registers, the rest one by one. */
RC_INLINE void RC_NAME(tile_load)(const REAL *x, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t width, REAL factor, const REAL *shift,
                                  REAL *xt, const int tile) {
    const ptrdiff_t whole = width / LANES * LANES;
    if (whole)
        RC_NAME(tile_load_vectors)(x, ld, rows, whole, factor, shift, xt, tile);
    for (ptrdiff_t a = whole; a < width; a++) {
        const REAL s = shift ? shift[a] : 0;
        for (ptrdiff_t i = 0; i < rows; i++)
            xt[a * tile + i] = factor * (x[i * ld + a] - s);
        for (ptrdiff_t i = rows; i < tile; i++)
            xt[a * tile + i] = 0;
    }
}
