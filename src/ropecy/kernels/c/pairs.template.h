/* Pairs inside a causal chunk, by exp itself (included by monomials.template.c).
 *
 * Lanes are queries of a tile; its last vectors alone see the last keys, so that half of a square on the diagonal is left out but
 * for whole vectors.
 */

/* Keys [row, row + count) of a chunk, as the exact pairs read them. */
static void RC_NAME(load_chunk)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t head, ptrdiff_t row, ptrdiff_t count) {
    RC_NAME(load_keys)(p, head, row, count, w->keys);
    RC_NAME(load_key_columns)(p, w, head, row, count, w->key_columns);
    RC_NAME(pack_rows)(w->keys, p->d, count, rc_round_up(count, KEYS), w->key_pack);
}

static void RC_NAME(pack_columns)(RC_NAME(room) * w, ptrdiff_t keys) {
    const ptrdiff_t columns = w->y.columns;
    for (ptrdiff_t j = 0; j < keys; j += KEYS)
        RC_NAME(tile_load)(w->key_columns + j * w->wide_columns, w->wide_columns, rc_min(KEYS, keys - j), columns, 1, 0,
                           w->column_pack + j * columns, KEYS);
}

/* E[key][lane] = exp(score - decay m), m = limit + lane - key, of the last V vectors of queries for keys [j, end) from key j0 of
 * the chunk on; 0 where m < 0. `fall` is NULL where all m >= 0 and nothing decays. */
RC_INLINE void RC_NAME(exact_keys)(const int V, const RC_NAME(room) * w, ptrdiff_t d, ptrdiff_t j0, ptrdiff_t j, ptrdiff_t end,
                                   const REAL *fall) {
    for (const ptrdiff_t lane = (VECTORS - V) * LANES; j < end; j += KEYS) {
        vreal acc[KEYS][VECTORS];
        RC_NAME(dots)(V, acc, d, w->scaled + lane, TILE, w->key_pack + (j0 + j) * d);
        RC_UNROLL for (int r = 0; r < KEYS; r++) RC_UNROLL for (int v = 0; v < V; v++) {
            vreal e = RC_NAME(exp2)(acc[r][v]);
            if (fall)
                e *= LOAD(fall - (j + r) + lane + v * LANES);
            STORE(w->E + (j + r) * TILE + lane + v * LANES, e);
        }
    }
}

/* The same for `count` keys and all vectors of a tile but the first `hidden`, which see none of them. */
static void RC_NAME(exact_pairs)(const rc_monomials_problem *p, const RC_NAME(room) * w, ptrdiff_t j0, ptrdiff_t count, ptrdiff_t limit,
                                 int hidden) {
    const ptrdiff_t whole = p->decay || hidden ? 0 : rc_max(0, rc_min(count, limit + 1 - j0)) / KEYS * KEYS;
    const REAL *fall = w->fall + limit - j0;
    if (hidden == 0) {
        RC_NAME(exact_keys)(VECTORS, w, p->d, j0, 0, whole, 0);
        RC_NAME(exact_keys)(VECTORS, w, p->d, j0, whole, count, fall);
    } else if (hidden == VECTORS - 1)
        RC_NAME(exact_keys)(1, w, p->d, j0, 0, count, fall);
    else
        RC_NAME(exact_keys)(2, w, p->d, j0, 0, count, fall);
}

/* dE[key][lane] = E <dN, columns of key> of the last V vectors. */
RC_INLINE void RC_NAME(gradients_of_keys)(const int V, const RC_NAME(room) * w, ptrdiff_t j0, ptrdiff_t count) {
    const ptrdiff_t lane = (VECTORS - V) * LANES;
    for (ptrdiff_t j = 0; j < count; j += KEYS) {
        vreal acc[KEYS][VECTORS];
        RC_NAME(dots)(V, acc, w->y.columns, w->dN + lane, TILE, w->column_pack + (j0 + j) * w->y.columns);
        RC_UNROLL for (int r = 0; r < KEYS; r++) RC_UNROLL for (int v = 0; v < V; v++) {
            const ptrdiff_t at = (j + r) * TILE + lane + v * LANES;
            STORE(w->dE + at, LOAD(w->E + at) * acc[r][v]);
        }
    }
}

