/* A part of a cache whose numbers are stored as STORED; WIDEN(p) loads LANES of them, FEW(name) names a function (included
 * by few.template.c, once for each way to store numbers).
 *
 * Rows are read through pointers. The pointer of a hidden key's row points at zeros; that of a row which is shorter than a
 * vector, or whose entries lie apart, at a copy, with zeros up to a vector. Where the width of a row is no multiple of a
 * vector, the last vector is the last LANES entries of the row, some of which the vector before has had, and the queries
 * are 0 in those lanes.
 */
typedef struct {
    const char *first;      /* of page 0 */
    const int32_t *pages;
    rc_few_strides strides;
    ptrdiff_t page;         /* rows of one */
    ptrdiff_t from, apart;  /* key j is row from + j apart */
    ptrdiff_t width;        /* entries of a row */
    ptrdiff_t read;         /* those that are read, at least a vector of them */
    int copied;
} FEW(matrix);

static FEW(matrix) FEW(matrix_of)(const rc_few_problem *p, const rc_few_sequence *s, const void *first, rc_few_strides strides,
                                  ptrdiff_t width) {
    return (FEW(matrix)){first, s->pages, strides, p->page, s->from, 1, width, rc_max(width, LANES),
                         width < LANES || strides.column != sizeof(STORED)};
}

/* Where the rows of keys [j0, j0 + keys) lie, zeros for hidden ones and up to BLOCK; how many of them are not hidden. */
static ptrdiff_t FEW(locate)(const FEW(matrix) * m, ptrdiff_t j0, ptrdiff_t keys, const unsigned char *keep,
                             const STORED *zeros, const STORED **at) {
    keys = rc_max(0, keys);
    ptrdiff_t kept = keys;
    for (ptrdiff_t j = 0; j < keys;) {
        const ptrdiff_t row = m->from + (j0 + j) * m->apart, within = row % m->page, step = m->strides.row * m->apart;
        const ptrdiff_t end = rc_min(keys, j + (m->page - within + m->apart - 1) / m->apart);
        const char *next = m->first + m->pages[row / m->page] * m->strides.page + within * m->strides.row;
        for (; j < end; j++, next += step)
            at[j] = (const STORED *)next;
    }
    for (ptrdiff_t j = keys; j < BLOCK; j++)
        at[j] = zeros;
    for (ptrdiff_t j = 0; j < keys && keep; j++)
        if (!keep[j0 + j]) {
            at[j] = zeros;
            kept--;
        }
    return kept;
}

/* The row of the head that is `head` heads on from the one whose row is `at`. */
RC_INLINE const STORED *FEW(on)(const FEW(matrix) * m, const STORED *at, ptrdiff_t head, const STORED *zeros) {
    return at == zeros ? zeros : (const STORED *)((const char *)at + head * m->strides.head);
}

/* Where to read BLOCK rows of the head that is `head` heads on: `row`, unless that is where they lie anyway. */
static const STORED *const *FEW(find)(const FEW(matrix) * m, const STORED *const *at, ptrdiff_t head, const STORED *zeros,
                                      STORED *copies, const STORED **row) {
    if (!head && !m->copied)
        return at;
    for (ptrdiff_t j = 0; j < BLOCK; j++)
        row[j] = FEW(on)(m, at[j], head, zeros);
    for (ptrdiff_t j = 0; j < BLOCK && m->copied; j++)
        if (at[j] != zeros) {
            const char *from = (const char *)row[j];
            row[j] = memset(copies, 0, m->read * sizeof(STORED));
            for (ptrdiff_t a = 0; a < m->width; a++)
                copies[a] = *(const STORED *)(from + a * m->strides.column);
            copies += m->read;
        }
    return row;
}

/* The rows to ask for while one of so many heads is computed: by all heads in the order of memory, if these lie side by side
 * there. */
static const STORED *const *FEW(share)(const FEW(matrix) * m, const STORED *const *at, ptrdiff_t block, ptrdiff_t heads,
                                       ptrdiff_t head, const STORED *zeros, const STORED **row) {
    if (heads == 1)
        return at;
    for (ptrdiff_t j = head * block / heads, i = 0; i < block; j++)
        for (ptrdiff_t h = 0; h < heads; h++, i++)
            row[i] = FEW(on)(m, at[j], h, zeros);
    for (ptrdiff_t i = block; i < BLOCK; i++)
        row[i] = zeros;
    return row;
}

