/* Rows of the problem as tasks read them, and the states that they are added to (included by monomials.template.c). */

/* ---- rows of the problem ---- */

static const REAL *RC_NAME(queries)(const rc_monomials_problem *p, ptrdiff_t lane, ptrdiff_t row) {
    return (const REAL *)p->q + (lane * p->n + row) * p->d;
}
static const REAL *RC_NAME(keys)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t row) {
    return (const REAL *)p->k + (head * p->n_k + row) * p->d;
}
static const REAL *RC_NAME(centre)(const rc_monomials_problem *p, ptrdiff_t head) {
    return p->centre ? (const REAL *)p->centre + head * p->d : 0;
}

/* What queries and keys of a head are multiplied by. */
static REAL RC_NAME(q_factor)(const rc_monomials_problem *p, ptrdiff_t head) { return (REAL)p->q_factor[head]; }
static REAL RC_NAME(k_factor)(const rc_monomials_problem *p, ptrdiff_t head) { return (REAL)p->k_factor[head]; }

/* The head of which `head` is a block of columns, now those of w. */
static ptrdiff_t RC_NAME(take_block)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t head) {
    w->block = head % p->blocks;
    w->first = w->block * p->d_v;
    return head / p->blocks;
}

/* x[t][a] = factor (row[t][a] - shift[a]), row pitch `pitch`, zeros past d */
static void RC_NAME(load_rows)(const REAL *rows, ptrdiff_t count, ptrdiff_t d, REAL factor, const REAL *shift, REAL *x, ptrdiff_t pitch) {
    for (ptrdiff_t t = 0; t < count; t++) {
        for (ptrdiff_t a = 0; a < d; a++)
            x[t * pitch + a] = factor * (rows[t * d + a] - (shift ? shift[a] : 0));
        for (ptrdiff_t a = d; a < pitch; a++)
            x[t * pitch + a] = 0;
    }
}

/* Rows that count for nothing are read as 0: keys that are masked, and in backward queries without a denominator. Their
 * columns are 0, but their scores have no bound: a weight or a monomial that overflows, times 0, would be NaN. */

/* Keys [row, row + count), centred and scaled, by rows. */
static void RC_NAME(load_keys)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t row, ptrdiff_t count, REAL *x) {
    const unsigned char *mask = p->key_mask ? p->key_mask + head * p->n_k + row : 0;
    RC_NAME(load_rows)(RC_NAME(keys)(p, head, row), count, p->d, RC_NAME(k_factor)(p, head), RC_NAME(centre)(p, head), x, p->d);
    for (ptrdiff_t t = 0; mask && t < count; t++)
        for (ptrdiff_t a = 0; a < p->d && !mask[t]; a++)
            x[t * p->d + a] = 0;
}

/* The same by lanes. */
static void RC_NAME(load_key_tile)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t row, ptrdiff_t count, REAL *xt,
                                   const int tile) {
    const unsigned char *mask = p->key_mask ? p->key_mask + head * p->n_k + row : 0;
    RC_NAME(tile_load)(RC_NAME(keys)(p, head, row), p->d, count, p->d, RC_NAME(k_factor)(p, head), RC_NAME(centre)(p, head), xt, tile);
    for (ptrdiff_t t = 0; mask && t < count; t++)
        for (ptrdiff_t a = 0; a < p->d && !mask[t]; a++)
            xt[a * tile + t] = 0;
}

/* Queries [row, row + count) of backward, scaled, by rows of `pitch`. */
static void RC_NAME(load_grad_queries)(const rc_monomials_problem *p, ptrdiff_t lane, ptrdiff_t row, ptrdiff_t count, REAL *x,
                                       ptrdiff_t pitch) {
    const REAL *inverse = (const REAL *)p->inverse + lane * p->n + row;
    RC_NAME(load_rows)(RC_NAME(queries)(p, lane, row), count, p->d, RC_NAME(q_factor)(p, lane / p->groups), 0, x, pitch);
    for (ptrdiff_t t = 0; t < count; t++)
        for (ptrdiff_t a = 0; a < p->d && inverse[t] == 0; a++)
            x[t * pitch + a] = 0;
}

