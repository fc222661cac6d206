/* Vectors of float32, as wide as the machine's registers.

   Nothing here depends on how many rows are computed together, so that a row's sums have one order. */
#ifndef NUMBERS_H
#define NUMBERS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined __FMA__
#include <immintrin.h>
#elif defined __ARM_NEON
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_32 UNROLL
#define UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_32 _Pragma("GCC unroll 32")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

#if defined __AVX512F__
#define LANES 16
#elif defined __AVX2__
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS (16 / LANES) /* vectors that hold a tile's 16 outputs */

typedef int64_t i64;
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t uint8s __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t int8s __attribute__((vector_size(LANES), aligned(1), may_alias));

enum { F32, BF16, F16, QUANTISED }; /* formats of numbers; those from QUANTISED on are in quantised.h */
static const i64 SIZES[] = {4, 2, 2};

INLINE vec of_bf16(words w) { return (vec)(w << 16); }
INLINE vec choose(words mask, vec yes, vec no) { return (vec)((mask & (words)yes) | (~mask & (words)no)); }
INLINE vec of_f16(words w) { /* by integers: float32's own subnormal numbers would take a hundred times as long */
    words m = w & 0x7fff, normal = (m << 13) + 0x38000000; /* its exponent is biased by 15, float32's by 127 */
    vec small = __builtin_convertvector((ints)m, vec) * 0x1p-24f;
    words special = (words)((ints)m >= 0x7c00) & 0x7f800000; /* infinite, or NaN */
    return (vec)((words)choose((words)((ints)m < 0x400), small, (vec)(normal | special)) | (w & 0x8000) << 16);
}
INLINE words bits_of_bf16(vec v) { /* rounded to the nearest, ties to even; a NaN stays one */
    words b = (words)v, rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16, quiet = b >> 16 | 64;
    words nan = (words)(v != v);
    return (quiet & nan) | (rounded & ~nan);
}
INLINE words bits_of_f16(vec v) { /* rounded to the nearest, ties to even; too large becomes infinite */
    words b = (words)v, sign = b >> 16 & 0x8000, m = b & 0x7fffffff;
    words normal = (m + 0xfff + (m >> 13 & 1) - 0x38000000) >> 13;
    words small = (words)((vec)m + 0.5f) - 0x3f000000; /* below 2^-14 its last bit is 2^-24, as that of numbers near 0.5 */
    words is_small = (words)((ints)m < 0x38800000), is_large = (words)((ints)m >= 0x477ff000);
    words nan = (words)(v != v);
    normal = (small & is_small) | (normal & ~is_small);
    normal = (0x7c00 & is_large) | (normal & ~is_large);
    return sign | (0x7e00 & nan) | (normal & ~nan);
}

/* LANES numbers that lie side by side */
INLINE vec load(const void *from, int format) {
    if (format == F32) return *(const vec *)from;
    words w = __builtin_convertvector(*(const halves *)from, words);
    return format == BF16 ? of_bf16(w) : of_f16(w);
}
INLINE float load_one(const void *from, int format) {
    if (format == F32) return *(const float *)from;
    words w = (words){} + *(const uint16_t *)from;
    return format == BF16 ? of_bf16(w)[0] : of_f16(w)[0];
}
INLINE uint16_t half_bits(float number, int format) {
    vec v = (vec){} + number;
    return format == BF16 ? bits_of_bf16(v)[0] : bits_of_f16(v)[0];
}

INLINE vec zero(void) { return (vec){}; }
INLINE vec each(float number) { return number - zero(); }
/* a · b + c, rounded once where the machine can. Written out, since a compiler may fuse one copy of a loop and not another. */
INLINE vec fused(vec a, vec b, vec c) {
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined __FMA__ && LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined __ARM_NEON
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
/* One number of a vector's, always in the same order: each half with the other */
#if defined __AVX2__
INLINE __m256 half_of(vec v, int half) {
#if LANES == 16
    return half ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v);
#else
    return (__m256)v;
#endif
}
#define FOLD(v, op) \
    __m256 eight = LANES == 16 ? _mm256_##op##_ps(half_of(v, 0), half_of(v, 1)) : half_of(v, 0); \
    __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    four = _mm_##op##_ps(four, _mm_movehl_ps(four, four)); \
    return _mm_cvtss_f32(_mm_##op##_ss(four, _mm_shuffle_ps(four, four, 1)))
INLINE float total(vec v) { FOLD(v, add); }
INLINE float largest(vec v) { FOLD(v, max); }
#else
#define FOLD(v, result) \
    float lane[LANES]; \
    memcpy(lane, &v, sizeof lane); \
    for (int half = LANES / 2; half; half /= 2) \
        for (int i = 0; i < half; i++) { const float a = lane[i], b = lane[i + half]; lane[i] = result; } \
    return lane[0]
INLINE float total(vec v) { FOLD(v, a + b); }
INLINE float largest(vec v) { FOLD(v, a > b ? a : b); }
#endif

/* e^x to 1e-7 of it for -87 <= x <= 88, from 2^n e^f with |f| <= ln 2 / 2 (Cephes) */
INLINE vec bounded_exponential(vec x) {
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are a whole number */
    vec n = shifted - 12582912.0f, f = fused(n, each(2.12194440e-4f), fused(n, each(-0.693359375f), x));
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1, 1};
    vec p = each(1.9875691500e-4f);
    UNROLL for (int i = 0; i < 7; i++) p = fused(p, f, each(terms[i]));
    return (vec)((words)p + ((words)shifted << 23));
}
INLINE vec exponential(vec x) { /* below -87 it is e^-87, above 88 infinite; NaN stays NaN */
    words over = (words)(x > 88.7f);
    vec bounded = choose(over, zero(), choose((words)(x < -87.0f), zero() - 87.0f, x));
    return choose(over, zero() + INFINITY, choose((words)(x == x), bounded_exponential(bounded), x));
}
INLINE vec tangent(vec x) { /* tanh */
    vec e = exponential(x * 2.0f);
    return choose((words)(x > 20.0f), zero() + 1.0f, (e - 1.0f) / (e + 1.0f));
}
INLINE vec capped(vec x, float cap) { /* a cap of 0 is none */
    if (cap > 0) x = tangent(x / cap) * cap;
    return x;
}

#endif
