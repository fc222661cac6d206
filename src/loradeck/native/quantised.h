/* Quantised weights: w = scale · value of a code + minimum, with codes of 2 to 8 bits, as llama.cpp's GGUF files have them,
   and U4 of GPTQ and AWQ, NF4 and I8 of bitsandbytes.

   A tile of 16 outputs lies in groups of 32 inputs. A group holds the low bits of its codes, the high bits, and scales.
   Of b bits, word k of an output holds inputs n k to n k + n - 1, n = 32 / b: input n k + 4 s + j at bit 8 j + b s. So one
   vector holds words of many outputs, and a shift and a mask bring four inputs of each into bytes.
   Where scales are themselves scaled, 8 groups are a superblock, which begins with the scales of these.

   A group is decoded to a block of plain numbers (product.h), with one rounding, just before it is multiplied. */
#ifndef QUANTISED_H
#define QUANTISED_H
#include "numbers.h"

enum { Q8_0 = QUANTISED, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS, U4, NF4, I8, FORMATS };
enum { /* of each output: */
    HALF,           /* a scale in float16 */
    FLOAT,          /* a scale in float32 */
    HALF_MINIMUM,   /* a scale and a minimum in float16 */
    HALF_ZERO,      /* a scale in float16, and a byte: the code of zero */
    POWER,          /* a power of two */
    SIGNED,         /* a signed byte, times the superblock's scale in float16 */
    SIGNED_16,      /* the same for 16 inputs each */
    BYTE_MINIMUM,   /* a byte for the scale and one for the minimum, times the superblock's */
    NIBBLE_MINIMUM, /* 4 bits for the scale and 4 for the minimum of 16 inputs each, times the superblock's */
};
static const struct { i64 low, high, scales, file_bytes; float first; } FORMAT[] = { /* the first code's value */
    [Q8_0] = {8, 0, HALF, 34, 0},           [Q4_0] = {4, 0, HALF, 18, -8},            [Q4_1] = {4, 0, HALF_MINIMUM, 20, 0},
    [Q5_0] = {4, 1, HALF, 22, -16},         [Q5_1] = {4, 1, HALF_MINIMUM, 24, 0},     [IQ4_NL] = {4, 0, HALF, 18, 0},
    [MXFP4] = {4, 0, POWER, 17, 0},         [Q2_K] = {2, 0, NIBBLE_MINIMUM, 84, 0},   [Q3_K] = {2, 1, SIGNED_16, 110, -4},
    [Q4_K] = {4, 0, BYTE_MINIMUM, 144, 0},  [Q5_K] = {4, 1, BYTE_MINIMUM, 176, 0},    [Q6_K] = {4, 2, SIGNED_16, 210, -32},
    [IQ4_XS] = {4, 0, SIGNED, 136, 0},      [U4] = {4, 0, HALF_ZERO, 19, 0},          [NF4] = {4, 0, FLOAT, 20, 0},
    [I8] = {8, 0, FLOAT, 36, 0},
};
static const i64 SCALE_BYTES[] = {32, 64, 64, 48, 16, 16, 32, 32, 32}, SUPER_BYTES[] = {0, 0, 0, 0, 0, 32, 32, 64, 64};
static const float IQ4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const float NORMAL[] = {-1, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
    0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1};