/* The same by lanes. */
static void RC_NAME(load_grad_query_tile)(const rc_monomials_problem *p, ptrdiff_t lane, ptrdiff_t row, ptrdiff_t count, REAL *xt,
                                          const int tile) {
    const REAL *inverse = (const REAL *)p->inverse + lane * p->n + row;
    RC_NAME(tile_load)(RC_NAME(queries)(p, lane, row), p->d, count, p->d, RC_NAME(q_factor)(p, lane / p->groups), 0, xt, tile);
    for (ptrdiff_t t = 0; t < count; t++)
        for (ptrdiff_t a = 0; a < p->d && inverse[t] == 0; a++)
            xt[a * tile + t] = 0;
}

/* How many rows of `width`, from x on, can be read by vectors that end `wide` after a row's beginning without passing `end`. */
static ptrdiff_t RC_NAME(whole_rows)(const REAL *x, const REAL *end, ptrdiff_t width, ptrdiff_t wide, ptrdiff_t count) {
    return end - x < wide ? 0 : rc_min(count, (end - x - wide) / width + 1);
}

/* Lanes c on of a row's columns: which of them are of values, what is taken from these, and the last column. */
typedef struct {
    vint value;
    vreal middle, last;
} RC_NAME(column_lanes);

static RC_NAME(column_lanes) RC_NAME(lanes_from)(ptrdiff_t c, ptrdiff_t d_v, const REAL *middle) {
    RC_NAME(column_lanes) at;
    for (int lane = 0; lane < LANES; lane++, c++) {
        at.value[lane] = -(c < d_v);
        at.middle[lane] = c < d_v ? middle[c] : 0;
        at.last[lane] = c == d_v;
    }
    return at;
}

/* [v - value_centre, 1] of keys, 0 where the key is masked, zeros past the columns */
static void RC_NAME(load_key_columns)(const rc_monomials_problem *p, const RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t row,
                                      ptrdiff_t count, REAL *out) {
    const ptrdiff_t width = p->width, wide = w->wide_columns;
    const REAL *v = (const REAL *)p->v + (head * p->n_k + row) * width + w->first;
    const REAL *middle = (const REAL *)p->value_centre + head * width + w->first;
    const unsigned char *mask = p->key_mask ? p->key_mask + head * p->n_k + row : 0;
    const ptrdiff_t whole = RC_NAME(whole_rows)(v, (const REAL *)p->v + p->heads * p->n_k * width, width, wide, count);
    for (ptrdiff_t c = 0; c < wide; c += LANES) {
        const RC_NAME(column_lanes) at = RC_NAME(lanes_from)(c, p->d_v, middle);
        for (ptrdiff_t t = 0; t < whole; t++)
            STORE(out + t * wide + c, (vreal)((vint)(LOAD(v + t * width + c) - at.middle) & at.value) + at.last);
        for (ptrdiff_t t = whole; t < count; t++)
            for (int lane = 0; lane < LANES; lane++)
                out[t * wide + c + lane] = at.value[lane] ? v[t * width + c + lane] - at.middle[lane] : at.last[lane];
    }
    for (ptrdiff_t t = 0; mask && t < count; t++)
        for (ptrdiff_t c = 0; c < wide && !mask[t]; c++)
            out[t * wide + c] = 0;
}

/* The first `count` numbers, at most a vector of them, and zeros. */
static vreal RC_NAME(load_some)(const REAL *x, ptrdiff_t count) {
    REAL some[LANES] = {0};
    for (ptrdiff_t i = 0; i < rc_min(LANES, count); i++)
        some[i] = x[i];
    return LOAD(some);
}

/* What `to` and `of` of one row, these columns, add to the row's <do, o - value_centre>; do / den is returned. */
RC_INLINE vreal RC_NAME(add_dot)(vreal to, vreal of, const RC_NAME(column_lanes) * at, REAL inverse, vreal *dot) {
    to = (vreal)((vint)to & at->value);
    *dot += to * ((vreal)((vint)of & at->value) - at->middle);
    return to * inverse;
}

