/* Tokens that leave a ring together and enter the state, for one precision (include after update.template.h).
 *
 * What bounds it: the multiply-adds of the sum of a block, which is made in a workspace that stays in L2, then the memory of
 * both states, the one before and the one after.
 */

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

/* What a thread works in. */
typedef struct {
    RC_NAME(source) *sources;
    REAL *x, *columns, *rows, *part; /* [token][d], [token][column of each state], features, the sum of the block */
} RC_NAME(leaving_room);

/* The states of a head have the same monomials, so they are as many columns of one state. */
static RC_NAME(monomials) RC_NAME(leaving_monomials)(const rc_decode_problem *p) {
    return (RC_NAME(monomials)){p->d, p->states * (p->d_v + 1), p->pitch, p->offset, p->count};
}

enum { LEAVING_PARTS = 5 };

/* Where the parts of a thread's workspace begin, and where the last one ends, in elements: whole cache lines, and a vector that
 * loads and stores may run over. */
static void RC_NAME(leaving_layout)(const rc_leaving *b, ptrdiff_t start[LEAVING_PARTS + 1]) {
    const RC_NAME(monomials) y = RC_NAME(leaving_monomials)(b->p);
    const int degree = b->p->degree;
    const ptrdiff_t sizes[LEAVING_PARTS] = {
        RC_NAME(source_count)(&y, degree) * (ptrdiff_t)(sizeof(RC_NAME(source)) / sizeof(REAL)),
        b->tokens * y.d,
        b->tokens * y.columns,
        b->tokens * RC_NAME(row_pitch)(&y, degree),
        y.columns * y.pitch,
    };
    start[0] = 0;
    for (int i = 0; i < LEAVING_PARTS; i++)
        start[i + 1] = start[i] + rc_round_up(sizes[i] + LANES, 64 / (ptrdiff_t)sizeof(REAL));
}

static size_t RC_NAME(leave_workspace)(const rc_leaving *b) {
    ptrdiff_t start[LEAVING_PARTS + 1];
    RC_NAME(leaving_layout)(b, start);
    return sizeof(REAL) * (size_t)start[LEAVING_PARTS];
}

static RC_NAME(leaving_room) RC_NAME(leaving_room_of)(const rc_leaving *b, REAL *base) {
    ptrdiff_t start[LEAVING_PARTS + 1];
    RC_NAME(leaving_layout)(b, start);
    return (RC_NAME(leaving_room)){(RC_NAME(source) *)base, base + start[1], base + start[2], base + start[3], base + start[4]};
}

/* The tokens of a head that leave: their keys, and [v - centre, 1] times their weight in each state. */
static void RC_NAME(load_leaving)(const rc_leaving *b, ptrdiff_t place, const RC_NAME(leaving_room) * w) {
    const rc_decode_problem *p = b->p;
    const ptrdiff_t columns = p->d_v + 1, pitch = p->ring_pitch;
    const ptrdiff_t stream = b->streams[place / p->heads], head = stream * p->heads + place % p->heads;
    const REAL *keys = (const REAL *)p->ring_keys + head * p->d * pitch, *ring = (const REAL *)p->ring + head * columns * pitch;
    for (ptrdiff_t t = 0; t < b->tokens; t++) {
        const ptrdiff_t slot = (b->folded[place / p->heads] + t) % p->capacity;
        for (ptrdiff_t a = 0; a < p->d; a++)
            w->x[t * p->d + a] = keys[a * pitch + slot];
        for (ptrdiff_t s = 0; s < p->states; s++) {
            const REAL weight = b->weights ? (REAL)b->weights[(place * p->states + s) * b->tokens + t] : 1;
            for (ptrdiff_t c = 0; c < columns; c++)
                w->columns[(t * p->states + s) * columns + c] = weight * ring[c * pitch + slot];
        }
    }
}

/* The states after, of the head at a place in the order of the streams whose tokens leave. */
static void RC_NAME(leave)(const rc_leaving *b, ptrdiff_t place, void *workspace) {
    const rc_decode_problem *p = b->p;
    const RC_NAME(monomials) y = RC_NAME(leaving_monomials)(p);
    const ptrdiff_t size = (p->d_v + 1) * p->pitch, own = place % p->heads * p->states;
    const RC_NAME(leaving_room) w = RC_NAME(leaving_room_of)(b, workspace);
    RC_NAME(find_sources)(&y, p->degree, w.sources);
    RC_NAME(load_leaving)(b, place, &w);
    for (ptrdiff_t i = 0; i < p->states * size; i++)
        w.part[i] = 0;
    RC_NAME(update)(&y, p->degree, w.sources, (int)b->tokens, w.x, w.columns, y.columns, w.rows, w.part);
    for (ptrdiff_t s = 0; s < p->states; s++) {
        const ptrdiff_t at = (own + s) * size;
        const REAL *before = (const REAL *)p->state[b->streams[place / p->heads]] + at;
        RC_NAME(add_block)(size, p->heads * p->states * size, b->factors[place * p->states + s], before, w.part + s * size,
                           (REAL *)b->after[place / p->heads] + at);
    }
}
