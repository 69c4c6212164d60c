#include <math.h>
#include <string.h>
#include "simd.h"
#include "exp2.template.h"
#include "fold.template.h"
#include "half.h"

/* Few queries, many keys, for one precision; few.stored.h has what depends on how keys and values are stored.
 *
 * Lanes run along the rows of keys and values, which so are read as they lie. Of a block of keys the scores, the weights
 * and what these add to O follow on each other, for R <= MOST_ROWS queries at once, R a power of two; what is by key and
 * query is stored [key][R].
 *
 * What bounds it: the read bandwidth of memory. No hardware prefetcher follows rows that are far apart, nor stays ahead
 * while exp is computed, so the values of the next block are asked for while scores are made, and its keys while values are
 * added up. A core can wait for so few lines at once that it has to ask all the time: for one after each that it reads. They
 * are asked for into the second cache: in the first they push out what is being read, and all takes twice as long. Where the
 * rows of several heads lie side by side, these heads are computed block by block, and asked for in the order of memory;
 * head by head takes 1.2 (float32) and 1.4 times (halves) as long, for keys of 8 heads in pages of 16. There each row of keys is
 * in another page of memory, whose address has to be looked up: a line of each is asked for a block earlier, which takes a
 * twelfth off. Rows of one head follow on each other, and take a twentieth more by that.
 *
 * Nanoseconds a key of d = d_v = 128 that the second cache holds (512 keys less 128), on one core of a Zen 4 whose
 * multiply-adds alone take 4.4 for one query and 17.5 for four: in float32 22 and 31 (AVX-512), 25 and 42 (AVX2), in halves 14
 * and 28, 19 and 36. From memory a core takes 63 for a key of float32, 26 to 28 of halves and 38 to 45 for four queries, where
 * sums read a key in 49, or of halves in 24: as if it waited for 23 lines of 90 ns at a time. Two cores together read at 0.8 to
 * 0.97 of what sums reach on both (31 to 36 GB/s), four queries in halves at 0.6 to 0.76; sums at 50 GB/s leave them behind.
 * Blocks of CLOSE_BYTES twice as large take a sixth less from the second cache, and up to a tenth more from memory.
 */
#ifndef RC_FEW_ONCE
#define RC_FEW_ONCE
enum {
    PART = 512,
    BLOCK = 64, /* the most keys in a block; its sums start from 0, so that equal terms are not rounded to one side for long */
    LEAST_BLOCK = 16,
    CLOSE_BYTES = 16384, /* of a block's keys and values, which the caches next to a core then hold twice */
    SAMPLE = 16, /* keys and values of a head that say how long keys are, and whether values are far from 0 */
    LINE = 64,
    PAGE = 4096 /* bytes of memory whose address is looked up at once */
};
static inline ptrdiff_t rc_parts(const rc_few_sequence *s) { return (s->n_k + PART - 1) / PART; }

/* Rows that share a head's keys: row r is query r % n of the group's query head r / n. */
static inline ptrdiff_t rc_rows(const rc_few_problem *p, const rc_few_sequence *s) { return p->group * s->n; }

/* Where row r is among those of q and o. */
static inline ptrdiff_t rc_row(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, ptrdiff_t r) {
    return s->row + (head * p->group + r / s->n) * p->head_rows + r % s->n * p->query_rows;
}
#endif
#undef MOST_ROWS
#undef ACCUMULATORS
#undef KEYS_BESIDE
#undef KEYS_AT_ONCE
#undef LARGEST
#undef HIGH
#undef FAR
#undef WIDE_LANES
#if RC_BITS == 32
#define LARGEST 3.40282347e38f
#define HIGH 512 /* scores, in units of log2, whose rounding moves weights by some ten-thousandths */
#define FAR 64   /* from 0, in units of the values' spread: where rounding of sums does as much to O */
#else
#define LARGEST 1.7976931348623157e308
#define HIGH 0x1p37
#define FAR 0x1p34
#endif
#if RC_VECTOR_BYTES * 8 >= 8 * RC_BITS
#define MOST_ROWS 8
#elif RC_VECTOR_BYTES * 8 == 4 * RC_BITS
#define MOST_ROWS 4
#else
#define MOST_ROWS 2
#endif
#define ACCUMULATORS (RC_REGISTERS / 2) /* vectors of sums that registers hold beside what is added to them */
/* Keys whose scores with R queries are made side by side, and in one round, which makes whole vectors of scores. */
#define KEYS_BESIDE(R) (ACCUMULATORS / (R) < 4 ? ACCUMULATORS / (R) : 4)
#define KEYS_AT_ONCE(R) (LANES / (R) > KEYS_BESIDE(R) ? LANES / (R) : KEYS_BESIDE(R))

/* Which of the keys of a block its queries see. */
typedef struct {
    ptrdiff_t first[8], last[8]; /* of each query, counted from the block's first key */
    const unsigned char *keep;
    ptrdiff_t keys; /* there are no more */
} RC_NAME(few_masking);

