/* Attention through monomials: exp(x . y) ~ sum_a w_a x^a y^a over multi-indices |a| <= degree.
 *
 * Order of monomials: degree by degree, inside a degree by largest index. The monomials of degree s whose largest
 * index is m are x_m times a contiguous prefix of those of degree s - 1, so features are scaled copies, with no index
 * table. A state is sum_j phi(y_j) [v_j 1], stored [column][feature].
 *
 * x = q_factor q, y = k_factor (k - centre), with factors of each head: every score is x . y, and no larger than the
 * bound of the polynomial.
 *
 * Every function does one piece of work of one head, serially. Pieces of a phase may run at once on different
 * workspaces. The split into segments and chunks is the caller's, and depends on shapes alone.
 *
 *   sum_keys, sum_queries    the state of one segment: sum phi(k) [v 1], or sum phi(q) [dn dden]
 *   pack                     a state with weights, as the other pieces read it
 *   forward, grad_queries, grad_keys                   no mask: one chunk of rows against a packed state
 *   scan_forward, scan_grad_queries, scan_grad_keys    causal: one segment, chunk by chunk from its first state (from
 *                                                      its last, backwards); pairs inside a chunk by exp itself,
 *                                                      whose gradients, dq among them, are all scan_grad_keys's
 */
#ifndef RC_MONOMIALS_H
#define RC_MONOMIALS_H
#include <stddef.h>
#include "isa.h"

typedef struct {
    ptrdiff_t heads, groups, n, n_k, d, d_v; /* q (heads, groups, n, d), k (heads, n_k, d), v (heads, n_k, width) */
    /* The columns of values that a piece takes are d_v of `width`. They are all but where a causal scan forward is shared out by
     * columns too: a head is then as many heads as it has blocks of columns, each with denominators of its own. Features and
     * pairs inside chunks are made for each block, sums for none twice. */
    ptrdiff_t blocks, width;
    ptrdiff_t q_offset;                      /* causal: row i sees keys j <= i + q_offset */
    const double *decay;                     /* causal: NULL or (heads) at least 0: row i's weights have e^{-decay (i + q_offset - j)} */
    int earlier;                             /* causal: states start with keys before the first, that every row sees */
    const void *q, *k, *v;
    const unsigned char *key_mask; /* NULL or (heads, n_k); rows of k and v that it hides are finite */
    const void *centre;            /* of keys: NULL or (heads, d) */
    const void *value_centre;      /* (heads, width): taken from v, given back to o */
    const double *q_factor, *k_factor; /* (heads) */

    int degree, grad_degree, state_degree; /* of the forward polynomial, of backward's features, of states (the most) */
    ptrdiff_t pitch;                       /* of a state's columns */
    const ptrdiff_t *offset;               /* [s]: where degree s starts; the top one at a whole vector */
    const ptrdiff_t *count;                /* [s * (d + 1) + m]: monomials of degree s in the first m variables */
    /* (heads, pitch): of the polynomial, of the antiderivative of backward's weights. From those of a head to those of the
     * next it is pitch, or 0 where all heads share them. */
    const void *weights, *grad_weights;
    ptrdiff_t weights_apart;

    ptrdiff_t chunk, segments, chunks_per_segment;
    /* Causal: the states of the first `known` segments, or of the last ones where they go backwards, are there before the
     * scan; the scan of each segment that the others follow leaves the state of the next. */
    ptrdiff_t known;
    const double *falls;          /* NULL or (heads, segments): what a segment's length does to a decayed state */
    double *states, *grad_states; /* (heads blocks, segments, d_v + 1, pitch) */
    void *packed, *grad_packed;   /* (heads, packed_size), (heads, grad_packed_size), in elements */
    size_t packed_size, grad_packed_size;

    /* (heads, groups, n, width), (blocks, heads, groups, n): 1 / denominator; 0: backward passes the row by */
    void *o, *inverse;
    /* NULL or (2, heads, groups, n): a polynomial for every row, whose terms of degree - 1 and more are multiplied by the
     * first, and those of degree by the second as well. */
    const void *ratio;
    double *lse;       /* NULL or (blocks, heads, groups, n), of the scores without centre */

    /* What certifies a row, or NULL. The share of degree `order` (degree or degree - 1) in its denominator, and
     * max_c max_j |v_jc - o_c| / range_j(v_jc) over the keys and columns it sees, from a table per chunk (causal) or for all:
     * middle - value_centre, half, 1 / range of each column, with max_j |v_jc - x| <= half + |x - middle|. */
    int order;
    void *moment, *spread; /* (blocks, heads, groups, n) */
    const void *reach;     /* (heads, reaches, 3, width) */
    ptrdiff_t reaches;
    const void *grad;  /* do (heads, groups, n, d_v) */
    void *dq, *dk, *dv;
    double *key_sums; /* causal: NULL or (heads, n_k), zeroed: sums over queries of the gradient of the scores */
} rc_monomials_problem;

/* `head` is below heads times blocks. */
typedef void (*rc_segment_function)(const rc_monomials_problem *, ptrdiff_t head, ptrdiff_t segment, void *workspace);
typedef void (*rc_chunk_function)(const rc_monomials_problem *, ptrdiff_t head, ptrdiff_t group, ptrdiff_t chunk, void *workspace);

typedef struct {
    int tile, lanes, chunk; /* chunk: the longest one; others are half as long */
    size_t (*workspace)(const rc_monomials_problem *);
    size_t (*packed_size)(const rc_monomials_problem *);      /* elements */
    size_t (*grad_packed_size)(const rc_monomials_problem *); /* elements */
    rc_segment_function sum_keys;
    rc_segment_function sum_queries;
    /* after = before fall + sum, for `size` entries of states; after may be before */
    void (*follow)(ptrdiff_t size, const double *before, double fall, const double *sum, double *after);
    /* state (d_v + 1, pitch) float64 of a head to packed (with weights) and grad_packed; either may be NULL */
    void (*pack)(const rc_monomials_problem *, ptrdiff_t head, const double *state, void *packed, void *grad_packed,
                 void *workspace);
    rc_chunk_function forward;
    rc_chunk_function grad_queries;
    rc_segment_function grad_keys;
    rc_segment_function scan_forward;
    rc_segment_function scan_grad_queries;
    rc_segment_function scan_grad_keys;
} rc_monomials_functions;

typedef struct {
    const rc_monomials_functions *f32, *f64;
} rc_monomials_kernels;

extern const rc_monomials_kernels rc_monomials_baseline;
#if RC_X86
extern const rc_monomials_kernels rc_monomials_v3, rc_monomials_v4;
#endif

static inline const rc_monomials_kernels *rc_monomials_select(int level) {
    (void)level;
    return RC_SELECT(rc_monomials, level);
}
#endif
