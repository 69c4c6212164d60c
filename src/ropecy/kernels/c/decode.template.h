/* One token of decoding against a state of fixed size, for one precision (include after row_features.template.h, product.template.h,
 * exp2.template.h and fold.template.h).
 *
 * A single query leaves the lanes of evaluate empty, so lanes are features here: a query's features with their
 * weights are a row of the state's pitch, and a numerator is one dot with a column of the state. Tokens of the ring
 * are exact in the same way, their features being exp(gain_j q . k_j - slope age_j).
 *
 * A step reads the state and writes only the ring, whose oldest tokens enter the state in blocks (leave.template.h). With many
 * streams both come from memory, whose read bandwidth is the limit. The hardware fetches ahead within a page only, and
 * while features are computed nothing is read, so while one head is worked on the arrays of the next are asked for.
 */

#include <math.h>

/* phi[t][f] = weights[f] times the monomial f of x[t], f up to `degree`, zeros elsewhere up to the pitch; stores run over by a
 * vector. Queries are worked on side by side: a vector waits until those that it is made of are there. */
static void RC_NAME(query_features)(const RC_NAME(monomials) * y, int degree, const REAL *weights, int queries, const REAL *x,
                                    REAL *phi, ptrdiff_t apart) {
    for (int t = 0; t < queries; t++)
        phi[t * apart] = 1;
    for (int s = 1; s <= degree; s++)
        for (ptrdiff_t m = 0; m < y->d; m++) {
            const REAL *from = phi + y->offset[s - 1];
            REAL *to = phi + y->offset[s] + RC_NAME(count)(y, s, m);
            for (ptrdiff_t i = 0; i < RC_NAME(count)(y, s - 1, m + 1); i += LANES)
                for (int t = 0; t < queries; t++)
                    STORE(to + t * apart + i, LOAD(from + t * apart + i) * x[t * y->d + m]);
        }
    for (int t = 0; t < queries; t++, phi += apart) {
        for (ptrdiff_t f = RC_NAME(below)(y, degree); f < y->offset[degree]; f++)
            phi[f] = 0;
        for (ptrdiff_t f = y->offset[degree] + RC_NAME(count)(y, degree, y->d); f < y->pitch; f++)
            phi[f] = 0;
        for (ptrdiff_t f = 0; f < y->pitch; f += LANES)
            STORE(phi + f, LOAD(phi + f) * LOAD(weights + f));
    }
}

#undef COLUMNS
#define COLUMNS 9 /* of a state that are read side by side: each feature is loaded once for all of them */

/* Asks for what lies from x on, a vector, which may be less than a cache line. */
#define ASK_FOR(x) __builtin_prefetch(x, 0, 2)

/* What the slots of a ring are to the queries of its heads: of the vectors of slots that hold tokens, which lie side by side
 * here. */
typedef struct {
    ptrdiff_t vectors;
    ptrdiff_t *at;             /* of each vector, its first slot */
    REAL *age, *gain, *hidden; /* hidden: -inf where there is no token, else 0 */
} RC_NAME(ring_slots);

static ptrdiff_t RC_NAME(slots_size)(const rc_decode_problem *p) { return 4 * p->ring_pitch; }

static RC_NAME(ring_slots) RC_NAME(slots_of)(const rc_decode_problem *p, ptrdiff_t stream, REAL *room) {
    const ptrdiff_t pitch = p->ring_pitch, newest = (p->length[stream] - 1) % p->capacity, recent = p->recent[stream];
    RC_NAME(ring_slots) y = {0, (ptrdiff_t *)(room + 3 * pitch), room, room + pitch, room + 2 * pitch};
    for (ptrdiff_t first = 0; first < pitch; first += LANES) {
        int any = 0;
        for (ptrdiff_t i = y.vectors * LANES, j = first; j < first + LANES; i++, j++) {
            const ptrdiff_t age = j <= newest ? newest - j : newest - j + p->capacity;
            const int seen = j < p->capacity && age < recent;
            y.age[i] = seen ? (REAL)age : 0;
            y.hidden[i] = seen ? 0 : -(REAL)INFINITY;
            any |= seen;
        }
        y.at[y.vectors] = first;
        y.vectors += any;
    }
    return y;
}