/* Where the rows of a block lie. */
typedef struct {
    const STORED *k[BLOCK], *v[BLOCK];
} FEW(places);

typedef struct {
    const STORED *const *k, *const *v;           /* where to read rows */
    const STORED *const *next_k, *const *next_v; /* rows of the block that follows, to ask for */
    ptrdiff_t k_read, v_read, keys;              /* keys: whole rounds of scores, zeros among them */
    RC_NAME(few_masking) masking;
} FEW(block);

/* Asks for the entries [first, last) of a row; `first` a multiple of LANES. */
RC_INLINE void FEW(ask_for)(const STORED *row, ptrdiff_t first, ptrdiff_t last) {
    const ptrdiff_t line = LINE / (ptrdiff_t)sizeof(STORED);
    for (ptrdiff_t a = rc_round_up(first, line); a < last; a += line)
        __builtin_prefetch(row + a, 0, 2);
}

/* Asks for a line of each page of memory that these rows begin in, so that its address is known when the rows are asked for. */
static void FEW(ask_for_pages)(const STORED *const *at, ptrdiff_t rows) {
    uintptr_t last = 0;
    for (ptrdiff_t j = 0; j < rows; j++) {
        const uintptr_t page = (uintptr_t)at[j] / PAGE;
        if (page != last)
            __builtin_prefetch(at[j], 0, 2);
        last = page;
    }
}

/* acc[key][query] += what the vector of entries from a on adds to the product of J keys and R queries. */
RC_INLINE void FEW(dots)(const int R, const int J, const STORED *const *k, ptrdiff_t a, const REAL *q, vreal acc[16]) {
    vreal y[8];
    RC_UNROLL for (int i = 0; i < J; i++) y[i] = WIDEN(k[i] + a);
    RC_UNROLL for (int r = 0; r < R; r++) {
        const vreal x = LOAD(q + r * LANES);
        RC_UNROLL for (int i = 0; i < J; i++) acc[i * R + r] += y[i] * x;
    }
}

/* S[key][query] = <query, key>; 0 is returned where one of them is not finite. */
RC_INLINE int FEW(scores)(const int R, const FEW(block) * b, const REAL *q, REAL *S) {
    const int J = KEYS_BESIDE(R), at_once = KEYS_AT_ONCE(R);
    const ptrdiff_t width = b->k_read;
    vreal off = {0};
    for (ptrdiff_t j = 0; j < b->keys; j += at_once) {
        vreal sums[16];
        RC_UNROLL for (int i = 0; i < at_once; i += J) {
            const STORED *k[4];
            const REAL *x = q;
            vreal acc[16];
            RC_UNROLL for (int l = 0; l < J * R; l++) acc[l] = (vreal){0};
            RC_UNROLL for (int l = 0; l < J; l++) k[l] = b->k[j + i + l];
            ptrdiff_t a = 0;
            for (; a + LANES <= width; a += LANES, x += R * LANES) {
                RC_UNROLL for (int l = 0; l < J; l++) FEW(ask_for)(b->next_v[j + i + l], a, rc_min(a + LANES, b->v_read));
                FEW(dots)(R, J, k, a, x, acc);
            }
            if (a < width)
                FEW(dots)(R, J, k, width - LANES, x, acc);
            for (int l = 0; l < J; l++)
                FEW(ask_for)(b->next_v[j + i + l], a, b->v_read);
            RC_UNROLL for (int l = 0; l < J * R; l++) sums[i * R + l] = acc[l];
        }
        RC_UNROLL for (int s = 0; s < at_once * R; s += LANES) {
            const vreal score = RC_NAME(fold)(sums + s);
            off += score - score;
            STORE(S + j * R + s, score);
        }
    }
    return RC_NAME(few_zero)(off);
}

/* o[query][c] = factor[query] o[query][c] + sum_key S[key][query] v[key][c], C vectors of columns from `at` on. Meanwhile
 * the entries [asked, ask) of the next keys are asked for. */
