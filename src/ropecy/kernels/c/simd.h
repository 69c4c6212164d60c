/* Explicit vector types and names for one precision at one instruction-set level.
 *
 * A kernel file `name.c` is compiled once per level (-DRC_LEVEL=baseline|v3|v4) and includes its
 * template twice:
 *
 *     #define RC_BITS 32
 *     #include "name.template.c"
 *     #undef RC_BITS
 *     #define RC_BITS 64
 *     #include "name.template.c"
 *
 * On arm64 the baseline is NEON: 32 registers of 128 bits. Tests of the kernels have passed there under an emulator (QEMU,
 * GCC 12), but for `largest`, `quadratic` and `columns` of rows and the quarters and `differentiate` of toeplitz.c, which
 * came later; it verifies values and no times. A step of the 9 x 3 product is 43 instructions, of which 27 are
 * multiply-adds and none touches the stack.
 *
 * The template includes this header, which has no include guard on purpose: it redefines REAL, vreal,
 * LANES and RC_NAME for the precision at hand.
 */
#ifndef RC_SIMD_ONCE
#define RC_SIMD_ONCE
#include <stdint.h>
#include <stddef.h>

#define RC_PASTE3_(a, b, c) a##b##c
#define RC_PASTE3(a, b, c) RC_PASTE3_(a, b, c)
#define RC_TABLE(name) RC_PASTE3(name, _, RC_LEVEL)
#define RC_NAME_F32(name) RC_PASTE3(name, _f32_, RC_LEVEL)
#define RC_NAME_F64(name) RC_PASTE3(name, _f64_, RC_LEVEL)

#define RC_INLINE static inline __attribute__((always_inline))
#define RC_NOINLINE static __attribute__((noinline))
#ifdef __clang__
#define RC_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RC_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define RC_VECTOR_BYTES 64
#define RC_REGISTERS 32
#elif defined(__AVX2__)
#define RC_VECTOR_BYTES 32
#define RC_REGISTERS 16
#elif defined(__aarch64__)
#define RC_VECTOR_BYTES 16
#define RC_REGISTERS 32
#else
#define RC_VECTOR_BYTES 16
#define RC_REGISTERS 16
#endif

typedef float rc_vector_f32 __attribute__((vector_size(RC_VECTOR_BYTES), aligned(4), may_alias));
typedef double rc_vector_f64 __attribute__((vector_size(RC_VECTOR_BYTES), aligned(8), may_alias));
typedef int32_t rc_vector_i32 __attribute__((vector_size(RC_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t rc_vector_u32 __attribute__((vector_size(RC_VECTOR_BYTES), aligned(4), may_alias));
typedef int64_t rc_vector_i64 __attribute__((vector_size(RC_VECTOR_BYTES), aligned(8), may_alias));
typedef uint64_t rc_vector_u64 __attribute__((vector_size(RC_VECTOR_BYTES), aligned(8), may_alias));

static inline ptrdiff_t rc_round_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b * b; }
static inline ptrdiff_t rc_min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t rc_max(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
#endif

#undef REAL
#undef vreal
#undef vint
#undef vuint
#undef LANES
#undef RC_NAME
#undef LOAD
#undef STORE
#undef SPLAT
#if RC_BITS == 32
#define REAL float
#define vreal rc_vector_f32
#define vint rc_vector_i32
#define vuint rc_vector_u32
#define RC_NAME(x) RC_PASTE3(x, _f32_, RC_LEVEL)
#else
#define REAL double
#define vreal rc_vector_f64
#define vint rc_vector_i64
#define vuint rc_vector_u64
#define RC_NAME(x) RC_PASTE3(x, _f64_, RC_LEVEL)
#endif
#define LANES ((int)(RC_VECTOR_BYTES / sizeof(REAL)))
#define LOAD(p) (*(const vreal *)(p)) /* unaligned: the types carry the alignment of one element */
#define STORE(p, v) (*(vreal *)(p) = (v))
#define SPLAT(x) ((x) - (vreal){0})
