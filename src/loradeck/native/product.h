/* Matrix products over blocks of 16 outputs x 32 inputs.

   A block holds pairs of inputs: [16 pairs][16 outputs][2], so that one vector is two inputs of many outputs (of float32:
   [16 pairs][2][16 outputs]). Weights, keys and values all lie in such blocks. A tile is the blocks of 16 outputs, one
   after the other. What is multiplied lies in panels, [groups of 32 inputs][rows][32].

   Each sum runs over the inputs in ascending order, whatever the number of rows and tiles that are computed at once. */
#ifndef PRODUCT_H
#define PRODUCT_H
#include "numbers.h"
#include "quantised.h"
#include "activations.h"
#ifdef HALVES /* activations are multiplied in bfloat16, by the machine's own instruction */
typedef uint16_t num;
#define PLAIN BF16 /* what quantised weights are decoded to */
#else
typedef float num;
#define PLAIN F32
#endif
#if LANES == 16
#define ROWS 8 /* computed at once, of TILES tiles */
#define TILES 2
#else
#define ROWS 6
#define TILES 1
#endif
#define AHEAD 6144 /* bytes; what is read next is fetched */

static const i64 BLOCK[] = {2048, 1024, 1024}; /* bytes */

typedef struct {
    const char *blocks;
    i64 tiles, groups, format;
    const float *bias; /* of each output, or null */
} Matrix;
typedef struct {
    num *numbers;
    i64 rows;
    Rounded *rounded; /* (groups, rows) for quantised matrices, or null: they too are multiplied with the numbers */
} Panel;

INLINE num *panel_at(const Panel *p, i64 row, i64 group) { return p->numbers + (group * p->rows + row) * 32; }

/* Put LANES numbers into a panel, from `column` on. */
INLINE void put(num *to, vec v) {
#ifdef HALVES
    halves bits = __builtin_convertvector(bits_of_bf16(v), halves);
    memcpy(to, &bits, sizeof bits);
#else
    memcpy(to, &v, sizeof v);
#endif
}
/* Round what has been put into a group of a panel, where it is asked for. */
NOINLINE void round_group(const Panel *p, i64 row, i64 group) {
    vec x[32 / LANES];
    for (int n = 0; n < 32 / LANES; n++) x[n] = load(panel_at(p, row, group) + n * LANES, PLAIN);
    if (p->rounded) round_to_bytes(p->rounded + group * p->rows + row, x);
}
/* The address of one number of a block */
INLINE char *number_at(char *block, i64 input, i64 output, i64 format) {
    if (format == F32) return block + (input * 16 + output) * 4;
    return block + (input / 2 * 32 + output * 2 + input % 2) * SIZES[format];
}
INLINE void store_number(char *block, i64 input, i64 output, i64 format, float number) {
    char *to = number_at(block, input, output, format);
    if (format == F32) *(float *)to = number;
    else *(uint16_t *)to = half_bits(number, format);
}

#ifdef HALVES
typedef __m512i Pair[1]; /* two inputs of 16 outputs, in bfloat16 */
INLINE void load_pair(Pair w, const char *block, int pair, int format) {
    w[0] = _mm512_loadu_si512(block + pair * 64);
}
INLINE void add_pair(vec sum[PARTS], const Pair w, const num *x) {
    int32_t both;
    memcpy(&both, x, 4);
    sum[0] = (vec)_mm512_dpbf16_ps((__m512)sum[0], (__m512bh)w[0], (__m512bh)_mm512_set1_epi32(both));
}
#else
typedef vec Pair[2 * PARTS]; /* one input of 16 outputs, then the other */
INLINE void load_pair(Pair w, const char *block, int pair, int format) {
    for (int n = 0; n < PARTS; n++) {
        if (format == F32) {
            w[n] = *(const vec *)(block + pair * 128 + n * LANES * 4);
            w[PARTS + n] = *(const vec *)(block + pair * 128 + 64 + n * LANES * 4);
        } else {
            words both = *(const words *)(block + pair * 64 + n * LANES * 4);
            w[n] = format == BF16 ? of_bf16(both) : of_f16(both);
            w[PARTS + n] = format == BF16 ? (vec)(both & 0xffff0000) : of_f16(both >> 16);
        }
    }
}
INLINE void add_pair(vec sum[PARTS], const Pair w, const num *x) {
    UNROLL for (int n = 0; n < PARTS; n++) sum[n] = fused(w[n], each(x[0]), sum[n]);
    UNROLL for (int n = 0; n < PARTS; n++) sum[n] = fused(w[PARTS + n], each(x[1]), sum[n]);
}
#endif