RC_INLINE void FEW(columns)(const int R, const int C, const FEW(block) * b, ptrdiff_t at, ptrdiff_t asked, ptrdiff_t ask,
                            const REAL *S, const REAL *factor, REAL *o) {
    const ptrdiff_t pitch = rc_round_up(b->v_read, LANES);
    vreal acc[8][8];
    RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int c = 0; c < C; c++) acc[r][c] = (vreal){0};
    for (ptrdiff_t j = 0; j < b->keys; j++, S += R) {
        const STORED *v = b->v[j] + at;
        vreal y[8];
        FEW(ask_for)(b->next_k[j], asked, ask);
        RC_UNROLL for (int c = 0; c < C; c++) y[c] = WIDEN(v + c * LANES);
        RC_UNROLL for (int r = 0; r < R; r++) {
            const vreal weight = SPLAT(S[r]);
            RC_UNROLL for (int c = 0; c < C; c++) acc[r][c] += weight * y[c];
        }
    }
    RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int c = 0; c < C; c++) {
        REAL *sum = o + r * pitch + c * LANES;
        STORE(sum, LOAD(sum) * factor[r] + acc[r][c]);
    }
}

RC_INLINE void FEW(values)(const int R, const FEW(block) * b, const REAL *S, const REAL *factor, REAL *o) {
    const int C = ACCUMULATORS / R < 8 ? ACCUMULATORS / R : 8, half = C / 2 > 1 ? C / 2 : 1;
    const ptrdiff_t width = b->v_read;
    /* What a pass over the values asks for of the keys: as many columns, the last one all that are left. */
#define ASKED(columns) c, c + (columns) < width ? rc_min(c + (columns), b->k_read) : b->k_read
    ptrdiff_t c = 0;
    for (; c + C * LANES <= width; c += C * LANES)
        FEW(columns)(R, C, b, c, ASKED(C * LANES), S, factor, o + c);
    for (; c + half * LANES <= width; c += half * LANES)
        FEW(columns)(R, half, b, c, ASKED(half * LANES), S, factor, o + c);
    for (; c < width; c += LANES)
        FEW(columns)(R, 1, b, rc_min(c, width - LANES), ASKED(LANES), S, factor, o + c);
#undef ASKED
}

#define FEW_BLOCK(R)                                                                                                      \
    RC_NOINLINE int FEW(block_##R)(const FEW(block) * b, const REAL *q, RC_NAME(few_state) * state, REAL *o, REAL *S) {    \
        const int finite = FEW(scores)(R, b, q, S);                                                                       \
        RC_NAME(few_weights)(R, &b->masking, b->keys, S, state);                                                          \
        FEW(values)(R, b, S, state->factor, o);                                                                           \
        return finite;                                                                                                    \
    }
FEW_BLOCK(1)
FEW_BLOCK(2)
#if MOST_ROWS >= 4
FEW_BLOCK(4)
#endif
#if MOST_ROWS >= 8
FEW_BLOCK(8)
#endif
#undef FEW_BLOCK

static int FEW(of_block)(int R, const FEW(block) * b, const REAL *q, RC_NAME(few_state) * state, REAL *o, REAL *S) {
#if MOST_ROWS >= 8
    if (R == 8)
        return FEW(block_8)(b, q, state, o, S);
#endif
#if MOST_ROWS >= 4
    if (R == 4)
        return FEW(block_4)(b, q, state, o, S);
#endif
    return R == 2 ? FEW(block_2)(b, q, state, o, S) : FEW(block_1)(b, q, state, o, S);
}

/* A run of parts: where it reads, and where in a workspace, in bytes, it has what. What each of its heads has follows on that of
 * the head before: states, then queries, then sums. */
typedef struct {
    FEW(matrix) k, v; /* of the first head */
    RC_NAME(few_layout) layout;
    ptrdiff_t heads, block; /* block: keys in one */
    size_t queries, sums, head, scores, zeros, k_copies, v_copies, size;
} FEW(task);

