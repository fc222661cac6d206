/* y[t] += sum over the row's adapters of weight · scaling · B (A x[t]), each at its own rank

   A lies as it is stored, (r, inputs), with zeros up to a multiple of 32; B as [tiles of 16 outputs][r][16]. */
#ifndef ADAPTERS_H
#define ADAPTERS_H
#include "product.h"

enum { Q, K, V, O, GATE, UP, DOWN, SLOTS };

typedef struct {
    i64 r, format; /* r = 0: the adapter leaves this matrix alone */
    const char *a, *b;
    float scaling;
} Pairing; /* of one adapter at one matrix */
typedef struct {
    const Pairing *pairings; /* (layers, SLOTS) */
    float weight;
} Use;
typedef struct {
    const Use *uses;
    i64 count;
} Route; /* the adapters of a row */

/* h[r, j + n] = factor · a[j + n] · x[r] for some rows and ranks */
INLINE void dots(float *h, i64 stride, const char *a, i64 inputs, const num *x, i64 x_group, float factor, int format,
                 const int rows, const int ranks) {
    vec sum[4][8];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < ranks; j++) sum[r][j] = zero();
    for (i64 g = 0; g < inputs / 32; g++, x += x_group)
        for (int c = 0; c < 32; c += LANES) {
            vec o[4];
#ifdef HALVES
            UNROLL for (int r = 0; r < rows; r++) o[r] = load(x + r * 32 + c, BF16);
#else
            UNROLL for (int r = 0; r < rows; r++) o[r] = *(const vec *)(x + r * 32 + c);
#endif
            UNROLL for (int j = 0; j < ranks; j++) {
                vec w = load(a + (j * inputs + g * 32 + c) * SIZES[format], format);
                UNROLL for (int r = 0; r < rows; r++) sum[r][j] = fused(o[r], w, sum[r][j]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < ranks; j++) h[r * stride + j] = total(sum[r][j]) * factor;
}
INLINE void all_dots(float *h, i64 stride, const Pairing *p, i64 inputs, const num *x, i64 x_group, float factor, i64 rows,
                     int format) {
    i64 row = 0;
    for (; row + 4 <= rows; row += 4) {
        i64 j = 0;
        for (; j + 2 <= p->r; j += 2)
            dots(h + row * stride + j, stride, p->a + j * inputs * SIZES[format], inputs, x + row * 32, x_group, factor, format, 4, 2);
        for (; j < p->r; j++)
            dots(h + row * stride + j, stride, p->a + j * inputs * SIZES[format], inputs, x + row * 32, x_group, factor, format, 4, 1);
    }
    for (; row < rows; row++) {
        i64 j = 0;
        for (; j + 8 <= p->r; j += 8)
            dots(h + row * stride + j, stride, p->a + j * inputs * SIZES[format], inputs, x + row * 32, x_group, factor, format, 1, 8);
        for (; j < p->r; j++)
            dots(h + row * stride + j, stride, p->a + j * inputs * SIZES[format], inputs, x + row * 32, x_group, factor, format, 1, 1);
    }
}
/* h (rows, stride) of rows of one route at one matrix */
NOINLINE void shrink(float *h, i64 stride, const Route *route, i64 site, i64 inputs, const Panel *x, i64 row, i64 rows) {
    const i64 x_group = x->rows * 32;
    const num *from = panel_at(x, row, 0);
    for (i64 n = 0; n < route->count; n++) {
        const Pairing *p = route->uses[n].pairings + site;
        const float factor = route->uses[n].weight * p->scaling;
        if (p->format == F32) all_dots(h, stride, p, inputs, from, x_group, factor, rows, F32);
        else if (p->format == BF16) all_dots(h, stride, p, inputs, from, x_group, factor, rows, BF16);
        else all_dots(h, stride, p, inputs, from, x_group, factor, rows, F16);
        h += p->r;
    }
}
INLINE void tile_update(float *sum, const char *b, i64 r, const float *h, i64 stride, int format, const int rows) {
    vec s[4][PARTS];
    UNROLL for (int t = 0; t < rows; t++)
        UNROLL for (int n = 0; n < PARTS; n++) s[t][n] = *(vec *)(sum + t * 16 + n * LANES);
    for (i64 j = 0; j < r; j++)
        UNROLL for (int n = 0; n < PARTS; n++) {
            vec w = load(b + (j * 16 + n * LANES) * SIZES[format], format);
            UNROLL for (int t = 0; t < rows; t++) s[t][n] = fused(w, each(h[t * stride + j]), s[t][n]);
        }
    UNROLL for (int t = 0; t < rows; t++)
        UNROLL for (int n = 0; n < PARTS; n++) *(vec *)(sum + t * 16 + n * LANES) = s[t][n];
}
INLINE void tile_updates(float *sum, const char *b, i64 r, const float *h, i64 stride, i64 rows, int format) {
    i64 row = 0;
    for (; row + 4 <= rows; row += 4) tile_update(sum + row * 16, b, r, h + row * stride, stride, format, 4);
    for (; row < rows; row++) tile_update(sum + row * 16, b, r, h + row * stride, stride, format, 1);
}
/* sum (rows, 16) += B h for one tile of a matrix, rows of one route */
NOINLINE void expand(float *sum, const Route *route, i64 site, i64 tile, const float *h, i64 stride, i64 rows) {
    for (i64 n = 0; n < route->count; n++) {
        const Pairing *p = route->uses[n].pairings + site;
        if (!p->r) continue;
        const char *b = p->b + tile * p->r * 16 * SIZES[p->format];
        if (p->format == F32) tile_updates(sum, b, p->r, h, stride, rows, F32);
        else if (p->format == BF16) tile_updates(sum, b, p->r, h, stride, rows, BF16);
        else tile_updates(sum, b, p->r, h, stride, rows, F16);
        h += p->r;
    }
}

#endif