static const float FP4[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* twice the values */

INLINE i64 groups_of_file_block(i64 format) { return SUPER_BYTES[FORMAT[format].scales] ? 8 : 1; }
INLINE i64 plane_bytes(i64 bits) { return bits * 64; }
INLINE i64 quantised_bytes(i64 format) { /* of a group */
    return plane_bytes(FORMAT[format].low) + plane_bytes(FORMAT[format].high) + SCALE_BYTES[FORMAT[format].scales];
}
INLINE i64 super_bytes(i64 format) { /* of the groups of a block of the file, and what is before them */
    return SUPER_BYTES[FORMAT[format].scales] + groups_of_file_block(format) * quantised_bytes(format);
}
INLINE i64 quantised_tile_bytes(i64 format, i64 groups) { return groups / groups_of_file_block(format) * super_bytes(format); }

typedef struct { vec part[16 / LANES]; } Table; /* values of codes of 4 bits; of fewer bits they are repeated */
INLINE int is_linear(const int format) { return format != IQ4_NL && format != IQ4_XS && format != MXFP4 && format != NF4; }
INLINE Table table_of(const int format, const int bits, const int step) {
    float values[16];
    for (int i = 0; i < 16; i++)
        values[i] = is_linear(format) ? step * (i & ((1 << bits) - 1))
                  : format == MXFP4   ? FP4[i]
                  : format == NF4     ? NORMAL[i] : IQ4[i];
    Table table;
    memcpy(&table, values, sizeof values);
    return table;
}
/* The values of the codes at the lowest bits of each word */
INLINE vec look_up(const Table *t, words code) {
#if LANES == 16
    return (vec)_mm512_permutexvar_ps((__m512i)code, (__m512)t->part[0]);
#elif defined __AVX2__
    __m256 low = _mm256_permutevar8x32_ps((__m256)t->part[0], (__m256i)code);
    return (vec)_mm256_blendv_ps(low, _mm256_permutevar8x32_ps((__m256)t->part[1], (__m256i)code), (__m256)(code << 28));
#else
    float values[16];
    vec result;
    memcpy(values, t, sizeof values);
    for (int i = 0; i < LANES; i++) result[i] = values[code[i] & 15];
    return result;
#endif
}

#if LANES == 16 /* compilers take several steps for these */
INLINE vec half_scales(const char *from) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE words unsigned_bytes(const char *from) { return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); }
INLINE ints signed_bytes(const char *from) { return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)); }
#else
INLINE vec half_scales(const char *from) { return of_f16(__builtin_convertvector(*(const halves *)from, words)); }
INLINE words unsigned_bytes(const char *from) { return __builtin_convertvector(*(const uint8s *)from, words); }
INLINE ints signed_bytes(const char *from) { return __builtin_convertvector(*(const int8s *)from, ints); }
#endif
INLINE vec floats(words w) { return __builtin_convertvector((ints)w, vec); }
/* Scale and minimum of LANES outputs from `output` on, for the inputs of one half of a group */
INLINE void scales_of(vec *scale, vec *minimum, const char *from, const char *super, int half, int output, const int format) {
    const int kind = FORMAT[format].scales;
    if (kind == HALF || kind == HALF_MINIMUM || kind == HALF_ZERO) *scale = half_scales(from + output * 2);
    if (kind == FLOAT) *scale = *(const vec *)(from + output * 4);
    if (kind == HALF_ZERO) *minimum = -*scale * floats(unsigned_bytes(from + 32 + output)); /* exactly */
    if (kind == HALF_MINIMUM) *minimum = half_scales(from + 32 + output * 2);
    if (kind == POWER) { /* 2^(byte - 128) */
        words power = unsigned_bytes(from + output), small = 0x200000u << (power & 1);
        *scale = choose((words)(power < 2), (vec)small, (vec)((power - 1) << 23));
    }
    if (kind == SIGNED) *scale = floats((words)signed_bytes(from + output)) * half_scales(super + output * 2);
    if (kind == SIGNED_16) *scale = floats((words)signed_bytes(from + half * 16 + output)) * half_scales(super + output * 2);
    if (kind == BYTE_MINIMUM || kind == NIBBLE_MINIMUM) {
        words s = unsigned_bytes(from + half * (kind == NIBBLE_MINIMUM ? 16 : 0) + output), m = s >> 4;
        if (kind == NIBBLE_MINIMUM) s &= 15;
        else m = unsigned_bytes(from + 16 + output);
        *scale = floats(s) * half_scales(super + output * 2);
        *minimum = -floats(m) * half_scales(super + 32 + output * 2);
    }
    if (kind != HALF_MINIMUM && kind != HALF_ZERO && kind < BYTE_MINIMUM) *minimum = *scale * FORMAT[format].first; /* too */
}
INLINE words code_of(const char *plane, const int input, const int output, const int bits) { /* and what is above it */
    const int n = 32 / bits;
    const words w = *(const words *)(plane + (input / n * 16 + output) * 4);
    return w >> (8 * (input % 4) + bits * (input % n / 4));
}
INLINE vec values_of(const char *plane, const Table *lows, const Table *highs, int input, int output, const int format) {
    const int low = FORMAT[format].low, high = FORMAT[format].high;
    words code = code_of(plane, input, output, low), above = {};
    if (low == 8) return floats((words)((ints)(code << 24) >> 24));
    if (high) above = code_of(plane + plane_bytes(low), input, output, high);
    if (LANES < 16 && is_linear(format)) return floats((code & ((1 << low) - 1)) | (above & ((1 << high) - 1)) << low);
    vec value = look_up(lows, code);
    if (high) value += look_up(highs, above);
    return value;
}
/* Decode a group into a block of plain numbers. */
INLINE void decode_as(char *to, const char *group, const char *super, const int format, const int plain) {
    const int low = FORMAT[format].low, high = FORMAT[format].high;
    const char *scales = group + plane_bytes(low) + plane_bytes(high);
    const Table lows = table_of(format, low, 1), highs = table_of(Q4_0, high, 1 << low);
    for (int n = 0; n < PARTS; n++) {
        vec scale[2], minimum[2];
        for (int half = 0; half < 2; half++) scales_of(scale + half, minimum + half, scales, super, half, n * LANES, format);
        UNROLL_32 for (int pair = 0; pair < 16; pair++) {
            vec w[2];
            for (int j = 0; j < 2; j++) {
                const int i = 2 * pair + j;
                w[j] = fused(scale[i / 16], values_of(group, &lows, &highs, i, n * LANES, format), minimum[i / 16]);
                if (plain == F32) *(vec *)(to + (i * 16 + n * LANES) * 4) = w[j];
            }
#ifdef HALVES
            if (plain == BF16) { /* the two inputs of an output side by side */
                const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                       6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)w[1], (__m512)w[0]);
                _mm512_storeu_si512(to + pair * 64, _mm512_permutexvar_epi16(order, both));
            }
#endif
        }
    }
}
#define EACH_OF_BYTES(X) X(Q8_0) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(IQ4_NL) X(MXFP4) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) \
    X(IQ4_XS) X(U4) X(I8)
