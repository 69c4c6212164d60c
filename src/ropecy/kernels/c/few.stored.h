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

/* Where to read the rows of keys [j0, j0 + keys), and zeros up to BLOCK; how many of them are not hidden. */
static ptrdiff_t FEW(find)(const FEW(matrix) * m, ptrdiff_t j0, ptrdiff_t keys, const unsigned char *keep, const STORED *zeros,
                           STORED *copies, const STORED **row) {
    keys = rc_max(0, keys);
    ptrdiff_t kept = keys;
    for (ptrdiff_t j = 0; j < keys;) {
        const ptrdiff_t at = m->from + (j0 + j) * m->apart, within = at % m->page, step = m->strides.row * m->apart;
        const ptrdiff_t end = rc_min(keys, j + (m->page - within + m->apart - 1) / m->apart);
        const char *next = m->first + m->pages[at / m->page] * m->strides.page + within * m->strides.row;
        for (; j < end; j++, next += step)
            row[j] = (const STORED *)next;
    }
    for (ptrdiff_t j = keys; j < BLOCK; j++)
        row[j] = zeros;
    for (ptrdiff_t j = 0; j < keys && (keep || m->copied); j++) {
        if (keep && !keep[j0 + j]) {
            row[j] = zeros;
            kept--;
        } else if (m->copied) {
            const char *from = (const char *)row[j];
            row[j] = memset(copies, 0, m->read * sizeof(STORED));
            for (ptrdiff_t a = 0; a < m->width; a++)
                copies[a] = *(const STORED *)(from + a * m->strides.column);
            copies += m->read;
        }
    }
    return kept;
}

typedef struct {
    const STORED **k, **v, **next; /* rows of keys and values, and of the keys of the block that follows */
    ptrdiff_t k_read, v_read, keys; /* keys: whole rounds of scores, zeros among them */
    RC_NAME(few_masking) masking;
} FEW(block);

RC_INLINE void FEW(ask_for)(const STORED *row, ptrdiff_t width) {
    for (ptrdiff_t a = 0; a < width; a += LINE / (ptrdiff_t)sizeof(STORED))
        __builtin_prefetch(row + a, 0, 2);
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
            for (int l = 0; l < J; l++)
                FEW(ask_for)(b->v[j + i + l], b->v_read);
            ptrdiff_t a = 0;
            for (; a + LANES <= width; a += LANES, x += R * LANES)
                FEW(dots)(R, J, k, a, x, acc);
            if (a < width)
                FEW(dots)(R, J, k, width - LANES, x, acc);
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

/* o[query][c] = factor[query] o[query][c] + sum_key S[key][query] v[key][c], C vectors of columns from `at` on, one of
 * `passes` passes over the rows; one row of the next keys is asked for after as many rows. */
RC_INLINE void FEW(columns)(const int R, const int C, const FEW(block) * b, ptrdiff_t at, const REAL *S, const REAL *factor,
                            REAL *o, const STORED *const *next, ptrdiff_t passes) {
    const ptrdiff_t pitch = rc_round_up(b->v_read, LANES);
    vreal acc[8][8];
    RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int c = 0; c < C; c++) acc[r][c] = (vreal){0};
    for (ptrdiff_t j = 0; j < b->keys;) {
        FEW(ask_for)(*next++, b->k_read);
        for (const ptrdiff_t end = rc_min(j + passes, b->keys); j < end; j++, S += R) {
            const STORED *v = b->v[j] + at;
            vreal y[8];
            RC_UNROLL for (int c = 0; c < C; c++) y[c] = WIDEN(v + c * LANES);
            RC_UNROLL for (int r = 0; r < R; r++) {
                const vreal weight = SPLAT(S[r]);
                RC_UNROLL for (int c = 0; c < C; c++) acc[r][c] += weight * y[c];
            }
        }
    }
    RC_UNROLL for (int r = 0; r < R; r++) RC_UNROLL for (int c = 0; c < C; c++) {
        REAL *sum = o + r * pitch + c * LANES;
        STORE(sum, LOAD(sum) * factor[r] + acc[r][c]);
    }
}