static FEW(task) FEW(task_of)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, ptrdiff_t heads) {
    FEW(task) t = {FEW(matrix_of)(p, s, (const char *)s->k + head * p->k.head, p->k, p->d),
                   FEW(matrix_of)(p, s, (const char *)s->v + head * p->v.head, p->v, p->d_v),
                   RC_NAME(few_layout_of)(p, rc_rows(p, s)), heads, BLOCK};
    const RC_NAME(few_layout) *l = &t.layout;
    while (t.block > LEAST_BLOCK && t.block * (p->d + p->d_v) * sizeof(STORED) > CLOSE_BYTES)
        t.block /= 2;
    t.queries = rc_round_up(l->groups * sizeof(RC_NAME(few_state)), LINE);
    t.sums = t.queries + rc_round_up(l->groups * l->R * l->k_pitch * sizeof(REAL), LINE);
    t.head = t.sums + rc_round_up(l->groups * l->R * l->v_pitch * sizeof(REAL), LINE);
    t.scores = heads * t.head;
    t.zeros = t.scores + BLOCK * MOST_ROWS * sizeof(REAL);
    t.k_copies = t.zeros + rc_round_up(rc_max(l->k_pitch, l->v_pitch) * sizeof(STORED), LINE);
    t.v_copies = t.k_copies + (t.k.copied ? BLOCK * rc_round_up(t.k.read * sizeof(STORED), LINE) : 0);
    t.size = t.v_copies + (t.v.copied ? BLOCK * rc_round_up(t.v.read * sizeof(STORED), LINE) : 0);
    return t;
}

/* Entries [a, a + LANES) of a row of queries, times the scale, and 0 past its end. It is a product in float64, for a scale may
 * be far below the least number of the precision that queries make up for. */
RC_INLINE vreal FEW(query)(const rc_few_problem *p, const STORED *row, ptrdiff_t a) {
    REAL x[LANES];
    if (a + LANES <= p->d) {
        STORE(x, WIDEN(row + a));
    } else {
        STORED stored[LANES] = {0};
        memcpy(stored, row + a, (p->d - a) * sizeof(STORED));
        STORE(x, WIDEN(stored));
    }
    RC_UNROLL for (int l = 0; l < LANES; l += WIDE_LANES) {
        RC_NAME(few_part) *part = (RC_NAME(few_part) *)(x + l);
        *part = __builtin_convertvector(__builtin_convertvector(*part, RC_NAME(few_wide)) * p->scale, RC_NAME(few_part));
    }
    return LOAD(x);
}

/* Queries as scores take them, [vector][query][lane]. The last vector ends with the row: it is 0 where the one before has
 * been. */
static void FEW(pack)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, ptrdiff_t first, int R, REAL *out) {
    const ptrdiff_t rows = rc_rows(p, s), read = rc_max(p->d, LANES);
    for (ptrdiff_t row = first; row < first + R; row++, out += LANES) {
        const STORED *q = (const STORED *)p->q + (row < rows ? rc_row(p, s, head, row) : 0) * p->d;
        REAL *to = out;
        for (ptrdiff_t a = 0; a < read; a += LANES, to += R * LANES) {
            REAL x[2 * LANES] = {0};
            if (row < rows)
                STORE(x + LANES, FEW(query)(p, q, a));
            STORE(to, LOAD(x + rc_min(LANES, read - a)));
        }
    }
}

/* The largest norm of a query; not finite where one of them is not. */
static double FEW(longest_query)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head) {
    double longest = 0, off = 0;
    for (ptrdiff_t row = 0; row < rc_rows(p, s); row++) {
        const STORED *q = (const STORED *)p->q + rc_row(p, s, head, row) * p->d;
        RC_NAME(few_squares) squares = {0};
        for (ptrdiff_t a = 0; a < p->d; a += LANES)
            RC_NAME(few_add_squares)(&squares, FEW(query)(p, q, a));
        const double sum = RC_NAME(few_total)(&squares);
        off += sum - sum;
        longest = sum > longest ? sum : longest;
    }
    return sqrt(longest) + off;
}

/* A sample of rows: where to read them, and which are kept. */
static ptrdiff_t FEW(sample)(const rc_few_sequence *s, const FEW(matrix) *all, const STORED *zeros, STORED *copies,
                             unsigned char *keep, const STORED **rows) {
    const STORED *at[BLOCK];
    FEW(matrix) m = *all;
    const ptrdiff_t apart = rc_max(1, (s->n_k + SAMPLE - 1) / SAMPLE), count = (s->n_k + apart - 1) / apart;
    m.apart = apart;
    for (ptrdiff_t i = 0; i < count; i++)
        keep[i] = s->keep ? s->keep[i * apart] : 1;
    FEW(locate)(&m, 0, count, keep, zeros, at);
    memcpy(rows, FEW(find)(&m, at, 0, zeros, copies, rows), sizeof at);
    return count;
}

