/* Monomials of a tile of tokens and the two products with a state that lanes of tokens take, for one precision (include after
 * update.template.h; monomials.h has the order of monomials).
 *
 *   evaluate       N = state^T phi                 the top degree is never formed: its sum over a prefix is a product,
 *                                                  multiplied by x_m as it leaves the registers
 *   differentiate  dx of <dN, state^T phi(x)>      dphi of a block of monomials stays in registers over all m while dx_m
 *                                                  and dphi are reduced from it: two multiply-adds more for d_v + 1
 *
 * What bounds them: the multiply-adds. evaluate reads each packed weight once for TILE tokens (4 bytes for VECTORS
 * multiply-adds of LANES); phi stays in L1 by prefix blocks.
 *
 * Share of the machine's multiply-add peak that a call without mask reaches, planning and all (float32, AVX-512, a shared
 * Zen 4), d = d_v: 56 to 58% (d = 8, degree 4) and 68 to 71% (16, 3) with two threads, 71 to 75% (16, 4), 75 to 77% (64, 2),
 * 76 to 83% (128, 2) with one.
 *
 * Where the nanoseconds of a token go there (one thread), causal with chunks of 96 but for (16, 3). Functions were sampled; what
 * one function does for several parts is shared out by what these take alone, and the last two parts are what is left:
 *
 *                                      forward (8, 4)    gradient (8, 3)   and (16, 3)
 *                                      full    causal    full    causal    causal
 *   multiply-adds that count, at peak   151       151     252       252      4467
 *   update's products                    89        91      90       186      3280
 *   features by rows                     37        38      35        70       290
 *   evaluate's product                   87        84      31        31       300
 *   features by lanes                     9        10      25        30       115
 *   differentiate's products              -         -     203       193      3270
 *   packing of states                     -         9       -        40       350
 *   pairs of a chunk                      -        27       -        90       200
 *   rows in, results out, float64 sums   19        21      75        85       200
 *   norms, ranges, planning, new pages   18        20      25        68       190
 *   all                                 260       301     484       793      8200
 *
 * So products are within a tenth of the peak, but that differentiate has 11 multiply-adds for 9 at d_v = 8; what is left is
 * features and, in a gradient, rows: each of them is read and laid out two to four times. Under a causal mask a gradient makes the
 * state of keys once more, a product that does not count. To keep that of each chunk from the forward pass would take (d_v + 1) F
 * numbers a chunk, at (8, 3) those of 6 arrays of n x d, at (16, 3) those of 26.
 */
#undef WIDE
#undef GRAD_ROWS
#define WIDE (2 * LANES)     /* tokens side by side in differentiate */
#if RC_REGISTERS == 32
#define GRAD_ROWS 6          /* monomials whose dphi is kept in registers */
#else
#define GRAD_ROWS 3
#endif
#define PREFIX 128           /* features of a prefix block: PREFIX * TILE of them stay in L1 */

/* phi[f][token] for monomials of degree < `degree`, `vectors` vectors of tokens; those of degree - 1 times ratio[token]
 * unless that is NULL. */
RC_INLINE void RC_NAME(token_features)(const RC_NAME(monomials) * y, int degree, const REAL *xt, const REAL *ratio, REAL *phi,
                                       const int vectors) {
    const int width = vectors * LANES;
    RC_UNROLL for (int v = 0; v < vectors; v++) STORE(phi + v * LANES, SPLAT((REAL)1));
    for (int s = 1; s < degree; s++)
        for (ptrdiff_t m = 0; m < y->d; m++) {
            const ptrdiff_t length = RC_NAME(count)(y, s - 1, m + 1);
            const REAL *src = phi + y->offset[s - 1] * width;
            REAL *dst = phi + (y->offset[s] + RC_NAME(count)(y, s, m)) * width;
            vreal x[VECTORS];
            RC_UNROLL for (int v = 0; v < vectors; v++) x[v] = LOAD(xt + m * width + v * LANES);
            if (ratio && s == degree - 1)
                RC_UNROLL for (int v = 0; v < vectors; v++) x[v] *= LOAD(ratio + v * LANES);
            for (ptrdiff_t i = 0; i < length; i++)
                RC_UNROLL for (int v = 0; v < vectors; v++)
                    STORE(dst + i * width + v * LANES, LOAD(src + i * width + v * LANES) * x[v]);
        }
}

