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
            RC_NAME(scaled_copy)(1, x + m, 0, phi + y->offset[s - 1], 0, RC_NAME(count)(y, s - 1, m + 1),
                                 phi + y->offset[s] + RC_NAME(count)(y, s, m), 0);
    for (ptrdiff_t f = RC_NAME(below)(y, degree); f < y->offset[degree]; f++)
        phi[f] = 0;
    for (ptrdiff_t f = y->offset[degree] + RC_NAME(count)(y, degree, y->d); f < y->pitch; f++)
        phi[f] = 0;
}

/* Asks for what lies from x on, a vector, which may be less than a cache line. */
#define ASK_FOR(x) __builtin_prefetch(x, 0, 2)

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
    acc[0] += acc[1] + acc[2] + acc[3];
    REAL sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += acc[0][lane];
    return sum;
}

/* What the slots of a ring are to the queries of a head, in arrays of its pitch. */
typedef struct {
    REAL *age, *gain, *hidden; /* hidden: -inf where there is no token, else 0 */
} RC_NAME(ring_slots);

static RC_NAME(ring_slots) RC_NAME(slots_of)(const rc_decode_problem *p, ptrdiff_t slot, ptrdiff_t recent, REAL *room) {
    const RC_NAME(ring_slots) y = {room, room + p->ring_pitch, room + 2 * p->ring_pitch};
    for (ptrdiff_t j = 0; j < p->ring_pitch; j++) {
        const ptrdiff_t age = j <= slot ? slot - j : slot - j + p->capacity;
        const int seen = j < p->capacity && age < recent;
        y.age[j] = seen ? (REAL)age : 0;
        y.hidden[j] = seen ? 0 : -(REAL)INFINITY;
    }
    return y;
}

/* Lets the scores of near tokens be multiplied by `stretch`. */
static void RC_NAME(set_gain)(const rc_decode_problem *p, const RC_NAME(ring_slots) * y, REAL stretch) {
    for (ptrdiff_t j = 0; j < p->ring_pitch; j++)
        y->gain[j] = y->hidden[j] == 0 && y->age[j] < (REAL)p->near ? stretch : 1;
}

/* S[j] = gain_j x . k_j - slope age_j for keys [a][j], -inf where there is no token; the largest of S and `least`.
 * `next` is asked for, as long as keys. */
