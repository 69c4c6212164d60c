/* Decoding: attention a token at a time, on a state of fixed size and a ring of the last tokens.
 *
 *   step        one token of some heads of streams (decode.template.h)
 *   leave       tokens that leave a head's ring for its state (leave.template.h)
 *   add_block   a state added to a sum of several
 */
#ifndef RC_DECODING_H
#define RC_DECODING_H
#include <stddef.h>
#include "isa.h"

/* Decoding, all in float64 and with both factors in q and k: a token enters the ring, and queries see the ring and the
 * state under one sum. The caller makes room: it takes the oldest tokens out of the ring and adds them to the state.
 *
 * A token t before the last weighs e^{-slope t}, in the ring by its age, in the state by the weight it has there times
 * e^fall. The scores of the `near` last tokens are multiplied by `stretch` and may be of any size: the largest exponent
 * is then taken from all. */
typedef struct {
    ptrdiff_t heads, groups, states, d, d_v; /* heads of a stream; states: 1 for all groups of a head, or one for each */
    int degree; /* of the polynomial and the state */
    ptrdiff_t pitch;
    const ptrdiff_t *offset, *count; /* of monomials, as in monomials.h */
    const double *weights;
    const double *slope, *fall;  /* (heads, states), (streams, heads, states): fall is -inf where the state is empty */
    const double *const *state;  /* of each stream, (heads, states, d_v + 1, pitch) */
    ptrdiff_t capacity;          /* tokens that the ring has room for: they go round its first `capacity` slots */
    ptrdiff_t ring_pitch;        /* the capacity padded to whole vectors */
    double *ring_keys, *ring;    /* (streams, heads, d or d_v + 1, ring_pitch): the last row of ring is 1 */
    const ptrdiff_t *streams;    /* those that take part, in whose order heads are counted */
    const ptrdiff_t *length;     /* tokens of each stream, the one that comes among them */
    const ptrdiff_t *recent;     /* how many of these are in the ring; other slots are not seen */
    ptrdiff_t near;              /* 0 for none */
    ptrdiff_t stretches;         /* 1 for all groups of a head, or one for each */
    const double *stretch;       /* (heads, stretches) */
    const double *value_centre;  /* (streams, heads, d_v) */
    const double *rows;          /* (streams, heads, 1 + groups, d): k, then q; without v (.., groups, d): q alone */
    const double *v;             /* (streams, heads, d_v), or NULL where no token comes */
    double *o;                   /* (streams, heads, groups, d_v) */
} rc_decode_problem;

/* The oldest tokens of the rings of some streams enter the sums of these, in new arrays. */
typedef struct {
    const rc_decode_problem *p;
    ptrdiff_t tokens;         /* that leave each ring */
    const ptrdiff_t *streams; /* in whose order the arrays here are */
    const ptrdiff_t *folded;  /* of each stream, the first of the tokens that leave */
    const double *factors;    /* (streams, heads, states): what a state is multiplied by, powers of two */
    const double *weights;    /* NULL or (streams, heads, states, tokens): the weights of tokens in a state */
    double *const *after;     /* of each stream: like its state, and what rounding took from it behind that */
} rc_leaving;

typedef struct {
    size_t (*step_workspace)(const rc_decode_problem *);
    void (*step)(const rc_decode_problem *, ptrdiff_t first, ptrdiff_t last, void *workspace);
    size_t (*leave_workspace)(const rc_leaving *);
    void (*leave)(const rc_leaving *, ptrdiff_t place, void *workspace);
    void (*add_block)(ptrdiff_t length, ptrdiff_t low, double factor, const double *state, const double *added, double *sum);
} rc_decoding_kernels;

extern const rc_decoding_kernels rc_decoding_baseline;
#if RC_X86
extern const rc_decoding_kernels rc_decoding_v3, rc_decoding_v4;
#endif

static inline const rc_decoding_kernels *rc_decoding_select(int level) {
    (void)level;
    return RC_SELECT(rc_decoding, level);
}
#endif