/* Lets the scores of near tokens be multiplied by `stretch`. */
static void RC_NAME(set_gain)(const rc_decode_problem *p, const RC_NAME(ring_slots) * y, REAL stretch) {
    for (ptrdiff_t i = 0; i < y->vectors * LANES; i++)
        y->gain[i] = y->hidden[i] == 0 && y->age[i] < (REAL)p->near ? stretch : 1;
}

/* Asks for the slots with tokens of so many rows of a ring. */
static void RC_NAME(ask_for_slots)(ptrdiff_t rows, ptrdiff_t pitch, const RC_NAME(ring_slots) * y, const REAL *ring) {
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t i = 0; i < y->vectors; i++)
            ASK_FOR(ring + r * pitch + y->at[i]);
}

/* S[j] = gain_j x . k_j - slope age_j for keys [a][j], -inf where there is no token; the largest of S and `least`. */
static REAL RC_NAME(row_scores)(ptrdiff_t d, ptrdiff_t pitch, const REAL *x, const REAL *keys, REAL slope,
                                const RC_NAME(ring_slots) * y, REAL least, REAL *S) {
    vreal top = SPLAT(least);
    for (ptrdiff_t i = 0; i < y->vectors; i++) {
        vreal acc = {0};
        for (ptrdiff_t a = 0; a < d; a++)
            acc += LOAD(keys + a * pitch + y->at[i]) * x[a];
        acc = acc * LOAD(y->gain + i * LANES) - LOAD(y->age + i * LANES) * slope + LOAD(y->hidden + i * LANES);
        STORE(S + i * LANES, acc);
        top = RC_NAME(vector_max)(top, acc);
    }
    REAL most = top[0];
    for (int lane = 1; lane < LANES; lane++)
        most = top[lane] > most ? top[lane] : most;
    return most;
}

/* S[j] becomes exp(S[j] - top), for no S above top or, where top is 0, for S of moderate size. */
static void RC_NAME(row_exponentials)(ptrdiff_t length, REAL top, REAL *S) {
    for (ptrdiff_t j = 0; j < length; j += LANES)
        STORE(S + j, RC_NAME(exp2)((LOAD(S + j) - top) * (REAL)LOG2E));
}

#undef TOGETHER
#define TOGETHER 4 /* heads whose features are made side by side */

/* Elements of the features of a query, and of those of so many heads and of their queries. */
static ptrdiff_t RC_NAME(apart)(const rc_decode_problem *p) { return p->pitch + LANES; }
static ptrdiff_t RC_NAME(together_size)(const rc_decode_problem *p) { return TOGETHER * p->groups * (RC_NAME(apart)(p) + p->d); }

static size_t RC_NAME(step_workspace)(const rc_decode_problem *p) {
    const ptrdiff_t sums = rc_round_up(p->d_v + 1, LANES) * (LANES + 1);
    return sizeof(REAL) * (size_t)(2 * RC_NAME(slots_size)(p) + RC_NAME(together_size)(p) + p->ring_pitch + sums);
}

/* The arrays of a head. */
typedef struct {
    ptrdiff_t stream, own; /* own: which of the stream's heads */
    RC_NAME(ring_slots) slots;
    const REAL *state;
    REAL *ring_keys, *ring;
} RC_NAME(decoding_head);

/* The head at a place in the order of the streams that take part, and of the heads of each; `slots` of its stream. */
static RC_NAME(decoding_head) RC_NAME(head_at)(const rc_decode_problem *p, ptrdiff_t place, RC_NAME(ring_slots) slots) {
    const ptrdiff_t stream = p->streams[place / p->heads], own = place % p->heads, head = stream * p->heads + own;
    const ptrdiff_t columns = p->d_v + 1, size = p->states * columns * p->pitch;
    return (RC_NAME(decoding_head)){stream, own, slots, (const REAL *)p->state[stream] + own * size,
                                    (REAL *)p->ring_keys + head * p->d * p->ring_pitch,
                                    (REAL *)p->ring + head * columns * p->ring_pitch};
}