#define EACH_FORMAT(X) EACH_OF_BYTES(X) X(NF4) /* whose codes stand for no whole numbers */
#define DECODER(f) NOINLINE void decode_##f(char *to, const char *group, const char *super, const int plain) { \
    if (plain == F32) decode_as(to, group, super, f, F32); else decode_as(to, group, super, f, BF16); }
EACH_FORMAT(DECODER)
#undef DECODER
static void (*const DECODE[])(char *, const char *, const char *, int) = {
#define DECODER(f) [f] = decode_##f,
    EACH_FORMAT(DECODER)
#undef DECODER
};
/* Group g of a tile, and the scales before it */
INLINE const char *group_of(const char *tile, i64 g, i64 format, const char **super) {
    const i64 before = SUPER_BYTES[FORMAT[format].scales], in_super = before ? g & 7 : 0;
    *super = tile + (before ? g >> 3 : g) * super_bytes(format); /* a division would take as long as the rest */
    return *super + before + in_super * quantised_bytes(format);
}
/* Decode group g of a tile, to float32 or, in a build for it, to bfloat16. */
INLINE void decode(void *to, const char *tile, i64 g, i64 format, const int plain) {
    const char *super, *group = group_of(tile, g, format, &super);
    DECODE[format](to, group, super, plain);
}

/* ---- from a file's blocks ---- */
typedef struct { /* a block of one output, taken apart; scales of 16 or 32 inputs each */
    uint8_t code[256], scale[16], minimum[16];
    uint16_t half, half_minimum;
    float number;
} FileBlock;
#define EACH_CODE(statement) \
    for (int part = 0; part < 8; part++) for (int i = 0; i < 32; i++) statement;