static void RC_NAME(exact_gradients)(const RC_NAME(room) * w, ptrdiff_t j0, ptrdiff_t count, int hidden) {
    if (hidden == 0)
        RC_NAME(gradients_of_keys)(VECTORS, w, j0, count);
    else if (hidden == VECTORS - 1)
        RC_NAME(gradients_of_keys)(1, w, j0, count);
    else
        RC_NAME(gradients_of_keys)(2, w, j0, count);
}

/* Of the first `seen` keys of the chunk, where those end that the first `hidden` vectors of a tile do not see, but the next does. */
static ptrdiff_t RC_NAME(hidden_end)(ptrdiff_t limit, ptrdiff_t seen, int hidden) {
    return hidden == VECTORS - 1 ? seen : rc_min(seen, rc_round_up(rc_max(0, limit + (hidden + 1) * LANES), KEYS));
}

/* N += what the first `seen` keys of the chunk give to a tile of queries. */
static void RC_NAME(add_pairs)(const rc_monomials_problem *p, const RC_NAME(room) * w, ptrdiff_t limit, ptrdiff_t seen) {
    ptrdiff_t j = 0;
    for (int hidden = 0; hidden < VECTORS; hidden++)
        for (const ptrdiff_t end = RC_NAME(hidden_end)(limit, seen, hidden); j < end; j = rc_min(j + BLOCK, end)) {
            const ptrdiff_t count = rc_min(BLOCK, end - j);
            RC_NAME(exact_pairs)(p, w, j, count, limit, hidden);
            RC_NAME(product_tile)((int)w->y.columns, VECTORS - hidden, count, w->E + hidden * LANES,
                                  w->key_columns + j * w->wide_columns, w->wide_columns, w->N + hidden * LANES);
        }
}

/* scaled = log2(e) xt of a tile of queries, for exp2. */
static void RC_NAME(scale_tile)(const rc_monomials_problem *p, RC_NAME(room) * w) {
    for (ptrdiff_t i = 0; i < p->d * TILE; i++)
        w->scaled[i] = (REAL)LOG2E * w->xt[i];
}

/* w->dk, w->dv and w->dx += what the first `seen` keys of the chunk and a tile of queries give each other. */
static void RC_NAME(tile_gradients)(const rc_monomials_problem *p, RC_NAME(room) * w, ptrdiff_t rows, const REAL *columns,
                                    ptrdiff_t limit, ptrdiff_t seen) {
    const ptrdiff_t d = p->d, wide = w->wide, wide_columns = w->wide_columns;
    ptrdiff_t j = 0;
    for (int hidden = 0; hidden < VECTORS; hidden++)
        for (const ptrdiff_t end = RC_NAME(hidden_end)(limit, seen, hidden); j < end; j = rc_min(j + BLOCK, end)) {
            const ptrdiff_t count = rc_min(BLOCK, end - j), lane = hidden * LANES, left = rc_max(0, rows - lane);
            RC_NAME(exact_pairs)(p, w, j, count, limit, hidden);
            RC_NAME(exact_gradients)(w, j, count, hidden);
            for (ptrdiff_t e = rc_round_up(count, KEYS) * TILE; e < rc_min(BLOCK, count + COLUMN_SLACK) * TILE; e++)
                w->E[e] = w->dE[e] = 0;
            RC_NAME(columns)(count, wide_columns, left, columns + lane * wide_columns, w->E + lane, w->dv + j * wide_columns);
            RC_NAME(columns)(count, wide, left, w->x + lane * wide, w->dE + lane, w->dk + j * wide);
            RC_NAME(product_tile)((int)d, VECTORS - hidden, count, w->dE + lane, w->keys + j * d, d, w->dx + lane);
        }
}
