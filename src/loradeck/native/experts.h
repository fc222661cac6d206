/* Mixtures of experts: which of them a row goes through, and which rows an expert computes

   A row's experts are those with the largest p = softmax(router x), the first of equal ones. Its weights are their p, or
   divided by their sum. Rows that are NaN have experts too, at weights of NaN. */
#ifndef EXPERTS_H
#define EXPERTS_H
#include "product.h"

typedef struct {
    Matrix router;
    const Matrix *matrices; /* (count, 3): gate, up and down of each */
    i64 count, chosen, normalised; /* chosen: experts of a row */
} Experts;
typedef struct {
    const Matrix *matrices; /* gate, up and down */
    i64 row, rows;          /* of the panel that they are multiplied with */
} Group;

/* chosen and weight (chosen) of one row; p: its logits, up to a multiple of 16 */
static void choose_for_row(const Experts *e, float *p, i64 *chosen, float *weight) {
    float most = p[0], all = 0, share = 0;
    for (i64 n = 1; n < e->count; n++) most = p[n] > most ? p[n] : most;
    for (i64 n = 0; n < e->count; n += LANES) *(vec *)(p + n) = exponential(*(vec *)(p + n) - most);
    for (i64 n = 0; n < e->count; n++) all += p[n];
    for (i64 k = 0; k < e->chosen; k++) {
        i64 best = 0;
        for (i64 n = 1; n < e->count; n++) best = p[n] > p[best] ? n : best;
        chosen[k] = best;
        weight[k] = p[best] / all;
        share += weight[k];
        p[best] = -1;
    }
    for (i64 k = 0; e->normalised && k < e->chosen; k++) weight[k] /= share;
}
/* Sort pairs of a row and an expert, which `chosen` numbers, by expert; return how many groups of one expert there are. */
static i64 group_by_expert(const Experts *e, const i64 *chosen, i64 pairs, i64 *order, Group *groups) {
    i64 count = 0, start[e->count + 1];
    memset(start, 0, sizeof start);
    for (i64 i = 0; i < pairs; i++) start[chosen[i] + 1]++;
    for (i64 n = 0; n < e->count; n++) {
        if (start[n + 1]) groups[count++] = (Group){e->matrices + n * 3, start[n], start[n + 1]};
        start[n + 1] += start[n];
    }
    for (i64 i = 0; i < pairs; i++) order[start[chosen[i]]++] = i;
    return count;
}

#endif
