/* One token of decoding against a state of fixed size, for one precision (include after monomials.template.c).
 *
 * A single query leaves the lanes of evaluate empty, so lanes are features here: a query's features with their
 * weights are a row of the state's pitch, and a numerator is one dot with a column of the state. Tokens of the ring
 * are exact in the same way, their features being exp(gain_j q . k_j - slope age_j).
 *
 * A step reads the state and writes only the ring, whose oldest tokens enter the state in blocks (add_block). With many
 * streams both come from memory, whose read bandwidth is the limit. The hardware fetches ahead within a page only, and
 * while features are computed nothing is read, so while one head is worked on the arrays of the next are asked for.
 */

#include <math.h>

/* phi[f] = all monomials of x up to `degree`, zeros elsewhere up to the pitch; stores run over by a vector. */
static void RC_NAME(row_features)(const RC_NAME(monomials) * y, int degree, const REAL *x, REAL *phi) {
    phi[0] = 1;
    for (int s = 1; s <= degree; s++)
        for (ptrdiff_t m = 0; m < y->d; m++)
            for (ptrdiff_t i = 0; i < RC_NAME(count)(y, s - 1, m + 1); i += LANES)
                STORE(phi + y->offset[s] + RC_NAME(count)(y, s, m) + i, LOAD(phi + y->offset[s - 1] + i) * x[m]);
    for (ptrdiff_t f = RC_NAME(below)(y, degree); f < y->offset[degree]; f++)
        phi[f] = 0;
    for (ptrdiff_t f = y->offset[degree] + RC_NAME(count)(y, degree, y->d); f < y->pitch; f++)
        phi[f] = 0;
}

/* Asks for what lies from x on, a vector, which may be less than a cache line. */
#define ASK_FOR(x) __builtin_prefetch(x, 0, 2)

RC_INLINE REAL RC_NAME(lane_sum)(vreal x) {
    REAL sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += x[lane];
    return sum;
}

/* sum_i a_i b_i over whole vectors; `next` is asked for, as long as a. */
static REAL RC_NAME(row_dot)(ptrdiff_t length, const REAL *a, const REAL *next, const REAL *b) {
    vreal acc[4] = {{0}, {0}, {0}, {0}};
    ptrdiff_t i = 0;
    for (; i + 4 * LANES <= length; i += 4 * LANES) {
        RC_UNROLL for (int u = 0; u < 4; u++) acc[u] += LOAD(a + i + u * LANES) * LOAD(b + i + u * LANES);
        RC_UNROLL for (int byte = 0; byte < 4 * RC_VECTOR_BYTES; byte += 64) ASK_FOR((const char *)(next + i) + byte);
    }
    for (; i < length; i += LANES) {
        acc[0] += LOAD(a + i) * LOAD(b + i);
        ASK_FOR(next + i);
    }
    return RC_NAME(lane_sum)(acc[0] + (acc[1] + acc[2] + acc[3]));
}

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

/* sum_j E[j] x_j of a row x of a ring. */
static REAL RC_NAME(ring_dot)(const RC_NAME(ring_slots) * y, const REAL *x, const REAL *E) {
    vreal acc = {0};
    for (ptrdiff_t i = 0; i < y->vectors; i++)
        acc += LOAD(x + y->at[i]) * LOAD(E + i * LANES);
    return RC_NAME(lane_sum)(acc);
}

/* S[j] becomes exp(S[j] - top), for no S above top or, where top is 0, for S of moderate size. */
static void RC_NAME(row_exponentials)(ptrdiff_t length, REAL top, REAL *S) {
    for (ptrdiff_t j = 0; j < length; j += LANES)
        STORE(S + j, RC_NAME(exp2)((LOAD(S + j) - top) * (REAL)LOG2E));
}

/* sum = factor state + added in nearly twice REAL's digits, for whole vectors. State and sum have behind them, at a
 * distance of `low`, what rounding takes from a sum (Knuth's two-sum), so that many equal terms do not drift. The
 * factor is a power of two, so the products are exact, and it does not matter whether the compiler fuses them with the
 * sums. */
static void RC_NAME(add_block)(ptrdiff_t length, ptrdiff_t low, REAL factor, const REAL *state, const REAL *added, REAL *sum) {
    for (ptrdiff_t f = 0; f < length; f += LANES) {
        const vreal kept = LOAD(state + f) * factor, more = LOAD(added + f);
        const vreal total = kept + more, part = total - kept;
        const vreal lost = (kept - (total - part)) + (more - part) + LOAD(state + low + f) * factor;
        const vreal whole = total + lost;
        STORE(sum + f, whole);
        STORE(sum + low + f, lost - (whole - total));
    }
}