/* Of R columns from c on the sums over the tokens of the state, by features phi times e^fall, and over those of the ring, by E: a
 * vector each, whose lanes are still to be summed. The state of `next` is asked for. */
RC_INLINE void RC_NAME(column_sums)(const int R, const rc_decode_problem *p, const RC_NAME(decoding_head) * x, const REAL *state,
                                    const REAL *next, const REAL *ring, const REAL *phi, REAL far, const REAL *E, REAL *sums) {
    vreal acc[COLUMNS];
    RC_UNROLL for (int r = 0; r < R; r++) acc[r] = (vreal){0};
    for (ptrdiff_t f = 0; f < p->pitch; f += LANES) {
        const vreal at = LOAD(phi + f);
        RC_UNROLL for (int r = 0; r < R; r++) acc[r] += at * LOAD(state + r * p->pitch + f);
        if (f * (ptrdiff_t)sizeof(REAL) % 64 == 0)
            RC_UNROLL for (int r = 0; r < R; r++) ASK_FOR(next + r * p->pitch + f);
    }
    RC_UNROLL for (int r = 0; r < R; r++) acc[r] *= far;
    for (ptrdiff_t i = 0; i < x->slots.vectors; i++) {
        const vreal at = LOAD(E + i * LANES);
        RC_UNROLL for (int r = 0; r < R; r++) acc[r] += at * LOAD(ring + r * p->ring_pitch + x->slots.at[i]);
    }
    RC_UNROLL for (int r = 0; r < R; r++) STORE(sums + r * LANES, acc[r]);
}

/* N[c] = the sum over all tokens of each column, of the state s of a head. */
static void RC_NAME(all_sums)(const rc_decode_problem *p, const RC_NAME(decoding_head) * x, const REAL *next, ptrdiff_t s,
                              const REAL *phi, REAL far, const REAL *E, REAL *N) {
    const int columns = (int)p->d_v + 1, blocks = rc_blocks(columns, COLUMNS);
    REAL *sums = N + rc_round_up(columns, LANES);
    for (int b = 0; b < blocks; b++) {
        const int c = rc_block_start(columns, blocks, b);
        const ptrdiff_t at = (s * columns + c) * p->pitch;
        const REAL *state = x->state + at, *ring = x->ring + c * p->ring_pitch;
#define RC_COLUMNS(R) case R: RC_NAME(column_sums)(R, p, x, state, next + at, ring, phi, far, E, sums + c * LANES); break;
        switch (rc_block_start(columns, blocks, b + 1) - c) {
            RC_COLUMNS(1) RC_COLUMNS(2) RC_COLUMNS(3) RC_COLUMNS(4) RC_COLUMNS(5) RC_COLUMNS(6) RC_COLUMNS(7) RC_COLUMNS(8)
            RC_COLUMNS(9)
        }
#undef RC_COLUMNS
    }
    for (ptrdiff_t c = 0; c < columns; c += LANES) {
        vreal some[LANES];
        RC_UNROLL for (int i = 0; i < LANES; i++) some[i] = LOAD(sums + (c + i) * LANES);
        STORE(N + c, RC_NAME(fold)(some));
    }
}