/* Softmax so far; lane l has query l % R. */
typedef struct {
    REAL maximum[LANES], factor[LANES];
    vreal sum;
} RC_NAME(few_state);

/* A vector of float64, and as many numbers of a vector: GCC keeps longer ones in memory. */
typedef double RC_NAME(few_wide) __attribute__((vector_size(RC_VECTOR_BYTES)));
typedef REAL RC_NAME(few_part) __attribute__((vector_size(RC_VECTOR_BYTES * sizeof(REAL) / 8), aligned(sizeof(REAL)), may_alias));
#define WIDE_LANES (RC_VECTOR_BYTES / 8)

/* Sums of squares in float64: those of numbers far from 1 pass the range of float32. */
typedef struct {
    RC_NAME(few_wide) part[LANES / WIDE_LANES];
} RC_NAME(few_squares);

RC_INLINE void RC_NAME(few_add_squares)(RC_NAME(few_squares) * sum, vreal x) {
    REAL flat[LANES];
    STORE(flat, x);
    RC_UNROLL for (int i = 0; i < LANES / WIDE_LANES; i++) {
        const RC_NAME(few_part) part = *(const RC_NAME(few_part) *)(flat + i * WIDE_LANES);
        const RC_NAME(few_wide) wide = __builtin_convertvector(part, RC_NAME(few_wide));
        sum->part[i] += wide * wide;
    }
}

RC_INLINE double RC_NAME(few_total)(const RC_NAME(few_squares) * sum) {
    RC_NAME(few_wide) all = sum->part[0];
    RC_UNROLL for (int i = 1; i < LANES / WIDE_LANES; i++) all += sum->part[i];
    double total = 0;
    for (int l = 0; l < WIDE_LANES; l++)
        total += all[l];
    return total;
}

RC_INLINE REAL RC_NAME(few_largest)(vreal x) {
    REAL most = x[0];
    for (int l = 1; l < LANES; l++)
        most = x[l] > most ? x[l] : most;
    return most;
}

RC_INLINE int RC_NAME(few_zero)(vreal x) {
    int zero = 1;
    for (int l = 0; l < LANES; l++)
        zero &= x[l] == 0;
    return zero;
}

static void RC_NAME(few_hide)(int R, const RC_NAME(few_masking) * m, ptrdiff_t keys, REAL *S) {
    for (ptrdiff_t j = 0; j < keys; j++)
        for (int r = 0; r < R; r++)
            if (j >= m->keys || (m->keep && !m->keep[j]) || j < m->first[r] || j > m->last[r])
                S[j * R + r] = -(REAL)INFINITY;
}

/* S = 2^(S - maximum), the maximum that of all blocks until now; factor is what this takes from the sums of those before. */
RC_INLINE void RC_NAME(few_weights)(const int R, const RC_NAME(few_masking) * m, ptrdiff_t keys, REAL *S,
                                    RC_NAME(few_state) * state) {
    int all = !m->keep && m->keys >= keys;
    for (int r = 0; r < R; r++)
        all &= m->first[r] <= 0 && m->last[r] >= keys - 1;
    if (!all)
        RC_NAME(few_hide)(R, m, keys, S);
    const vreal before = LOAD(state->maximum);
    vreal top = before, sum = {0};
    for (ptrdiff_t i = 0; i < keys * R; i += LANES)
        top = RC_NAME(vector_max)(top, LOAD(S + i));
    REAL *most = state->maximum;
    STORE(most, top);
    for (int l = R; l < LANES; l++)
        most[l % R] = most[l] > most[l % R] ? most[l] : most[l % R];
    for (int l = R; l < LANES; l++)
        most[l] = most[l % R];
    /* Where no key has been seen the maximum is -inf, of which nothing may be subtracted. */
    const vreal reference = RC_NAME(vector_max)(LOAD(most), SPLAT(-LARGEST));
    const vreal factor = RC_NAME(exp2)(before - reference);
    STORE(state->factor, factor);
    for (ptrdiff_t i = 0; i < keys * R; i += LANES) {
        const vreal weight = RC_NAME(exp2)(LOAD(S + i) - reference);
        sum += weight;
        STORE(S + i, weight);
    }
    state->sum = state->sum * factor + sum;
}

/* Queries that share a pass over a block, the number of such groups, and rows padded to whole vectors. */
typedef struct {
    int R;
    ptrdiff_t groups, k_pitch, v_pitch;
} RC_NAME(few_layout);

static RC_NAME(few_layout) RC_NAME(few_layout_of)(const rc_few_problem *p, ptrdiff_t rows) {
    int R = 1;
    while (R < MOST_ROWS && R < rows)
        R *= 2;
    return (RC_NAME(few_layout)){R, (rows + R - 1) / R, rc_round_up(p->d, LANES), rc_round_up(p->d_v, LANES)};
}