static size_t RC_NAME(step_workspace)(const rc_decode_problem *p) {
    const ptrdiff_t of_group = p->pitch + LANES + p->ring_pitch + p->d_v + 2;
    return sizeof(REAL) * (size_t)(2 * RC_NAME(slots_size)(p) + p->groups * of_group);
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

/* Attention of the queries of a head; the arrays of `next` are asked for. */
static void RC_NAME(step_head)(const rc_decode_problem *p, const RC_NAME(decoding_head) * x, const RC_NAME(decoding_head) * next,
                               REAL *room) {
    const ptrdiff_t d = p->d, columns = p->d_v + 1, groups = p->groups, pitch = p->pitch, ring_pitch = p->ring_pitch;
    const ptrdiff_t features = pitch + LANES, states = p->states, head = x->stream * p->heads + x->own;
    const ptrdiff_t slot = (p->length[x->stream] - 1) % p->capacity;
    const RC_NAME(monomials) y = {d, columns, pitch, p->offset, p->count};
    const REAL *weights = p->weights, *middle = (const REAL *)p->value_centre + head * p->d_v;
    const REAL *rows = (const REAL *)p->rows + head * (groups + (p->v != 0)) * d;
    const REAL *stretch = (const REAL *)p->stretch + x->own * p->stretches;
    const REAL *slope = (const REAL *)p->slope + x->own * states, *fall = (const REAL *)p->fall + head * states;
    REAL *phi = room, *E = phi + groups * features, *N = E + groups * ring_pitch, *top = N + groups * columns;

    if (p->v) {
        const REAL *v = (const REAL *)p->v + head * p->d_v;
        for (ptrdiff_t a = 0; a < d; a++)
            x->ring_keys[a * ring_pitch + slot] = rows[a];
        for (ptrdiff_t c = 0; c < p->d_v; c++)
            x->ring[c * ring_pitch + slot] = v[c] - middle[c];
        rows += d;
    }
    RC_NAME(ask_for_slots)(d, ring_pitch, &next->slots, next->ring_keys);
    for (ptrdiff_t g = 0; g < groups; g++) {
        RC_NAME(row_features)(&y, p->degree, rows + g * d, phi + g * features);
        for (ptrdiff_t f = 0; f < pitch; f += LANES)
            STORE(phi + g * features + f, LOAD(phi + g * features + f) * LOAD(weights + f));
        const ptrdiff_t s = states == 1 ? 0 : g;
        if (g < p->stretches)
            RC_NAME(set_gain)(p, &x->slots, stretch[g]);
        REAL *S = E + g * ring_pitch;
        const REAL most = RC_NAME(row_scores)(d, ring_pitch, rows + g * d, x->ring_keys, slope[s], &x->slots, fall[s], S);
        top[g] = p->near ? most : 0;
        RC_NAME(row_exponentials)(x->slots.vectors * LANES, top[g], S);
    }
    RC_NAME(ask_for_slots)(columns, ring_pitch, &next->slots, next->ring);
    for (ptrdiff_t g = 0; g < groups; g++) {
        const ptrdiff_t s = states == 1 ? 0 : g;
        const REAL far = (REAL)exp(fall[s] - top[g]);
        for (ptrdiff_t c = 0; c < columns; c++) {
            const ptrdiff_t column = (s * columns + c) * pitch;
            N[g * columns + c] = RC_NAME(row_dot)(pitch, x->state + column, next->state + column, phi + g * features) * far +
                                 RC_NAME(ring_dot)(&x->slots, x->ring + c * ring_pitch, E + g * ring_pitch);
        }
    }
    REAL *o = (REAL *)p->o + head * groups * p->d_v;
    for (ptrdiff_t g = 0; g < groups; g++)
        for (ptrdiff_t c = 0; c < p->d_v; c++)
            o[g * p->d_v + c] = middle[c] + N[g * columns + c] / N[g * columns + p->d_v];
}

/* The heads at the places [first, last). */
static void RC_NAME(step)(const rc_decode_problem *p, ptrdiff_t first, ptrdiff_t last, void *workspace) {
    REAL *here = workspace, *there = here + RC_NAME(slots_size)(p), *room = there + RC_NAME(slots_size)(p);
    RC_NAME(decoding_head) x = RC_NAME(head_at)(p, first, RC_NAME(slots_of)(p, p->streams[first / p->heads], here));
    for (ptrdiff_t i = first; i < last; i++) {
        RC_NAME(ring_slots) slots = x.slots;
        const ptrdiff_t after = i + 1 < last ? i + 1 : i;
        if (after / p->heads != i / p->heads)
            slots = RC_NAME(slots_of)(p, p->streams[after / p->heads], slots.age == here ? there : here);
        const RC_NAME(decoding_head) next = RC_NAME(head_at)(p, after, slots);
        RC_NAME(step_head)(p, &x, &next, room);
        x = next;
    }
}
