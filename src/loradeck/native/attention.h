/* out = softmax(scale · q k^T) v over a sequence's keys and values

   They lie in pages of 32 tokens, each with what all layers keep of them: [layer][key head][keys, then values]. Keys are
   a matrix with tokens as outputs (2 tiles of D / 32 blocks), values one with tokens as inputs (D / 16 tiles of one
   block), so that the product of weights is theirs too. Several tokens of one sequence, and the query heads that share a
   key head, are rows of these products. What a token does not see has the weight 0 exactly. */
#ifndef ATTENTION_H
#define ATTENTION_H
#include "product.h"

#define PAGE 32   /* tokens */
#define SEGMENT 8 /* tokens of one sequence that are computed together */

typedef struct {
    i64 row, count, first; /* rows of the step; the first one's position */
    char *const *pages;
} Segment;
typedef struct {
    i64 heads, dim, format; /* query heads of one key head; width, a multiple of 32 */
    i64 offset, window;     /* of this layer's key head in a page, in bytes; tokens that are seen, 0 for all */
    float cap;
} Attention;

INLINE i64 head_bytes(i64 dim, i64 format) { return PAGE * dim * SIZES[format]; } /* of keys, and of values */
INLINE i64 scratch_bytes(i64 tokens, i64 heads, i64 dim) {
    i64 pages = tokens / PAGE + 2, rows = SEGMENT * heads;
    return pages * rows * PAGE * (4 + sizeof(num)) + dim * (rows + PAGE) * 4 + 256;
}
/* The first token that one at `position` sees, both counted from the first page. */
INLINE i64 first_seen(const Attention *a, i64 position) {
    return a->window && position >= a->window ? position - a->window + 1 : 0;
}

/* Scores of a row (tiles, stride, 16) to weights in a panel; return 1 / their sum. `seen`: it sees tokens [from, to). */
static float softmax(float *scores, i64 stride, i64 tiles, i64 from, i64 to, float cap, num *weights, i64 group) {
    vec lanes, most = zero() - INFINITY, sum = zero();
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    for (i64 t = 0; t < tiles; t++)
        for (int n = 0; n < PARTS; n++) {
            vec *s = (vec *)(scores + t * stride + n * LANES), v = capped(*s, cap);
            vec at = lanes + (float)(t * 16 + n * LANES);
            words sees = (words)(at >= (float)from) & (words)(at < (float)to);
            *s = v = choose(sees, v, zero() - INFINITY);
            most = choose((words)(v > most), v, most);
        }
    const float top = largest(most);
    for (i64 t = 0; t < tiles; t++)
        for (int n = 0; n < PARTS; n++) {
            vec at = lanes + (float)(t * 16 + n * LANES);
            words sees = (words)(at >= (float)from) & (words)(at < (float)to);
            vec weight = choose(sees, exponential(*(vec *)(scores + t * stride + n * LANES) - top), zero());
            sum += weight;
            put(weights + t / 2 * group + t % 2 * 16 + n * LANES, weight);
        }
    return 1.0f / total(sum);
}

/* One row's sums over the tokens [from, to) alone: a weight of 0 does not hide values that are not finite. `copy` is room
   for a page's values. */
static void sums_of_seen(const Attention *a, const Segment *g, float *sums, i64 stride, const num *weights, i64 group, i64 start,
                         i64 pages, i64 from, i64 to, char *copy) {
    const i64 block = BLOCK[a->format], bytes = head_bytes(a->dim, a->format);
    for (i64 t = 0; t < a->dim / 16; t++) memset(sums + t * stride, 0, 64);
    for (i64 p = 0; p < pages; p++) {
        memcpy(copy, g->pages[start + p] + a->offset + bytes, bytes);
        for (i64 token = 0; token < PAGE; token++)
            if (p * PAGE + token < from || p * PAGE + token >= to)
                for (i64 d = 0; d < a->dim; d++) store_number(copy + d / 16 * block, token, d % 16, a->format, 0);
        product(sums, stride, copy, block, 1, block, weights + p * group, 0, 1, (int)(a->dim / 16), a->format);
    }
}

/* Attention of a segment's rows for one key head: `q` [D / 32][rows, heads][32] and `out` the panel of o's inputs. */
static void attend(const Attention *a, const Segment *g, const Panel *q, const Panel *out, i64 out_head, char *scratch) {
    const i64 D = a->dim, rows = g->count * a->heads, last = g->first + g->count;
    const i64 start = a->window && g->first - a->window + 1 > 0 ? (g->first - a->window + 1) / PAGE : 0;
    const i64 pages = (last + PAGE - 1) / PAGE - start, tiles = pages * 2, block = BLOCK[a->format];
    const i64 group = rows * 32; /* numbers of one group of 32 tokens in the panel of weights */
    float *scores = (float *)scratch, *sums = scores + tiles * rows * 16;
    char *copy = (char *)(sums + D * rows);
    num *weights = (num *)(copy + D * PAGE * 4);
    memset(scores, 0, tiles * rows * 64);
    memset(sums, 0, D * rows * 4);
    for (i64 p = 0; p < pages; p++)
        product(scores + p * 2 * rows * 16, rows * 16, g->pages[start + p] + a->offset, D / 32 * block, D / 32, block,
                panel_at(q, g->row * a->heads, 0), q->rows * 32, rows, 2, a->format);
    float inverse[SEGMENT * a->heads];
    for (i64 r = 0; r < rows; r++) {
        const i64 position = g->first + r / a->heads - start * PAGE;
        inverse[r] = softmax(scores + r * 16, rows * 16, tiles, first_seen(a, position), position + 1, a->cap, weights + r * 32, group);
    }
    for (i64 p = 0; p < pages; p++)
        product(sums, rows * 16, g->pages[start + p] + a->offset + head_bytes(D, a->format), block, 1, block,
                weights + p * group, 0, rows, (int)(D / 16), a->format);
    for (i64 r = 0; r < rows; r++) {
        const i64 position = g->first + r / a->heads - start * PAGE;
        vec finite = zero();
        for (i64 d = 0; d < D; d += LANES) finite += *(vec *)(sums + (d / 16 * rows + r) * 16 + d % 16) * 0.0f;
        if (total(finite) != 0)
            sums_of_seen(a, g, sums + r * 16, rows * 16, weights + r * 32, group, start, pages, first_seen(a, position), position + 1, copy);
        const i64 row = g->row + r / a->heads, first = (out_head + r % a->heads) * D;
        for (i64 d = 0; d < D; d += LANES)
            put(panel_at(out, row, (first + d) / 32) + (first + d) % 32,
                *(vec *)(sums + (d / 16 * rows + r) * 16 + d % 16) * inverse[r]);
        for (i64 d = 0; d < D; d += 32) round_group(out, row, (first + d) / 32);
    }
}

#endif
