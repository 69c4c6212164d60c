/* Monomials of rows of tokens, a degree from the one below it, for one precision (include after simd.h; monomials.h has the
 * order of monomials).
 *
 * Lanes are monomials. Those of degree s whose largest index is m are a run: x_m times the first monomials of degree s - 1.
 * Runs begin anywhere, so copies of them would be unaligned vectors, most of them nearly empty where d is small: for d = 8 and
 * degree 4, 45 stores a token and most of them over two cache lines. Instead each aligned vector is made at once, from all the
 * runs that it has a part of: two loads, two permutations, a product and one store; where it is inside of a run, one load, a
 * product and a store. There are 31 of them for d = 8, degree 4 and 16 lanes.
 */
#undef SOME
#define SOME 48 /* tokens whose low degrees are made at a time, from what is in the L1 cache */

/* The part of the problem that says which monomials there are; degrees are at least 1. */
typedef struct {
    ptrdiff_t d, columns, pitch;
    const ptrdiff_t *offset, *count;
} RC_NAME(monomials);

RC_INLINE ptrdiff_t RC_NAME(count)(const RC_NAME(monomials) * y, int s, ptrdiff_t m) { return y->count[s * (y->d + 1) + m]; }

/* Where the monomials of degrees below s end. */
RC_INLINE ptrdiff_t RC_NAME(below)(const RC_NAME(monomials) * y, int s) {
    return y->offset[s - 1] + RC_NAME(count)(y, s - 1, y->d);
}

/* What the lanes of an aligned vector of monomials of one degree are made of: number `from` of the degree below and those that
 * follow it, where the second run begins the first ones of that degree, and again where others do. */
typedef struct {
    ptrdiff_t from, m; /* the first lane's source, and its variable */
    int one_run, edge; /* whether all lanes are of one run, whether some are not of the degree */
    vint place;        /* lane i of LOAD(sources + from): i; of LOAD(sources): LANES + i */
    vint variable;     /* from m on */
    vint own, before;  /* all ones where a lane is of this degree, or of one below it */
} RC_NAME(source);

/* Vectors of all degrees; where one degree ends and the next begins, both have one. */
RC_INLINE ptrdiff_t RC_NAME(source_count)(const RC_NAME(monomials) * y, int degree) {
    return rc_round_up(y->offset[degree] + RC_NAME(count)(y, degree, y->d), LANES) / LANES + degree;
}
RC_INLINE const RC_NAME(source) * RC_NAME(sources_of)(const RC_NAME(monomials) * y, int s, const RC_NAME(source) * sources) {
    return sources + y->offset[s] / LANES + s - 1;
}

static void RC_NAME(find_sources)(const RC_NAME(monomials) * y, int degree, RC_NAME(source) * sources) {
    for (int s = 1; s <= degree; s++) {
        const ptrdiff_t first = y->offset[s], end = first + RC_NAME(count)(y, s, y->d);
        RC_NAME(source) *next = sources + first / LANES + s - 1;
        ptrdiff_t m = 0, i = 0; /* the next monomial: x_m times number i of degree s - 1 */
        for (ptrdiff_t f = first / LANES * LANES; f < end; f += LANES, next++) {
            next->from = i, next->m = m, next->edge = f < first || f + LANES > end;
            for (int lane = 0; lane < LANES; lane++) {
                const int own = f + lane >= first && f + lane < end;
                next->own[lane] = -own;
                next->before[lane] = -(f + lane < first);
                next->place[lane] = !own ? 0 : m == next->m ? i - next->from : LANES + i;
                next->variable[lane] = own ? m - next->m : 0;
                if (own && lane == LANES - 1)
                    next->one_run = m == next->m;
                if (own && ++i == RC_NAME(count)(y, s - 1, m + 1))
                    m++, i = 0;
            }
            if (next->edge)
                next->one_run = 0;
        }
    }
}