/* What a part leaves: of each row the maximum of its scores and the sum of its weights, then its sums over values. */
static size_t RC_NAME(few_partial_size)(const rc_few_problem *p, ptrdiff_t n) {
    return rc_round_up(p->group * n * (2 * sizeof(double) + p->d_v * sizeof(REAL)), LINE);
}

static double *RC_NAME(few_partial)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, ptrdiff_t part) {
    return (double *)(p->partial + s->partial + (part * p->heads + head) * RC_NAME(few_partial_size)(p, s->n));
}

/* Fills the partial of a part of `rows` rows, of whose values `read` entries a row were read; whether all of it is finite, and
 * no maximum HIGH. */
static int RC_NAME(few_leave)(const rc_few_problem *p, ptrdiff_t rows, double *stats, const RC_NAME(few_state) * states,
                              const REAL *sums, ptrdiff_t read) {
    const RC_NAME(few_layout) l = RC_NAME(few_layout_of)(p, rows);
    const ptrdiff_t whole = rc_min(read, p->d_v) / LANES * LANES, shift = l.v_pitch - read;
    REAL *o = (REAL *)(stats + 2 * rows);
    vreal off = {0};
    int finite = 1;
    for (ptrdiff_t row = 0; row < rows; row++, sums += l.v_pitch, o += p->d_v) {
        const RC_NAME(few_state) *state = states + row / l.R;
        double sum = 0;
        for (ptrdiff_t i = row % l.R; i < LANES; i += l.R)
            sum += state->sum[i];
        stats[row] = state->maximum[row % l.R];
        finite &= stats[row] == -INFINITY || fabs(stats[row]) <= HIGH;
        stats[rows + row] = sum;
        ptrdiff_t c = 0;
        for (; c < whole; c += LANES) {
            const vreal x = LOAD(sums + c);
            off += x - x;
            STORE(o + c, x);
        }
        for (; c < p->d_v; c++) {
            o[c] = sums[c + shift];
            finite &= o[c] - o[c] == 0;
        }
    }
    return RC_NAME(few_zero)(off) && finite;
}

/* One row of O from those of the parts, in float64: sum_part weight[part] o[part] / sum_part weight[part] sum[part]. */
static void RC_NAME(few_merge_row)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head, ptrdiff_t row) {
    const ptrdiff_t parts = rc_parts(s), rows = rc_rows(p, s), at = rc_row(p, s, head, row);
    REAL *o = (REAL *)p->o + at * p->d_v;
    double most = -INFINITY, sum = 0, columns[BLOCK];
    for (ptrdiff_t i = 0; i < parts; i++)
        most = fmax(most, RC_NAME(few_partial)(p, s, head, i)[row]);
    for (ptrdiff_t i = 0; i < parts; i++) {
        double *stats = RC_NAME(few_partial)(p, s, head, i);
        stats[row] = stats[row] == -INFINITY ? 0 : exp2(stats[row] - most);
        sum += stats[row] * stats[rows + row];
    }
    for (ptrdiff_t c0 = 0; c0 < p->d_v; c0 += BLOCK) {
        const ptrdiff_t count = rc_min(BLOCK, p->d_v - c0);
        memset(columns, 0, sizeof columns);
        for (ptrdiff_t i = 0; i < parts; i++) {
            const double *stats = RC_NAME(few_partial)(p, s, head, i), weight = stats[row];
            const REAL *part = (const REAL *)(stats + 2 * rows) + row * p->d_v + c0;
            for (ptrdiff_t c = 0; c < count; c++)
                columns[c] += weight * part[c];
        }
        for (ptrdiff_t c = 0; c < count; c++)
            o[c0 + c] = sum > 0 ? columns[c] / sum : 0;
    }
    if (p->lse)
        p->lse[at] = (most + log2(sum)) * 0.69314718055994530942;
}

static void RC_NAME(few_merge)(const rc_few_problem *p, const rc_few_sequence *s, ptrdiff_t head) {
    for (ptrdiff_t row = 0; row < rc_rows(p, s); row++)
        RC_NAME(few_merge_row)(p, s, head, row);
}

#define STORED REAL
#define WIDEN LOAD
#define FEW(name) RC_NAME(few_##name)
#include "few.stored.h"
#undef STORED
#undef WIDEN
#undef FEW
#if RC_BITS == 32
#define STORED rc_float16
#define WIDEN rc_widen_float16
#define FEW(name) RC_NAME(few_float16_##name)
#include "few.stored.h"
#undef STORED
#undef WIDEN
#undef FEW
#define STORED rc_bfloat16
#define WIDEN rc_widen_bfloat16
#define FEW(name) RC_NAME(few_bfloat16_##name)
#include "few.stored.h"
#undef STORED
#undef WIDEN
#undef FEW
#endif
