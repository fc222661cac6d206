/* The two instructions of AVX512_BF16 that the step uses, for machines without them: included before its source. */
#include <immintrin.h>

/* Two products a lane, of which each is added with one rounding: first that of the upper numbers. */
static inline __attribute__((always_inline)) __m512 emulated_dpbf16(__m512 sum, __m512i a, __m512i b) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    sum = _mm512_fmadd_ps((__m512)_mm512_and_si512(a, upper), (__m512)_mm512_and_si512(b, upper), sum);
    return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(a, 16), (__m512)_mm512_slli_epi32(b, 16), sum);
}
/* To the nearest, ties to even; no NaN is converted here. */
static inline __attribute__((always_inline)) __m256i emulated_cvtneps(__m512 v) {
    const __m512i bits = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16));
}
#define _mm512_dpbf16_ps(sum, a, b) emulated_dpbf16(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtne2ps_pbh(high, low) _mm512_inserti64x4(_mm512_castsi256_si512(emulated_cvtneps(low)), emulated_cvtneps(high), 1)
