/* Shuffles of two vectors, whose numbers of lanes are given by a function of the lane (include after simd.h).
 *
 * RC_SHUFFLE(a, b, RC_EACH(f, next)) has in lane i the lane f(i, next) of a, or of b where the number is LANES or more.
 */
#ifndef RC_SHUFFLE_ONCE
#define RC_SHUFFLE_ONCE
#ifdef __clang__
#define RC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint){__VA_ARGS__})
#endif
#define RC_TO_2(f, n) f(0, n), f(1, n)
#define RC_TO_4(f, n) RC_TO_2(f, n), f(2, n), f(3, n)
#define RC_TO_8(f, n) RC_TO_4(f, n), f(4, n), f(5, n), f(6, n), f(7, n)
#define RC_TO_16(f, n) RC_TO_8(f, n), f(8, n), f(9, n), f(10, n), f(11, n), f(12, n), f(13, n), f(14, n), f(15, n)
#endif

#undef QUAD
#undef RC_EACH
#define QUAD ((int)(16 / sizeof(REAL))) /* lanes of 128 bits, inside which shuffles are cheap */
#if RC_VECTOR_BYTES * 8 == 16 * RC_BITS
#define RC_EACH RC_TO_16
#elif RC_VECTOR_BYTES * 8 == 8 * RC_BITS
#define RC_EACH RC_TO_8
#elif RC_VECTOR_BYTES * 8 == 4 * RC_BITS
#define RC_EACH RC_TO_4
#else
#define RC_EACH RC_TO_2
#endif