/* [dn dden] of queries: do / den and -<do, o - value_centre> / den, 0 without a denominator, zeros past the columns */
static void RC_NAME(load_query_columns)(const rc_monomials_problem *p, const RC_NAME(room) * w, ptrdiff_t lane, ptrdiff_t row,
                                        ptrdiff_t count, REAL *out) {
    const ptrdiff_t d_v = p->d_v, wide = w->wide_columns, all = p->heads * p->groups * p->n * d_v;
    const REAL *grad = (const REAL *)p->grad + (lane * p->n + row) * d_v, *o = (const REAL *)p->o + (lane * p->n + row) * d_v;
    const REAL *inverse = (const REAL *)p->inverse + lane * p->n + row;
    const REAL *middle = (const REAL *)p->value_centre + lane / p->groups * d_v;
    const ptrdiff_t whole = RC_NAME(whole_rows)(grad, (const REAL *)p->grad + all, d_v, wide, count);
    for (ptrdiff_t t = 0; t < count; t += LANES) {
        vreal dots[LANES];
        REAL sums[LANES];
        RC_UNROLL for (int r = 0; r < LANES; r++) dots[r] = (vreal){0};
        for (ptrdiff_t c = 0; c < wide; c += LANES) {
            const RC_NAME(column_lanes) at = RC_NAME(lanes_from)(c, d_v, middle);
            if (t + LANES <= whole)
                RC_UNROLL for (int r = 0; r < LANES; r++)
                    STORE(out + (t + r) * wide + c,
                          RC_NAME(add_dot)(LOAD(grad + (t + r) * d_v + c), LOAD(o + (t + r) * d_v + c), &at, inverse[t + r], dots + r));
            else /* the same sums in the same order, for what a row gets depends on its own head alone */
                for (ptrdiff_t r = 0; r < rc_min(LANES, count - t); r++)
                    STORE(out + (t + r) * wide + c,
                          RC_NAME(add_dot)(RC_NAME(load_some)(grad + (t + r) * d_v + c, d_v - c),
                                           RC_NAME(load_some)(o + (t + r) * d_v + c, d_v - c), &at, inverse[t + r], dots + r));
        }
        STORE(sums, RC_NAME(fold)(dots));
        for (ptrdiff_t r = 0; r < rc_min(LANES, count - t); r++)
            out[(t + r) * wide + d_v] = -(sums[r] * inverse[t + r]);
    }
    for (ptrdiff_t t = 0; t < count; t++)
        for (ptrdiff_t c = 0; c < wide && inverse[t] == 0; c++)
            out[t * wide + c] = 0;
}

/* ---- states ---- */

/* What is added here is summed apart from the state `from` (NULL is 0) that it is added to, so that the sum of a segment is
 * the same whether the segment is scanned or only summed. */
static void RC_NAME(start_state)(const rc_monomials_problem *p, RC_NAME(room) * w, const double *from) {
    const ptrdiff_t size = w->y.columns * w->y.pitch;
    RC_NAME(find_sources)(&w->y, p->state_degree, w->sources);
    w->start = from;
    w->fallen = 1;
    for (ptrdiff_t i = 0; i < size; i++) {
        w->master[i] = 0;
        w->part[i] = 0;
    }
    for (ptrdiff_t i = 0; from && i < size; i++)
        w->base[i] = (REAL)from[i];
}

/* Gathers what was added since the last time, seen from where weights are `fall` of what they were. */
static void RC_NAME(fold_part)(RC_NAME(room) * w, double fall) {
    const ptrdiff_t size = w->y.columns * w->y.pitch;
    w->fallen *= fall;
    for (ptrdiff_t i = 0; i < size; i++) {
        w->master[i] = (w->master[i] + w->part[i]) * fall;
        w->part[i] = 0;
    }
    for (ptrdiff_t i = 0; w->start && i < size; i++)
        w->base[i] = (REAL)(w->start[i] * w->fallen + w->master[i]);
}

/* The state after a segment, from the state before it and the segment's sum. Every such sum is made here, for it must come
 * out the same wherever it is made. */
RC_NOINLINE void RC_NAME(follow)(ptrdiff_t size, const double *before, double fall, const double *sum, double *after) {
    for (ptrdiff_t i = 0; i < size; i++)
        after[i] = before[i] * fall + sum[i];
}

/* The state from which the scan of the next segment starts, which lies at `next`. */
static void RC_NAME(go_on)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t segment, double *next) {
    RC_NAME(fold_part)(w, 1);
    RC_NAME(follow)(w->y.columns * p->pitch, w->start, p->falls ? p->falls[head * p->segments + segment] : 1, w->master, next);
}

