/* Products of quantised weights with inputs that are rounded to 8 bits.

   32 inputs of a row are scale · code, with codes of -127 to 127 and scale = max |x| / 127. Where weights are s · u + m, u a
   byte without a sign, they add scale · (s · Σ u code + m · Σ code): both sums are whole numbers, and exact. */
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H
#include "quantised.h"

typedef struct {
    float scale, sum[3]; /* of the codes: of the first 16, of the others, of all */
    int8_t code[32];
} Rounded;

/* A number that is not finite makes a sum NaN, and with it all that the row gives. */
INLINE void round_to_bytes(Rounded *to, const vec x[32 / LANES]) {
    vec most = zero(), sum[2] = {zero(), zero()};
    for (int n = 0; n < 32 / LANES; n++) {
        vec size = (vec)((words)x[n] & 0x7fffffff);
        most = choose((words)(size > most), size, most);
    }
    to->scale = largest(most) / 127;
    const float inverse = to->scale < 0x1p-126f ? 0 : 1 / to->scale; /* it would be infinite */
    for (int n = 0; n < 32 / LANES; n++) {
        vec shifted = x[n] * inverse + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are a whole number */
        int8s code = __builtin_convertvector((ints)shifted, int8s);
        memcpy(to->code + n * LANES, &code, LANES);
        sum[n * LANES / 16] += shifted - 12582912.0f;
    }
    to->sum[0] = total(sum[0]), to->sum[1] = total(sum[1]), to->sum[2] = to->sum[0] + to->sum[1];
}

#define SHIFT 128 /* of values that have a sign, to bytes that have none */
INLINE int is_shifted(const int format) { return FORMAT[format].low == 8 || !is_linear(format); }
INLINE words look_up_bytes(words code, const int format) { /* of each byte */
    uint8_t value[16] __attribute__((aligned(16)));
    UNROLL for (int i = 0; i < 16; i++) value[i] = SHIFT + (int)(format == MXFP4 ? FP4[i] : IQ4[i]);
#if LANES == 16
    return (words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(*(__m128i *)value), (__m512i)code);
#elif defined __AVX2__
    return (words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(*(__m128i *)value), (__m256i)code);
#elif defined __aarch64__
    return (words)vqtbl1q_u8(*(uint8x16_t *)value, (uint8x16_t)code);
#else
    uint8_t byte[LANES * 4];
    memcpy(byte, &code, sizeof byte);
    for (int i = 0; i < LANES * 4; i++) byte[i] = value[byte[i]];
    memcpy(&code, byte, sizeof byte);
    return code;
#endif
}
INLINE words four_codes(const char *plane, const int four, const int output, const int bits) {
    const words w = *(const words *)(plane + (four * bits / 8 * 16 + output) * 4);
    return w >> four * bits % 8 & 0x01010101u * ((1 << bits) - 1);
}
/* Four inputs of each output from `output` on, as bytes */
INLINE words four_bytes(const char *group, const int four, const int output, const int format) {
    const int low = FORMAT[format].low, high = FORMAT[format].high;
    words code = four_codes(group, four, output, low);
    if (high) code |= four_codes(group + plane_bytes(low), four, output, high) << low;
    if (!is_linear(format)) return look_up_bytes(code, format);
    if (low == 8) code ^= 0x80808080;
    return code;
}
/* sum += four bytes of fewer than 8 bits, times four codes */
INLINE ints dot_of_few_bits(ints sum, words byte, const int8_t *code) {
    int32_t four;
    memcpy(&four, code, 4);
#if LANES == 16
    __m512i pairs = _mm512_maddubs_epi16((__m512i)byte, _mm512_set1_epi32(four));
    return sum + (ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined __AVX2__
    __m256i pairs = _mm256_maddubs_epi16((__m256i)byte, _mm256_set1_epi32(four));
    return sum + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined __ARM_FEATURE_DOTPROD
    return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)byte, (int8x16_t)vdupq_n_s32(four));
#else
    for (int i = 0; i < 4; i++) sum += (ints)(byte >> 8 * i & 255) * code[i];
    return sum;