/* Fetch the pair that will be read in AHEAD bytes. One at a time: many at once wait for each other, and sums for them. */
INLINE void fetch_pair(const char *block, int pair, int format) {
    const int bytes = BLOCK[format] / 16;
    for (int c = 0; c < bytes; c += 64) __builtin_prefetch(block + AHEAD + pair * bytes + c);
}

/* sum (tiles, rows, 16) += x (rows, 32) · block^T of each tile */
INLINE void block_product(float *sum, i64 sum_tile, const char *block, i64 tile_bytes, const num *x, int format,
                          const int fetches, const int rows, const int tiles) {
    vec s[4][ROWS][PARTS];
    UNROLL for (int t = 0; t < tiles; t++)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int n = 0; n < PARTS; n++) s[t][r][n] = *(vec *)(sum + t * sum_tile + r * 16 + n * LANES);
    UNROLL_4 for (int pair = 0; pair < 16; pair++) {
        Pair w[4];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int t = 0; t < tiles; t++) {
                const char *from = block + t * tile_bytes;
                if (r == 0) {
                    load_pair(w[t], from, pair, format);
                    if (fetches) fetch_pair(from, pair, format);
                }
                add_pair(s[t][r], w[t], x + r * 32 + pair * 2);
            }
    }
    UNROLL for (int t = 0; t < tiles; t++)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int n = 0; n < PARTS; n++) *(vec *)(sum + t * sum_tile + r * 16 + n * LANES) = s[t][r][n];
}
/* The same for any number of rows; few rows of several tiles at once, for their sums do not wait for each other. */
INLINE void blocks_product(float *sum, i64 sum_tile, const char *block, i64 tile_bytes, const num *x, i64 rows, int tiles,
                           int format, const int fetches) {
#define BLOCK_OF(n, t) block_product(sum + tile * sum_tile + row * 16, sum_tile, block + tile * tile_bytes, tile_bytes, \
                                     x + row * 32, format, fetches, n, t)
#define ROWS_OF(t)                                                  \
    for (i64 row = 0; row < rows;) {                                \
        if (rows - row >= ROWS) { BLOCK_OF(ROWS, t); row += ROWS; } \
        else if (rows - row >= 4) { BLOCK_OF(4, t); row += 4; }     \
        else if (rows - row >= 2) { BLOCK_OF(2, t); row += 2; }     \
        else { BLOCK_OF(1, t); row += 1; }                          \
    }
    int tile = 0;
    if (rows == 1)
        for (const i64 row = 0; tile + 4 <= tiles; tile += 4) BLOCK_OF(1, 4);
    if (rows == 2)
        for (const i64 row = 0; tile + 2 <= tiles; tile += 2) BLOCK_OF(2, 2);
    for (; tile + TILES <= tiles; tile += TILES) ROWS_OF(TILES)
#if TILES > 1
    for (; tile < tiles; tile++) ROWS_OF(1)
#endif
#undef ROWS_OF
#undef BLOCK_OF
}
#ifndef HALVES
NOINLINE void widen(float *to, const char *block, int format) { /* a block to float32 */
    Pair w;
    for (int pair = 0; pair < 16; pair++, to += 32) {
        fetch_pair(block, pair, format);
        if (format == BF16) load_pair(w, block, pair, BF16);
        else load_pair(w, block, pair, F16);
        memcpy(to, w, sizeof w);
    }
}
#endif