/* Lane by lane the product of a source and a variable: x holds the variables from m on. */
RC_INLINE vreal RC_NAME(pick)(const REAL *from, const REAL *first, vint place, const REAL *x, vint variable) {
#if defined(__AVX512F__) && RC_BITS == 32
    return (vreal)_mm512_permutex2var_ps((__m512)LOAD(from), (__m512i)place, (__m512)LOAD(first)) *
           (vreal)_mm512_permutexvar_ps((__m512i)variable, (__m512)LOAD(x));
#elif defined(__AVX512F__)
    return (vreal)_mm512_permutex2var_pd((__m512d)LOAD(from), (__m512i)place, (__m512d)LOAD(first)) *
           (vreal)_mm512_permutexvar_pd((__m512i)variable, (__m512d)LOAD(x));
#elif defined(__AVX2__) && RC_BITS == 32
    return (vreal)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)LOAD(from), (__m256i)place),
                                   _mm256_permutevar8x32_ps((__m256)LOAD(first), (__m256i)place), (__m256)(place << 28)) *
           (vreal)_mm256_permutevar8x32_ps((__m256)LOAD(x), (__m256i)variable);
#else
    vreal all;
    for (int lane = 0; lane < LANES; lane++)
        all[lane] = (place[lane] < LANES ? from[place[lane]] : first[place[lane] - LANES]) * x[variable[lane]];
    return all;
#endif
}

/* dst[t] = `vectors` vectors of the monomials of degree s of x[t], from those that `source` tells of on, of rows that begin with
 * all degrees below, of the same pitch as dst. Lanes past the degree become 0, lanes before it are left as they are. Sources and x
 * are read a vector past their ends. */
static void RC_NAME(next_degree)(const RC_NAME(monomials) * y, int s, const RC_NAME(source) * source, ptrdiff_t vectors, int tokens,
                                 const REAL *x, const REAL *rows, ptrdiff_t pitch, REAL *dst) {
    const ptrdiff_t d = y->d;
    const REAL *first = rows + y->offset[s - 1];
    for (ptrdiff_t v = 0; v < vectors; v++, source++, dst += LANES) {
        const REAL *from = first + source->from, *xm = x + source->m;
        const vint place = source->place, variable = source->variable, own = source->own, before = source->before;
        if (source->one_run) {
            for (int t = 0; t < tokens; t++)
                STORE(dst + t * pitch, LOAD(from + t * pitch) * xm[t * d]);
        } else if (!source->edge) {
            for (int t = 0; t < tokens; t++)
                STORE(dst + t * pitch, RC_NAME(pick)(from + t * pitch, first + t * pitch, place, xm + t * d, variable));
        } else {
            for (int t = 0; t < tokens; t++) {
                const vreal all = RC_NAME(pick)(from + t * pitch, first + t * pitch, place, xm + t * d, variable);
                STORE(dst + t * pitch, (vreal)(((vint)all & own) | ((vint)LOAD(dst + t * pitch) & before)));
            }
        }
    }
}

/* The monomials of all degrees below `degree`, with zeros after them up to a whole vector. */
static void RC_NAME(low_degrees)(const RC_NAME(monomials) * y, int degree, const RC_NAME(source) * sources, int tokens, const REAL *x,
                                 REAL *rows, ptrdiff_t pitch) {
    const vreal one = {1};
    for (int t0 = 0; t0 < tokens; t0 += SOME, x += SOME * y->d, rows += SOME * pitch) {
        const int some = (int)rc_min(SOME, tokens - t0);
        for (int t = 0; t < some; t++)
            STORE(rows + t * pitch, one);
        for (int s = 1; s < degree; s++) {
            const ptrdiff_t first = y->offset[s] / LANES, end = y->offset[s] + RC_NAME(count)(y, s, y->d);
            RC_NAME(next_degree)(y, s, RC_NAME(sources_of)(y, s, sources), (end + LANES - 1) / LANES - first, some, x, rows, pitch,
                                 rows + first * LANES);
        }
    }
}
