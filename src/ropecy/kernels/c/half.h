/* float16 and bfloat16 as they are stored, widened to a vector of float32, and a vector of float32 rounded to them
 * (include after simd.h). Every stored number is a float32, so that widening rounds nothing. Narrowing rounds to the
 * nearest, and of two as near to the even one; past the largest number is infinity. NaN and infinities stay such. */
#ifndef RC_HALF_H
#define RC_HALF_H
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef struct { uint16_t bits; } rc_float16;
typedef struct { uint16_t bits; } rc_bfloat16;
typedef uint16_t rc_vector_u16 __attribute__((vector_size(RC_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t rc_vector_u32 __attribute__((vector_size(RC_VECTOR_BYTES), aligned(4), may_alias));

RC_INLINE rc_vector_u32 rc_widen_u16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (rc_vector_u32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (rc_vector_u32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    return __builtin_convertvector(*(const rc_vector_u16 *)p, rc_vector_u32);
#endif
}

/* A bfloat16 is the upper half of a float32. */
RC_INLINE rc_vector_f32 rc_widen_bfloat16(const rc_bfloat16 *p) {
    return (rc_vector_f32)(rc_widen_u16((const uint16_t *)p) << 16);
}

RC_INLINE rc_vector_f32 rc_widen_float16(const rc_float16 *p) {
#if defined(__AVX512F__)
    return (rc_vector_f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (rc_vector_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return (rc_vector_f32)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p)));
#else
    /* The exponent's bias grows from 15 to 127 by a product with 2^112, which makes subnormal numbers normal too; an
     * exponent of all ones, NaN or an infinity, has to stay one. */
    const rc_vector_u32 bits = rc_widen_u16((const uint16_t *)p);
    const rc_vector_u32 size = (bits & 0x7fff) << 13;
    const rc_vector_u32 wide = (rc_vector_u32)((rc_vector_f32)size * 0x1p112f);
    const rc_vector_u32 special = (rc_vector_u32)(size >= (0x7c00u << 13)) & 0x7f800000u;
    return (rc_vector_f32)(wide | special | (bits & 0x8000) << 16);
#endif
}

RC_INLINE void rc_narrow_u16(rc_vector_u32 x, uint16_t *p) {
    *(rc_vector_u16 *)p = __builtin_convertvector(x, rc_vector_u16);
}

/* a where `chosen` is all ones, else b. */
RC_INLINE rc_vector_u32 rc_choose_u32(rc_vector_u32 chosen, rc_vector_u32 a, rc_vector_u32 b) {
    return (a & chosen) | (b & ~chosen);
}

RC_INLINE void rc_narrow_bfloat16(rc_vector_f32 x, rc_bfloat16 *p) {
    const rc_vector_u32 bits = (rc_vector_u32)x, even = bits >> 16 & 1;
    const rc_vector_u32 nan = (rc_vector_u32)((bits & 0x7fffffff) > 0x7f800000u);
    rc_narrow_u16(rc_choose_u32(nan, bits | 0x400000, bits + 0x7fff + even) >> 16, (uint16_t *)p);
}

RC_INLINE void rc_narrow_float16(rc_vector_f32 x, rc_float16 *p) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    vst1_u16((uint16_t *)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    const rc_vector_u32 bits = (rc_vector_u32)x, size = bits & 0x7fffffff;
    /* What is below 2^-14 is a multiple of 2^-24 there. The sum with 1/2, whose last bit is that, rounds to one. */
    const rc_vector_u32 small = (rc_vector_u32)((rc_vector_f32)size + 0.5f) - 0x3f000000u;
    const rc_vector_u32 usual = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    const rc_vector_u32 special = rc_choose_u32((rc_vector_u32)(size > 0x7f800000u), (rc_vector_u32){} + 0x7e00u,
                                                (rc_vector_u32){} + 0x7c00u);
    const rc_vector_u32 finite = rc_choose_u32((rc_vector_u32)(size < 0x38800000u), small, usual);
    const rc_vector_u32 found = rc_choose_u32((rc_vector_u32)(size < 0x47800000u), finite, special);
    rc_narrow_u16(found | (bits >> 16 & 0x8000), (uint16_t *)p);
#endif
}
#endif