INLINE void groups_product(float *sum, i64 sum_tile, const char *block, i64 tile_bytes, i64 groups, i64 group_bytes,
                           const num *x, i64 x_group, i64 rows, int tiles, int format) {
#ifndef HALVES
    float wide[TILES][512] __attribute__((aligned(64)));
#endif
    for (i64 g = 0; g < groups; g++, block += group_bytes, x += x_group) {
#ifndef HALVES
        if (format != F32 && rows > 2 * ROWS) {
            for (int t = 0, n; t < tiles; t += n) {
                n = tiles - t < TILES ? tiles - t : TILES;
                for (int i = 0; i < n; i++) widen(wide[i], block + (t + i) * tile_bytes, format);
                blocks_product(sum + t * sum_tile, sum_tile, (char *)wide, sizeof *wide, x, rows, n, F32, 0);
            }
            continue;
        }
#endif
        blocks_product(sum, sum_tile, block, tile_bytes, x, rows, tiles, format, 1);
    }
}
/* sum (tiles, rows, 16) += x · W^T over the given groups; `x` is the first group's rows, `x_group` the way to the next */
NOINLINE void product(float *sum, i64 sum_tile, const char *block, i64 tile_bytes, i64 groups, i64 group_bytes,
                      const num *x, i64 x_group, i64 rows, int tiles, i64 format) {
#define CASE(f) case f: groups_product(sum, sum_tile, block, tile_bytes, groups, group_bytes, x, x_group, rows, tiles, f); break;
    switch (format) {
#ifndef HALVES
        CASE(F32) CASE(F16)
#endif
        CASE(BF16)
    }
#undef CASE
}
INLINE i64 tile_bytes_of(const Matrix *m) {
    return m->format < QUANTISED ? m->groups * BLOCK[m->format] : quantised_tile_bytes(m->format, m->groups);
}
/* Group g of a tile as a block of plain numbers, which may be decoded into `room`; `format` becomes its format. */
INLINE const char *block_of(const Matrix *m, i64 tile, i64 g, num room[512], int *format) {
    const char *from = m->blocks + tile * tile_bytes_of(m);
    *format = m->format < QUANTISED ? (int)m->format : PLAIN;
    if (m->format < QUANTISED) return from + g * BLOCK[m->format];
    decode(room, from, g, m->format, PLAIN);
    return (char *)room;
}
static void quantised_product(float *sum, i64 sum_tile, const Matrix *m, i64 tile, int tiles, const num *x, i64 x_group, i64 rows) {
    num room[4][512] __attribute__((aligned(64)));
    const int most = rows == 1 ? 4 : 2;
    const i64 tile_bytes = tile_bytes_of(m);
    for (i64 g = 0; g < m->groups; g++, x += x_group)
        for (int t = 0, n; t < tiles; t += n) {
            n = tiles - t < most ? tiles - t : most;
            for (int i = 0; i < n; i++) decode(room[i], m->blocks + (tile + t + i) * tile_bytes, g, m->format, PLAIN);
            blocks_product(sum + t * sum_tile, sum_tile, (char *)room, sizeof *room, x, rows, n, PLAIN, 0);
        }
}
/* sum (tiles, rows, 16) = x[row : row + rows] · W^T + bias, for `tiles` tiles from `tile` on */
static void tiles_of(float *sum, i64 sum_tile, const Matrix *m, i64 tile, int tiles, const Panel *x, i64 row, i64 rows) {
    for (int t = 0; t < tiles; t++) memset(sum + t * sum_tile, 0, rows * 64);
    if (m->format < QUANTISED)
        product(sum, sum_tile, m->blocks + tile * tile_bytes_of(m), tile_bytes_of(m), m->groups, BLOCK[m->format],
                panel_at(x, row, 0), x->rows * 32, rows, tiles, m->format);
    else if (x->rounded && ADD_TILES[m->format])
        ADD_TILES[m->format](sum, sum_tile, m->blocks + tile * tile_bytes_of(m), tile_bytes_of(m), tiles, m->groups,
                             x->rounded + row, x->rows, rows);
    else quantised_product(sum, sum_tile, m, tile, tiles, panel_at(x, row, 0), x->rows * 32, rows);
    if (!m->bias) return;
    for (int t = 0; t < tiles; t++)
        for (i64 r = 0; r < rows; r++)
            for (int c = 0; c < 16; c++) sum[t * sum_tile + r * 16 + c] += m->bias[(tile + t) * 16 + c];
}

#endif