#endif
}
INLINE ints dot(ints sum, words byte, const int8_t *code, const int bits) {
#if defined __AVX512VNNI__ && LANES == 16
    int32_t four;
    memcpy(&four, code, 4);
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)byte, _mm512_set1_epi32(four));
#else
    if (bits < 8) return dot_of_few_bits(sum, byte, code);
    return dot_of_few_bits(sum, byte & 0x0f0f0f0f, code) + (dot_of_few_bits((ints){}, byte >> 4 & 0x0f0f0f0f, code) << 4);
#endif
}
/* sum (tiles, rows, 16) += x (rows, 32) · group^T of each tile */
INLINE void add_group(float *sum, i64 sum_tile, const char *group, const char *super, i64 tile_bytes, const Rounded *x, i64 rows,
                      const int format, const int tiles) {
    const int bits = is_shifted(format) ? 8 : FORMAT[format].low + FORMAT[format].high;
    const int in_halves = FORMAT[format].scales == SIGNED_16 || FORMAT[format].scales == NIBBLE_MINIMUM;
    const char *scales = group + plane_bytes(FORMAT[format].low) + plane_bytes(FORMAT[format].high);
    for (int n = 0; n < PARTS; n++) {
        vec scale[2][2], minimum[2][2];
        words byte[2][8];
        UNROLL for (int t = 0; t < tiles; t++) {
            for (int half = 0; half < 1 + in_halves; half++) {
                scales_of(scale[t] + half, minimum[t] + half, scales + t * tile_bytes, super + t * tile_bytes, half, n * LANES, format);
                if (is_shifted(format)) minimum[t][half] = scale[t][half] * -SHIFT;
            }
            UNROLL for (int four = 0; four < 8; four++) byte[t][four] = four_bytes(group + t * tile_bytes, four, n * LANES, format);
        }
        for (i64 r = 0; r < rows; r++) {
            ints product[2][2] = {};
            UNROLL for (int four = 0; four < 8; four++)
                UNROLL for (int t = 0; t < tiles; t++)
                    product[t][in_halves * four / 4] = dot(product[t][in_halves * four / 4], byte[t][four], x[r].code + four * 4, bits);
            UNROLL for (int t = 0; t < tiles; t++) {
                vec *to = (vec *)(sum + t * sum_tile + r * 16 + n * LANES), y = minimum[t][0] * x[r].sum[in_halves ? 0 : 2];
                y = fused(scale[t][0], floats((words)product[t][0]), y);
                if (in_halves) y = fused(scale[t][1], floats((words)product[t][1]), fused(minimum[t][1], each(x[r].sum[1]), y));
                *to = fused(each(x[r].scale), y, *to);
            }
        }
    }
}
/* sum (tiles, rows, 16) += x · W^T; `x` is the first group's rows, `x_group` the way to the next */
INLINE void add_tiles(float *sum, i64 sum_tile, const char *tile, i64 tile_bytes, int tiles, i64 groups, const Rounded *x,
                      i64 x_group, i64 rows, const int format) {
    for (int t = 0, n; t < tiles; t += n) {
        n = LANES == 16 && rows > 1 && tiles - t > 1 ? 2 : 1;
        for (i64 g = 0; g < groups; g++) {
            const char *super, *group = group_of(tile + t * tile_bytes, g, format, &super);
            if (n == 2) add_group(sum + t * sum_tile, sum_tile, group, super, tile_bytes, x + g * x_group, rows, format, 2);
            else add_group(sum + t * sum_tile, sum_tile, group, super, tile_bytes, x + g * x_group, rows, format, 1);
        }
    }
}
#define ADDER(f) NOINLINE void add_tiles_##f(float *sum, i64 sum_tile, const char *tile, i64 tile_bytes, int tiles, i64 groups, \
                                             const Rounded *x, i64 x_group, i64 rows) { \
    add_tiles(sum, sum_tile, tile, tile_bytes, tiles, groups, x, x_group, rows, f); }
EACH_OF_BYTES(ADDER)
#undef ADDER
static void (*const ADD_TILES[FORMATS])(float *, i64, const char *, i64, int, i64, const Rounded *, i64, i64) = {
#define ADDER(f) [f] = add_tiles_##f,
    EACH_OF_BYTES(ADDER)
#undef ADDER
};

#endif