/* The largest norm of a key, by a sample of the kept ones. */
static double FEW(longest_key)(const rc_few_sequence *s, const FEW(task) * t, void *workspace) {
    const STORED *zeros = (const STORED *)((char *)workspace + t->zeros), *rows[BLOCK];
    unsigned char keep[SAMPLE];
    double longest = 0;
    const ptrdiff_t count = FEW(sample)(s, &t->k, zeros, (STORED *)((char *)workspace + t->k_copies), keep, rows);
    for (ptrdiff_t i = 0; i < count; i++) {
        RC_NAME(few_squares) squares = {0};
        ptrdiff_t a = 0;
        for (; a + LANES <= t->k.read; a += LANES)
            RC_NAME(few_add_squares)(&squares, WIDEN(rows[i] + a));
        if (a < t->k.read) {
            vreal x = WIDEN(rows[i] + t->k.read - LANES);
            for (ptrdiff_t l = 0; l < a + LANES - t->k.read; l++)
                x[l] = 0;
            RC_NAME(few_add_squares)(&squares, x);
        }
        const double sum = RC_NAME(few_total)(&squares);
        longest = sum > longest ? sum : longest;
    }
    return sqrt(longest);
}

static int FEW(far)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, void *workspace) {
    const FEW(task) t = FEW(task_of)(p, s, head, 1);
    /* Whatever a part has left in this workspace, of another sequence or by another thread. */
    const STORED *zeros = memset((char *)workspace + t.zeros, 0, t.k_copies - t.zeros), *rows[BLOCK];
    unsigned char keep[SAMPLE];
    vreal size = {0}, spread = {0};
    const double queries = FEW(longest_query)(p, s, head);
    if (!isfinite(queries) || queries * FEW(longest_key)(s, &t, workspace) > s->most)
        return 1;
    const ptrdiff_t count = FEW(sample)(s, &t.v, zeros, (STORED *)((char *)workspace + t.v_copies), keep, rows);
    for (ptrdiff_t a = 0; a < t.v.read; a += LANES) {
        vreal low = SPLAT(LARGEST), high = SPLAT(-LARGEST);
        for (ptrdiff_t i = 0; i < count; i++)
            if (keep[i]) {
                const vreal y = WIDEN(rows[i] + rc_min(a, t.v.read - LANES));
                low = -RC_NAME(vector_max)(-low, -y);
                high = RC_NAME(vector_max)(high, y);
            }
        size = RC_NAME(vector_max)(size, RC_NAME(vector_max)(-low, high));
        spread = RC_NAME(vector_max)(spread, high - low);
    }
    return RC_NAME(few_largest)(spread) > 0 && RC_NAME(few_largest)(size) > FAR * RC_NAME(few_largest)(spread);
}

static size_t FEW(workspace)(const rc_few_problem *p, ptrdiff_t n, ptrdiff_t heads) {
    const rc_few_sequence one = {.n = n};
    return FEW(task_of)(p, &one, 0, heads).size;
}

/* What a head has before a part's first key, but for its queries. */
static void FEW(begin)(const FEW(task) * t, char *at) {
    memset(at + t->sums, 0, t->head - t->sums);
    for (ptrdiff_t g = 0; g < t->layout.groups; g++) {
        RC_NAME(few_state) *state = (RC_NAME(few_state) *)at + g;
        for (int i = 0; i < LANES; i++)
            state->maximum[i] = -(REAL)INFINITY;
        state->sum = (vreal){0};
    }
}

/* One block of keys and one head, whose states, queries and sums are `at`; whether all scores are finite. */
static int FEW(of_head)(const rc_few_sequence *s, const FEW(task) * t, FEW(block) *b, ptrdiff_t j0, char *at, REAL *scores) {
    const int R = t->layout.R;
    int finite = 1;
    for (ptrdiff_t g = 0; g < t->layout.groups; g++) {
        for (int r = 0; r < R; r++) {
            const ptrdiff_t i = (g * R + r) % s->n;
            b->masking.first[r] = s->lo + i - j0;
            b->masking.last[r] = s->hi + i - j0;
        }
        finite &= FEW(of_block)(R, b, (REAL *)(at + t->queries) + g * R * t->layout.k_pitch, (RC_NAME(few_state) *)at + g,
                                (REAL *)(at + t->sums) + g * R * t->layout.v_pitch, scores);
    }
    return finite;
}