RC_INLINE void FEW(values)(const int R, const FEW(block) * b, const REAL *S, const REAL *factor, REAL *o) {
    const int C = ACCUMULATORS / R < 8 ? ACCUMULATORS / R : 8, half = C / 2 > 1 ? C / 2 : 1;
    const ptrdiff_t width = b->v_read, vectors = (width + LANES - 1) / LANES;
    const ptrdiff_t passes = vectors / C + vectors % C / half + vectors % C % half;
    const STORED *const *next = b->next;
    ptrdiff_t c = 0;
    for (; c + C * LANES <= width; c += C * LANES, next += b->keys / passes)
        FEW(columns)(R, C, b, c, S, factor, o + c, next, passes);
    for (; c + half * LANES <= width; c += half * LANES, next += b->keys / passes)
        FEW(columns)(R, half, b, c, S, factor, o + c, next, passes);
    for (; c < width; c += LANES, next += b->keys / passes)
        FEW(columns)(R, 1, b, rc_min(c, width - LANES), S, factor, o + c, next, passes);
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

/* A task: where it reads, and where in a workspace, in bytes, it has what. */
typedef struct {
    FEW(matrix) k, v;
    RC_NAME(few_layout) layout;
    ptrdiff_t block; /* keys in a block */
    size_t queries, scores, sums, zeros, k_copies, v_copies, size;
} FEW(task);

static FEW(task) FEW(task_of)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head) {
    FEW(task) t = {FEW(matrix_of)(p, s, (const char *)s->k + head * p->k.head, p->k, p->d),
                   FEW(matrix_of)(p, s, (const char *)s->v + head * p->v.head, p->v, p->d_v),
                   RC_NAME(few_layout_of)(p, rc_rows(p, s)), BLOCK};
    const RC_NAME(few_layout) *l = &t.layout;
    while (t.block > LEAST_BLOCK && t.block * (p->d + p->d_v) * sizeof(STORED) > CLOSE_BYTES)
        t.block /= 2;
    t.queries = rc_round_up(l->groups * sizeof(RC_NAME(few_state)), LINE);
    t.scores = t.queries + rc_round_up(l->groups * l->R * l->k_pitch * sizeof(REAL), LINE);
    t.sums = t.scores + BLOCK * MOST_ROWS * sizeof(REAL);
    t.zeros = t.sums + rc_round_up(l->groups * l->R * l->v_pitch * sizeof(REAL), LINE);
    t.k_copies = t.zeros + rc_round_up(rc_max(l->k_pitch, l->v_pitch) * sizeof(STORED), LINE);
    /* Of this block and of the next one. */
    t.v_copies = t.k_copies + (t.k.copied ? 2 * BLOCK * rc_round_up(t.k.read * sizeof(STORED), LINE) : 0);
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
    for (int l = 0; l < LANES; l++)
        x[l] = (REAL)(x[l] * p->scale);
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
        double sum = 0;
        for (ptrdiff_t a = 0; a < p->d; a += LANES) {
            const vreal x = FEW(query)(p, q, a);
            for (int l = 0; l < LANES; l++)
                sum += (double)x[l] * x[l];
        }
        off += sum - sum;
        longest = sum > longest ? sum : longest;
    }
    return sqrt(longest) + off;
}

/* A sample of rows: where to read them, and which are kept. */
static ptrdiff_t FEW(sample)(const rc_few_sequence *s, FEW(matrix) *m, const STORED *zeros, STORED *copies,
                             unsigned char *keep, const STORED **rows) {
    const ptrdiff_t apart = rc_max(1, (s->n_k + SAMPLE - 1) / SAMPLE), count = (s->n_k + apart - 1) / apart;
    m->apart = apart;
    for (ptrdiff_t i = 0; i < count; i++)
        keep[i] = s->keep ? s->keep[i * apart] : 1;
    FEW(find)(m, 0, count, keep, zeros, copies, rows);
    return count;
}

/* The largest norm of a key, by a sample of the kept ones. */
static double FEW(longest_key)(const rc_few_sequence *s, const FEW(task) * t, void *workspace) {
    const STORED *zeros = (const STORED *)((char *)workspace + t->zeros), *rows[BLOCK];
    FEW(matrix) sample = t->k;
    unsigned char keep[SAMPLE];
    double longest = 0;
    const ptrdiff_t count = FEW(sample)(s, &sample, zeros, (STORED *)((char *)workspace + t->k_copies), keep, rows);
    for (ptrdiff_t i = 0; i < count; i++) {
        double sum = 0;
        for (ptrdiff_t a = 0; a < sample.read; a += LANES) {
            const ptrdiff_t at = rc_min(a, sample.read - LANES);
            const vreal x = WIDEN(rows[i] + at);
            for (ptrdiff_t l = a - at; l < LANES; l++)
                sum += (double)x[l] * x[l];
        }
        longest = sum > longest ? sum : longest;
    }
    return sqrt(longest);
}

