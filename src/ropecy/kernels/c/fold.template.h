/* The sums over the lanes of LANES vectors, as one vector, for one precision (include after simd.h).
 *
 * A step takes two vectors of partial sums and adds the halves, quarters or pairs of both into one, so LANES - 1 additions
 * do it all. Vectors are paired so that the sum of a[i] ends in lane i without a shuffle to put it there.
 */
#include "shuffle.template.h"

#ifndef RC_FOLD_ONCE
#define RC_FOLD_ONCE
/* Numbers of lanes, those of b following those of a; the other lanes of the same step are `next` further. */
#define RC_HALVES(i, next) ((i) / (LANES / 2) * LANES + (i) % (LANES / 2) + (next) * (LANES / 2))
#define RC_QUARTERS(i, next) ((i) / (LANES / 4) * (LANES / 2) + (i) % (LANES / 4) + (next) * (LANES / 4))
#define RC_PAIRS(i, next) ((i) % QUAD / (QUAD / 2) * LANES + (i) / QUAD * QUAD + (i) % (QUAD / 2) * 2 + (next))
#define RC_STEP(f, a, b) (RC_SHUFFLE(a, b, RC_EACH(f, 0)) + RC_SHUFFLE(a, b, RC_EACH(f, 1)))
#endif

RC_INLINE vreal RC_NAME(fold)(vreal a[LANES]) {
#if RC_VECTOR_BYTES > 16
    RC_UNROLL for (int i = 0; i < LANES; i++) if (i % (2 * QUAD) < QUAD) a[i] = RC_STEP(RC_HALVES, a[i], a[i + QUAD]);
#endif
#if RC_VECTOR_BYTES > 32
    RC_UNROLL for (int i = 0; i < QUAD; i++) a[i] = RC_STEP(RC_QUARTERS, a[i], a[i + 2 * QUAD]);
#endif
    a[0] = RC_STEP(RC_PAIRS, a[0], a[1]);
#if RC_BITS == 32
    a[2] = RC_STEP(RC_PAIRS, a[2], a[3]);
    a[0] = RC_STEP(RC_PAIRS, a[0], a[2]);
#endif
    return a[0];
}