/* The block of keys from j0 on, `kept` of which are not hidden, head by head, for these may lie side by side in memory, as
 * may the rows of the next block that are asked for meanwhile; whether all scores are finite. */
static int FEW(of_heads)(const rc_few_sequence *s, const FEW(task) * t, ptrdiff_t j0, ptrdiff_t kept, const FEW(places) * now,
                         const FEW(places) * next, char *work) {
    const ptrdiff_t keys = rc_min(t->block, s->n_k - j0);
    const STORED *zeros = (const STORED *)(work + t->zeros), *k[BLOCK], *v[BLOCK], *next_k[BLOCK], *next_v[BLOCK];
    FEW(block) b = {.k_read = t->k.read, .v_read = t->v.read, .keys = rc_round_up(keys, KEYS_AT_ONCE(t->layout.R))};
    int finite = 1;
    b.masking.keep = kept < keys ? s->keep + j0 : 0;
    b.masking.keys = keys;
    for (ptrdiff_t head = 0; head < t->heads; head++) {
        b.k = FEW(find)(&t->k, now->k, head, zeros, (STORED *)(work + t->k_copies), k);
        b.v = FEW(find)(&t->v, now->v, head, zeros, (STORED *)(work + t->v_copies), v);
        b.next_k = FEW(share)(&t->k, next->k, t->block, t->heads, head, zeros, next_k);
        b.next_v = FEW(share)(&t->v, next->v, t->block, t->heads, head, zeros, next_v);
        finite &= FEW(of_head)(s, t, &b, j0, work + head * t->head, (REAL *)(work + t->scores));
    }
    return finite;
}

static ptrdiff_t FEW(locate_both)(const rc_few_sequence *s, const FEW(task) * t, ptrdiff_t j0, ptrdiff_t end,
                                  const STORED *zeros, FEW(places) *at) {
    FEW(locate)(&t->v, j0, rc_min(t->block, end - j0), s->keep, zeros, at->v);
    return FEW(locate)(&t->k, j0, rc_min(t->block, end - j0), s->keep, zeros, at->k);
}

static int FEW(of_parts)(const rc_few_problem *p, const rc_few_sequence *s, rc_few_task task, void *workspace) {
    const FEW(task) t = FEW(task_of)(p, s, task.head, task.heads);
    const ptrdiff_t end = rc_min(s->n_k, (task.part + task.parts) * PART);
    const int R = t.layout.R;
    char *work = workspace;
    const STORED *zeros = memset(work + t.zeros, 0, t.k_copies - t.zeros);
    FEW(places) at[3];
    ptrdiff_t j0 = task.part * PART, kept[3];
    int good = 1;
    for (ptrdiff_t h = 0; h < task.heads; h++)
        for (ptrdiff_t g = 0; g < t.layout.groups; g++)
            FEW(pack)(p, s, task.head + h, g * R, R, (REAL *)(work + h * t.head + t.queries) + g * R * t.layout.k_pitch);
    for (int i = 0; i < 2; i++)
        kept[i] = FEW(locate_both)(s, &t, j0 + i * t.block, end, zeros, at + i);
    for (int now = 0; j0 < end; j0 += t.block, now = (now + 1) % 3) {
        const ptrdiff_t after = j0 + t.block;
        const int next = (now + 1) % 3, later = (now + 2) % 3;
        kept[later] = FEW(locate_both)(s, &t, after + t.block, end, zeros, at + later);
        if (t.heads > 1) {
            FEW(ask_for_pages)(at[later].k, t.block);
            FEW(ask_for_pages)(at[later].v, t.block);
        }
        for (ptrdiff_t h = 0; h < task.heads && j0 % PART == 0; h++)
            FEW(begin)(&t, work + h * t.head);
        if (kept[now])
            good &= FEW(of_heads)(s, &t, j0, kept[now], at + now, at + next, work);
        for (ptrdiff_t h = 0; h < task.heads && (after % PART == 0 || after >= end); h++) {
            const char *own = work + h * t.head;
            double *stats = RC_NAME(few_partial)(p, s, task.head + h, j0 / PART);
            good &= RC_NAME(few_leave)(p, rc_rows(p, s), stats, (const RC_NAME(few_state) *)own, (const REAL *)(own + t.sums),
                                       t.v.read);
        }
    }
    return good;
}