/* Attention of the queries of a head, whose features are phi; the arrays of `next` are asked for. */
static void RC_NAME(step_head)(const rc_decode_problem *p, const RC_NAME(decoding_head) * x, const RC_NAME(decoding_head) * next,
                               const REAL *phi, REAL *room) {
    const ptrdiff_t d = p->d, columns = p->d_v + 1, groups = p->groups, ring_pitch = p->ring_pitch;
    const ptrdiff_t states = p->states, head = x->stream * p->heads + x->own;
    const ptrdiff_t slot = (p->length[x->stream] - 1) % p->capacity;
    const REAL *middle = (const REAL *)p->value_centre + head * p->d_v;
    const REAL *rows = (const REAL *)p->rows + head * (groups + (p->v != 0)) * d;
    const REAL *stretch = (const REAL *)p->stretch + x->own * p->stretches;
    const REAL *slope = (const REAL *)p->slope + x->own * states, *fall = (const REAL *)p->fall + head * states;
    REAL *E = room, *N = E + ring_pitch, *o = (REAL *)p->o + head * groups * p->d_v;

    if (p->v) {
        const REAL *v = (const REAL *)p->v + head * p->d_v;
        for (ptrdiff_t a = 0; a < d; a++)
            x->ring_keys[a * ring_pitch + slot] = rows[a];
        for (ptrdiff_t c = 0; c < p->d_v; c++)
            x->ring[c * ring_pitch + slot] = v[c] - middle[c];
        rows += d;
    }
    RC_NAME(ask_for_slots)(d, ring_pitch, &next->slots, next->ring_keys);
    RC_NAME(ask_for_slots)(columns, ring_pitch, &next->slots, next->ring);
    for (ptrdiff_t g = 0; g < groups; g++, phi += RC_NAME(apart)(p), o += p->d_v) {
        const ptrdiff_t s = states == 1 ? 0 : g;
        if (g < p->stretches)
            RC_NAME(set_gain)(p, &x->slots, stretch[g]);
        REAL most = RC_NAME(row_scores)(d, ring_pitch, rows + g * d, x->ring_keys, slope[s], &x->slots, fall[s], E);
        if (!p->near)
            most = 0;
        RC_NAME(row_exponentials)(x->slots.vectors * LANES, most, E);
        RC_NAME(all_sums)(p, x, next->state, s, phi, (REAL)exp(fall[s] - most), E, N);
        const REAL all = N[p->d_v];
        for (ptrdiff_t c = 0; c < p->d_v; c++)
            o[c] = middle[c] + N[c] / all;
    }
}

/* Features of the queries of `count` heads from a place on. */
static void RC_NAME(step_features)(const rc_decode_problem *p, ptrdiff_t place, int count, REAL *phi) {
    const RC_NAME(monomials) y = {p->d, p->d_v + 1, p->pitch, p->offset, p->count};
    const ptrdiff_t size = p->groups * p->d;
    REAL *x = phi + TOGETHER * p->groups * RC_NAME(apart)(p);
    for (int i = 0; i < count; i++) {
        const ptrdiff_t head = p->streams[(place + i) / p->heads] * p->heads + (place + i) % p->heads;
        const REAL *queries = (const REAL *)p->rows + head * (size + (p->v ? p->d : 0)) + (p->v ? p->d : 0);
        for (ptrdiff_t a = 0; a < size; a++)
            x[i * size + a] = queries[a];
    }
    RC_NAME(query_features)(&y, p->degree, p->weights, count * (int)p->groups, x, phi, RC_NAME(apart)(p));
}

/* The heads at the places [first, last). */
static void RC_NAME(step)(const rc_decode_problem *p, ptrdiff_t first, ptrdiff_t last, void *workspace) {
    REAL *here = workspace, *there = here + RC_NAME(slots_size)(p), *phi = there + RC_NAME(slots_size)(p);
    REAL *room = phi + RC_NAME(together_size)(p);
    RC_NAME(decoding_head) x = RC_NAME(head_at)(p, first, RC_NAME(slots_of)(p, p->streams[first / p->heads], here));
    for (ptrdiff_t i = first; i < last; i++) {
        if ((i - first) % TOGETHER == 0)
            RC_NAME(step_features)(p, i, (int)rc_min(TOGETHER, last - i), phi);
        RC_NAME(ring_slots) slots = x.slots;
        const ptrdiff_t after = i + 1 < last ? i + 1 : i;
        if (after / p->heads != i / p->heads)
            slots = RC_NAME(slots_of)(p, p->streams[after / p->heads], slots.age == here ? there : here);
        const RC_NAME(decoding_head) next = RC_NAME(head_at)(p, after, slots);
        RC_NAME(step_head)(p, &x, &next, phi + (i - first) % TOGETHER * p->groups * RC_NAME(apart)(p), room);
        x = next;
    }
}