/* Elements of a state packed for evaluate: its monomials, [block of columns][monomial][column], and what stores run over. */
static size_t RC_NAME(evaluate_size)(const RC_NAME(monomials) * y, int degree) {
    return (size_t)(y->columns * (RC_NAME(below)(y, degree) + RC_NAME(count)(y, degree, y->d)) + LANES);
}

/* packed[f][r] = (base[r][f] + part[r][f]) weights[f] for R columns; whole vectors are stored, and what runs over is overwritten
 * by what follows. */
static REAL *RC_NAME(pack_block)(const int R, ptrdiff_t length, const REAL *base, const REAL *part, ptrdiff_t pitch,
                                 const REAL *weights, REAL *packed) {
    enum { parts = (ROWS + LANES - 1) / LANES };
    for (ptrdiff_t f = 0; f < length; f += LANES, packed += LANES * R) {
        vreal block[parts][LANES];
        RC_UNROLL for (int g = 0; g < parts; g++) {
            RC_UNROLL for (int l = 0; l < LANES; l++) {
                const ptrdiff_t at = (g * LANES + l) * pitch + f;
                block[g][l] = (vreal){0};
                if (g * LANES + l < R)
                    block[g][l] = (LOAD(base + at) + LOAD(part + at)) * LOAD(weights + f);
            }
            RC_NAME(transpose)(block[g]);
        }
        const ptrdiff_t left = length - f;
        RC_UNROLL for (int l = 0; l < LANES; l++) RC_UNROLL for (int g = 0; g < parts; g++)
            if (l < left && g * LANES < R)
                STORE(packed + l * R + g * LANES, block[g][l]);
    }
    return packed - (rc_round_up(length, LANES) - length) * R;
}

/* (base + part) * weights for evaluate. */
static void RC_NAME(evaluate_pack)(const RC_NAME(monomials) * y, int degree, const REAL *base, const REAL *part,
                                   const REAL *weights, REAL *packed) {
    const ptrdiff_t low_end = RC_NAME(below)(y, degree), top = RC_NAME(count)(y, degree, y->d), start = y->offset[degree];
    const int blocks = rc_blocks((int)y->columns, ROWS);
    for (int b = 0; b < blocks; b++) {
        const int c0 = rc_block_start((int)y->columns, blocks, b), R = rc_block_start((int)y->columns, blocks, b + 1) - c0;
        const REAL *from = base + c0 * y->pitch, *more = part + c0 * y->pitch;
        packed = RC_NAME(pack_block)(R, low_end, from, more, y->pitch, weights, packed);
        packed = RC_NAME(pack_block)(R, top, from + start, more + start, y->pitch, weights + start, packed);
    }
}

/* moment[token] = value[token], and back to 0: what the last column gains from here on is kept apart. */
RC_INLINE void RC_NAME(set_aside)(REAL *value, REAL *moment) {
    for (int i = 0; i < TILE; i++) {
        moment[i] = value[i];
        value[i] = 0;
    }
}

/* value <- value + moment, moment <- value: the sum, and what was gained since set_aside. */
RC_INLINE void RC_NAME(take_back)(REAL *value, REAL *moment) {
    for (int i = 0; i < TILE; i++) {
        const REAL gained = value[i];
        value[i] += moment[i];
        moment[i] = gained;
    }
}

/* N[c][token] = sum_f packed[f][c] phi_f(token) for a tile; phi holds TILE * below(degree). moment[token], unless it is
 * NULL, is the share of degree `order` (degree or degree - 1) in the last column. A polynomial for every token:
 * ratio[token], or NULL, multiplies the terms of degree - 1 and more; those of degree are xt_top times terms of degree - 1. */