static REAL RC_NAME(row_scores)(ptrdiff_t d, ptrdiff_t length, const REAL *x, const REAL *keys, const REAL *next, REAL slope,
                                const RC_NAME(ring_slots) * y, REAL least, REAL *S) {
    vreal top = SPLAT(least);
    for (ptrdiff_t j = 0; j < length; j += LANES) {
        vreal acc = {0};
        for (ptrdiff_t a = 0; a < d; a++) {
            acc += LOAD(keys + a * length + j) * x[a];
            ASK_FOR(next + a * length + j);
        }
        acc = acc * LOAD(y->gain + j) - LOAD(y->age + j) * slope + LOAD(y->hidden + j);
        STORE(S + j, acc);
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
    const ptrdiff_t columns = p->d_v + 1;
    return sizeof(REAL) * (size_t)(p->groups * (p->pitch + LANES) + (3 + p->groups) * p->ring_pitch + p->groups * (columns + 1));
}

/* The arrays of a head. */
typedef struct {
    ptrdiff_t stream, own; /* own: which of the stream's heads */
    const REAL *state;
    REAL *ring_keys, *ring;
} RC_NAME(decoding_head);

/* The head at a place in the order of the streams that take part, and of the heads of each. */
static RC_NAME(decoding_head) RC_NAME(head_at)(const rc_decode_problem *p, ptrdiff_t place) {
    const ptrdiff_t stream = p->streams[place / p->heads], own = place % p->heads, head = stream * p->heads + own;
    return (RC_NAME(decoding_head)){stream, own, (const REAL *)p->state[stream] + own * p->states * (p->d_v + 1) * p->pitch,
                                    (REAL *)p->ring_keys + head * p->d * p->ring_pitch,
                                    (REAL *)p->ring + head * (p->d_v + 1) * p->ring_pitch};
}

/* Attention of the queries of a head; the arrays of `next` are asked for. */
static void RC_NAME(step_head)(const rc_decode_problem *p, RC_NAME(decoding_head) x, RC_NAME(decoding_head) next, void *workspace) {
    const ptrdiff_t d = p->d, columns = p->d_v + 1, groups = p->groups, pitch = p->pitch, ring_pitch = p->ring_pitch;
    const ptrdiff_t features = pitch + LANES, states = p->states, head = x.stream * p->heads + x.own;
    const ptrdiff_t slot = (p->length[x.stream] - 1) % p->capacity;
    const RC_NAME(monomials) y = {d, columns, pitch, p->offset, p->count};
    const REAL *weights = p->weights, *middle = (const REAL *)p->value_centre + head * p->d_v;
    const REAL *rows = (const REAL *)p->rows + head * (groups + (p->v != 0)) * d;
    const REAL *stretch = (const REAL *)p->stretch + x.own * p->stretches;
    const REAL *slope = (const REAL *)p->slope + x.own * states, *fall = (const REAL *)p->fall + head * states;
    REAL *phi = workspace, *E = phi + groups * features;
    REAL *room = E + groups * ring_pitch, *N = room + 3 * ring_pitch, *top = N + groups * columns;

    if (p->v) {
        const REAL *v = (const REAL *)p->v + head * p->d_v;
        for (ptrdiff_t a = 0; a < d; a++)
            x.ring_keys[a * ring_pitch + slot] = rows[a];
        for (ptrdiff_t c = 0; c < p->d_v; c++)
            x.ring[c * ring_pitch + slot] = v[c] - middle[c];
        rows += d;
    }
    const RC_NAME(ring_slots) slots = RC_NAME(slots_of)(p, slot, p->recent[x.stream], room);
    for (ptrdiff_t g = 0; g < groups; g++) {
        RC_NAME(row_features)(&y, p->degree, rows + g * d, phi + g * features);
        for (ptrdiff_t f = 0; f < pitch; f += LANES)
            STORE(phi + g * features + f, LOAD(phi + g * features + f) * LOAD(weights + f));
        const ptrdiff_t s = states == 1 ? 0 : g;
        if (g < p->stretches)
            RC_NAME(set_gain)(p, &slots, stretch[g]);
        REAL *S = E + g * ring_pitch;
        const REAL most =
            RC_NAME(row_scores)(d, ring_pitch, rows + g * d, x.ring_keys, next.ring_keys, slope[s], &slots, fall[s], S);
        top[g] = p->near ? most : 0;
        RC_NAME(row_exponentials)(ring_pitch, top[g], S);
    }
    for (ptrdiff_t g = 0; g < groups; g++) {
        const ptrdiff_t s = states == 1 ? 0 : g;
        const REAL far = (REAL)exp(fall[s] - top[g]);
        for (ptrdiff_t c = 0; c < columns; c++) {
            const ptrdiff_t of_state = (s * columns + c) * pitch, of_ring = c * ring_pitch;
            N[g * columns + c] =
                RC_NAME(row_dot)(pitch, x.state + of_state, next.state + of_state, phi + g * features) * far +
                RC_NAME(row_dot)(ring_pitch, x.ring + of_ring, next.ring + of_ring, E + g * ring_pitch);
        }
    }
    REAL *o = (REAL *)p->o + head * groups * p->d_v;
    for (ptrdiff_t g = 0; g < groups; g++)
        for (ptrdiff_t c = 0; c < p->d_v; c++)
            o[g * p->d_v + c] = middle[c] + N[g * columns + c] / N[g * columns + p->d_v];
}

/* The heads at the places [first, last). */
static void RC_NAME(step)(const rc_decode_problem *p, ptrdiff_t first, ptrdiff_t last, void *workspace) {
    for (ptrdiff_t i = first; i < last; i++)
        RC_NAME(step_head)(p, RC_NAME(head_at)(p, i), RC_NAME(head_at)(p, i + 1 < last ? i + 1 : i), workspace);
}