/* w->fall and w->chunk_fall of a head, which scans read. */
static void RC_NAME(start_fall)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t head) {
    w->chunk_fall = p->decay ? __builtin_exp(-p->decay[head] * p->chunk) : 1;
    for (ptrdiff_t m = -AHEAD; m < p->chunk + TILE; m++)
        w->fall[m] = m < 0 ? 0 : p->decay ? (REAL)__builtin_exp(-p->decay[head] * m) : 1;
}

/* Where a chunk ends: the last one where keys and rows do, so that a state can be seen from there. */
static ptrdiff_t RC_NAME(chunk_end)(const rc_monomials_problem *p, ptrdiff_t chunk) {
    return rc_min((chunk + 1) * p->chunk, rc_max(p->n_k, p->n + p->q_offset));
}

/* The state, seen from the other end of a chunk. In float64, for a rounded factor's error would grow with every chunk. */
static void RC_NAME(decay_state)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t chunk) {
    if (!p->decay)
        return;
    const ptrdiff_t length = RC_NAME(chunk_end)(p, chunk) - chunk * p->chunk;
    RC_NAME(fold_part)(w, length == p->chunk ? w->chunk_fall : __builtin_exp(-p->decay[head] * rc_max(0, length)));
}

/* Rows of columns times fall[0], fall[step], fall[2 step], ... */
static void RC_NAME(decay_rows)(const rc_monomials_problem *p, const RC_NAME(room) * w, const REAL *fall, int step, ptrdiff_t count,
                                REAL *columns) {
    for (ptrdiff_t t = 0; p->decay && t < count; t++)
        for (ptrdiff_t c = 0; c < w->wide_columns; c++)
            columns[t * w->wide_columns + c] *= fall[step * t];
}

/* Adds rows to the state, folding by the count of updates so far. The state is seen from token `stop` (keys: the end of
 * the chunk) or `start` (queries: the first of the chunk). */
static void RC_NAME(add_rows)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t count, const REAL *x, const REAL *columns,
                              int *updates) {
    RC_NAME(update)(&w->y, p->state_degree, w->sources, (int)count, x, columns, w->wide_columns, w->rows, w->part);
    if (++*updates % FOLD == 0)
        RC_NAME(fold_part)(w, 1);
}
static void RC_NAME(add_keys)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t row, ptrdiff_t end,
                              ptrdiff_t stop, int *updates) {
    for (; row < end; row += w->update_tokens) {
        const ptrdiff_t count = rc_min(w->update_tokens, end - row);
        RC_NAME(load_keys)(p, head, row, count, w->x);
        RC_NAME(load_key_columns)(p, w, head, row, count, w->columns);
        RC_NAME(decay_rows)(p, w, w->fall + (stop - row), -1, count, w->columns);
        RC_NAME(add_rows)(p, w, count, w->x, w->columns, updates);
    }
}
/* The same keys of a chunk that load_chunk has read, which are not to be read from w->key_columns after that. */
static void RC_NAME(add_chunk)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t keys, ptrdiff_t length, int *updates) {
    RC_NAME(decay_rows)(p, w, w->fall + length, -1, keys, w->key_columns);
    for (ptrdiff_t j = 0; j < keys; j += w->update_tokens)
        RC_NAME(add_rows)(p, w, rc_min(w->update_tokens, keys - j), w->keys + j * p->d, w->key_columns + j * w->wide_columns, updates);
}
/* `count` queries from row `begin` on, of one lane and one chunk. */
static void RC_NAME(load_query_chunk)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t lane, ptrdiff_t begin, ptrdiff_t count) {
    RC_NAME(load_grad_queries)(p, lane, begin, count, w->query_rows, p->d);
    RC_NAME(load_query_columns)(p, w, lane, begin, count, w->query_columns);
}
/* Adds them, which spoils w->query_columns. */
static void RC_NAME(add_query_chunk)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t begin, ptrdiff_t count, ptrdiff_t start,
                                     int *updates) {
    RC_NAME(decay_rows)(p, w, w->fall + (begin + p->q_offset - start), 1, count, w->query_columns);
    for (ptrdiff_t i = 0; i < count; i += w->update_tokens)
        RC_NAME(add_rows)(p, w, rc_min(w->update_tokens, count - i), w->query_rows + i * p->d,
                          w->query_columns + i * w->wide_columns, updates);
}