static void RC_NAME(evaluate)(const RC_NAME(monomials) * y, int degree, int order, const REAL *xt, const REAL *ratio,
                              const REAL *xt_top, const REAL *packed, REAL *phi, REAL *N, REAL *moment) {
    const ptrdiff_t low_end = RC_NAME(below)(y, degree), d = y->d, aside = order < degree ? y->offset[order] : low_end;
    const int blocks = rc_blocks((int)y->columns, ROWS);
    RC_NAME(token_features)(y, degree, xt, ratio, phi, VECTORS);
    for (ptrdiff_t i = 0; i < y->columns * TILE; i++)
        N[i] = 0;
    for (int b = 0; b < blocks; b++) {
        const int c0 = rc_block_start((int)y->columns, blocks, b), R = rc_block_start((int)y->columns, blocks, b + 1) - c0;
        const RC_NAME(product_function) product = RC_NAME(product)[R][VECTORS];
        REAL *C = N + c0 * TILE, *last = C + (R - 1) * TILE;
        const int split = moment && b == blocks - 1;
        const ptrdiff_t first_end = split ? aside : low_end;
        for (ptrdiff_t f = 0; f < first_end; f += 4 * PREFIX)
            product(rc_min(4 * PREFIX, first_end - f), phi + f * TILE, TILE, packed + f * R, R, C, TILE, RC_ADD, 0);
        if (split)
            RC_NAME(set_aside)(last, moment);
        for (ptrdiff_t f = first_end; f < low_end; f += 4 * PREFIX)
            product(rc_min(4 * PREFIX, low_end - f), phi + f * TILE, TILE, packed + f * R, R, C, TILE, RC_ADD, 0);
        if (split && order < degree)
            RC_NAME(take_back)(last, moment);
        const REAL *top = packed + low_end * R;
        const ptrdiff_t before = RC_NAME(count)(y, degree - 1, d);
        const REAL *prefix = phi + y->offset[degree - 1] * TILE;
        if (degree == 1) /* xt_top times 1 */
            product(d, xt_top, TILE, top, R, C, TILE, RC_ADD, 0);
        for (ptrdiff_t i = 0; i < before && degree > 1; i += PREFIX)
            for (ptrdiff_t m = 0; m < d; m++) {
                const ptrdiff_t length = rc_min(PREFIX, RC_NAME(count)(y, degree - 1, m + 1) - i);
                if (length > 0)
                    product(length, prefix + i * TILE, TILE, top + (RC_NAME(count)(y, degree, m) + i) * R, R, C, TILE,
                            RC_ADD_SCALED, xt_top + m * TILE);
            }
        if (split && order == degree)
            RC_NAME(take_back)(last, moment);
        packed = top + RC_NAME(count)(y, degree, d) * R;
    }
}

/* Elements of a state packed for differentiate of the monomials of degree s whose largest index is m, [block of monomials one
 * degree lower][column][row]: in the order in which the state has them, for it is packed for each chunk and few lines of all its
 * columns fit the L1 cache. */
RC_INLINE ptrdiff_t RC_NAME(run_size)(const RC_NAME(monomials) * y, int s, ptrdiff_t m) {
    return rc_round_up(RC_NAME(count)(y, s - 1, m + 1), GRAD_ROWS) * y->columns;
}

/* Those of all: [degree, from the top][m], degree 1 as [block of m][column][row]; and what stores run over. */
static size_t RC_NAME(differentiate_size)(const RC_NAME(monomials) * y, int degree) {
    ptrdiff_t size = y->d * y->columns + LANES;
    for (int s = degree; s >= 2; s--)
        for (ptrdiff_t m = 0; m < y->d; m++)
            size += RC_NAME(run_size)(y, s, m);
    return (size_t)size;
}

/* packed[c][r] = (base[c][r] + part[c][r]) weights[r] for r < rows, then zeros; `left` weights can be read. Whole vectors are
 * stored, and what runs over is overwritten by what follows. */
static void RC_NAME(pack_rows_of_block)(int rows, ptrdiff_t columns, const REAL *base, const REAL *part, ptrdiff_t pitch,
                                        const REAL *weights, ptrdiff_t left, REAL *packed) {
    REAL kept[GRAD_ROWS + LANES] = {0};
    if (rows < GRAD_ROWS || left < GRAD_ROWS + LANES) {
        for (int r = 0; r < rows; r++)
            kept[r] = weights[r];
        weights = kept;
    }
    for (ptrdiff_t c = 0; c < columns; c++, base += pitch, part += pitch, packed += GRAD_ROWS)
        RC_UNROLL for (int r = 0; r < GRAD_ROWS; r += LANES)
            STORE(packed + r, (LOAD(base + r) + LOAD(part + r)) * LOAD(weights + r));
}