static int FEW(far)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, void *workspace) {
    const FEW(task) t = FEW(task_of)(p, s, head);
    const STORED *zeros = (const STORED *)((char *)workspace + t.zeros), *rows[BLOCK];
    FEW(matrix) sample = t.v;
    unsigned char keep[SAMPLE];
    vreal size = {0}, spread = {0};
    const double queries = FEW(longest_query)(p, s, head);
    if (!isfinite(queries) || queries * FEW(longest_key)(s, &t, workspace) > s->most)
        return 1;
    const ptrdiff_t count = FEW(sample)(s, &sample, zeros, (STORED *)((char *)workspace + t.v_copies), keep, rows);
    for (ptrdiff_t a = 0; a < sample.read; a += LANES) {
        vreal low = SPLAT(LARGEST), high = SPLAT(-LARGEST);
        for (ptrdiff_t i = 0; i < count; i++)
            if (keep[i]) {
                const vreal y = WIDEN(rows[i] + rc_min(a, sample.read - LANES));
                low = -RC_NAME(vector_max)(-low, -y);
                high = RC_NAME(vector_max)(high, y);
            }
        size = RC_NAME(vector_max)(size, RC_NAME(vector_max)(-low, high));
        spread = RC_NAME(vector_max)(spread, high - low);
    }
    return RC_NAME(few_largest)(spread) > 0 && RC_NAME(few_largest)(size) > FAR * RC_NAME(few_largest)(spread);
}

static size_t FEW(workspace)(const rc_few_problem *p, ptrdiff_t n) {
    const rc_few_sequence one = {.n = n};
    return FEW(task_of)(p, &one, 0).size;
}

/* The part's keys [j0, end), block by block; whether all scores are finite. */
static int FEW(of_keys)(const rc_few_sequence *s, const FEW(task) * t, ptrdiff_t j0, ptrdiff_t end, char *work) {
    const int R = t->layout.R;
    const unsigned char *keep = s->keep;
    const STORED *zeros = (const STORED *)(work + t->zeros), *rows[3][BLOCK];
    STORED *k_copies = (STORED *)(work + t->k_copies), *v_copies = (STORED *)(work + t->v_copies);
    FEW(block) b = {rows[0], rows[1], rows[2], t->k.read, t->v.read};
    int finite = 1;
    ptrdiff_t kept = FEW(find)(&t->k, j0, rc_min(t->block, end - j0), keep, zeros, k_copies, b.k), coming;
    for (int odd = 1; j0 < end; j0 += t->block, odd = !odd, kept = coming) {
        const ptrdiff_t keys = rc_min(t->block, end - j0), after = j0 + t->block;
        const STORED **k = b.k;
        coming = FEW(find)(&t->k, after, rc_min(t->block, end - after), keep, zeros, k_copies + odd * BLOCK * t->k.read, b.next);
        if (kept) {
            FEW(find)(&t->v, j0, keys, keep, zeros, v_copies, b.v);
            b.keys = rc_round_up(keys, KEYS_AT_ONCE(R));
            b.masking.keep = kept < keys ? keep + j0 : 0;
            b.masking.keys = keys;
            for (ptrdiff_t g = 0; g < t->layout.groups; g++) {
                for (int r = 0; r < R; r++) {
                    const ptrdiff_t i = (g * R + r) % s->n;
                    b.masking.first[r] = s->lo + i - j0;
                    b.masking.last[r] = s->hi + i - j0;
                }
                finite &= FEW(of_block)(R, &b, (REAL *)(work + t->queries) + g * R * t->layout.k_pitch,
                                        (RC_NAME(few_state) *)work + g,
                                        (REAL *)(work + t->sums) + g * R * t->layout.v_pitch, (REAL *)(work + t->scores));
            }
        }
        b.k = b.next;
        b.next = k;
    }
    return finite;
}

static int FEW(of_part)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, ptrdiff_t part, void *workspace) {
    const FEW(task) t = FEW(task_of)(p, s, head);
    char *work = workspace;
    memset(work + t.sums, 0, t.k_copies - t.sums);
    for (ptrdiff_t g = 0; g < t.layout.groups; g++) {
        RC_NAME(few_state) *state = (RC_NAME(few_state) *)work + g;
        for (int i = 0; i < LANES; i++)
            state->maximum[i] = -(REAL)INFINITY;
        state->sum = (vreal){0};
        FEW(pack)(p, s, head, g * t.layout.R, t.layout.R, (REAL *)(work + t.queries) + g * t.layout.R * t.layout.k_pitch);
    }
    const int finite = FEW(of_keys)(s, &t, part * PART, rc_min(s->n_k, (part + 1) * PART), work);
    const RC_NAME(few_state) *states = (const RC_NAME(few_state) *)work;
    double *stats = RC_NAME(few_partial)(p, s, head, part);
    return RC_NAME(few_leave)(p, rc_rows(p, s), stats, states, (const REAL *)(work + t.sums), t.v.read) && finite;
}
