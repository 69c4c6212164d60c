/* 2^x by lanes, for one precision (include after simd.h).
 *
 * x = m + f with m the nearest integer, 2^f by a polynomial minimax in relative error on [-1/2, 1/2]: degree 6
 * (1.9e-9; 0.7 ulp with rounding) in float32, degree 11 (3.1e-18) in float64. Where 2^x is below the smallest normal
 * number the result is 0, but for AVX-512, which rounds it to a subnormal number; x = -inf gives 0. x must not be NaN, and
 * not above the largest exponent.
 */
#define LOG2E 1.4426950408889634074 /* exp(x) = 2^(x LOG2E) */

RC_INLINE vreal RC_NAME(vector_max)(vreal a, vreal b) {
#if defined(__AVX512F__) && RC_BITS == 32
    return (vreal)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX512F__)
    return (vreal)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__) && RC_BITS == 32
    return (vreal)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__AVX2__)
    return (vreal)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    vint more = (vint)(a > b);
    return (vreal)(((vint)a & more) | ((vint)b & ~more));
#endif
}

RC_INLINE vreal RC_NAME(exp2)(vreal x) {
#if RC_BITS == 32
#define RC_EXP2_DEGREE 6
    static const REAL c[] = {1.000000001f,      6.931472057e-01f, 2.402264689e-01f, 5.550328776e-02f,
                             9.618488956e-03f, 1.339993118e-03f, 1.534581216e-04f};
    const REAL lowest = -126, magic = 12582912.0f; /* 1.5 * 2^23 */
    const int mantissa = 23;
#else
#define RC_EXP2_DEGREE 11
    static const REAL c[] = {1.0,
                             6.9314718055994533e-01,
                             2.40226506959101562e-01,
                             5.55041086648199216e-02,
                             9.61812910758833524e-03,
                             1.33335581467899217e-03,
                             1.54035304625144321e-04,
                             1.52527334899885256e-05,
                             1.32154330896763992e-06,
                             1.01781980216719308e-07,
                             7.0741056135081428e-09,
                             4.43528270695727715e-10};
    const REAL lowest = -1022, magic = 6755399441055744.0; /* 1.5 * 2^52 */
    const int mantissa = 52;
#endif
#if defined(__AVX512F__)
    x = RC_NAME(vector_max)(x, SPLAT(2 * lowest)); /* -inf - -inf would be NaN */
#endif
    vreal shifted = x + magic;
    vreal whole = shifted - magic;
    vreal f = x - whole;
    vreal y = SPLAT(c[RC_EXP2_DEGREE]);
    RC_UNROLL for (int i = RC_EXP2_DEGREE - 1; i >= 0; i--) y = y * f + c[i];
#if defined(__AVX512F__) && RC_BITS == 32
    (void)mantissa;
    return (vreal)_mm512_scalef_ps((__m512)y, (__m512)whole);
#elif defined(__AVX512F__)
    (void)mantissa;
    return (vreal)_mm512_scalef_pd((__m512d)y, (__m512d)whole);
#else
    /* The low bits of `shifted` are m; what is above them is shifted out. */
    vuint scaled = (vuint)y + ((vuint)shifted << mantissa);
    return (vreal)((vint)scaled & (vint)(x >= lowest));
#endif
#undef RC_EXP2_DEGREE
}