static void RC_NAME(differentiate_pack)(const RC_NAME(monomials) * y, int degree, const REAL *base, const REAL *part,
                                        const REAL *weights, REAL *packed) {
    const ptrdiff_t d = y->d, pitch = y->pitch;
    for (int s = degree; s >= 2; s--)
        for (ptrdiff_t m = 0; m < d; m++) {
            const ptrdiff_t f = y->offset[s] + RC_NAME(count)(y, s, m), length = RC_NAME(count)(y, s - 1, m + 1);
            for (ptrdiff_t i = 0; i < length; i += GRAD_ROWS, packed += y->columns * GRAD_ROWS)
                RC_NAME(pack_rows_of_block)((int)rc_min(GRAD_ROWS, length - i), y->columns, base + f + i, part + f + i, pitch,
                                            weights + f + i, pitch - f - i, packed);
        }
    const int blocks = rc_blocks((int)d, ROWS);
    for (int b = 0; b < blocks; b++) {
        const int m0 = rc_block_start((int)d, blocks, b), R = rc_block_start((int)d, blocks, b + 1) - m0;
        for (ptrdiff_t c = 0; c < y->columns; c++, packed += R)
            for (int r = 0; r < R; r++) {
                const ptrdiff_t f = y->offset[1] + m0 + r;
                packed[r] = (base[c * pitch + f] + part[c * pitch + f]) * weights[f];
            }
    }
}

/* R monomials phi_i and one m: dx_m += dphi phi_i, reduced_i += dphi x_m, with dphi = <dN, weights> + `above` unless that is NULL. */
RC_INLINE void RC_NAME(reverse_rows)(const int R, ptrdiff_t columns, const REAL *dN, const REAL *weights, const REAL *above,
                                     const REAL *phi_i, const REAL *xm, vreal reduced[GRAD_ROWS][2], REAL *dxm) {
    vreal acc[GRAD_ROWS][2];
    RC_UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = (vreal){0};
    for (ptrdiff_t c = 0; c < columns; c++, dN += WIDE, weights += GRAD_ROWS) {
        vreal a0 = LOAD(dN), a1 = LOAD(dN + LANES);
        RC_UNROLL for (int r = 0; r < R; r++) {
            vreal b = SPLAT(weights[r]);
            acc[r][0] += a0 * b;
            acc[r][1] += a1 * b;
        }
    }
    vreal x0 = LOAD(xm), x1 = LOAD(xm + LANES), e0 = LOAD(dxm), e1 = LOAD(dxm + LANES);
    RC_UNROLL for (int r = 0; r < R; r++) {
        if (above) {
            acc[r][0] += LOAD(above + r * WIDE);
            acc[r][1] += LOAD(above + r * WIDE + LANES);
        }
        e0 += acc[r][0] * LOAD(phi_i + r * WIDE);
        e1 += acc[r][1] * LOAD(phi_i + r * WIDE + LANES);
        reduced[r][0] += acc[r][0] * x0;
        reduced[r][1] += acc[r][1] * x1;
    }
    STORE(dxm, e0);
    STORE(dxm + LANES, e1);
}

/* One block of monomials of degree s - 1 against every m: dx_m += dphi_s(m, i) phi_i, dphi_i += dphi_s(m, i) x_m, where
 * dphi_s = <dN, state> + (what degree s + 1 left there, unless s is the top). `rows` monomials are in the block; the
 * prefix of m may end inside it: where d is small that is one block of six. The block of m is at packed + runs[m]. */