static void take_apart(FileBlock *b, const uint8_t *from, i64 format) {
    const uint8_t *q, *h;
    memset(b, 0, sizeof *b);
    switch (format) {
    case Q8_0:
        memcpy(&b->half, from, 2);
        memcpy(b->code, from + 2, 32);
        break;
    case I8:
        memcpy(&b->number, from, 4);
        memcpy(b->code, from + 4, 32);
        break;
    case Q4_0: case Q4_1: case IQ4_NL: case MXFP4: case Q5_0: case Q5_1: case U4: case NF4:
        q = from;
        if (format == MXFP4) b->scale[0] = *q++;
        else if (format == NF4) memcpy(&b->number, q, 4), q += 4;
        else memcpy(&b->half, q, 2), q += 2;
        if (format == Q4_1 || format == Q5_1) memcpy(&b->half_minimum, q, 2), q += 2;
        if (format == U4) b->minimum[0] = *q++;
        h = q;
        if (format == Q5_0 || format == Q5_1) q += 4;
        for (int i = 0; i < 16; i++) b->code[i] = q[i] & 15, b->code[16 + i] = q[i] >> 4;
        if (h != q)
            for (int i = 0; i < 32; i++) b->code[i] |= (h[i / 8] >> i % 8 & 1) << 4;
        break;
    case Q2_K:
        for (int i = 0; i < 16; i++) b->scale[i] = from[i]; /* and the minimum, which stays in its upper bits */
        EACH_CODE(b->code[32 * part + i] = from[16 + part / 4 * 32 + i] >> 2 * (part % 4) & 3)
        memcpy(&b->half, from + 80, 2), memcpy(&b->half_minimum, from + 82, 2);
        break;
    case Q3_K:
        for (int i = 0; i < 16; i++) {
            const int low = i < 8 ? from[96 + i] & 15 : from[88 + i] >> 4, high = from[104 + i % 4] >> 2 * (i / 4) & 3;
            b->scale[i] = (uint8_t)((low | high << 4) - 32);
        }
        EACH_CODE(b->code[32 * part + i] = (from[32 + part / 4 * 32 + i] >> 2 * (part % 4) & 3) | (from[i] >> part & 1) << 2)
        memcpy(&b->half, from + 108, 2);
        break;
    case Q4_K: case Q5_K:
        memcpy(&b->half, from, 2), memcpy(&b->half_minimum, from + 2, 2);
        q = from + 4;
        for (int i = 0; i < 4; i++) {
            b->scale[i] = q[i] & 63, b->minimum[i] = q[i + 4] & 63;
            b->scale[i + 4] = (q[i + 8] & 15) | q[i] >> 6 << 4, b->minimum[i + 4] = q[i + 8] >> 4 | q[i + 4] >> 6 << 4;
        }
        h = from + 16, q = format == Q5_K ? from + 48 : h;
        EACH_CODE(b->code[32 * part + i] = q[part / 2 * 32 + i] >> part % 2 * 4 & 15)
        if (format == Q5_K) EACH_CODE(b->code[32 * part + i] |= (h[i] >> part & 1) << 4)
        break;
    case Q6_K:
        EACH_CODE(b->code[32 * part + i] = (from[part / 4 * 64 + part % 2 * 32 + i] >> part % 4 / 2 * 4 & 15)
                                         | (from[128 + part / 4 * 32 + i] >> 2 * (part % 4) & 3) << 4)
        memcpy(b->scale, from + 192, 16);
        memcpy(&b->half, from + 208, 2);
        break;
    case IQ4_XS:
        memcpy(&b->half, from, 2);
        for (int i = 0; i < 8; i++) {
            const int low = from[4 + i / 2] >> i % 2 * 4 & 15, high = from[2 + i / 4] >> 2 * (i % 4) & 3;
            b->scale[i] = (uint8_t)((low | high << 4) - 32);
        }
        for (int part = 0; part < 8; part++)
            for (int i = 0; i < 16; i++) {
                b->code[32 * part + i] = from[8 + part * 16 + i] & 15;
                b->code[32 * part + 16 + i] = from[8 + part * 16 + i] >> 4;
            }
        break;
    }
}
INLINE void put_plane(char *plane, const uint8_t *code, int output, const int bits, int shift) {
    const uint32_t mask = 0x01010101u * ((1 << bits) - 1);
    for (int k = 0; k < bits; k++) {
        uint32_t word = 0, four;
        for (int i = 0; i < 8 / bits; i++) { /* four codes at once */
            memcpy(&four, code + k * 32 / bits + 4 * i, 4);
            word |= (four >> shift & mask) << bits * i;
        }
        memcpy(plane + (k * 16 + output) * 4, &word, 4);
    }
}
/* Put the groups of one output's block into its place of a superblock. */
static void put_block(char *super, const FileBlock *b, int output, i64 format) {
    const int low = FORMAT[format].low, high = FORMAT[format].high, kind = FORMAT[format].scales;
    char *group = super + SUPER_BYTES[kind];
    if (group != super) memcpy(super + output * 2, &b->half, 2);
    if (group == super + 64) memcpy(super + 32 + output * 2, &b->half_minimum, 2);
    for (int g = 0; g < groups_of_file_block(format); g++, group += quantised_bytes(format)) {
        const uint8_t *code = b->code + g * 32;
        char *highs = group + plane_bytes(low), *scales = highs + plane_bytes(high);
        if (low == 8) put_plane(group, code, output, 8, 0);
        else if (low == 4) put_plane(group, code, output, 4, 0);
        else put_plane(group, code, output, 2, 0);
        if (high == 1) put_plane(highs, code, output, 1, low);
        if (high == 2) put_plane(highs, code, output, 2, low);
        switch (kind) {
        case HALF_MINIMUM: memcpy(scales + 32 + output * 2, &b->half_minimum, 2); /* and the scale */
        case HALF: memcpy(scales + output * 2, &b->half, 2); break;
        case HALF_ZERO: memcpy(scales + output * 2, &b->half, 2), scales[32 + output] = b->minimum[0]; break;
        case FLOAT: memcpy(scales + output * 4, &b->number, 4); break;
        case BYTE_MINIMUM: scales[16 + output] = b->minimum[g]; /* and the scale */
        case POWER: case SIGNED: scales[output] = b->scale[g]; break;
        default: scales[output] = b->scale[2 * g], scales[16 + output] = b->scale[2 * g + 1];
        }
    }
}

#endif