/* Rows of `count` that chunk `chunk` holds, when row r sits at index r + offset: causal queries are chunked with the
 * keys they see. Rows before the first key are in no chunk; chunks go on past the last key while there are rows. */
static ptrdiff_t RC_NAME(chunk_row)(const rc_monomials_problem *p, ptrdiff_t chunk, ptrdiff_t offset, ptrdiff_t count) {
    return rc_max(0, rc_min(count, chunk * p->chunk - offset));
}

static void RC_NAME(keep_state)(const RC_NAME(room) * w, double *to) {
    for (ptrdiff_t i = 0; i < w->y.columns * w->y.pitch; i++)
        to[i] = w->master[i];
}

static void RC_NAME(sum_keys)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t segment, void *workspace) {
    RC_NAME(room) w;
    int updates = 0;
    RC_NAME(lay_out)(p, workspace, &w);
    double *state = p->states + (head * p->segments + segment) * w.y.columns * p->pitch;
    head = RC_NAME(take_block)(p, &w, head);
    RC_NAME(start_state)(p, &w, 0);
    RC_NAME(start_fall)(p, &w, head);
    for (ptrdiff_t chunk = segment * p->chunks_per_segment; chunk < (segment + 1) * p->chunks_per_segment; chunk++) {
        RC_NAME(decay_state)(p, &w, head, chunk);
        RC_NAME(add_keys)(p, &w, head, RC_NAME(chunk_row)(p, chunk, 0, p->n_k), RC_NAME(chunk_row)(p, chunk + 1, 0, p->n_k),
                          RC_NAME(chunk_end)(p, chunk), &updates);
    }
    RC_NAME(fold_part)(&w, 1);
    RC_NAME(keep_state)(&w, state);
}

static void RC_NAME(sum_queries)(const rc_monomials_problem *p, ptrdiff_t head, ptrdiff_t segment, void *workspace) {
    RC_NAME(room) w;
    int updates = 0;
    RC_NAME(lay_out)(p, workspace, &w);
    RC_NAME(start_state)(p, &w, 0);
    RC_NAME(start_fall)(p, &w, head);
    for (ptrdiff_t chunk = (segment + 1) * p->chunks_per_segment - 1; chunk >= segment * p->chunks_per_segment; chunk--) {
        RC_NAME(decay_state)(p, &w, head, chunk);
        const ptrdiff_t begin = RC_NAME(chunk_row)(p, chunk, p->q_offset, p->n);
        const ptrdiff_t count = RC_NAME(chunk_row)(p, chunk + 1, p->q_offset, p->n) - begin;
        for (ptrdiff_t group = 0; group < p->groups; group++) {
            RC_NAME(load_query_chunk)(p, &w, head * p->groups + group, begin, count);
            RC_NAME(add_query_chunk)(p, &w, begin, count, chunk * p->chunk, &updates);
        }
    }
    RC_NAME(fold_part)(&w, 1);
    RC_NAME(keep_state)(&w, p->grad_states + (head * p->segments + segment) * w.y.columns * p->pitch);
}

static const REAL *RC_NAME(of_head)(const rc_monomials_problem *p, const void *weights, ptrdiff_t head) {
    return (const REAL *)weights + head * p->weights_apart;
}

static void RC_NAME(pack)(const rc_monomials_problem *p, ptrdiff_t head, const double *state, void *packed, void *grad_packed,
                          void *workspace) {
    RC_NAME(room) w;
    RC_NAME(lay_out)(p, workspace, &w);
    RC_NAME(start_state)(p, &w, state);
    if (packed)
        RC_NAME(evaluate_pack)(&w.y, p->degree, w.base, w.part, RC_NAME(of_head)(p, p->weights, head), packed);
    if (grad_packed)
        RC_NAME(differentiate_pack)(&w.y, p->grad_degree, w.base, w.part, RC_NAME(of_head)(p, p->grad_weights, head),
                                    grad_packed);
}