RC_INLINE void RC_NAME(reverse_block)(const RC_NAME(monomials) * y, int s, const int is_top, ptrdiff_t i, ptrdiff_t rows,
                                      ptrdiff_t first, const REAL *xt, const REAL *dN, const REAL *packed, const ptrdiff_t *runs,
                                      const REAL *phi, REAL *dphi, REAL *dx) {
    vreal reduced[GRAD_ROWS][2];
    RC_UNROLL for (int r = 0; r < GRAD_ROWS; r++) reduced[r][0] = reduced[r][1] = (vreal){0};
    const REAL *phi_i = phi + (y->offset[s - 1] + i) * WIDE;
    for (ptrdiff_t m = first; m < y->d; m++) {
        const REAL *above = is_top ? 0 : dphi + (y->offset[s] + RC_NAME(count)(y, s, m) + i) * WIDE;
#define RC_REVERSE(R) RC_NAME(reverse_rows)(R, y->columns, dN, packed + runs[m], above, phi_i, xt + m * WIDE, reduced, dx + m * WIDE)
        switch (rc_min(rows, RC_NAME(count)(y, s - 1, m + 1) - i)) {
        case 1:
            RC_REVERSE(1);
            break;
        case 2:
            RC_REVERSE(2);
            break;
#if GRAD_ROWS == 6
        case 3:
            RC_REVERSE(3);
            break;
        case 4:
            RC_REVERSE(4);
            break;
        case 5:
            RC_REVERSE(5);
            break;
#endif
        default:
            RC_REVERSE(GRAD_ROWS);
        }
#undef RC_REVERSE
    }
    REAL *out = dphi + (y->offset[s - 1] + i) * WIDE;
    RC_UNROLL for (int r = 0; r < GRAD_ROWS; r++) if (r < rows) {
        STORE(out + r * WIDE, reduced[r][0]);
        STORE(out + r * WIDE + LANES, reduced[r][1]);
    }
}

RC_NOINLINE void RC_NAME(reverse_top)(const RC_NAME(monomials) * y, int s, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t first,
                                             const REAL *xt, const REAL *dN, const REAL *packed, const ptrdiff_t *runs, const REAL *phi,
                                             REAL *dphi, REAL *dx) {
    RC_NAME(reverse_block)(y, s, 1, i, rows, first, xt, dN, packed, runs, phi, dphi, dx);
}
RC_NOINLINE void RC_NAME(reverse_low)(const RC_NAME(monomials) * y, int s, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t first,
                                             const REAL *xt, const REAL *dN, const REAL *packed, const ptrdiff_t *runs, const REAL *phi,
                                             REAL *dphi, REAL *dx) {
    RC_NAME(reverse_block)(y, s, 0, i, rows, first, xt, dN, packed, runs, phi, dphi, dx);
}

/* dx[m][token] for WIDE tokens; phi and dphi hold WIDE * below(degree). */
static void RC_NAME(differentiate)(const RC_NAME(monomials) * y, int degree, const REAL *xt, const REAL *dN, const REAL *packed,
                                   REAL *phi, REAL *dphi, REAL *dx) {
    const ptrdiff_t d = y->d;
    for (ptrdiff_t i = 0; i < d * WIDE; i++)
        dx[i] = 0;
    RC_NAME(token_features)(y, degree, xt, 0, phi, 2);
    for (int s = degree; s >= 2; s--) {
        const ptrdiff_t before = RC_NAME(count)(y, s - 1, d);
        ptrdiff_t first = 0, runs[d + 1]; /* the first m whose prefix reaches i; where each begins */
        runs[0] = 0;
        for (ptrdiff_t m = 0; m < d; m++)
            runs[m + 1] = runs[m] + RC_NAME(run_size)(y, s, m);
        for (ptrdiff_t i = 0; i < before; i += GRAD_ROWS) {
            while (RC_NAME(count)(y, s - 1, first + 1) <= i)
                first++;
            (s == degree ? RC_NAME(reverse_top) : RC_NAME(reverse_low))(y, s, i, rc_min(GRAD_ROWS, before - i), first, xt, dN,
                                                                       packed + i * y->columns, runs, phi, dphi, dx);
        }
        packed += runs[d];
    }
    const int blocks = rc_blocks((int)d, ROWS);
    for (int b = 0; b < blocks; b++) {
        const int m0 = rc_block_start((int)d, blocks, b), R = rc_block_start((int)d, blocks, b + 1) - m0;
        RC_NAME(product)[R][2](y->columns, dN, WIDE, packed, R, dx + m0 * WIDE, WIDE, RC_ADD, 0);
        packed += y->columns * R;
    }
    if (degree > 1)
        for (ptrdiff_t i = 0; i < d * WIDE; i++)
            dx[i] += dphi[y->offset[1] * WIDE + i];
}
